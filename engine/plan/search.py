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

from redi.engine.config.sections import Recipe, ShardConfig
from redi.engine.console import Console
from redi.engine.data.packing import PackedBatch, build_batch
from redi.engine.model.flops import ModelSize
from redi.engine.plan.cards import Cluster
from redi.engine.plan.memory import Load, step_memory
from redi.engine.plan.packed_run import PackedStep, evenly_spaced, pack_step
from redi.engine.plan.step_time import step_seconds
from redi.engine.plan.types import Fastest
from redi.engine.train.prepare_data import PreparedData

LONGEST_ROW = 65_536
"""Longest row that is tried, unless a trace is longer. Ranks then hardly wait (bench/packing)."""
MULTIPLES = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16, 24, 32, 64)
"""Rows that are tried, in units of the longest trace."""
SHORTEST_SHARED = 16_384
"""Ranks that share packs are tried if a trace is at least this long."""
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
    many_ranks: bool = False
    """Whether it makes a difference only between ranks."""


AXES = (
    Axis("checkpointing", ("none", "selective", "attention", "full")),
    Axis("gather", ("step", "micro_step"), many_ranks=True),
    Axis("reduce", ("step", "micro_step"), many_ranks=True),
    Axis("offload", (False, True)),
    Axis("context", (1, 2, 4, 8), many_ranks=True),
)

CountMemory = Callable[[Recipe, Load], int]
"""Peak bytes of a rank in a training step."""


@dataclass(frozen=True)
class Gpus:
    """What the search has to know of the ranks."""

    ranks: int
    flops_per_second: float
    """Of a rank, as assumed."""
    memory: float = math.inf
    """Bytes that a rank may use. Infinite: memory is not counted."""
    count: CountMemory | None = None
    """Needed if memory is finite."""

    @classmethod
    def of(cls, cluster: Cluster, config: Any) -> Gpus:
        """Those of a plan, for a model's configuration."""
        ranks, card = cluster.ranks, cluster.figures

        def count(recipe: Recipe, load: Load) -> int:
            return step_memory(recipe, config, load, ranks, card).total

        return cls(ranks, cluster.flops_per_second, card.usable_memory, count)


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


@dataclass
class _Counts:
    """Counts of memory, and what follows from them for other candidates."""

    gpus: Gpus
    data: PreparedData
    console: Console
    gradient_shard: int
    """Bytes of a rank's shard of the gradients, which only a second micro-step has to hold."""
    known: list[tuple[Candidate, int]] = field(default_factory=list)

    def peak(self, candidate: Candidate) -> int:
        """Peak bytes of a rank, 0 if they are not counted.

        Counted with a full row, which later steps may have.
        """
        if self.gpus.count is None:
            return 0
        for other, peak in self.known:
            if candidate is other:
                return peak
        pack = full_pack(self.data, candidate.row_tokens)
        targets = candidate.targets | {len(pack.valid_index)}
        peak = self.gpus.count(candidate.recipe, Load(pack, targets, candidate.micro_steps))
        self.known.append((candidate, peak))
        fits = "fits" if peak <= self.gpus.memory else "does not fit"
        self.console.say(f"counted {_named(candidate)}: {peak / 2**30:,.1f} GiB, {fits}")
        return peak

    def fails(self, candidate: Candidate) -> bool:
        """Whether it is already known not to fit."""
        for other, peak in self.known:
            one_less = candidate.micro_steps == 1 < other.micro_steps
            least = peak - self.gradient_shard * one_less
            if other.needs_at_most(candidate) and least > self.gpus.memory:
                return True
        return False


