"""Curves of training runs as small SVG panels in the colours of the page that shows them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redi.engine.commands.report import Curves

MOST_POINTS = 160
"""Points of a curve. A longer run is drawn as means, over a band from minimum to maximum."""
MOST_NAMED, LONGEST_NAME = 5, 12
"""Curves are labelled with the names of up to so many runs, if they are short; else numbered."""
LABEL_GAP = 0.085
"""Distance of two labels, as a share of the panel's height."""

# Placeholders, which become variables of the page's style: one set of curves for light and dark.
_RUNS = tuple(f"#00000{number}" for number in range(1, 8))
_INK, _GRID = "#0000a0", "#0000b0"
_VARIABLES = {_INK: "--ink", _GRID: "--grid"} | {
    colour: f"--run-{number}" for number, colour in enumerate(_RUNS)
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))
"""Lines of the first runs, and of the next ones, whose colours are used again."""
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "redi",  # the same page for the same runs
    "text.parse_math": False,  # a name may have a dollar sign
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
}

TITLES = {
    "loss": "Loss",
    "positive_logp": "Log-prob, correct traces",
    "negative_logp": "Log-prob, incorrect traces",
    "margin_accuracy": "Margin accuracy",
    "greedy_accuracy": "Greedy accuracy",
    "kl": "KL estimate",
    "grad_norm": "Gradient norm",
    "update_norm": "Update norm",
    "lr": "Learning rate",
    "tokens_per_s": "Tokens per second",
}
NOTES = {
    "positive_logp": "dots: held out",
    "negative_logp": "dots: held out",
    "margin_accuracy": "held out",
    "greedy_accuracy": "held out",
    "grad_norm": "before clipping",
}


@dataclass(frozen=True)
class Panel:
    """One figure of all runs by step."""

    title: str
    note: str
    svg: str
    """An element <svg>; its text is escaped."""


def draw_panels(runs: Sequence[Curves]) -> list[Panel]:
    """Draw each figure of TITLES that at least one run has."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        drawn = {key: _draw(runs, key) for key in TITLES}
    return [
        Panel(TITLES[key], NOTES.get(key, ""), svg) for key, svg in drawn.items() if svg is not None
    ]


def _draw(runs: Sequence[Curves], key: str) -> str | None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.2, 2.5), layout="constrained")
    axes = figure.subplots()
    ends: list[tuple[float, float, int]] = []
    width = 1.2 if len(runs) <= len(_RUNS) else 0.8
    for number, run in enumerate(runs):
        colour = _RUNS[number % len(_RUNS)]
        dashes = _DASHES[number // len(_RUNS) % len(_DASHES)]
        last = None
        steps, values = _series(run.steps, key)
        if len(steps):
            steps, mean, low, high = _thinned(steps, values)
            if high is not mean:
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(steps, mean, color=colour, ls=dashes, lw=width)
            last = steps[-1], mean[-1]
        steps, values = _series(run.held_out, key)
        if len(steps):
            axes.plot(steps, values, "o", color=colour, ms=2.6)
            if last is None:  # a figure of evaluations alone
                axes.plot(steps, values, color=colour, ls=dashes, lw=width)
                last = steps[-1], values[-1]
        if last is not None:
            ends.append((*last, number))
    if not ends:
        return None
    if key == "grad_norm":
        _scale_surge(axes)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(runs) > 1:
        _label_ends(axes, ends, runs)
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inline(text.getvalue(), TITLES[key])


def _series(lines: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have the figure; NaN where it was not finite."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    values = np.array([np.nan if value is None else value for _, value in found], dtype=float)
    if not np.isfinite(values).any():
        return np.array([]), np.array([])
    return np.array([step for step, _ in found]), values


def _thinned(
    steps: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, minima and maxima of at most MOST_POINTS groups of successive steps."""
    if len(steps) <= MOST_POINTS:
        return steps, values, values, values
    groups = np.array_split(values, MOST_POINTS)
    finite = [group[np.isfinite(group)] for group in groups]
    mean, low, high = (
        np.array([reduce(group) if len(group) else np.nan for group in finite])
        for reduce in (np.mean, np.min, np.max)
    )
    last = np.cumsum([len(group) for group in groups]) - 1
    return steps[last], mean, low, high


def _scale_surge(axes: Any) -> None:
    """A logarithmic axis for a figure whose largest value would hide all others."""
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    if values.min() > 0 and values.max() > 20 * np.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def _label_ends(
    axes: Any, ends: Sequence[tuple[float, float, int]], runs: Sequence[Curves]
) -> None:
    """Label each curve right of its end, apart from the others that end close to it."""
    names = [run.name for run in runs]
    short = max(map(len, names)) <= LONGEST_NAME and "".join(names).isascii()
    named = short and len(names) <= MOST_NAMED and len(set(names)) == len(names)
    axes.autoscale_view()  # it sets the limits, which the transform needs
    to_axes = axes.transData + axes.transAxes.inverted()
    found = [(to_axes.transform((step, value)), number) for step, value, number in ends]
    found = sorted((one for one in found if np.isfinite(one[0]).all()), key=lambda one: one[0][1])
    for column in range(11):
        column_ends = [one for one in found if round(10 * one[0][0]) == column]
        heights = _apart([height for (_, height), _ in column_ends])
        for height, ((end, _), number) in zip(heights, column_ends, strict=True):
            axes.text(
                end + 0.015,
                height,
                names[number] if named else str(number + 1),
                transform=axes.transAxes,
                color=_RUNS[number % len(_RUNS)],
                va="center",
                fontsize=8,
            )


def _apart(heights: Sequence[float]) -> list[float]:
    """Rising heights, as shares of a panel, moved apart by LABEL_GAP, or less if that is full."""
    moved = list(heights)
    gap = min(LABEL_GAP, 1 / max(1, len(moved)))
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + gap)
    ceiling = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved


def _inline(svg: str, title: str) -> str:
    """The element <svg> of a document, with the page's colours and without repeated ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would hold for the whole page
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title} by step" ', 1)
