"""The search of exchanges: what it must keep, and that it leaves nothing to gain."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redi.engine.data.balance import balance
from redi.engine.data.packing import Cost, pack

ROW_TOKENS = 100


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[list[int]], np.ndarray, np.ndarray, int]:
    """Rows as a poor packer would leave them: (rows, lengths, costs, world_size)."""
    world_size, micro_steps = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rows: list[list[int]] = [[] for _ in range(world_size * micro_steps)]
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=20))
    kept: list[int] = []
    for length in lengths:
        row = draw(st.integers(0, len(rows) - 1))
        if sum(kept[i] for i in rows[row]) + length <= ROW_TOKENS:
            rows[row].append(len(kept))
            kept.append(length)
    sizes = np.array(kept or [1])
    if not kept:
        rows[0] = [0]
    return rows, sizes, Cost(1.0, draw(st.sampled_from([0.0, 0.05]))).of(sizes), world_size


def time_of(rows: list[list[int]], costs: np.ndarray, world_size: int) -> float:
    loads = np.array([costs[row].sum() for row in rows])
    return loads.reshape(-1, world_size).max(axis=1).sum()


@given(steps())
def test_a_step_keeps_its_sequences_and_limits_and_never_takes_longer(step):
    rows, lengths, costs, world_size = step
    found = balance(rows, lengths, costs, row_tokens=ROW_TOKENS, world_size=world_size)
    assert len(found) == len(rows)
    assert sorted(index for row in found for index in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= ROW_TOKENS for row in found)
    before, after = time_of(rows, costs, world_size), time_of(found, costs, world_size)
    assert after <= before * (1 + 1e-12)


@given(steps())
def test_no_exchange_or_move_is_left_that_would_shorten_the_step(step):
    rows, lengths, costs, world_size = step
    found = balance(rows, lengths, costs, row_tokens=ROW_TOKENS, world_size=world_size)
    now = time_of(found, costs, world_size)
    for a, b in product(range(len(found)), repeat=2):
        if a == b:
            continue
        for mine, theirs in product(found[a], [*found[b], None]):
            other = [list(row) for row in found]
            other[a].remove(mine)
            other[b].append(mine)
            if theirs is not None:
                other[b].remove(theirs)
                other[a].append(theirs)
            if all(lengths[row].sum() <= ROW_TOKENS for row in other):
                assert time_of(other, costs, world_size) > now - 2e-5 * costs.sum() / world_size


def test_a_dear_sequence_goes_to_where_another_micro_step_has_room():
    # Micro-steps {9 + 3, 9} and {4, 1}: the second has time for the 3 that the first waits for.
    costs = np.array([9.0, 3, 9, 4, 1])
    found = balance([[0, 1], [2], [3], [4]], costs.astype(int), costs, row_tokens=12, world_size=2)
    assert found == [[0], [2], [3], [1, 4]]


@pytest.mark.parametrize(
    ("pairs", "ranks", "steps", "mean", "lowest"),
    [(32, 8, 60, 0.995, 0.985), pytest.param(512, 64, 10, 0.994, 0.99, marks=pytest.mark.slow)],
)
def test_ranks_hardly_wait_for_one_another_on_long_traces(pairs, ranks, steps, mean, lowest):
    # Lengths like R1's, the costs of a 1.5B model.
    rng = np.random.default_rng(0)
    cost = Cost(linear=6 * 1.54e9, quadratic=6 * 28 * 1536)
    found = []
    for _ in range(steps):
        medians = np.repeat([4300, 7500], pairs)
        lengths = np.clip(medians * np.exp(0.7 * rng.normal(size=2 * pairs)), 300, 19_000)
        packing = pack(lengths.astype(int), row_tokens=32_768, world_size=ranks, cost=cost)
        found.append(packing.rank_efficiency)
    assert np.mean(found) >= mean
    assert min(found) >= lowest
