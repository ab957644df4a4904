"""Attention within each document of a pack, never across documents.

One function is registered with transformers. The student passes it explicit document boundaries as
keyword arguments; position ids alone are not relied on to separate documents. No mask function is
registered with it, so transformers builds no mask, which would need a device sync in each forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from redi.engine.context import ALONE, ContextGroup
from redi.engine.errors import InputError
from redi.engine.model.context_attention import Attention, share_heads
from redi.engine.model.document_attention import Pattern, attend_document

NAME = "redi_packed"
PROBE = "redi_probe"
MASK_PROBE = "redi_mask_probe"
FLASH_FUNCTION = "flash_attn_varlen_func"


class Flash(NamedTuple):
    """A generation of flash-attn."""

    package: str
    """Name on PyPI. Directories are ambiguous: flash-attn 2 contains an older copy of 4's."""
    module: str
    """Module of its `flash_attn_varlen_func`."""
    cards: tuple[int, ...]
    """Major compute capabilities that it is used on."""


# The first that is installed and runs on the GPU is used. 3 is written for Hopper. 4 has no
# backward for sm_80 and no deterministic one for sm_120.
FLASH = {
    "flash-3": Flash("flash-attn-3", "flash_attn_interface", (9,)),
    "flash-4": Flash("flash-attn-4", "flash_attn.cute", (9, 10, 11)),
    "flash-2": Flash("flash-attn", "flash_attn", (8, 9, 10, 11, 12)),
}

PLANNED = "planned"
"""Kind for `redi plan`: torch's varlen attention without a soft cap and sinks, whose result has the
same size."""

# Names of the arguments that carry documents: transformers' own for their boundaries, and two for
# shared prompts.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
DOCUMENT_KWARGS = (*BOUNDARIES, "attended", "own")

# Kinds of attention that support dropout on the attention probabilities.
WITH_DROPOUT = {"sdpa", "flash-2"}

# Feature of a model's attention -> kinds that support it. All support a sliding window.
SUPPORT = {
    "soft-capped scores": {"sdpa", "flash-2", "flash-3", PLANNED},
    "sinks": {"sdpa", PLANNED},
}

# Kinds that torch.compile cannot include in a graph: sdpa reads the documents' lengths, flash-4 is
# not a registered op.
NOT_IN_GRAPHS = {"sdpa", "flash-4"}


def choose_attention(
    wanted: str, device: torch.device, dtype: torch.dtype, features: Iterable[str] = ()
) -> tuple[str, str]:
    """Resolve `[model] attention` on this machine.

    Args:
        wanted: the recipe's value.
        device, dtype: of computation.
        features: keys of `SUPPORT` that the model has.

    Returns:
        The name ("varlen", "sdpa" or a key of `FLASH`) and the reason, for the log.

    Raises:
        InputError: the requested one cannot run on this machine, or not with the features.
    """
    kind, reason = _choose(wanted, device, dtype)
    lacking = [feature for feature in features if kind not in SUPPORT[feature]]
    if not lacking:
        return kind, reason
    problem = f"{kind} has no {' and no '.join(lacking)}, which the model needs"
    if wanted != "auto":
        raise InputError(f'model.attention: "{wanted}": {problem}; use "auto" or "sdpa"')
    return "sdpa", f"document by document, much slower: {problem}"


