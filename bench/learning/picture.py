"""The pictures of a task: alpha, learning rate and runs, or the methods of a study in a row."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from redi.bench.learning.report import ALPHAS, CONTROL, Record, chosen
from redi.bench.learning.students import TEMPERATURE
from redi.bench.learning.tasks import TASKS
from redi.engine.commands.report import COLOURS
from redi.engine.generation.scoring import mean_and_error, paired_difference

SHOWN = "REDI 0.8"
"""The method whose runs are shown at every learning rate."""


def draw(record: Record, path: Path) -> None:
    """Upper row: results on test problems. Lower row: curves of stage 2."""
    figure = Figure(figsize=(17, 7.8), layout="constrained")
    figure.suptitle(f"{TASKS[record['task']].title} ({record['seeds']} seeds)")
    (accuracy, rates, differences, fault), (logps, falls, formed, norms) = figure.subplots(2, 4)
    _draw_accuracy(accuracy, record)
    _draw_rates(rates, record)
    _draw_differences(differences, record)
    _draw_fault(fault, record)
    by_alpha = {f"alpha {alpha:g}": chosen(record, name) for name, alpha in ALPHAS.items()}
    by_rate = {f"lr {rate}": run for rate, run in record["methods"][SHOWN]["rates"].items()}
    _draw_logps(logps, by_alpha, "Held-out log-prob, by alpha")
    _draw_logps(falls, by_rate, f"Held-out log-prob, {SHOWN}")
    for label, run, colour in _coloured(by_rate):
        looks, steps = run["looks"], run["steps"]
        formed.plot(looks["step"], looks["accuracy"], color=colour, label=label)
        formed.plot(looks["step"], looks["well_formed"], ":", color=colour)
        norms.plot(steps["step"], steps["grad_norm"], color=colour, label=label)
        norms.plot(steps["step"], steps["update_norm"], "--", color=colour)
    formed.set_title(f"{SHOWN}: accuracy; dotted: well formed")
    formed.set_ylim(-0.02, 1.02)
    norms.set_title(f"{SHOWN}: gradient norm; dashed: update norm")
    norms.set_yscale("log")
    for axes in (logps, falls, formed, norms):
        axes.set_xlabel("step of stage 2")
    for axes in figure.axes:
        _finish(axes)
    figure.savefig(path, dpi=100)


def draw_methods(records: list[Record], path: Path) -> None:
    """A panel for each task: accuracy of each method at every rate, and the control's best."""
    figure = Figure(figsize=(1.5 + 3.1 * len(records), 5), layout="constrained")
    (panels,) = figure.subplots(1, len(records), sharey=True, squeeze=False)
    for axes, record in zip(panels, records, strict=True):
        methods = record["methods"]
        axes.axvline(fmean(chosen(record, CONTROL)["figures"]["sampled"]), color="black", lw=0.8)
        for rate, _, colour in _coloured(methods[CONTROL]["rates"]):
            lists = [method["rates"][rate]["figures"]["sampled"] for method in methods.values()]
            means, errors = zip(*map(mean_and_error, lists), strict=True)
            style = {"fmt": "o", "ms": 4, "capsize": 2, "color": colour, "label": f"lr {rate}"}
            axes.errorbar(means, range(len(methods)), xerr=errors, **style)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_xlim(-0.02, 1.02)
        axes.set_title(TASKS[record["task"]].title)
        _finish(axes)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"Accuracy at T = {TEMPERATURE} (seeds: {records[0]['seeds']}); line: the control's best"
    )
    figure.savefig(path, dpi=100)


def _finish(axes: Axes) -> None:
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _coloured(named: dict[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """Each item with a colour from light to dark."""
    scale = colormaps["viridis_r"]
    for place, (name, value) in enumerate(named.items()):
        yield name, value, scale(0.12 + 0.88 * place / max(1, len(named) - 1))


def _points(axes: Axes, places: list[float], lists: list[list[float]], **style: Any) -> None:
    """Means over seeds with their standard errors."""
    means, errors = zip(*map(mean_and_error, lists), strict=True)
    axes.errorbar(places, means, yerr=errors, capsize=2, **style)


def _draw_accuracy(axes: Axes, record: Record) -> None:
    figures = [chosen(record, name)["figures"] for name in ALPHAS]
    (best,) = (name for name in figures[0] if name.startswith("pass@"))
    labels = {"greedy": "greedy", "sampled": f"T = {TEMPERATURE}", best: best}
    for (figure, label), colour in zip(labels.items(), COLOURS, strict=False):
        lists = [one[figure] for one in figures]
        _points(axes, list(ALPHAS.values()), lists, color=colour, marker="o", ms=4, label=label)
    axes.set_title("Accuracy against alpha, each at its best rate")
    axes.set_xlabel("alpha (0: the control)")
    axes.set_ylim(-0.02, 1.02)


def _draw_rates(axes: Axes, record: Record) -> None:
    for label, name, colour in _coloured({f"alpha {ALPHAS[name]:g}": name for name in ALPHAS}):
        rates = record["methods"][name]["rates"]
        lists = [one["figures"]["sampled"] for one in rates.values()]
        _points(axes, list(map(float, rates)), lists, color=colour, marker="o", ms=4, label=label)
    axes.set_title(f"Accuracy at T = {TEMPERATURE} by learning rate")
    axes.set_xlabel("learning rate")
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)


def _draw_differences(axes: Axes, record: Record) -> None:
    names = [name for name in record["methods"] if name != CONTROL]
    control = chosen(record, CONTROL)["figures"]
    for shift, figure, colour in ((-0.12, "greedy", COLOURS[0]), (0.12, "sampled", COLOURS[1])):
        found = [
            paired_difference(chosen(record, name)["figures"][figure], control[figure])
            for name in names
        ]
        means, errors = zip(*found, strict=True)
        places = [place + shift for place in range(len(names))]
        axes.errorbar(
            means, places, xerr=errors, fmt="o", ms=4, capsize=2, color=colour, label=figure
        )
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title("Accuracy minus the control's")


def _draw_fault(axes: Axes, record: Record) -> None:
    alphas = list(ALPHAS.values())
    for name, alpha in ALPHAS.items():
        for rate, run in record["methods"][name]["rates"].items():
            if rate != record["methods"][name]["chosen"]:
                share, _ = mean_and_error(run["figures"]["fault"])
                axes.plot(alpha, share, "o", ms=3, color="#999999")
    lists = [chosen(record, name)["figures"]["fault"] for name in ALPHAS]
    label = "students at T = 1 (grey: other rates)"
    _points(axes, alphas, lists, color=COLOURS[1], marker="o", ms=4, label=label)
    predicted = record.get("predicted fault", {})
    for style, (table, shares) in zip(("--", ":"), predicted.items(), strict=False):
        means = [mean_and_error(by_seed)[0] for by_seed in shares]
        axes.plot(alphas, means, style, color="black", label=f"predicted, {table}")
    axes.set_title(f"Share of {TASKS[record['task']].fault}")
    axes.set_xlabel("alpha")
    axes.set_ylim(bottom=0)


def _draw_logps(axes: Axes, runs: dict[str, Record], title: str) -> None:
    for label, run, colour in _coloured(runs):
        looks = run["looks"]
        axes.plot(looks["step"], looks["positive_logp"], color=colour, label=label)
        axes.plot(looks["step"], looks["negative_logp"], "--", color=colour)
    axes.set_title(f"{title}; dashed: incorrect")
