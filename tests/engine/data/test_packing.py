"""Packing: sequences into rows by cost, and rows into tensors with the right targets."""

import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from data_cases import make_pairs, make_tokens
from hypothesis import given
from hypothesis import strategies as st

from redi.engine.data.packing import IGNORE, Cost, PackedBatch, build_batch, pack

COSTS = st.builds(Cost, st.floats(0.1, 10), st.one_of(st.just(0.0), st.floats(1e-4, 1.0)))
LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(LENGTHS, st.integers(100, 250), st.integers(1, 8), COSTS)
def test_every_sequence_is_packed_once_into_rows_that_hold_it(lengths, row_tokens, ranks, cost):
    sizes = np.array(lengths)
    packing = pack(sizes, row_tokens=row_tokens, world_size=ranks, cost=cost)
    assert all(len(step) == ranks for step in packing.rows)
    rows = [row for step in packing.rows for row in step]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(sizes)))
    assert all(sizes[row].sum() <= row_tokens for row in rows)
    assert all(row.dtype == np.int64 and np.all(np.diff(row) > 0) for row in rows)
    assert any(len(row) for row in packing.rows[-1])  # no micro-step without work


@given(LENGTHS, st.integers(100, 250), st.integers(1, 8), COSTS)
def test_rank_efficiency_is_total_cost_over_what_the_slowest_ranks_take(
    lengths, row_tokens, ranks, cost
):
    sizes = np.array(lengths)
    packing = pack(sizes, row_tokens=row_tokens, world_size=ranks, cost=cost)

    def row_cost(row: np.ndarray) -> float:
        return sum(cost.linear * x + cost.quadratic * x * x for x in sizes[row].tolist())

    steps = [[row_cost(row) for row in step] for step in packing.rows]
    slowest = sum(max(step) for step in steps)
    total = sum(sum(step) for step in steps)
    assert packing.rank_efficiency == pytest.approx(total / (ranks * slowest))
    # Rows of similar cost share a micro-step, the dearest first.
    flat = [row for step in steps for row in sorted(step, reverse=True)]
    assert flat == pytest.approx(sorted(flat, reverse=True))


@given(LENGTHS, st.integers(100, 250), st.integers(1, 8), COSTS)
def test_packing_is_a_pure_function(lengths, row_tokens, ranks, cost):
    sizes = np.array(lengths)
    first, second = (
        pack(sizes, row_tokens=row_tokens, world_size=ranks, cost=cost) for _ in range(2)
    )
    assert pickle.dumps(first) == pickle.dumps(second)


def test_micro_steps_are_as_few_as_the_tokens_allow():
    cost = Cost(1.0, 0.0)
    assert len(pack(np.full(8, 50), row_tokens=100, world_size=2, cost=cost).rows) == 2
    assert len(pack(np.full(9, 50), row_tokens=100, world_size=2, cost=cost).rows) == 3
    # 60 + 60 fit no row: as many rows as sequences, though the sum would fit in three.
    assert len(pack(np.full(4, 60), row_tokens=100, world_size=1, cost=cost).rows) == 4


def test_a_rank_without_work_gets_an_empty_row():
    (step,) = pack(np.array([5, 7]), row_tokens=10, world_size=4, cost=Cost(1.0, 0.0)).rows
    assert [row.tolist() for row in step] == [[1], [0], [], []]


def test_long_traces_do_not_make_ranks_wait():
    # 32 pairs of reasoning traces on 8 ranks: rows of equal cost reach 0.90.
    rng = np.random.default_rng(0)
    efficiencies = []
    for _ in range(20):
        lengths = np.clip(np.exp(rng.normal(8.3, 0.75, 64)), 200, 19_800).astype(np.int64)
        packing = pack(lengths, row_tokens=32_768, world_size=8, cost=Cost(1.0, 1 / 20_000))
        efficiencies.append(packing.rank_efficiency)
    assert np.mean(efficiencies) > 0.98


