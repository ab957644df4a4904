"""The optimum of REDI, and of bounded terms, for a student that is a table of probabilities.

**The table.** Let a student choose y in a context with free probabilities p = softmax(z). Let P_w
and P_l be the frequencies of y there among correct and incorrect traces, C = P_w - alpha P_l and
alpha < 1. With traces of one length REDI's loss (arXiv 2505.24850) and its gradient are

    L = - sum_y C(y) log p(y),        dL / dz(y) = (1 - alpha) p(y) - C(y).

*C is nowhere negative*: L is 1 - alpha times a cross-entropy; its minimum is p = C / (1 - alpha).

*C is negative somewhere*: L has no minimum; it falls without bound as p goes to 0 there. Two limits
are meaningful. With a floor under every probability, p(y) >= epsilon, Lagrange's condition is that
C(y) / p(y) is the same wherever p is above the floor, so as epsilon goes to 0 (`with_floor`)

    p(y) = max(C(y), 0) / sum max(C, 0):

proportional to P_w - alpha P_l where that is positive. Descent on z, without a floor, ends where
dz / dt = C - (1 - alpha) p is the same c for all y that survive, and at most c for the others:
p(y) = max(C(y) - c, 0) / (1 - alpha), with c such that p sums to 1 (`without_floor`). That is the
Euclidean projection of C / (1 - alpha) onto the probabilities: the excess is subtracted in equal
parts from all survivors, and the smallest of them may become 0 too. With two choices one has all
the probability in either limit.

**Bounded terms.** With alpha exp(log p) = alpha p in place of alpha log p for incorrect traces
(`bounded_redi` at temperature 1) or of both signs besides imitation (`sft_simper`), the loss is

    L = - sum_y P_w(y) log p(y) + alpha sum_y D(y) p(y),     D = P_l, or P_l - P_w,

convex in p and bounded below. At its minimum P_w(y) / p(y) - alpha D(y) is the same mu wherever
P_w is positive, and at least -alpha D(y) elsewhere (`bounded`):

    p(y) = P_w(y) / (mu + alpha D(y)),

with mu such that p sums to 1. So nothing that correct traces have goes to 0: the effective alpha of
a choice is alpha p(y), which falls with its probability. Where both kinds of trace have the same
frequencies, D = 0 and `sft_simper` leaves imitation as it is; `bounded_redi` flattens it, and can
make a rare fault more frequent. A choice without P_w has no probability, unless mu reaches
-alpha D(y) there before p sums to 1; then it takes the rest.

**The habit.** Whether a trace is correct is a function of the trace, so a table of whole traces
has nothing to subtract: no y is in both sets. A habit is unlearnt only because a student shares
what it learns between traces, and the prediction depends on the contexts that it distinguishes. Two
tables are computed: one row for all boxes, and a row for each box and number of blanks directly
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
"""A box, and the number of blanks directly before it."""


def with_floor(wanted: np.ndarray, unwanted: np.ndarray, alpha: float) -> np.ndarray:
    """REDI's optimum over probabilities with a vanishing floor; see the module's docstring.

    Args:
        wanted, unwanted: float [choices], how often correct and incorrect traces choose each.

    Returns:
        float [choices]; NaN if wanted - alpha * unwanted is positive for no choice.
    """
    balance = np.maximum(wanted - alpha * unwanted, 0.0)
    return balance / balance.sum() if balance.any() else np.full(len(balance), np.nan)


def without_floor(wanted: np.ndarray, unwanted: np.ndarray, alpha: float) -> np.ndarray:
    """The limit of gradient descent on a softmax's logits; arguments as above, alpha < 1."""
    target = (wanted - alpha * unwanted) / (1 - alpha)
    falling = np.sort(target)[::-1]
    excess = (np.cumsum(falling) - 1) / np.arange(1, len(target) + 1)
    # The largest number of survivors that all have a positive probability.
    shift = excess[np.flatnonzero(falling > excess)[-1]]
    return np.maximum(target - shift, 0.0)


def bounded(
    wanted: np.ndarray, unwanted: np.ndarray, alpha: float, *, both: bool = False
) -> np.ndarray:
    """The optimum of `bounded_redi` at temperature 1, or with `both` of `sft_simper`.

    Args:
        wanted, unwanted: as above; each sums to 1.

    Returns:
        float [choices], to 1e-12.
    """
    pushed = alpha * (unwanted - wanted if both else unwanted)
    # mu is above -pushed where wanted is positive, and at least that elsewhere.
    survivors = wanted > 0
    low = max((-pushed[survivors]).max(), (-pushed[~survivors]).max(initial=-np.inf))
    high = low + 1 + abs(pushed).sum() + wanted.sum()
    for _ in range(200):
        mu = (low + high) / 2
        if (wanted[survivors] / (mu + pushed[survivors])).sum() > 1:
            low = mu
        else:
            high = mu
    found = np.zeros(len(wanted))
    found[survivors] = wanted[survivors] / (high + pushed[survivors])
    if not survivors.all():
        least = ~survivors & (pushed == pushed[~survivors].min())
        found[least] = (1 - found.sum()) / least.sum()
    return found


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

    Counts of the two sets are subtracted without normalising, so in a context that is more frequent
    in incorrect traces neither choice may be positive; then the student is assumed to write.
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
