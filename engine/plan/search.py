"""The fastest settings of a recipe that fit a GPU: rows, recomputation, and what is kept gathered.

A step's time is modelled from the flops of its packs and the bytes it moves; memory is counted
(`memory.py`), which takes seconds. So all combinations are ordered by time first, and counted from
the fastest on. The first that fits is the answer. Counts are saved because memory is monotone: a
combination does not fit if another one that needs at most as much in every setting does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.packing import PackedBatch, build_batch
from redi.engine.model.flops import ModelSize
from redi.engine.plan.memory import Load
from redi.engine.plan.packed_run import PackedStep, evenly_spaced, pack_step
from redi.engine.plan.step_time import step_seconds
from redi.engine.plan.types import Fastest
from redi.engine.train.prepare_data import PreparedData

LONGEST_ROW = 65_536
"""Longest row that is tried, unless a trace is longer. Ranks then hardly wait (bench/packing)."""
MULTIPLES = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16, 24, 32, 64)
"""Rows that are tried, in units of the longest trace."""
SAMPLED_TRACES = 4096
"""Traces that are packed for each row: as many steps, evenly spaced, as have this number."""
SAMPLED_STEPS = (6, 32)
"""Fewest and most of these steps."""
SAME_TIME = 0.005
"""Times are compared in steps of this share. Of equal ones the shortest row is best."""


@dataclass(frozen=True)
class Axis:
    """A setting that is searched.

    Adding one is a line in `AXES`, if `step_memory` counts it and `step_seconds` knows its time.
    """

    key: str
    """Key of `[shard]`."""
    values: tuple[Any, ...]
    """Those that need most memory first."""
    extra: tuple[float, ...] = ()
    """Assumed share of a step's compute that each value adds to its flops; default: none."""
    many_ranks: bool = False
    """Whether it makes a difference only between ranks."""


AXES = (
    # Recomputed norms and activations are bound by memory, not flops: some hundredths of a block.
    Axis("checkpointing", ("none", "selective", "attention", "full"), (0.0, 0.02, 0.0, 0.0)),
    Axis("gather", ("step", "micro_step"), many_ranks=True),
    Axis("reduce", ("step", "micro_step"), many_ranks=True),
    # Copies to the host run beside compute, but share memory's bandwidth with it.
    Axis("offload", (False, True), (0.0, 0.01)),
)


@dataclass(frozen=True)
class Candidate:
    """A combination of settings."""

    recipe: Recipe
    need: tuple[int, ...]
    """Place of each value in its axis: more memory where it is lower."""
    row_tokens: int
    seconds: float
    rank_efficiency: float
    micro_steps: int
    """Maximum per step."""
    targets: frozenset[int]
    """Trained tokens of each pack."""

    @property
    def order(self) -> tuple[int, int, tuple[int, ...]]:
        """Best first."""
        return round(math.log(self.seconds) / SAME_TIME), self.row_tokens, self.need

    @property
    def accumulates(self) -> bool:
        """Whether whole gradients stay between micro-steps."""
        return self.micro_steps > 1 and self.recipe.shard.reduce == "step"

    def needs_at_most(self, other: Candidate) -> bool:
        """Whether it surely needs no more memory than `other`, but for shards of gradients."""
        return (
            all(mine >= theirs for mine, theirs in zip(self.need, other.need, strict=True))
            and self.row_tokens <= other.row_tokens
            and self.accumulates <= other.accumulates
        )


CountMemory = Callable[[Recipe, Load], int]
"""Peak bytes of a rank."""


@dataclass
class _Counts:
    """Counts of memory, and what follows from them for other candidates."""

    count: CountMemory
    data: PreparedData
    limit: float
    console: Console
    gradient_shard: int
    """Bytes of a rank's shard of the gradients, which only a second micro-step has to hold."""
    known: list[tuple[Candidate, int]] = field(default_factory=list)

    def peak(self, one: Candidate) -> int:
        """Peak bytes of a rank. Counted with a full row, which later steps may have."""
        for other, peak in self.known:
            if one is other:
                return peak
        pack = full_pack(self.data, one.row_tokens)
        load = Load(pack, one.targets | {len(pack.valid_index)}, one.micro_steps)
        peak = self.count(one.recipe, load)
        self.known.append((one, peak))
        if self.limit < math.inf:
            fits = "fits" if peak <= self.limit else "does not fit"
            self.console.say(f"counted {_named(one)}: {peak / 2**30:,.1f} GiB, {fits}")
        return peak

    def fails(self, one: Candidate) -> bool:
        """Whether it is already known not to fit."""
        return any(
            other.needs_at_most(one)
            and peak - self.gradient_shard * (one.micro_steps == 1 < other.micro_steps) > self.limit
            for other, peak in self.known
        )


