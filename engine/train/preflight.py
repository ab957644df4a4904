"""Checks of a recipe against this machine and the model, before data is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from redi.engine.config.sections import Recipe, check_replicas
from redi.engine.distributed import World
from redi.engine.errors import InputError
from redi.engine.model.adapter import check_adapter
from redi.engine.model.architecture import attention_for, check_context, check_dropout, has_mixers
from redi.engine.model.attention import NOT_IN_GRAPHS
from redi.engine.model.build import model_config
from redi.engine.model.checkpointing import NOT_KEPT
from redi.engine.model.fp8 import check_fp8
from redi.engine.model.router_loss import router_coefficient
from redi.engine.model.sharding import compute_dtype
from redi.engine.storage import open_run
from redi.engine.train.guards import check_not_collapsed
from redi.engine.train.optimizer import check_optimizer
from redi.engine.train.trackers import check_trackers
from redi.kernels.backends import choose_backend, filtering_backend


@dataclass(frozen=True)
class Preflight:
    """Results of the checks."""

    config: Any
    """The model's configuration with the recipe's changes."""
    dtype: torch.dtype
    """Dtype of computation and of the export."""


def check_before_data(recipe: Recipe, run_dir: Path, world: World) -> Preflight:
    """Check everything that does not need the data: tokenizing it may take hours.

    Raises:
        InputError: the model, the recipe or the machine does not allow this run.
    """
    world.from_rank0(lambda: check_not_collapsed(recipe.guard, run_dir))
    world.from_rank0(open_run(run_dir).check_writable)
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Uninitialized memory is never read here, and filling gigabytes of logits takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    transformers_logging.disable_progress_bar()
    config = model_config(recipe)
    check_trackers(recipe.run.trackers)
    check_replicas(recipe.shard, world.size)
    check_optimizer(recipe.optim)
    dtype = compute_dtype(recipe.train.dtype, world.device)
    kind, _ = attention_for(config, recipe.model.attention, world.device, dtype)
    check_dropout(recipe.model.path or "", config, kind)
    check_adapter(recipe, config, dtype)
    check_context(recipe.model.path or "", config, recipe.shard.context)
    check_fp8(recipe, world.device, dtype)
    _check_compile(recipe, kind, config)
    _check_checkpointing(recipe, kind)
    _check_backend(recipe, world.device, dtype)
    return Preflight(config, dtype)


def _check_compile(recipe: Recipe, attention: str, config: Any) -> None:
    if recipe.shard.compile and has_mixers(config):
        raise InputError(
            "shard.compile: a model whose linear attention or convolutions run document by "
            "document cannot be compiled; remove it"
        )
    if router_coefficient(recipe, config) and recipe.shard.compile:
        raise InputError(
            "shard.compile: the router loss reads the routers inside of blocks, which a compiled "
            "block does not show; remove it, or set train.router_aux_loss = 0"
        )
    recomputed = recipe.shard.checkpointing != "none"
    if recipe.shard.compile and recomputed and attention in NOT_IN_GRAPHS:
        raise InputError(
            "shard.compile: with shard.checkpointing a block must be compiled as one graph, and "
            f'attention "{attention}" cannot be; remove one of the two, or set model.attention to '
            '"varlen" on CUDA'
        )


def _check_checkpointing(recipe: Recipe, attention: str) -> None:
    if recipe.shard.checkpointing == "attention" and attention in NOT_KEPT:
        raise InputError(
            f'shard.checkpointing: "attention" keeps the results of attention, and those of '
            f'"{attention}" cannot be kept; use "full", or set model.attention to "varlen"'
        )


def _check_backend(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
    filtered = bool(recipe.objective.filter_epsilon)
    if filtered and recipe.shard.context > 1:
        raise InputError(
            "objective.filter_epsilon is not available with shard.context: it counts the tokens of "
            "whole sequences; remove one of the two"
        )
    if filtered and dtype != torch.bfloat16:
        raise InputError(
            'objective.filter_epsilon needs bfloat16: set train.dtype = "bfloat16", or remove it'
        )
    try:
        (filtering_backend if filtered else choose_backend)(recipe.objective.backend, device)
    except ValueError as error:
        raise InputError(f"objective.backend: {error}") from None
