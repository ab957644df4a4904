"""Lays the sequences of an optimizer step into rows, and a row's sequences into tensors.

Pure functions of their arguments: every rank computes the same packing and needs no word from
the others. Positives and negatives are packed alike; a pair is held together only for objectives
that need its margin.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redi.engine.data.balance import balance
from redi.engine.data.cache import TokenizedTraces

IGNORE = -100
"""Target of a position that is not trained."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What sequences cost to train: `linear` a token, `quadratic` for attention's square."""

    linear: float
    quadratic: float

    def __post_init__(self) -> None:
        if min(self.linear, self.quadratic) < 0 or self.linear + self.quadratic <= 0:
            raise ValueError(f"costs must be at least 0 and not both 0, got {self}")

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """Cost of each sequence, float64 [S]; the cost of a row is the sum over its own."""
        lengths = np.asarray(lengths, dtype=np.float64)
        return self.linear * lengths + self.quadratic * lengths * lengths


@dataclass(frozen=True, slots=True)
class Packing:
    """The rows of one step."""

    rows: tuple[tuple[np.ndarray, ...], ...]
    """rows[micro_step][rank]: int64 positions into `lengths`, rising; empty for a dummy row."""
    rank_efficiency: float
    """Total cost / (ranks x sum over micro-steps of the slowest rank's cost), in (0, 1]."""
    bound: float
    """The most that `rank_efficiency` can be: some rank runs the dearest sequence (or neighbours
    that share a row), and the others cannot have less time for the rest."""


# How far a micro-step may exceed its fair share of the cost that is left: see `_levelled`.
_SLACKS = (1.0, 1.05, 1.1)


