"""What every op means, in plain PyTorch: read this first.

Each function has the name and signature of a public op of `redi.kernels` and is its definition:
whole logits and ordinary autograd. Everything is computed in float32, or in float64 for float64
inputs, which is the oracle of the tests. `valid_index`, `num_with_grad`, `exponential_lengths`,
`keep`, `backend` and `chunk_tokens` do not change the result; they are accepted and ignored.

Dimensions, here and in every other file:

    T   tokens of a packed row           N   tokens whose target is not masked (N <= T)
    S   sequences of the row             C   tokens of one chunk
    D   hidden size                      V   vocabulary size
    K   entries of a teacher's distribution at each token

Names: `hidden` [T, D] enters the lm_head, `weight` [V, D] is the lm_head, z are the logits,
p = softmax(z), and logp_t = log p_t[targets_t]. A token's weight w_t says how much its log-prob is
wanted: loss = - sum_t w_t logp_t. T may be several dimensions: `hidden` [..., D], `targets` [...].

The logits are z = softcap tanh(logit_scale hidden weight^T / softcap), without a softcap
z = logit_scale hidden weight^T.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the target of a token that takes no part, as in torch.nn.functional

Coefficient = Literal["weight", "dft", "unlikelihood"]
Direction = Literal["forward", "reverse", "jsd"]
Tail = Literal["ignore", "bucket"]
Backend = Literal["auto", "reference", "torch", "triton", "triton-exp"]

MIN_TAIL = 2.0**-100  # the least that a teacher's tail counts as: its logarithm stays finite


class RediLoss(NamedTuple):
    """What `redi_loss` returns; a tuple, so that FSDP2's hooks find the tensors in it."""

    loss: Tensor
    """Scalar float32 (float64 for float64 inputs), differentiable."""
    sequence_logps: Tensor
    """[S], the loss's dtype: sum of the log-probs of each sequence's unmasked tokens, detached."""
    sequence_lengths: Tensor
    """[S] int64: each sequence's number of unmasked tokens |y_s|."""


