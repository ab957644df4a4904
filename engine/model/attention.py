"""Attention within each document of a packed row, never across.

One function, registered with transformers, driven by explicit document boundaries that the
student passes as keyword arguments. No mask function is registered beside it: transformers then
builds no mask at all, where one would cost a device sync in each forward. Position ids alone are
never trusted to keep documents apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from redi.engine.errors import InputError

NAME = "redi_packed"
PROBE = "redi_probe"
FLASH_FUNCTION = "flash_attn_varlen_func"


class Flash(NamedTuple):
    """A generation of flash-attn."""

    package: str
    """As pip knows it: folders tell nothing, flash-attn 2 brings along an older copy of 4's."""
    module: str
    """Where its `flash_attn_varlen_func` is."""
    cards: tuple[int, ...]
    """Major compute capabilities that we take it for."""


# The first that a card can have is taken. 3 is written for Hopper; 4 has no backward for sm_80 and
# no deterministic one for sm_120.
FLASH = {
    "flash-3": Flash("flash-attn-3", "flash_attn_interface", (9,)),
    "flash-4": Flash("flash-attn-4", "flash_attn.cute", (9, 10, 11)),
    "flash-2": Flash("flash-attn", "flash_attn", (8, 9, 10, 11, 12)),
}

# Those that have dropout on the attention probabilities.
WITH_DROPOUT = {"sdpa", "flash-2"}

# Arguments that change the result, and what a model that passes one has.
REFUSED_ARGUMENTS = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped scores",
    "s_aux": "sinks",
    "position_bias": "position biases",
}

# What no graph of torch.compile holds: the one reads the documents' lengths, the other is no op
# that torch knows of.
NOT_IN_GRAPHS = {"sdpa", "flash-4"}


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Resolve `[model] attention` on this machine.

    Returns:
        The name ("varlen", "sdpa" or a key of `FLASH`) and the reason, for the log.

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
    if wanted in ("sdpa", "varlen"):
        return wanted, "asked for"
    kind, reason = find_flash(torch.cuda.get_device_capability(device)[0])
    if kind:
        return kind, reason
    if wanted == "flash":
        raise InputError(f'model.attention: "flash": {reason}; install one or use "auto"')
    return "varlen", f"torch's own: {reason}"


def find_flash(major: int) -> tuple[str | None, str]:
    """The best installed flash-attn for a card of this major compute capability.

    Returns:
        A key of `FLASH`, or None, and the reason.
    """
    problems = []
    for kind, (package, module, cards) in FLASH.items():
        if major not in cards:
            continue
        try:
            found = version(package)
            getattr(import_module(module), FLASH_FUNCTION)
        except PackageNotFoundError:
            problems.append(f"{package} is not installed")
        except Exception as error:  # a wheel may be there and not load, in any way
            problems.append(f"{package} cannot be imported ({type(error).__name__})")
        else:
            return kind, f"{package} {found}"
    return None, "; ".join(problems) or f"there is no flash-attn for cards of sm_{major}x"


def register_attention(kind: str) -> str:
    """Register packed attention of the kind that `choose_attention` chose.

    Returns:
        The name to load a model with (`attn_implementation`).
    """
    if kind == "sdpa":
        AttentionInterface.register(NAME, _sdpa)
    else:
        varlen = _torch_varlen() if kind == "varlen" else _flash_varlen(kind)
        AttentionInterface.register(NAME, _whole_row(varlen, kind))
    return NAME


def register_probe() -> str:
    """Register attention that computes nothing and refuses what packed attention refuses.

    Runs on the meta device. Returns the name to build a model with.
    """
    AttentionInterface.register(PROBE, _probe)
    return PROBE


_calls: list[str] | None = None


@contextmanager
def recording_calls() -> Iterator[list[str]]:
    """Within the context, each call of packed attention appends its kind to the list."""
    global _calls
    _calls = []
    try:
        yield _calls
    finally:
        _calls = None


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


def _enter(
    kind: str,
    cu_seqlens: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    other: dict[str, Any],
) -> None:
    """Record a call; InputError for what would change the result if it were ignored."""
    if cu_seqlens is None:
        raise InputError("the model does not pass document boundaries to its attention")
    if attention_mask is not None:
        raise InputError("the model passes a mask of its own to its attention")
    for name, meaning in REFUSED_ARGUMENTS.items():
        if other.get(name) is not None:
            raise InputError(f"the model's attention has {meaning} ({name})")
    if other.get("dropout") and kind not in WITH_DROPOUT:
        raise InputError(f'attention_dropout is not available with attention "{kind}"')
    if _calls is not None:
        _calls.append(kind)


def _probe(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    _enter("sdpa", cu_seq_lens_q, attention_mask, other)
    batch, heads, tokens, _ = query.shape
    return value.new_empty(batch, tokens, heads, value.shape[-1]), None


@torch.compiler.disable  # would be compiled anew for each number of documents
def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """One causal SDPA per document. query [1, heads, T, d], key and value [1, kv_heads, T, d]."""
    _enter("sdpa", cu_seq_lens_q, attention_mask, other)
    assert cu_seq_lens_q is not None
    groups = query.shape[1] // key.shape[1]
    # Expanded by hand: enable_gqa would fall back to the O(T^2) memory path on a CPU.
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    lengths = cu_seq_lens_q.diff().tolist()
    documents = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout)
        for q, k, v in zip(
            query.split(lengths, dim=2),
            key.split(lengths, dim=2),
            value.split(lengths, dim=2),
            strict=True,
        )
    ]
    # Contiguous as transformers' own functions give it: some models take a view.
    return torch.cat(documents, dim=2).transpose(1, 2).contiguous(), None


Varlen = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, Any, float], torch.Tensor
]
"""query, key, value [T, heads, d], cu_seqlens, longest document, scale, dropout ->
[T, heads, d]; causal."""


def _whole_row(varlen: Varlen, kind: str) -> Callable[..., tuple[torch.Tensor, None]]:
    """A varlen function of all documents at once, as transformers calls attention. CUDA only."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int = 0,
        scaling: float | None = None,
        dropout: float = 0.0,
        **other: Any,
    ) -> tuple[torch.Tensor, None]:
        _enter(kind, cu_seq_lens_q, attention_mask, {**other, "dropout": dropout})
        assert cu_seq_lens_q is not None
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        out = varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, dropout)
        return out.unsqueeze(0), None

    return attend


def _torch_varlen() -> Varlen:
    """torch's own; nothing to install."""
    from torch.nn.attention.varlen import varlen_attn

    # A version that does not ask takes grouped heads as they are.
    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def run(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if asks else {}
        boundaries = (cu_seqlens, cu_seqlens, longest, longest)
        out = varlen_attn(
            query, key, value, *boundaries, scale=scale, window_size=(-1, 0), **grouped
        )
        assert isinstance(out, torch.Tensor)  # a tuple only when the log-sum-exp is asked for
        return out

    return run


def _flash_varlen(kind: str) -> Varlen:
    """That of a flash-attn."""
    function = getattr(import_module(FLASH[kind].module), FLASH_FUNCTION)

    def run(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        options = {"dropout_p": dropout} if kind in WITH_DROPOUT else {}
        out = function(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **options,
        )
        # 4, and early versions of 3, give the log-sum-exp too.
        return out[0] if isinstance(out, tuple) else out

    return run
