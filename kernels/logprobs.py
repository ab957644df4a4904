"""Log-probs of given tokens, differentiable for any upstream gradient.

For objectives whose token weights are known only after the log-probs (DPO, SimPO, TOPR, ...).
Backward needs p - onehot again: forward keeps it where it fits a budget (3 matrix products in
all), else backward computes the logits a second time (4 products).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from redi.kernels import reference
from redi.kernels.backends import choose_backend, kernels_of
from redi.kernels.chunk_sizes import padded
from redi.kernels.chunked import Outputs, TokenSchedule, cross_entropy_chunks, kept_gradient_chunks
from redi.kernels.reference import Backend, accumulation_dtype
from redi.kernels.softmax import GradientRows
from redi.kernels.validate import (
    check_choice,
    check_operands,
    check_schedule,
    check_target_values,
)

# What keep="auto" may keep: on a CPU, and as a share of a GPU's memory (80 GiB: 10 GiB).
CPU_KEEP_BYTES = 1 << 30
GPU_KEEP_SHARE = 8


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    keep: bool | Literal["auto"] = "auto",
    valid_index: Tensor | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probs of the targets: logp_t = log softmax(hidden weight^T)_t[targets_t].

    Args:
        hidden, weight, targets, valid_index, backend, chunk_tokens: as for `redi_loss`.
        keep: True keeps a tensor of N x V (T x V without `valid_index`) in hidden's dtype for
            backward, False recomputes the logits in backward, "auto" keeps what fits 1 GiB on a
            CPU and an eighth of a GPU's total memory. It does not look at what is free: kept and
            recomputed gradients are rounded differently, and a resumed run must choose as the
            first one did. Nothing is kept where no gradient is needed.

    Returns:
        token_logps [T] float32 (float64 for float64 inputs), never above 0, and 0 where masked;
        differentiable once, for any upstream gradient, any number of times. The gradients have
        the dtype of hidden and weight.

    Raises:
        TypeError, ValueError: as `redi_loss`.
    """
    hidden, weight = check_operands(hidden, weight, targets)
    check_schedule(valid_index, chunk_tokens, hidden)
    check_choice("keep", keep, ("auto", True, False))
    backend = choose_backend(backend, hidden.device, hidden.dtype, hidden.shape[1])
    if backend == "reference":
        return reference.linear_logprobs(hidden, weight, targets)
    if keep == "auto":
        rows = hidden.shape[0] if valid_index is None else valid_index.shape[0]
        keep = rows * weight.shape[0] * hidden.element_size() <= _keep_budget(hidden.device)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _linear_logprobs_op(
        hidden, weight, targets, valid_index, backend, chunk_tokens, keep and needs_grad
    )[0]


@torch.compiler.assume_constant_result
def _keep_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_KEEP_BYTES
    return torch.cuda.get_device_properties(device).total_memory // GPU_KEEP_SHARE


def _new_kept(
    hidden: Tensor, weight: Tensor, valid_index: Tensor | None, backend: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """(matrix, parts): uninitialised memory for `_kept`, empty where nothing is kept."""
    # Not len(): torch.compile would take the number for a constant.
    rows = (hidden if valid_index is None else valid_index).shape[0] if keep else 0
    parts = rows if backend == "triton-exp" else 0
    return (
        hidden.new_empty((rows, padded(weight.shape[0]))),
        hidden.new_empty((2, parts), dtype=torch.float32),
    )


def _kept(weight: Tensor, matrix: Tensor, parts: Tensor) -> GradientRows:
    """The memory as `cross_entropy_chunks` fills it; `parts` are factors and residues, or empty."""
    matrix = matrix[:, : weight.shape[0]]
    return GradientRows(matrix, *parts) if parts.shape[1] else GradientRows(matrix)


@torch.library.custom_op("redi::linear_logprobs", mutates_args=())
def _linear_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_logps, matrix, parts): the last two as `_new_kept` has them."""
    check_target_values(targets, weight.shape[0], valid_index)
    logps = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    matrix, parts = _new_kept(hidden, weight, valid_index, backend, keep)
    out = Outputs(logps=logps, kept=_kept(weight, matrix, parts) if keep else None)
    schedule = TokenSchedule(valid_index, None, chunk_tokens)
    with torch.autocast(hidden.device.type, enabled=False):
        cross_entropy_chunks(hidden, weight, targets, None, out, schedule, kernels_of(backend))
    if keep:  # padding, which a kernel may have written to: results must be reproducible
        matrix[:, weight.shape[0] :].zero_()
    return logps, matrix, parts


@_linear_logprobs_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logps = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    return logps, *_new_kept(hidden, weight, valid_index, backend, keep)


@torch.library.custom_op("redi::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward_op(
    dlogps: Tensor,
    matrix: Tensor,
    parts: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
    keep: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight) in the operands' dtype; one that is not needed is empty."""
    dtype = accumulation_dtype(hidden.dtype)
    dhidden, dweight = (
        operand.new_empty(operand.shape, dtype=dtype) if needed else None
        for operand, needed in zip((hidden, weight), needs, strict=True)
    )
    operands, out = (hidden, weight, targets, -dlogps), Outputs(dhidden=dhidden, dweight=dweight)
    schedule = TokenSchedule(valid_index, None, chunk_tokens)
    with torch.autocast(hidden.device.type, enabled=False):
        if keep:
            kept_gradient_chunks(_kept(weight, matrix, parts), *operands, out, schedule)
        else:
            cross_entropy_chunks(*operands, out, schedule, kernels_of(backend))
    return (
        hidden.new_empty(0) if dhidden is None else dhidden.to(hidden.dtype),
        weight.new_empty(0) if dweight is None else dweight.to(weight.dtype),
    )


@_linear_logprobs_backward_op.register_fake
def _(
    dlogps: Tensor, matrix: Tensor, parts: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    need_dhidden, need_dweight = arguments[-1]
    return (
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        weight.new_empty(weight.shape if need_dweight else (0,)),
    )


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.backend, ctx.chunk_tokens, ctx.keep = inputs
    _, *kept = output
    ctx.save_for_backward(*kept, *operands)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dlogps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    grads: tuple[Tensor | None, ...] = (None, None)
    if dlogps is not None:
        options = ctx.backend, ctx.chunk_tokens, ctx.keep, needs
        made = _linear_logprobs_backward_op(dlogps, *ctx.saved_tensors, *options)
        grads = tuple(g if needed else None for g, needed in zip(made, needs, strict=True))
    return *grads, *(None,) * 5


_linear_logprobs_op.register_autograd(_backward, setup_context=_save_operands)
