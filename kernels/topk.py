"""The divergence to a teacher's distribution, of which K entries of each token are stored.

They are known before the forward pass, so forward and backward are three products, as for a
cross-entropy, which may be added in the same pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redi.kernels import reference
from redi.kernels.backends import choose_backend, kernels_of
from redi.kernels.chunked import Outputs, TokenSchedule, cross_entropy_chunks
from redi.kernels.loss_ops import (
    needs_grad,
    new_gradient,
    optional_float,
    save_gradients,
    scale_gradients,
    total_loss,
)
from redi.kernels.reference import (
    IGNORE_INDEX,
    Backend,
    Direction,
    Tail,
    TopkDivergence,
    accumulation_dtype,
)
from redi.kernels.softmax import Terms
from redi.kernels.topk_softmax import Teacher
from redi.kernels.validate import (
    check_divergence,
    check_logits,
    check_operands,
    check_schedule,
    check_target_values,
    check_teacher,
    check_teacher_values,
    check_token_weights,
    check_weight_values,
)


def topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logps: Tensor,
    token_weights: Tensor,
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
    tail: Tail = "ignore",
    skew: float = 0.0,
    targets: Tensor | None = None,
    target_weights: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    valid_index: Tensor | None = None,
    num_with_grad: int | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> TopkDivergence:
    """A sum over tokens of divergences to a teacher, and of log-probs of targets, in one pass.

    loss = sum_t w_t D_t - sum_t v_t logp_t, with token weights w and target weights v of either
    sign. With the teacher's probabilities q of its K ids and the student's
    p = softmax(z / temperature), and m = skew q + (1 - skew) p (reverse: skew p + (1 - skew) q):

        "forward"  D = sum q log(q / m), KL(teacher, student)
        "reverse"  D = sum p log(p / m) - p + m, KL(student, teacher)
        "jsd"      D = sum 1/2 q log(q / m) + 1/2 p log(p / m), m = (p + q) / 2

    The sums are over the K ids: with tail="ignore" over them alone, q as given and not
    renormalised; with tail="bucket" all other entries together are one more outcome, with
    q_tail = 1 - sum q and p_tail = 1 - sum p, the latter summed over them. Without a tail,
    "forward" is a cross-entropy minus the teacher's own entropy, least where p is q / sum q;
    "reverse" and "jsd" are least, 0, where p is q on the K ids. (Hence - p + m, which cancels in
    a sum over all outcomes: without it, "reverse" would reward a student that leaves the K ids.)

    Where w_t is negative a bounded D keeps the loss bounded below: "jsd" is at most log 2, and
    "forward" and "reverse" at most - log(skew) (forward without a tail: times sum q). At skew 0
    "reverse" is at most the largest - log q (without a tail: or 1), and "forward" has no bound;
    its gradient by the logits has one, as that of a cross-entropy: |w_t|.

    Args:
        hidden, weight: as for `redi_loss`; [..., D] and [V, D].
        teacher_ids: [..., K] int32 or int64, in [0, V), each once per token; -1 leaves an entry
            out, so that tokens may have different K.
        teacher_logps: [..., K] floating, the teacher's log-probs at `temperature`, not above 0,
            sum q at most 1.01; -inf for q = 0 and where the id is -1. float16 is exact enough:
            q_tail counts as at least what rounding may have taken from it.
        token_weights: [...] floating, without gradient: w, finite where the token is not masked.
        direction: see above.
        temperature: > 0, divides the student's logits (after a softcap) in p, not in logp_t.
            Gradients shrink by 1 / temperature^2; multiply w by its square to make up for that.
        tail: "ignore" or "bucket", see above.
        skew: in [0, 1), see above (arXiv 2402.03898); "jsd" takes 0 alone.
        targets: [...] int64, as for `redi_loss`. They mask; without them the tokens are masked
            whose ids are all -1.
        target_weights: [...] floating, without gradient: v, along with targets; None: 0.
        The other arguments are those of `redi_loss`. `num_with_grad` counts tokens with a weight
        in either of token_weights and target_weights.

    Returns:
        TopkDivergence: loss, a float32 scalar; token_divergences, D in the shape of
        token_weights, float32, detached, 0 where masked; token_logps likewise, or None without
        targets. float64 for float64 inputs. Backward is as `redi_loss`'s.

    Raises:
        TypeError, ValueError: as `redi_loss`, and for ids that are repeated or out of range, and
            log-probs that are no distribution; these values are read where `redi_loss` reads
            targets. On a GPU an id out of range makes the loss NaN.
    """
    check_teacher(hidden, teacher_ids, teacher_logps, token_weights)
    shape = token_weights.shape
    takes_part = reference.teacher_targets(teacher_ids) if targets is None else targets
    hidden, weight, takes_part = check_operands(hidden, weight, takes_part, ignore_index)
    token_weights = check_token_weights("token_weights", token_weights, takes_part.view(shape))
    if target_weights is not None:
        if targets is None:
            raise ValueError("target_weights are weights of targets: pass targets as well")
        target_weights = check_token_weights("target_weights", target_weights, targets)
    check_divergence(direction, temperature, tail, skew)
    check_logits(logit_scale, softcap)
    check_schedule(valid_index, chunk_tokens, hidden, num_with_grad)
    backend = choose_backend(backend, hidden.device, hidden.dtype, hidden.shape[1])
    teacher = teacher_ids.flatten(0, -2), teacher_logps.flatten(0, -2), token_weights
    if backend == "reference":
        order = valid_index, num_with_grad
        _check_values(weight, takes_part, *teacher, target_weights, *order, direction, skew)
        made = reference.topk_divergence(
            hidden,
            weight,
            *teacher,
            direction=direction,
            temperature=temperature,
            tail=tail,
            skew=skew,
            targets=takes_part,
            target_weights=target_weights,
            logit_scale=logit_scale,
            softcap=softcap,
        )
        loss, divergences, logps = made.loss, made.token_divergences, made.token_logps
        assert logps is not None
    else:
        schedule = valid_index, num_with_grad, chunk_tokens
        loss, divergences, logps, *_ = _topk_divergence_op(
            hidden, weight, takes_part, *teacher, target_weights, *schedule, backend,
            direction, float(temperature), tail == "bucket", float(skew),
            needs_grad(hidden, weight), float(logit_scale), optional_float(softcap),
        )  # fmt: skip
    token_logps = None if targets is None else logps.view(shape)
    return TopkDivergence(loss, divergences.view(shape), token_logps)


def _check_values(
    weight: Tensor,
    targets: Tensor,
    teacher_ids: Tensor,
    teacher_logps: Tensor,
    token_weights: Tensor,
    target_weights: Tensor | None,
    valid_index: Tensor | None,
    num_with_grad: int | None,
    direction: str,
    skew: float,
) -> None:
    """Raise ValueError as the op does; reads the tensors."""
    vocab = weight.shape[0]
    check_target_values(targets, vocab, valid_index)
    check_teacher_values(teacher_ids, teacher_logps, targets, vocab, direction, skew)
    for name, values in (("token_weights", token_weights), ("target_weights", target_weights)):
        if values is not None:
            check_weight_values(name, values, targets, valid_index, num_with_grad)


_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("redi::topk_divergence", mutates_args=())
def _topk_divergence_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_ids: Tensor,
    teacher_logps: Tensor,
    token_weights: Tensor,
    target_weights: Tensor | None,
    valid_index: Tensor | None,
    num_with_grad: int | None,
    chunk_tokens: int | None,
    backend: str,
    direction: str,
    temperature: float,
    bucket: bool,
    skew: float,
    needs: Sequence[bool],
    logit_scale: float,
    softcap: float | None,
) -> _Results:
    """(loss, token_divergences, token_logps, dhidden, dweight); `needs` is of the last two."""
    schedule = TokenSchedule(valid_index, num_with_grad, chunk_tokens)
    given = teacher_ids, teacher_logps, token_weights, target_weights
    _check_values(weight, targets, *given, valid_index, num_with_grad, direction, skew)
    if target_weights is None:
        target_weights = torch.zeros_like(token_weights)
    loss, divergences, logps, dhidden, dweight = results = _new_results(hidden, weight, needs)
    teacher = Teacher(
        teacher_ids,
        teacher_logps,
        token_weights.to(logps.dtype),
        direction,
        temperature,
        bucket,
        skew,
    )
    terms = Terms(logit_scale, softcap, teacher=teacher)
    need_dhidden, need_dweight = needs
    out = Outputs(
        logps=logps,
        divergences=divergences,
        dhidden=dhidden if need_dhidden else None,
        dweight=dweight if need_dweight else None,
    )
    of_targets = target_weights.to(logps.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        cross_entropy_chunks(
            hidden, weight, targets, of_targets, out, schedule, kernels_of(backend), terms=terms
        )
        loss.copy_(total_loss(out, of_targets, targets, "weight", terms))
    return results


def _new_results(hidden: Tensor, weight: Tensor, needs: Sequence[bool]) -> _Results:
    """Uninitialised results of the op."""
    dtype = accumulation_dtype(hidden.dtype)
    loss, divergences, logps = (
        hidden.new_empty(shape, dtype=dtype) for shape in ((), hidden.shape[:1], hidden.shape[:1])
    )
    need_dhidden, need_dweight = needs
    gradients = new_gradient(hidden, need_dhidden), new_gradient(weight, need_dweight)
    return loss, divergences, logps, *gradients


@_topk_divergence_op.register_fake
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> _Results:
    return _new_results(hidden, weight, arguments[-3])


_topk_divergence_op.register_autograd(scale_gradients, setup_context=save_gradients)
