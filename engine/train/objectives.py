"""What is minimised: each objective gives a packed row's share of the optimizer step's loss.

All are sums over sequences (or pairs) with denominators that are counts of the whole step, known
from the schedule; so nothing depends on which row, micro-step or rank a sequence lies in.

An objective is a formula and a line of `OBJECTIVES` that declares what it needs:

    wanted      [S] how much each sequence's log-prob is wanted, known before the forward pass:
                one fused pass of three matrix products. With `coefficient` the loss of a token may
                also depend on its own log-prob (DFT, unlikelihood), at the same price.
    terms       from the sequences' log-probs (`Sequences`) to the loss of each sequence or pair;
                log-probs first, then a backward scaled per sequence.

`units` says what the schedule draws and packing keeps together (`Needs`), `reference` that the
log-probs of the model as it was before step 1 are needed too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from redi.engine.config import Objective as ObjectiveSection
from redi.engine.data.packing import PackedBatch
from redi.engine.data.schedule import Needs
from redi.kernels import (
    Coefficient,
    RediLoss,
    linear_logprobs,
    redi_loss,
    segment_sum,
    signed_cross_entropy,
)


@dataclass(frozen=True)
class StepTotals:
    """Global counts of one optimizer step, over all ranks and micro-steps.

    Attributes:
        units: pairs, or sequences where the objective has no pairs: B.
        targets: trained tokens.
    """

    units: int
    targets: int


@dataclass(frozen=True)
class Sequences:
    """What a formula of sequence log-probs sees of a packed row.

    A row of an objective with units "margins" holds whole pairs only: sequence 2 i is the positive
    of pair i, sequence 2 i + 1 its negative.
    """

    logps: Tensor
    """[S]: log p(y_s | x), sums over tokens, differentiable."""
    lengths: Tensor
    """float32 [S]: |y_s|, at least 1."""
    signs: Tensor
    """int64 [S]: +1, -1, or 0 for a dummy."""
    reference: Tensor | None
    """[S]: the reference model's log-probs, where the objective declares them."""

    @property
    def means(self) -> Tensor:
        """[S]: mean log-prob per token."""
        return self.logps / self.lengths


Wanted = Callable[[ObjectiveSection, Tensor], Tensor]
Terms = Callable[[ObjectiveSection, Sequences], Tensor]


@dataclass(frozen=True)
class Formula:
    """An objective as it is declared; see the head of this file."""

    units: Needs
    wanted: Wanted | None = None
    coefficient: Coefficient = "weight"
    terms: Terms | None = None
    reference: bool = False


def _wanted(section: ObjectiveSection, signs: Tensor) -> Tensor:
    """+positive_weight for correct traces, -alpha for incorrect ones.

    REDI (arXiv 2505.24850) has positive_weight 1; AsymRE (arXiv 2506.20520) with baseline V has
    1 - V and alpha 1 + V; NSR and PSR (arXiv 2506.01347) have one of the two 0.
    """
    positive = section.positive_weight if section.name == "signed" else 1.0
    return torch.where(signs > 0, positive, -section.alpha)


def _wanted_positives(section: ObjectiveSection, signs: Tensor) -> Tensor:
    """Correct traces alone."""
    return (signs > 0).float()


def _discounted_redi(section: ObjectiveSection, sequences: Sequences) -> Tensor:
    """REDI whose negatives' terms are multiplied by exp(gamma * mean log-prob), not detached.

    An option of the authors' code: what has become unlikely is pushed down less and less.
    """
    means = sequences.means
    negative = section.alpha * means * torch.exp(section.negative_gamma * means)
    return torch.where(sequences.signs > 0, -means, negative)


def _simper(section: ObjectiveSection, sequences: Sequences) -> Tensor:
    """-exp(mean log-prob) of a positive, + that of a negative (SimPER, arXiv 2502.00883)."""
    return -sequences.signs * torch.exp(sequences.means)


def _simpo(section: ObjectiveSection, sequences: Sequences) -> Tensor:
    """-log sigmoid(beta (mean_w - mean_l) - margin) (SimPO, arXiv 2405.14734, equation 6)."""
    assert section.beta is not None
    positive, negative = _pairs(sequences.means)
    return -logsigmoid(section.beta * (positive - negative) - section.margin)


def _dpo(section: ObjectiveSection, sequences: Sequences) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) with label smoothing e.

    h = log p/p_ref of the positive minus that of the negative, sums over tokens (arXiv 2305.18290,
    equation 7; smoothing as in its reference code).
    """
    assert section.beta is not None
    assert sequences.reference is not None
    positive, negative = _pairs(sequences.logps - sequences.reference)
    logits = section.beta * (positive - negative)
    smoothing = section.label_smoothing
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


OBJECTIVES = {
    "sft": Formula("positives", wanted=_wanted_positives),
    "redi": Formula("pairs", wanted=_wanted),
    "signed": Formula("traces", wanted=_wanted),
    "dft": Formula("positives", wanted=_wanted_positives, coefficient="dft"),
    "unlikelihood": Formula("pairs", wanted=_wanted, coefficient="unlikelihood"),
    "simper": Formula("pairs", terms=_simper),
    "simpo": Formula("margins", terms=_simpo),
    "dpo": Formula("margins", terms=_dpo, reference=True),
}
_DISCOUNTED_REDI = Formula("pairs", terms=_discounted_redi)


def formula(section: ObjectiveSection) -> Formula:
    """The formula of a recipe's objective."""
    if section.name == "redi" and section.negative_gamma:
        return _DISCOUNTED_REDI
    return OBJECTIVES[section.name]


