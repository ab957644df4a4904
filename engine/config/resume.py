"""The keys of a recipe that may change when its run resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from redi.engine.config.sections import Recipe

# None of these keys changes the mathematics of training.
MAY_CHANGE_ON_RESUME = (
    "eval.samples",
    "guard.max_skips",
    "guard.collapse",
    "run.dir",
    "run.save_every",
    "run.keep",
    "run.timeout",
    "run.trackers",
    "run.resume",
    "run.profile",
    "shard.replicate",
    "shard.context",
    "shard.reduce",
    "shard.gather",
    "shard.checkpointing",
    "shard.compile",
    "shard.offload",
    "train.row_tokens",
    "train.share_prompts",
    "data.cache",
    "data.processes",
    "data.workers",
)


def changed_keys(old: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """The keys that changed although they must not.

    A key that the old recipe lacks was added to the engine later; it counts as its default.

    Args:
        old: the resolved recipe in the run folder, by section.
        recipe: the recipe that resumes the run.
    """
    before, now = asdict(Recipe()), asdict(recipe)
    for section, values in old.items():
        before[section] = before.get(section, {}) | values
    return [
        f"{section}.{name}"
        for section, values in now.items()
        for name, value in values.items()
        if f"{section}.{name}" not in MAY_CHANGE_ON_RESUME
        and _as_list(before[section][name]) != _as_list(value)
    ]


def _as_list(value: Any) -> Any:
    # A tuple comes back from TOML as a list.
    return list(value) if isinstance(value, tuple) else value
