"""Packs the steps of a run as training does, and measures how ranks wait for each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from redi.engine.config.sections import Recipe, ShardConfig
from redi.engine.console import Console
from redi.engine.data.packing import (
    Cost,
    Packing,
    build_batch,
    pack,
    shared_by_pairs,
    shared_in_packs,
)
from redi.engine.model.flops import ModelSize
from redi.engine.plan.cards import Cluster
from redi.engine.plan.memory import Load
from redi.engine.plan.step_time import pack_seconds, step_seconds
from redi.engine.plan.types import PackedRun, WorstStep
from redi.engine.train.prepare_data import PreparedData

PACKED_STEPS = 500
"""Maximum number of packed steps; for a longer run they are evenly spaced."""


@dataclass(frozen=True)
class PackedStep:
    """A step, packed as in training."""

    step: int
    packing: Packing
    packs: list[np.ndarray]
    """Indices of the traces in each pack, of all micro-steps and ranks (or context groups)."""
    lengths: np.ndarray
    """float64 [S], of the step's traces."""
    shared: np.ndarray
    """int64 [micro-steps, ranks or context groups], tokens of prompts that traces share."""
    mismatched: PackedStep | None = None
    """The step's mismatched rows, which are scored before, if the loss needs them."""

    def costs(self, trained: Cost, scored: Cost) -> list[np.ndarray]:
        """Of each pack that is scored, if there are any, and of each that is trained.

        Ranks wait for each other between the two.

        Returns:
            Arrays float64 [micro-steps, ranks or context groups].
        """
        own = pack_sums(self.packing, trained.of(self.lengths)) - trained.of_shared(self.shared)
        if self.mismatched is None:
            return [own]
        return [pack_sums(self.mismatched.packing, scored.of(self.mismatched.lengths)), own]

    def waits(self, size: ModelSize, shard: ShardConfig, flops_per_second: float) -> np.ndarray:
        """Seconds of the packs that the step waits for, float64 [packs].

        `step_seconds` gives a pack that is only scored the launches and gathers of a trained one,
        which is too much where a step waits for these.
        """
        counts_experts = size.has_router_loss and len(self.packing.packs) > 1
        takes = pack_seconds(size, shard, flops_per_second, counts_experts)
        scored = pack_seconds(size, shard, flops_per_second, only_scored=True)
        return np.concatenate([slowest(each, shard.gather) for each in self.costs(takes, scored)])


def slowest(packs: np.ndarray, gather: str) -> np.ndarray:
    """What a step waits for, one pack after the other, float64 [packs].

    Ranks wait for each other in each micro-step. With `[shard] gather = "step"` they do so at the
    end of the step alone, so the step takes as long as the packs of its slowest rank.

    Args:
        packs: float64 [micro-steps, ranks], cost of each pack; 0: no pack.
        gather: as in `[shard]`.
    """
    if gather == "step":
        of_rank = packs[:, packs.sum(axis=0).argmax()]
        return of_rank[of_rank > 0]
    return packs.max(axis=1)


def evenly_spaced(total: int, most: int) -> list[int]:
    """At most `most` of the steps 1 to `total`."""
    chosen = np.linspace(1, total, min(total, most)).round().astype(int)
    return [int(step) for step in np.unique(chosen)]


