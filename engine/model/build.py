"""Builds the model of a recipe: configuration, checks, attention, sharding, weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redi.engine.config.distill import divergence_weight
from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.context import ALONE, ContextGroup
from redi.engine.data.text import load_tokenizer
from redi.engine.distributed import World
from redi.engine.errors import InputError
from redi.engine.loss.packed_loss import PLAIN, PackedLoss
from redi.engine.model.adapter import add_adapter, fill_adapter
from redi.engine.model.architecture import (
    attention_for,
    check_architecture,
    drops_boundaries,
    model_problem,
    per_document_rope,
)
from redi.engine.model.attention import register_attention
from redi.engine.model.boundaries import pass_boundaries
from redi.engine.model.export import check_exportable
from redi.engine.model.fp8 import use_fp8
from redi.engine.model.liger import apply_liger
from redi.engine.model.load import empty_model, generation_config, read_config
from redi.engine.model.mixers import separate_documents
from redi.engine.model.router_loss import router_loss
from redi.engine.model.sharding import reduce_in_place, shard
from redi.engine.model.student import Student
from redi.engine.model.weights import read_weights


def model_config(recipe: Recipe, weights: bool = True) -> Any:
    """The configuration of the recipe's model, with the values that the recipe replaces.

    Args:
        weights: True if the weights must be available too.

    Raises:
        InputError: the model does not exist or cannot be trained.
    """
    model = recipe.model
    path = model.path or ""
    config = read_config(path, model.rope_theta, model.max_position_embeddings, weights)
    logits = check_architecture(path, config)
    if recipe.objective.filter_epsilon and recipe.shard.context > 1:
        raise InputError(
            "objective.filter_epsilon is not available with shard.context: it counts the tokens of "
            "whole sequences; remove one of the two"
        )
    if recipe.objective.filter_epsilon and logits != PLAIN:
        raise InputError(
            "objective.filter_epsilon is not available for a model with scaled or soft-capped "
            f"logits ({path}); remove it"
        )
    return config


def check_vocabulary(recipe: Recipe, config: Any) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer. Raises InputError if it has more tokens than the model."""
    tokenizer = load_tokenizer(recipe.model.tokenizer or recipe.model.path or "")
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"model.tokenizer: it has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{vocabulary}"
        )
    return tokenizer


def build_model(
    path: str, config: Any, attention: str, context: ContextGroup = ALONE
) -> PreTrainedModel:
    """A model to train, on the meta device without weights, with packed attention.

    Args:
        path: directory or hub name.
        config: the model's configuration.
        attention: a name returned by `choose_attention`.
        context: the ranks that share a pack.

    Raises:
        InputError: packs, the fused loss or sharding do not support it.
    """
    model = empty_model(config, attention=register_attention(attention, context))
    if problem := model_problem(model):
        raise InputError(f"model.path: {path}: {problem}")
    separate_documents(model)
    if drops_boundaries(config):
        pass_boundaries(model)
    if (generation := generation_config(path)) is not None:
        model.generation_config = generation
    return model


def build_student(
    recipe: Recipe, config: Any, dtype: torch.dtype, world: World, console: Console
) -> tuple[Student, PreTrainedTokenizerBase]:
    """Build the model, check that it can be exported, shard it, read its weights."""
    path = recipe.model.path or ""
    kind, reason = attention_for(config, recipe.model.attention, world.device, dtype)
    slow = kind == "sdpa" and recipe.model.attention == "auto" and world.device.type == "cuda"
    precision = str(dtype).removeprefix("torch.")
    show = console.warn if slow else console.say
    show(f"attention: {kind} ({reason}); compute dtype {precision}")
    context = ContextGroup.join(recipe.shard.context)
    model = build_model(path, config, kind, context)
    per_document_rope(model, config)  # not on the meta device: it reads positions
    tokenizer = check_vocabulary(recipe, model.config)
    if world.is_main:
        with tempfile.TemporaryDirectory() as folder:
            check_exportable(model, tokenizer, Path(folder) / "export")
    liger = apply_liger(model, recipe.model.liger, world.device)
    console.say(f"liger-kernel: {liger}")
    if recipe.train.fp8:
        console.say(f"float8: {use_fp8(model, world.device)}")
    adapter = None
    if recipe.adapter.wanted:
        adapter = add_adapter(model, recipe.adapter, dtype)
        console.say(f"adapter: {adapter.text(model)}")
    router = router_loss(recipe, model)
    if router is not None:
        console.say(f"router loss: {router.coefficient:g} x that of {router.routers} routers")
    model.train()
    objective = PackedLoss(
        recipe.objective, context=context, divergence_weight=divergence_weight(recipe)
    )
    student = Student(model, objective, adapter, router)
    shard(student, recipe.shard, dtype, world.device, recipe.train.resolved_row_tokens)
    if world.size == 1 and world.device.type == "cpu":
        reduce_in_place(student)
    student.to_empty(device=world.device)  # allocates the shards alone
    read_weights(model, path)
    if adapter is not None:
        fill_adapter(model, recipe.adapter, recipe.train.seed)
    return student, tokenizer
