"""The losses: REDI, and the signed cross-entropy that it is one case of.

The public functions check their arguments and choose a backend; the `torch.library` ops beneath
compute the loss and, where a gradient will be wanted, the gradients along with it, so that
backward has nothing left to do but to scale them by the upstream gradient. Ops are opaque to
torch.compile (no graph breaks) and run with autocast off: the operands' own dtype decides.
"""

from typing import Any

import torch
from torch import Tensor

from redi.kernels import reference
from redi.kernels.backends import choose_backend, row_kernel
from redi.kernels.chunked import cross_entropy_chunks
from redi.kernels.reference import Backend, Coefficient, RediLoss, accumulation_dtype
from redi.kernels.rows import token_losses
from redi.kernels.segments import sequence_ids, sequence_lengths, sum_segments
from redi.kernels.validate import (
    check_choice,
    check_dweight,
    check_objective,
    check_operands,
    check_schedule,
    check_sequence_values,
    check_sequences,
    check_target_values,
    check_token_weights,
    check_weight_values,
)


def redi_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    *,
    alpha: float,
    num_pairs: float,
    valid_index: Tensor | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> RediLoss:
    """The REDI objective (arXiv 2505.24850) of a packed row of positive and negative traces.

    loss = (1 / num_pairs) sum_s c_s (sum_{t in s} logp_t) / |y_s|, where |y_s| counts the
    unmasked targets of sequence s and c_s is -1 for sign +1, +alpha for sign -1, 0 for sign 0.
    A sequence without unmasked targets contributes 0; T = 0 is legal.

    Args:
        hidden: [T, D] bfloat16, float16, float32 or (CPU only) float64; any strides. Rows of
            masked tokens are never read.
        weight: [V, D] the lm_head, same dtype; any strides. For a padded vocabulary pass
            `weight[:V]`.
        targets: [T] int64, already shifted: targets[t] is what hidden[t] predicts; -100 masks.
        cu_seqlens: [S + 1] int32 or int64, from 0 to T: sequence s is
            [cu_seqlens[s], cu_seqlens[s + 1]).
        signs: [S] any integer dtype: +1 positive, -1 negative, 0 neither.
        alpha: weight of the negatives, >= 0. At 0 they get no gradient, but log-probs.
        num_pairs: pairs of the optimizer step over all ranks and micro-steps, > 0. The loss is
            this call's share of a sum: under a DDP that averages, multiply by the world size.
        valid_index: [N] int32 or int64, the positions of the unmasked targets, each once. With it
            the op never synchronises a GPU; without it once, to learn N. (On a GPU `valid_index`
            also means that tokens of weight 0 are not told apart to skip their gradient.)
        backend: "auto", "torch", "triton" or "reference" (whole logits; for checking).
        chunk_tokens: rows of logits at hand at once; None chooses for the device.

    Returns:
        RediLoss: loss, a float32 scalar, and sequence_logps [S] float32, sequence_lengths [S]
        int64, both detached; float64 for float64 inputs. The gradients have the dtype of hidden
        and weight. Backward honours any upstream gradient, retain_graph and repetition; second
        derivatives raise. An operand that needs no gradient costs no product.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range. What only reading a tensor
            can tell (targets, cu_seqlens, signs, valid_index) is checked on the CPU, and
            elsewhere with REDI_DEBUG=1.
    """
    hidden, weight = check_operands(hidden, weight, targets)
    check_sequences(cu_seqlens, signs, hidden)
    check_objective(alpha, num_pairs)
    check_schedule(valid_index, chunk_tokens, hidden)
    backend = choose_backend(backend)
    if backend == "reference":
        return reference.redi_loss(
            hidden, weight, targets, cu_seqlens, signs, alpha=alpha, num_pairs=num_pairs
        )
    loss, sequence_logps, lengths, _, _ = _redi_loss_op(
        hidden,
        weight,
        targets,
        cu_seqlens,
        signs,
        valid_index,
        float(alpha),
        float(num_pairs),
        backend,
        chunk_tokens,
        *_needs_grad(hidden, weight),
    )
    return RediLoss(loss, sequence_logps, lengths)


