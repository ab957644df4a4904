"""Packs the sequences of an optimizer step, and makes the tensors of a pack.

All functions are pure: every rank computes the same packing without communication. Positives and
negatives are packed alike. A pair shares a pack if the objective needs its margin, or if the prompt
that both can share makes the step shorter.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.distributions import PADDING, Distributions

IGNORE = -100
"""Target of a position that is not trained."""

# How far a micro-step may exceed its fair share of the remaining cost: see `_levelled`.
_SLACKS = (1.0, 1.05, 1.1)

MAX_EXCHANGES = 200
"""Per step; 32 pairs on 8 ranks take 7 on average."""
_MIN_GAIN = 1e-5
"""Share of the step's shortest possible time. The search ends when an exchange gains less."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of training a sequence: linear in its length, plus attention over pairs of tokens.

    A causal sequence of n tokens has n^2 / 2 pairs; with a window of w < n of them w (2 n - w) / 2.
    """

    linear: float
    quadratic: float
    """Of half a pair of tokens, in the layers without a window."""
    windows: tuple[tuple[int, float], ...] = ()
    """(w, cost of half a pair) of the layers with a window of w tokens."""
    trained: float = 0.0
    """What of `linear` only trained tokens cost: lm_head."""

    def __post_init__(self) -> None:
        attention = [self.quadratic, *(cost for _, cost in self.windows)]
        if min(self.linear, *attention) < 0 or self.linear + sum(attention) <= 0:
            raise ValueError(f"costs must be at least 0 and not both 0, got {self}")

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """Cost of each sequence, float64 [S]. The cost of a pack is the sum over its sequences."""
        lengths = np.asarray(lengths, dtype=np.float64)
        cost = self.linear * lengths + self.quadratic * lengths * lengths
        for window, half_pair in self.windows:
            seen = np.minimum(lengths, window)
            cost += half_pair * seen * (2 * lengths - seen)
        return cost

    def of_shared(self, tokens: np.ndarray) -> np.ndarray:
        """Cost saved by tokens of prompts that a pack has once; attention computes them again."""
        return (self.linear - self.trained) * tokens

    def attention_times(self, factor: float) -> "Cost":
        """The same with attention `factor` times as expensive."""
        windows = tuple((window, factor * cost) for window, cost in self.windows)
        return replace(self, quadratic=factor * self.quadratic, windows=windows)


@dataclass(frozen=True, slots=True)
class Packing:
    """The packs of one step."""

    packs: tuple[tuple[np.ndarray, ...], ...]
    """packs[micro_step][rank]: int64 positions into `lengths`, ascending; empty if the rank has no
    work in this micro-step."""
    rank_efficiency: float
    """Total cost / (ranks x sum over micro-steps of the slowest rank's cost), in (0, 1]. With
    gather "step": total cost / (ranks x cost of the slowest rank)."""
    bound: float
    """Upper bound of `rank_efficiency`: the step takes at least as long as its most expensive
    sequence (or group of neighbours that share a pack)."""


def pack(
    lengths: np.ndarray,
    *,
    row_tokens: int,
    world_size: int,
    cost: Cost,
    keep_pairs_together: int = 1,
    gather: str = "micro_step",
    shared: np.ndarray | None = None,
) -> Packing:
    """Pack sequences into the fewest micro-steps that work, balanced by cost.

    Several layouts are built and improved by exchanges (`balance`); the one with the highest rank
    efficiency is returned. The most expensive micro-step comes first (of each rank, with gather
    "step"), so that a step that does not fit into memory fails at once.

    Args:
        lengths: int64 [S], each at least 1 and at most `row_tokens`; S at least 1.
        row_tokens: most tokens in a pack.
        world_size: number of ranks. Each gets one pack per micro-step, possibly empty.
        cost: what is balanced.
        keep_pairs_together: number of neighbouring sequences that share a pack, in their order: 2
            for pairs. It divides S.
        gather: as `[shard] gather`. "micro_step": ranks wait for each other in each micro-step.
            "step": only at the end of the step, so packs of one micro-step may differ in cost.
        shared: int64 [S / 2], tokens that neighbours 2i and 2i + 1 share in one pack, which then
            cost nothing for the second but in attention. A step that is shorter for it keeps all
            pairs together, if each fits: short traces save much, long ones are better balanced
            apart. What pairs save that meet by chance is not counted.

    Raises:
        ValueError: a length, or the sum over neighbours, is out of range.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size == 0 or lengths.min() < 1 or lengths.max() > row_tokens:
        raise ValueError(f"lengths must be non-empty and in [1, row_tokens = {row_tokens}]")
    way = _pack if gather == "micro_step" else _pack_each_rank
    costs = cost.of(lengths)
    saved = np.zeros(len(lengths))
    if shared is not None:
        saved[1::2] = cost.of_shared(shared)
    together = partial(_pack_together, lengths, costs - saved, row_tokens, world_size, way=way)
    if keep_pairs_together > 1:
        return together(keep_pairs_together)
    apart = way(lengths, costs, row_tokens, world_size)
    if not saved.any() or lengths.reshape(-1, 2).sum(axis=1).max() > row_tokens:
        return apart
    of_pairs = together(2)
    # A step takes its cost / (ranks x efficiency).
    with_pairs = np.sum(costs - saved) / of_pairs.rank_efficiency
    return of_pairs if with_pairs < costs.sum() / apart.rank_efficiency else apart


def _pack_together(
    lengths: np.ndarray,
    costs: np.ndarray,
    row_tokens: int,
    world_size: int,
    keep_pairs_together: int,
    way: Callable[[np.ndarray, np.ndarray, int, int], Packing],
) -> Packing:
    """Pack each group of neighbours as one sequence, with the sums of their tokens and costs."""
    tokens = lengths.reshape(-1, keep_pairs_together).sum(axis=1)
    if tokens.max() > row_tokens:
        raise ValueError(
            f"{keep_pairs_together} neighbours must fit into row_tokens = {row_tokens}"
        )
    of_groups = costs.reshape(-1, keep_pairs_together).sum(axis=1)
    packing = way(tokens, of_groups, row_tokens, world_size)
    members = np.arange(len(lengths)).reshape(-1, keep_pairs_together)
    packs = tuple(tuple(members[groups].reshape(-1) for groups in step) for step in packing.packs)
    return replace(packing, packs=packs)


def _pack(lengths: np.ndarray, costs: np.ndarray, row_tokens: int, world_size: int) -> Packing:
    filler = _Filler(lengths, costs, row_tokens)
    micro_steps = -(-int(lengths.sum()) // (row_tokens * world_size))
    while True:
        layouts = [_even(filler, micro_steps, world_size)]
        if micro_steps > 1 and world_size > 1:
            layouts += [_levelled(filler, micro_steps, world_size, slack) for slack in _SLACKS]
        found = [_packing(packs, costs, world_size) for packs in layouts if packs is not None]
        if found:
            found += [_balanced(packing, lengths, costs, row_tokens) for packing in found]
            return max(found, key=lambda packing: packing.rank_efficiency)
        micro_steps += 1


def _pack_each_rank(
    lengths: np.ndarray, costs: np.ndarray, row_tokens: int, world_size: int
) -> Packing:
    """Divide the sequences over the ranks by cost, then those of each rank into packs.

    A rank's time is the cost of all its packs. So the division is that of a single micro-step whose
    packs have room for everything.
    """
    whole = _pack(lengths, costs, int(lengths.sum()), world_size)
    ranks = []
    for own in whole.packs[0]:
        rows = _pack(lengths[own], costs[own], row_tokens, 1).packs if len(own) else ()
        ranks.append([own[row] for (row,) in rows])
    nothing = np.zeros(0, dtype=np.int64)
    return replace(whole, packs=tuple(zip_longest(*ranks, fillvalue=nothing)))


@dataclass(frozen=True, slots=True)
class _Filler:
    """Fills packs longest first: each sequence goes to the cheapest pack that has room."""

    lengths: np.ndarray
    costs: np.ndarray
    row_tokens: int

    def fill(
        self, sequences: np.ndarray, num_packs: int, limit: float
    ) -> tuple[list[list[int]], np.ndarray]:
        """Fill packs of at most `row_tokens` tokens and a cost of at most `limit`.

        Args:
            sequences: int64 positions, longest first.
            num_packs: number of packs.
            limit: highest cost of a pack.

        Returns:
            The packs, and the sequences that fit nowhere, longest first.
        """
        packs: list[list[int]] = [[] for _ in range(num_packs)]
        tokens = np.zeros(num_packs, dtype=np.int64)
        load = np.zeros(num_packs)
        left = []
        for index in sequences.tolist():
            fits = tokens + self.lengths[index] <= self.row_tokens
            fits &= load + self.costs[index] <= limit
            cheapest = int(np.argmin(np.where(fits, load, np.inf)))
            if not fits[cheapest]:
                left.append(index)
                continue
            packs[cheapest].append(index)
            tokens[cheapest] += self.lengths[index]
            load[cheapest] += self.costs[index]
        return packs, np.array(left, dtype=np.int64)

    def longest_first(self) -> np.ndarray:
        """All positions, int64 [S]."""
        return np.argsort(-self.lengths, kind="stable")


def _even(filler: _Filler, micro_steps: int, world_size: int) -> list[list[int]] | None:
    """Make all packs of the step as equal as possible; None if the sequences do not fit."""
    packs, left = filler.fill(filler.longest_first(), micro_steps * world_size, np.inf)
    return None if left.size else packs


def _levelled(
    filler: _Filler, micro_steps: int, world_size: int, slack: float
) -> list[list[int]] | None:
    """Fill one micro-step after another, each up to its own level; None if they do not fit.

    A sequence that costs more than a fair share makes the other ranks wait. It is then better to
    fill its whole micro-step up to that cost and make a later micro-step cheaper. Where packs are
    no longer than the longest trace, this gains up to 0.07 of efficiency over exchanges alone (64
    pairs on 32 ranks); in packs 1.7 times as long, at most 0.004.
    """
    packs: list[list[int]] = []
    left = filler.longest_first()
    for micro_step in range(micro_steps):
        limit = np.inf
        if micro_step < micro_steps - 1 and left.size:
            costs = filler.costs[left]
            share = costs.sum() / (world_size * (micro_steps - micro_step))
            limit = slack * max(costs.max(), share)
        filled, left = filler.fill(left, world_size, limit)
        packs += filled
    return None if left.size else packs


def _packing(packs: list[list[int]], costs: np.ndarray, world_size: int) -> Packing:
    """Group packs of similar cost into micro-steps."""
    pack_costs = np.array([costs[sequences].sum() for sequences in packs])
    by_cost = np.argsort(-pack_costs, kind="stable").reshape(-1, world_size)
    slowest = pack_costs[by_cost].max(axis=1).sum()
    return Packing(
        tuple(tuple(np.array(sorted(packs[i]), dtype=np.int64) for i in step) for step in by_cost),
        float(costs.sum() / (world_size * slowest)),
        min(1.0, float(costs.sum() / (world_size * costs.max()))),
    )


def _balanced(packing: Packing, lengths: np.ndarray, costs: np.ndarray, row_tokens: int) -> Packing:
    world_size = len(packing.packs[0])
    packs = [sequences.tolist() for step in packing.packs for sequences in step]
    packs = balance(packs, lengths, costs, row_tokens=row_tokens, world_size=world_size)
    return _packing(packs, costs, world_size)


def balance(
    packs: Sequence[Sequence[int]],
    lengths: np.ndarray,
    costs: np.ndarray,
    *,
    row_tokens: int,
    world_size: int,
) -> list[list[int]]:
    """Shorten a step by exchanging sequences between its packs.

    The time of a step is the sum over micro-steps of the cost of the most expensive pack. It never
    increases. Longest-first filling leaves that pack slightly above the others. One sequence of it
    at a time is exchanged for a cheaper one of another pack, or moved there; of all exchanges the
    one that shortens the step most is made.

    Args:
        packs: the sequences of each pack, positions into `lengths`. Packs [m * world_size,
            (m + 1) * world_size) form micro-step m. Each holds at most `row_tokens` tokens.
        lengths: int64 [S], tokens of each sequence.
        costs: float64 [S], cost of each sequence.
        row_tokens: most tokens in a pack.
        world_size: packs per micro-step.

    Returns:
        The same number of packs with the same sequences. Equal arguments give an equal result.
    """
    step = _Step(packs, lengths, costs, row_tokens, world_size)
    shortest = costs.sum() / world_size
    for _ in range(MAX_EXCHANGES):
        if step.time() < shortest * (1 + _MIN_GAIN):
            break
        gain, mine, theirs = max(map(step.best_exchange, range(step.micro_steps)))
        if gain < shortest * _MIN_GAIN:
            break
        step.exchange(mine, theirs)
    return step.packs()


class _Step:
    """The P packs of a step and the pack of each sequence.

    The S sequences are followed by P empty ones without cost, one per pack: an exchange for an
    empty sequence is a move.
    """

    def __init__(
        self,
        packs: Sequence[Sequence[int]],
        lengths: np.ndarray,
        costs: np.ndarray,
        row_tokens: int,
        world_size: int,
    ) -> None:
        self._num_sequences = len(lengths)
        self._row_tokens = row_tokens
        self._lengths = np.concatenate([lengths, np.zeros(len(packs), dtype=np.int64)])
        self._costs = np.concatenate([costs, np.zeros(len(packs))])
        self._pack_of = np.concatenate([np.zeros_like(lengths), np.arange(len(packs))])
        for number, sequences in enumerate(packs):
            self._pack_of[list(sequences)] = number
        self.micro_steps = len(packs) // world_size
        self._world_size = world_size
        self._measure()

    def _measure(self) -> None:
        count = self.micro_steps * self._world_size
        self._tokens = np.bincount(self._pack_of, self._lengths, count)
        self._loads = np.bincount(self._pack_of, self._costs, count)
        # [micro-step, 3]: the most expensive packs and their costs; 0 for a rank that is missing.
        loads = np.zeros((self.micro_steps, max(3, self._world_size)))
        loads[:, : self._world_size] = self._loads.reshape(self.micro_steps, -1)
        self._largest = np.argsort(-loads, axis=1, kind="stable")[:, :3]
        self._peaks = np.take_along_axis(loads, self._largest, axis=1)
        self._largest += self._world_size * np.arange(self.micro_steps)[:, None]

    def time(self) -> float:
        """Sum over micro-steps of the most expensive pack's cost."""
        return float(self._peaks[:, 0].sum())

    def best_exchange(self, micro_step: int) -> tuple[float, int, int]:
        """The best exchange for the most expensive pack of a micro-step.

        Returns:
            (gain, sequence given away, sequence received).
        """
        largest = self._largest[micro_step, 0]
        mine = np.flatnonzero(self._pack_of[: self._num_sequences] == largest)
        theirs = np.flatnonzero(self._pack_of != largest)
        if not (len(mine) and len(theirs)):
            return 0.0, -1, -1
        others = self._pack_of[theirs]
        steps = others // self._world_size
        tokens = self._lengths[mine][:, None] - self._lengths[theirs]
        cost = self._costs[mine][:, None] - self._costs[theirs]
        allowed = self._tokens[others] + tokens <= self._row_tokens
        allowed &= self._tokens[largest] - tokens <= self._row_tokens

        # The most expensive pack that an exchange does not touch, in its one or two micro-steps.
        first, second, third = self._peaks[micro_step]
        peaks = self._peaks[steps]
        here = steps == micro_step
        rest_here = np.where(others == self._largest[micro_step, 1], third, second)
        rest_there = np.where(others == self._largest[steps, 0], peaks[:, 1], peaks[:, 0])
        given, taken = self._loads[largest] - cost, self._loads[others] + cost
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
        """Put each of two sequences into the pack of the other."""
        own, other = self._pack_of[mine], self._pack_of[theirs]
        self._pack_of[mine] = other
        if theirs < self._num_sequences:
            self._pack_of[theirs] = own
        self._measure()

    def packs(self) -> list[list[int]]:
        """The sequences of each pack, ascending."""
        pack_of = self._pack_of[: self._num_sequences]
        numbers = range(self.micro_steps * self._world_size)
        return [np.flatnonzero(pack_of == number).tolist() for number in numbers]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One pack: S documents end to end, T tokens in total, without padding."""

    input_ids: Tensor
    """int64 [T]."""
    position_ids: Tensor
    """int64 [T], restarting at 0 in each document."""
    cu_seqlens: Tensor
    """int32 [S + 1]: document s is [cu_seqlens[s], cu_seqlens[s + 1])."""
    targets: Tensor
    """int64 [T], already shifted: targets[t] is the token that position t predicts. IGNORE unless
    that token belongs to the completion and is not masked; the last position of a document is
    always IGNORE."""
    signs: Tensor
    """int64 [S]: +1, -1, or 0 for a dummy."""
    weights: Tensor | None
    """float32 [S], or None if all are 1."""
    valid_index: Tensor
    """int64 [N]: positions whose target is not IGNORE; those of positives come first."""
    num_positive_targets: int
    """Number of entries of `valid_index` that belong to positives."""
    target_counts: tuple[int, ...]
    """Trained tokens of each document on the host, in the order of `valid_index`."""
    num_targets: Tensor
    """int64 [S]: trained tokens of each document, |y|."""
    full_targets: Tensor
    """int64 [S]: tokens to train of each completion with its end, before truncation."""
    sequence_ids: Tensor
    """int64 [S]: indices of traces; -1 for a dummy."""
    max_seqlen: int
    """Tokens of the longest document."""
    is_dummy: bool
    """True for a pack without work, which a rank runs only because other ranks run one."""
    token_weights: Tensor | None = None
    """float32 [T], the weight of each target; None if all in `valid_index` are 1. A token of weight
    0 is no target."""
    teacher_ids: Tensor | None = None
    """int32 [T, K]: the tokens of a teacher's distribution of what each position predicts, -1 where
    it has fewer; None if the loss needs none."""
    teacher_logps: Tensor | None = None
    """float16 [T, K]: their log-probs; -inf where there is none."""
    row_cu_seqlens: Tensor | None = None
    """int32: boundaries of the documents that attention runs on if they are not those of
    `cu_seqlens`: of a slice those of the whole pack with its padding (`slice_pack`), with shared
    prompts those of whole traces."""
    padding: int = 0
    """Tokens at the end that are of no trace."""
    attended: Tensor | None = None
    """int64 [U]: for each token of whole traces its position in the pack; None unless traces share
    prompts."""
    own: Tensor | None = None
    """int64 [T]: for each position the place of its token in `attended`, in the trace that has it
    in the pack; None likewise."""

    @property
    def documents(self) -> Tensor:
        """int32: boundaries of the documents that attention runs on."""
        return self.cu_seqlens if self.row_cu_seqlens is None else self.row_cu_seqlens

    @property
    def num_tokens(self) -> int:
        """Tokens of real documents, which come first; 0 for a dummy."""
        return 0 if self.is_dummy else len(self.input_ids) - self.padding

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Copy the pack to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """Copy the pack to page-locked memory. Called by a DataLoader with pin_memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PackedBatch":
        values: list[Any] = [function(v) if isinstance(v, Tensor) else v for v in self._values()]
        return PackedBatch(*values)

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def __reduce__(self) -> tuple[Callable[..., "PackedBatch"], tuple[Any, ...]]:
        # As arrays: each tensor that is sent between processes holds a file descriptor, and the
        # prefetched packs of one step could exceed a process's limit.
        return _from_arrays, tuple(
            v.numpy() if isinstance(v, Tensor) else v for v in self._values()
        )


def _from_arrays(*values: Any) -> PackedBatch:
    arrays: list[Any] = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]
    return PackedBatch(*arrays)


def build_batch(
    tokens: TokenizedTraces,
    sequence_ids: np.ndarray,
    lengths: np.ndarray,
    teacher: Distributions | None = None,
    share_prompts: bool = False,
) -> PackedBatch:
    """Make the tensors of one pack.

    Args:
        tokens: the data set.
        sequence_ids: int64 [S], the traces of the pack. If empty, the pack is a dummy.
        lengths: int64 [S], number of tokens of each trace that are kept,
            `Examples.lengths[sequence_ids]`; each exceeds the length of the prompt.
        teacher: distributions of the traces, if the loss needs them.
        share_prompts: of traces with equal prompts only the first has its prompt in the pack. The
            others start with its last token, which predicts another one in each.

    Raises:
        ValueError: the two arrays differ in length.
    """
    if len(lengths) != len(sequence_ids):
        raise ValueError(f"got {len(lengths)} lengths for {len(sequence_ids)} sequences")
    if len(sequence_ids) == 0:
        return _dummy_batch()
    prompt_lengths = tokens.prompt_lengths[sequence_ids]
    sources, shared = np.arange(len(lengths)), np.zeros_like(lengths)
    if share_prompts:
        sources, shared = shared_prompts(tokens, sequence_ids)
    kept = lengths - shared
    starts = np.concatenate([[0], np.cumsum(kept)])
    total = int(starts[-1])
    input_ids = np.empty(total, dtype=np.int64)
    for index, start, first, end in zip(sequence_ids, starts, shared, lengths, strict=False):
        input_ids[start : start + end - first] = tokens.ids(int(index))[first:end]
    position_ids = np.arange(total) - np.repeat(starts[:-1] - shared, kept)

    # The completion's first token is predicted from the prompt's last position.
    first_valid = np.repeat(prompt_lengths - 1, kept)
    last = np.repeat(lengths - 1, kept)
    valid_index = np.flatnonzero((position_ids >= first_valid) & (position_ids < last))
    first_targets = starts[:-1] - shared + prompt_lengths - 1
    token_weights = _token_weights(tokens, sequence_ids, starts, first_targets)
    if token_weights is not None:
        valid_index = valid_index[token_weights[valid_index] != 0]
        if np.all(token_weights[valid_index] == 1):
            token_weights = None
    targets = np.full(total, IGNORE, dtype=np.int64)
    targets[valid_index] = input_ids[valid_index + 1]
    positive = np.repeat(tokens.signs[sequence_ids] > 0, kept)[valid_index]
    valid_index = np.concatenate([valid_index[positive], valid_index[~positive]])

    teacher_ids = teacher_logps = None
    if teacher is not None:
        found = _distributions(tokens, teacher, sequence_ids, starts, first_targets)
        teacher_ids, teacher_logps = found
    weights, signs = tokens.weights[sequence_ids], tokens.signs[sequence_ids]
    num_targets = tokens.num_targets(sequence_ids, lengths)
    whole = _whole_traces(lengths, starts, sources, shared) if shared.any() else {}
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        targets=torch.from_numpy(targets),
        signs=torch.from_numpy(signs.astype(np.int64)),
        weights=None if np.all(weights == 1) else torch.from_numpy(weights),
        valid_index=torch.from_numpy(valid_index),
        num_positive_targets=int(positive.sum()),
        target_counts=(*num_targets[signs > 0].tolist(), *num_targets[signs <= 0].tolist()),
        num_targets=torch.from_numpy(num_targets),
        full_targets=torch.from_numpy(
            tokens.num_targets(sequence_ids, tokens.lengths[sequence_ids])
        ),
        sequence_ids=torch.from_numpy(np.array(sequence_ids, dtype=np.int64)),
        max_seqlen=int(lengths.max()),
        is_dummy=False,
        token_weights=None if token_weights is None else torch.from_numpy(token_weights),
        teacher_ids=teacher_ids,
        teacher_logps=teacher_logps,
        **whole,
    )


