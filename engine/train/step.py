"""One optimizer step: gradients of all micro-steps, clipping, update, and its figures."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from redi.engine.config.distill import is_distilled
from redi.engine.config.sections import Recipe, ShardConfig
from redi.engine.data.loader import StepBatches
from redi.engine.distributed import World
from redi.engine.loss.packed_loss import DistilledLoss, StepTotals
from redi.engine.model.sharding import gather_once
from redi.engine.model.student import Student
from redi.engine.train.expert_counts import count_experts
from redi.engine.train.guards import PackResult
from redi.engine.train.kl_estimate import estimate_kl
from redi.engine.train.metrics import memory_figures
from redi.engine.train.optimizer import BLOCK, CPU_BLOCK, Optimizer, squared_update, step_if
from redi.kernels import FilteredRediLoss


@dataclass(frozen=True)
class StepResult:
    """A step's figures over all ranks; equal on every rank."""

    loss: float
    positive_logp: float | None
    """Mean over the step's positives of their mean log-prob per token; None if there are none."""
    negative_logp: float | None
    further: dict[str, float | None]
    """Means likewise of the objective's further figure: with a filter of `dropped`, the share of a
    token's probability that it excluded from the gradient; with a teacher of `divergence`, from
    its distribution. With mismatched rows `kl`, see `StepTotals`. Empty with none."""
    grad_norm: float
    """l2 norm before clipping."""
    update_norm: float
    """l2 norm of the change of the parameters."""
    taken: bool
    """False if loss or gradient was not finite: weights and moments are unchanged."""
    stop_requested: bool
    """True if a stop was requested on any rank."""
    save_failed: bool
    """True if the background save failed on any rank."""
    largest: dict[str, float]
    """The largest value over the ranks of `data_seconds` and of each of `memory_figures`."""
    router_aux_loss: float | None
    """Without its coefficient; None without a router loss."""


def train_step(
    student: Student,
    optimizer: Optimizer,
    batches: StepBatches,
    recipe: Recipe,
    world: World,
    *,
    stop_requested: bool,
    save_failed: bool,
    data_seconds: float,
) -> tuple[StepResult, list[PackResult]]:
    """Train on the packs of a step. The host waits for the device once, at the end. Collective.

    Args:
        stop_requested, save_failed: of this rank; reduced over the ranks together with the sums.
        data_seconds: that this rank has waited for `batches`.

    Returns:
        The step's figures, and the results of this rank's packs, which messages need.
    """
    packs, kl = forward_backward(student, batches, world.device, recipe.shard)
    with record_function("redi.clip"):
        grad_norm = clip(student, recipe.optim.max_grad_norm)
    with record_function("redi.metrics"):
        sums = _step_sums(packs, stop_requested, save_failed, world.device)
        # Decided on the device: the host reads no value until all operations are queued.
        finite = sums[0].isfinite() & grad_norm.isfinite()
    with record_function("redi.optimizer"):
        step_if(optimizer, finite)
        optimizer.zero_grad()
    with record_function("redi.metrics"):
        on_cpu = world.device.type == "cpu"
        squared = squared_update(optimizer, finite, CPU_BLOCK if on_cpu else BLOCK)
        dist.all_reduce(squared)
        update_norm = (squared / recipe.shard.replicate).sqrt()
        figures = {"data_seconds": data_seconds} | memory_figures(world.device)
        largest = torch.zeros(len(figures), dtype=torch.float64, device=world.device)
        for index, value in enumerate(figures.values()):
            largest[index] = value  # not torch.tensor(values): that copy would wait for the device
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        none = torch.zeros_like(update_norm)
        of_step = [grad_norm.double(), update_norm, finite.double(), none if kl is None else kl]
        loss, positive, negative, more_positive, more_negative, router, *rest = torch.cat(
            [sums, torch.stack(of_step), largest]
        ).tolist()
    stops, failures, norm, update, taken, found_kl, *of_ranks = rest
    further: dict[str, float | None] = {}
    name = "dropped" if recipe.objective.filter_epsilon > 0 else "divergence"
    if name == "dropped" or is_distilled(recipe):
        further[f"positive_{name}"] = _mean(more_positive, batches.num_positives)
        further[f"negative_{name}"] = _mean(more_negative, batches.num_negatives)
    if kl is not None:
        further["kl"] = found_kl
    result = StepResult(
        loss=loss,
        positive_logp=_mean(positive, batches.num_positives),
        negative_logp=_mean(negative, batches.num_negatives),
        further=further,
        grad_norm=norm,
        update_norm=update,
        taken=bool(taken),
        stop_requested=stops > 0,
        save_failed=failures > 0,
        largest=dict(zip(figures, of_ranks, strict=True)),
        router_aux_loss=router / student.router_loss.coefficient if student.router_loss else None,
    )
    return result, packs


