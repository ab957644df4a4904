"""A closer look at a set: by teacher, source and file, and positives against negatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.schedule import Examples, repeats
from redi.engine.data.summary import PERCENTILES, Lengths, sum_up

_PAIRS_COMPARED = 1000
"""Pairs whose tokens are read, evenly spaced."""
MOST_ORIGINS = 20
"""Of a kind that are shown one by one."""
_COLOURS = {"prompt": "#999999", "positive": "#0072b2", "negative": "#d55e00"}


@dataclass(frozen=True)
class Origin:
    """The traces of one teacher, source or file; read, used or not."""

    kind: str
    """"teacher", "source" (the row's column) or "file"."""
    name: str
    used: int
    positive: Lengths
    """Of completions; so is the next."""
    negative: Lengths
    prompt: Lengths
    """Each trace's prompt counts."""
    over_limit: int
    """Longer than max_tokens."""
    repeated: int
    """With the sign, prompt and completion of an earlier trace of the set."""
    identical_pairs: int
    """Pairs whose positive is from here, and is the negative too, token for token."""


@dataclass(frozen=True)
class Breakdown:
    """What `summarize_by_source` finds."""

    origins: list[Origin]
    """Of each kind the largest, at most MOST_ORIGINS, and one for all others."""
    max_tokens: int
    over_limit: dict[str, float]
    """Share of the "positive" and "negative" traces that are longer than max_tokens."""
    overlap: float | None
    """Of a pair's completions: sum over tokens of the smaller of their two frequencies, mean over
    the pairs looked at. 1: the same tokens as often, 0: none in common. None without pairs."""


def summarize_by_source(tokens: TokenizedTraces, examples: Examples, max_tokens: int) -> Breakdown:
    """Sum up a set by origin and sign; the tokens of some pairs are read.

    Args:
        tokens, examples: the set, and its units.
        max_tokens: the limit on a sequence.
    """
    used = np.zeros(len(tokens), dtype=bool)
    used[examples.units] = True
    repeated = repeats(tokens.signs, tokens.digests)
    identical = np.zeros(len(tokens), dtype=np.int64)
    if examples.units.shape[1] == 2:
        first, second = examples.units.T
        same = tokens.digests[first] == tokens.digests[second]
        np.add.at(identical, first[same], 1)

    def origin(kind: str, name: str, own: np.ndarray) -> Origin:
        prompts, signs = tokens.prompt_lengths[own], tokens.signs[own]
        completions = tokens.lengths[own] - prompts
        return Origin(
            kind,
            name,
            int(used[own].sum()),
            sum_up(completions[signs > 0]),
            sum_up(completions[signs < 0]),
            sum_up(prompts),
            int(np.sum(tokens.lengths[own] > max_tokens)),
            int(repeated[own].sum()),
            int(identical[own].sum()),
        )

    origins = [
        origin(kind, name, own)
        for kind, numbers, names in (
            ("teacher", *tokens.names("teacher")),
            ("source", *tokens.names("origin")),
            ("file", tokens.source_numbers, [Path(name).name for name in tokens.sources]),
        )
        if any(names)  # a column that no row has says nothing
        for name, own in _largest(numbers, names)
    ]
    over = {
        name: float(np.mean(tokens.lengths[tokens.signs == sign] > max_tokens))
        for name, sign in (("positive", 1), ("negative", -1))
        if (tokens.signs == sign).any()
    }
    return Breakdown(origins, max_tokens, over, _overlap(tokens, examples.units))


def _largest(numbers: np.ndarray, names: Sequence[str | None]) -> Iterator[tuple[str, np.ndarray]]:
    """Each of the largest origins, in the order of the names, and which traces are its own."""
    sizes = np.bincount(numbers, minlength=len(names))
    largest = np.sort(np.argsort(-sizes, kind="stable")[:MOST_ORIGINS])
    for number in largest[sizes[largest] > 0].tolist():
        yield names[number] or "none", np.flatnonzero(numbers == number)
    if len(names) > MOST_ORIGINS:
        others = np.flatnonzero(~np.isin(numbers, largest))
        yield f"{len(names) - MOST_ORIGINS:,} others", others


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


ORIGIN_COLUMNS = (
    *("", "name", "correct", "p50", "p95", "incorrect", "p50", "p95"),
    *("used", "too long", "repeated"),
)


def origin_rows(found: Breakdown) -> list[tuple[str, ...]]:
    """The table of origins, under ORIGIN_COLUMNS; lengths are those of completions, in tokens."""
    middle = [PERCENTILES.index(p) for p in (50, 95)]
    return [
        (
            one.kind,
            one.name,
            *(
                f"{n:,}"
                for lengths in (one.positive, one.negative)
                for n in (lengths.count, *(lengths.percentiles[place] for place in middle))
            ),
            *(f"{n:,}" for n in (one.used, one.over_limit, one.repeated)),
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
