"""`redi plan`: what a recipe will take of time and memory on cards that are not there yet.

The packing is that of training, step by step; memory is counted (`memory.py`); time follows from
the flops of the packed rows and from an assumption, the share of a card's peak that is reached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from redi.engine.config import Recipe
from redi.engine.console import Console
from redi.engine.data.overview import look_over, show, warnings
from redi.engine.data.packing import Cost, PackedBatch, build_batch, pack
from redi.engine.distributed import join_world
from redi.engine.errors import InputError
from redi.engine.estimate import CARDS, Card, run_cost, training_cost
from redi.engine.memory import PARTS, RESERVE, StepMemory, step_memory
from redi.engine.model.load import read_config
from redi.engine.model.sharding import check_replicas
from redi.engine.train.loop import PreparedData, check_positions, prepare_data

MFU = 0.35
"""Share of the peak that is assumed: torchtitan's performance.md has 33-39 % for Llama 3.1 8B under
FSDP2 on H100s with selective checkpointing (52-58 % on A100s, whose peak is a third)."""

PACKED_STEPS = 500
"""Steps that are packed; of a longer run so many, evenly spread."""

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """What the run is planned for."""

    ranks: int
    card: str
    """A key of `CARDS`."""
    mfu: float
    """Share of the card's peak, of all flops that are run."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise InputError(f"ranks must be >= 1, got {self.ranks}")
        if self.card not in CARDS:
            raise InputError(f"card: {self.card} is not known; there are {', '.join(CARDS)}")
        if not 0 < self.mfu <= 1:
            raise InputError(f"mfu, a share of the peak, must lie in (0, 1], got {self.mfu:g}")

    @property
    def figures(self) -> Card:
        """Peak and memory of a card."""
        return CARDS[self.card]


@dataclass(frozen=True)
class WorstStep:
    """The step that keeps ranks waiting most."""

    step: int
    rank_efficiency: float
    bound: float
    """What its longest sequence allows, by any packing."""


@dataclass(frozen=True)
class PackedRun:
    """How the steps of a run pack."""

    steps: int
    tokens: int
    """All tokens of all steps, as `tokens` in metrics.jsonl."""
    packed_steps: int
    """How many steps the figures below are of."""
    micro_steps: float
    """Mean."""
    most_micro_steps: int
    rank_efficiency: float
    """Mean; see `Packing`."""
    worst: WorstStep
    fullest_row: int
    """Tokens of the fullest row, which decides the memory."""
    flops: float
    """Of a step, over all ranks, recomputed ones included; mean."""
    slowest_flops: float
    """Of a step, the slowest rank of each micro-step; mean."""


@dataclass(frozen=True)
class Alternative:
    """A change that may make a run fit."""

    change: str
    peak: int
    """Bytes."""
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to on a cluster."""

    cluster: Cluster
    packing: PackedRun
    memory: StepMemory
    card_memory: int
    """Bytes of a card that training can have: all but a reserve."""
    fits: bool
    alternatives: list[Alternative]
    """Where it does not fit: changes, each on top of those before it, up to the first that does."""
    step_seconds: float
    seconds: float
    """Of all steps: no evaluation, no checkpoints, no start."""
    tokens_per_s: float


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
    if target is not None and not target.absolute().parent.is_dir():
        raise InputError(f"json: {target.parent}: no such folder")  # before minutes of work
    plans = []
    content = []
    for path, recipe in recipes:
        config = read_config(
            recipe.model.path or "",
            recipe.model.rope_theta,
            recipe.model.max_position_embeddings,
            weights=False,
        )
        check_replicas(recipe.shard, cluster.ranks)
        with join_world() as world:
            data = prepare_data(recipe, world, console)
        check_positions(
            data.tokens,
            data.examples.lengths,
            data.examples.units,
            config,
            "lower data.max_tokens to {}, or raise model.max_position_embeddings",
        )
        overview = look_over(
            data.tokens,
            data.examples,
            data.schedule,
            row_tokens=recipe.train.row_tokens,
            world_size=cluster.ranks,
            cost=training_cost(config),
        )
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
    """
    packing, row = pack_run(recipe, config, data, cluster.ranks, console)
    # Two micro-steps tell of any number: the second finds what the first has left.
    rows = [row] * min(2, packing.most_micro_steps)
    card = cluster.figures
    memory = step_memory(recipe, config, rows, cluster.ranks, card)
    card_memory = int((1 - RESERVE) * card.memory)
    fits = memory.total <= card_memory
    alternatives = []
    if not fits:
        for alternative in _alternatives(recipe, config, data, rows, cluster, card_memory):
            alternatives.append(alternative)
            if alternative.fits:
                break
    step_seconds = packing.slowest_flops / (cluster.mfu * card.peak_flops)
    seconds = step_seconds * packing.steps
    return Plan(
        cluster=cluster,
        packing=packing,
        memory=memory,
        card_memory=card_memory,
        fits=fits,
        alternatives=alternatives,
        step_seconds=step_seconds,
        seconds=seconds,
        tokens_per_s=packing.tokens / seconds,
    )


