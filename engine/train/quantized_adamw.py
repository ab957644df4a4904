"""AdamW whose moments have 8 bits a value, by torchao's update.

A moment is kept as codes, uint8 in the parameter's shape, and a float32 scale for each block of a
row. Both are plain tensors, sharded as the parameter: torch's checkpoints copy and reshard them,
which they cannot do with torchao's tensor subclass. No block has values of two rows, so the codes
do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed.tensor
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from redi.engine.train.tensor_steps import local

BLOCK = 256
"""Most values with one scale."""
LEAST_BLOCK = 32
"""A shorter block's scale would take more than 1 bit a value."""
LEAST_SIZE = 4096
"""Smaller parameters take no memory worth saving."""
PIECE = 2**22
"""Values that are updated at a time: temporary tensors take up to 60 bytes a value."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_quantizable(parameter: torch.Tensor) -> bool:
    """Whether the moments of a parameter are kept in 8 bits, on any number of ranks."""
    return parameter.numel() >= LEAST_SIZE and _block(parameter) >= LEAST_BLOCK


def _block(parameter: torch.Tensor) -> int:
    """Values with one scale: a power of two that divides the length of a row."""
    return math.gcd(BLOCK, math.prod(parameter.shape[1:]))


class QuantizedAdamW(torch.optim.Optimizer):
    """AdamW with moments of 8 bits. A step computes in float32 and then rounds the moments.

    Args:
        groups: parameters with `weight_decay`; each `is_quantizable`.
        lr, betas, eps: as in torch's AdamW.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._values: dict[tuple[bool, torch.device], torch.Tensor] = {}
        """The value of each code, float32 [256], with and without a sign."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_first_state(parameter))
                state["step"] += 1
                self._update(parameter, state, group)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state. (torch's own would turn codes into floats.)"""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
            for parameter, name in zip(group["params"], saved["params"], strict=True):
                if name in state_dict["state"]:
                    self.state[parameter] = dict(state_dict["state"][name])

    def _update(
        self, parameter: nn.Parameter, state: dict[str, torch.Tensor], group: dict[str, Any]
    ) -> None:
        """Update this rank's shard and its moments, piece by piece."""
        assert parameter.grad is not None
        block = _block(parameter)
        tensors = [(parameter.detach(), PIECE), (parameter.grad, PIECE)]
        for moment in MOMENTS:
            tensors += [(state[moment], PIECE), (state[f"{moment}_scale"], PIECE // block)]
        pieces = [local(tensor).view(-1).split(size) for tensor, size in tensors]
        update = _compiled() if parameter.device.type == "cuda" else _plain()
        rate = torch.tensor(group["lr"], dtype=torch.float32)
        with torch._dynamo.utils.disable_cache_limit():  # the number of sizes is fixed
            for weights, gradient, *moments in zip(*pieces, strict=True):
                if not len(weights):
                    continue
                update(
                    weights,
                    gradient,
                    state["step"],
                    self._moment(True, *moments[:2]),
                    self._moment(False, *moments[2:]),
                    None,  # not AMSGrad
                    rate,
                    *group["betas"],
                    group["weight_decay"],
                    group["eps"],
                    True,  # AdamW, not Adam
                    False,  # no stochastic rounding: masters are float32
                )

    def _moment(self, signed: bool, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """torchao's tensor of a moment, which shares the memory of `codes` and `scale`."""
        from torchao.optim.subclass_8bit import (
            OptimState8bit,
            get_qmap_signed,
            get_qmap_unsigned,
        )

        if (signed, codes.device) not in self._values:
            with _disable_current_modes():  # the plan runs with tensors that have no values
                values = get_qmap_signed() if signed else get_qmap_unsigned()
            self._values[signed, codes.device] = torch.tensor(values, device=codes.device)
        table = self._values[signed, codes.device]
        return OptimState8bit(codes, scale, table, signed, torch.float32)


def _first_state(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    rows, row = parameter.shape[0], math.prod(parameter.shape[1:])
    state = {"step": torch.tensor(0.0)}
    for moment in MOMENTS:
        state[moment] = _zeros(parameter.shape, torch.uint8, parameter)
        scales = (rows, row // _block(parameter))
        state[f"{moment}_scale"] = _zeros(scales, torch.float32, parameter)
    return state


def _zeros(shape: Iterable[int], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Zeros sharded over the rows as `like` is."""
    if not isinstance(like, DTensor):
        return torch.zeros(*shape, dtype=dtype, device=like.device)
    mesh, placements = like.device_mesh, like.placements
    return torch.distributed.tensor.zeros(
        *shape, dtype=dtype, device_mesh=mesh, placements=placements
    )


@cache
def _plain() -> Any:
    from torchao.optim.adam import single_param_adam

    return single_param_adam


@cache
def _compiled() -> Any:
    """One kernel for all operations of a piece, which then needs no temporary tensors."""
    return torch.compile(_plain(), fullgraph=True, dynamic=False)
