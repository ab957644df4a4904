"""`redi plan`: estimates a recipe's time and memory without a GPU.

Packing is identical to training's, step by step. Memory is counted (`memory.py`). Time follows from
the flops of the packs and an assumed fraction of the GPU's peak.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.packing import Cost, PackedBatch, Packing, build_batch, pack
from redi.engine.data.summary import show, warnings
from redi.engine.distributed import join_world
from redi.engine.errors import InputError
from redi.engine.model.architecture import check_dropout
from redi.engine.model.build import check_vocabulary, model_config
from redi.engine.model.flops import run_cost, training_cost
from redi.engine.plan.cards import Cluster
from redi.engine.plan.display import show_plan
from redi.engine.plan.memory import RESERVE, Load, cache_memory, step_memory
from redi.engine.plan.types import Alternative, PackedRun, Plan, WorstStep
from redi.engine.train.prepare_data import PreparedData, check_positions, prepare_data

PACKED_STEPS = 500
"""Maximum number of packed steps; for a longer run they are evenly spaced."""


def plan_recipes(
    recipes: list[tuple[str, Recipe]], cluster: Cluster, console: Console, target: Path | None
) -> list[Plan]:
    """Plan recipes and print the tables.

    Args:
        recipes: (path, resolved recipe) pairs; `model.path` is set.
        cluster: the GPUs to plan for.
        console: output of tables and warnings.
        target: JSON file to write; None: no file.

    Raises:
        InputError: a recipe, its data or model are invalid, or `target` cannot be written.
    """
    plans = []
    content = []
    for path, recipe in recipes:
        config = model_config(recipe, weights=False)
        check_vocabulary(recipe, config)
        chosen = recipe.model.attention
        check_dropout(recipe.model.path or "", config, "varlen" if chosen == "auto" else chosen)
        config.attention_dropout = 0.0  # takes no memory, and the plan's attention has none
        with join_world() as world:
            data = prepare_data(recipe, world, console)
        check_positions(
            data.tokens,
            data.examples.lengths,
            data.examples.units,
            config,
            "lower data.max_tokens to {}, or raise model.max_position_embeddings",
        )
        summary = data.summarize(
            recipe.train.row_tokens, cluster.ranks, training_cost(config), recipe.shard.gather
        )
        show(summary, path, console)
        for warning in warnings(summary):
            console.warn(warning)
        plan = make_plan(recipe, config, data, cluster, console)
        show_plan(plan, path, console)
        plans.append(plan)
        content.append({"recipe": path, "overview": asdict(summary)} | asdict(plan))
    if target is not None:
        try:
            target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"json: {target} cannot be written: {error.strerror}") from None
    return plans


def make_plan(
    recipe: Recipe, config: Any, data: PreparedData, cluster: Cluster, console: Console
) -> Plan:
    """Estimate packing, memory and time of a recipe.

    Args:
        recipe: resolved.
        config: its model's configuration.
        data: its training data.
        cluster: the GPUs to plan for.
        console: output of the progress of packing.

    Raises:
        InputError: the model or the backend is not supported.
    """
    if recipe.objective.backend == "reference":
        raise InputError('objective.backend: plan does not support "reference"; use "auto"')
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
        alternatives = _alternatives(recipe, config, data, load, cluster, memory.total, card_memory)
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
    """A step, packed as in training."""

    step: int
    packing: Packing
    packs: list[np.ndarray]
    """Indices of the traces in each pack, of all micro-steps and ranks."""
    flops: np.ndarray
    """float64 [micro-steps, ranks]."""
    slowest_flops: float
    """Flops in whose time the step ends, of the ranks that the others wait for."""


def pack_run(
    recipe: Recipe, config: Any, data: PreparedData, ranks: int, console: Console
) -> tuple[PackedRun, Load]:
    """Pack the steps of a run as in training.

    Args:
        recipe: resolved.
        config: its model's configuration.
        data: its training data.
        ranks: number of ranks.
        console: output of the progress.

    Returns:
        The packing's figures, and the properties that determine memory.
    """
    lengths, total = data.examples.lengths, data.schedule.total_steps
    chosen = np.unique(np.linspace(1, total, min(total, PACKED_STEPS)).round().astype(int))
    costs = training_cost(config), run_cost(config, recipe.shard.checkpointing)
    progress = console.progress("packing step", len(chosen), endpoints=False)
    steps = []
    for step in chosen.tolist():
        steps.append(_pack_step(step, data, recipe, ranks, *costs))
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
        slowest_flops=float(np.mean([step.slowest_flops for step in steps])),
    )
    return run, Load(
        pack=build_batch(data.tokens, fullest, lengths[fullest]),
        targets=frozenset(int(trained[traces].sum()) for traces in packs),
        micro_steps=run.most_micro_steps,
    )


def _pack_step(
    step: int, data: PreparedData, recipe: Recipe, ranks: int, balanced: Cost, run: Cost
) -> _PackedStep:
    """Pack a step; `balanced` is the cost that training balances, `run` the flops of a trace."""
    traces = _traces(step, data)
    lengths = data.examples.lengths[traces]
    packing = pack(
        lengths,
        row_tokens=recipe.train.row_tokens,
        world_size=ranks,
        cost=balanced,
        keep_pairs_together=data.examples.keep_pairs_together,
        gather=recipe.shard.gather,
    )
    costs = run.of(lengths)
    flops = np.array([[costs[own].sum() for own in packs] for packs in packing.packs])
    # Ranks wait for the slowest in each micro-step, or once, at the end of the step.
    per_step = recipe.shard.gather == "step"
    slowest = flops.sum(axis=0).max() if per_step else flops.max(axis=1).sum()
    traces_of = [traces[own] for packs in packing.packs for own in packs]
    return _PackedStep(step, packing, traces_of, flops, float(slowest))


def _traces(step: int, data: PreparedData) -> np.ndarray:
    """Indices of the traces of a step."""
    return data.examples.units[data.schedule.units(step)].reshape(-1)


def _alternatives(
    recipe: Recipe,
    config: Any,
    data: PreparedData,
    load: Load,
    cluster: Cluster,
    peak: int,
    card_memory: int,
) -> list[Alternative]:
    """Recipe changes that lower the peak, cheapest in time first; see `Plan.alternatives`."""
    shard = recipe.shard
    per_micro_step = {"reduce": "micro_step", "gather": "micro_step"} if cluster.ranks > 1 else {}
    changes: list[tuple[str, dict[str, Any], Load]] = []
    if shard.gather == "step":
        changes.append(('shard.gather = "micro_step"', {"gather": "micro_step"}, load))
    if shard.replicate > 1:
        changes.append(("shard.replicate = 1", {"replicate": 1}, load))
    if per_micro_step and shard.reduce == "step" and load.micro_steps > 1:
        changes.append(('shard.reduce = "micro_step"', per_micro_step, load))
    modes = ("none", "selective", "attention", "full")
    changes += [
        (f'shard.checkpointing = "{mode}"', {"checkpointing": mode}, load)
        for mode in modes[modes.index(shard.checkpointing) + 1 :]
    ]
    offload = {"checkpointing": "full", "offload": True}
    changes.append(('shard.checkpointing = "full" and shard.offload = true', offload, load))
    longest = _longest_pack(data)
    if longest.num_tokens < load.pack.num_tokens:
        # Shorter packs make more micro-steps, whose gradients stay unsharded unless reduced.
        change = f"train.row_tokens = {longest.num_tokens}, the length of the longest trace"
        if per_micro_step and shard.reduce == "step":
            change += ', and shard.reduce = "micro_step"'
        shorter = Load(longest, frozenset([len(longest.valid_index)]), micro_steps=2)
        changes.append((change, per_micro_step, shorter))

    found = []
    for change, fields, changed_load in changes:
        changed = replace(recipe, shard=replace(shard, **fields))
        lower = step_memory(changed, config, changed_load, cluster.ranks, cluster.figures).total
        if lower < peak:
            shard, peak = changed.shard, lower
            found.append(Alternative(change, peak, peak <= card_memory))
        if peak <= card_memory:
            break
    return found


def _longest_pack(data: PreparedData) -> PackedBatch:
    """The longest trace, or the longest pair if pairs share a pack."""
    examples = data.examples
    groups = examples.units if examples.keep_pairs_together > 1 else examples.units.reshape(-1, 1)
    longest = groups[np.argmax(examples.lengths[groups].sum(axis=1))]
    return build_batch(data.tokens, longest, examples.lengths[longest])
