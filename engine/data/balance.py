"""Exchanges sequences between the rows of a step, so that ranks wait less for one another.

Longest-first filling leaves the dearest row of a micro-step a little above the others. One sequence
of such a row at a time is exchanged for a cheaper one of another row, or moved there: whichever of
all exchanges shortens the step most.
"""

from collections.abc import Sequence

import numpy as np

MOST_EXCHANGES = 200
"""In a step; 32 pairs on 8 ranks take 7 on average."""
_SMALLEST_GAIN = 1e-5
"""Of the step's shortest possible time: an exchange that gains less ends the search."""


def balance(
    rows: Sequence[Sequence[int]],
    lengths: np.ndarray,
    costs: np.ndarray,
    *,
    row_tokens: int,
    world_size: int,
) -> list[list[int]]:
    """Lowers the step's time, the sum over micro-steps of the dearest row's cost; it never rises.

    Args:
        rows: the sequences of each row, positions into `lengths`; rows [m * world_size,
            (m + 1) * world_size) are micro-step m. Each holds at most `row_tokens` tokens.
        lengths: int64 [S], tokens of each sequence.
        costs: float64 [S], cost of each sequence.
        row_tokens: most tokens in a row.
        world_size: rows of a micro-step.

    Returns as many rows with the same sequences among them, a function of the arguments alone.
    """
    step = _Step(rows, lengths, costs, row_tokens, world_size)
    shortest = costs.sum() / world_size
    for _ in range(MOST_EXCHANGES):
        if step.time() < shortest * (1 + _SMALLEST_GAIN):
            break
        gain, mine, theirs = max(map(step.best_exchange, range(step.micro_steps)))
        if gain < shortest * _SMALLEST_GAIN:
            break
        step.exchange(mine, theirs)
    return step.rows()


class _Step:
    """R rows and who lies in which. S sequences are followed by R of no length and no cost, one a
    row: to be exchanged for that is to move."""

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        lengths: np.ndarray,
        costs: np.ndarray,
        row_tokens: int,
        world_size: int,
    ) -> None:
        self._num_sequences = len(lengths)
        self._row_tokens = row_tokens
        self._lengths = np.concatenate([lengths, np.zeros(len(rows), dtype=np.int64)])
        self._costs = np.concatenate([costs, np.zeros(len(rows))])
        self._row_of = np.concatenate([np.zeros_like(lengths), np.arange(len(rows))])
        for row, sequences in enumerate(rows):
            self._row_of[list(sequences)] = row
        self.micro_steps = len(rows) // world_size
        self._world_size = world_size
        self._measure()

    def _measure(self) -> None:
        rows = self.micro_steps * self._world_size
        self._tokens = np.bincount(self._row_of, self._lengths, rows)
        self._loads = np.bincount(self._row_of, self._costs, rows)
        # [micro-step, 3]: the dearest rows, and what they cost; a rank that is not there, nothing.
        loads = np.zeros((self.micro_steps, max(3, self._world_size)))
        loads[:, : self._world_size] = self._loads.reshape(self.micro_steps, -1)
        self._dearest = np.argsort(-loads, axis=1, kind="stable")[:, :3]
        self._peaks = np.take_along_axis(loads, self._dearest, axis=1)
        self._dearest += self._world_size * np.arange(self.micro_steps)[:, None]

    def time(self) -> float:
        """Sum over micro-steps of the dearest row's cost."""
        return float(self._peaks[:, 0].sum())

    def best_exchange(self, micro_step: int) -> tuple[float, int, int]:
        """What is best given away by a micro-step's dearest row: (gain, sequence, in return)."""
        row = self._dearest[micro_step, 0]
        mine = np.flatnonzero(self._row_of[: self._num_sequences] == row)
        theirs = np.flatnonzero(self._row_of != row)
        if not (len(mine) and len(theirs)):
            return 0.0, -1, -1
        rows = self._row_of[theirs]
        steps = rows // self._world_size
        tokens = self._lengths[mine][:, None] - self._lengths[theirs]
        cost = self._costs[mine][:, None] - self._costs[theirs]
        allowed = (cost > 0) & (self._tokens[rows] + tokens <= self._row_tokens)
        allowed &= self._tokens[row] - tokens <= self._row_tokens

        # The dearest among the rows that an exchange leaves alone, in its one or two micro-steps.
        first, second, third = self._peaks[micro_step]
        peaks = self._peaks[steps]
        here = steps == micro_step
        rest_here = np.where(rows == self._dearest[micro_step, 1], third, second)
        rest_there = np.where(rows == self._dearest[steps, 0], peaks[:, 1], peaks[:, 0])
        given, taken = self._loads[row] - cost, self._loads[rows] + cost
        after = np.where(
            here,
            np.maximum(np.maximum(given, taken), rest_here),
            np.maximum(given, second) + np.maximum(taken, rest_there),
        )
        before = np.where(here, first, first + peaks[:, 0])
        gains = np.where(allowed, before - after, -np.inf)
        best = int(np.argmax(gains))
        return (
            float(gains.flat[best]),
            int(mine[best // len(theirs)]),
            int(theirs[best % len(theirs)]),
        )

    def exchange(self, mine: int, theirs: int) -> None:
        """Puts either sequence into the other's row."""
        row, other = self._row_of[mine], self._row_of[theirs]
        self._row_of[mine] = other
        if theirs < self._num_sequences:
            self._row_of[theirs] = row
        self._measure()

    def rows(self) -> list[list[int]]:
        """The sequences of each row, rising."""
        sequences = self._row_of[: self._num_sequences]
        rows = range(self.micro_steps * self._world_size)
        return [np.flatnonzero(sequences == row).tolist() for row in rows]
