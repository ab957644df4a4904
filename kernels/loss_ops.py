"""The `torch.library` ops beneath the losses: what they compute, their fakes, their autograd.

An op computes the loss and, where a gradient will be wanted, the gradients along with it, so that
backward has nothing left to do but to scale them by the upstream gradient. Ops are opaque to
torch.compile (no graph breaks) and run with autocast off: the operands' own dtype decides.
Arguments have been checked, all but what only reading a tensor can tell, which torch.compile
must not see.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redi.kernels.backends import kernels_of
from redi.kernels.chunked import cross_entropy_chunks
from redi.kernels.reference import IGNORE_INDEX, accumulation_dtype
from redi.kernels.rows import SequenceWeights, TokenWeights, token_losses, weights_at
from redi.kernels.segments import sequence_lengths
from redi.kernels.validate import (
    check_sequence_values,
    check_target_values,
    check_unweighted_values,
    check_weight_values,
)


def check_unweighted(
    weights: TokenWeights, valid_index: Tensor | None, num_weighted: int | None
) -> None:
    """The tokens of `valid_index` behind the first `num_weighted` have weight 0."""
    if valid_index is not None and num_weighted is not None:
        rest = valid_index[num_weighted:].long()
        check_unweighted_values(weights_at(weights, rest, torch.float32), num_weighted)


def gradient_buffer(operand: Tensor, needed: bool) -> Tensor:
    """Uninitialised, in the accumulation dtype: the operand's shape, or empty if not needed."""
    shape = operand.shape if needed else (0,)
    return operand.new_empty(shape, dtype=accumulation_dtype(operand.dtype))


def _redi(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    valid_index: Tensor | None,
    num_weighted: int | None,
    alpha: float,
    num_pairs: float,
    grad_scale: float,
    backend: str,
    chunk_tokens: int | None,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sequence_logps and lengths; fills the gradients that are not None."""
    tokens = hidden.shape[0]
    check_target_values(targets, weight.shape[0], valid_index)
    check_sequence_values(cu_seqlens, tokens, signs)
    dtype = accumulation_dtype(hidden.dtype)

    kernels = kernels_of(backend)
    lengths = sequence_lengths(targets, cu_seqlens)
    weights = SequenceWeights(cu_seqlens, signs, lengths, alpha, 1 / num_pairs)
    check_unweighted(weights, valid_index, num_weighted)
    token_logps = hidden.new_empty(tokens, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        cross_entropy_chunks(
            hidden,
            weight,
            targets,
            replace(weights, factor=grad_scale / num_pairs),
            coefficient="weight",
            row_kernel=kernels.softmax_rows,
            exponentials=kernels.exponentials,
            valid_index=valid_index,
            num_weighted=num_weighted,
            chunk_tokens=chunk_tokens,
            token_logps=token_logps,
            dhidden=dhidden,
            dweight=dweight,
            accumulate=accumulate,
        )
    sequence_logps = kernels.sum_segments(token_logps, cu_seqlens)
    losses = token_losses(sequence_logps, weights.of_sequences(dtype), "weight")
    return losses.sum(), sequence_logps, lengths


@torch.library.custom_op("redi::redi_loss", mutates_args=())
def redi_loss_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    valid_index: Tensor | None,
    num_weighted: int | None,
    alpha: float,
    num_pairs: float,
    backend: str,
    chunk_tokens: int | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, sequence_logps, lengths, dhidden, dweight); a gradient not needed is empty."""
    dhidden = gradient_buffer(hidden, need_dhidden)
    dweight = gradient_buffer(weight, need_dweight)
    loss, sequence_logps, lengths = _redi(
        hidden,
        weight,
        targets,
        cu_seqlens,
        signs,
        valid_index,
        num_weighted,
        alpha,
        num_pairs,
        1.0,
        backend,
        chunk_tokens,
        dhidden if need_dhidden else None,
        dweight if need_dweight else None,
        False,
    )
    return loss, sequence_logps, lengths, dhidden, dweight


@redi_loss_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    valid_index: Tensor | None,
    num_weighted: int | None,
    alpha: float,
    num_pairs: float,
    backend: str,
    chunk_tokens: int | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(signs.shape, dtype=dtype),
        hidden.new_empty(signs.shape, dtype=torch.int64),
        gradient_buffer(hidden, need_dhidden),
        gradient_buffer(weight, need_dweight),
    )


