"""From verdicts to figures: accuracy, pass@k and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """What n samples of each of P problems say; shares of 1, not per cent."""

    problems: int
    samples: int
    """Of each problem."""
    pass_at_1: float
    """Mean accuracy over all samples."""
    sem_over_samples: float | None
    """Standard deviation (n - 1) of the n samples' whole-benchmark scores / sqrt(n), as the paper
    gives it: how far another n samples of these problems would lie. None for one sample."""
    sem_over_problems: float | None
    """Standard deviation (P - 1) of the problems' accuracies / sqrt(P): how far other problems of
    the kind would lie. None for one problem."""
    pass_at: dict[int, float]
    """k -> unbiased pass@k, the mean over problems."""


def score(correct: np.ndarray, ks: Sequence[int] = (1,)) -> Scores:
    """Scores of verdicts.

    Args:
        correct: bool [problems, samples], both at least 1.
        ks: which pass@k, each from 1 to the number of samples.

    Raises:
        ValueError: no verdicts, or a k out of range.
    """
    if correct.ndim != 2 or not correct.size:
        raise ValueError(f"correct must be [problems, samples], got shape {correct.shape}")
    problems, samples = correct.shape
    counts = correct.sum(axis=1)
    return Scores(
        problems=problems,
        samples=samples,
        pass_at_1=float(correct.mean()),
        sem_over_samples=_standard_error(correct.mean(axis=0)),
        sem_over_problems=_standard_error(correct.mean(axis=1)),
        pass_at={
            k: float(np.mean([pass_at_k(samples, int(count), k) for count in counts])) for k in ks
        },
    )


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples is correct, of `correct` in `samples`.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1), as a product of factors
    below 1, which cannot overflow.

    Raises:
        ValueError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must lie in [0, {samples}], got {correct}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie in [1, {samples}], the number of samples; got {k}")
    # Every factor 1 - k / i of C(n - c, k) / C(n, k); one is 0 or below if k of them must hit.
    if samples - correct < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(samples - correct + 1, samples + 1)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, of at least one value; the error of one alone is NaN."""
    error = _standard_error(np.asarray(values, dtype=float))
    return float(np.mean(values)), math.nan if error is None else error


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of first - second, pair by pair, and its standard error."""
    return mean_and_error([a - b for a, b in zip(first, second, strict=True)])


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