def pack(
    lengths: np.ndarray,
    *,
    row_tokens: int,
    world_size: int,
    cost: Cost,
    keep_pairs_together: int = 1,
) -> Packing:
    """Packs sequences into the fewest micro-steps that work, balanced by cost.

    A few layouts are tried and improved by exchanges (`balance`); the one that keeps ranks waiting
    least is taken. Micro-steps come dearest first: what does not fit in memory shows at once.

    Args:
        lengths: int64 [S], each at least 1 and at most `row_tokens`; S at least 1.
        row_tokens: most tokens in a row.
        world_size: ranks; each gets one row a micro-step, an empty one if there is no work.
        cost: what is balanced.
        together: so many neighbours share a row, in their order: 2 for pairs; it divides S.

    Raises ValueError for a length, or a sum over neighbours, outside its range.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size == 0 or lengths.min() < 1 or lengths.max() > row_tokens:
        raise ValueError(f"lengths must be non-empty and in [1, row_tokens = {row_tokens}]")
    if keep_pairs_together > 1:
        return _pack_together(lengths, row_tokens, world_size, cost, keep_pairs_together)
    return _pack(lengths, cost.of(lengths), row_tokens, world_size)


def _pack_together(
    lengths: np.ndarray, row_tokens: int, world_size: int, cost: Cost, keep_pairs_together: int
) -> Packing:
    """Packs groups of neighbours as one sequence each, of their tokens' and costs' sums."""
    tokens = lengths.reshape(-1, keep_pairs_together).sum(axis=1)
    if tokens.max() > row_tokens:
        raise ValueError(
            f"{keep_pairs_together} neighbours must fit into row_tokens = {row_tokens}"
        )
    costs = cost.of(lengths).reshape(-1, keep_pairs_together).sum(axis=1)
    packing = _pack(tokens, costs, row_tokens, world_size)
    members = np.arange(len(lengths)).reshape(-1, keep_pairs_together)
    rows = tuple(tuple(members[row].reshape(-1) for row in step) for step in packing.rows)
    return replace(packing, rows=rows)


def _pack(lengths: np.ndarray, costs: np.ndarray, row_tokens: int, world_size: int) -> Packing:
    filler = _Filler(lengths, costs, row_tokens)
    micro_steps = -(-int(lengths.sum()) // (row_tokens * world_size))
    while True:
        layouts = [_even(filler, micro_steps, world_size)]
        if micro_steps > 1 and world_size > 1:
            layouts += [_levelled(filler, micro_steps, world_size, slack) for slack in _SLACKS]
        found = [_packing(rows, costs, world_size) for rows in layouts if rows is not None]
        if found:
            found += [_balanced(packing, lengths, costs, row_tokens) for packing in found]
            return max(found, key=lambda packing: packing.rank_efficiency)
        micro_steps += 1


@dataclass(frozen=True, slots=True)
class _Filler:
    """Fills rows longest first, each sequence into the cheapest row that has room."""

    lengths: np.ndarray
    costs: np.ndarray
    row_tokens: int

    def fill(
        self, sequences: np.ndarray, num_rows: int, limit: float
    ) -> tuple[list[list[int]], np.ndarray]:
        """Rows of at most `row_tokens` and of cost at most `limit`, and what found no room.

        `sequences` are positions, longest first; so is what is left.
        """
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        tokens = np.zeros(num_rows, dtype=np.int64)
        load = np.zeros(num_rows)
        left = []
        for index in sequences.tolist():
            fits = tokens + self.lengths[index] <= self.row_tokens
            fits &= load + self.costs[index] <= limit
            row = int(np.argmin(np.where(fits, load, np.inf)))
            if not fits[row]:
                left.append(index)
                continue
            rows[row].append(index)
            tokens[row] += self.lengths[index]
            load[row] += self.costs[index]
        return rows, np.array(left, dtype=np.int64)

    def longest_first(self) -> np.ndarray:
        """All positions, int64 [S]."""
        return np.argsort(-self.lengths, kind="stable")


def _even(filler: _Filler, micro_steps: int, world_size: int) -> list[list[int]] | None:
    """All rows of the step as equal as can be; None if the sequences do not fit."""
    rows, left = filler.fill(filler.longest_first(), micro_steps * world_size, np.inf)
    return None if left.size else rows


def _levelled(
    filler: _Filler, micro_steps: int, world_size: int, slack: float
) -> list[list[int]] | None:
    """One micro-step after another, each up to a level of its own; None if they do not fit.

    A sequence that costs more than a fair share makes the other ranks wait. Then it is better
    for its whole micro-step to be as dear, and for a later one to be cheaper: with 32 pairs of
    up to 19,800 tokens on 8 ranks this lifts the efficiency from 0.90 to 0.99.
    """
    rows: list[list[int]] = []
    left = filler.longest_first()
    for micro_step in range(micro_steps):
        limit = np.inf
        if micro_step < micro_steps - 1 and left.size:
            costs = filler.costs[left]
            share = costs.sum() / (world_size * (micro_steps - micro_step))
            limit = slack * max(costs.max(), share)
        filled, left = filler.fill(left, world_size, limit)
        rows += filled
    return None if left.size else rows


def _packing(rows: list[list[int]], costs: np.ndarray, world_size: int) -> Packing:
    """Rows of similar cost share a micro-step."""
    row_costs = np.array([costs[row].sum() for row in rows])
    by_cost = np.argsort(-row_costs, kind="stable").reshape(-1, world_size)
    slowest = row_costs[by_cost].max(axis=1).sum()
    return Packing(
        tuple(tuple(np.array(sorted(rows[i]), dtype=np.int64) for i in step) for step in by_cost),
        float(costs.sum() / (world_size * slowest)),
        min(1.0, float(costs.sum() / (world_size * costs.max()))),
    )


def _balanced(packing: Packing, lengths: np.ndarray, costs: np.ndarray, row_tokens: int) -> Packing:
    world_size = len(packing.rows[0])
    rows = [row.tolist() for step in packing.rows for row in step]
    rows = balance(rows, lengths, costs, row_tokens=row_tokens, world_size=world_size)
    return _packing(rows, costs, world_size)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One row: S documents laid end to end, T tokens in all, without padding."""

    input_ids: Tensor
    """int64 [T]."""
    position_ids: Tensor
    """int64 [T], from 0 in each document."""
    cu_seqlens: Tensor
    """int32 [S + 1]: document s is [cu_seqlens[s], cu_seqlens[s + 1])."""
    targets: Tensor
    """int64 [T], already shifted: targets[t] is the token that position t predicts. IGNORE but
    where that token belongs to the completion; a document's last position predicts nothing."""
    signs: Tensor
    """int64 [S]: +1, -1, or 0 for a dummy."""
    weights: Tensor | None
    """float32 [S], or None if all are 1."""
    valid_index: Tensor
    """int64 [N]: the positions whose target is not IGNORE, those of positives first."""
    num_positive_targets: int
    """How many of them are a positive's."""
    num_targets: Tensor
    """int64 [S]: trained tokens of each document, |y|."""
    full_targets: Tensor
    """int64 [S]: tokens of each completion before truncation, with its end."""
    sequence_ids: Tensor
    """int64 [S]: indices of traces; -1 for a dummy."""
    max_seqlen: int
    """Tokens of the longest document."""
    is_dummy: bool
    """Whether this is a row without work, that a rank runs only because the others run one."""

    @property
    def num_tokens(self) -> int:
        """Tokens of real documents: T, or 0 for a dummy."""
        return 0 if self.is_dummy else len(self.input_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """The same row on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """The same row in page-locked memory (a DataLoader with pin_memory calls this)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PackedBatch":
        values: list[Any] = [function(v) if isinstance(v, Tensor) else v for v in self._values()]
        return PackedBatch(*values)

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def __reduce__(self) -> tuple[Callable[..., "PackedBatch"], tuple[Any, ...]]:
        # As arrays: a tensor sent between processes holds a file descriptor each, and a step's
        # worth of prefetched rows would use up the few that a process may have.
        return _from_arrays, tuple(
            v.numpy() if isinstance(v, Tensor) else v for v in self._values()
        )


def _from_arrays(*values: Any) -> PackedBatch:
    arrays: list[Any] = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]
    return PackedBatch(*arrays)