def pack_run(
    recipe: Recipe, size: ModelSize, data: PreparedData, cluster: Cluster, console: Console
) -> tuple[PackedRun, Load]:
    """Pack the steps of a run as in training.

    Args:
        recipe: resolved.
        size: of its model.
        data: its training data.
        cluster: the GPUs.
        console: output of the progress.

    Returns:
        The packing's figures, and the properties that determine memory.
    """
    lengths, total = data.examples.lengths, data.schedule.total_steps
    chosen = evenly_spaced(total, PACKED_STEPS)
    shard, ranks = recipe.shard, cluster.ranks
    balanced, runs = size.training_cost(), size.run_cost(shard.checkpointing)
    progress = console.progress("packing step", len(chosen), endpoints=False)
    steps = []
    for step in chosen:
        steps.append(pack_step(step, data, recipe, ranks, balanced, size))
        progress.update(1)
    progress.close()

    worst = min(steps, key=lambda step: step.packing.rank_efficiency)
    packs = [traces for step in steps for traces in step.packs if len(traces)]
    fullest = max(packs, key=lambda traces: int(lengths[traces].sum()))
    flops = [step.costs(runs, size.scoring_cost()) for step in steps]
    waits = [step.waits(size, shard, cluster.flops_per_second) for step in steps]
    seconds = [step_seconds(each, size, ranks, shard) for each in waits]
    run = PackedRun(
        steps=total,
        tokens=sum(int(lengths[_traces(step, data)].sum()) for step in range(1, total + 1)),
        packed_steps=len(steps),
        micro_steps=float(np.mean([len(step.packing.packs) for step in steps])),
        most_micro_steps=max(len(step.packing.packs) for step in steps),
        rank_efficiency=float(np.mean([step.packing.rank_efficiency for step in steps])),
        worst=WorstStep(worst.step, worst.packing.rank_efficiency, worst.packing.bound),
        fullest_pack=int(lengths[fullest].sum()),
        flops=float(np.mean([sum(packs.sum() for packs in each) for each in flops])),
        slowest_flops=float(
            np.mean([sum(slowest(packs, shard.gather).sum() for packs in each) for each in flops])
        )
        / shard.context,
        seconds=float(np.mean(seconds)),
    )
    return run, Load(
        pack=build_batch(
            data.tokens, fullest, lengths[fullest], data.teacher, size.shares_prompts(recipe)
        ),
        targets=frozenset(int(data.num_targets[traces].sum()) for traces in packs),
        micro_steps=run.most_micro_steps,
    )


def pack_step(
    step: int, data: PreparedData, recipe: Recipe, ranks: int, cost: Cost, size: ModelSize
) -> PackedStep:
    """Pack a step as training does, which balances `cost`."""
    units = data.examples.units[data.schedule.units(step)]
    traces = units.reshape(-1)

    def packed(lengths: np.ndarray, share_prompts: bool) -> PackedStep:
        packing = pack(
            lengths,
            row_tokens=recipe.train.resolved_row_tokens,
            world_size=ranks // recipe.shard.context,
            cost=cost,
            keep_pairs_together=data.examples.keep_pairs_together,
            gather=recipe.shard.gather,
            shared=shared_by_pairs(data.tokens, units) if share_prompts else None,
        )
        packs = [traces[places] for micro_step in packing.packs for places in micro_step]
        shared = np.zeros(len(packs), dtype=np.int64)
        if share_prompts:
            shared = shared_in_packs(data.tokens, packs)
        by_rank = shared.reshape(len(packing.packs), -1)
        return PackedStep(step, packing, packs, lengths.astype(np.float64), by_rank)

    own = packed(data.examples.lengths[traces], size.shares_prompts(recipe))
    if data.mismatched is None:
        return own
    return replace(own, mismatched=packed(data.mismatched.lengths[traces], share_prompts=False))


def pack_sums(packing: Packing, values: np.ndarray) -> np.ndarray:
    """Sum over the sequences of each pack, float64 [micro-steps, ranks].

    Args:
        packing: of a step.
        values: float64 [S], of each sequence.
    """
    packs = [places for step in packing.packs for places in step]
    numbers = np.repeat(np.arange(len(packs)), [len(places) for places in packs])
    sums = np.bincount(numbers, values[np.concatenate(packs)], len(packs))
    return sums.reshape(len(packing.packs), -1)


def _traces(step: int, data: PreparedData) -> np.ndarray:
    """Indices of the traces of a step."""
    return data.examples.units[data.schedule.units(step)].reshape(-1)
