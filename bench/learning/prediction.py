"""What REDI asks of a student that is a table of probabilities, and of the habit task.

**The table.** Let a student choose y in a context with free probabilities p = softmax(z). Let P_w
and P_l be the frequencies of y there among correct and incorrect traces, C = P_w - alpha P_l and
alpha < 1. With traces of one length REDI's loss (arXiv 2505.24850) and its gradient are

    L = - sum_y C(y) log p(y),        dL / dz(y) = (1 - alpha) p(y) - C(y).

*C is nowhere negative*: L is 1 - alpha times a cross-entropy; its minimum is p = C / (1 - alpha).

*C is negative somewhere*: L has no minimum, it falls without end as p goes to 0 there. Two limits
are sensible. With a floor under every probability, p(y) >= epsilon, Lagrange's condition is that
C(y) / p(y) is the same wherever p is above the floor, so as epsilon goes to 0 (`with_floor`)

    p(y) = max(C(y), 0) / sum max(C, 0):

proportional to P_w - alpha P_l where that is positive. Descent on z, without a floor, ends where
dz / dt = C - (1 - alpha) p is the same c for all y that survive, and at most c for the others:
p(y) = max(C(y) - c, 0) / (1 - alpha), with c such that p sums to 1 (`without_floor`). That is the
Euclidean projection of C / (1 - alpha) onto the probabilities: what is taken from the unwanted is
taken in equal parts from the rest too, and the least wanted of these goes with it. Of two choices
one has all in either limit.

**The habit.** Whether a trace is correct is a function of the trace, so a table of whole traces
has nothing to subtract: no y is in both sets. A habit is unlearnt only because a student shares
what it learns between traces, and the prediction hangs on the contexts that it tells apart. Two
tables are computed: one row for all boxes, and a row for each box and number of blanks straight
before it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from redi.engine.quickstart.task import BLANK, DIGITS

OPTIONAL = DIGITS - 2
"""Boxes that may be left blank."""
Context = tuple[int, int]
"""A box, and the blanks straight before it."""


def with_floor(wanted: np.ndarray, unwanted: np.ndarray, alpha: float) -> np.ndarray:
    """REDI's optimum over probabilities with a vanishing floor; see the head of this file.

    Args:
        wanted, unwanted: float [choices], how often correct and incorrect traces choose each.

    Returns:
        float [choices]; NaN if no choice is wanted on balance.
    """
    balance = np.maximum(wanted - alpha * unwanted, 0.0)
    return balance / balance.sum() if balance.any() else np.full(len(balance), np.nan)


def without_floor(wanted: np.ndarray, unwanted: np.ndarray, alpha: float) -> np.ndarray:
    """Where gradient descent on a softmax's logits goes; arguments as above, alpha < 1."""
    target = (wanted - alpha * unwanted) / (1 - alpha)
    falling = np.sort(target)[::-1]
    excess = (np.cumsum(falling) - 1) / np.arange(1, len(target) + 1)
    # The most survivors of whom all keep something.
    shift = excess[np.flatnonzero(falling > excess)[-1]]
    return np.maximum(target - shift, 0.0)


@dataclass(frozen=True)
class HabitCounts:
    """How often a set of traces leaves an optional box blank, by context."""

    blank: Counter[Context]
    written: Counter[Context]


def count_habit(traces: Sequence[str]) -> HabitCounts:
    """Count the optional boxes of the habit task's traces."""
    blank: Counter[Context] = Counter()
    written: Counter[Context] = Counter()
    for trace in traces:
        run = 0
        for box, character in enumerate(trace[:OPTIONAL]):
            (blank if character == BLANK else written)[box, run] += 1
            run = run + 1 if character == BLANK else 0
    return HabitCounts(blank, written)


def share_by_one_row(positive: HabitCounts, negative: HabitCounts, alpha: float) -> float:
    """Share of blank boxes of a student whose table has one row for all boxes."""
    frequencies = [
        np.array([counts.blank.total(), counts.written.total()], dtype=float)
        for counts in (positive, negative)
    ]
    wanted, unwanted = (counts / counts.sum() for counts in frequencies)
    return float(with_floor(wanted, unwanted, alpha)[0])


def share_by_contexts(positive: HabitCounts, negative: HabitCounts, alpha: float) -> float:
    """Share of blank boxes of a student whose table has a row for each context.

    Counts of the two sets are subtracted as they are, so a context that incorrect traces are in
    more often may want neither choice; there the student is taken to write.
    """

    def leaves_blank(context: Context) -> float:
        wanted, unwanted = (
            np.array([counts.blank[context], counts.written[context]], dtype=float)
            for counts in (positive, negative)
        )
        share = float(with_floor(wanted, unwanted, alpha)[0])
        return 0.0 if np.isnan(share) else share

    expected = 0.0
    for pattern in itertools.product((True, False), repeat=OPTIONAL):
        probability, run = 1.0, 0
        for box, blank in enumerate(pattern):
            share = leaves_blank((box, run))
            probability *= share if blank else 1 - share
            run = run + 1 if blank else 0
        expected += probability * sum(pattern) / OPTIONAL
    return expected
