"""`redi plan`: estimates a recipe's time and memory without a GPU.

Packing is identical to training's, step by step. Memory is counted (`memory.py`). Time follows from
the flops of the packs and an assumed fraction of the GPU's peak.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from redi.engine.config.sections import Recipe, check_replicas
from redi.engine.console import Console
from redi.engine.data.summary import show, warnings
from redi.engine.distributed import join_world
from redi.engine.errors import InputError
from redi.engine.model.adapter import check_adapter
from redi.engine.model.architecture import check_context, check_dropout
from redi.engine.model.build import check_vocabulary, model_config
from redi.engine.model.flops import ModelSize, model_size
from redi.engine.model.router_loss import router_coefficient
from redi.engine.model.sharding import compute_dtype
from redi.engine.plan.auto_rows import auto_rows, with_rows
from redi.engine.plan.cards import Cluster
from redi.engine.plan.display import show_plan
from redi.engine.plan.memory import generation_memory, step_memory
from redi.engine.plan.packed_run import pack_run
from redi.engine.plan.search import Gpus, fastest, longest_unit
from redi.engine.plan.types import Plan
from redi.engine.train.prepare_data import PreparedData, check_positions, prepare_data
from redi.engine.train.teachers import check_teacher


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
        check_replicas(recipe.shard, cluster.ranks)
        check_context(recipe.model.path or "", config, recipe.shard.context)
        check_adapter(recipe, config, compute_dtype(recipe.train.dtype, torch.device("cuda")))
        has_router_loss = router_coefficient(recipe, config) > 0
        with join_world() as world:
            data = prepare_data(recipe, world, console)
        check_teacher(data.teacher, config)
        check_positions(
            data.tokens,
            data.examples.lengths,
            data.examples.units,
            config,
            "lower data.max_tokens to {}, or raise model.max_position_embeddings",
        )
        size = model_size(config, recipe.adapter, has_router_loss)
        if recipe.train.row_tokens == "auto":
            recipe = with_rows(
                recipe, auto_rows(recipe, size, data, Gpus.of(cluster, config), console)
            )
        row_tokens = recipe.train.resolved_row_tokens
        summary = data.summarize(recipe, row_tokens, cluster.ranks, size.training_cost(), size)
        show(summary, path, console)
        for warning in warnings(summary):
            console.warn(warning)
        plan = make_plan(recipe, config, size, data, cluster, console)
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
    recipe: Recipe,
    config: Any,
    size: ModelSize,
    data: PreparedData,
    cluster: Cluster,
    console: Console,
) -> Plan:
    """Estimate packing, memory and time of a recipe.

    Args:
        recipe: resolved.
        config, size: configuration and size of its model.
        data: its training data.
        cluster: the GPUs to plan for.
        console: output of the progress.

    Raises:
        InputError: the model or the backend is not supported.
    """
    if recipe.objective.backend == "reference":
        raise InputError('objective.backend: plan does not support "reference"; use "auto"')
    packing, load = pack_run(recipe, size, data, cluster, console)
    gpus = Gpus.of(cluster, config)
    memory = step_memory(recipe, config, load, cluster.ranks, cluster.figures)
    generating = None
    if data.held_out is not None and data.held_out.problems is not None:
        problems = data.held_out.problems
        generating = generation_memory(memory, recipe, config, size, problems)
    found = fastest(recipe, size, data, gpus, console)
    seconds = packing.seconds * packing.steps
    return Plan(
        cluster=cluster,
        packing=packing,
        memory=memory,
        generating=generating,
        card_memory=cluster.figures.usable_memory,
        fits=max(memory.total, generating or 0) <= cluster.figures.usable_memory,
        fastest=found,
        row_tokens=recipe.train.resolved_row_tokens,
        rows_are_short=recipe.train.resolved_row_tokens <= longest_unit(data)
        and recipe.shard.gather == "micro_step",
        seconds=seconds,
        tokens_per_s=packing.tokens / seconds,
    )
