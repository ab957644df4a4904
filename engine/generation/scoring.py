"""Scores of checked samples: accuracy, pass@k and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BenchmarkScores:
    """Scores of n samples of each of P problems, as fractions of 1."""

    problems: int
    samples: int
    """n, per problem."""
    pass_at_1: float
    """Mean accuracy over all samples."""
    sem_over_samples: float | None
    """Standard deviation (ddof = 1) of the n whole-benchmark scores / sqrt(n), as in the paper: the
    uncertainty from drawing other samples of the same problems. None for one sample."""
    sem_over_problems: float | None
    """Standard deviation (ddof = 1) of the problems' accuracies / sqrt(P): the uncertainty from
    drawing other problems of the same kind. None for one problem."""
    pass_at: dict[int, float]
    """k -> unbiased pass@k, averaged over problems."""


def score(correct: np.ndarray, ks: Sequence[int] = (1,)) -> BenchmarkScores:
    """Score the checked samples of a benchmark.

    Args:
        correct: bool [problems, samples], both at least 1.
        ks: the k of pass@k, each from 1 to the number of samples.

    Raises:
        ValueError: `correct` is empty or not 2-D, or a k is out of range.
    """
    if correct.ndim != 2 or not correct.size:
        raise ValueError(f"correct must be [problems, samples], got shape {correct.shape}")
    problems, samples = correct.shape
    counts = correct.sum(axis=1)
    return BenchmarkScores(
        problems=problems,
        samples=samples,
        pass_at_1=float(correct.mean()),
        sem_over_samples=_standard_error(correct.mean(axis=0)),
        sem_over_problems=_standard_error(correct.mean(axis=1)),
        pass_at={
            k: float(np.mean([pass_at_k(samples, int(count), k) for count in counts])) for k in ks
        },
    )


@dataclass(frozen=True)
class MacroAverage:
    """Mean of the scores of several benchmarks, each with the same weight."""

    pass_at_1: float
    sem_over_samples: float | None
    """Standard deviation (ddof = 1) of the n averages, one of each sample number, / sqrt(n)."""
    sem_over_problems: float | None
    """Propagated from the benchmarks, which have different problems. None if one has a single
    problem."""


def macro_average(benchmarks: Sequence[np.ndarray]) -> MacroAverage:
    """Average benchmarks.

    Args:
        benchmarks: at least one; each bool [problems, samples] with the same number of samples.
    """
    by_sample = np.mean([correct.mean(axis=0) for correct in benchmarks], axis=0)
    errors = [_standard_error(correct.mean(axis=1)) for correct in benchmarks]
    known = [error for error in errors if error is not None]
    return MacroAverage(
        pass_at_1=float(by_sample.mean()),
        sem_over_samples=_standard_error(by_sample),
        sem_over_problems=math.hypot(*known) / len(known) if len(known) == len(errors) else None,
    )


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct.

    With c = `correct` and n = `samples`: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv
    2107.03374, eq. 1), computed as a product of factors below 1, which cannot overflow.

    Raises:
        ValueError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must be in [0, {samples}], got {correct}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must be in [1, {samples}], the number of samples; got {k}")
    # With fewer than k incorrect samples a factor 1 - k / i would be <= 0; the result is exactly 1.
    if samples - correct < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(samples - correct + 1, samples + 1)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of at least one value; the error of a single value is NaN."""
    error = _standard_error(np.asarray(values, dtype=float))
    return float(np.mean(values)), math.nan if error is None else error


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the paired differences first - second."""
    return mean_and_error([a - b for a, b in zip(first, second, strict=True)])


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
