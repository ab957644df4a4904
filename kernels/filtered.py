"""`redi_loss` with an approximate gradient: the public function, and its custom op.

What is left out, and how it is told, is in `filter.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from redi.kernels.backends import filtering_backend, kernels_of
from redi.kernels.filter import filtered_cross_entropy_chunks
from redi.kernels.loss_ops import (
    check_unweighted,
    gradient_buffer,
    save_gradients,
    scale_gradients,
)
from redi.kernels.losses import needs_grad
from redi.kernels.reference import Backend
from redi.kernels.rows import SequenceWeights, token_losses
from redi.kernels.segments import sequence_lengths
from redi.kernels.validate import (
    check_epsilon,
    check_objective,
    check_operands,
    check_schedule,
    check_sequence_values,
    check_sequences,
    check_target_values,
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
    """[S] float32: sum over the same tokens of the probability that has no part in the gradient,
    detached; divided by |y_s| the mean share, in [0, 1]. 0 where there is no gradient."""


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
    valid_index: Tensor | None = None,
    num_weighted: int | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> FilteredRediLoss:
    """`redi_loss` whose gradients leave out parts of the vocabulary with next to no probability.

    Loss and log-probs are exact. The gradients are not: of a token with weight w = c_s / (num_pairs
    |y_s|) and dropped probability d up to |w| d times the largest row of the lm_head is missing
    in dhidden, and up to |w| d |x| in dweight. They also depend on which tokens are computed
    together, that is on packing, as exact ones do not.

    Args:
        hidden: [T, D] bfloat16; any strides.
        weight: [V, D] bfloat16; a copy with its rows in another order is made.
        epsilon: in [0, 1]. A tile of some 128 tokens and 256 entries of the vocabulary, in an order
            of its own, is left out if it holds at most this share of each of its tokens'
            probability. At 0 nothing is left out; 2^-10 keeps about a third of the tiles of a
            trained model (bench/NOTES.md).
        backend: "auto", "triton-exp" or "torch-exp"; the others have no filter.
        The other arguments are those of `redi_loss`.

    Returns:
        FilteredRediLoss. Backward is as `redi_loss`'s.

    Raises:
        TypeError, ValueError: as `redi_loss`, and for other dtypes than bfloat16.
    """
    hidden, weight = check_operands(hidden, weight, targets)
    if hidden.dtype != torch.bfloat16:
        raise TypeError(f"hidden must be bfloat16 for a filter, got {hidden.dtype}")
    check_sequences(cu_seqlens, signs, hidden)
    check_objective(alpha, num_pairs)
    check_epsilon(epsilon)
    check_schedule(valid_index, chunk_tokens, hidden, num_weighted)
    backend = filtering_backend(backend, hidden.device)
    loss, sequence_logps, lengths, dropped, _, _ = filtered_redi_loss_op(
        hidden,
        weight,
        targets,
        cu_seqlens,
        signs,
        valid_index,
        num_weighted,
        float(alpha),
        float(num_pairs),
        float(epsilon),
        backend,
        chunk_tokens,
        *needs_grad(hidden, weight),
    )
    return FilteredRediLoss(loss, sequence_logps, lengths, dropped)


@torch.library.custom_op("redi::filtered_redi_loss", mutates_args=())
def filtered_redi_loss_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    valid_index: Tensor | None,
    num_weighted: int | None,
    alpha: float,
    num_pairs: float,
    epsilon: float,
    backend: str,
    chunk_tokens: int | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, sequence_logps, lengths, sequence_dropped, dhidden, dweight).

    A gradient that is not needed is empty.
    """
    tokens = hidden.shape[0]
    check_target_values(targets, weight.shape[0], valid_index)
    check_sequence_values(cu_seqlens, tokens, signs)
    kernels = kernels_of(backend)
    assert kernels.exponentials is not None
    assert kernels.live_products is not None
    lengths = sequence_lengths(targets, cu_seqlens)
    weights = SequenceWeights(cu_seqlens, signs, lengths, alpha, 1 / num_pairs)
    check_unweighted(weights, valid_index, num_weighted)
    dhidden = gradient_buffer(hidden, need_dhidden)
    dweight = gradient_buffer(weight, need_dweight)
    token_logps, token_dropped = hidden.new_empty(2, tokens, dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        filtered_cross_entropy_chunks(
            hidden,
            weight,
            targets,
            weights,
            epsilon=epsilon,
            exponentials=kernels.exponentials,
            products=kernels.live_products,
            valid_index=valid_index,
            num_weighted=num_weighted,
            chunk_tokens=chunk_tokens,
            token_logps=token_logps,
            token_dropped=token_dropped,
            dhidden=dhidden if need_dhidden else None,
            dweight=dweight if need_dweight else None,
        )
    sequence_logps = kernels.sum_segments(token_logps, cu_seqlens)
    losses = token_losses(sequence_logps, weights.of_sequences(torch.float32), "weight")
    dropped = kernels.sum_segments(token_dropped, cu_seqlens)
    return losses.sum(), sequence_logps, lengths, dropped, dhidden, dweight


@filtered_redi_loss_op.register_fake
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
    epsilon: float,
    backend: str,
    chunk_tokens: int | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(signs.shape, dtype=torch.float32),
        hidden.new_empty(signs.shape, dtype=torch.int64),
        hidden.new_empty(signs.shape, dtype=torch.float32),
        gradient_buffer(hidden, need_dhidden),
        gradient_buffer(weight, need_dweight),
    )


filtered_redi_loss_op.register_autograd(scale_gradients, setup_context=save_gradients)
