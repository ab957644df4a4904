"""The softmax step of a chunk of logits where a loss has a divergence to a teacher.

As `softmax.py`, with K + 1 columns of a row apart from the others: those of the teacher's ids, and
the target's. `topk_softmax` sums the others, `entries` makes of it what only those columns need,
and all others get the gradient by one factor. The twin in `topk_triton.py` differs in the two
passes over rows alone.

Outcomes are the teacher's K entries and the tail: all other columns, the target's among them if it
is none of the K.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from redi.kernels.reference import MIN_TAIL, teacher_tails
from redi.kernels.softmax import NEGLIGIBLE, Terms, blocks, multiplies_halves, transform_

# What the largest of no columns counts as: finite, so that differences of it are numbers.
LOWEST_PEAK = -1e30


@dataclass(frozen=True)
class Teacher:
    """A term of a loss: sum_t w_t D_t, D the divergence of `reference.topk_divergence`."""

    ids: Tensor
    """[T, K] int32 or int64, -1 where there is none."""
    logps: Tensor
    """[T, K] floating, log q."""
    weights: Tensor
    """[T] in the accumulation dtype: w."""
    direction: str
    temperature: float
    bucket: bool
    """Whether the tail is an outcome of D."""
    skew: float

    def scaled(self, factor: float | Tensor) -> "Teacher":
        """The teacher with its weights multiplied."""
        return replace(self, weights=self.weights * factor)

    def gradient_bounds(self) -> Tensor:
        """[T]: no entry of D's gradient by the logits, times |w|, is larger."""
        most: Tensor | float = 2.0
        if self.direction == "reverse":
            # p |log p| <= 1 / e, and their sum over the outcomes is at most the log of their
            # number; of log q the largest counts.
            if self.skew:
                most = 2.0 - math.log(self.skew)
            else:
                present = self.ids >= 0
                lowest = self.logps.masked_fill(~present, 0.0).amin(-1).to(self.weights.dtype)
                if self.bucket:
                    lowest = lowest.clamp(max=math.log(MIN_TAIL))
                most = math.log(self.ids.shape[1] + 1) + 1 - lowest
        return self.weights.abs() * most / self.temperature

    def losses(self, divergences: Tensor) -> Tensor:
        """[T]: each token's term; one of weight 0 contributes 0 though D be infinite."""
        return (self.weights * divergences).masked_fill(self.weights == 0, 0.0)


@dataclass(frozen=True)
class Columns:
    """The K + 1 columns of some rows that are apart, [C, K + 1]; the last is the target's."""

    index: Tensor
    """int64; where an id is -1, the target's."""
    given: Tensor
    """[C, K] bool: where it is an id."""
    is_target: Tensor
    """[C, K] bool: where the id is the target."""
    logq: Tensor
    """[C, K + 1] in the accumulation dtype, the tail's last; 0 where `counts` is not."""
    counts: Tensor
    """[C, K + 1] bool: the outcomes that D is over."""

    def of(self, rows: slice) -> "Columns":
        """Those of some of the rows."""
        return Columns(*(getattr(self, field.name)[rows] for field in fields(self)))


def columns_of(
    teacher: Teacher, tokens: Tensor, targets: Tensor, vocab: int, dtype: torch.dtype
) -> Columns:
    """Those of the tokens [C], whose targets [C] are in [0, V)."""
    ids, given_logps = teacher.ids[tokens].long(), teacher.logps[tokens]
    given = ids != -1
    target = targets[:, None]
    tails = torch.zeros_like(target, dtype=torch.float64)
    if teacher.bucket:
        tails = teacher_tails(ids, given_logps, vocab)[:, None]
    counts = torch.cat([given, tails > 0], 1)
    logq = torch.cat([given_logps.to(dtype), tails.log().to(dtype)], 1)
    return Columns(
        index=torch.cat([torch.where(given, ids, target), target], 1),
        given=given,
        is_target=given & (ids == target),
        logq=logq.masked_fill(~counts, 0.0),
        counts=counts,
    )


