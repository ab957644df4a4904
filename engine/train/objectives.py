"""What is minimised: each objective gives a packed row's share of the optimizer step's loss.

All are sums over sequences with denominators that are counts of the whole step, known from the
schedule; so nothing depends on which row, micro-step or rank a sequence lies in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from redi.engine.config import Objective as ObjectiveSection
from redi.engine.data.packing import PackedBatch
from redi.engine.data.schedule import Needs
from redi.kernels import Backend, RediLoss, redi_loss, segment_sum, signed_cross_entropy


@dataclass(frozen=True)
class StepTotals:
    """Global counts of one optimizer step, over all ranks and micro-steps.

    Attributes:
        units: pairs (REDI) or sequences (SFT): B.
        targets: trained tokens.
    """

    units: int
    targets: int


Objective = Callable[[torch.Tensor, torch.Tensor, PackedBatch, StepTotals], RediLoss]


def needs(section: ObjectiveSection) -> Needs:
    """What a unit of the schedule is: one correct trace, or a correct and an incorrect one."""
    return "pairs" if section.name == "redi" else "positives"


def make_objective(section: ObjectiveSection) -> Objective:
    """The objective of a recipe: (hidden [T, D], lm_head [V, D], row, totals) -> RediLoss."""
    if section.normalisation == "token":
        return partial(_token_mean, backend=section.backend)
    # SFT with a mean per sequence is REDI without negatives.
    alpha = section.alpha if section.name == "redi" else 0.0
    return partial(_sequence_mean, alpha=alpha, backend=section.backend)


def _sequence_mean(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    batch: PackedBatch,
    totals: StepTotals,
    *,
    alpha: float,
    backend: Backend,
) -> RediLoss:
    """(1/B) sum_s c_s (1/|y_s|) sum_t log p_t; c = -1 correct, +alpha incorrect (2505.24850)."""
    if batch.weights is None:
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
            backend=backend,
        )
    wanted = torch.where(batch.signs > 0, 1.0, -alpha) * (batch.signs != 0) * batch.weights
    per_token = wanted / (totals.units * batch.num_targets.clamp(min=1))
    return _weighted(hidden, weight, batch, per_token, backend)


def _token_mean(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    batch: PackedBatch,
    totals: StepTotals,
    *,
    backend: Backend,
) -> RediLoss:
    """-(1/N) sum over all trained tokens of the step of log p_t: the usual SFT loss."""
    wanted = (batch.signs > 0).float() / totals.targets
    if batch.weights is not None:
        wanted = wanted * batch.weights
    return _weighted(hidden, weight, batch, wanted, backend)


def _weighted(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    batch: PackedBatch,
    per_token: torch.Tensor,
    backend: Backend,
) -> RediLoss:
    """Cross-entropy whose tokens weigh `per_token` [S] of their sequence."""
    lengths = batch.cu_seqlens.diff()
    loss, token_logps = signed_cross_entropy(
        hidden,
        weight,
        batch.targets,
        per_token.float().repeat_interleave(lengths, output_size=hidden.shape[0]),
        valid_index=batch.valid_index,
        backend=backend,
    )
    sequence_logps = segment_sum(token_logps.detach(), batch.cu_seqlens)
    return RediLoss(loss, sequence_logps, batch.num_targets)
