"""`train.row_tokens = "auto"`: the row length that trains a recipe fastest and fits the GPU.

It depends on recipe, data, model, number of ranks and GPU alone, and a run keeps it on resume.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.distributed import World
from redi.engine.model.flops import ModelSize
from redi.engine.plan.cards import CARDS, MFU, Card, card_of
from redi.engine.plan.memory import Load, step_memory
from redi.engine.plan.search import CountMemory, Gpus, fastest, row_lengths
from redi.engine.train.prepare_data import PreparedData

CPU_FLOPS = 1e11
"""Flops a second of a CPU process, in order of magnitude: only short packs wait for launches."""


def with_rows(recipe: Recipe, row_tokens: int) -> Recipe:
    """The recipe with rows of this length."""
    return replace(recipe, train=replace(recipe.train, row_tokens=row_tokens))


def auto_rows(
    recipe: Recipe, size: ModelSize, data: PreparedData, gpus: Gpus, console: Console
) -> int:
    """The row length, and a warning if none fits."""
    found = fastest(recipe, size, data, gpus, console, axes=())
    if found is not None:
        return found.row_tokens
    shortest = row_lengths(data)[0]
    console.warn(
        f"train.row_tokens: by the estimate even rows of {shortest:,} tokens, the longest trace, "
        "do not fit the GPU; `redi plan` searches settings that do"
    )
    return shortest


def rows_without_card(recipe: Recipe, size: ModelSize, data: PreparedData, ranks: int) -> int:
    """The row length for ranks on CPUs: ranks wait least for each other; memory has no limit."""
    cpus = Gpus(ranks, CPU_FLOPS)
    return auto_rows(recipe, size, data, cpus, Console(active=False))


def resolve_rows(
    recipe: Recipe,
    kept: int | None,
    config: Any,
    size: ModelSize,
    data: PreparedData,
    world: World,
    console: Console,
) -> Recipe:
    """The recipe with a number of row tokens, equal on every rank. Collective.

    Args:
        recipe: resolved otherwise.
        kept: that of the run that is resumed; None: a new run.
        config, size: configuration and size of the model.
        data: the run's data.
    """
    if recipe.train.row_tokens != "auto":
        return recipe

    def choose() -> int:
        if kept is not None:
            return kept
        if world.device.type != "cuda":
            return rows_without_card(recipe, size, data, world.size)
        card = card_of_device(world.device)
        with _counting(config, world.size, card) as count:
            gpus = Gpus(world.size, MFU * card.peak_flops, card.usable_memory, count)
            return auto_rows(recipe, size, data, gpus, console)

    row_tokens = world.from_rank0(choose)
    why = "as in the run so far" if kept is not None else "auto"
    console.say(f"train.row_tokens: {row_tokens:,} ({why})")
    return with_rows(recipe, row_tokens)


def card_of_device(device: torch.device) -> Card:
    """The figures of a GPU: those of `CARDS`, or of the device with the speed of an A100."""
    properties = torch.cuda.get_device_properties(device)
    if key := card_of(properties.name):
        return CARDS[key]
    return replace(
        CARDS["a100"],
        memory=properties.total_memory,
        processors=properties.multi_processor_count,
        architecture=f"sm_{properties.major}{properties.minor}",
        names=(properties.name,),
    )


@contextmanager
def _counting(config: Any, ranks: int, card: Card) -> Iterator[CountMemory]:
    """Counts memory in another process: this one has its process group, the count needs another."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        yield lambda recipe, load: pool.submit(_count, recipe, config, load, ranks, card).result()


def _count(recipe: Recipe, config: Any, load: Load, ranks: int, card: Card) -> int:
    return step_memory(recipe, config, load, ranks, card).total