class TopkDivergence(NamedTuple):
    """What `topk_divergence` returns."""

    loss: Tensor
    """Scalar float32 (float64 for float64 inputs), differentiable."""
    token_divergences: Tensor
    """[T], the loss's dtype: each token's D, detached; 0 where masked."""
    token_logps: Tensor | None
    """[T] likewise: the targets' log-probs at temperature 1; None without targets."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, log-probs, losses and sums for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _valid_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Which tokens [T] are unmasked, and their logits [N, V]."""
    valid = (targets != ignore_index) & (targets != IGNORE_INDEX)
    dtype = accumulation_dtype(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = logit_scale * (hidden[valid].to(dtype) @ weight.to(dtype).T)
    return valid, logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _place(values: Tensor, valid: Tensor) -> Tensor:
    """Spread values [N] of the unmasked tokens over all T tokens, 0 elsewhere."""
    return torch.zeros(valid.shape, dtype=values.dtype, device=values.device).masked_scatter(
        valid, values
    )


def _entropy(all_logps: Tensor) -> Tensor:
    """- sum_j p_j log p_j of log-probs [N, V], where 0 log 0 = 0."""
    p = all_logps.exp()
    return -(p * all_logps.masked_fill(p == 0, 0.0)).sum(-1)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    log_sum_exp: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    keep: bool | Literal["auto"] = "auto",
    valid_index: Tensor | None = None,
    backend: Backend = "reference",
    chunk_tokens: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """logp_t = z_t[targets_t] - logsumexp(z_t) for each token [T]; 0 where masked.

    With `entropy` also - sum_j p_j log p_j, with `log_sum_exp` also logsumexp(z_t), in this order.
    """
    valid, logits = _valid_logits(hidden, weight, targets, logit_scale, softcap, ignore_index)
    all_logps = torch.log_softmax(logits, -1)
    logps = _place(all_logps.gather(1, targets[valid][:, None])[:, 0], valid)
    asked: tuple[Tensor, ...] = ()
    if entropy:
        asked += (_place(_entropy(all_logps), valid),)
    if log_sum_exp:
        asked += (_place(logits.logsumexp(-1), valid),)
    return (logps, *asked) if asked else logps


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
    backend: Backend = "reference",
    chunk_tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """The loss over all tokens, and the detached log-probs [T].

    weight        - sum_t w_t logp_t
    dft           - sum_t w_t sg(p_t) logp_t, sg = stop-gradient
    unlikelihood  - sum_t w_t logp_t where w_t >= 0, |w_t| * -log(1 - p_t) where w_t < 0

    label_smoothing  logp_t becomes (1 - eps) logp_t + eps times the mean log-prob of all entries
    z_loss           + z_loss sum_t |w_t| logsumexp(z_t)^2
    entropy_weights  - sum_t e_t H_t, H_t = - sum_j p_j log p_j

    With `entropy` also the detached H [T], with `log_sum_exp` also the detached logsumexp(z) [T],
    in this order.
    """
    valid, logits = _valid_logits(hidden, weight, targets, logit_scale, softcap, ignore_index)
    target = targets[valid][:, None]
    weights = token_weights[valid].to(logits.dtype)
    all_logps = torch.log_softmax(logits, -1)
    logps = all_logps.gather(1, target)[:, 0]
    log_sum_exps, entropies = logits.logsumexp(-1), _entropy(all_logps)
    terms = -weights * logps
    if coefficient == "dft":
        terms = terms * logps.detach().exp()
    elif coefficient == "unlikelihood":
        # 1 - p is the sum over the other columns; subtracting p from 1 would cancel near p = 1.
        others = logits.scatter(1, target, -torch.inf).logsumexp(-1)
        terms = torch.where(weights < 0, weights * (others - log_sum_exps), terms)
    if label_smoothing:
        smoothed = label_smoothing * weights * all_logps.mean(-1)
        terms = (1 - label_smoothing) * terms - smoothed
    if z_loss:
        terms = terms + z_loss * weights.abs() * log_sum_exps.square()
    if entropy_weights is not None:
        terms = terms - entropy_weights[valid].to(logits.dtype) * entropies
    results = [logps, *([entropies] if entropy else []), *([log_sum_exps] if log_sum_exp else [])]
    return terms.sum(), *(_place(values.detach(), valid) for values in results)


def segment_sum(values: Tensor, cu_seqlens: Tensor, *, backend: Backend = "reference") -> Tensor:
    """sums[s] = sum of values[cu_seqlens[s] : cu_seqlens[s + 1]], [S]; an empty one sums to 0."""
    bounds = cu_seqlens.tolist()
    return torch.stack([values[a:b].sum() for a, b in pairwise(bounds)] or [values[:0]]).view(-1)


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
    backend: Backend = "reference",
    chunk_tokens: int | None = None,
) -> RediLoss:
    """The REDI objective (arXiv 2505.24850), as this call's share of a sum over `num_pairs` pairs.

    loss = (1 / num_pairs) sum_s c_s (sum_{t in s} logp_t) / |y_s|,
    c_s = -1 where signs is +1, +alpha where it is -1, 0 where it is 0.
    """
    valid, logits = _valid_logits(hidden, weight, targets, logit_scale, softcap, ignore_index)
    token_logps = torch.log_softmax(logits, -1).gather(1, targets[valid][:, None])[:, 0]
    logps = segment_sum(_place(token_logps, valid).flatten(), cu_seqlens)
    lengths = segment_sum(valid.flatten().long(), cu_seqlens)
    signs = signs.to(logps.dtype)
    coefficients = torch.where(signs > 0, -signs, -alpha * signs)
    loss = (coefficients * logps / lengths.clamp(min=1)).sum() / num_pairs
    return RediLoss(loss, logps.detach(), lengths)


def sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    linear_weights: Tensor,
    exponential_weights: Tensor,
    *,
    temperature: float = 1.0,
    denominators: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    valid_index: Tensor | None = None,
    exponential_lengths: Sequence[int] | None = None,
    backend: Backend = "reference",
    chunk_tokens: int | None = None,
) -> RediLoss:
    """loss = - sum_s (a_s m_s + b_s temperature exp(m_s / temperature)), with the linear weights a,
    the exponential weights b and m_s = (sum_t logp_t) / denominators_s."""
    valid, logits = _valid_logits(hidden, weight, targets, logit_scale, softcap, ignore_index)
    token_logps = torch.log_softmax(logits, -1).gather(1, targets[valid][:, None])[:, 0]
    logps = segment_sum(_place(token_logps, valid).flatten(), cu_seqlens)
    lengths = segment_sum(valid.flatten().long(), cu_seqlens)
    means = logps / (lengths.clamp(min=1) if denominators is None else denominators)
    exponentials = temperature * (means / temperature).exp()
    loss = -(linear_weights * means + exponential_weights * exponentials).sum()
    return RediLoss(loss.to(logps.dtype), logps.detach(), lengths)


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
    backend: Backend = "reference",
    chunk_tokens: int | None = None,
) -> tuple[RediLoss, Tensor, Tensor]:
    """`redi_loss` and its gradients times `grad_scale`; adds to `dweight` where one is given."""
    operands = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        out = redi_loss(
            *operands,
            targets,
            cu_seqlens,
            signs,
            alpha=alpha,
            num_pairs=num_pairs,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
        )
        dhidden, new_dweight = torch.autograd.grad(out.loss * grad_scale, operands)
    new_dweight = new_dweight.to(accumulation_dtype(weight.dtype))
    dweight = new_dweight if dweight is None else dweight.add_(new_dweight)
    return RediLoss(out.loss.detach(), out.sequence_logps, out.sequence_lengths), dhidden, dweight