@dataclass(frozen=True)
class Entries:
    """What a row's sums make of its columns; [C] or [C, 1] in the logits' dtype."""

    divergences: Tensor
    logps: Tensor
    """Log-probs of the targets."""
    gradient: Tensor | None = None
    """[C, K + 1] at the columns that are apart, by z; None without weights, as the following."""
    factor: Tensor | None = None
    """The other columns have the gradient factor exp((z - peak) / temperature)"""
    plain_factor: Tensor | None = None
    """+ plain_factor exp(z - peak); None where the temperature is 1: it is in `factor`."""


def entries(
    teacher: Teacher,
    columns: Columns,
    z: Tensor,
    peak: Tensor,
    rest: Tensor,
    plain_rest: Tensor,
    weights: tuple[Tensor, Tensor] | None,
) -> Entries:
    """Log-prob, divergence and gradients of some rows.

    Args:
        z: [C, K + 1] logits of the columns.
        peak: [C, 1] the largest other logit, or `LOWEST_PEAK`.
        rest: [C, 1] sum of exp((z - peak) / temperature) over the other columns.
        plain_rest: [C, 1] sum of exp(z - peak) over them.
        weights: [C, 1] of the divergence and [C, 1] of the target, or None for values alone.

    With a_i = p_i dD / dp_i the gradient by outcome i's logit is a_i - p_i sum a, and the tail's is
    divided among its columns as their exponentials. Nothing is subtracted from 1: of the most
    probable outcome the gradient is a (1 - p) - p sum of the others' a, with 1 - p the sum of the
    others' p. All other p are at most 1 / 2, and there the formula loses nothing.
    """
    ids, target = z[:, :-1].masked_fill(~columns.given, -torch.inf), z[:, -1:]
    apart = ~columns.is_target.any(-1, keepdim=True)
    largest = torch.maximum(peak, z.amax(-1, keepdim=True))
    e_ids, e_target = (ids - largest).exp(), (target - largest).exp()
    without = e_ids.masked_fill(columns.is_target, 0.0).sum(-1, keepdim=True)
    without = without + plain_rest * (peak - largest).exp()
    total = without + e_target
    log_total = torch.where(target == largest, without.log1p(), total.log())
    logps = target - largest - log_total

    heat = teacher.temperature
    # The tail's own largest logit keeps its log-prob finite however small its probability is.
    base = torch.where(apart, torch.maximum(peak, target), peak)
    of_rest = ((peak - base) / heat).exp()
    of_target = ((target - base) / heat).exp().masked_fill(~apart, 0.0)
    in_tail = of_rest * rest + of_target
    x = torch.cat([(ids - largest) / heat, (base - largest) / heat + in_tail.log()], 1)
    e = x.exp()
    top = e.argmax(-1, keepdim=True)
    e_top = e.gather(1, top)
    others = e.scatter(1, top, 0.0).sum(-1, keepdim=True)
    share = others / e_top
    p = e / (others + e_top)
    logp = x - x.gather(1, top) - share.log1p()
    parts, a = divergence_parts(teacher, columns, logp, p)
    divergences = parts.sum(-1, keepdim=True)
    if weights is None:
        return Entries(divergences, logps)

    of_divergence, of_logp = weights
    gradient = a - p * a.sum(-1, keepdim=True)
    of_others = a.scatter(1, top, 0.0).sum(-1, keepdim=True)
    gradient.scatter_(1, top, p.gather(1, top) * (a.gather(1, top) * share - of_others))
    gradient *= of_divergence / heat
    of_ids, of_tail = gradient[:, :-1], gradient[:, -1:]
    of_tail = of_tail / in_tail.clamp(min=torch.finfo(z.dtype).tiny)
    pull = of_logp / total
    in_ids = of_ids.masked_fill(~columns.is_target, 0.0).sum(-1, keepdim=True)
    at_target = torch.where(apart, of_tail * of_target, in_ids) - pull * without
    at_ids = torch.where(columns.given & ~columns.is_target, of_ids + pull * e_ids, at_target)
    factor, plain_factor = of_tail * of_rest, pull * (peak - largest).exp()
    at_columns = torch.cat([at_ids, at_target], 1)
    if heat == 1:
        return Entries(divergences, logps, at_columns, factor + plain_factor)
    return Entries(divergences, logps, at_columns, factor, plain_factor)


