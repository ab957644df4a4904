"""How many of the trained tokens spans mask or weight, and which objectives refuse them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from redi.engine.config.sections import ObjectiveConfig
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.schedule import Examples
from redi.engine.errors import InputError


@dataclass(frozen=True)
class WeightCounts:
    """The completion tokens of the traces in use, by their weight."""

    tokens: int
    masked: int
    """Of weight 0: not trained."""
    filtered: int
    """Those of `masked` that spans do not mask: `[token_filter]` does."""
    weighted: int
    """Of another weight than 0 and 1."""
    first_weighted: int | None
    """The first trace with such a token."""
    first_negative: int | None
    """The first trace with a token of a weight below 0."""


def count_weights(tokens: TokenizedTraces, examples: Examples) -> WeightCounts:
    """Count the tokens of the traces in units. Reads the weights of those that have any."""
    used = np.unique(examples.units)
    counts = examples.lengths[used] - tokens.prompt_lengths[used]
    masked = by_spans = weighted = 0
    firsts: list[int | None] = [None, None]
    for place in np.flatnonzero(tokens.weighted[used]).tolist():
        index = int(used[place])
        weights = tokens.token_weights(index)
        assert weights is not None
        weights = weights[: counts[place]]
        others = int(np.sum((weights != 0) & (weights != 1)))
        masked += int(np.sum(weights == 0))
        spans = tokens.span_weights(index)
        by_spans += 0 if spans is None else int(np.sum(spans[: counts[place]] == 0))
        weighted += others
        for number, found in enumerate((others, np.any(weights < 0))):
            if found and firsts[number] is None:
                firsts[number] = index
    return WeightCounts(int(counts.sum()), masked, masked - by_spans, weighted, *firsts)


def check_weights(section: ObjectiveConfig, tokens: TokenizedTraces, counts: WeightCounts) -> None:
    """Raise if the objective has no meaning for the weights of tokens.

    Raises:
        InputError: names the key and the first row.
    """
    exponential = section.kind.exponential or section.negative_gamma > 0
    if section.filter_epsilon > 0 and counts.first_weighted is not None:
        raise InputError(
            f"{tokens.where(counts.first_weighted)}: the spans have weights other than 0 and 1, "
            "which objective.filter_epsilon cannot be used with: set it to 0"
        )
    if exponential and counts.first_negative is not None:
        key = f'name = "{section.name}"' if section.kind.exponential else "negative_gamma"
        raise InputError(
            f"{tokens.where(counts.first_negative)}: the spans have a negative weight, but "
            f"objective.{key} takes the exponential of a trace's mean log-prob, which such weights "
            "leave without a bound: use another objective, or weights of at least 0"
        )
