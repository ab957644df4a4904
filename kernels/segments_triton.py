"""Token weights and sums over sequences in Triton: one program a sequence, in blocks of 1024.

Blocks begin at the sequence's own start, so a sum depends neither on the sequence's position in
the row nor on its neighbours or the launch: each of 1024 lanes adds up every 1024th value, in
order, and the lanes are added up in an order fixed when the kernel is compiled. (It is compiled
once for every alignment of `values`, or the order could depend on that.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from redi.kernels.reference import IGNORE_INDEX
from redi.kernels.segments import BLOCK
from redi.kernels.triton_common import FUSED

_BLOCK = tl.constexpr(BLOCK)
_IGNORE_INDEX = tl.constexpr(IGNORE_INDEX)


def token_weights(
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    alpha: float,
    num_pairs: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`segments.token_weights`, in float32 alone."""
    assert dtype == torch.float32
    weights = targets.new_zeros(targets.shape, dtype=dtype)  # tokens after the last sequence: 0
    lengths = targets.new_empty(signs.shape)
    if len(signs):
        with torch.cuda.device_of(targets):
            token_weights_kernel[(len(signs),)](
                targets.contiguous(),
                cu_seqlens.contiguous(),
                signs.contiguous(),
                alpha,
                1 / num_pairs,
                weights,
                lengths,
                **FUSED,
            )
    return weights, lengths


def sum_segments(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`segments.sum_segments`: values [T] float32, cu_seqlens [S + 1]; returns [S] float32."""
    sums = values.new_empty(cu_seqlens.shape[0] - 1)
    if len(sums):
        with torch.cuda.device_of(values):
            bounds = cu_seqlens.contiguous()
            sum_segments_kernel[(len(sums),)](values.contiguous(), bounds, sums, **FUSED)
    return sums


def spread_segments(sums: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """`segments.spread_segments`: sums [S] float32; returns [T] float32."""
    values = sums.new_zeros(tokens)  # tokens after the last sequence: 0
    if len(sums):
        with torch.cuda.device_of(sums):
            bounds = cu_seqlens.contiguous()
            spread_segments_kernel[(len(sums),)](sums.contiguous(), bounds, values, **FUSED)
    return values


@triton.jit
def _bounds(cu_seqlens):
    """This program's sequence: its number, first token and number of tokens."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    return sequence, start, tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start


@triton.jit(
    do_not_specialize_on_alignment=["targets", "cu_seqlens", "signs", "weights", "lengths"]
)  # fmt: skip
def token_weights_kernel(
    targets,  # [T] int64
    cu_seqlens,  # [S + 1]
    signs,  # [S]
    alpha,
    factor,  # 1 / num_pairs
    weights,  # [T] float32, out
    lengths,  # [S] int64, out
):
    """Count a sequence's unmasked targets, then write its weight to each of them."""
    sequence, start, tokens = _bounds(cu_seqlens)
    lanes = tl.arange(0, _BLOCK)
    counts = tl.zeros([_BLOCK], tl.int32)
    for i in range(0, tokens, _BLOCK):
        position = i + lanes
        inside = position < tokens
        target = tl.load(targets + start + position, mask=inside, other=_IGNORE_INDEX)
        counts += (target != _IGNORE_INDEX).to(tl.int32)
    length = tl.sum(counts, 0)
    tl.store(lengths + sequence, length)

    sign = tl.load(signs + sequence).to(tl.float32)
    wanted = tl.where(sign < 0, alpha * sign, sign) * factor
    weight = wanted / tl.maximum(length, 1).to(tl.float32)
    for i in range(0, tokens, _BLOCK):
        position = i + lanes
        inside = position < tokens
        target = tl.load(targets + start + position, mask=inside, other=_IGNORE_INDEX)
        tl.store(
            weights + start + position, tl.where(target != _IGNORE_INDEX, weight, 0.0), mask=inside
        )


@triton.jit(do_not_specialize_on_alignment=["values", "cu_seqlens", "sums"])
def sum_segments_kernel(values, cu_seqlens, sums):
    """sums[s] = sum of values[cu_seqlens[s] : cu_seqlens[s + 1]]."""
    sequence, start, length = _bounds(cu_seqlens)
    lanes = tl.arange(0, _BLOCK)
    partial = tl.zeros([_BLOCK], tl.float32)
    for i in range(0, length, _BLOCK):
        position = i + lanes
        partial += tl.load(values + start + position, mask=position < length, other=0.0)
    tl.store(sums + sequence, tl.sum(partial, 0))


@triton.jit(do_not_specialize_on_alignment=["values", "cu_seqlens", "sums"])
def spread_segments_kernel(sums, cu_seqlens, values):
    """values[t] = sums[s] for the tokens t of each sequence s: the gradient of the sums."""
    sequence, start, length = _bounds(cu_seqlens)
    total = tl.load(sums + sequence)
    lanes = tl.arange(0, _BLOCK)
    for i in range(0, length, _BLOCK):
        position = i + lanes
        tl.store(values + start + position, total, mask=position < length)
