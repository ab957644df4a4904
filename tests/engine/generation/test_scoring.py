"""Accuracy, pass@k and standard errors against exact combinatorics and brute force."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redi.engine.generation.scoring import pass_at_k, score


@given(st.integers(1, 40), st.data())
def test_pass_at_k_is_the_published_formula(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    # Chen et al. 2021, arXiv 2107.03374, eq. 1
    exact = 1 - Fraction(math.comb(samples - correct, k), math.comb(samples, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(float(exact), abs=1e-14)


@pytest.mark.parametrize("correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct: int, k: int) -> None:
    samples = [True] * correct + [False] * (6 - correct)
    subsets = list(combinations(samples, k))
    assert pass_at_k(6, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_stays_finite_where_binomials_overflow_floats() -> None:
    exact = 1 - Fraction(math.comb(9990, 5000), math.comb(10000, 5000))
    assert pass_at_k(10000, 10, 5000) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_counts_out_of_range_are_refused(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        pass_at_k(samples, correct, k)


def test_scores_of_a_small_table_by_hand() -> None:
    correct = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    found = score(correct, [1, 2, 4])
    assert found.pass_at_1 == pytest.approx(5 / 12)
    assert found.pass_at == {
        1: pytest.approx(5 / 12),
        2: pytest.approx((1 + 1 / 2 + 0) / 3),
        4: pytest.approx(2 / 3),
    }
    # whole-benchmark scores of the samples: 2/3, 1/3, 1/3, 1/3
    assert found.sem_over_samples == pytest.approx(np.std([2, 1, 1, 1], ddof=1) / 3 / 2)
    # accuracies of the problems: 1, 1/4, 0
    assert found.sem_over_problems == pytest.approx(np.std([1, 0.25, 0], ddof=1) / math.sqrt(3))


def test_one_sample_has_no_standard_error_over_samples() -> None:
    found = score(np.array([[True], [False]]))
    assert found.sem_over_samples is None
    assert found.sem_over_problems == pytest.approx(0.5)


def test_no_verdicts_are_refused() -> None:
    with pytest.raises(ValueError, match="got shape"):
        score(np.zeros((0, 4), dtype=bool))
