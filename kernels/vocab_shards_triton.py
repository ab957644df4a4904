"""The kernels of `vocab_shards.py` in Triton: each pass of the row kernel is a kernel.

Between the passes the ranks exchange their sums, so a row is read twice from memory. Pass 1 leaves
the logits as they are, and pass 2 computes the exponentials again: see `softmax_triton.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from redi.kernels.softmax import Terms
from redi.kernels.softmax_triton import (
    ALIGNMENT,
    COLUMNS_PER_THREAD,
    ROUNDED,
    sum_exponentials,
    transformed,
    usable_columns,
    write_gradient,
)
from redi.kernels.triton_common import FUSED
from redi.kernels.vocab_shards import RowGradients, new_sums

# Unlike the row kernel's, a row is in no cache when pass 2 reads it, so there is nothing to gain
# from few large programs. Several small ones share an SM: one loads while another computes.
MAX_THREADS = 256


def shard_sums(
    logits: Tensor, columns: Tensor, terms: Terms, with_moment: bool, with_mean: bool
) -> Tensor:
    """`vocab_shards.shard_sums` in one launch."""
    rows, vocab = logits.shape
    sums = new_sums(logits, with_moment, with_mean)
    if not vocab:
        return sums
    block, warps = launch_shape(vocab)
    with torch.cuda.device_of(logits):
        shard_sums_kernel[(rows,)](
            logits,
            logits.stride(0),
            vocab,
            usable_columns(logits),
            columns,
            sums,
            *_transform(terms),
            MOMENT=with_moment,
            MEAN=with_mean,
            ALIGNED_VOCAB=aligned_vocab(vocab),
            BLOCK=block,
            num_warps=warps,
            **FUSED,
        )
    return sums


def shard_gradient(
    logits: Tensor,
    columns: Tensor,
    largest: Tensor,
    rows: RowGradients,
    terms: Terms,
    dtype: torch.dtype,
) -> Tensor:
    """`vocab_shards.shard_gradient` in one launch; where it writes is as in `softmax_triton`."""
    vocab = logits.shape[1]
    halves = dtype != logits.dtype and not torch.version.hip
    dlogits = logits.view(dtype)[:, :vocab] if halves else logits
    if not vocab:
        return dlogits
    block, warps = launch_shape(vocab)
    with torch.cuda.device_of(logits):
        shard_gradient_kernel[(len(logits),)](
            logits,
            logits.stride(0),
            vocab,
            usable_columns(logits),
            columns,
            largest,
            *rows,
            dlogits,
            dlogits.stride(0),
            min(usable_columns(logits), usable_columns(dlogits)),
            *_transform(terms),
            ROUNDED=ROUNDED[dtype],
            HALVES_IN_PLACE=halves,
            ALIGNED_VOCAB=aligned_vocab(vocab),
            BLOCK=block,
            num_warps=warps,
            **FUSED,
        )
    return dlogits


def launch_shape(vocab: int) -> tuple[int, int]:
    """Columns of a block, and warps of a program."""
    block = min(COLUMNS_PER_THREAD * MAX_THREADS, max(128, triton.next_power_of_2(vocab)))
    return block, max(1, block // COLUMNS_PER_THREAD // (64 if torch.version.hip else 32))


def _transform(terms: Terms) -> tuple[float | None, float | None]:
    """Scale and softcap, None where there is none."""
    return terms.logit_scale if terms.logit_scale != 1 else None, terms.softcap


def aligned_vocab(vocab: int) -> bool:
    """Whether to say that V is a multiple of 16: see `softmax_triton.softmax_kernel`."""
    return bool(torch.version.hip) and vocab % ALIGNMENT == 0


# What is specialised, and why: see `softmax_triton.softmax_kernel`.
@triton.jit(
    do_not_specialize=["vocab"],
    do_not_specialize_on_alignment=["columns", "sums"],
)
def shard_sums_kernel(
    logits,  # [C, V_i] float32
    logits_stride,
    vocab,  # V_i
    room,  # columns of a row of logits that may be read
    columns,  # [C] int64, -1 where another rank holds the target
    sums,  # [3 to 5, C] float32, out
    logit_scale,  # or None
    softcap,  # or None
    MOMENT: tl.constexpr,
    MEAN: tl.constexpr,
    ALIGNED_VOCAB: tl.constexpr,  # V_i is a multiple of 16, and it helps to know it
    BLOCK: tl.constexpr,
):
    if ALIGNED_VOCAB:
        vocab = vocab // 16 * 16  # unchanged, and now seen to be a multiple
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    target = tl.load(columns + row).to(tl.int32)
    z = logits + row * logits_stride
    z_target, _ = transformed(
        tl.load(z + target, mask=target >= 0, other=0.0), logit_scale, softcap
    )
    z_target = tl.where(target >= 0, z_target, float("-inf"))
    largest, rest, moment, others = sum_exponentials(
        z, z_target, target, vocab, room, logit_scale, softcap, MOMENT, MEAN, BLOCK
    )
    tl.store(sums + row, largest)
    tl.store(sums + rows + row, rest)
    tl.store(sums + 2 * rows + row, z_target)
    if MOMENT:
        tl.store(sums + 3 * rows + row, moment)
    if MEAN:
        tl.store(sums + (3 + MOMENT) * rows + row, others)


@triton.jit(
    do_not_specialize=["vocab"],
    do_not_specialize_on_alignment=[
        "columns",
        "highest",
        "factors",
        "tilts",
        "shifts",
        "at_target",
    ],
)
def shard_gradient_kernel(
    logits,  # [C, V_i] float32
    logits_stride,
    vocab,  # V_i
    room,  # columns of a row of logits that may be read
    columns,  # [C] int64, -1 where another rank holds the target
    highest,  # [C] float32
    factors,  # [C] float32: see `vocab_shards.RowGradients`
    tilts,  # likewise, or None
    shifts,  # likewise, or None
    at_target,  # [C] float32
    negligible,  # [C] float32
    dlogits,  # [C, V_i], out, over the logits
    dlogits_stride,
    dlogits_room,  # columns of a row of dlogits that may be written
    logit_scale,  # or None
    softcap,  # or None
    ROUNDED: tl.constexpr,  # the dtype that the gradient is rounded to
    HALVES_IN_PLACE: tl.constexpr,
    ALIGNED_VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if ALIGNED_VOCAB:
        vocab = vocab // 16 * 16
    row = tl.program_id(0).to(tl.int64)
    tilt = 0.0
    shift = 0.0
    if tilts is not None:
        tilt = tl.load(tilts + row)
    if shifts is not None:
        shift = tl.load(shifts + row)
    write_gradient(
        logits + row * logits_stride,
        dlogits + row * dlogits_stride,
        tl.load(columns + row).to(tl.int32),
        tl.load(highest + row),
        tl.load(factors + row),
        tilt,
        shift,
        tl.load(at_target + row),
        tl.load(negligible + row),
        vocab,
        room,
        dlogits_room,
        logit_scale,
        softcap,
        tilts is not None,
        shifts is not None,
        ROUNDED,
        HALVES_IN_PLACE,
        BLOCK,
    )