def forward_backward(
    student: Student, batches: StepBatches, device: torch.device, section: ShardConfig
) -> tuple[list[PackResult], torch.Tensor | None]:
    """Accumulate the gradient of a step. Collective.

    Returns:
        The results of this rank's packs, and `StepTotals.kl`.
    """
    with gather_once(student) if section.gather == "step" else nullcontext():
        return _run_packs(student, batches, device, section.reduce)


def _run_packs(
    student: Student, batches: StepBatches, device: torch.device, reduce: str
) -> tuple[list[PackResult], torch.Tensor | None]:
    assert isinstance(student, FSDPModule)
    totals = StepTotals(
        units=len(batches.units),
        targets=batches.num_targets,
        tokens=batches.num_tokens,
        expert_counts=count_experts(student, batches, device),
        kl=estimate_kl(student, batches, device),
    )
    packs = []
    for index, batch in enumerate(batches.micro_batches):
        on_device = batch.to(device, non_blocking=True)
        last = index == len(batches.micro_batches) - 1
        student.set_requires_gradient_sync(last or reduce == "micro_step")
        student.set_requires_all_reduce(last)  # between replicas, once a step: on the shards
        with record_function("redi.forward"):
            out = student(on_device, totals)
        with record_function("redi.backward"):
            out.loss.backward()
        lengths = out.sequence_lengths.clamp(min=1)
        means = out.sequence_logps.double() / lengths
        further = None
        if isinstance(out, FilteredRediLoss):
            further = out.sequence_dropped.double() / lengths
        elif isinstance(out, DistilledLoss):
            further = out.sequence_divergences.double() / lengths
        packs.append(
            PackResult(
                batch.sequence_ids,
                out.loss.detach(),
                means,
                on_device.signs,
                further,
                student.router_loss.share if student.router_loss else None,
            )
        )
    return packs, totals.kl


def clip(student: Student, max_norm: float) -> torch.Tensor:
    """Clip the whole gradient to `max_norm` (0: no clipping). Returns its l2 norm before that."""
    parameters = [p for p in student.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _step_sums(
    packs: list[PackResult], stop_requested: bool, save_failed: bool, device: torch.device
) -> torch.Tensor:
    """Sums over the packs of all ranks, float64 [8] on the device.

    Loss; mean log-probs of positives and of negatives; the further figure of positives and of
    negatives; router loss; stop requests; failed saves.
    """
    sums = torch.zeros(8, dtype=torch.float64, device=device)
    sums[6], sums[7] = stop_requested, save_failed
    for one in packs:
        sums[0] += one.loss
        if one.router_loss is not None:
            sums[5] += one.router_loss
        for first, values in ((1, one.means), (3, one.further)):
            if values is not None:
                # Not values[signs > 0]: boolean indexing would wait for the device.
                sums[first] += torch.where(one.signs > 0, values, 0.0).sum()
                sums[first + 1] += torch.where(one.signs < 0, values, 0.0).sum()
    dist.all_reduce(sums)
    return sums


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None
