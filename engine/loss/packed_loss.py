"""A pack's share of the optimizer step's loss, by the objective of the recipe.

All shares are sums over sequences (or pairs). Their denominators are counts of the whole step,
known from the schedule, so the loss does not depend on which pack, micro-step or rank a sequence
is in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from redi.engine.config.sections import ObjectiveConfig
from redi.engine.context import ALONE, ContextGroup
from redi.engine.data.packing import PackedBatch
from redi.engine.loss.objectives import ExponentialWeights, Formula, Sequences, formula, pairs
from redi.kernels import (
    FilteredRediLoss,
    RediLoss,
    filtered_redi_loss,
    linear_logprobs,
    redi_loss,
    segment_sum,
    sequence_loss,
    signed_cross_entropy,
    topk_divergence,
)


class Logits(NamedTuple):
    """A model's logits z = softcap tanh(logit_scale hidden weight^T / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None
    """None: z = logit_scale hidden weight^T."""


PLAIN = Logits()


@dataclass(frozen=True)
class StepTotals:
    """Global counts of one optimizer step, over all ranks and micro-steps.

    Attributes:
        units: number of pairs, or of sequences if the objective has no pairs: B.
        targets: number of trained tokens.
        tokens: number of all tokens; a router loss needs it.
        expert_counts: int64 [E], tokens that choose each expert, over all routers; None if the step
            has one pack per rank, whose forward counts them.
        kl: float64 scalar, mean log p/p_ref of the mismatched rows, at least 0; None if the
            objective has none.
    """

    units: int
    targets: int
    tokens: int = 0
    expert_counts: Tensor | None = None
    kl: Tensor | None = None


class DistilledLoss(NamedTuple):
    """A `RediLoss` with the divergences from a teacher."""

    loss: Tensor
    sequence_logps: Tensor
    sequence_lengths: Tensor
    sequence_divergences: Tensor
    """[S] sums over each sequence's targets, detached; 0 for a token without a distribution."""


def at_temperature(logps: Tensor, temperature: float) -> Tensor:
    """log softmax(log-probs / temperature) over the entries of each token, float32 [T, K].

    -inf where there is no entry.
    """
    scaled = logps.float() / temperature
    missing = scaled.isneginf().all(-1, keepdim=True)
    return torch.where(missing, scaled, scaled.masked_fill(missing, 0.0).log_softmax(-1))


