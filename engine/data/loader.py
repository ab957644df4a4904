"""Serves each rank its rows of each step, built ahead of use by worker processes.

The loader has no state but the step's number: whatever step it starts from and however many
workers it has, a step's bytes are the same.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.packing import Cost, PackedBatch, build_batch, pack
from redi.engine.data.schedule import Examples, Schedule


@dataclass(frozen=True, slots=True)
class StepBatches:
    """One rank's part of an optimizer step, with counts over all ranks."""

    step: int
    """Counts from 1."""
    micro_batches: list[PackedBatch]
    """This rank's rows; every rank has the same number."""
    units: np.ndarray
    """int64 [B]: the step's units (rows of `Examples.units`), of all ranks."""
    num_sequences: int
    num_positives: int
    num_negatives: int
    num_targets: int
    """Trained tokens."""
    num_tokens: int
    """All tokens of the sequences; dummies are not counted."""
    rank_efficiency: float
    """See `Packing`."""

    def pin_memory(self) -> "StepBatches":
        """The same step in page-locked memory (a DataLoader with pin_memory calls this)."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


class _Steps(Dataset[StepBatches]):
    """Steps by number."""

    def __init__(
        self,
        tokens: TokenizedTraces,
        examples: Examples,
        schedule: Schedule,
        row_tokens: int,
        rank: int,
        world_size: int,
        cost: Cost,
    ) -> None:
        self._tokens = tokens
        self._examples = examples
        self._schedule = schedule
        self._row_tokens = row_tokens
        self._rank = rank
        self._world_size = world_size
        self._cost = cost

    def __getitem__(self, step: int) -> StepBatches:
        units = self._schedule.units(step)
        sequences = self._examples.units[units].reshape(-1)
        lengths = self._examples.lengths[sequences]
        packing = pack(
            lengths,
            row_tokens=self._row_tokens,
            world_size=self._world_size,
            cost=self._cost,
            keep_pairs_together=self._examples.keep_pairs_together,
        )
        positives = int(np.sum(self._tokens.signs[sequences] > 0))
        return StepBatches(
            step=step,
            micro_batches=[
                build_batch(self._tokens, sequences[row], lengths[row])
                for row in (rows[self._rank] for rows in packing.rows)
            ],
            units=units,
            num_sequences=len(sequences),
            num_positives=positives,
            num_negatives=len(sequences) - positives,
            num_targets=int(np.sum(lengths - self._tokens.prompt_lengths[sequences])),
            num_tokens=int(lengths.sum()),
            rank_efficiency=packing.rank_efficiency,
        )


def _ignore_interrupts(worker: int) -> None:
    """A Ctrl-C, and torchrun's SIGTERM, reach all processes: only the training process acts.

    Workers end by themselves when it does.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class StepLoader:
    """Iterates over steps; see `steps`."""

    def __init__(
        self,
        tokens: TokenizedTraces,
        examples: Examples,
        schedule: Schedule,
        *,
        row_tokens: int,
        rank: int,
        world_size: int,
        cost: Cost,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        """
        Args:
            tokens, examples, schedule: the data, its units, and their order.
            row_tokens: most tokens in a row.
            rank, world_size: whose rows to serve, of how many ranks.
            cost: what packing balances.
            workers: processes that build steps ahead; with 0 each is built when asked for.
            pin: whether to put tensors into page-locked memory.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
        self._dataset = _Steps(tokens, examples, schedule, row_tokens, rank, world_size, cost)
        self._total_steps = schedule.total_steps
        self._workers = workers
        self._pin = pin

    def steps(self, start_step: int) -> Iterator[StepBatches]:
        """Yields step start_step + 1 (the one after the last that was done) to the last."""
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=range(start_step + 1, self._total_steps + 1),
            num_workers=self._workers,
            pin_memory=self._pin,
            worker_init_fn=_ignore_interrupts,
            # Its own: a DataLoader else draws from the global one, which dropout reads too.
            generator=torch.Generator(),
        )
        yield from loader
