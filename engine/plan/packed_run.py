"""Packs the steps of a run as training does, and measures how ranks wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.packing import Cost, Packing, build_batch, pack
from redi.engine.model.flops import ModelSize
from redi.engine.plan.memory import Load
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
    """Indices of the traces in each pack, of all micro-steps and ranks."""
    flops: np.ndarray
    """float64 [micro-steps, ranks]."""
    gathers_once: bool
    """Whether ranks wait for each other at the end of the step alone."""

    @property
    def slowest_flops(self) -> np.ndarray:
        """Flops of the ranks that the others wait for, one after the other."""
        if self.gathers_once:
            return self.flops.sum(axis=0).max(keepdims=True)
        return self.flops.max(axis=1)


def evenly_spaced(total: int, most: int) -> list[int]:
    """At most `most` of the steps 1 to `total`."""
    chosen = np.linspace(1, total, min(total, most)).round().astype(int)
    return [int(step) for step in np.unique(chosen)]


def pack_run(
    recipe: Recipe, size: ModelSize, data: PreparedData, ranks: int, console: Console
) -> tuple[PackedRun, Load]:
    """Pack the steps of a run as in training.

    Args:
        recipe: resolved.
        size: of its model.
        data: its training data.
        ranks: number of ranks.
        console: output of the progress.

    Returns:
        The packing's figures, and the properties that determine memory.
    """
    lengths, total = data.examples.lengths, data.schedule.total_steps
    chosen = evenly_spaced(total, PACKED_STEPS)
    costs = size.training_cost(), size.run_cost(recipe.shard.checkpointing)
    progress = console.progress("packing step", len(chosen), endpoints=False)
    steps = []
    for step in chosen:
        steps.append(pack_step(step, data, recipe, ranks, *costs))
        progress.update(1)
    progress.close()

    worst = min(steps, key=lambda step: step.packing.rank_efficiency)
    packs = [traces for step in steps for traces in step.packs if len(traces)]
    fullest = max(packs, key=lambda traces: int(lengths[traces].sum()))
    trained = lengths - data.tokens.prompt_lengths
    run = PackedRun(
        steps=total,
        tokens=sum(int(lengths[_traces(step, data)].sum()) for step in range(1, total + 1)),
        packed_steps=len(steps),
        micro_steps=float(np.mean([len(step.flops) for step in steps])),
        most_micro_steps=max(len(step.flops) for step in steps),
        rank_efficiency=float(np.mean([step.packing.rank_efficiency for step in steps])),
        worst=WorstStep(worst.step, worst.packing.rank_efficiency, worst.packing.bound),
        fullest_pack=int(lengths[fullest].sum()),
        flops=float(np.mean([step.flops.sum() for step in steps])),
        slowest_flops=float(np.mean([step.slowest_flops.sum() for step in steps])),
    )
    return run, Load(
        pack=build_batch(data.tokens, fullest, lengths[fullest]),
        targets=frozenset(int(trained[traces].sum()) for traces in packs),
        micro_steps=run.most_micro_steps,
    )


def pack_step(
    step: int, data: PreparedData, recipe: Recipe, ranks: int, balanced: Cost, run: Cost
) -> PackedStep:
    """Pack a step; `balanced` is the cost that training balances, `run` the flops of a trace."""
    traces = _traces(step, data)
    lengths = data.examples.lengths[traces]
    packing = pack(
        lengths,
        row_tokens=recipe.train.resolved_row_tokens,
        world_size=ranks,
        cost=balanced,
        keep_pairs_together=data.examples.keep_pairs_together,
        gather=recipe.shard.gather,
    )
    flops = run.of(lengths)
    return PackedStep(
        step,
        packing,
        [traces[own] for packs in packing.packs for own in packs],
        np.array([[flops[own].sum() for own in packs] for packs in packing.packs]),
        gathers_once=recipe.shard.gather == "step",
    )


def _traces(step: int, data: PreparedData) -> np.ndarray:
    """Indices of the traces of a step."""
    return data.examples.units[data.schedule.units(step)].reshape(-1)
