"""What tests of training runs share."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from redi.engine.train.metrics import TIMINGS

COLLAPSES = {
    "objective.alpha": 3.0,
    "optim.lr": 0.03,
    "optim.schedule": "constant",
    "optim.warmup": 0.0,
    "data.pairing": "first",
    "train.batch": 4,
    "train.max_steps": 25,
    "run.save_every": 6,
    "run.keep": 1,
}
"""Changes to the recipe of the small world with which a run collapses."""


def has_steps(run_dir: Path, count: int) -> bool:
    """True if a run has logged at least `count` steps."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.read_text().count('"loss"') >= count


def untimed(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without the values that differ between equal runs."""
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
