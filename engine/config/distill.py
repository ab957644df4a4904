"""Which recipes learn from a teacher's distributions, and which keys they then read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from redi.engine.config.objectives import DIVERGENCE
from redi.engine.config.sections import DistillConfig, Recipe
from redi.engine.errors import InputError


def divergence_weight(recipe: Recipe) -> float:
    """Weight of the divergence from a teacher in the loss; 0: the loss has none."""
    return 1.0 if recipe.objective.name == "kd" else recipe.distill.weight


def is_distilled(recipe: Recipe) -> bool:
    """True if the loss needs a teacher's distributions."""
    return divergence_weight(recipe) > 0


def objective_keys(recipe: Recipe) -> tuple[str, ...]:
    """The keys of `[objective]` that a recipe reads."""
    further = DIVERGENCE if recipe.distill.weight > 0 else ()
    return (*recipe.objective.kind.keys, *further)


def resolve_distill(
    recipe: Recipe, given: Mapping[str, Any], overridden: Collection[str]
) -> Recipe:
    """Check `[distill]`; without a teacher to learn from, without what an override gave it.

    Args:
        given: the section in the recipe file.
        overridden: names of the keys that the command line sets.

    Raises:
        InputError: the objective has no such term, or does not use the section; or the tail has
            no probability at the temperature.
    """
    objective, section = recipe.objective, recipe.distill
    name = objective.name
    if section.weight > 0:
        if name == "kd":
            raise InputError(
                "distill.weight is not used by kd, whose loss is the divergence; "
                "remove it (objective.ce_weight adds a cross-entropy)"
            )
        if not objective.kind.distills or objective.negative_gamma > 0:
            with_gamma = " with objective.negative_gamma" if objective.negative_gamma else ""
            raise InputError(
                f"distill.weight adds to sft, redi and signed, not to {name}{with_gamma}; remove it"
            )
        if objective.filter_epsilon:
            raise InputError(
                "objective.filter_epsilon cannot be used with distill.weight; remove one of them"
            )
    if is_distilled(recipe):
        if objective.tail == "bucket" and objective.temperature != 1:
            raise InputError(
                f'objective.temperature = {objective.temperature:g} needs objective.tail = "ignore"'
                ": a teacher's table has the probability of the tokens outside of its K entries at "
                "temperature 1 alone"
            )
        return recipe
    default = DistillConfig()
    for key in given:
        is_default = getattr(section, key) == getattr(default, key)
        if not is_default and f"distill.{key}" not in overridden:
            raise InputError(not_used(key, name))
    return replace(recipe, distill=default)


def not_used(key: str, name: str) -> str:
    """The line of an error: a key of `[distill]` for an objective without a teacher."""
    return (
        f'distill.{key} is not used by {name}: set objective.name = "kd", or distill.weight, or '
        "remove it"
    )