def pack_run(
    recipe: Recipe, config: Any, data: PreparedData, ranks: int, console: Console
) -> tuple[PackedRun, PackedBatch]:
    """Pack the steps of a run as training will; also the fullest row."""
    schedule, examples = data.schedule, data.examples
    total = schedule.total_steps
    balanced, run = training_cost(config), run_cost(config, recipe.shard.checkpointing)
    chosen = np.unique(np.linspace(1, total, min(total, PACKED_STEPS)).round().astype(int))
    micro_steps, efficiencies, bounds, flops, slowest = [], [], [], [], []
    fullest = np.zeros(0, dtype=np.int64)
    progress = console.count("packing", "steps", len(chosen))
    for step in chosen.tolist():
        sequences = examples.units[schedule.units(step)].reshape(-1)
        packing = pack(
            examples.lengths[sequences],
            row_tokens=recipe.train.row_tokens,
            world_size=ranks,
            cost=balanced,
            together=examples.together,
        )
        rows = [[sequences[row] for row in rows] for rows in packing.rows]
        costs = np.array([[_flops(run, examples.lengths[row]) for row in step] for step in rows])
        micro_steps.append(len(rows))
        efficiencies.append(packing.rank_efficiency)
        bounds.append(packing.bound)
        flops.append(costs.sum())
        slowest.append(costs.max(axis=1).sum())
        candidates = [fullest, *(row for of_ranks in rows for row in of_ranks)]
        fullest = max(candidates, key=lambda row: int(examples.lengths[row].sum()))
        progress.update(1)
    progress.close()
    worst = int(np.argmin(efficiencies))
    tokens = sum(
        int(examples.lengths[examples.units[schedule.units(step)]].sum())
        for step in range(1, total + 1)
    )
    return PackedRun(
        steps=total,
        tokens=tokens,
        packed_steps=len(chosen),
        micro_steps=float(np.mean(micro_steps)),
        most_micro_steps=max(micro_steps),
        rank_efficiency=float(np.mean(efficiencies)),
        worst=WorstStep(int(chosen[worst]), efficiencies[worst], bounds[worst]),
        fullest_row=int(examples.lengths[fullest].sum()),
        flops=float(np.mean(flops)),
        slowest_flops=float(np.mean(slowest)),
    ), build_batch(data.tokens, fullest, examples.lengths[fullest])


def _flops(cost: Cost, lengths: np.ndarray) -> float:
    return float(cost.of(lengths).sum())


