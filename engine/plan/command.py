"""`redi plan`: what a recipe will take of time and memory on cards that are not there yet.

The packing is that of training, step by step; memory is counted (`memory.py`); time follows from
the flops of the packed rows and from an assumption, the share of a card's peak that is reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.packing import Cost, PackedBatch, Packing, build_batch, pack
from redi.engine.data.summary import show, warnings
from redi.engine.distributed import join_world
from redi.engine.errors import InputError
from redi.engine.model.build import check_vocabulary, model_config
from redi.engine.model.flops import run_cost, training_cost
from redi.engine.plan.cards import Card, Cluster
from redi.engine.plan.display import show_plan
from redi.engine.plan.memory import RESERVE, Load, cache_memory, step_memory
from redi.engine.plan.types import Alternative, PackedRun, Plan, WorstStep
from redi.engine.train.prepare_data import PreparedData, check_positions, prepare_data

PACKED_STEPS = 500
"""Steps that are packed; of a longer run so many, evenly spread."""


def plan_recipes(
    recipes: list[tuple[str, Recipe]], cluster: Cluster, console: Console, target: Path | None
) -> list[Plan]:
    """Plan recipes and show the tables.

    Args:
        recipes: path and resolved recipe; `model.path` is set.
        cluster: what they would run on.
        console: where the tables go.
        target: JSON file; None: none is written.

    Raises InputError for anything wrong with a recipe, its data, its model or the target.
    """
    plans = []
    content = []
    for path, recipe in recipes:
        config = model_config(recipe, weights=False)
        check_vocabulary(recipe, config)
        with join_world() as world:
            data = prepare_data(recipe, world, console)
        check_positions(
            data.tokens,
            data.examples.lengths,
            data.examples.units,
            config,
            "lower data.max_tokens to {}, or raise model.max_position_embeddings",
        )
        overview = data.summarize(recipe.train.row_tokens, cluster.ranks, training_cost(config))
        show(overview, path, console)
        for warning in warnings(overview):
            console.warn(warning)
        plan = make_plan(recipe, config, data, cluster, console)
        show_plan(plan, path, console)
        plans.append(plan)
        content.append({"recipe": path, "overview": asdict(overview)} | asdict(plan))
    if target is not None:
        try:
            target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"json: {target} cannot be written: {error.strerror}") from None
    return plans


def make_plan(
    recipe: Recipe, config: Any, data: PreparedData, cluster: Cluster, console: Console
) -> Plan:
    """Packing, memory and time of a recipe.

    Args:
        recipe: resolved.
        config: its model's configuration.
        data: what it trains.
        cluster: what it would run on.
        console: shows the progress of packing.

    Raises InputError for a model or a backend that cannot be planned.
    """
    if recipe.objective.backend == "reference":
        raise InputError('objective.backend: "reference" is no backend to plan for; use "auto"')
    packing, load = pack_run(recipe, config, data, cluster.ranks, console)
    card = cluster.figures
    memory = step_memory(recipe, config, load, cluster.ranks, card)
    card_memory = int((1 - RESERVE) * card.memory)
    generating = None
    if data.held_out is not None and data.held_out.problems is not None:
        generating = memory.parts["masters"] + memory.parts["moments"]
        generating += cache_memory(recipe, config, data.held_out.problems)
    alternatives = []
    if memory.total > card_memory:
        trial = _Trial(recipe, load, cluster.ranks)
        alternatives = _alternatives(trial, config, data, card, memory.total, card_memory)
    step_seconds = packing.slowest_flops / (cluster.mfu * card.peak_flops)
    seconds = step_seconds * packing.steps
    return Plan(
        cluster=cluster,
        packing=packing,
        memory=memory,
        generating=generating,
        card_memory=card_memory,
        fits=max(memory.total, generating or 0) <= card_memory,
        alternatives=alternatives,
        step_seconds=step_seconds,
        seconds=seconds,
        tokens_per_s=packing.tokens / seconds,
    )


@dataclass(frozen=True)
class _PackedStep:
    """A step as training lays it out."""

    step: int
    packing: Packing
    rows: list[np.ndarray]
    """Indices of traces, of each row of each micro-step and rank."""
    flops: np.ndarray
    """float64 [micro-steps, ranks]."""


def pack_run(
    recipe: Recipe, config: Any, data: PreparedData, ranks: int, console: Console
) -> tuple[PackedRun, Load]:
    """Pack the steps of a run as training will.

    Args:
        recipe: resolved.
        config: its model's configuration.
        data: what it trains.
        ranks: of the run.
        console: shows the progress.
    """
    lengths, total = data.examples.lengths, data.schedule.total_steps
    chosen = np.unique(np.linspace(1, total, min(total, PACKED_STEPS)).round().astype(int))
    costs = training_cost(config), run_cost(config, recipe.shard.checkpointing)
    progress = console.progress("packing step", len(chosen), endpoints=False)
    steps = []
    for step in chosen.tolist():
        steps.append(_pack_step(step, data, recipe.train.row_tokens, ranks, *costs))
        progress.update(1)
    progress.close()

    worst = min(steps, key=lambda step: step.packing.rank_efficiency)
    rows = [row for step in steps for row in step.rows if len(row)]
    fullest = max(rows, key=lambda row: int(lengths[row].sum()))
    trained = lengths - data.tokens.prompt_lengths
    run = PackedRun(
        steps=total,
        tokens=sum(int(lengths[_traces(step, data)].sum()) for step in range(1, total + 1)),
        packed_steps=len(steps),
        micro_steps=float(np.mean([len(step.flops) for step in steps])),
        most_micro_steps=max(len(step.flops) for step in steps),
        rank_efficiency=float(np.mean([step.packing.rank_efficiency for step in steps])),
        worst=WorstStep(worst.step, worst.packing.rank_efficiency, worst.packing.bound),
        fullest_row=int(lengths[fullest].sum()),
        flops=float(np.mean([step.flops.sum() for step in steps])),
        slowest_flops=float(np.mean([step.flops.max(axis=1).sum() for step in steps])),
    )
    return run, Load(
        row=build_batch(data.tokens, fullest, lengths[fullest]),
        targets=frozenset(int(trained[row].sum()) for row in rows),
        micro_steps=run.most_micro_steps,
    )


def _pack_step(
    step: int, data: PreparedData, row_tokens: int, ranks: int, balanced: Cost, run: Cost
) -> _PackedStep:
    """Args: `balanced` is what training packs by, `run` what a row's flops are."""
    traces = _traces(step, data)
    lengths = data.examples.lengths[traces]
    packing = pack(
        lengths,
        row_tokens=row_tokens,
        world_size=ranks,
        cost=balanced,
        keep_pairs_together=data.examples.keep_pairs_together,
    )
    flops = run.of(lengths)
    return _PackedStep(
        step,
        packing,
        [traces[row] for rows in packing.rows for row in rows],
        np.array([[flops[row].sum() for row in rows] for rows in packing.rows]),
    )