@dataclass(frozen=True)
class PackedLoss:
    """The objective of a recipe: from a pack's hidden states to its share of the step's loss.

    Attributes:
        section: name and parameters.
        reference: float32 [traces] on the student's device, log-probs under the reference model by
            trace index. It must be set before the first call if the objective has a reference.
        mismatched_reference: the same of the mismatched rows.
        context: the ranks that share a pack. A pack is then a slice (`slice_pack`), and what is
            returned is its share of the pack's sums.
        divergence_weight: of the divergence from a teacher; 0: the loss has none.
    """

    section: ObjectiveConfig
    reference: Tensor | None = None
    mismatched_reference: Tensor | None = None
    context: ContextGroup = ALONE
    divergence_weight: float = 0.0

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        totals: StepTotals,
        logits: Logits = PLAIN,
    ) -> RediLoss | FilteredRediLoss | DistilledLoss:
        """The pack's share of the loss, and its sequences' log-probs.

        Args:
            hidden: [T, D] last hidden states.
            weight: [V, D] weight of lm_head.
            batch: the pack; with units "margins" its sequences are whole pairs.
            totals: denominators.
            logits: how the model computes its logits. A filter needs the default.
        """
        declared = formula(self.section)
        in_one_pass = self.context.size == 1 and batch.token_weights is None
        if declared.exponential is not None and in_one_pass:
            weights = declared.exponential(self.section)
            return self._exponential(weights, hidden, weight, batch, totals, logits)
        if declared.weights is None:
            return self._from_sequences(declared, hidden, weight, batch, totals, logits)
        positive, negative = declared.weights(self.section)
        # If incorrect traces are only measured, the op gets this as a host int.
        num_with_grad = batch.num_positive_targets if negative == 0 else None
        if batch.teacher_ids is not None:
            token_weights = self._token_weights(positive, negative, batch, totals)
            return self._distilled(token_weights, hidden, weight, batch, logits, num_with_grad)
        assert not self.divergence_weight or batch.is_dummy, "the loader has no distributions"
        filtered = self.section.filter_epsilon > 0
        if filtered or self._is_plain_redi(declared, positive, batch):
            op: Callable[..., RediLoss | FilteredRediLoss] = partial(redi_loss, **logits._asdict())
            if filtered:
                assert logits == PLAIN, "checked by model_config"
                op = partial(
                    filtered_redi_loss,
                    epsilon=self.section.filter_epsilon,
                    sequence_weights=batch.weights,
                )
            return op(
                hidden,
                weight,
                batch.targets,
                batch.cu_seqlens,
                batch.signs,
                alpha=-negative,
                num_pairs=totals.units,
                valid_index=batch.valid_index,
                num_with_grad=num_with_grad,
                backend=self.section.backend,
            )
        token_weights = self._token_weights(positive, negative, batch, totals)
        loss, token_logps = signed_cross_entropy(
            hidden,
            weight,
            batch.targets,
            token_weights,
            coefficient=declared.coefficient,
            valid_index=batch.valid_index,
            num_with_grad=num_with_grad,
            backend=self.section.backend,
            **logits._asdict(),
        )
        return RediLoss(loss, segment_sum(token_logps, batch.cu_seqlens), batch.num_targets)

    def _token_weights(
        self, positive: float, negative: float, batch: PackedBatch, totals: StepTotals
    ) -> Tensor:
        """The weight of each token's term, float32 [T], from those of correct and incorrect."""
        per_sequence = torch.where(batch.signs > 0, positive, negative)
        if batch.weights is not None:
            per_sequence = per_sequence * batch.weights
        token_weights = (per_sequence / self._denominators(batch, totals)).repeat_interleave(
            batch.cu_seqlens.diff(), output_size=len(batch.input_ids)
        )
        if batch.token_weights is not None:
            token_weights = token_weights * batch.token_weights
        return token_weights

    def _distilled(
        self,
        token_weights: Tensor,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        logits: Logits,
        num_with_grad: int | None,
    ) -> DistilledLoss:
        """The weighted sum of divergences from the teacher and of cross-entropies, in one pass."""
        section = self.section
        assert batch.teacher_ids is not None
        assert batch.teacher_logps is not None
        teacher_logps = batch.teacher_logps
        if section.temperature != 1:
            teacher_logps = at_temperature(teacher_logps, section.temperature)
        of_target = section.ce_weight if section.name == "kd" else 1.0
        out = topk_divergence(
            hidden,
            weight,
            batch.teacher_ids,
            teacher_logps,
            token_weights * (self.divergence_weight * section.temperature**2),
            direction=section.direction,
            temperature=section.temperature,
            tail=section.tail,
            skew=section.skew,
            targets=batch.targets,
            target_weights=token_weights * of_target,
            valid_index=batch.valid_index,
            num_with_grad=num_with_grad,
            backend=section.backend,
            **logits._asdict(),
        )
        assert out.token_logps is not None
        return DistilledLoss(
            out.loss,
            segment_sum(out.token_logps, batch.cu_seqlens),
            batch.num_targets,
            segment_sum(out.token_divergences, batch.cu_seqlens),
        )

    def _is_plain_redi(self, declared: Formula, positive: float, batch: PackedBatch) -> bool:
        """True if `redi_loss` computes this objective; it also computes the tokens' weights.

        SFT with a mean per sequence is REDI without negatives.
        """
        return (
            self.context.size == 1  # it counts |y| in the slice
            and declared.coefficient == "weight"
            and positive == 1
            and self.section.normalisation == "sequence"
            and self.section.length == "trained"
            and batch.weights is None
            and batch.token_weights is None
        )

    def _lengths(self, batch: PackedBatch) -> Tensor:
        """|y|, float32 [S], at least 1: trained tokens, or those before truncation."""
        original = self.section.length == "original"
        return (batch.full_targets if original else batch.num_targets).clamp(min=1).float()

    def _denominators(self, batch: PackedBatch, totals: StepTotals) -> Tensor:
        """The denominators of the tokens' weights, float32 [S]."""
        lengths = self._lengths(batch)
        if self.section.normalisation == "sequence":
            return totals.units * lengths
        count = totals.targets if self.section.normalisation == "token" else totals.units
        return torch.full_like(lengths, count)

    def _exponential(
        self,
        weights: ExponentialWeights,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        totals: StepTotals,
        logits: Logits,
    ) -> RediLoss:
        """The mean over units of the traces' losses, in one pass."""
        of_sequence = (batch.signs != 0) / totals.units
        if batch.weights is not None:
            of_sequence = of_sequence * batch.weights
        linear, exponential = (
            torch.where(batch.signs > 0, *pair) * of_sequence
            for pair in (weights.linear, weights.exponential)
        )
        counts = batch.target_counts
        if weights.exponential[0] == 0:
            # The op needs to know whole sequences only where it has exponential weights.
            ends = list(accumulate(counts, initial=0))
            counts = counts[ends.index(batch.num_positive_targets) :]
        return sequence_loss(
            hidden,
            weight,
            batch.targets,
            batch.cu_seqlens,
            linear,
            exponential,
            temperature=weights.temperature,
            denominators=self._lengths(batch),
            valid_index=batch.valid_index,
            exponential_lengths=counts,
            backend=self.section.backend,
            **logits._asdict(),
        )

    def _from_sequences(
        self,
        declared: Formula,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        totals: StepTotals,
        logits: Logits,
    ) -> RediLoss:
        """The mean over units of the formula's losses of traces or pairs."""
        token_logps = linear_logprobs(
            hidden,
            weight,
            batch.targets,
            valid_index=batch.valid_index,
            backend=self.section.backend,
            **logits._asdict(),
        )
        dtype = token_logps.dtype
        if self.context.size > 1:
            token_logps = token_logps.double()  # else rounded in each slice
        logps = weighted = segment_sum(token_logps, batch.cu_seqlens)
        if batch.token_weights is not None:
            weighted = segment_sum(token_logps * batch.token_weights, batch.cu_seqlens)
        weighted = self.context.sum(weighted)
        reference = None
        if self.section.kind.reference:
            assert self.reference is not None, "set_reference was not called"
            reference = self.reference[batch.sequence_ids]
        lengths = self._lengths(batch)
        sequences = Sequences(weighted, lengths, batch.signs, reference, totals.kl)
        if declared.exponential is not None:
            terms = declared.exponential(self.section).terms(sequences)
        else:
            assert declared.terms is not None
            terms = declared.terms(self.section, sequences)
        if self.section.kind.units != "margins":
            terms = terms * (batch.signs != 0)
            if batch.weights is not None:
                terms = terms * batch.weights
        elif batch.weights is not None:
            positive, negative = pairs(batch.weights)
            terms = terms * (positive + negative) / 2
        # Each rank of a context group has all terms, and counts its share of them.
        loss = terms.sum().to(dtype) / (totals.units * self.context.size)
        return RediLoss(loss, logps.detach(), batch.num_targets)
