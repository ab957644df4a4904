"""The losses: REDI, and the signed cross-entropy that it is one case of.

The public functions: they check their arguments, choose a backend and call the ops of
`loss_ops.py`.
"""

import torch
from torch import Tensor

from redi.kernels import reference
from redi.kernels.backends import choose_backend
from redi.kernels.loss_ops import (
    redi_loss_op,
    redi_value_and_grad_op,
    signed_cross_entropy_op,
)
from redi.kernels.reference import Backend, Coefficient, RediLoss, accumulation_dtype
from redi.kernels.validate import (
    check_choice,
    check_dweight,
    check_objective,
    check_operands,
    check_schedule,
    check_sequences,
    check_token_weights,
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
    num_weighted: int | None = None,
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
            TF32, which is off unless somebody has turned it on.
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
            the op never synchronises a GPU; without it once, to learn N.
        num_weighted: of `valid_index`, the first this many tokens have a gradient, and the rest
            weight 0 (at alpha = 0 the negatives), which costs them one matrix product instead of
            three. Without it a GPU that is given `valid_index` treats all tokens alike.
        backend: "auto", "torch", "triton", "triton-exp" (bfloat16: no pass over logits), or for
            checking "reference" (whole logits) and "torch-exp" ("triton-exp" in plain PyTorch).
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
    check_schedule(valid_index, chunk_tokens, hidden, num_weighted)
    backend = choose_backend(backend, hidden.device, hidden.dtype, hidden.shape[1])
    if backend == "reference":
        return reference.redi_loss(
            hidden, weight, targets, cu_seqlens, signs, alpha=alpha, num_pairs=num_pairs
        )
    loss, sequence_logps, lengths, _, _ = redi_loss_op(
        hidden,
        weight,
        targets,
        cu_seqlens,
        signs,
        valid_index,
        num_weighted,
        float(alpha),
        float(num_pairs),
        backend,
        chunk_tokens,
        *needs_grad(hidden, weight),
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
    num_weighted: int | None = None,
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
    check_schedule(valid_index, chunk_tokens, hidden, num_weighted)
    if dweight is not None:
        check_dweight(dweight, weight)
    backend = choose_backend(backend, hidden.device, hidden.dtype, hidden.shape[1])
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
    loss, sequence_logps, lengths, dhidden = redi_value_and_grad_op(
        hidden,
        weight,
        targets,
        cu_seqlens,
        signs,
        valid_index,
        num_weighted,
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
    entropy: bool = False,
    valid_index: Tensor | None = None,
    num_weighted: int | None = None,
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
    weight less likely; 1 - p_t is exact near p_t = 1, and counts as 2^-100 where it is smaller.
    The gradient by the logits never exceeds |w_t| in any of the three.

    Args:
        token_weights: [T] floating, without gradient; finite where the target is not masked.
            A token of weight 0 gets a log-prob and no gradient.
        coefficient: see above.
        entropy: whether to return the tokens' entropies as well, from the same pass.
        The other arguments are those of `redi_loss`.

    Returns:
        (loss, token_logps) or, with `entropy`, (loss, token_logps, token_entropies): a float32
        scalar and [T] float32, detached, 0 where masked; float64 for float64 inputs. A token's
        entropy is - sum_j p_j log p_j over the vocabulary, in nats.

    Raises:
        TypeError, ValueError: as `redi_loss`.
    """
    hidden, weight = check_operands(hidden, weight, targets)
    check_token_weights(token_weights, hidden)
    check_schedule(valid_index, chunk_tokens, hidden, num_weighted)
    check_choice("coefficient", coefficient, ("weight", "dft", "unlikelihood"))
    backend = choose_backend(backend, hidden.device, hidden.dtype, hidden.shape[1])
    if backend == "reference":
        return reference.signed_cross_entropy(
            hidden, weight, targets, token_weights, coefficient=coefficient, entropy=entropy
        )
    loss, token_logps, token_entropies, _, _ = signed_cross_entropy_op(
        hidden,
        weight,
        targets,
        token_weights,
        valid_index,
        num_weighted,
        coefficient,
        entropy,
        backend,
        chunk_tokens,
        *needs_grad(hidden, weight),
    )
    return (loss, token_logps, token_entropies) if entropy else (loss, token_logps)


def needs_grad(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    enabled = torch.is_grad_enabled()
    return enabled and hidden.requires_grad, enabled and weight.requires_grad
