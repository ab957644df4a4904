"""AdamW with transformers' weight-decay groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import get_scheduler

from redi.engine.config import Optim

# transformers.Trainer.get_decay_parameter_names: names that are not decayed.
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def make_optimizer(student: nn.Module, section: Optim) -> torch.optim.AdamW:
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
    )


def learning_rate(section: Optim, total_steps: int) -> Callable[[int], float]:
    """The learning rate of step 1, 2, ..., total_steps: transformers' schedule.

    A function of the step alone, so that a resumed run has nothing to restore. The first of the
    ceil(warmup * total_steps) warm-up steps has rate 0, as in transformers.
    """
    name = "constant_with_warmup" if section.schedule == "constant" else section.schedule
    scheduler = get_scheduler(
        name,
        torch.optim.SGD([nn.Parameter(torch.empty(1))], lr=1.0),
        num_warmup_steps=math.ceil(section.warmup * total_steps),
        num_training_steps=total_steps,
    )
    multiplier = scheduler.lr_lambdas[0]
    return lambda step: section.lr * multiplier(step - 1)
