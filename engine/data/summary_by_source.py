"""Summary of a data set by teacher, source and file, and of positives against negatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.schedule import Examples, repeats
from redi.engine.data.summary import PERCENTILES, LengthStats, length_stats

_PAIRS_COMPARED = 1000
"""Number of pairs whose tokens are read, evenly spaced."""
MAX_ORIGINS = 20
"""Most origins of a kind that are shown separately."""
_COLOURS = {"prompt": "#999999", "positive": "#0072b2", "negative": "#d55e00"}


@dataclass(frozen=True)
class Origin:
    """The traces of one teacher, source or file, used or not."""

    kind: str
    """"teacher", "source" (the row's column) or "file"."""
    name: str
    used: int
    positive: LengthStats
    """Lengths of correct completions."""
    negative: LengthStats
    """Lengths of incorrect completions."""
    prompt: LengthStats
    """Lengths of prompts, one per trace."""
    over_limit: int
    """Traces longer than max_tokens."""
    repeated: int
    """Traces with the sign, prompt and completion of an earlier trace of the set."""
    identical_pairs: int
    """Pairs whose positive is of this origin and equals the negative, token for token."""


@dataclass(frozen=True)
class SourceSummary:
    """The result of `summarize_by_source`."""

    origins: list[Origin]
    """Of each kind the largest, at most MAX_ORIGINS, and one for all others."""
    max_tokens: int
    over_limit: dict[str, float]
    """Share of "positive" and of "negative" traces that are longer than max_tokens."""
    overlap: float | None
    """Similarity of a pair's completions: sum over tokens of the smaller of their two frequencies,
    mean over the compared pairs. 1: the same tokens equally often; 0: none in common. None without
    pairs."""


def summarize_by_source(
    tokens: TokenizedTraces, examples: Examples, max_tokens: int
) -> SourceSummary:
    """Summarize a data set by origin and sign. Reads the tokens of some pairs.

    Args:
        tokens, examples: the data set and its units.
        max_tokens: the limit on the length of a sequence.
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
            length_stats(completions[signs > 0]),
            length_stats(completions[signs < 0]),
            length_stats(prompts),
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
        if any(names)  # skips a column that no row has
        for name, own in _largest(numbers, names)
    ]
    over = {
        name: float(np.mean(tokens.lengths[tokens.signs == sign] > max_tokens))
        for name, sign in (("positive", 1), ("negative", -1))
        if (tokens.signs == sign).any()
    }
    return SourceSummary(origins, max_tokens, over, _overlap(tokens, examples.units))


def _largest(numbers: np.ndarray, names: Sequence[str | None]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the traces of each of the largest origins, in the order of the names."""
    sizes = np.bincount(numbers, minlength=len(names))
    largest = np.sort(np.argsort(-sizes, kind="stable")[:MAX_ORIGINS])
    for number in largest[sizes[largest] > 0].tolist():
        yield names[number] or "none", np.flatnonzero(numbers == number)
    if len(names) > MAX_ORIGINS:
        others = np.flatnonzero(~np.isin(numbers, largest))
        yield f"{len(names) - MAX_ORIGINS:,} others", others


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


def origin_rows(found: SourceSummary) -> list[tuple[str, ...]]:
    """The rows of the table of origins, with lengths of completions; see ORIGIN_COLUMNS."""
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


def share_rows(found: SourceSummary) -> list[tuple[str, str]]:
    """The rows of the table of shares: label, value."""
    rows = [
        (f"{name}s over {found.max_tokens:,} tokens", f"{share:.1%}")
        for name, share in found.over_limit.items()
    ]
    if found.overlap is not None:
        rows.append(("overlap of a pair's tokens", f"{found.overlap:.2f}"))
    return rows


def plot_lengths(tokens: TokenizedTraces, examples: Examples, max_tokens: int, path: Path) -> None:
    """Plot the lengths of prompts, positives and negatives as a PNG; the limit is dashed."""
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
