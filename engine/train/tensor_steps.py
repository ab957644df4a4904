"""Optimizers that update one tensor at a time: Muon, with AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate


class TensorSteps:
    """Optimizers that together update each parameter once.

    Unlike fused AdamW they cannot skip a step on the device, so the host waits for `finite`. The
    change of each parameter is measured against a copy of its shard, not of all weights.

    Args:
        optimizers: each with other parameters.

    Attributes:
        optimizers: the same.
        squared: sum of squares of the last step's change of this rank's shards, a float64 scalar.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers: Sequence[torch.optim.Optimizer] = optimizers
        self.squared = torch.zeros((), dtype=torch.float64)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Free all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient, and free each gradient after its use."""
        groups = self.param_groups
        device = groups[0]["params"][0].device
        self.squared = torch.zeros((), dtype=torch.float64, device=device)
        for optimizer in self.optimizers:
            groups = optimizer.param_groups
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    shard = local(parameter.detach())
                    before = shard.clone()
                    # A step over all groups for each parameter would take quadratic time.
                    optimizer.param_groups = [{**group, "params": [parameter]}]
                    optimizer.step()
                    parameter.grad = None
                    self.squared += (shard - before).double().square().sum()
            optimizer.param_groups = groups

    def step_if(self, finite: torch.Tensor) -> None:
        """Take the step if `finite` (bool scalar on the device) is true, else change nothing."""
        if finite:
            self.step()
        else:
            self.squared = torch.zeros((), dtype=torch.float64, device=finite.device)


class GatheredMuon(torch.optim.Muon):
    """torch's Muon for sharded matrices: it orthogonalizes whole ones.

    torch's own step on DTensors gathers in each of its products, rounds partial sums to bfloat16,
    and fails for a matrix with fewer rows than ranks. Here each rank gathers the whole update once,
    and keeps the rows of its shard.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, momentum = self.state[parameter], group["momentum"]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(average, momentum)  # Nesterov's
                change = _orthogonal(update, group)
                shard = local(parameter)
                shard.mul_(1 - group["lr"] * group["weight_decay"])
                shard.add_(_rows(change, parameter))


def _orthogonal(update: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """The change by a whole update, from torch's Muon without momentum on a matrix of zeros."""
    whole = update.full_tensor() if isinstance(update, DTensor) else update
    change = nn.Parameter(torch.zeros_like(whole))
    change.grad = whole
    options = {key: group[key] for key in ("lr", "ns_coefficients", "eps", "ns_steps")}
    torch.optim.Muon(
        [change],
        weight_decay=0.0,
        momentum=0.0,
        nesterov=False,
        adjust_lr_fn=group["adjust_lr_fn"],
        **options,
    ).step()
    return change.detach()


def _rows(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that belongs to this rank's shard of a parameter."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=parameter.placements).to_local()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, or the tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
