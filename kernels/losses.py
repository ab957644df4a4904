"""The losses: REDI, exact and filtered, and the signed cross-entropy that they are a case of.

The public functions: they check their arguments, choose a backend and call the ops of
`loss_ops.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from redi.kernels import reference
from redi.kernels.backends import choose_backend, filtering_backend
from redi.kernels.loss_ops import (
    accumulate_gradient_op,
    asked,
    needs_grad,
    optional_float,
    signed_cross_entropy_op,
    token_weights_op,
)
from redi.kernels.reference import (
    IGNORE_INDEX,
    Backend,
    Coefficient,
    RediLoss,
    accumulation_dtype,
)
from redi.kernels.segment_sum import segment_sum_op
from redi.kernels.validate import (
    check_dweight,
    check_epsilon,
    check_logits,
    check_number,
    check_objective,
    check_operands,
    check_per_sequence,
    check_schedule,
    check_sequences,
    check_statistics,
    check_target_values,
    check_terms,
    check_token_weights,
    check_weight_values,
)


class FilteredRediLoss(NamedTuple):
    """What `filtered_redi_loss` returns: `RediLoss`, and what the filter left out."""

    loss: Tensor
    """Scalar float32, differentiable."""
    sequence_logps: Tensor
    """[S] float32: sum of the log-probs of each sequence's unmasked tokens, detached."""
    sequence_lengths: Tensor
    """[S] int64: each sequence's number of unmasked tokens |y_s|."""
    sequence_dropped: Tensor
    """[S] float32: sum over tokens of the share of their probability that was left out, detached;
    divided by |y_s| the mean share, in [0, 1]. 0 where there is no gradient."""


def redi_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    *,
    alpha: float,
    num_pairs: float,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    valid_index: Tensor | None = None,
    num_with_grad: int | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> RediLoss:
    """The REDI objective (arXiv 2505.24850) of a packed row of positive and negative traces.

    loss = (1 / num_pairs) sum_s c_s (sum_{t in s} logp_t) / |y_s|, where |y_s| counts the
    unmasked targets of sequence s and c_s is -1 for sign +1, +alpha for sign -1, 0 for sign 0.
    A sequence without unmasked targets contributes 0; T = 0 is legal.

    Args:
        hidden: [T, D] bfloat16, float16, float32 or (CPU only) float64; any strides. Rows of
            masked tokens are never read. On CUDA float32 products follow torch's own setting for
            TF32, off by default. Several leading dimensions, [..., D], are flattened to T.
        weight: [V, D] the lm_head, same dtype; any strides. For a padded vocabulary pass
            `weight[:V]`.
        targets: [T] int64, or hidden's leading shape; already shifted: targets[t] is what
            hidden[t] predicts; -100 and `ignore_index` mask.
        cu_seqlens: [S + 1] int32 or int64, from 0 to T: sequence s is
            [cu_seqlens[s], cu_seqlens[s + 1]).
        signs: [S] any integer dtype: +1 positive, -1 negative, 0 neither.
        alpha: weight of the negatives, >= 0. At 0 they get log-probs and no gradient.
        num_pairs: pairs of the optimizer step over all ranks and micro-steps, > 0. The loss is
            this call's share of a sum: under a DDP that averages, multiply by the world size.
        logit_scale: multiplies the logits, > 0: 1 / temperature. (Cohere's `logit_scale` is this
            factor, Granite's `logits_scaling` its inverse.)
        softcap: c > 0 bounds the logits, z = c tanh(logit_scale hidden weight^T / c), as Gemma 2's
            `final_logit_softcapping`; None: no bound. The gradient by hidden weight^T is that by z
            times logit_scale (1 - (z / c)^2).
        ignore_index: a target that masks, as -100 always does.
        valid_index: [N] int32 or int64, the positions of the unmasked targets, each once. With it
            the op never synchronises a GPU; without it once, to learn N.
        num_with_grad: of `valid_index`, the first this many tokens have a gradient, and the rest
            weight 0 (at alpha = 0 the negatives), which cost one matrix product instead of three.
            Without it a GPU that is given `valid_index` treats all tokens alike.
        backend: "auto", "torch", "triton", "triton-exp" (bfloat16: no pass over logits), or for
            checking "reference" (whole logits).
        chunk_tokens: number of logits rows held in memory at a time; None chooses for the device.

    Returns:
        RediLoss: loss, a float32 scalar, and sequence_logps [S] float32, sequence_lengths [S]
        int64, both detached; float64 for float64 inputs. The gradients have the dtype of hidden
        and weight. Backward honours any upstream gradient, retain_graph and repetition; second
        derivatives raise. An operand that needs no gradient costs no product.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range. The values of tensors
            (targets, cu_seqlens, signs, valid_index) are checked on the CPU, and elsewhere with
            REDI_DEBUG=1.
    """
    hidden, weight, targets = check_operands(hidden, weight, targets, ignore_index)
    check_sequences(cu_seqlens, signs, hidden)
    check_objective(alpha, num_pairs)
    check_logits(logit_scale, softcap)
    check_schedule(valid_index, chunk_tokens, hidden, num_with_grad)
    backend = choose_backend(backend, hidden.device, hidden.dtype, hidden.shape[1])
    if backend == "reference":
        order = valid_index, num_with_grad
        _check_values(hidden, weight, targets, cu_seqlens, signs, alpha, num_pairs, *order)
        return reference.redi_loss(
            hidden,
            weight,
            targets,
            cu_seqlens,
            signs,
            alpha=alpha,
            num_pairs=num_pairs,
            logit_scale=logit_scale,
            softcap=softcap,
        )
    token_weights, lengths = _token_weights(
        hidden, targets, cu_seqlens, signs, alpha, num_pairs, backend
    )
    schedule = valid_index, num_with_grad, chunk_tokens
    needs = False, False, *needs_grad(hidden, weight)
    loss, token_logps, *_ = signed_cross_entropy_op(
        hidden, weight, targets, token_weights, None, *schedule, backend, "weight", None, needs,
        float(logit_scale), optional_float(softcap),
    )  # fmt: skip
    return RediLoss(loss, segment_sum_op(token_logps, cu_seqlens, backend), lengths)


