"""Builds each rank's packs of each step, ahead of use in worker processes.

The step number is the loader's only state: the bytes of a step depend neither on the step at which
loading starts nor on the number of workers.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.context_slice import slice_pack
from redi.engine.data.distributions import Distributions
from redi.engine.data.mismatched import MismatchedTraces
from redi.engine.data.packing import (
    Cost,
    PackedBatch,
    Packing,
    build_batch,
    pack,
    shared_by_pairs,
    shared_in_packs,
)
from redi.engine.data.schedule import Examples, Schedule
from redi.engine.errors import RunError

CONTEXT = "forkserver"
"""How workers start: as forks of a server process that has only imported this module. A fork of the
training process would have copies of the locks of its threads (NCCL, gloo, the CUDA driver), and of
its sockets, so that after a `kill -9` other ranks would not notice a lost connection; and before
rdma-core 35 or on EFA, pinned memory is not safe across a fork. Spawned workers would each import
torch, for seconds."""

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def default_workers(device: torch.device) -> int:
    """Worker processes if the recipe sets none: on a CPU they would take cores from training."""
    return 2 if device.type == "cuda" else 0


def start_worker_server() -> None:
    """Start the process that workers are forked from, which imports torch meanwhile.

    Optional: the first worker would start it too, and training would wait.
    """
    multiprocessing.get_context(CONTEXT).set_forkserver_preload([__name__])
    # Ctrl-C and SIGTERM reach all processes, and only the training process handles them. The
    # server inherits this mask.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@dataclass(frozen=True, slots=True)
class StepBatches:
    """One rank's part of an optimizer step, with counts over all ranks."""

    step: int
    """Counts from 1."""
    micro_batches: list[PackedBatch]
    """This rank's packs, at least one; equally many on every rank, unless `gather` is "step"."""
    units: np.ndarray
    """int64 [B]: the step's units on all ranks, as indices into `Examples.units`."""
    num_sequences: int
    num_positives: int
    """Those with a trained token, as of the negatives."""
    num_negatives: int
    num_targets: int
    """Trained tokens."""
    num_tokens: int
    """All tokens of the sequences, without dummies."""
    shared_tokens: int
    """Those of prompts that are computed once for several traces of a pack, and counted again."""
    micro_steps: int
    """Packs of the rank that has most."""
    rank_efficiency: float
    """See `Packing`."""
    mismatched: list[PackedBatch] = field(default_factory=list)
    """This rank's packs of the step's mismatched rows, if the loss needs them."""

    def pin_memory(self) -> "StepBatches":
        """Copy the step to page-locked memory. Called by a DataLoader with pin_memory."""
        own, mismatched = (
            [batch.pin_memory() for batch in packs]
            for packs in (self.micro_batches, self.mismatched)
        )
        return replace(self, micro_batches=own, mismatched=mismatched)


@dataclass(frozen=True)
class StepLoader(Dataset[StepBatches]):
    """The steps of one rank, by number; `steps` iterates over them."""

    tokens: TokenizedTraces
    examples: Examples
    schedule: Schedule
    _: KW_ONLY
    row_tokens: int
    """Most tokens in a pack."""
    rank: int
    """The rank (or context group) whose packs are built."""
    world_size: int
    """Number of ranks (or context groups)."""
    cost: Cost
    """What packing balances."""
    gather: str = "micro_step"
    """As `[shard] gather`."""
    slice: tuple[int, int] = (0, 1)
    """(index, count): the slice of each pack that is built; see `slice_pack`."""
    workers: int = 0
    """Processes that build steps ahead; 0: each step is built when it is needed."""
    pin: bool = False
    """Put tensors into page-locked memory."""
    teacher: Distributions | None = None
    """Distributions of the traces, if the loss needs them."""
    mismatched: MismatchedTraces | None = None
    """The mismatched rows of the traces, if the loss needs them."""
    share_prompts: bool = False
    """See `build_batch`."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank must be in [0, world_size = {self.world_size}), got {self.rank}"
            )

    def __getitem__(self, step: int) -> StepBatches:
        units = self.schedule.units(step)
        sequences = self.examples.units[units].reshape(-1)
        lengths = self.examples.lengths[sequences]
        shared = None
        if self.share_prompts:
            shared = shared_by_pairs(self.tokens, self.examples.units[units])
        packing = self._pack(lengths, shared)
        mismatched: list[PackedBatch] = []
        if (rows := self.mismatched) is not None:
            of_rows = rows.lengths[sequences]
            mismatched = self._batches(rows, sequences, of_rows, self._pack(of_rows))
        targets = self.tokens.num_targets(sequences, lengths)
        signs = self.tokens.signs[sequences] * (targets > 0)
        return StepBatches(
            step=step,
            micro_batches=self._batches(
                self.tokens, sequences, lengths, packing, self.teacher, self.share_prompts
            ),
            units=units,
            num_sequences=len(sequences),
            num_positives=int(np.sum(signs > 0)),
            num_negatives=int(np.sum(signs < 0)),
            num_targets=int(targets.sum()),
            num_tokens=int(lengths.sum()),
            shared_tokens=self._shared_tokens(sequences, packing),
            micro_steps=len(packing.packs),
            rank_efficiency=packing.rank_efficiency,
            mismatched=mismatched,
        )

    def _pack(self, lengths: np.ndarray, shared: np.ndarray | None = None) -> Packing:
        return pack(
            lengths,
            row_tokens=self.row_tokens,
            world_size=self.world_size,
            cost=self.cost,
            keep_pairs_together=self.examples.keep_pairs_together,
            gather=self.gather,
            shared=shared,
        )

    def _batches(
        self,
        tokens: TokenizedTraces,
        sequences: np.ndarray,
        lengths: np.ndarray,
        packing: Packing,
        teacher: Distributions | None = None,
        share_prompts: bool = False,
    ) -> list[PackedBatch]:
        """This rank's packs."""
        own = [packs[self.rank] for packs in packing.packs]
        if self.gather == "step":  # no dummies, but every rank takes part
            own = [pack for pack in own if len(pack)] or own[:1]
        whole = [
            build_batch(tokens, sequences[pack], lengths[pack], teacher, share_prompts)
            for pack in own
        ]
        return [slice_pack(pack, *self.slice) for pack in whole]

    def _shared_tokens(self, sequences: np.ndarray, packing: Packing) -> int:
        """Over all ranks."""
        if not self.share_prompts:
            return 0
        packs = (sequences[pack] for packs in packing.packs for pack in packs)
        return int(shared_in_packs(self.tokens, packs).sum())

    def steps(self, start_step: int) -> Iterator[StepBatches]:
        """Yield the steps after `start_step`, the last one that is already trained.

        Raises:
            RunError: a worker was killed.
        """
        if self.workers:
            start_worker_server()
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start_step + 1, self.schedule.total_steps + 1),
            num_workers=self.workers,
            multiprocessing_context=CONTEXT if self.workers else None,
            worker_init_fn=_end_with_training,
            pin_memory=self.pin,
            # A separate generator: by default a DataLoader draws from the global one, which
            # dropout uses as well.
            generator=torch.Generator(),
        )
        try:
            yield from loader
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise RunError(
                "a worker process that packs steps was killed, perhaps for lack of memory "
                "(data.workers = 0 packs in the training process); the same command resumes"
            ) from error


def _end_with_training(worker: int) -> None:
    """End this worker as soon as the training process has ended, also by `kill -9`.

    torch's own check is for the parent, which is the server here; and the server ends after its
    workers.
    """
    training = multiprocessing.parent_process()
    assert training is not None

    def watch() -> None:
        training.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
