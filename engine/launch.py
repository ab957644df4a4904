"""The place of this process among the ranks of a job, as torchrun sets it in the environment."""

from __future__ import annotations

import os

from redi.engine.errors import InputError

_MOST = {"WORLD_SIZE": 2**31 - 1, "MASTER_PORT": 65535}
"""Largest values of the variables that must be set with RANK."""


def rank() -> int:
    """Rank of this process under torchrun; 0 without torchrun."""
    value = os.environ.get("RANK", "")
    return int(value) if value.isdecimal() else 0


def check_launch() -> None:
    """Check the variables that torchrun sets; without RANK there is one rank, and none is read.

    Raises:
        InputError: one is missing or has no valid value.
    """
    if "RANK" not in os.environ:
        return
    values = {name: os.environ.get(name) for name in ("RANK", *_MOST, "MASTER_ADDR")}
    remedy = "start the ranks with torchrun, or unset RANK to train in one process"
    for name, value in values.items():
        if not value:
            raise InputError(f"RANK is set in the environment, but {name} is not; {remedy}")
    if "LOCAL_RANK" in os.environ:
        values["LOCAL_RANK"] = os.environ["LOCAL_RANK"]
    del values["MASTER_ADDR"]
    for name, value in values.items():
        most = _MOST.get(name)
        if not (value and value.isdecimal()) or (most and not 1 <= int(value) <= most):
            limits = f"a whole number of 1 to {most:,}" if most else "a whole number"
            raise InputError(f"{name} in the environment must be {limits}, got {value!r}; {remedy}")
    if rank() >= (size := int(values["WORLD_SIZE"] or 0)):
        raise InputError(f"RANK = {rank()} in the environment, but WORLD_SIZE = {size}; {remedy}")
