"""A loss of the study that is no objective of the engine."""

from __future__ import annotations

import torch
from torch import Tensor

from redi.engine.data.packing import PackedBatch
from redi.engine.loss.packed_loss import PLAIN, Logits, PackedLoss, StepTotals
from redi.kernels import RediLoss, linear_logprobs, segment_sum


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
