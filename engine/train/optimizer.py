"""AdamW with transformers' weight-decay groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from redi.engine.config.sections import OptimConfig

# transformers.Trainer.get_decay_parameter_names: names that are not decayed.
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def make_optimizer(student: nn.Module, section: OptimConfig) -> torch.optim.AdamW:
    """AdamW over sharded fp32 masters; norms and biases are not decayed, as in transformers."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if NOT_DECAYED.search(name.lower()) else section.weight_decay
            groups.setdefault(decay, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=True,  # it alone can leave a step out on the device: see `step_if`
    )


def step_if(optimizer: torch.optim.AdamW, finite: torch.Tensor) -> None:
    """Take the step where `finite` (bool scalar on the device) is true, else change nothing.

    Nobody waits for the answer: the fused kernels read it, as they do for loss scaling, and leave
    weights, moments and the step's number as they are.
    """
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()


@torch.no_grad()
def squared_update(optimizer: torch.optim.AdamW, finite: torch.Tensor) -> torch.Tensor:
    """Sum of squares of the parameter change of the step just taken, of this rank's shards.

    Told from AdamW's moments, so that no copy of the weights before the step is held.

    Args:
        finite: bool scalar, whether the step was taken.

    Returns:
        A float64 scalar on the device.
    """
    total = torch.zeros((), dtype=torch.float64, device=finite.device)
    for group in optimizer.param_groups:
        (beta1, beta2), rate, decay = group["betas"], group["lr"], group["weight_decay"]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                continue  # a parameter that no gradient has reached
            first, second, after = map(_local, (state["exp_avg"], state["exp_avg_sq"], parameter))
            step = state["step"].double()  # 1 - 0.999 ** step cancels in float32
            scale = (1 - beta2**step).sqrt()
            adam = first / (second.sqrt() / scale + group["eps"]) / (1 - beta1**step)
            # AdamW: after = before - rate * (adam + decay * before).
            before = (after + rate * adam) / (1 - rate * decay)
            total += (rate * (adam + decay * before)).double().square().sum()
    return torch.where(finite, total, 0.0)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def learning_rate(
    section: OptimConfig, total_steps: int, first_total: int | None = None
) -> Callable[[int], float]:
    """The learning rate of step 1, 2, ..., total_steps: transformers' schedule.

    A function of the step alone, so that a resumed run has nothing to restore. The first of the
    ceil(warmup * first_total) warm-up steps has rate 0, as in transformers.

    Args:
        first_total: the steps that a lengthened run began with; its warm-up stays as it was. None:
            total_steps.
    """
    warmup = section.warmup * (total_steps if first_total is None else first_total)
    name = "constant_with_warmup" if section.schedule == "constant" else section.schedule
    scheduler = get_scheduler(
        name,
        torch.optim.SGD([nn.Parameter(torch.empty(1))], lr=1.0),
        num_warmup_steps=math.ceil(warmup),
        num_training_steps=total_steps,
    )
    multiplier = scheduler.lr_lambdas[0]
    return lambda step: section.lr * multiplier(step - 1)
