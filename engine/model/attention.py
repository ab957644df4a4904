"""Attention within each document of a packed row, never across.

One function, registered with transformers, driven by explicit document boundaries that the
student passes as keyword arguments. No mask function is registered beside it: transformers then
builds no mask at all, where one would cost a device sync in each forward. Position ids alone are
never trusted to keep documents apart.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from redi.engine.errors import InputError

NAME = "redi_packed"


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Resolve `[model] attention` on this machine.

    Returns:
        The name ("flash", "varlen" or "sdpa") and the reason, for the log.

    Raises:
        InputError: the wanted one cannot run here.
    """
    problem = None
    if device.type != "cuda":
        problem = f"needs CUDA, this run is on {device.type}"
    elif dtype not in (torch.bfloat16, torch.float16):
        problem = f"computes in half precision, this run in {str(dtype).removeprefix('torch.')}"
    if problem:
        if wanted in ("flash", "varlen"):
            raise InputError(f'model.attention: "{wanted}" {problem}; use "auto" or "sdpa"')
        return "sdpa", f"document by document: flash attention {problem}"
    if wanted == "sdpa":
        return "sdpa", "document by document: asked for"
    missing = _import_problem("flash_attn", "flash_attn_varlen_func")
    if wanted != "varlen" and not missing:
        return "flash", "flash-attn is installed"
    if wanted == "flash":
        raise InputError(f'model.attention: "flash": {missing}; use "auto"')
    return "varlen", "torch's own" + (": asked for" if wanted == "varlen" else f": {missing}")


def _import_problem(module: str, name: str) -> str | None:
    """Why `module.name` cannot be had, None if it can: a wheel may be there and not load."""
    try:
        getattr(import_module(module), name)
    except Exception as error:
        return f"{module}.{name} cannot be imported ({type(error).__name__})"
    return None


def register_attention(kind: str) -> str:
    """Register packed attention of the kind that `choose_attention` chose.

    Returns:
        The name to load a model with (`attn_implementation`).
    """
    AttentionInterface.register(NAME, {"flash": _flash, "varlen": _varlen, "sdpa": _sdpa}[kind])
    return NAME


def document_kwargs(cu_seqlens: torch.Tensor, max_seqlen: int) -> dict[str, Any]:
    """The keyword arguments that carry documents through transformers to the functions here.

    Args:
        cu_seqlens: [S + 1] int32, document boundaries within the row.
        max_seqlen: tokens of the longest document. A host int: as a tensor it would sync the
            device or recompile.
    """
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
        "use_cache": False,
    }


def _refuse(attention_mask: torch.Tensor | None, other: dict[str, Any]) -> None:
    """What would change the result must not be swallowed; `read_config` turns such models away."""
    assert attention_mask is None, "packed rows carry boundaries, not masks"
    for name in ("sliding_window", "softcap", "s_aux"):
        assert other.get(name) is None, f"{name} is not supported in packed attention"


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """One causal SDPA per document. query [1, heads, T, d], key and value [1, kv_heads, T, d]."""
    _refuse(attention_mask, other)
    groups = query.shape[1] // key.shape[1]
    # Expanded by hand: enable_gqa would fall back to the O(T^2) memory path on a CPU.
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    lengths = cu_seq_lens_q.diff().tolist()
    documents = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        for q, k, v in zip(
            query.split(lengths, dim=2),
            key.split(lengths, dim=2),
            value.split(lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(documents, dim=2).transpose(1, 2), None


def _varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """torch's varlen attention, CUDA only; nothing to install."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse(attention_mask, other)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    out = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),
        **grouped,
    )
    assert isinstance(out, torch.Tensor)  # a tuple only when the log-sum-exp is asked for
    return out.unsqueeze(0), None


def _flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """flash-attn's varlen function, CUDA only."""
    from flash_attn import flash_attn_varlen_func

    _refuse(attention_mask, other)
    out = flash_attn_varlen_func(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seq_lens_q,
        max_seqlen_q=max_length_q,
        max_seqlen_k=max_length_q,
        softmax_scale=scaling,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.unsqueeze(0), None
