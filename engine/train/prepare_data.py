"""Prepare the data of a run before a model is loaded: tokens, examples, schedule."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from redi.engine.config.distill import is_distilled
from redi.engine.config.objectives import UnitKind
from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.distributions import Distributions
from redi.engine.data.mismatched import MismatchedTraces, mismatch
from redi.engine.data.mixing import mix
from redi.engine.data.packing import Cost
from redi.engine.data.schedule import Examples, Schedule, select
from redi.engine.data.summary import Summary, summarize
from redi.engine.data.text import load_tokenizer
from redi.engine.data.tokens import TokenizedTraces, TokenSettings, tokenize
from redi.engine.data.weight_counts import check_weights, count_weights
from redi.engine.distill.token_filter import filtered
from redi.engine.distributed import World
from redi.engine.errors import InputError
from redi.engine.model.flops import ModelSize
from redi.engine.train.generation_accuracy import held_out_problems
from redi.engine.train.teachers import teachers_of
from redi.engine.train.validation import HeldOut


@dataclass(frozen=True)
class PreparedData:
    """The data of a run, prepared before a model is loaded."""

    tokens: TokenizedTraces
    examples: Examples
    schedule: Schedule
    held_out: HeldOut | None
    teacher: Distributions | None = None
    """Distributions of the traces, if the loss needs them."""
    mismatched: MismatchedTraces | None = None
    """The mismatched rows of the traces, if the loss needs them."""

    @property
    def keys(self) -> dict[str, str | None]:
        """Hashes of the tokenized sets, by section of the recipe."""
        held_out = self.held_out.tokens.key if self.held_out else None
        teacher = {"distill": self.teacher.key} if self.teacher else {}
        return {"data": self.tokens.key, "eval": held_out, **teacher}

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """The content of these hashes."""
        held_out = self.held_out.tokens.parts if self.held_out else {}
        return {"data": self.tokens.parts, "eval": held_out}

    @property
    def longest_held_out(self) -> int:
        """Tokens of the longest held-out trace; 0 without any."""
        if self.held_out is None:
            return 0
        return int(self.held_out.examples.lengths[self.held_out.sequences].max())

    @cached_property
    def num_targets(self) -> np.ndarray:
        """Trained tokens of each trace, without masked ones, int64 [N]."""
        lengths = self.examples.lengths
        return self.tokens.num_targets(np.arange(len(lengths)), lengths)

    def lengths_of(self, units: np.ndarray) -> np.ndarray:
        """Tokens of each trace of units, int64 [traces]."""
        return self.examples.lengths[self.examples.units[units].reshape(-1)]

    def summarize(
        self, recipe: Recipe, row_tokens: int, ranks: int, cost: Cost, size: ModelSize
    ) -> Summary:
        """Summary of what a run on this number of ranks trains; see `summarize`."""
        held_out = self.held_out
        return summarize(
            self.tokens,
            self.examples,
            self.schedule,
            (held_out.tokens, held_out.examples) if held_out else None,
            row_tokens=row_tokens,
            world_size=ranks,
            cost=cost,
            gather=recipe.shard.gather,
            context=recipe.shard.context,
            teacher=self.teacher,
            share_prompts=size.shares_prompts(recipe),
        )


def prepare_data(recipe: Recipe, world: World, console: Console) -> PreparedData:
    """Tokenize or open the cache, select the examples to train on, and schedule the steps."""
    tokens = tokenized(recipe, recipe.data.paths, world, console, recipe.data.where)
    whole = tokens.of_teachers(recipe.data.teachers, recipe.data.teacher_weights)
    tokens = _filtered(recipe, whole, world, console)
    examples = _examples(recipe, tokens, recipe.objective.kind.units)
    check_weights(recipe.objective, tokens, count_weights(tokens, examples))
    schedule = Schedule(
        num_units=len(examples.units),
        batch=recipe.train.batch,
        epochs=recipe.train.epochs,
        max_steps=recipe.train.max_steps,
        seed=recipe.train.seed,
        mixture=mix(tokens, examples.units, recipe.data.paths, recipe.data.mixing_weights),
    )
    held_out = _held_out(recipe, world, console)
    if not is_distilled(recipe):
        mismatched = mismatch(tokens, examples) if recipe.objective.kind.mismatched else None
        return PreparedData(tokens, examples, schedule, held_out, mismatched=mismatched)
    teacher = world.from_rank0(
        lambda: teachers_of(recipe, whole, console), lambda teacher: teacher.files
    )
    return PreparedData(tokens, examples, schedule, held_out, teacher)


def _filtered(
    recipe: Recipe, tokens: TokenizedTraces, world: World, console: Console
) -> TokenizedTraces:
    """The traces with the tokens that `[token_filter]` keeps."""
    section = recipe.token_filter
    if section.keep is None or section.reference is None or section.student is None:
        return tokens
    files, keep = (Path(section.reference), Path(section.student)), section.keep
    return world.from_rank0(
        lambda: filtered(tokens, *files, keep, recipe.data.cache_dir, console),
        lambda tokens: tokens.files,
    )


def _held_out(recipe: Recipe, world: World, console: Console) -> HeldOut | None:
    """The traces of `[eval]`: pairs if any trace is incorrect, else the correct traces."""
    if not recipe.eval.paths:
        return None
    tokens = tokenized(recipe, recipe.eval.paths, world, console)
    examples = _examples(recipe, tokens, "pairs" if (tokens.signs < 0).any() else "positives")
    targets = tokens.num_targets(np.arange(len(tokens)), examples.lengths)
    scored = (targets[examples.units] > 0).all(axis=1)
    if not scored.any():
        raise InputError(f"eval.path: {', '.join(tokens.sources)}: spans mask all that is scored")
    examples = replace(examples, units=examples.units[scored])
    return HeldOut(tokens, examples, held_out_problems(recipe))


def _examples(recipe: Recipe, tokens: TokenizedTraces, objective_needs: UnitKind) -> Examples:
    end = None
    if recipe.data.eos == "left_out":
        end = load_tokenizer(recipe.model.tokenizer or recipe.model.path or "").eos_token_id
    return select(
        tokens,
        objective_needs=objective_needs,
        pairing=recipe.data.pairing,
        duplicates=recipe.data.duplicates,
        max_tokens=recipe.data.max_tokens,
        min_tokens=recipe.data.min_tokens,
        max_prompt_tokens=recipe.data.max_prompt_tokens,
        max_completion_tokens=recipe.data.max_completion_tokens,
        overlong=recipe.data.overlong,
        row_tokens=None if recipe.train.row_tokens == "auto" else recipe.train.row_tokens,
        untrained_end=end,
    )


def tokenized(
    recipe: Recipe,
    paths: tuple[str, ...],
    world: World,
    console: Console,
    where: str | None = None,
) -> TokenizedTraces:
    """The traces of files, tokenized by the settings of `[data]`; texts are cut into pieces.

    Rank 0 hashes the files and fills the cache; the other ranks open what it found.

    Args:
        recipe: its `[data]` and `[model]` sections are used.
        paths: the files.
        world: this process.
        console: where progress and warnings are shown.
        where: selects traces; None: all, as for held-out ones.
    """
    settings = token_settings(recipe, paths, where)
    cache = recipe.data.cache_dir
    processes = recipe.data.processes or min(8, os.cpu_count() or 1)
    tokens = world.from_rank0(
        lambda: tokenize(settings, cache, processes=processes, console=console),
        lambda tokens: tokens.files,
    )
    return tokens.in_pieces(recipe.data.max_tokens)


def token_settings(
    recipe: Recipe, paths: tuple[str, ...], where: str | None = None
) -> TokenSettings:
    """How `tokenized` tokenizes files."""
    return TokenSettings(
        paths=paths,
        format=recipe.data.format,
        template=recipe.data.template,
        system_prompt=recipe.data.system_prompt,
        tokenizer_path=recipe.model.tokenizer or recipe.model.path or "",
        template_variables=recipe.data.template_variables,
        train_on=recipe.data.train_on,
        where=where,
        control_tokens=recipe.data.control_tokens,
        faulty=recipe.data.faulty,
        max_row_mb=recipe.data.max_row_mb,
    )


def check_positions(
    tokens: TokenizedTraces, lengths: np.ndarray, used: np.ndarray, config: Any, advice: str
) -> None:
    """Raise if a trace is longer than the model's context.

    Args:
        lengths: int64 [traces], tokens kept of each.
        used: indices of traces, in any shape and order.
        config: the model's configuration.
        advice: the remedy for the message; {} stands for the number of positions.

    Raises:
        InputError: a trace is longer; the message names its row.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and lengths[used].max() > positions:
        traces = np.unique(used)  # slow for millions of traces, so only for the message
        over = traces[lengths[traces] > positions]
        raise InputError(
            f"{tokens.where(int(over[0]))}: {lengths[over[0]]} tokens are more than the model's "
            f"{positions} positions ({len(over)} of {len(traces)} traces are): "
            f"{advice.format(positions)}"
        )
