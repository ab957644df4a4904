"""The `torch.library` ops under the losses: what they compute, their fakes, their autograd.

The loss op computes the gradients along with the loss where they will be needed; backward only
scales them by the upstream gradient. Ops are opaque to torch.compile (no graph breaks) and run with
autocast off: the operands' own dtype decides. Arguments have been checked, except what only reading
a tensor's values shows: those checks are in the ops, where torch.compile does not trace them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from redi.kernels.backends import kernels_of
from redi.kernels.chunked import Outputs, TokenSchedule, cross_entropy_chunks
from redi.kernels.reference import IGNORE_INDEX, accumulation_dtype
from redi.kernels.softmax import Terms, term_losses, token_losses
from redi.kernels.validate import (
    check_sequence_values,
    check_target_values,
    check_weight_values,
)

LossResults = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("redi::token_weights", mutates_args=())
def token_weights_op(
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    alpha: float,
    num_pairs: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """REDI's (weights [T] in `dtype`, sequence_lengths [S] int64); see `segments.token_weights`."""
    check_sequence_values(cu_seqlens, targets.shape[0], signs)
    return kernels_of(backend).token_weights(targets, cu_seqlens, signs, alpha, num_pairs, dtype)


@token_weights_op.register_fake
def _(targets: Tensor, cu_seqlens: Tensor, signs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype = arguments[2]
    return targets.new_empty(targets.shape, dtype=dtype), targets.new_empty(signs.shape)


@torch.library.custom_op("redi::signed_cross_entropy", mutates_args=())
def signed_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    entropy_weights: Tensor | None,
    valid_index: Tensor | None,
    num_with_grad: int | None,
    chunk_tokens: int | None,
    backend: str,
    coefficient: str,
    epsilon: float | None,
    needs: Sequence[bool],
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossResults:
    """(loss, token_logps, token_entropies, token_lses, token_dropped, dhidden, dweight).

    `needs` is (entropies, lses, dhidden, dweight), `epsilon` that of a filter
    (`experimental/filter.py`): without it nothing is dropped. An output that is not needed is
    empty.
    """
    results = new_results(hidden, weight, epsilon, needs)
    loss = results[0]
    numbers = logit_scale, softcap, label_smoothing, z_loss
    terms, out = terms_and_outputs(results, needs, token_weights, entropy_weights, *numbers)
    schedule = TokenSchedule(valid_index, num_with_grad, chunk_tokens)
    fill: Callable[..., None] = partial(cross_entropy_chunks, terms=terms)
    if epsilon is not None:  # imported late: no exact loss needs it
        from redi.kernels.experimental.filter import filtered_cross_entropy_chunks

        fill = partial(filtered_cross_entropy_chunks, epsilon=epsilon)
    with _weights_for(hidden, weight, targets, token_weights, schedule) as w:
        if entropy_weights is not None:
            check_weight_values("entropy_weights", entropy_weights, targets, *schedule[:2])
        fill(hidden, weight, targets, w, out, schedule, kernels_of(backend), coefficient)
        loss.copy_(total_loss(out, w, targets, coefficient, terms))
    return results


def terms_and_outputs(
    results: LossResults,
    needs: Sequence[bool],
    token_weights: Tensor,
    entropy_weights: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Terms, Outputs]:
    """What the chunk loop of a loss op takes.

    The arguments are the op's own, `results` what it returns. What a term of the loss needs is
    computed though the caller may not want it.
    """
    _, logps, entropies, lses, dropped, dhidden, dweight = results
    need_entropies, need_lses, need_dhidden, need_dweight = needs
    terms = Terms(
        logit_scale,
        softcap,
        label_smoothing,
        entropy_weights=None if entropy_weights is None else entropy_weights.to(logps.dtype),
        z_weights=token_weights.to(logps.dtype).abs() * z_loss if z_loss else None,
    )
    out = Outputs(
        logps=logps,
        entropies=_wanted(entropies, need_entropies, terms.entropy_weights),
        lses=_wanted(lses, need_lses, terms.z_weights),
        mean_logps=torch.empty_like(logps) if label_smoothing else None,
        dropped=dropped,
        dhidden=dhidden if need_dhidden else None,
        dweight=dweight if need_dweight else None,
    )
    return terms, out


def asked(
    entropy: bool, log_sum_exp: bool, logps: Tensor, entropies: Tensor, lses: Tensor
) -> list[Tensor]:
    """Of the statistics of tokens those that the caller of a loss asked for."""
    return [logps, *([entropies] if entropy else []), *([lses] if log_sum_exp else [])]


def needs_grad(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Which of the two operands needs a gradient, as the public functions see it."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden.requires_grad, enabled and weight.requires_grad


def optional_float(number: float | None) -> float | None:
    """A number, perhaps of NumPy, as an op takes it."""
    return None if number is None else float(number)


def _wanted(result: Tensor, needed: bool, weights: Tensor | None) -> Tensor | None:
    """Where to write a statistic: the result, or memory of its own if only a term needs it."""
    if needed or weights is None:
        return result if needed else None
    return torch.empty_like(weights)


def new_results(
    hidden: Tensor, weight: Tensor, epsilon: float | None, needs: Sequence[bool]
) -> LossResults:
    """Uninitialised results of `signed_cross_entropy_op`."""
    need_entropies, need_lses, need_dhidden, need_dweight = needs
    tokens = hidden.shape[:1]
    loss, logps, entropies, lses, dropped = (
        hidden.new_empty(shape, dtype=accumulation_dtype(hidden.dtype))
        for shape in (
            (),
            tokens,
            tokens if need_entropies else (0,),
            tokens if need_lses else (0,),
            (0,) if epsilon is None else tokens,
        )
    )
    gradients = new_gradient(hidden, need_dhidden), new_gradient(weight, need_dweight)
    return loss, logps, entropies, lses, dropped, *gradients


def new_gradient(operand: Tensor, needed: bool) -> Tensor:
    """Uninitialised, in the accumulation dtype; empty if it is not needed."""
    shape = operand.shape if needed else (0,)
    return operand.new_empty(shape, dtype=accumulation_dtype(operand.dtype))


@signed_cross_entropy_op.register_fake
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> LossResults:
    epsilon, needs = arguments[8:10]
    return new_results(hidden, weight, epsilon, needs)


@torch.library.custom_op("redi::accumulate_gradient", mutates_args=("dweight",))
def accumulate_gradient_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    valid_index: Tensor | None,
    num_with_grad: int | None,
    chunk_tokens: int | None,
    backend: str,
    grad_scale: float,
    dweight: Tensor,
    accumulate: bool,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, token_logps, dhidden); writes or adds to `dweight`, both gradients x grad_scale."""
    dhidden = new_gradient(hidden, True)
    logps = hidden.new_empty(hidden.shape[0], dtype=dhidden.dtype)
    out = Outputs(logps=logps, dhidden=dhidden, dweight=dweight, accumulate=accumulate)
    schedule = TokenSchedule(valid_index, num_with_grad, chunk_tokens)
    with _weights_for(hidden, weight, targets, token_weights, schedule) as w:
        kernels, terms = kernels_of(backend), Terms(logit_scale, softcap)
        cross_entropy_chunks(
            hidden, weight, targets, w * grad_scale, out, schedule, kernels, terms=terms
        )
        return total_loss(out, w, targets, "weight", terms), logps, dhidden.to(hidden.dtype)


@accumulate_gradient_op.register_fake
def _(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, logps = (
        hidden.new_empty(shape, dtype=accumulation_dtype(hidden.dtype))
        for shape in ((), hidden.shape[:1])
    )
    return loss, logps, hidden.new_empty(hidden.shape)


@contextmanager
def _weights_for(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, schedule: TokenSchedule
) -> Iterator[Tensor]:
    """The weights in the accumulation dtype, values checked; autocast is off in the block."""
    check_target_values(targets, weight.shape[0], schedule.valid_index)
    check_weight_values(
        "token_weights", token_weights, targets, schedule.valid_index, schedule.num_with_grad
    )
    with torch.autocast(hidden.device.type, enabled=False):
        yield token_weights.to(accumulation_dtype(hidden.dtype))


def total_loss(
    out: Outputs, weights: Tensor, targets: Tensor, coefficient: str, terms: Terms
) -> Tensor:
    """The loss: the sum over unmasked tokens."""
    assert out.logps is not None
    of_targets = weights if not terms.label_smoothing else weights * (1 - terms.label_smoothing)
    losses = token_losses(out.logps, of_targets, coefficient)
    added = term_losses(terms, weights, out.entropies, out.lses, out.mean_logps)
    losses = losses if added is None else losses + added
    if terms.teacher is not None:
        assert out.divergences is not None
        losses = losses + terms.teacher.losses(out.divergences)
    return losses.masked_fill(targets == IGNORE_INDEX, 0.0).sum()


@torch.library.custom_op("redi::scale_gradient", mutates_args=())
def scale_gradient_op(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient times a scalar on the device, in one pass to a new tensor of `dtype`.

    An op without autograd, so that a second derivative raises instead of being wrong.
    """
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


@scale_gradient_op.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For ops that return (loss, ..., dhidden, dweight) and take hidden and weight first.

    The gradients are saved as they are and never written to: backward may run again.
    """
    *_, dhidden, dweight = output
    ctx.save_for_backward(dhidden, dweight)
    ctx.dtype = inputs[0].dtype
    ctx.without_gradient = (None,) * (len(inputs) - 2)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def scale_gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """The backward that goes with it."""
    grads = [
        scale_gradient_op(gradient, dloss, ctx.dtype) if needed and dloss is not None else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    ]
    return *grads, *ctx.without_gradient


signed_cross_entropy_op.register_autograd(scale_gradients, setup_context=save_gradients)
