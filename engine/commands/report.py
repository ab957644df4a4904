"""`redi report RUN ...`: what training runs came to, as a table and as curves, side by side."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.engine.console import print_table
from redi.engine.errors import InputError
from redi.engine.train.metrics import read_metrics
from redi.engine.train.run_folder import is_finished

# Okabe and Ito's colours: told apart by colour-blind eyes too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

KEYS = ("loss", "positive_logp", "negative_logp", "grad_norm", "tokens", "seconds", "tokens_per_s")


@dataclass(frozen=True)
class Curves:
    """metrics.jsonl of one run."""

    name: str
    steps: list[dict[str, Any]]
    """The step lines."""
    held_out: list[dict[str, Any]]
    """The lines of `[eval]`."""
    verdicts: list[dict[str, Any]]
    """The lines of `[guard]`."""
    finished: bool


def read_run(run_dir: Path) -> Curves:
    """The metrics of a run folder.

    Raises:
        InputError: it is none, or has no step yet.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{run_dir}: not a run folder (it has no metrics.jsonl)")
    lines = read_metrics(path)
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise InputError(f"{path}: no step has been made yet")
    for line in steps:
        if not all(isinstance(line.get(key), float | int | None) for key in KEYS):
            raise InputError(f"{path}: step {line['step']} is damaged")
    held_out = [line for line in lines if line.get("event") == "eval"]
    verdicts = [line for line in lines if line.get("event") in ("collapse", "not_finite")]
    return Curves(run_dir.name, steps, held_out, verdicts, is_finished(run_dir))


def report(run_dirs: Sequence[Path]) -> Path:
    """Print a table of the runs and draw their curves into the first one's folder.

    Returns:
        The picture.
    """
    runs = [read_run(folder) for folder in run_dirs]
    columns = ["", *(run.name for run in runs)]
    print_table("", columns, _rows(runs), sys.stdout)
    picture = run_dirs[0] / "curves.png"
    draw(runs, picture)
    return picture


def _rows(runs: Sequence[Curves]) -> list[list[str]]:
    """Each figure of each run; ends are means over the first and last tenth of the steps."""

    def ends(key: str) -> Callable[[Curves], str]:
        def show(run: Curves) -> str:
            values = [line[key] for line in run.steps if line[key] is not None]
            if not values:
                return "-"
            tenth = max(1, len(values) // 10)
            first, last = statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])
            return f"{_number(first)} to {_number(last)}"

        return show

    def held_out(key: str) -> Callable[[Curves], str]:
        def show(run: Curves) -> str:
            seen = [line for line in run.held_out if line.get(key) is not None]
            if not seen:
                return "-"
            if len(seen) == 1:
                return f"{_number(seen[0][key])}, only after step {seen[0]['step']}"
            return f"{_number(seen[0][key])} to {_number(seen[-1][key])}"

        return show

    figures: list[tuple[str, Callable[[Curves], str]]] = [
        ("steps", _steps),
        ("loss", ends("loss")),
        ("log-prob of positives", ends("positive_logp")),
        ("log-prob of negatives", ends("negative_logp")),
        ("gradient norm", ends("grad_norm")),
        ("held-out positives", held_out("positive_logp")),
        ("held-out negatives", held_out("negative_logp")),
        ("margin accuracy", held_out("margin_accuracy")),
        ("greedy accuracy", held_out("greedy_accuracy")),
        ("tokens", lambda run: f"{sum(line['tokens'] for line in run.steps):,}"),
        ("minutes", lambda run: f"{sum(line['seconds'] for line in run.steps) / 60:.1f}"),
        ("tokens/s, median", lambda run: _median(run, "tokens_per_s")),
        ("rank efficiency, median", lambda run: _median(run, "rank_efficiency")),
        ("peak memory, GiB", lambda run: f"{run.steps[-1]['peak_memory_gib']:.2f}"),
    ]
    return [[name, *(show(run) for run in runs)] for name, show in figures]


def _steps(run: Curves) -> str:
    """How many, and how the run ended where it did not finish in peace."""
    count = f"{run.steps[-1]['step']:,}" + ("" if run.finished else ", unfinished")
    if not run.verdicts:
        return count
    last = run.verdicts[-1]
    if last.get("goes_on", True):
        return f"{count}, collapse warned of at step {last['step']:,}"
    what = "collapsed" if last["event"] == "collapse" else "ended as not finite"
    return f"{run.steps[-1]['step']:,}, {what} at step {last['step']:,}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"


def _median(run: Curves, key: str) -> str:
    value = statistics.median(line[key] for line in run.steps)
    return f"{value:,.0f}" if value > 10 else f"{value:.3f}"


def draw(runs: Sequence[Curves], path: Path) -> None:
    """Loss, log-probs of both signs (dots: held out), gradient norm and speed over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, logps), (norm, speed) = figure.subplots(2, 2)
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        steps = [line["step"] for line in run.steps]
        for axes, key in ((loss, "loss"), (norm, "grad_norm"), (speed, "tokens_per_s")):
            axes.plot(steps, _floats(run.steps, key), color=colour, lw=1, label=run.name)
        for sign, style in (("positive", "-"), ("negative", "--")):
            key = f"{sign}_logp"
            logps.plot(steps, _floats(run.steps, key), style, color=colour, lw=1)
            seen = [line["step"] for line in run.held_out]
            logps.plot(seen, _floats(run.held_out, key), "o", color=colour, ms=3)
    titles = {
        loss: "loss",
        logps: "log-prob of a token: positives, negatives (dashed), held out (dots)",
        norm: "gradient norm before clipping",
        speed: "tokens/s",
    }
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _floats(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    values = (line.get(key) for line in lines)
    return [float("nan") if value is None else value for value in values]