def teacher_tails(ids: Tensor, logps: Tensor, vocab: int) -> Tensor:
    """q_t = 1 - sum_k q_k of each row of ids [T, K] and logps [T, K]; [T] float64.

    It counts as at least what the rounding of the log-probs in their dtype may have taken from it,
    half a unit of the last place of each, and 2^-100: else a rounded teacher with nothing left
    would make log(p_t / q_t) infinite. 0 where the K ids are the whole vocabulary.
    """
    present = ids >= 0
    exact = logps.double().masked_fill(~present, -torch.inf)
    q = exact.exp()
    rounding = -torch.finfo(logps.dtype).eps / 2 * torch.xlogy(q, q).sum(-1)
    tails = torch.maximum(1 - q.sum(-1), rounding.clamp(min=MIN_TAIL))
    return tails.masked_fill(present.sum(-1) == vocab, 0.0)


def teacher_targets(ids: Tensor) -> Tensor:
    """[T] targets for tokens that have none: IGNORE_INDEX, which masks, where all ids are -1."""
    return torch.where((ids >= 0).any(-1), 0, IGNORE_INDEX)


def _divergence(logp: Tensor, logq: Tensor, direction: Direction, skew: float) -> Tensor:
    """[..., outcomes]: each outcome's part of D; see `topk_divergence`."""
    p, q = logp.exp(), logq.exp()
    if direction == "jsd":
        logm = torch.logaddexp(logp, logq) - math.log(2)
        return (torch.xlogy(q, q) - q * logm + p * (logp - logm)) / 2
    near, far = (logq, logp) if direction == "forward" else (logp, logq)
    logm = far
    if skew:
        logm = torch.logaddexp(near + math.log(skew), far + math.log1p(-skew))
    if direction == "forward":
        return torch.xlogy(q, q) - q * logm
    return p * (logp - logm) + logm.exp() - p


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
    backend: Backend = "reference",
    chunk_tokens: int | None = None,
) -> TopkDivergence:
    """loss = sum_t w_t D_t - sum_t v_t logp_t, with the token weights w and target weights v.

    q are the teacher's probabilities of the K ids, p = softmax(z / temperature) the student's, and
    m = skew q + (1 - skew) p (reverse: skew p + (1 - skew) q). Over the K ids, and with
    tail="bucket" over all other entries of the vocabulary as one more outcome:

    forward  D = sum q log(q / m)
    reverse  D = sum p log(p / m) - p + m   (the last two cancel in a sum over all outcomes)
    jsd      D = sum 1/2 q log(q / m) + 1/2 p log(p / m), m = (p + q) / 2

    logp_t is at temperature 1. Masked tokens are those of `targets`; without them, rows of ids that
    are all -1.
    """
    takes_part = teacher_targets(teacher_ids) if targets is None else targets
    valid, logits = _valid_logits(hidden, weight, takes_part, logit_scale, softcap, ignore_index)
    ids, given = teacher_ids[valid].long(), teacher_logps[valid]
    weights = token_weights[valid].to(logits.dtype)
    present = ids >= 0
    columns = ids.clamp(min=0)
    z = logits / temperature
    log_sum_exps = z.logsumexp(-1, keepdim=True)
    logp = (z.gather(1, columns) - log_sum_exps).masked_fill(~present, 0.0)
    logq = given.to(logits.dtype).masked_fill(~present, 0.0)
    parts = _divergence(logp, logq, direction, skew).masked_fill(~present, 0.0)
    divergences = parts.sum(-1)
    if tail == "bucket":
        q_tail = teacher_tails(ids, given, weight.shape[0]).to(logits.dtype)
        taken = torch.zeros_like(z).scatter_add(1, columns, present.to(z.dtype)) > 0
        # Where there is no tail, any finite number: it is left out.
        others = z.masked_fill(taken & (q_tail > 0)[:, None], -torch.inf)
        logp_tail = others.logsumexp(-1) - log_sum_exps[:, 0]
        logq_tail = q_tail.masked_fill(q_tail == 0, 1.0).log()
        part = _divergence(logp_tail, logq_tail, direction, skew)
        divergences = divergences + part.masked_fill(q_tail == 0, 0.0)
    loss = (weights * divergences).masked_fill(weights == 0, 0.0).sum()
    divergences = _place(divergences.detach(), valid)
    if targets is None:
        return TopkDivergence(loss, divergences, None)
    logps = torch.log_softmax(logits, -1).gather(1, targets[valid][:, None])[:, 0]
    if target_weights is not None:
        of_targets = target_weights[valid].to(logits.dtype)
        loss = loss - (of_targets * logps).masked_fill(of_targets == 0, 0.0).sum()
    return TopkDivergence(loss, divergences, _place(logps.detach(), valid))
