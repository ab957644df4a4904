"""Checkpoints by torch.distributed.checkpoint: saved in the background, found again complete.

`.metadata` is written last, so a checkpoint that has it, and whose files are as long as it says,
is complete. Every other one is passed over.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from redi.engine.distributed import World
from redi.engine.errors import RunError
from redi.engine.model.student import Student

FOLDER = "checkpoints"


def complete_checkpoints(run_dir: Path) -> dict[int, Path]:
    """The complete checkpoints of a run: step -> folder."""
    found = {}
    for folder in run_dir.glob(f"{FOLDER}/step-*"):
        if _is_complete(folder):
            found[int(folder.name.removeprefix("step-"))] = folder
    return found


def _is_complete(folder: Path) -> bool:
    if not (folder / ".metadata").is_file():
        return False
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except Exception:  # cut off: pickle raises almost anything
        return False
    ends: dict[str, int] = {}
    for part in (metadata.storage_data or {}).values():
        end = part.offset + part.length
        ends[part.relative_path] = max(end, ends.get(part.relative_path, 0))
    files = {name: folder / name for name in ends}
    return all(f.is_file() and f.stat().st_size >= ends[name] for name, f in files.items())


def kept_checkpoints(steps: Sequence[int], keep: int, good_before: int | None) -> set[int]:
    """Which checkpoints stay: the newest, one from before things may have gone wrong, and the next.

    Args:
        steps: rising.
        keep: how many of the newest, at least 1.
        good_before: the newest checkpoint of an earlier step than this stays, and the oldest of
            the others, which will take its place; None: the newest ones alone.
    """
    newest = steps[-keep:]
    if good_before is None:
        return set(newest)
    good = [step for step in steps if step < good_before]
    return {*newest, *good[-1:], *steps[len(good) :][:1]}


class Checkpointer:
    """Saves, loads and prunes the checkpoints of one run."""

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        student: Student,
        optimizer: torch.optim.Optimizer,
        world: World,
    ) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.student = student
        self.optimizer = optimizer
        self.world = world
        self._pending: Future[Any] | None = None
        self._good_before: int | None = None

    def save(self, step: int, good_before: int | None = None) -> None:
        """Copy the state now, write it in the background. Collective.

        Args:
            good_before: what else is kept; see `kept_checkpoints`.

        Raises:
            RunError: the previous save failed.
        """
        self._good_before = good_before
        self.wait()
        folder = self.run_dir / FOLDER / f"step-{step}"
        if self.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # a torn one of an earlier attempt
        dist.barrier(self.world.checkpoint_group)
        # Called without CUDA too: the stager copies host tensors, training may go on at once.
        self._pending = dcp.async_save(  # type: ignore[assignment]
            self._state(), checkpoint_id=folder, process_group=self.world.checkpoint_group
        )

    def wait(self) -> None:
        """Wait for the save that is under way, then remove the checkpoints that are too many.

        Raises:
            RunError: it could not be written; older checkpoints are intact.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:
            raise RunError(
                f"saving a checkpoint under {self.run_dir / FOLDER} failed "
                f"({_cause(error)}); older checkpoints are intact"
            ) from error
        if self.world.is_main and self.keep:
            complete = complete_checkpoints(self.run_dir)
            for step in complete.keys() - kept_checkpoints(
                sorted(complete), self.keep, self._good_before
            ):
                (complete[step] / ".metadata").unlink()  # first: a half-removed one must not count
                shutil.rmtree(complete[step])

    def load_newest(self) -> int:
        """Load the newest complete checkpoint in place. Collective.

        Returns:
            Its step; 0 when there is none.
        """
        # Rank 0 decides: on a network file system the others may not see the newest one yet.
        newest = [max(complete_checkpoints(self.run_dir), default=0)]
        dist.broadcast_object_list(newest, src=0, group=self.world.checkpoint_group)
        step = newest[0]
        if not step:
            return 0
        state = self._state()
        dcp.load(state, checkpoint_id=self.run_dir / FOLDER / f"step-{step}")
        set_model_state_dict(self.student, state["model"])
        set_optimizer_state_dict(self.student, self.optimizer, state["optimizer"])
        return step

    def _state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.student),
            "optimizer": get_optimizer_state_dict(self.student, self.optimizer),
        }


def _cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
