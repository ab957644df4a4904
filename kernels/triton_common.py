"""What several Triton kernels share: coefficients, log1p, rounding, a dot, descriptors."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from redi.kernels.softmax import MIN_ONE_MINUS_P

# A kernel may use a module's constants only if they are constexpr.
_MIN_ONE_MINUS_P = tl.constexpr(MIN_ONE_MINUS_P)
_INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)

# For each launch: multiply-adds, as all registers and errors were measured with. Triton 3.10 no
# longer fuses by default.
FUSED = {"enable_fp_fusion": True}

# Tensor descriptors need rows that begin at multiples of 16 bytes.
ALIGNMENT_BYTES = 16


@triton.jit
def exp(x):
    """e^x, 0 where that is below 2^-126.

    `tl.exp` computes the subnormal numbers too, by three more instructions an exponential.
    """
    return tl.exp2(x * LOG2_E)


@triton.jit
def load_target(place, vocab):
    """A token's target, and whether it is in [0, vocab): a GPU does not check that beforehand.

    A target outside is replaced by 0, so that nothing out of bounds is touched. Its token's logit
    must be taken as NaN, which then reaches the loss.
    """
    target = tl.load(place)
    inside = (target >= 0) & (target < vocab)
    return tl.where(inside, target, 0).to(tl.int32), inside


@triton.jit
def apply_coefficient(u, logp, rest, e_target, COEFFICIENT: tl.constexpr):
    """`softmax.effective_weights`, and `rest` with the same floor."""
    if COEFFICIENT == "dft":
        u *= exp(logp)
    if COEFFICIENT == "unlikelihood":
        u = tl.where(u < 0, u / tl.maximum(rest / e_target, _MIN_ONE_MINUS_P), u)
        rest = tl.maximum(rest, _MIN_ONE_MINUS_P)
    return u, rest


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate also where 1 + x loses x (Kahan)."""
    rounded = 1.0 + x
    exact = rounded == 1.0
    return tl.where(exact, x, tl.log(rounded) * (x / tl.where(exact, 1.0, rounded - 1.0)))


@triton.jit
def round_to(values, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest even. (Triton's interpreter truncates bfloat16.)"""
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


def aligned(matrix: Tensor) -> Tensor:
    """The matrix as a tensor descriptor can address it: itself, or a copy."""
    step = ALIGNMENT_BYTES // matrix.element_size()
    fits = matrix.stride(1) == 1 and matrix.stride(0) % step == 0
    if fits and matrix.data_ptr() % ALIGNMENT_BYTES == 0:
        return matrix
    columns = matrix.shape[1]
    room = matrix.new_empty(matrix.shape[0], triton.cdiv(columns, step) * step)
    return room[:, :columns].copy_(matrix)


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tensor descriptor of a matrix, in blocks of [rows, columns]."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def processors(device: torch.device) -> int:
    """Programs of a persistent kernel: one per processor, a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
