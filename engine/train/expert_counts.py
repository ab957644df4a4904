"""How many tokens of an optimizer step choose each expert, before its gradient is computed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from redi.engine.data.loader import StepBatches
from redi.engine.model.student import Student


@torch.no_grad()
def count_experts(student: Student, batches: StepBatches, device: torch.device) -> Tensor | None:
    """Count the choices of all routers in a forward of the blocks, without a gradient.

    It takes the time of the step's forward. Random numbers (dropout) are those of the forward that
    follows. Collective.

    Returns:
        int64 [E] over all ranks, for `StepTotals`. None without a router loss, or if the step has
        one pack per rank, whose forward counts them.
    """
    if student.router_loss is None or batches.micro_steps == 1:
        return None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        counts = [
            student.expert_counts(batch.to(device, non_blocking=True))
            for batch in batches.micro_batches
        ]
    total = torch.stack(counts).sum(0)
    dist.all_reduce(total)
    return total
