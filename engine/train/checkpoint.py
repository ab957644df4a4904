"""Checkpoints by torch.distributed.checkpoint, saved in the background.

A checkpoint is complete if it has `.metadata`, which is written last, and if its files are at least
as long as that records. Incomplete ones are ignored.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from redi.engine.distributed import World
from redi.engine.errors import InputError, RunError
from redi.engine.model.student import Student

FOLDER = "checkpoints"
# CheckpointException derives from BaseException, not from Exception.
FAILURES = (Exception, CheckpointException)


def complete_checkpoints(run_dir: Path) -> dict[int, Path]:
    """The complete checkpoints of a run: step -> directory."""
    return {step: folder for step, folder in _saved(run_dir).items() if _is_complete(folder)}


def check_not_damaged(run_dir: Path, complete: Collection[int]) -> str | None:
    """A warning if newer checkpoints than the newest complete one were damaged after their save.

    A checkpoint whose save was interrupted has no metadata and is not meant.

    Args:
        run_dir: the run directory.
        complete: steps of its complete checkpoints.

    Raises:
        InputError: all are damaged, so that the run would start again from its first step.
    """
    damaged = [
        step
        for step, folder in _saved(run_dir).items()
        if step > max(complete, default=0) and (folder / ".metadata").exists()
    ]
    if not damaged:
        return None
    steps = ", ".join(map(str, sorted(damaged)))
    what = f"{run_dir / FOLDER}: damaged (files are missing or truncated): step {steps}"
    if not complete:
        raise InputError(f"{what}; restore them, or remove {run_dir} to start again")
    return f"{what}; resuming from step {max(complete)}"


def _saved(run_dir: Path) -> dict[int, Path]:
    folders = {
        folder.name.removeprefix("step-"): folder for folder in run_dir.glob(f"{FOLDER}/step-*")
    }
    return {int(step): folder for step, folder in folders.items() if step.isdecimal()}


def _is_complete(folder: Path) -> bool:
    if not (folder / ".metadata").is_file():
        return False
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except Exception:  # truncated: pickle raises many types
        return False
    ends: dict[str, int] = {}
    for part in (metadata.storage_data or {}).values():
        end = part.offset + part.length
        ends[part.relative_path] = max(end, ends.get(part.relative_path, 0))
    files = {name: folder / name for name in ends}
    return all(f.is_file() and f.stat().st_size >= ends[name] for name, f in files.items())


def kept_checkpoints(steps: Sequence[int], keep: int, good_before: int | None) -> set[int]:
    """The steps whose checkpoints are kept.

    Args:
        steps: steps of all checkpoints, ascending.
        keep: number of newest checkpoints to keep, at least 1.
        good_before: also keep the newest checkpoint of a step before this one, which predates any
            sign of collapse, and the oldest one from this step on, which replaces it later. None:
            keep only the newest ones.
    """
    newest = steps[-keep:]
    if good_before is None:
        return set(newest)
    good = [step for step in steps if step < good_before]
    return {*newest, *good[-1:], *steps[len(good) :][:1]}


class _Writer(dcp.FileSystemWriter):
    """Raises the file system's error, which torch.save replaces by another."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            hidden: BaseException | None = error
            while hidden and not isinstance(hidden, OSError):
                hidden = hidden.__context__
            raise hidden or error from None


class Checkpointer:
    """Saves, loads and prunes the checkpoints of one run.

    Args:
        run_dir: the run directory.
        complete: steps of its complete checkpoints, equal on every rank.
        keep: number of newest checkpoints to keep; 0: all.
        student, optimizer: what is saved.
        world: the ranks.

    Attributes:
        complete: steps of the complete checkpoints now. They are not read again: for many ranks the
            metadata of each takes seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        complete: Collection[int],
        keep: int,
        student: Student,
        optimizer: torch.optim.Optimizer,
        world: World,
    ) -> None:
        self.run_dir = run_dir
        self.complete = set(complete)
        self.keep = keep
        self.student = student
        self.optimizer = optimizer
        self.world = world
        self._pending: Future[Any] | None = None
        self._good_before: int | None = None
        self._pending_step = 0
        # One copy of this rank's shards in host memory (page-locked on CUDA), reused by every save.
        # Training waits only while it is made.
        on_cuda = world.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_cuda,
            )
        )

    @property
    def failed(self) -> bool:
        """True if the save in progress has failed on this rank; `wait` raises the error."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def save(self, step: int, good_before: int | None = None) -> None:
        """Copy the state now and write it in the background. Collective.

        Args:
            good_before: see `kept_checkpoints`.

        Raises:
            RunError: the previous save failed.
        """
        self._good_before = good_before
        self.wait()
        self._pending_step = step
        folder = self._folder(step)
        if self.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # incomplete, from an earlier attempt
        dist.barrier(self.world.checkpoint_group)
        self._pending = dcp.async_save(  # type: ignore[assignment]
            self._state(),
            storage_writer=_Writer(folder),
            process_group=self.world.checkpoint_group,
            async_stager=self._stager,
        )

    def wait(self) -> None:
        """Wait for the save in progress, then remove checkpoints that are not kept.

        Raises:
            RunError: the save failed; older checkpoints are intact.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        folder = self._folder(self._pending_step)
        try:
            pending.result()
        except FAILURES as error:
            if self.world.is_main:
                shutil.rmtree(folder, ignore_errors=True)  # frees the disk space
            raise RunError(
                f"{folder} could not be saved ({_cause(error)}); older checkpoints are intact, the "
                "same command resumes from the newest"
            ) from error
        self.complete.add(self._pending_step)
        if not self.keep:
            return
        kept = kept_checkpoints(sorted(self.complete), self.keep, self._good_before)
        for step in self.complete - kept if self.world.is_main else ():
            with suppress(FileNotFoundError):  # the user has removed it
                # First, so that a half-removed checkpoint is not complete.
                (self._folder(step) / ".metadata").unlink()
                shutil.rmtree(self._folder(step))
        self.complete &= kept

    def close(self) -> None:
        """Let a save in progress finish: it is valid even if the run has failed since.

        Several ranks do not wait: a save needs all of them, and one may be lost.
        """
        if self._pending is not None and self.world.size > 1:
            return
        with suppress(*FAILURES):
            self.wait()
        self._stager.close()

    def load_newest(self) -> int:
        """Load the newest complete checkpoint in place. Collective.

        Returns:
            Its step; 0 if there is none.

        Raises:
            RunError: the checkpoint cannot be read.
        """
        step = max(self.complete, default=0)
        if not step:
            return 0
        # On a network file system other ranks may not see its files yet.
        self.world.from_rank0(lambda: None, lambda _: self._folder(step).iterdir())
        state = self._state()
        try:
            dcp.load(state, checkpoint_id=self._folder(step))
        except FAILURES as error:
            raise RunError(
                f"{self._folder(step)} cannot be read ({_cause(error)}); remove it to resume from "
                "the checkpoint before it"
            ) from error
        set_model_state_dict(self.student, state["model"])
        set_optimizer_state_dict(self.student, self.optimizer, state["optimizer"])
        return step

    def _folder(self, step: int) -> Path:
        return self.run_dir / FOLDER / f"step-{step}"

    def _state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.student),
            "optimizer": get_optimizer_state_dict(self.student, self.optimizer),
        }


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
