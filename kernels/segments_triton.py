"""Sums over sequences in Triton: one program a sequence, in blocks of 1024 from its own start.

Nothing in a sum depends on where the sequence lies, on its neighbours, or on the launch: each of
1024 lanes adds up every 1024th value, in order, and the lanes are added up in an order that is
part of the compiled kernel. (The kernel is compiled once for every alignment of `values`, which
could be a reason for another order.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from redi.kernels.segments import BLOCK

_BLOCK = tl.constexpr(BLOCK)


def sum_segments(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`segments.sum_segments`: values [T] float32, cu_seqlens [S + 1]; returns [S] float32."""
    sums = values.new_empty(cu_seqlens.shape[0] - 1)
    if len(sums):
        with torch.cuda.device_of(values):
            sum_segments_kernel[(len(sums),)](values.contiguous(), cu_seqlens.contiguous(), sums)
    return sums


def spread_segments(sums: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """`segments.spread_segments`: sums [S] float32; returns [T] float32."""
    values = sums.new_zeros(tokens)  # for tokens behind the last sequence, if any
    if len(sums):
        with torch.cuda.device_of(sums):
            bounds = cu_seqlens.contiguous()
            spread_segments_kernel[(len(sums),)](sums.contiguous(), bounds, values)
    return values


@triton.jit(do_not_specialize_on_alignment=["values", "cu_seqlens", "sums"])
def sum_segments_kernel(values, cu_seqlens, sums):
    """sums[s] = sum of values[cu_seqlens[s] : cu_seqlens[s + 1]]."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    lanes = tl.arange(0, _BLOCK)
    partial = tl.zeros([_BLOCK], tl.float32)
    for i in range(0, length, _BLOCK):
        position = i + lanes
        partial += tl.load(values + start + position, mask=position < length, other=0.0)
    tl.store(sums + sequence, tl.sum(partial, 0))


@triton.jit(do_not_specialize_on_alignment=["values", "cu_seqlens", "sums"])
def spread_segments_kernel(sums, cu_seqlens, values):
    """values[t] = sums[s] for the tokens t of each sequence s: the gradient of the sums."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    total = tl.load(sums + sequence)
    lanes = tl.arange(0, _BLOCK)
    for i in range(0, length, _BLOCK):
        position = i + lanes
        tl.store(values + start + position, total, mask=position < length)