def _alternatives(
    recipe: Recipe,
    config: Any,
    data: PreparedData,
    rows: list[PackedBatch],
    cluster: Cluster,
    card_memory: int,
) -> Iterator[Alternative]:
    """What may be changed, each on top of those before: what costs least time first."""

    def counted(change: str) -> Alternative:
        peak = step_memory(recipe, config, rows, ranks, cluster.figures).total
        return Alternative(change, peak, peak <= card_memory)

    ranks = cluster.ranks
    if recipe.shard.replicate > 1:
        recipe = replace(recipe, shard=replace(recipe.shard, replicate=1))
        yield counted("shard.replicate = 1")
    if len(rows) > 1 and ranks > 1 and recipe.shard.reduce == "step":
        recipe = replace(recipe, shard=replace(recipe.shard, reduce="micro_step"))
        yield counted('shard.reduce = "micro_step"')
    if recipe.shard.checkpointing == "none":
        recipe = replace(recipe, shard=replace(recipe.shard, checkpointing="selective"))
        yield counted('shard.checkpointing = "selective"')
    if recipe.shard.checkpointing == "selective":
        recipe = replace(recipe, shard=replace(recipe.shard, checkpointing="full"))
        yield counted('shard.checkpointing = "full"')
    lengths = data.examples.lengths
    together = data.examples.units.shape[1] if data.examples.together > 1 else 1
    units = data.examples.units if together > 1 else data.examples.units.reshape(-1, 1)
    longest = units[np.argmax(lengths[units].sum(axis=1))]
    tokens = int(lengths[longest].sum())
    if tokens < len(rows[0].input_ids):
        rows = [build_batch(data.tokens, longest, lengths[longest])] * 2
        yield counted(f"train.row_tokens = {tokens}, the longest trace")
    for _ in range(4):
        ranks *= 2
        yield counted(f"{ranks} ranks")


def show_plan(plan: Plan, title: str, console: Console) -> None:
    """Packing, memory and time as tables, and whether it fits."""
    cluster = plan.cluster
    name = f"{cluster.ranks} x {cluster.card}"
    console.table(f"{title}: packing and time on {name}", ("", ""), _run_rows(plan))
    console.table(
        f"{title}: memory of each card at its peak, which is in the {plan.memory.phase}",
        ("", "GiB"),
        _memory_rows(plan),
    )
    if plan.fits:
        console.say(f"{title}: fits {name}")
        return
    console.warn(f"{title}: does not fit {name}")
    if plan.alternatives:
        console.table(
            "changes, each with those above it",
            ("", "GiB", ""),
            [
                (a.change, f"{a.peak / GIB:.2f}", "fits" if a.fits else "does not fit")
                for a in plan.alternatives
            ],
        )


def _run_rows(plan: Plan) -> list[tuple[str, str]]:
    packing, cluster = plan.packing, plan.cluster
    rows = [
        ("steps", f"{packing.steps:,}"),
        ("tokens", f"{packing.tokens:,}"),
        ("tokens of the fullest row", f"{packing.fullest_row:,}"),
        ("micro-steps in a step", f"{packing.micro_steps:.2f}, at most {packing.most_micro_steps}"),
        ("rank efficiency", f"{packing.rank_efficiency:.3f}"),
        (
            f"- of step {packing.worst.step}, the worst",
            f"{packing.worst.rank_efficiency:.3f}; its longest trace allows "
            f"{packing.worst.bound:.3f}",
        ),
        ("PFLOP in a step, with recomputed ones", f"{packing.flops / 1e15:.3g}"),
        ("share of the peak", f"{cluster.mfu:.0%}, assumed, not measured (--mfu)"),
        ("seconds a step", f"{plan.step_seconds:.3g}"),
        ("tokens/s", f"{plan.tokens_per_s:,.0f}"),
        ("hours", f"{plan.seconds / 3600:.3g}, without evaluation and checkpoints"),
        ("card hours", f"{plan.seconds / 3600 * cluster.ranks:.3g}"),
    ]
    if packing.packed_steps < packing.steps:
        rows.insert(1, ("- packed for these figures, evenly spread", f"{packing.packed_steps:,}"))
    return rows


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    parts = [(PARTS[name], size) for name, size in plan.memory.parts.items() if size]
    return [
        *((what, f"{size / GIB:.2f}") for what, size in parts),
        ("in all", f"{plan.memory.total / GIB:.2f}"),
        (
            f"the card has, less {RESERVE:.0%} for CUDA, NCCL and gaps (assumed)",
            f"{plan.card_memory / GIB:.2f}",
        ),
    ]
