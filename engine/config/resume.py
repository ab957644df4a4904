"""Which keys of a recipe may differ when its run resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from redi.engine.config.sections import Recipe

# What a resumed run may change: nothing here alters the mathematics.
MAY_CHANGE_ON_RESUME = (
    "guard.max_skips",
    "guard.collapse",
    "run.dir",
    "run.save_every",
    "run.keep",
    "run.trackers",
    "run.resume",
    "shard.replicate",
    "shard.reduce",
    "shard.checkpointing",
    "shard.compile",
    "train.row_tokens",
    "data.cache",
    "data.processes",
    "data.workers",
)


def changed_keys(old: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Keys that differ from a resolved recipe read back from a run folder and may not.

    A key that the old recipe does not have (it is younger) had its default value.
    """
    before, now = asdict(Recipe()), asdict(recipe)
    for section, values in old.items():
        before[section] |= values
    return [
        f"{section}.{name}"
        for section, values in now.items()
        for name, value in values.items()
        if f"{section}.{name}" not in MAY_CHANGE_ON_RESUME
        and _as_list(before[section][name]) != _as_list(value)
    ]


def _as_list(value: Any) -> Any:
    # TOML gives back a tuple as a list.
    return list(value) if isinstance(value, tuple) else value