def _traces(step: int, data: PreparedData) -> np.ndarray:
    """Indices of a step's traces."""
    return data.examples.units[data.schedule.units(step)].reshape(-1)


@dataclass(frozen=True)
class _Trial:
    """What a change is tried on."""

    recipe: Recipe
    load: Load
    ranks: int

    def with_shard(self, **changes: Any) -> _Trial:
        return replace(
            self, recipe=replace(self.recipe, shard=replace(self.recipe.shard, **changes))
        )


def _alternatives(
    trial: _Trial, config: Any, data: PreparedData, card: Card, peak: int, card_memory: int
) -> list[Alternative]:
    """What may be changed, what costs least time first, up to what fits; see `Plan`."""
    found = []
    for change, tried in _changes(trial, data):
        changed = tried(trial)
        if changed is None:
            continue
        lower = step_memory(changed.recipe, config, changed.load, changed.ranks, card).total
        if lower >= peak:
            continue
        trial, peak = changed, lower
        found.append(Alternative(change, peak, peak <= card_memory))
        if peak <= card_memory:
            break
    return found


def _changes(
    trial: _Trial, data: PreparedData
) -> Iterator[tuple[str, Callable[[_Trial], _Trial | None]]]:
    """Changes by name; each gives None where there is nothing to change."""

    def reduce(trial: _Trial) -> _Trial | None:
        accumulates = trial.load.micro_steps > 1 and trial.recipe.shard.reduce == "step"
        return trial.with_shard(reduce="micro_step") if accumulates and trial.ranks > 1 else None

    def shorter(trial: _Trial) -> _Trial | None:
        if longest.num_tokens >= trial.load.row.num_tokens:
            return None
        load = Load(longest, frozenset([len(longest.valid_index)]), micro_steps=2)
        trial = replace(trial, load=load)
        return reduce(trial) or trial

    shard, longest = trial.recipe.shard, _longest_row(data)
    if shard.replicate > 1:
        yield "shard.replicate = 1", partial(_Trial.with_shard, replicate=1)
    yield 'shard.reduce = "micro_step"', reduce
    if shard.checkpointing == "none":
        change = partial(_Trial.with_shard, checkpointing="selective")
        yield 'shard.checkpointing = "selective"', change
    if shard.checkpointing != "full":
        yield 'shard.checkpointing = "full"', partial(_Trial.with_shard, checkpointing="full")
    rows = f"train.row_tokens = {longest.num_tokens}, as the longest trace has"
    if trial.ranks > 1 and shard.reduce == "step":
        rows += ', and shard.reduce = "micro_step"'
    yield rows, shorter
    ranks = 2 * trial.ranks
    while ranks <= trial.recipe.train.batch * data.examples.units.shape[1]:
        yield f"{ranks} ranks", partial(replace, ranks=ranks)
        yield 'shard.reduce = "micro_step"', reduce
        ranks *= 2


def _longest_row(data: PreparedData) -> PackedBatch:
    """The longest trace alone, or the longest pair where pairs share a row."""
    examples = data.examples
    groups = examples.units if examples.keep_pairs_together > 1 else examples.units.reshape(-1, 1)
    longest = groups[np.argmax(examples.lengths[groups].sum(axis=1))]
    return build_batch(data.tokens, longest, examples.lengths[longest])
