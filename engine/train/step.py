"""One optimizer step: gradients of all micro-steps, clipping, update, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from redi.engine.config.sections import Recipe
from redi.engine.data.loader import StepBatches
from redi.engine.distributed import World
from redi.engine.loss.packed_loss import StepTotals
from redi.engine.model.student import Student
from redi.engine.train.guards import Row
from redi.engine.train.optimizer import squared_update, step_if
from redi.kernels import FilteredRediLoss


@dataclass(frozen=True)
class StepResult:
    """A step's figures over all ranks; equal on every rank."""

    loss: float
    positive_logp: float | None
    """Mean over the step's positives of their mean log-prob per token; None without any."""
    negative_logp: float | None
    positive_dropped: float | None
    """Mean share of a token's probability that a filter left out of the gradient."""
    negative_dropped: float | None
    grad_norm: float
    """l2, before clipping."""
    update_norm: float
    """l2 of the parameters' change."""
    taken: bool
    """False if loss or gradient was not finite: nothing was changed."""
    stop_asked: bool
    """True if any rank was asked to stop."""
    save_failed: bool
    """True if the background save failed on any rank."""
    filtered: bool
    """True if a filter left words out of the gradient."""


def train_step(
    student: Student,
    optimizer: torch.optim.AdamW,
    batches: StepBatches,
    recipe: Recipe,
    world: World,
    *,
    stop_asked: bool,
    save_failed: bool,
) -> tuple[StepResult, list[Row]]:
    """Train on a step's packs; the host waits for the device once, at the end. Collective.

    Args:
        stop_asked, save_failed: of this rank; they travel with the sums.

    Returns:
        The step's figures, and this rank's packs for messages.
    """
    rows = forward_backward(student, batches, world.device, recipe.shard.reduce)
    grad_norm = clip(student, recipe.optim.max_grad_norm)
    sums = _step_sums(rows, stop_asked, save_failed, world.device)
    # Decided and done on the device: the host asks for nothing until all is under way.
    finite = sums[0].isfinite() & grad_norm.isfinite()
    step_if(optimizer, finite)
    optimizer.zero_grad()
    squared = squared_update(optimizer, finite)
    dist.all_reduce(squared)
    update_norm = (squared / recipe.shard.replicate).sqrt()
    loss, positive, negative, dropped_positive, dropped_negative, stops, failures, *rest = (
        torch.stack([*sums, grad_norm.double(), update_norm, finite.double()]).tolist()
    )
    norm, update, taken = rest
    result = StepResult(
        loss=loss,
        positive_logp=_mean(positive, batches.num_positives),
        negative_logp=_mean(negative, batches.num_negatives),
        positive_dropped=_mean(dropped_positive, batches.num_positives),
        negative_dropped=_mean(dropped_negative, batches.num_negatives),
        grad_norm=norm,
        update_norm=update,
        taken=bool(taken),
        stop_asked=stops > 0,
        save_failed=failures > 0,
        filtered=recipe.objective.filter_epsilon > 0,
    )
    return result, rows


def forward_backward(
    student: Student, batches: StepBatches, device: torch.device, reduce: str
) -> list[Row]:
    """Accumulate the step's gradient; return what each of this rank's rows came to."""
    assert isinstance(student, FSDPModule)
    totals = StepTotals(units=len(batches.units), targets=batches.num_targets)
    rows = []
    for index, batch in enumerate(batches.micro_batches):
        on_device = batch.to(device, non_blocking=True)
        last = index == len(batches.micro_batches) - 1
        student.set_requires_gradient_sync(last or reduce == "micro_step")
        student.set_requires_all_reduce(last)  # among copies once is enough: it is sharded by then
        out = student(on_device, totals)
        out.loss.backward()
        lengths = out.sequence_lengths.clamp(min=1)
        means = out.sequence_logps.double() / lengths
        dropped = None
        if isinstance(out, FilteredRediLoss):
            dropped = out.sequence_dropped.double() / lengths
        rows.append(Row(batch.sequence_ids, out.loss.detach(), means, on_device.signs, dropped))
    return rows


def clip(student: Student, max_norm: float) -> torch.Tensor:
    """Clip the whole gradient to `max_norm` (0: leave it). Returns its l2 norm before."""
    parameters = [p for p in student.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _step_sums(
    rows: list[Row], asked_to_stop: bool, save_failed: bool, device: torch.device
) -> torch.Tensor:
    """Loss, sums of the positives' and the negatives' mean log-probs, and of what a filter left
    out of them, of requests to stop and of failed saves.

    float64 [7] on the device, over all ranks.
    """
    sums = torch.zeros(7, dtype=torch.float64, device=device)
    sums[5], sums[6] = asked_to_stop, save_failed
    for row in rows:
        sums[0] += row.loss
        for first, values in ((1, row.means), (3, row.dropped)):
            if values is not None:
                # Not values[signs > 0]: boolean indexing would wait for the device.
                sums[first] += torch.where(row.signs > 0, values, 0.0).sum()
                sums[first + 1] += torch.where(row.signs < 0, values, 0.0).sum()
    dist.all_reduce(sums)
    return sums


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None
