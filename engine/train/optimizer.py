"""The optimizer with transformers' weight-decay groups, and the learning rate of each step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from redi.engine.config.sections import OptimConfig
from redi.engine.extras import check_installed
from redi.engine.model.student import Student
from redi.engine.train.quantized_adamw import QuantizedAdamW, is_quantizable
from redi.engine.train.tensor_steps import GatheredMuon, TensorSteps, local

# transformers.Trainer.get_decay_parameter_names: names that are not decayed.
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")

BLOCK = 2**24
"""Elements whose update is computed at a time: 64 MiB in float32."""
CPU_BLOCK = 2**18
"""The same on a CPU: 1 MiB stays in the cache, and the allocator reuses it, where a larger block is
mapped anew for each operation."""


Optimizer = torch.optim.AdamW | TensorSteps


def check_optimizer(section: OptimConfig) -> None:
    """Raise InputError if a package that the optimizer needs is not installed."""
    if section.name == "adamw-8bit":
        check_installed("torchao", 'optim.name = "adamw-8bit"')


def make_optimizer(student: nn.Module, section: OptimConfig) -> Optimizer:
    """The optimizer of sharded fp32 masters. As in transformers norms and biases are not decayed.

    Args:
        student: a `Student` for Muon, which takes the matrices of its blocks.
        section: torchao is installed if it names AdamW with 8 bits (`check_optimizer`).
    """
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if section.name == "muon":
        assert isinstance(student, Student)
        inside = {id(parameter) for parameter in student.blocks.parameters()}
        matrices = {n: p for n, p in trained.items() if p.dim() == 2 and id(p) in inside}
        rest = {name: p for name, p in trained.items() if name not in matrices}
        muon = GatheredMuon(
            matrices.values(),
            lr=section.lr,
            weight_decay=section.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        return TensorSteps(muon, *([_adamw(rest, section)] if rest else []))
    if section.name == "adamw-8bit":
        large = {name: p for name, p in trained.items() if is_quantizable(p)}
        rest = {name: p for name, p in trained.items() if name not in large}
        parts: list[torch.optim.Optimizer] = [_adamw(rest, section)] if rest else []
        if large:
            parts.append(QuantizedAdamW(_decay_groups(large, section), **_options(section)))
        return TensorSteps(*parts)
    return _adamw(trained, section)


def _adamw(parameters: Mapping[str, nn.Parameter], section: OptimConfig) -> torch.optim.AdamW:
    # Fused is the only form that can skip a step on the device: see `step_if`.
    return torch.optim.AdamW(_decay_groups(parameters, section), **_options(section), fused=True)


def _options(section: OptimConfig) -> dict[str, Any]:
    return {"lr": section.lr, "betas": section.betas, "eps": section.eps}


def _decay_groups(
    parameters: Mapping[str, nn.Parameter], section: OptimConfig
) -> list[dict[str, Any]]:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = 0.0 if NOT_DECAYED.search(name.lower()) else section.weight_decay
        groups.setdefault(decay, []).append(parameter)
    return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def step_if(optimizer: Optimizer, finite: torch.Tensor) -> None:
    """Take the step if `finite` (bool scalar on the device) is true, else change nothing.

    With fused AdamW the host does not wait for the value: its kernels read it, as they do for loss
    scaling, and change neither weights nor moments nor the step count if it is false.
    """
    if isinstance(optimizer, TensorSteps):
        optimizer.step_if(finite)
        return
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()


@torch.no_grad()
def squared_update(
    optimizer: Optimizer, finite: torch.Tensor, block_size: int = BLOCK
) -> torch.Tensor:
    """Sum of squares of the parameter change of the step just taken, of this rank's shards.

    Computed from fused AdamW's moments, so that no copy of the previous weights is kept, by foreach
    operations over blocks of `block_size` elements: their number, and the extra memory, do not
    depend on the number of parameters.

    Args:
        optimizer: all parameters of a group have taken the same number of steps; parameters
            without state (no gradient so far) count as unchanged.
        finite: bool scalar, whether the step was taken.
        block_size: elements of a block.

    Returns:
        A float64 scalar on the device.
    """
    if isinstance(optimizer, TensorSteps):
        return optimizer.squared
    total = torch.zeros((), dtype=torch.float64, device=finite.device)
    for group in optimizer.param_groups:
        (beta1, beta2), rate, decay = group["betas"], group["lr"], group["weight_decay"]
        states = [(p, state) for p in group["params"] if (state := optimizer.state.get(p))]
        if not states:
            continue
        step = states[0][1]["step"].double()  # 1 - 0.999 ** step cancels in float32
        dtype = states[0][0].dtype  # foreach operations are fused only if dtypes are equal
        first_scale = (1 - beta1**step).to(dtype)
        second_scale = (1 - beta2**step).sqrt().to(dtype)
        norms: list[torch.Tensor] = []
        for block in _blocks([(s["exp_avg"], s["exp_avg_sq"], p) for p, s in states], block_size):
            first, second, after = map(list, zip(*block, strict=True))
            denominator = torch._foreach_sqrt(second)
            torch._foreach_div_(denominator, second_scale)
            torch._foreach_add_(denominator, group["eps"])
            change = torch._foreach_div(first, denominator)
            torch._foreach_div_(change, first_scale)
            if decay:
                torch._foreach_add_(change, after, alpha=decay)
            norms += torch._foreach_norm(change, dtype=torch.float64)
        # after = before - rate * (adam + decay * before), solved for before:
        # before - after = rate / (1 - rate * decay) * (adam + decay * after).
        if norms:
            total += (rate / (1 - rate * decay) * torch.stack(norms)).square().sum()
    return torch.where(finite, total, 0.0)


Piece = tuple[torch.Tensor, ...]
"""Corresponding elements of tensors that belong together."""


def _blocks(states: Sequence[Piece], most: int) -> Iterator[list[Piece]]:
    """Cut this rank's shards into flat pieces, and collect these up to `most` elements."""
    block: list[Piece] = []
    size = 0
    for tensors in states:
        for piece in zip(*(local(t).flatten().split(most) for t in tensors), strict=True):
            elements = piece[0].numel()
            if size + elements > most:
                yield block
                block, size = [], 0
            if elements:
                block.append(piece)
                size += elements
    if block:
        yield block


def learning_rate(
    section: OptimConfig, total_steps: int, first_total: int | None = None
) -> Callable[[int], float]:
    """The learning rate of step 1, 2, ..., total_steps, by transformers' schedule.

    It depends on the step alone, so a resumed run has nothing to restore. The first of the
    ceil(warmup * first_total) warm-up steps has rate 0, as in transformers.

    Args:
        first_total: number of steps that a lengthened run was started with, which keeps its
            warm-up unchanged. None: total_steps.
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