def fastest(
    recipe: Recipe,
    size: ModelSize,
    data: PreparedData,
    ranks: int,
    flops_per_second: float,
    limit: float,
    count: CountMemory,
    console: Console,
    axes: Sequence[Axis] = AXES,
) -> Fastest | None:
    """Find the fastest combination of row length and `axes` that fits, or None.

    Equal arguments give an equal result.

    Args:
        recipe: resolved but for `row_tokens`, which is not read.
        size: of its model.
        data: its training data.
        ranks: number of ranks.
        flops_per_second: of a GPU, as assumed.
        limit: bytes of memory that a rank may use.
        count: counts the peak of a step.
        console: output of the progress.
        axes: settings to search; () searches rows alone.
    """
    candidates = sorted(
        _candidates(recipe, size, data, ranks, flops_per_second, axes, console),
        key=lambda one: one.order,
    )
    group = ranks // recipe.shard.replicate
    counts = _Counts(count, data, limit, console, 4 * size.parameters // group)
    shortest = min(one.row_tokens for one in candidates)
    thrifty = [one for one in candidates if one.row_tokens == shortest]
    for one in candidates:
        if counts.fails(one):
            continue
        if (peak := counts.peak(one)) <= limit:
            settings = {axis.key: getattr(one.recipe.shard, axis.key) for axis in axes}
            return Fastest(
                one.row_tokens, settings, peak, one.seconds, one.rank_efficiency, one.micro_steps
            )
        # A thriftier one with the shortest row may rule out many others at once: that with the
        # same value of the first axis, then that with the same values of all.
        for same in (1, len(axes)):
            probes = [two for two in thrifty if two.need[:same] == one.need[:same]]
            probe = max(probes, key=lambda two: two.need)
            if not counts.fails(probe):
                counts.peak(probe)
    return None


def _candidates(
    recipe: Recipe,
    size: ModelSize,
    data: PreparedData,
    ranks: int,
    flops_per_second: float,
    axes: Sequence[Axis],
    console: Console,
) -> Iterator[Candidate]:
    trained = data.examples.lengths - data.tokens.prompt_lengths
    steps = sampled_steps(data)
    rows = row_lengths(data)
    combinations = list(_combinations(recipe, axes, ranks))
    progress = console.progress("packing rows of", len(rows), endpoints=False)
    for row in rows:
        packed: dict[str, list[PackedStep]] = {}
        for shard, need, extra in combinations:
            gather = shard.gather
            train = replace(recipe.train, row_tokens=row)
            chosen = replace(recipe, shard=shard, train=train)
            cost = size.training_cost()
            if gather not in packed:
                packed[gather] = [
                    pack_step(step, data, chosen, ranks, cost, cost) for step in steps
                ]
            runs = size.run_cost(shard.checkpointing)
            slower = (1 + extra) * _ratio(runs, cost, data)
            waits = [step.slowest_flops * slower / flops_per_second for step in packed[gather]]
            seconds = float(np.mean([step_seconds(one, size, ranks, shard) for one in waits]))
            yield Candidate(
                recipe=chosen,
                need=need,
                row_tokens=row,
                seconds=seconds,
                rank_efficiency=float(
                    np.mean([step.packing.rank_efficiency for step in packed[gather]])
                ),
                micro_steps=max(len(step.flops) for step in packed[gather]),
                targets=frozenset(
                    int(trained[traces].sum())
                    for step in packed[gather]
                    for traces in step.packs
                    if len(traces)
                ),
            )
        progress.update(1)
    progress.close()


def _combinations(
    recipe: Recipe, axes: Sequence[Axis], ranks: int
) -> Iterator[tuple[Any, tuple[int, ...], float]]:
    """Sections `[shard]` with the values of the axes, those values' places, and their extra time.

    On one rank the settings between ranks stay as they are.
    """
    choices = [
        [axis.values.index(getattr(recipe.shard, axis.key))]
        if axis.many_ranks and ranks == 1
        else range(len(axis.values))
        for axis in axes
    ]
    for need in product(*choices):
        values = {axis.key: axis.values[place] for axis, place in zip(axes, need, strict=True)}
        try:
            shard = replace(recipe.shard, **values)
        except ValueError:  # the recipe would refuse this combination
            continue
        extra = sum(axis.extra[place] for axis, place in zip(axes, need, strict=True) if axis.extra)
        yield shard, need, extra


def _ratio(runs: Any, cost: Any, data: PreparedData) -> float:
    """Executed flops over those of training, for the traces of the run."""
    lengths = data.examples.lengths[np.unique(data.examples.units)]
    return float(runs.of(lengths).sum() / cost.of(lengths).sum())


def sampled_steps(data: PreparedData) -> list[int]:
    """The steps that are packed."""
    few, most = SAMPLED_STEPS
    traces = data.schedule.batch * data.examples.units.shape[1]
    return evenly_spaced(data.schedule.total_steps, min(max(SAMPLED_TRACES // traces, few), most))


def longest(data: PreparedData) -> int:
    """Tokens of the longest trace, or of the longest pair if pairs share a pack."""
    examples = data.examples
    groups = examples.units if examples.keep_pairs_together > 1 else examples.units.reshape(-1, 1)
    return int(examples.lengths[groups].sum(axis=1).max())


def row_lengths(data: PreparedData) -> list[int]:
    """Row lengths to try: from the longest trace to `LONGEST_ROW`, or a whole step of one rank."""
    shortest = longest(data)
    whole = max(
        int(data.examples.lengths[data.examples.units[data.schedule.units(step)]].sum())
        for step in sampled_steps(data)
    )
    most = max(shortest, min(LONGEST_ROW, whole))
    rows = {int(shortest * multiple) for multiple in MULTIPLES} | {most}
    return sorted({2, *rows} & set(range(max(shortest, 2), most + 1)))


def full_pack(data: PreparedData, row_tokens: int) -> PackedBatch:
    """A pack of `row_tokens` tokens: the longest traces, the last ones cut."""
    lengths, prompts = data.examples.lengths, data.tokens.prompt_lengths
    traces = np.unique(data.examples.units)
    traces = traces[np.argsort(-lengths[traces], kind="stable")]
    chosen, kept, room = [], [], row_tokens
    while room > 0:
        before = room
        for trace in traces.tolist():
            own = min(int(lengths[trace]), room)
            if own <= prompts[trace]:  # a trace has at least one trained token
                continue
            chosen.append(trace)
            kept.append(own)
            room -= own
        if room == before:
            break
    return build_batch(data.tokens, np.array(chosen), np.array(kept))


def _named(one: Candidate) -> str:
    shard = one.recipe.shard
    settings = [f"{axis.key} {getattr(shard, axis.key)}" for axis in AXES]
    return ", ".join([f"rows of {one.row_tokens:,}", *settings])
