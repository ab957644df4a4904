"""The public op `segment_sum`: sums over the sequences of a packed row, differentiable."""

from typing import Any

import torch
from torch import Tensor

from redi.kernels import reference
from redi.kernels.backends import choose_backend, kernels_of
from redi.kernels.reference import Backend
from redi.kernels.validate import check_cu_seqlens, check_sequence_values, check_values


def segment_sum(values: Tensor, cu_seqlens: Tensor, *, backend: Backend = "auto") -> Tensor:
    """sums[s] = sum of values[cu_seqlens[s] : cu_seqlens[s + 1]].

    Args:
        values: [T] float32 or float64.
        cu_seqlens: [S + 1] int32 or int64, from 0 to T, not falling.
        backend: "auto", "torch", "triton" or "reference".

    Returns:
        [S] in the dtype of `values`, differentiable; an empty sequence sums to 0. The sum of a
        sequence is bitwise the same at any position in `values`, and needs no device sync.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; wrong bounds (on the CPU, or with
            REDI_DEBUG=1).
    """
    check_values(values)
    check_cu_seqlens(cu_seqlens, values)
    backend = choose_backend(backend, values.device, values.dtype)
    if backend == "reference":
        check_sequence_values(cu_seqlens, values.shape[0])
        return reference.segment_sum(values, cu_seqlens)
    return segment_sum_op(values, cu_seqlens, backend)


@torch.library.custom_op("redi::segment_sum", mutates_args=())
def segment_sum_op(values: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    check_sequence_values(cu_seqlens, values.shape[0])
    return kernels_of(backend).sum_segments(values, cu_seqlens)


@segment_sum_op.register_fake
def _(values: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    return values.new_empty(cu_seqlens.shape[0] - 1)


@torch.library.custom_op("redi::segment_sum_backward", mutates_args=())
def segment_sum_backward_op(dsums: Tensor, cu_seqlens: Tensor, tokens: int, backend: str) -> Tensor:
    return kernels_of(backend).spread_segments(dsums, cu_seqlens, tokens)


@segment_sum_backward_op.register_fake
def _(dsums: Tensor, cu_seqlens: Tensor, tokens: int, backend: str) -> Tensor:
    return dsums.new_empty(tokens)


def _save_bounds(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, cu_seqlens, ctx.backend = inputs
    ctx.tokens = values.shape[0]
    ctx.save_for_backward(cu_seqlens)


def _spread(ctx: Any, dsums: Tensor) -> tuple[Tensor, None, None]:
    (cu_seqlens,) = ctx.saved_tensors
    return segment_sum_backward_op(dsums, cu_seqlens, ctx.tokens, ctx.backend), None, None


def _keep_bounds(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cu_seqlens, _, ctx.backend = inputs
    ctx.save_for_backward(cu_seqlens)


def _sum_again(ctx: Any, dvalues: Tensor) -> tuple[Tensor, None, None, None]:
    (cu_seqlens,) = ctx.saved_tensors
    return segment_sum_op(dvalues, cu_seqlens, ctx.backend), None, None, None


segment_sum_op.register_autograd(_spread, setup_context=_save_bounds)
# The sum is linear: what its gradient depends on is summed again.
segment_sum_backward_op.register_autograd(_sum_again, setup_context=_keep_bounds)