def fastest(
    recipe: Recipe,
    size: ModelSize,
    data: PreparedData,
    gpus: Gpus,
    console: Console,
    axes: Sequence[Axis] = AXES,
) -> Fastest | None:
    """Find the fastest combination of row length and `axes` whose training step fits, or None.

    Equal arguments give an equal result.

    Args:
        recipe: resolved but for `row_tokens`, which is not read.
        size: of its model.
        data: its training data.
        gpus: number, speed and memory.
        console: output of the progress.
        axes: settings to search; () searches rows alone.
    """
    candidates = sorted(
        _candidates(recipe, size, data, gpus, axes, console),
        key=lambda candidate: candidate.order,
    )
    group = gpus.ranks // recipe.shard.replicate
    counts = _Counts(gpus, data, console, 4 * size.trained // group)
    shortest = min(candidate.row_tokens for candidate in candidates)
    thrifty = [candidate for candidate in candidates if candidate.row_tokens == shortest]
    for best in candidates:
        if counts.fails(best):
            continue
        if (peak := counts.peak(best)) <= gpus.memory:
            return Fastest(
                best.row_tokens,
                {axis.key: getattr(best.recipe.shard, axis.key) for axis in axes},
                peak,
                best.seconds,
                best.rank_efficiency,
                best.micro_steps,
            )
        # A thriftier one with the shortest row may rule out many others at once: that with the
        # same value of the first axis, then that with the same values of all.
        for same in (1, len(axes)):
            probes = [other for other in thrifty if other.need[:same] == best.need[:same]]
            probe = max(probes, key=lambda other: other.need)
            if not counts.fails(probe):
                counts.peak(probe)
    return None


def _candidates(
    recipe: Recipe,
    size: ModelSize,
    data: PreparedData,
    gpus: Gpus,
    axes: Sequence[Axis],
    console: Console,
) -> Iterator[Candidate]:
    ranks = gpus.ranks
    sampled = sampled_steps(data)
    rows = row_lengths(data)
    shared = longest_unit(data) >= SHORTEST_SHARED and not recipe.objective.filter_epsilon
    combinations = list(_combinations(recipe, axes, ranks, size.heads if shared else 1))
    progress = console.progress("packing rows of", len(rows), endpoints=False)
    for row in rows:
        packed: dict[tuple[str, int], list[PackedStep]] = {}
        for shard, need in combinations:
            layout = shard.gather, shard.context
            train = replace(recipe.train, row_tokens=row)
            chosen = replace(recipe, shard=shard, train=train)
            if layout not in packed:
                balanced = size.training_cost()
                packed[layout] = [
                    pack_step(step, data, chosen, ranks, balanced, size) for step in sampled
                ]
            steps = packed[layout]
            waits = [step.waits(size, shard, gpus.flops_per_second) for step in steps]
            yield Candidate(
                recipe=chosen,
                need=need,
                row_tokens=row,
                seconds=float(np.mean([step_seconds(each, size, ranks, shard) for each in waits])),
                rank_efficiency=float(np.mean([step.packing.rank_efficiency for step in steps])),
                micro_steps=max(len(step.packing.packs) for step in steps),
                targets=frozenset(
                    int(data.num_targets[traces].sum())
                    for step in steps
                    for traces in step.packs
                    if len(traces)
                ),
            )
        progress.update(1)
    progress.close()


def _combinations(
    recipe: Recipe, axes: Sequence[Axis], ranks: int, heads: int
) -> Iterator[tuple[ShardConfig, tuple[int, ...]]]:
    """Sections `[shard]` with the values of the axes, and those values' places.

    On one rank the settings between ranks stay as they are.

    Args:
        heads: what the ranks of a context group can have equal shares of.
    """

    def places(axis: Axis) -> Sequence[int]:
        if axis.many_ranks and ranks == 1:
            return [axis.values.index(getattr(recipe.shard, axis.key))]
        every = range(len(axis.values))
        if axis.key == "context":
            of_replica = ranks // recipe.shard.replicate
            common = math.gcd(heads, of_replica)
            return [place for place in every if common % axis.values[place] == 0]
        return every

    choices = list(map(places, axes))
    for need in product(*choices):
        values = {axis.key: axis.values[place] for axis, place in zip(axes, need, strict=True)}
        try:
            shard = replace(recipe.shard, **values)
        except ValueError:  # the recipe would refuse this combination
            continue
        yield shard, need


def sampled_steps(data: PreparedData) -> list[int]:
    """The steps that are packed."""
    few, most = SAMPLED_STEPS
    traces = data.schedule.batch * data.examples.units.shape[1]
    return evenly_spaced(data.schedule.total_steps, min(max(SAMPLED_TRACES // traces, few), most))


def longest_unit(data: PreparedData) -> int:
    """Tokens of the longest trained trace, or of the longest pair if pairs share a pack."""
    examples = data.examples
    groups = examples.units if examples.keep_pairs_together > 1 else examples.units.reshape(-1, 1)
    return int(examples.lengths[groups].sum(axis=1).max())


def row_lengths(data: PreparedData) -> list[int]:
    """Row lengths to try, ascending.

    From the longest trace, trained or held out, to `LONGEST_ROW`, or a whole step of one rank.
    """
    shortest = max(2, longest_unit(data), data.longest_held_out)
    whole = max(
        int(data.examples.lengths[data.examples.units[data.schedule.units(step)]].sum())
        for step in sampled_steps(data)
    )
    most = max(shortest, min(LONGEST_ROW, whole))
    rows = {int(shortest * multiple) for multiple in MULTIPLES}
    return sorted({most} | {row for row in rows if row <= most})


def full_pack(data: PreparedData, row_tokens: int) -> PackedBatch:
    """A pack of `row_tokens` tokens: the longest traces, the last ones cut."""
    lengths, prompts = data.examples.lengths, data.tokens.prompt_lengths
    traces = np.unique(data.examples.units)
    traces = traces[np.argsort(-lengths[traces], kind="stable")]
    chosen, kept, room = [], [], row_tokens
    while room > 0:
        before = room
        for trace in traces.tolist():
            length = min(int(lengths[trace]), room)
            if length <= prompts[trace]:  # a trace has at least one trained token
                continue
            chosen.append(trace)
            kept.append(length)
            room -= length
        if room == before:
            break
    return build_batch(data.tokens, np.array(chosen), np.array(kept), data.teacher)


def _named(candidate: Candidate) -> str:
    shard = candidate.recipe.shard
    settings = [f"{axis.key} {getattr(shard, axis.key)}" for axis in AXES]
    return ", ".join([f"rows of {candidate.row_tokens:,}", *settings])
