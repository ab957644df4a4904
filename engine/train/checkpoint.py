"""Checkpoints by torch.distributed.checkpoint, saved in the background.

A checkpoint is complete if it has `.metadata`, which is written last, and if its files are at least
as long as that records. Incomplete ones are ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from redi.engine.console import Console
from redi.engine.distributed import World, await_files
from redi.engine.errors import InputError, RunError
from redi.engine.model.student import Student
from redi.engine.storage import CHECKPOINTS, LocalRun, open_run, shown
from redi.engine.train.optimizer import Optimizer
from redi.engine.train.tensor_steps import TensorSteps

# CheckpointException derives from BaseException, not from Exception.
FAILURES = (Exception, CheckpointException)
TRAINED = StateDictOptions(ignore_frozen_params=True)
"""A checkpoint of an adapter does not repeat the model."""


def complete_checkpoints(run_dir: Path) -> list[int]:
    """The steps of the complete checkpoints of a run, ascending. Reads the metadata of each."""
    run = open_run(run_dir)
    files = run.checkpoint_files()
    return [step for step in sorted(files) if _is_complete(files[step], run.checkpoint(step))]


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
        for step, files in sorted(open_run(run_dir).checkpoint_files().items())
        if step > max(complete, default=0) and ".metadata" in files
    ]
    if not damaged:
        return None
    steps = ", ".join(map(str, damaged))
    what = f"{run_dir / CHECKPOINTS}: damaged (files are missing or truncated): step {steps}"
    if not complete:
        raise InputError(f"{what}; restore them, or remove {shown(run_dir)} to start again")
    return f"{what}; resuming from step {max(complete)}"


def checkpoint_reader(checkpoint: Path | str) -> dcp.FileSystemReader:
    """Reader of a checkpoint in a folder or at a URL."""
    return dcp.FileSystemReader(checkpoint) if isinstance(checkpoint, Path) else _Reader(checkpoint)


def _is_complete(sizes: Mapping[str, int], checkpoint: Path | str) -> bool:
    if ".metadata" not in sizes:
        return False
    try:
        metadata = checkpoint_reader(checkpoint).read_metadata()
    except Exception:  # truncated: pickle raises many types
        return False
    ends: dict[str, int] = {}
    for part in (metadata.storage_data or {}).values():
        end = part.offset + part.length
        ends[part.relative_path] = max(end, ends.get(part.relative_path, 0))
    return all(sizes.get(name, -1) >= end for name, end in ends.items())


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


class _Reader(FsspecReader):
    """Reads each tensor from a bucket by one request. torch.load seeks back and forth in a file."""

    def _slice_file(self, file: IO[bytes], part: Any) -> IO[bytes]:
        file.seek(part.offset)
        return BytesIO(file.read(part.length))


class _PlainErrors:
    """For a writer: raises the file system's error, which torch.save replaces by another."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)  # type: ignore[misc]
        except Exception as error:
            hidden: BaseException | None = error
            while hidden and not isinstance(hidden, OSError):
                hidden = hidden.__context__
            raise hidden or error from None


class _Writer(_PlainErrors, dcp.FileSystemWriter):
    """Writes to a folder."""


class _BucketWriter(_PlainErrors, FsspecWriter):
    """Writes to a URL. The run's metrics are uploaded before what makes the checkpoint complete."""

    def __init__(self, url: str, run: LocalRun) -> None:
        # An object is durable when its upload ends; with sync_files all of the machine is synced.
        super().__init__(url, sync_files=False, use_listings_cache=False)
        self._run = run

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._run.publish()
        super().finish(metadata, results)


class Checkpointer:
    """Saves, loads and prunes the checkpoints of one run.

    Args:
        run: the run directory, or a run on object storage.
        complete: steps of its complete checkpoints, equal on every rank.
        keep: number of newest checkpoints to keep; 0: all.
        student, optimizer: what is saved.
        world: the ranks.
        console: where a checkpoint that cannot be removed is a warning.

    Attributes:
        complete: steps of the complete checkpoints now. They are not read again: for many ranks the
            metadata of each takes seconds.
    """

    def __init__(
        self,
        run: LocalRun,
        complete: Collection[int],
        keep: int,
        student: Student,
        optimizer: Optimizer,
        world: World,
        console: Console,
    ) -> None:
        self.run = run
        self.complete = set(complete)
        self.keep = keep
        self.student = student
        self.optimizers = (
            optimizer.optimizers if isinstance(optimizer, TensorSteps) else (optimizer,)
        )
        self.world = world
        self.console = console
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
        self._remove(step)  # incomplete, from an earlier attempt
        dist.barrier(self.world.checkpoint_group)
        self._pending = dcp.async_save(  # type: ignore[assignment]
            self._state(),
            storage_writer=self._writer(self.run.checkpoint(step)),
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
        try:
            pending.result()
        except FAILURES as error:
            self._remove(self._pending_step)  # frees the disk space
            raise RunError(
                f"{self.run.checkpoint(self._pending_step)} could not be saved ({_cause(error)}); "
                "older checkpoints are intact, the same command resumes from the newest"
            ) from error
        self.complete.add(self._pending_step)
        if not self.keep:
            return
        kept = kept_checkpoints(sorted(self.complete), self.keep, self._good_before)
        for step in self.complete - kept:
            self._remove(step)
        self.complete &= kept

    def _remove(self, step: int) -> None:
        """Remove a checkpoint, by rank 0; training does not need it removed."""
        if self.world.is_main:
            try:
                self.run.remove_checkpoint(step)
            except RunError as error:
                self.console.warn(str(error))

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
        checkpoint = self.run.checkpoint(step)
        if isinstance(checkpoint, Path):
            # On a network file system other machines may not see its files yet.
            sizes = self.world.from_rank0(
                lambda: {file: file.stat().st_size for file in checkpoint.iterdir()}
            )
            self.world.once_per_node(lambda: await_files(sizes, self.world.rank))
        state = self._state()
        try:
            dcp.load(state, storage_reader=checkpoint_reader(checkpoint))
        except FAILURES as error:
            raise RunError(
                f"{checkpoint} cannot be read ({_cause(error)}); remove it to resume from "
                "the checkpoint before it"
            ) from error
        # Frozen weights are not in it: the model is read from `model.path`.
        options = StateDictOptions(strict=self.student.adapter is None)
        set_model_state_dict(self.student, state["model"], options=options)
        set_optimizer_state_dict(self.student, self.optimizers, state["optimizer"])
        return step

    def _writer(self, checkpoint: Path | str) -> dcp.StorageWriter:
        if isinstance(checkpoint, Path):
            return _Writer(checkpoint)
        return _BucketWriter(checkpoint, self.run)

    def _state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.student, options=TRAINED),
            "optimizer": get_optimizer_state_dict(self.student, self.optimizers),
        }


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