@pytest.mark.parametrize("lengths", [[], [0, 3], [101]])
def test_lengths_outside_their_range_are_refused(lengths):
    with pytest.raises(ValueError, match="row_tokens = 100"):
        pack(np.array(lengths, np.int64), row_tokens=100, world_size=1, cost=Cost(1.0, 0.0))


def test_costs_must_cost_something():
    for linear, quadratic in ((0.0, 0.0), (-1.0, 2.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="at least 0"):
            Cost(linear, quadratic)


def test_a_batch_lays_traces_end_to_end_with_shifted_targets(tmp_path):
    # Made tokens count up from 1: prompt 1 2, completion 3 4 5; prompt 6, completion 7 8.
    tokens = make_tokens(tmp_path / "made", [2, 1], [3, 2], [1, -1], [0, 0])
    batch = build_batch(tokens, np.array([1, 0]), np.array([3, 5]))
    assert batch.input_ids.tolist() == [6, 7, 8, 1, 2, 3, 4, 5]
    assert batch.targets.tolist() == [7, 8, IGNORE, IGNORE, 3, 4, 5, IGNORE]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 3, 8]
    assert batch.valid_index.tolist() == [4, 5, 6, 0, 1]  # the positive's first
    assert batch.num_positive_targets == 3
    assert batch.num_targets.tolist() == [2, 3]
    assert batch.signs.tolist() == [-1, 1]
    assert batch.sequence_ids.tolist() == [1, 0]
    assert (batch.max_seqlen, batch.num_tokens, batch.is_dummy) == (5, 8, False)
    assert batch.weights is None
    assert batch.cu_seqlens.dtype == torch.int32
    for name in ("input_ids", "targets", "position_ids", "valid_index", "signs", "num_targets"):
        assert getattr(batch, name).dtype == torch.int64


def test_a_truncated_trace_trains_what_remains(tmp_path):
    tokens = make_tokens(tmp_path / "made", [2], [4], [1], [0])
    batch = build_batch(tokens, np.array([0]), np.array([4]))
    assert batch.input_ids.tolist() == [1, 2, 3, 4]
    assert batch.targets.tolist() == [IGNORE, 3, 4, IGNORE]
    assert batch.num_targets.tolist() == [2]


def test_weights_are_there_only_if_some_differ_from_one(tmp_path):
    tokens = make_tokens(tmp_path / "made", [2] * 3, [3] * 3, [1] * 3, range(3), [1, 0.5, 1])
    row = build_batch(tokens, np.array([0, 1]), np.array([5, 5]))
    assert row.weights is not None
    assert row.weights.dtype == torch.float32
    assert row.weights.tolist() == [1.0, 0.5]
    assert build_batch(tokens, np.array([0, 2]), np.array([5, 5])).weights is None


def test_a_row_without_work_is_one_token_that_counts_for_nothing(tmp_path):
    tokens = make_tokens(tmp_path / "made", [2], [4], [1], [0])
    batch = build_batch(tokens, np.array([], np.int64), np.array([], np.int64))
    assert batch.is_dummy
    assert batch.num_tokens == 0
    assert batch.input_ids.tolist() == [0]
    assert batch.targets.tolist() == [IGNORE]
    assert batch.signs.tolist() == batch.num_targets.tolist() == [0]
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert len(batch.valid_index) == 0
    with pytest.raises(ValueError, match="2 lengths for 1 sequences"):
        build_batch(tokens, np.array([0]), np.array([5, 5]))


def assert_same(left: PackedBatch, right: PackedBatch) -> None:
    for field in fields(PackedBatch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b


def test_a_batch_survives_moving_and_pickling(tmp_path):
    tokens = make_pairs(tmp_path / "made", 4, weighted=True)
    batch = build_batch(tokens, np.arange(8), tokens.lengths)
    assert_same(batch, batch.to("cpu", non_blocking=True))
    assert_same(batch, pickle.loads(pickle.dumps(batch)))
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert moved.max_seqlen == batch.max_seqlen