def divergence_parts(
    teacher: Teacher, columns: Columns, logp: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    """(each outcome's part of D, its a = p dD / dp), [C, K + 1]; logp and p likewise."""
    logp = logp.masked_fill(~columns.counts, 0.0)
    logq, q, skew = columns.logq, columns.logq.exp(), teacher.skew
    if teacher.direction == "jsd":
        logm = torch.logaddexp(logp, logq) - math.log(2)
        of_student = _times(p, logp - logm) / 2
        parts, a = of_student + _times(q, logq - logm) / 2, of_student
    elif teacher.direction == "forward":
        logm, a = logp, -q
        if skew:
            logm = torch.logaddexp(logq + math.log(skew), logp + math.log1p(-skew))
            a = -q * (1 - skew) * (logp - logm).exp()
        parts = _times(q, logq - logm)
    else:
        logm = logq
        if skew:
            logm = torch.logaddexp(logp + math.log(skew), logq + math.log1p(-skew))
        parts = a = _times(p, logp - logm)
        m = logm.exp()
        parts = parts + (m - p)
        if skew:
            a = a + skew * p * (1 - (logp - logm).exp())
    left_out = ~columns.counts
    return parts.masked_fill(left_out, 0.0), a.masked_fill(left_out, 0.0)


def _times(probabilities: Tensor, log_ratios: Tensor) -> Tensor:
    """0 where the probability is, whatever the logarithm."""
    return probabilities * log_ratios.masked_fill(probabilities == 0, 0.0)


def topk_softmax(
    logits: Tensor,
    tokens: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *,
    dtype: torch.dtype,
    logps: Tensor,
    divergences: Tensor,
    terms: Terms,
) -> Tensor | None:
    """Log-probs of the targets, divergences and, given weights, the loss's gradient by the logits.

    Args:
        logits, tokens, targets, weights, dtype, logps: as for `softmax.softmax`.
        divergences: [T] like logps, written at `tokens`.
        terms: with a teacher, a scale and a softcap.

    Returns:
        [C, V], or None without weights, as `softmax.softmax`.
    """
    teacher = terms.teacher
    assert teacher is not None
    heat = teacher.temperature
    dlogits = None
    if weights is not None:
        separate = dtype != logits.dtype and multiplies_halves(logits.device)
        dlogits = torch.empty_like(logits, dtype=dtype) if separate else logits

    # Once for all blocks: of few rows each of these many small operations costs its overhead alone.
    all_columns = columns_of(teacher, tokens, targets[tokens], logits.shape[1], logits.dtype)
    for rows in blocks(logits):
        e, of_rows, columns = logits[rows], tokens[rows], all_columns.of(rows)
        slope = transform_(e, terms, weights is not None)
        z = e.gather(1, columns.index)
        e.scatter_(1, columns.index, -torch.inf)
        peak = e.amax(-1, keepdim=True).clamp_(min=LOWEST_PEAK)
        e.sub_(peak)
        plain = e.exp() if heat != 1 else None
        if heat != 1:
            e.div_(heat)
        rest = e.exp_().sum(-1, keepdim=True)
        plain_rest = rest if plain is None else plain.sum(-1, keepdim=True)
        both = None
        if weights is not None:
            both = teacher.weights[of_rows, None], weights[of_rows, None]
        made = entries(teacher, columns, z, peak, rest, plain_rest, both)
        logps[of_rows] = made.logps[:, 0]
        divergences[of_rows] = made.divergences[:, 0]
        if dlogits is None:
            continue
        assert made.factor is not None
        assert made.gradient is not None
        if dtype.itemsize == 2:
            e.masked_fill_(e < NEGLIGIBLE * rest, 0.0)
        e.mul_(made.factor)
        if plain is not None:
            assert made.plain_factor is not None
            e.addcmul_(plain, made.plain_factor)
        e.scatter_(1, columns.index, made.gradient)
        if slope is not None:
            e.mul_(slope)
        if dlogits is not logits:
            dlogits[rows] = e
        elif dtype != logits.dtype:
            e.copy_(e.to(dtype))
    return dlogits
