"""How far the policy has moved from its reference: the statistic z of KTO."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from redi.engine.data.loader import StepBatches
from redi.engine.model.student import Student


@torch.no_grad()
def estimate_kl(student: Student, batches: StepBatches, device: torch.device) -> Tensor | None:
    """The mean log p/p_ref of a step's mismatched rows, sums over tokens, at least 0.

    A forward without a gradient and, as for the reference, without dropout. Collective.

    Returns:
        float64 scalar over all ranks, for `StepTotals`. None if the objective has no such estimate.
    """
    objective = student.objective
    if not objective.section.kind.mismatched:
        return None
    total = torch.zeros((), dtype=torch.float64, device=device)
    student.eval()
    for batch in batches.mismatched:
        on_device = batch.to(device, non_blocking=True)
        logps = student(on_device, None).weighted_logps
        if not batch.is_dummy:
            assert objective.mismatched_reference is not None, "set_reference was not called"
            reference = objective.mismatched_reference[on_device.sequence_ids].double()
            # A slice has its share of the log-probs.
            total += (logps.double() - reference / student.context.size).sum()
    student.train()
    dist.all_reduce(total)
    return (total / len(batches.units)).clamp(min=0)
