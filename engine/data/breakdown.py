"""A closer look at a set: by teacher and file, against the limit, positives against negatives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.schedule import Examples

_PAIRS_COMPARED = 1000
"""Pairs whose tokens are read, evenly spaced."""
_COLOURS = {"prompt": "#999999", "positive": "#0072b2", "negative": "#d55e00"}


@dataclass(frozen=True)
class Origin:
    """The traces of one teacher or one file."""

    kind: str
    """"teacher" or "file"."""
    name: str
    positives: int
    """Read, used or not; so are the negatives."""
    negatives: int
    used: int
    median_tokens: int
    """Of a completion."""


@dataclass(frozen=True)
class Breakdown:
    """What `break_down` finds."""

    origins: list[Origin]
    max_tokens: int
    over_limit: dict[str, float]
    """Share of the "positive" and "negative" traces that are longer than max_tokens."""
    overlap: float | None
    """Of a pair's completions: sum over tokens of the smaller of their two frequencies, mean over
    the pairs looked at. 1: the same tokens as often, 0: none in common. None without pairs."""


def break_down(tokens: TokenizedTraces, examples: Examples, max_tokens: int) -> Breakdown:
    """Sum up a set by origin and sign; the tokens of some pairs are read.

    Args:
        tokens, examples: the set, and its units.
        max_tokens: the limit on a sequence.
    """
    used = np.zeros(len(tokens), dtype=bool)
    used[examples.units] = True
    completions = tokens.lengths - tokens.prompt_lengths
    numbers, teachers = tokens.teacher_numbers()
    files = [Path(name).name for name in tokens.sources]
    origins = []
    for kind, of_trace, names in (
        ("teacher", numbers, teachers),
        ("file", tokens.source_numbers, files),
    ):
        for number, name in enumerate(names):
            own = of_trace == number
            if own.any():
                positives = int(np.sum(tokens.signs[own] > 0))
                negatives = int(own.sum()) - positives
                median = int(np.median(completions[own]))
                origins.append(
                    Origin(kind, name, positives, negatives, int(used[own].sum()), median)
                )
    over = {
        name: float(np.mean(tokens.lengths[tokens.signs == sign] > max_tokens))
        for name, sign in (("positive", 1), ("negative", -1))
        if (tokens.signs == sign).any()
    }
    return Breakdown(origins, max_tokens, over, _overlap(tokens, examples.units))


def _overlap(tokens: TokenizedTraces, units: np.ndarray) -> float | None:
    if units.shape[1] != 2:
        return None
    places = np.unique(np.linspace(0, len(units) - 1, _PAIRS_COMPARED).astype(np.int64))
    shares = []
    for pair in units[places].tolist():
        first, second = (tokens.ids(index)[tokens.prompt_lengths[index] :] for index in pair)
        both, inverse = np.unique(np.concatenate([first, second]), return_inverse=True)
        counts = [
            np.bincount(some, minlength=len(both)) / len(some)
            for some in (inverse[: len(first)], inverse[len(first) :])
        ]
        shares.append(np.minimum(*counts).sum())
    return float(np.mean(shares))


ORIGIN_COLUMNS = ("", "name", "correct", "incorrect", "used", "median tokens")


def origin_rows(found: Breakdown) -> list[tuple[str, ...]]:
    """The table of origins, under ORIGIN_COLUMNS."""
    return [
        (
            one.kind,
            one.name,
            *(f"{n:,}" for n in (one.positives, one.negatives, one.used, one.median_tokens)),
        )
        for one in found.origins
    ]


def share_rows(found: Breakdown) -> list[tuple[str, str]]:
    """The table of shares: what, how much."""
    rows = [
        (f"{name}s over {found.max_tokens:,} tokens", f"{share:.1%}")
        for name, share in found.over_limit.items()
    ]
    if found.overlap is not None:
        rows.append(("overlap of a pair's tokens", f"{found.overlap:.2f}"))
    return rows


def draw_lengths(tokens: TokenizedTraces, examples: Examples, max_tokens: int, path: Path) -> None:
    """Draw how long prompts, positives and negatives are, as a PNG; the limit dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    used = np.zeros(len(tokens), dtype=bool)
    used[examples.units] = True
    completions = tokens.lengths - tokens.prompt_lengths
    kinds = {
        "prompt": tokens.prompt_lengths[used],
        "positive": completions[used & (tokens.signs > 0)],
        "negative": completions[used & (tokens.signs < 0)],
    }
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    every = np.concatenate(list(kinds.values()))
    longest = int(every.max())
    edges = np.geomspace(every.min(), longest + 1, 50).tolist()
    for name, lengths in kinds.items():
        if len(lengths):
            label = f"{name}, {len(lengths):,} (median {int(np.median(lengths)):,})"
            axes.hist(lengths, edges, histtype="step", color=_COLOURS[name], label=label)
    if max_tokens <= 2 * longest:
        axes.axvline(max_tokens, color="black", linewidth=0.8, ls="--", label="data.max_tokens")
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("traces in use")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