def build_batch(
    tokens: TokenizedTraces, sequence_ids: np.ndarray, lengths: np.ndarray
) -> PackedBatch:
    """Lays traces end to end.

    Args:
        tokens: the data set.
        sequence_ids: int64 [S], the traces of this row; with none, it is a dummy row.
        lengths: int64 [S], how much of each is kept: `Examples.lengths[sequence_ids]`, each
            longer than the trace's prompt.
    """
    if len(lengths) != len(sequence_ids):
        raise ValueError(f"got {len(lengths)} lengths for {len(sequence_ids)} sequences")
    if len(sequence_ids) == 0:
        return _dummy_batch()
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    input_ids = np.empty(total, dtype=np.int64)
    for index, start, length in zip(sequence_ids, starts, lengths, strict=False):
        input_ids[start : start + length] = tokens.ids(int(index))[:length]
    position_ids = np.arange(total) - np.repeat(starts[:-1], lengths)

    # The completion's first token is predicted from the prompt's last position.
    prompt_lengths = tokens.prompt_lengths[sequence_ids]
    first_valid = np.repeat(prompt_lengths - 1, lengths)
    last = np.repeat(lengths - 1, lengths)
    valid_index = np.flatnonzero((position_ids >= first_valid) & (position_ids < last))
    targets = np.full(total, IGNORE, dtype=np.int64)
    targets[valid_index] = input_ids[valid_index + 1]
    positive = np.repeat(tokens.signs[sequence_ids] > 0, lengths)[valid_index]
    valid_index = np.concatenate([valid_index[positive], valid_index[~positive]])

    weights = tokens.weights[sequence_ids]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        targets=torch.from_numpy(targets),
        signs=torch.from_numpy(tokens.signs[sequence_ids].astype(np.int64)),
        weights=None if np.all(weights == 1) else torch.from_numpy(weights),
        valid_index=torch.from_numpy(valid_index),
        num_positive_targets=int(positive.sum()),
        num_targets=torch.from_numpy(lengths - prompt_lengths),
        full_targets=torch.from_numpy(tokens.lengths[sequence_ids] - prompt_lengths),
        sequence_ids=torch.from_numpy(np.array(sequence_ids, dtype=np.int64)),
        max_seqlen=int(lengths.max()),
        is_dummy=False,
    )


def _dummy_batch() -> PackedBatch:
    """One token that is not trained: transformers cannot run a row of none."""
    return PackedBatch(
        input_ids=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        targets=torch.full((1,), IGNORE, dtype=torch.int64),
        signs=torch.zeros(1, dtype=torch.int64),
        weights=None,
        valid_index=torch.zeros(0, dtype=torch.int64),
        num_positive_targets=0,
        num_targets=torch.zeros(1, dtype=torch.int64),
        full_targets=torch.zeros(1, dtype=torch.int64),
        sequence_ids=torch.full((1,), -1, dtype=torch.int64),
        max_seqlen=1,
        is_dummy=True,
    )