def shared_prompts(
    tokens: TokenizedTraces, sequence_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which traces of a pack can use the prompt of another one.

    Args:
        tokens: the data set.
        sequence_ids: int64 [S], the traces of the pack.

    Returns:
        int64 [S], the place of the first trace with an equal prompt, and int64 [S], the tokens that
        a trace shares with it: all of its prompt but the last; 0 for the first one itself.
    """
    prompts = tokens.prompt_digests[sequence_ids]
    _, first, prompt = np.unique(prompts, return_index=True, return_inverse=True)
    sources = first[prompt]
    again = sources != np.arange(len(sources))
    return sources, np.where(again, _all_but_last(tokens, sequence_ids), 0)


def shared_in_packs(tokens: TokenizedTraces, packs: Iterable[np.ndarray]) -> np.ndarray:
    """Tokens of prompts that the traces of each pack share, int64 [packs]; see `shared_prompts`."""
    return np.array([shared_prompts(tokens, pack)[1].sum() for pack in packs], dtype=np.int64)


def shared_by_pairs(tokens: TokenizedTraces, pairs: np.ndarray) -> np.ndarray | None:
    """Tokens of a prompt that the traces of each pair can share in a pack, int64 [P].

    Args:
        pairs: int64 [P, 2] or [P, 1], the traces of units; None is returned for single ones.
    """
    if pairs.shape[1] == 1:
        return None
    first, second = tokens.prompt_digests[pairs].T
    return np.where(first == second, _all_but_last(tokens, pairs[:, 0]), 0)


def _all_but_last(tokens: TokenizedTraces, traces: np.ndarray) -> np.ndarray:
    """Tokens of each trace's prompt before its last."""
    return np.maximum(tokens.prompt_lengths[traces] - 1, 0)


def _whole_traces(
    lengths: np.ndarray, starts: np.ndarray, sources: np.ndarray, shared: np.ndarray
) -> dict[str, Any]:
    """The fields of a pack with shared prompts that attention needs; see `shared_prompts`.

    Args:
        lengths: int64 [S], tokens of each trace.
        starts: int64 [S + 1], boundaries of what each has in the pack.
    """
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    is_own = place >= np.repeat(shared, lengths)
    start = np.where(
        is_own, np.repeat(starts[:-1] - shared, lengths), np.repeat(starts[sources], lengths)
    )
    return {
        "row_cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
        "attended": torch.from_numpy(start + place),
        "own": torch.from_numpy(np.flatnonzero(is_own)),
    }


def _distributions(
    tokens: TokenizedTraces,
    teacher: Distributions,
    sequence_ids: np.ndarray,
    starts: np.ndarray,
    first_targets: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """`teacher_ids` and `teacher_logps` of a pack."""
    ids = np.full((int(starts[-1]), teacher.kept), PADDING, np.int32)
    logps = np.full(ids.shape, -np.inf, np.float16)
    for place, index in enumerate(sequence_ids.tolist()):
        prompt = int(tokens.prompt_lengths[index])
        found = teacher.of(index, int(tokens.lengths[index]) - prompt)
        first, end = first_targets[place], starts[place + 1] - 1
        ids[first:end], logps[first:end] = (part[: end - first] for part in found)
    return torch.from_numpy(ids), torch.from_numpy(logps)


def _token_weights(
    tokens: TokenizedTraces,
    sequence_ids: np.ndarray,
    starts: np.ndarray,
    first_targets: np.ndarray,
) -> np.ndarray | None:
    """Weight of the token that each position predicts, float32 [T]; None if all are 1.

    Args:
        starts: int64 [S + 1], boundaries of the documents.
        first_targets: int64 [S], the position that predicts a completion's first token.
    """
    if not tokens.weighted[sequence_ids].any():
        return None
    found = np.ones(int(starts[-1]), dtype=np.float32)
    for place, index in enumerate(sequence_ids.tolist()):
        weights = tokens.token_weights(index)
        if weights is not None:
            first, end = first_targets[place], starts[place + 1] - 1
            found[first:end] = weights[: end - first]
    return found


def _dummy_batch() -> PackedBatch:
    """Two tokens that are not trained: transformers cannot run an empty pack.

    Not one token: torch.compile makes a graph apart for a size of 1, and one for its recomputation.
    """
    return PackedBatch(
        input_ids=torch.zeros(2, dtype=torch.int64),
        position_ids=torch.arange(2),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        targets=torch.full((2,), IGNORE, dtype=torch.int64),
        signs=torch.zeros(1, dtype=torch.int64),
        weights=None,
        valid_index=torch.zeros(0, dtype=torch.int64),
        num_positive_targets=0,
        target_counts=(0,),
        num_targets=torch.zeros(1, dtype=torch.int64),
        full_targets=torch.zeros(1, dtype=torch.int64),
        sequence_ids=torch.full((1,), -1, dtype=torch.int64),
        max_seqlen=2,
        is_dummy=True,
    )
