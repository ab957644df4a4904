"""TensorBoard and Weights & Biases: where metrics go beside metrics.jsonl, if a recipe says so."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from redi.engine.config.sections import Recipe
from redi.engine.errors import InputError


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl."""

    def write(self, line: dict[str, Any]) -> None:
        """One line; it has `step`."""

    def close(self) -> None:
        """Flush and end."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises InputError for one whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(
                f"run.trackers: {name} is not installed: pip install 'redi-engine[{name}]'"
            )


def open_trackers(recipe: Recipe, run_dir: Path, last_step: int) -> list[Tracker]:
    """The trackers that a recipe asks for; its run goes on after `last_step`."""
    makers: dict[str, Callable[[Recipe, Path, int], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WandB,
    }
    return [makers[name](recipe, run_dir, last_step) for name in recipe.run.trackers]


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    group = line.get("event", "train")
    return {
        f"{group}/{name}": value
        for name, value in line.items()
        if isinstance(value, int | float) and name != "step"
    }


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, recipe: Recipe, run_dir: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a killed attempt logged behind its last checkpoint are run, and logged, again.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in _scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of project "redi" (WANDB_PROJECT names another), the same one after a resume."""

    def __init__(self, recipe: Recipe, run_dir: Path, last_step: int) -> None:
        import wandb

        id_file = run_dir / "wandb-id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "redi"),
            name=run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            dir=run_dir,
            config=asdict(recipe),
        )

    def write(self, line: dict[str, Any]) -> None:
        self._run.log(_scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()