def _choose(wanted: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
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
        return wanted, "requested"
    kind, reason = find_flash(torch.cuda.get_device_capability(device)[0])
    if kind:
        return kind, reason
    if wanted == "flash":
        raise InputError(f'model.attention: "flash": {reason}; install one, or use "auto"')
    return "varlen", f"torch's own: {reason}"


def find_flash(major: int) -> tuple[str | None, str]:
    """The best installed flash-attn for a GPU of this major compute capability.

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
        except Exception as error:  # an installed wheel may fail to load with any error
            problems.append(f"{package} cannot be imported ({type(error).__name__})")
        else:
            return kind, f"{package} {found}"
    return None, "; ".join(problems) or f"there is no flash-attn for sm_{major}x"


def register_attention(kind: str, context: ContextGroup = ALONE) -> str:
    """Register packed attention of a kind returned by `choose_attention`.

    Args:
        context: the ranks that share a pack.

    Returns:
        The name to load a model with (`attn_implementation`).
    """
    attend: Attention = _sdpa
    if kind != "sdpa":
        attend = _whole_pack(_flash_varlen(kind) if kind in FLASH else _torch_varlen(), kind)
    AttentionInterface.register(NAME, _with_prompts(share_heads(attend, context)))
    return NAME


def register_probe() -> str:
    """Register attention that computes nothing and refuses the same arguments as packed attention.

    It runs on the meta device.

    Returns:
        The name to build a model with.
    """
    AttentionInterface.register(PROBE, _with_prompts(_probe))
    return PROBE


def register_mask_probe() -> str:
    """Register attention that computes nothing and records the mask that it is given.

    The masks are those that transformers builds for its own attention, bool [1, 1, T, T].

    Returns:
        The name to set in a model.
    """
    AttentionInterface.register(MASK_PROBE, _mask_probe)
    AttentionMaskInterface.register(MASK_PROBE, _mask)
    return MASK_PROBE


class NoBoundariesError(InputError):
    """Attention was called without the boundaries of documents."""


class AttentionCall(NamedTuple):
    """A call of one of the functions here."""

    kind: str
    pattern: Pattern
    documents: int
    mask: torch.Tensor | None = None
    """What the mask probe was given."""
    context_ranks: int = 1
    """Ranks that shared its heads."""
    shares_prompts: bool = False
    """True if documents shared the prompts in the pack."""


_calls: list[AttentionCall] | None = None


@contextmanager
def recording_calls() -> Iterator[list[AttentionCall]]:
    """Within the context, each call of packed attention is appended to the list."""
    global _calls
    _calls = []
    try:
        yield _calls
    finally:
        _calls = None


def record_call(call: AttentionCall) -> None:
    """Append to the list of `recording_calls`, if there is one."""
    if _calls is not None:
        _calls.append(call)


def document_kwargs(
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    attended: torch.Tensor | None = None,
    own: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The keyword arguments that carry documents through transformers to the functions here.

    Args:
        cu_seqlens: [S + 1] int32, document boundaries within the pack.
        max_seqlen: tokens of the longest document. A host int, because a tensor would sync the
            device or cause a recompile.
        attended, own: see `PackedBatch`; if they are given, the boundaries are those of `attended`.
    """
    values = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    arguments: dict[str, Any] = dict(zip(BOUNDARIES, values, strict=True))
    if attended is not None:
        arguments |= {"attended": attended, "own": own}
    return {**arguments, "use_cache": False}


def _enter(
    kind: str,
    cu_seqlens: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    dropout: float,
    other: dict[str, Any],
) -> Pattern:
    """Record a call. Raise InputError for arguments that must not be ignored."""
    if cu_seqlens is None:
        raise NoBoundariesError("the model does not pass document boundaries to its attention")
    if attention_mask is not None:
        raise InputError("the model passes its own mask to its attention")
    if other.get("position_bias") is not None:
        raise InputError("the model's attention has position biases (position_bias)")
    if dropout and kind not in WITH_DROPOUT:
        raise InputError(f'attention_dropout is not available with attention "{kind}"')
    pattern = _pattern(other)
    if dropout and pattern.softcap is not None and kind != "sdpa":
        raise InputError("attention_dropout is not available with soft-capped scores on a GPU")
    for feature in features_of(pattern):
        if kind not in SUPPORT[feature]:
            raise InputError(f'the model\'s {feature} are not available with attention "{kind}"')
    counts = {name: other[name] for name in ("context_ranks", "shares_prompts") if name in other}
    record_call(AttentionCall(kind, pattern, len(cu_seqlens) - 1, **counts))
    return pattern


def _pattern(arguments: dict[str, Any]) -> Pattern:
    return Pattern(*(arguments.get(name) for name in ("sliding_window", "softcap", "s_aux")))


def features_of(pattern: Pattern) -> list[str]:
    """The keys of `SUPPORT` that a layer's attention needs."""
    wanted = {"soft-capped scores": pattern.softcap, "sinks": pattern.sinks}
    return [feature for feature, value in wanted.items() if value is not None]


def _probe(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    dropout: float = 0.0,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    _enter("sdpa", cu_seq_lens_q, attention_mask, dropout, other)
    return _nothing(query, value), None


def _nothing(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Memory in the shape of attention's result."""
    batch, heads, tokens, _ = query.shape
    return value.new_empty(batch, tokens, heads, value.shape[-1])


def _mask_probe(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    record_call(AttentionCall("mask", _pattern(other), 1, attention_mask))
    return _nothing(query, value), None


def _mask(
    q_length: int, kv_length: int, mask_function: Callable[..., torch.Tensor], **_: Any
) -> torch.Tensor:
    """A mask as transformers defines it, on the CPU, without padding."""
    queries, keys = torch.arange(q_length)[:, None], torch.arange(kv_length)
    return mask_function(0, 0, queries, keys)[None, None]


def _with_prompts(attend: Attention) -> Attention:
    """Wrap an attention function for packs whose traces share prompts.

    The wrapped function gets whole traces, so it needs no other mask. A token of a shared prompt is
    copied after the projections: its key and value get a gradient from each of its traces, its
    query from the first alone.
    """

    def run(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attended: torch.Tensor | None = None,
        own: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        if attended is None or own is None:
            return attend(module, query, key, value, attention_mask, **options)
        query, key, value = (x.index_select(2, attended) for x in (query, key, value))
        out, _ = attend(module, query, key, value, attention_mask, **options, shares_prompts=True)
        return out.index_select(1, own), None

    return run


@torch.compiler.disable  # would be recompiled for each number of documents
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
    """Document by document. query [1, heads, T, d], key and value [1, kv_heads, T, d]."""
    pattern = _enter("sdpa", cu_seq_lens_q, attention_mask, dropout, other)
    assert cu_seq_lens_q is not None
    groups = query.shape[1] // key.shape[1]
    # Expanded here, because enable_gqa uses the O(T^2) memory path on a CPU.
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    lengths = cu_seq_lens_q.diff().tolist()
    documents = [
        attend_document(q, k, v, pattern, scaling, dropout)
        for q, k, v in zip(
            query.split(lengths, dim=2),
            key.split(lengths, dim=2),
            value.split(lengths, dim=2),
            strict=True,
        )
    ]
    # Contiguous, as transformers' own functions return it, because some models call view().
    return torch.cat(documents, dim=2).transpose(1, 2).contiguous(), None


Varlen = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, Any, float, Pattern],
    torch.Tensor,
]
"""query, key, value [T, heads, d], cu_seqlens, longest document, scale, dropout, pattern ->
[T, heads, d]; causal."""


def _whole_pack(varlen: Varlen, kind: str) -> Attention:
    """Wrap a varlen function, with the signature that transformers calls. CUDA only."""

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
        pattern = _enter(kind, cu_seq_lens_q, attention_mask, dropout, other)
        assert cu_seq_lens_q is not None
        if pattern.window is not None and pattern.window >= max_length_q:
            pattern = pattern._replace(window=None)  # without a window the kernels are faster
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        out = varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, dropout, pattern)
        return out.unsqueeze(0), None

    return attend


def _torch_varlen() -> Varlen:
    """torch's varlen attention; needs no other package."""
    from torch.nn.attention.varlen import varlen_attn

    # Versions without this argument accept grouped heads anyway.
    has_gqa_option = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def run(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        scale: float | None,
        dropout: float,
        pattern: Pattern,
    ) -> torch.Tensor:
        grouped: dict[str, Any] = {}
        if has_gqa_option:
            grouped["enable_gqa"] = query.shape[1] != key.shape[1]
        boundaries = (cu_seqlens, cu_seqlens, longest, longest)
        # Tokens before and after the query's own; (-1, 0) is causal without a window.
        window = (-1 if pattern.window is None else pattern.window - 1, 0)
        out = varlen_attn(
            query, key, value, *boundaries, scale=scale, window_size=window, **grouped
        )
        assert isinstance(out, torch.Tensor)  # a tuple only if the log-sum-exp is requested
        return out

    return run


def _flash_varlen(kind: str) -> Varlen:
    """The varlen attention of a flash-attn."""
    function = getattr(import_module(FLASH[kind].module), FLASH_FUNCTION)

    def run(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        scale: float | None,
        dropout: float,
        pattern: Pattern,
    ) -> torch.Tensor:
        options: dict[str, Any] = {"dropout_p": dropout} if kind in WITH_DROPOUT else {}
        if pattern.window is not None:
            options["window_size"] = (pattern.window - 1, 0)
        if pattern.softcap is not None:
            options["softcap"] = pattern.softcap
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
        # 4, and early versions of 3, also return the log-sum-exp.
        return out[0] if isinstance(out, tuple) else out

    return run
