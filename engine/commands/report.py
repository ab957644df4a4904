"""`redi report RUN ...`: compare training runs in a table and as curves."""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.engine.console import print_table
from redi.engine.errors import InputError
from redi.engine.output import visible
from redi.engine.run_files import check_run_files
from redi.engine.storage import shown
from redi.engine.train.metrics import read_metrics
from redi.engine.train.run_folder import is_finished

# Okabe and Ito's palette, distinguishable for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

KEYS = ("loss", "positive_logp", "negative_logp", "grad_norm", "tokens", "seconds", "tokens_per_s")


@dataclass(frozen=True)
class Curves:
    """Contents of metrics.jsonl of one run."""

    name: str
    steps: list[dict[str, Any]]
    """Lines of steps."""
    held_out: list[dict[str, Any]]
    """Lines of `[eval]`."""
    guard_events: list[dict[str, Any]]
    """Lines of `[guard]`."""
    finished: bool


def read_run(run_dir: Path) -> Curves:
    """Read the metrics of a run directory.

    Raises:
        InputError: it is not a run directory, has no step yet, or its files are damaged.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{shown(run_dir)}: not a run directory (it has no metrics.jsonl)")
    check_run_files(run_dir)
    lines = read_metrics(path)
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise InputError(f"{path}: no step has finished yet")
    for line in steps:
        if not all(isinstance(line.get(key), float | int | None) for key in KEYS):
            raise InputError(f"{path}: step {line['step']} is damaged")
    held_out = [line for line in lines if line.get("event") == "eval"]
    guard_events = [line for line in lines if line.get("event") in ("collapse", "not_finite")]
    return Curves(run_dir.name, steps, held_out, guard_events, is_finished(run_dir))


def report_runs(run_dirs: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Print a table of the runs, draw their curves, and write a page of all that is known of them.

    Args:
        run_dirs: run directories.
        out: file of the page; default: report.html in the first run's directory.

    Returns:
        Paths of the picture, curves.png next to the page, and of the page.

    Raises:
        InputError: a directory holds no run, or `out` cannot be written.
    """
    from redi.engine.commands.report_page import write_page

    runs = [read_run(folder) for folder in run_dirs]
    page = run_dirs[0] / "report.html" if out is None else out
    picture = page.with_name("curves.png")
    rows = figure_rows(runs)
    print_table("", ["", *(run.name for run in runs)], rows, sys.stdout)
    try:
        draw_curves(runs, picture)
        write_page(runs, run_dirs, rows, page)
    except OSError as error:
        raise InputError(f"{page.parent} cannot be written: {error.strerror}") from None
    return [picture, page]


def figure_rows(runs: Sequence[Curves]) -> list[list[str]]:
    """One row per figure: its name, and its value for each run.

    "a to b" are means over the first and the last tenth of the steps.
    """

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
        ("model TFLOP/s of a rank, median", lambda run: _median(run, "model_tflops")),
        ("MFU, median", lambda run: _median(run, "mfu")),
        ("rank efficiency, median", lambda run: _median(run, "rank_efficiency")),
        ("peak memory, GiB", lambda run: f"{run.steps[-1]['peak_memory_gib']:.2f}"),
    ]
    return [[name, *(show(run) for run in runs)] for name, show in figures]


def _steps(run: Curves) -> str:
    """Number of steps, and how the run ended, if not normally."""
    return ", ".join(filter(None, (f"{run.steps[-1]['step']:,}", outcome(run))))


def outcome(run: Curves) -> str:
    """How the run ended; "" if normally."""
    found = [] if run.finished else ["unfinished"]
    if run.guard_events:
        last = run.guard_events[-1]
        if last.get("goes_on", True):
            found.append(f"collapse warning at step {last['step']:,}")
        else:
            what = "collapsed" if last["event"] == "collapse" else "not finite"
            found = [f"{what} at step {last['step']:,}"]
    return ", ".join(found)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"


def _median(run: Curves, key: str) -> str:
    """Median of a figure; "-" if no step has it: an older run, or an MFU of a device unknown."""
    values = [line[key] for line in run.steps if line.get(key) is not None]
    if not values:
        return "-"
    value = statistics.median(values)
    if value > 10:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def draw_curves(runs: Sequence[Curves], path: Path) -> None:
    """Plot loss, log-probs of both signs (dots: held-out), gradient norm and speed by step."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, logps), (norm, speed) = figure.subplots(2, 2)
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        label = f" {visible(run.name)}"  # matplotlib hides a label that starts with "_"
        steps = [line["step"] for line in run.steps]
        for axes, key in ((loss, "loss"), (norm, "grad_norm"), (speed, "tokens_per_s")):
            axes.plot(steps, _floats(run.steps, key), color=colour, lw=1, label=label)
        for sign, style in (("positive", "-"), ("negative", "--")):
            key = f"{sign}_logp"
            logps.plot(steps, _floats(run.steps, key), style, color=colour, lw=1)
            seen = [line["step"] for line in run.held_out]
            logps.plot(seen, _floats(run.held_out, key), "o", color=colour, ms=3)
    titles = {
        loss: "loss",
        logps: "log-prob per token: positives, negatives (dashed), held-out (dots)",
        norm: "gradient norm before clipping",
        speed: "tokens/s",
    }
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    # A name may have a dollar sign, and letters that the font lacks.
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        loss.legend(frameon=False)
        figure.savefig(path, dpi=120)


def _floats(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    values = (line.get(key) for line in lines)
    return [float("nan") if value is None else value for value in values]
