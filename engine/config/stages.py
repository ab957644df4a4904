"""What a recipe without `model.path` starts from: the result of the recipe before it."""

from __future__ import annotations

from dataclasses import replace

from redi.engine.config.sections import AdapterConfig, Recipe
from redi.engine.errors import InputError
from redi.engine.storage import inside


def follow(path: str, recipe: Recipe, before: Recipe) -> Recipe:
    """The recipe with the model, and the adapter, that the recipe before it exports.

    After a recipe that exports an adapter alone it has the same model and continues that adapter.

    Args:
        path: of the recipe's file, for messages.
        recipe: without `model.path`.
        before: the recipe before it, with `run.dir`.

    Raises:
        InputError: it does not continue the adapter.
    """
    export = inside(before.run.dir or "", "export")
    if not exports_adapter(before):
        return replace(recipe, model=replace(recipe.model, path=export))
    tokenizer = recipe.model.tokenizer or before.model.tokenizer
    model = replace(recipe.model, path=before.model.path, tokenizer=tokenizer)
    adapter = replace(continued(path, recipe.adapter, before.adapter), path=export)
    return replace(recipe, model=model, adapter=adapter)


def exports_adapter(recipe: Recipe) -> bool:
    """True if the recipe exports an adapter without the model."""
    return recipe.adapter.wanted and not recipe.adapter.merge


def continued(path: str, adapter: AdapterConfig, before: AdapterConfig) -> AdapterConfig:
    """The section of a recipe that continues the adapter of the recipe before it.

    Raises:
        InputError: it asks for another adapter, or for none.
    """
    if not adapter.wanted:
        raise InputError(
            f"{path}: the recipe before exports an adapter, and this one has none: set "
            f"adapter.rank = {before.rank} here to continue it, or adapter.merge = true there"
        )
    for name in ("rank", "alpha", "targets", "dora", "base"):
        now, then = getattr(adapter, name), getattr(before, name)
        if now not in (then, getattr(AdapterConfig(), name)):
            raise InputError(
                f"{path}: adapter.{name} = {now}, but it continues the adapter of the recipe "
                f"before, with {then}; leave it out, or set adapter.merge = true there"
            )
    return replace(before, dropout=adapter.dropout, merge=adapter.merge)