def filtered_redi_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    *,
    alpha: float,
    num_pairs: float,
    epsilon: float,
    sequence_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    valid_index: Tensor | None = None,
    num_with_grad: int | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> FilteredRediLoss:
    """`redi_loss` whose gradients leave out tiles of the vocabulary with very little probability.

    Experimental, see `kernels/experimental/README.md`. Loss and log-probs are exact. The gradients
    are not: of a token with weight w = c_s / (num_pairs |y_s|) and dropped probability d, up to
    |w| d times the largest row of the lm_head is missing in dhidden, and up to |w| d |x| in
    dweight. They also depend on which tokens are computed together, that is on packing.

    Args:
        hidden: [T, D] bfloat16; any strides.
        weight: [V, D] bfloat16; a copy with its rows in another order is made.
        epsilon: in [0, 1]. A tile of about 128 tokens and 256 entries of the vocabulary, sorted by
            their mean probability, is left out if it holds at most this share of each of its
            tokens' probability. At 0 nothing is left out; 2^-10 keeps about a third of the tiles
            of a trained model (bench/NOTES.md).
        sequence_weights: [S] floating, finite: multiplies c_s of each sequence; None: 1.
        backend: "auto", "triton-exp" or "torch"; the others have no filter.
        The other arguments are those of `redi_loss`.

    Returns:
        FilteredRediLoss. Backward is as `redi_loss`'s.

    Raises:
        TypeError, ValueError: as `redi_loss`, and for other dtypes than bfloat16.
    """
    hidden, weight, targets = check_operands(hidden, weight, targets, ignore_index)
    if hidden.dtype != torch.bfloat16:
        raise TypeError(f"hidden must be bfloat16 for a filter, got {hidden.dtype}")
    check_sequences(cu_seqlens, signs, hidden)
    check_objective(alpha, num_pairs)
    check_epsilon(epsilon)
    check_schedule(valid_index, chunk_tokens, hidden, num_with_grad)
    backend = filtering_backend(backend, hidden.device)
    token_weights, lengths = _token_weights(
        hidden, targets, cu_seqlens, signs, alpha, num_pairs, backend
    )
    if sequence_weights is not None:
        check_per_sequence("sequence_weights", sequence_weights, cu_seqlens)
        token_weights = token_weights * sequence_weights.detach().float().repeat_interleave(
            cu_seqlens.diff(), output_size=hidden.shape[0]
        )
    schedule = valid_index, num_with_grad, chunk_tokens
    needs = False, False, *needs_grad(hidden, weight)
    loss, token_logps, _, _, dropped, _, _ = signed_cross_entropy_op(
        hidden, weight, targets, token_weights, None, *schedule, backend, "weight", float(epsilon),
        needs,
    )  # fmt: skip
    logps, dropped = (segment_sum_op(t, cu_seqlens, backend) for t in (token_logps, dropped))
    return FilteredRediLoss(loss, logps, lengths, dropped)


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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    valid_index: Tensor | None = None,
    num_with_grad: int | None = None,
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
        (RediLoss, dhidden in hidden's shape and dtype, dweight in float32 or float64), not attached
        to a graph. `dweight` is the argument itself where one was given.

    Raises:
        TypeError, ValueError: as `redi_loss`.
    """
    given_targets = targets
    hidden, weight, targets = check_operands(hidden, weight, targets, ignore_index)
    shape = *given_targets.shape, hidden.shape[1]
    hidden, weight = hidden.detach(), weight.detach()
    check_sequences(cu_seqlens, signs, hidden)
    check_objective(alpha, num_pairs)
    check_logits(logit_scale, softcap)
    check_number("grad_scale", grad_scale)
    check_schedule(valid_index, chunk_tokens, hidden, num_with_grad)
    if dweight is not None:
        check_dweight(dweight, weight)
    backend = choose_backend(backend, hidden.device, hidden.dtype, hidden.shape[1])
    if backend == "reference":
        order = valid_index, num_with_grad
        _check_values(hidden, weight, targets, cu_seqlens, signs, alpha, num_pairs, *order)
        out, dhidden, dweight = reference.redi_value_and_grad(
            hidden,
            weight,
            targets,
            cu_seqlens,
            signs,
            alpha=alpha,
            num_pairs=num_pairs,
            grad_scale=grad_scale,
            dweight=dweight,
            logit_scale=logit_scale,
            softcap=softcap,
        )
        return out, dhidden.view(shape), dweight
    token_weights, lengths = _token_weights(
        hidden, targets, cu_seqlens, signs, alpha, num_pairs, backend
    )
    schedule = valid_index, num_with_grad, chunk_tokens
    add = dweight is not None
    if dweight is None:
        dweight = weight.new_empty(weight.shape, dtype=accumulation_dtype(weight.dtype))
    loss, token_logps, dhidden = accumulate_gradient_op(
        hidden, weight, targets, token_weights, *schedule, backend, float(grad_scale), dweight, add,
        float(logit_scale), optional_float(softcap),
    )  # fmt: skip
    logps = segment_sum_op(token_logps, cu_seqlens, backend)
    return RediLoss(loss, logps, lengths), dhidden.view(shape), dweight


def signed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    coefficient: Coefficient = "weight",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy_weights: Tensor | None = None,
    entropy: bool = False,
    log_sum_exp: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    valid_index: Tensor | None = None,
    num_with_grad: int | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """A sum over tokens, each with its own weight of either sign, in one pass.

    A weight w_t says how much token t's log-prob is wanted. The loss, by `coefficient`:

        "weight"        - sum_t w_t logp_t
        "dft"           - sum_t w_t sg(p_t) logp_t, sg = stop-gradient (arXiv 2508.05629)
        "unlikelihood"  - sum_t w_t logp_t over w_t >= 0, plus
                        - sum_t |w_t| log(1 - p_t) over w_t < 0 (arXiv 1908.04319)

    So under "unlikelihood" too a token of positive weight becomes likelier and one of negative
    weight less likely; 1 - p_t is exact near p_t = 1, and counts as at least 2^-100. The gradient
    by the logits never exceeds |w_t| in any of the three.

    Args:
        token_weights: [T] floating, without gradient; finite where the target is not masked.
            A token of weight 0 gets a log-prob and no gradient.
        coefficient: see above.
        label_smoothing: eps in [0, 1], for the coefficient "weight": logp_t becomes
            (1 - eps) logp_t + eps times the mean log-prob of all V entries, with w_t of either
            sign, as in `torch.nn.functional.cross_entropy`.
        z_loss: adds z_loss sum_t |w_t| lse_t^2, lse_t the log-sum-exp of the logits; >= 0. With
            any coefficient, it draws lse_t to 0 whatever the sign of w_t.
        entropy_weights: [T] like token_weights: adds - sum_t e_t H_t, H_t the token's entropy, so
            a positive e_t is a bonus. With any coefficient, and for tokens of weight 0 too.
        entropy: whether to return the tokens' entropies as well, from the same pass.
        log_sum_exp: whether to return the tokens' log-sum-exps as well.
        The other arguments are those of `redi_loss`. `num_with_grad` counts tokens with a weight
        in either of token_weights and entropy_weights.

    Returns:
        (loss, token_logps), followed by token_entropies with `entropy` and by token_log_sum_exps
        with `log_sum_exp`: a float32 scalar and float32 in the shape of targets, detached, 0 where
        masked; float64 for float64 inputs. A token's entropy is - sum_j p_j log p_j over the
        vocabulary, in nats.

    Raises:
        TypeError, ValueError: as `redi_loss`.
    """
    hidden, weight, flat_targets = check_operands(hidden, weight, targets, ignore_index)
    token_weights = check_token_weights("token_weights", token_weights, targets)
    if entropy_weights is not None:
        entropy_weights = check_token_weights("entropy_weights", entropy_weights, targets)
    check_schedule(valid_index, chunk_tokens, hidden, num_with_grad)
    check_terms(coefficient, label_smoothing, z_loss)
    check_statistics(entropy, log_sum_exp)
    check_logits(logit_scale, softcap)
    backend = choose_backend(backend, hidden.device, hidden.dtype, hidden.shape[1])
    if backend == "reference":
        check_target_values(flat_targets, weight.shape[0], valid_index)
        order = flat_targets, valid_index, num_with_grad
        check_weight_values("token_weights", token_weights, *order)
        if entropy_weights is not None:
            check_weight_values("entropy_weights", entropy_weights, *order)
        loss, *results = reference.signed_cross_entropy(
            hidden,
            weight,
            flat_targets,
            token_weights,
            coefficient=coefficient,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            entropy_weights=entropy_weights,
            entropy=entropy,
            log_sum_exp=log_sum_exp,
            logit_scale=logit_scale,
            softcap=softcap,
        )
    else:
        schedule = valid_index, num_with_grad, chunk_tokens
        needs = entropy, log_sum_exp, *needs_grad(hidden, weight)
        loss, logps, entropies, lses, *_ = signed_cross_entropy_op(
            hidden, weight, flat_targets, token_weights, entropy_weights, *schedule, backend,
            coefficient, None, needs, float(logit_scale), optional_float(softcap),
            float(label_smoothing), float(z_loss),
        )  # fmt: skip
        results = asked(entropy, log_sum_exp, logps, entropies, lses)
    return loss, *(values.view(targets.shape) for values in results)


def _check_values(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    alpha: float,
    num_pairs: float,
    valid_index: Tensor | None,
    num_with_grad: int | None,
) -> None:
    """The checks of the ops, for the reference, which is none."""
    check_target_values(targets, weight.shape[0], valid_index)
    weights, _ = _token_weights(hidden, targets, cu_seqlens, signs, alpha, num_pairs, "torch")
    check_weight_values("token_weights", weights, targets, valid_index, num_with_grad)


def _token_weights(
    hidden: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    alpha: float,
    num_pairs: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    return token_weights_op(
        targets, cu_seqlens, signs, float(alpha), float(num_pairs), dtype, backend
    )