@dataclass(frozen=True)
class Objective:
    """The objective of a recipe: a packed row's hidden states -> its share of the step's loss.

    Attributes:
        section: name and parameters.
        reference: float32 [traces] on the student's device, log-probs of the reference model by
            index of the trace; needed before the first call where the formula declares it.
    """

    section: ObjectiveSection
    reference: Tensor | None = None

    def __call__(
        self, hidden: Tensor, weight: Tensor, batch: PackedBatch, totals: StepTotals
    ) -> RediLoss:
        """The loss share, and the sequences' log-probs.

        Args:
            hidden: [T, D] last hidden states.
            weight: [V, D] lm_head.
            batch: the row; where units are "margins", its sequences are whole pairs.
            totals: denominators.
        """
        declared = formula(self.section)
        if declared.wanted is None:
            return self._from_sequences(declared, hidden, weight, batch, totals)
        if self._is_plain_redi(declared, batch):
            # SFT with a mean per sequence is REDI without negatives.
            alpha = self.section.alpha if declared.wanted is _wanted else 0.0
            return redi_loss(
                hidden,
                weight,
                batch.targets,
                batch.cu_seqlens,
                batch.signs,
                alpha=alpha,
                num_pairs=totals.units,
                valid_index=batch.valid_index,
                # At alpha = 0 the negatives are measured only: the op is told on the host.
                num_weighted=batch.num_positive_targets if alpha == 0 else None,
                backend=self.section.backend,
            )
        return self._one_pass(declared, declared.wanted, hidden, weight, batch, totals)

    def _is_plain_redi(self, declared: Formula, batch: PackedBatch) -> bool:
        """Whether `redi_loss` says it all; it makes the tokens' weights on the way."""
        return (
            declared.coefficient == "weight"
            and self.section.name != "signed"
            and self.section.normalisation == "sequence"
            and self.section.length == "trained"
            and batch.weights is None
        )

    def _one_pass(
        self,
        declared: Formula,
        wanted: Wanted,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        totals: StepTotals,
    ) -> RediLoss:
        """Cross-entropy whose tokens weigh what their sequence is wanted, over a denominator."""
        per_sequence = wanted(self.section, batch.signs) * (batch.signs != 0)
        if batch.weights is not None:
            per_sequence = per_sequence * batch.weights
        loss, token_logps = signed_cross_entropy(
            hidden,
            weight,
            batch.targets,
            (per_sequence / self._denominators(batch, totals)).repeat_interleave(
                batch.cu_seqlens.diff(), output_size=hidden.shape[0]
            ),
            coefficient=declared.coefficient,
            valid_index=batch.valid_index,
            backend=self.section.backend,
        )
        return RediLoss(loss, segment_sum(token_logps, batch.cu_seqlens), batch.num_targets)

    def _lengths(self, batch: PackedBatch) -> Tensor:
        """|y|, float32 [S], at least 1: what is trained, or what was there before truncation."""
        original = self.section.length == "original"
        return (batch.full_targets if original else batch.num_targets).clamp(min=1).float()

    def _denominators(self, batch: PackedBatch, totals: StepTotals) -> Tensor:
        """What divides a token's weight, float32 [S]."""
        lengths = self._lengths(batch)
        if self.section.normalisation == "sequence":
            return totals.units * lengths
        count = totals.targets if self.section.normalisation == "token" else totals.units
        return torch.full_like(lengths, count)

    def _from_sequences(
        self,
        declared: Formula,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        totals: StepTotals,
    ) -> RediLoss:
        """The mean over units of terms that depend on the sequences' log-probs."""
        assert declared.terms is not None
        token_logps = linear_logprobs(
            hidden,
            weight,
            batch.targets,
            valid_index=batch.valid_index,
            backend=self.section.backend,
        )
        logps = segment_sum(token_logps, batch.cu_seqlens)
        reference = None
        if declared.reference:
            assert self.reference is not None, "the reference log-probs are computed first"
            reference = self.reference[batch.sequence_ids]
        lengths = self._lengths(batch)
        terms = declared.terms(self.section, Sequences(logps, lengths, batch.signs, reference))
        if declared.units != "margins":
            terms = terms * (batch.signs != 0)
            if batch.weights is not None:
                terms = terms * batch.weights
        elif batch.weights is not None:
            positive, negative = _pairs(batch.weights)
            terms = terms * (positive + negative) / 2
        return RediLoss(terms.sum() / totals.units, logps.detach(), batch.num_targets)


def _pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """[S] of whole pairs -> the positives' and the negatives' [S / 2]; a dummy belongs to none."""
    pairs = values[: values.shape[0] // 2 * 2].view(-1, 2)
    return pairs[:, 0], pairs[:, 1]