def redi_value_and_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    *,
    alpha: float,
    num_pairs: float,
    grad_scale: float = 1.0,
    dweight: Tensor | None = None,
    valid_index: Tensor | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> tuple[RediLoss, Tensor, Tensor]:
    """`redi_loss` and its gradients in one call, for trainers that keep float32 gradients.

    Args:
        grad_scale: multiplies both gradients, not the loss.
        dweight: [V, D] float32 (float64 for float64 inputs), contiguous; the lm_head's gradient
            is added to it in place. None allocates it.
        The other arguments are those of `redi_loss`.

    Returns:
        (RediLoss, dhidden [T, D] in hidden's dtype, dweight in float32 or float64); nothing of
        it is attached to a graph. `dweight` is the argument itself where one was given.

    Raises:
        TypeError, ValueError: as `redi_loss`.
    """
    hidden, weight = check_operands(hidden, weight, targets)
    hidden, weight = hidden.detach(), weight.detach()
    check_sequences(cu_seqlens, signs, hidden)
    check_objective(alpha, num_pairs)
    check_schedule(valid_index, chunk_tokens, hidden)
    if dweight is not None:
        check_dweight(dweight, weight)
    backend = choose_backend(backend)
    if backend == "reference":
        return reference.redi_value_and_grad(
            hidden,
            weight,
            targets,
            cu_seqlens,
            signs,
            alpha=alpha,
            num_pairs=num_pairs,
            grad_scale=grad_scale,
            dweight=dweight,
        )
    accumulate = dweight is not None
    if dweight is None:
        dweight = weight.new_empty(weight.shape, dtype=accumulation_dtype(weight.dtype))
    loss, sequence_logps, lengths, dhidden = _redi_value_and_grad_op(
        hidden,
        weight,
        targets,
        cu_seqlens,
        signs,
        valid_index,
        float(alpha),
        float(num_pairs),
        float(grad_scale),
        backend,
        chunk_tokens,
        dweight,
        accumulate,
    )
    return RediLoss(loss, sequence_logps, lengths), dhidden, dweight


def signed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    coefficient: Coefficient = "weight",
    valid_index: Tensor | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A sum over tokens, each with its own weight of either sign, in one pass.

    A weight w_t says how much token t's log-prob is wanted. The loss, by `coefficient`:

        "weight"        - sum_t w_t logp_t
        "dft"           - sum_t w_t sg(p_t) logp_t, sg = stop-gradient (arXiv 2508.05629)
        "unlikelihood"  - sum_t w_t logp_t over w_t >= 0, plus
                        - sum_t |w_t| log(1 - p_t) over w_t < 0 (arXiv 1908.04319)

    So under "unlikelihood" too a token of positive weight becomes likelier and one of negative
    weight less likely; 1 - p_t is exact near p_t = 1, and counts as 2^-100 where it is smaller.
    The gradient by the logits never exceeds |w_t| in any of the three.

    Args:
        token_weights: [T] floating, without gradient; finite where the target is not masked.
            A token of weight 0 gets a log-prob and no gradient.
        coefficient: see above.
        The other arguments are those of `redi_loss`.

    Returns:
        (loss, token_logps): a float32 scalar and [T] float32, detached, 0 where masked; float64
        for float64 inputs.

    Raises:
        TypeError, ValueError: as `redi_loss`.
    """
    hidden, weight = check_operands(hidden, weight, targets)
    check_token_weights(token_weights, hidden)
    check_schedule(valid_index, chunk_tokens, hidden)
    check_choice("coefficient", coefficient, ("weight", "dft", "unlikelihood"))
    backend = choose_backend(backend)
    if backend == "reference":
        return reference.signed_cross_entropy(
            hidden, weight, targets, token_weights, coefficient=coefficient
        )
    loss, token_logps, _, _ = _signed_cross_entropy_op(
        hidden,
        weight,
        targets,
        token_weights,
        valid_index,
        coefficient,
        backend,
        chunk_tokens,
        *_needs_grad(hidden, weight),
    )
    return loss, token_logps


def _needs_grad(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    enabled = torch.is_grad_enabled()
    return enabled and hidden.requires_grad, enabled and weight.requires_grad


def _gradient_buffer(operand: Tensor, needed: bool) -> Tensor:
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

    lengths = sequence_lengths(targets, cu_seqlens)
    signs = signs.to(dtype)
    wanted = torch.where(signs < 0, alpha * signs, signs)  # minus the c_s of redi_loss
    sequence_weights = wanted / (lengths.clamp(min=1) * num_pairs)
    nobody = sequence_weights.new_zeros(1)  # a token behind the last sequence
    token_weights = torch.cat([sequence_weights, nobody])[sequence_ids(cu_seqlens, tokens)]

    token_logps = hidden.new_empty(tokens, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        cross_entropy_chunks(
            hidden,
            weight,
            targets,
            token_weights * grad_scale,
            coefficient="weight",
            row_kernel=row_kernel(backend),
            valid_index=valid_index,
            chunk_tokens=chunk_tokens,
            token_logps=token_logps,
            dhidden=dhidden,
            dweight=dweight,
            accumulate=accumulate,
        )
    sequence_logps = sum_segments(token_logps, cu_seqlens)
    # The sequences of weight 0 are left out: 0 times a log-prob of -inf would be NaN.
    terms = (sequence_weights * sequence_logps).masked_fill(sequence_weights == 0, 0.0)
    return -terms.sum(), sequence_logps, lengths


@torch.library.custom_op("redi::redi_loss", mutates_args=())
def _redi_loss_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    valid_index: Tensor | None,
    alpha: float,
    num_pairs: float,
    backend: str,
    chunk_tokens: int | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, sequence_logps, lengths, dhidden, dweight); a gradient not needed is empty."""
    dhidden = _gradient_buffer(hidden, need_dhidden)
    dweight = _gradient_buffer(weight, need_dweight)
    loss, sequence_logps, lengths = _redi(
        hidden,
        weight,
        targets,
        cu_seqlens,
        signs,
        valid_index,
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


@_redi_loss_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    valid_index: Tensor | None,
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
        _gradient_buffer(hidden, need_dhidden),
        _gradient_buffer(weight, need_dweight),
    )


