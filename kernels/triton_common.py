"""What Triton kernels of several families share: a token's weight, log1p, rounding, a dot, and
what their host launchers do."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from redi.kernels.rows import MIN_ONE_MINUS_P, SequenceWeights, TokenWeights

# As Triton sees them: a kernel may use a module's constants only where they are constexpr.
_MIN_ONE_MINUS_P = tl.constexpr(MIN_ONE_MINUS_P)
_INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

# Tensor descriptors want rows that begin at multiples of 16 bytes.
ALIGNMENT_BYTES = 16


@triton.jit
def token_weight(
    token, weights, cu_seqlens, signs, lengths, num_sequences, alpha, factor
):  # fmt: skip
    """The weight w of a token: `weights` [T], or where that is None that of the token's sequence.

    Its sequence is the number of sequences that end at or before it: one comparison with all
    ends at a time costs one trip to memory, where a binary search makes one for each step. The
    formula is that of `rows.SequenceWeights`.
    """
    if weights is not None:
        return tl.load(weights + token)
    else:
        ENDS: tl.constexpr = 1024
        sequence = 0
        for start in range(0, num_sequences, ENDS):
            index = start + tl.arange(0, ENDS)
            inside = index < num_sequences
            ends = tl.load(cu_seqlens + 1 + index, mask=inside, other=0)
            sequence += tl.sum((inside & (ends <= token)).to(tl.int32), 0)
        known = sequence < num_sequences  # else the token lies behind the last one
        sign = tl.load(signs + sequence, mask=known, other=0).to(tl.float32)
        length = tl.load(lengths + sequence, mask=known, other=1).to(tl.float32)
        return tl.where(sign < 0, alpha * sign, sign) * factor / tl.maximum(length, 1.0)


@triton.jit
def apply_coefficient(u, logp, rest, e_target, COEFFICIENT: tl.constexpr):
    """`rows.effective_weights`, and `rest` with the floor that goes with it."""
    if COEFFICIENT == "dft":
        u *= tl.exp(logp)
    if COEFFICIENT == "unlikelihood":
        u = tl.where(u < 0, u / tl.maximum(rest / e_target, _MIN_ONE_MINUS_P), u)
        rest = tl.maximum(rest, _MIN_ONE_MINUS_P)
    return u, rest


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to a few roundings also where 1 + x rounds x away (Kahan)."""
    rounded = 1.0 + x
    exact = rounded == 1.0
    return tl.where(exact, x, tl.log(rounded) * (x / tl.where(exact, 1.0, rounded - 1.0)))


@triton.jit
def round_to(values, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest even. (Triton's interpreter cuts bfloat16 off instead.)"""
    if _INTERPRET and tl.bfloat16 == DTYPE:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def dot(a, b, sums):
    """sums + a b in float32. (Triton's interpreter multiplies bfloat16's bit patterns.)"""
    if _INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums)


def weight_arguments(weights: TokenWeights | None) -> tuple[Any, ...]:
    """Those of `token_weight` behind the token, from `weights` to `factor`."""
    if isinstance(weights, SequenceWeights):
        return (
            None,
            weights.cu_seqlens.contiguous(),
            weights.signs.contiguous(),
            weights.lengths,
            len(weights.signs),
            weights.alpha,
            weights.factor,
        )
    return (None if weights is None else weights.contiguous(), *(None,) * 6)


def aligned(matrix: Tensor) -> Tensor:
    """A matrix that a tensor descriptor can describe: itself, or a copy."""
    step = ALIGNMENT_BYTES // matrix.element_size()
    fits = matrix.stride(1) == 1 and matrix.stride(0) % step == 0
    if fits and matrix.data_ptr() % ALIGNMENT_BYTES == 0:
        return matrix
    columns = matrix.shape[1]
    room = matrix.new_empty(matrix.shape[0], triton.cdiv(columns, step) * step)
    return room[:, :columns].copy_(matrix)


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix that is moved in blocks of [rows, columns]."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def processors(device: torch.device) -> int:
    """Programs of a persistent kernel: one a processor, a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
