"""The teachers' distributions of a recipe, and the checks that need data and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.distributions import Distributions
from redi.engine.distill.sources import read_teacher
from redi.engine.errors import InputError


def teachers_of(recipe: Recipe, tokens: TokenizedTraces, console: Console) -> Distributions:
    """The distributions of a recipe's teachers for its traces, from the cache or from files.

    Raises:
        InputError: a path is a model, or a file has none or those of other tokens; names file and
            row.
    """
    sources: list[tuple[tuple[str, ...], str]]
    for path in recipe.distill.paths:
        if any((Path(path) / name).is_file() for name in ("config.json", "export/config.json")):
            raise InputError(
                f"distill.path: {path} is a model, not its distributions; write them with "
                f"`redi logprobs {path} --data DATA --top K --out teacher.parquet`"
            )
    sources = [((path,), "auto") for path in recipe.distill.paths]
    stores = [
        read_teacher(
            paths,
            tokens,
            format=format,
            train_on=recipe.data.train_on,
            faulty=recipe.data.faulty,
            tokenizer=recipe.model.tokenizer or recipe.model.path or "",
            cache_dir=recipe.data.cache_dir,
            console=console,
        )
        for paths, format in sources or [(recipe.data.paths, recipe.data.format)]
    ]
    return Distributions(stores, recipe.distill.mixing_weights or [1.0] * len(stores))


def check_teacher(teacher: Distributions | None, config: Any) -> None:
    """Raise if a teacher has tokens that the model has not.

    Args:
        config: the model's configuration.

    Raises:
        InputError: names the files.
    """
    vocabulary = config.get_text_config().vocab_size
    for store in teacher.stores if teacher else ():
        if store.meta.largest_id >= vocabulary:
            raise InputError(
                f"{store.meta.source}: has the token {store.meta.largest_id}, but the model has "
                f"only {vocabulary}; a teacher must have the student's tokenizer"
            )