@torch.library.custom_op("redi::redi_value_and_grad", mutates_args=("dweight",))
def _redi_value_and_grad_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    valid_index: Tensor | None,
    alpha: float,
    num_pairs: float,
    grad_scale: float,
    backend: str,
    chunk_tokens: int | None,
    dweight: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, sequence_logps, lengths, dhidden); writes or adds to dweight."""
    dhidden = _gradient_buffer(hidden, True)
    loss, sequence_logps, lengths = _redi(
        hidden,
        weight,
        targets,
        cu_seqlens,
        signs,
        valid_index,
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


@_redi_value_and_grad_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    valid_index: Tensor | None,
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
def _signed_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    valid_index: Tensor | None,
    coefficient: str,
    backend: str,
    chunk_tokens: int | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, token_logps, dhidden, dweight); a gradient not needed is empty."""
    check_target_values(targets, weight.shape[0], valid_index)
    check_weight_values(token_weights, targets)
    dhidden = _gradient_buffer(hidden, need_dhidden)
    dweight = _gradient_buffer(weight, need_dweight)
    dtype = accumulation_dtype(hidden.dtype)
    token_weights = token_weights.to(dtype)
    token_logps = hidden.new_empty(hidden.shape[0], dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        cross_entropy_chunks(
            hidden,
            weight,
            targets,
            token_weights,
            coefficient=coefficient,
            row_kernel=row_kernel(backend),
            valid_index=valid_index,
            chunk_tokens=chunk_tokens,
            token_logps=token_logps,
            dhidden=dhidden if need_dhidden else None,
            dweight=dweight if need_dweight else None,
        )
    masked = targets == reference.IGNORE_INDEX
    losses = token_losses(token_logps, token_weights, coefficient).masked_fill(masked, 0.0)
    return losses.sum(), token_logps, dhidden, dweight


@_signed_cross_entropy_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    valid_index: Tensor | None,
    coefficient: str,
    backend: str,
    chunk_tokens: int | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        _gradient_buffer(hidden, need_dhidden),
        _gradient_buffer(weight, need_dweight),
    )


@torch.library.custom_op("redi::scale_gradient", mutates_args=())
def _scale_gradient_op(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient times a scalar on the device, in one pass to a new tensor of `dtype`.

    An op of its own without autograd, so that a second derivative raises instead of being wrong.
    """
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


@_scale_gradient_op.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Both losses have (hidden, weight, ...) as inputs and (loss, ..., dhidden, dweight) as output.

    The gradients are saved as they are and never written to: backward may run again.
    """
    *_, dhidden, dweight = output
    ctx.save_for_backward(dhidden, dweight)
    ctx.dtype = inputs[0].dtype
    ctx.without_gradient = (None,) * (len(inputs) - 2)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads = [
        _scale_gradient_op(gradient, dloss, ctx.dtype) if needed and dloss is not None else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    ]
    return *grads, *ctx.without_gradient


_redi_loss_op.register_autograd(_scale_gradients, setup_context=_save_gradients)
_signed_cross_entropy_op.register_autograd(_scale_gradients, setup_context=_save_gradients)
