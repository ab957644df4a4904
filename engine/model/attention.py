"""Attention within each document of a packed row, never across.

One function, registered with transformers, driven by explicit document boundaries that the
student passes as keyword arguments. No mask function is registered beside it: transformers then
builds no mask at all, where one would cost a device sync in each forward. Position ids alone are
never trusted to keep documents apart.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from redi.engine.errors import InputError

NAME = "redi_packed"


def choose_attention(wanted: str, device: torch.device) -> tuple[str, str]:
    """Resolve `[model] attention` on this machine.

    Returns:
        The name ("flash", "varlen" or "sdpa") and the reason, for the log.

    Raises:
        InputError: the wanted one cannot run here.
    """
    if device.type != "cuda":
        if wanted in ("flash", "varlen"):
            raise InputError(
                f'model.attention: "{wanted}" needs CUDA, this run is on {device.type}; '
                'use "auto" or "sdpa"'
            )
        return "sdpa", f"document by document: the device is {device.type}"
    if wanted == "flash" and find_spec("flash_attn") is None:
        raise InputError('model.attention: "flash" needs the package flash-attn; use "auto"')
    if wanted in ("auto", "flash") and find_spec("flash_attn") is not None:
        return "flash", "flash-attn is installed"
    if wanted in ("auto", "varlen"):
        return "varlen", "torch's own: flash-attn is not installed"
    return "sdpa", "document by document: asked for"


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


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One causal SDPA per document. query [1, heads, T, d], key and value [1, kv_heads, T, d]."""
    assert attention_mask is None, "packed rows carry boundaries, not masks"
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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """torch's varlen attention, CUDA only; nothing to install."""
    from torch.nn.attention.varlen import varlen_attn

    assert attention_mask is None, "packed rows carry boundaries, not masks"
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
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
        enable_gqa=query.shape[1] != key.shape[1],
    )
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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """flash-attn's varlen function, CUDA only."""
    from flash_attn import flash_attn_varlen_func

    assert attention_mask is None, "packed rows carry boundaries, not masks"
    out = flash_attn_varlen_func(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seq_lens_q,
        max_seqlen_q=max_length_q,
        max_seqlen_k=max_length_q,
        softmax_scale=scaling,
        causal=True,
    )
    return out.unsqueeze(0), None
