"""Log-probs of given tokens, differentiable for any gradient that comes from above.

For objectives whose token weights are known only after the log-probs (DPO, SimPO, TOPR, ...).
Backward needs p - onehot again: forward keeps it where it fits a budget (3 matrix products in
all), else backward computes the logits a second time (4 products).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from redi.kernels import reference
from redi.kernels.backends import choose_backend, kernels_of
from redi.kernels.chunked import cross_entropy_chunks, keep_chunks, kept_gradient_chunks, padded
from redi.kernels.reference import Backend, accumulation_dtype
from redi.kernels.rows import GradientRows
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
            CPU and an eighth of a GPU's memory. Nothing is kept where no gradient is needed.

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


def _kept_buffers(
    hidden: Tensor, weight: Tensor, valid_index: Tensor | None, backend: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(matrix, factors, residues) for `_kept`; what is not kept is empty."""
    # Not len(): torch.compile would take the number for a constant.
    rows = (hidden if valid_index is None else valid_index).shape[0] if keep else 0
    matrix = hidden.new_empty((rows, padded(weight.shape[0])))
    in_parts = rows if backend.endswith("-exp") else 0
    factors, residues = (hidden.new_empty(in_parts, dtype=torch.float32) for _ in range(2))
    return matrix, factors, residues


def _kept(weight: Tensor, matrix: Tensor, factors: Tensor, residues: Tensor) -> GradientRows:
    matrix = matrix[:, : weight.shape[0]]
    return GradientRows(matrix, factors, residues) if len(factors) else GradientRows(matrix)


@torch.library.custom_op("redi::linear_logprobs", mutates_args=())
def _linear_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_logps, matrix, factors, residues): what `keep_chunks` keeps, or empty tensors."""
    check_target_values(targets, weight.shape[0], valid_index)
    logps = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    buffers = _kept_buffers(hidden, weight, valid_index, backend, keep)
    kernels = kernels_of(backend)
    with torch.autocast(hidden.device.type, enabled=False):
        if keep:
            keep_chunks(
                hidden,
                weight,
                targets,
                row_kernel=kernels.softmax_rows,
                exponentials=kernels.exponentials,
                valid_index=valid_index,
                chunk_tokens=chunk_tokens,
                token_logps=logps,
                kept=_kept(weight, *buffers),
            )
            # Padding, which a kernel may have written to: an op must not return chance.
            buffers[0][:, weight.shape[0] :].zero_()
        else:
            cross_entropy_chunks(
                hidden,
                weight,
                targets,
                None,
                coefficient="weight",
                row_kernel=kernels.softmax_rows,
                exponentials=kernels.exponentials,
                valid_index=valid_index,
                chunk_tokens=chunk_tokens,
                token_logps=logps,
            )
    return logps, *buffers


@_linear_logprobs_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logps = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    return logps, *_kept_buffers(hidden, weight, valid_index, backend, keep)


@torch.library.custom_op("redi::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward_op(
    dlogps: Tensor,
    matrix: Tensor,
    factors: Tensor,
    residues: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
    keep: bool,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight) in the operands' dtype; one that is not needed is empty."""
    dtype = accumulation_dtype(hidden.dtype)
    dhidden = hidden.new_empty(hidden.shape, dtype=dtype) if need_dhidden else None
    dweight = weight.new_empty(weight.shape, dtype=dtype) if need_dweight else None
    kernels = kernels_of(backend)
    with torch.autocast(hidden.device.type, enabled=False):
        if keep:
            kept_gradient_chunks(
                _kept(weight, matrix, factors, residues),
                hidden,
                weight,
                targets,
                -dlogps,
                valid_index=valid_index,
                chunk_tokens=chunk_tokens,
                dhidden=dhidden,
                dweight=dweight,
            )
        else:
            cross_entropy_chunks(
                hidden,
                weight,
                targets,
                -dlogps,
                coefficient="weight",
                row_kernel=kernels.softmax_rows,
                exponentials=kernels.exponentials,
                valid_index=valid_index,
                chunk_tokens=chunk_tokens,
                dhidden=dhidden,
                dweight=dweight,
            )
    return (
        hidden.new_empty(0) if dhidden is None else dhidden.to(hidden.dtype),
        weight.new_empty(0) if dweight is None else dweight.to(weight.dtype),
    )


@_linear_logprobs_backward_op.register_fake
def _(
    dlogps: Tensor,
    matrix: Tensor,
    factors: Tensor,
    residues: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
    keep: bool,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        weight.new_empty(weight.shape if need_dweight else (0,)),
    )


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, valid_index, ctx.backend, ctx.chunk_tokens, ctx.keep = inputs
    _, *kept = output
    ctx.save_for_backward(*kept, hidden, weight, targets, valid_index)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dlogps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    dhidden = dweight = None
    need_dhidden, need_dweight = ctx.needs_input_grad[:2]
    if dlogps is not None:
        dhidden, dweight = _linear_logprobs_backward_op(
            dlogps,
            *ctx.saved_tensors,
            ctx.backend,
            ctx.chunk_tokens,
            ctx.keep,
            need_dhidden,
            need_dweight,
        )
    return (
        dhidden if need_dhidden else None,
        dweight if need_dweight else None,
        None,
        None,
        None,
        None,
        None,
    )


_linear_logprobs_op.register_autograd(_backward, setup_context=_save_operands)
