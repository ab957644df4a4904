"""Losses of the study that are no objectives of the engine."""

from __future__ import annotations

import torch
from torch import Tensor

from redi.engine.data.packing import PackedBatch
from redi.engine.loss.packed_loss import PLAIN, Logits, PackedLoss, StepTotals
from redi.kernels import RediLoss, linear_logprobs, segment_sum, sequence_loss


class TaperedLoss(PackedLoss):
    """-mean(y) + alpha times the mean of p_t over z: REDI bounded token by token."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        totals: StepTotals,
        logits: Logits = PLAIN,
    ) -> RediLoss:
        """The pack's share of the loss; see `PackedLoss`."""
        logps = linear_logprobs(hidden, weight, batch.targets, valid_index=batch.valid_index)
        sums = segment_sum(logps, batch.cu_seqlens)
        probabilities = logps.exp().masked_fill(batch.targets < 0, 0.0)
        pushed = segment_sum(probabilities, batch.cu_seqlens)
        terms = torch.where(batch.signs > 0, -sums, self.section.alpha * pushed)
        loss = (terms / batch.num_targets.clamp(min=1)).sum() / totals.units
        return RediLoss(loss, sums.detach(), batch.num_targets)


class AnchoredSimper(PackedLoss):
    """-mean(y) + alpha (exp mean(z) - exp mean(y)): imitation plus alpha times SimPER.

    What y and z share has the weight 1 + alpha (exp mean(y) - exp mean(z)), at least that of
    imitation where y is likelier than z.
    """

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        totals: StepTotals,
        logits: Logits = PLAIN,
    ) -> RediLoss:
        """The pack's share of the loss; see `PackedLoss`."""
        return sequence_loss(
            hidden,
            weight,
            batch.targets,
            batch.cu_seqlens,
            (batch.signs > 0) / totals.units,
            batch.signs * self.section.alpha / totals.units,
            valid_index=batch.valid_index,
            exponential_lengths=batch.target_counts,
        )