@torch.library.custom_op("redi::redi_value_and_grad", mutates_args=("dweight",))
def redi_value_and_grad_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    valid_index: Tensor | None,
    num_weighted: int | None,
    alpha: float,
    num_pairs: float,
    grad_scale: float,
    backend: str,
    chunk_tokens: int | None,
    dweight: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, sequence_logps, lengths, dhidden); writes or adds to dweight."""
    dhidden = gradient_buffer(hidden, True)
    loss, sequence_logps, lengths = _redi(
        hidden,
        weight,
        targets,
        cu_seqlens,
        signs,
        valid_index,
        num_weighted,
        alpha,
        num_pairs,
        grad_scale,
        backend,
        chunk_tokens,
        dhidden,
        dweight,
        accumulate,
    )
    return loss, sequence_logps, lengths, dhidden.to(hidden.dtype)


@redi_value_and_grad_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    valid_index: Tensor | None,
    num_weighted: int | None,
    alpha: float,
    num_pairs: float,
    grad_scale: float,
    backend: str,
    chunk_tokens: int | None,
    dweight: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(signs.shape, dtype=dtype),
        hidden.new_empty(signs.shape, dtype=torch.int64),
        hidden.new_empty(hidden.shape),
    )


@torch.library.custom_op("redi::signed_cross_entropy", mutates_args=())
def signed_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    valid_index: Tensor | None,
    num_weighted: int | None,
    coefficient: str,
    need_entropies: bool,
    backend: str,
    chunk_tokens: int | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, token_logps, token_entropies, dhidden, dweight); what is not needed is empty."""
    check_target_values(targets, weight.shape[0], valid_index)
    check_weight_values(token_weights, targets)
    dhidden = gradient_buffer(hidden, need_dhidden)
    dweight = gradient_buffer(weight, need_dweight)
    dtype = accumulation_dtype(hidden.dtype)
    token_weights = token_weights.to(dtype)
    check_unweighted(token_weights, valid_index, num_weighted)
    token_logps = hidden.new_empty(hidden.shape[0], dtype=dtype)
    token_entropies = hidden.new_empty(hidden.shape[0] if need_entropies else 0, dtype=dtype)
    kernels = kernels_of(backend)
    with torch.autocast(hidden.device.type, enabled=False):
        cross_entropy_chunks(
            hidden,
            weight,
            targets,
            token_weights,
            coefficient=coefficient,
            row_kernel=kernels.softmax_rows,
            exponentials=kernels.exponentials,
            valid_index=valid_index,
            num_weighted=num_weighted,
            chunk_tokens=chunk_tokens,
            token_logps=token_logps,
            token_entropies=token_entropies if need_entropies else None,
            dhidden=dhidden if need_dhidden else None,
            dweight=dweight if need_dweight else None,
        )
    masked = targets == IGNORE_INDEX
    losses = token_losses(token_logps, token_weights, coefficient).masked_fill(masked, 0.0)
    return losses.sum(), token_logps, token_entropies, dhidden, dweight


@signed_cross_entropy_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    valid_index: Tensor | None,
    num_weighted: int | None,
    coefficient: str,
    need_entropies: bool,
    backend: str,
    chunk_tokens: int | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        hidden.new_empty(hidden.shape[0] if need_entropies else 0, dtype=dtype),
        gradient_buffer(hidden, need_dhidden),
        gradient_buffer(weight, need_dweight),
    )


@torch.library.custom_op("redi::scale_gradient", mutates_args=())
def scale_gradient_op(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient times a scalar on the device, in one pass to a new tensor of `dtype`.

    An op of its own without autograd, so that a second derivative raises instead of being wrong.
    """
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


@scale_gradient_op.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Both losses have (hidden, weight, ...) as inputs and (loss, ..., dhidden, dweight) as output.

    The gradients are saved as they are and never written to: backward may run again.
    """
    *_, dhidden, dweight = output
    ctx.save_for_backward(dhidden, dweight)
    ctx.dtype = inputs[0].dtype
    ctx.without_gradient = (None,) * (len(inputs) - 2)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def scale_gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads = [
        scale_gradient_op(gradient, dloss, ctx.dtype) if needed and dloss is not None else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    ]
    return *grads, *ctx.without_gradient


redi_loss_op.register_autograd(scale_gradients, setup_context=save_gradients)
signed_cross_entropy_op.register_autograd(scale_gradients, setup_context=save_gradients)
