"""Packing: sequences into packs by cost, and packs into tensors with correct targets."""

import pickle
from dataclasses import fields
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import make_pairs, make_tokens
from hypothesis import given
from hypothesis import strategies as st

from redi.bench.traces import InMemoryTraces
from redi.engine.data.distributions import PADDING, Distributions, write_store
from redi.engine.data.packing import IGNORE, Cost, PackedBatch, balance, build_batch, pack

COSTS = st.builds(Cost, st.floats(0.1, 10), st.one_of(st.just(0.0), st.floats(1e-4, 1.0)))
ROW_TOKENS = 100
LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(LENGTHS, st.integers(100, 250), st.integers(1, 8), COSTS)
def test_every_sequence_is_packed_once_and_fits(lengths, row_tokens, ranks, cost):
    sizes = np.array(lengths)
    packing = pack(sizes, row_tokens=row_tokens, world_size=ranks, cost=cost)
    assert all(len(step) == ranks for step in packing.packs)
    packs = [own for step in packing.packs for own in step]
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(sizes)))
    assert all(sizes[own].sum() <= row_tokens for own in packs)
    assert all(own.dtype == np.int64 and np.all(np.diff(own) > 0) for own in packs)
    assert any(len(own) for own in packing.packs[-1])  # no micro-step without work


@given(LENGTHS, st.integers(100, 250), st.integers(1, 8), COSTS)
def test_rank_efficiency_is_total_cost_over_what_the_slowest_ranks_take(
    lengths, row_tokens, ranks, cost
):
    sizes = np.array(lengths)
    packing = pack(sizes, row_tokens=row_tokens, world_size=ranks, cost=cost)

    def pack_cost(own: np.ndarray) -> float:
        return sum(cost.linear * x + cost.quadratic * x * x for x in sizes[own].tolist())

    steps = [[pack_cost(own) for own in step] for step in packing.packs]
    slowest = sum(max(step) for step in steps)
    total = sum(sum(step) for step in steps)
    assert packing.rank_efficiency == pytest.approx(total / (ranks * slowest))
    longest = max(cost.of(sizes))
    assert packing.bound == pytest.approx(min(1, total / (ranks * longest)))
    assert packing.rank_efficiency <= packing.bound * (1 + 1e-9)
    # Packs of similar cost share a micro-step, the most expensive first.
    flat = [one for step in steps for one in sorted(step, reverse=True)]
    assert flat == pytest.approx(sorted(flat, reverse=True))


@given(LENGTHS, st.integers(100, 250), st.integers(1, 8), COSTS)
def test_packing_is_a_pure_function(lengths, row_tokens, ranks, cost):
    sizes = np.array(lengths)
    first, second = (
        pack(sizes, row_tokens=row_tokens, world_size=ranks, cost=cost) for _ in range(2)
    )
    assert pickle.dumps(first) == pickle.dumps(second)


@given(LENGTHS, st.integers(100, 250), st.integers(1, 8), COSTS, st.sampled_from([1, 2]))
def test_ranks_that_wait_once_a_step_share_its_cost(lengths, row_tokens, ranks, cost, together):
    sizes = np.array(lengths * together)
    packing, again = (
        pack(
            sizes,
            row_tokens=together * row_tokens,
            world_size=ranks,
            cost=cost,
            keep_pairs_together=together,
            gather="step",
        )
        for _ in range(2)
    )
    assert pickle.dumps(packing) == pickle.dumps(again)
    assert all(len(step) == ranks for step in packing.packs)
    of_ranks = [[own for own in column if len(own)] for column in zip(*packing.packs, strict=True)]
    flat = [own for packs in of_ranks for own in packs]
    assert sorted(np.concatenate(flat).tolist()) == list(range(len(sizes)))
    assert all(sizes[own].sum() <= together * row_tokens for own in flat)
    assert all((own[::together] % together == 0).all() for own in flat)  # pairs are whole
    costs = [[cost.of(sizes[own]).sum() for own in packs] for packs in of_ranks]
    assert all(packs == pytest.approx(sorted(packs, reverse=True)) for packs in costs)
    assert max(map(len, costs)) == len(packing.packs)
    slowest = max(map(sum, costs))
    assert packing.rank_efficiency == pytest.approx(cost.of(sizes).sum() / (ranks * slowest))
    # No rank has more than the least loaded one and its largest sequence.
    largest = max(cost.of(sizes).reshape(-1, together).sum(axis=1))
    assert slowest <= min(map(sum, costs)) + largest * (1 + 1e-9)


def test_ranks_that_wait_once_a_step_may_run_different_numbers_of_packs():
    # 100 + 100^2 / 50 = 300 of cost in one pack, or three packs of 60 + 60^2 / 50 = 132 each.
    sizes, cost = np.array([100, 60, 60, 60]), Cost(1.0, 1 / 50)
    once = pack(sizes, row_tokens=100, world_size=2, cost=cost, gather="step")
    assert sorted(
        sum(bool(len(own)) for own in rank) for rank in zip(*once.packs, strict=True)
    ) == [1, 3]
    assert (
        once.rank_efficiency > pack(sizes, row_tokens=100, world_size=2, cost=cost).rank_efficiency
    )


def test_micro_steps_are_as_few_as_the_tokens_allow():
    cost = Cost(1.0, 0.0)
    assert len(pack(np.full(8, 50), row_tokens=100, world_size=2, cost=cost).packs) == 2
    assert len(pack(np.full(9, 50), row_tokens=100, world_size=2, cost=cost).packs) == 3
    # 60 + 60 fit into no pack: as many packs as sequences, though the sum would fit in three.
    assert len(pack(np.full(4, 60), row_tokens=100, world_size=1, cost=cost).packs) == 4


def test_a_rank_without_work_gets_an_empty_pack():
    (step,) = pack(np.array([5, 7]), row_tokens=10, world_size=4, cost=Cost(1.0, 0.0)).packs
    assert [own.tolist() for own in step] == [[1], [0], [], []]


def test_long_traces_do_not_make_ranks_wait():
    # 32 pairs of reasoning traces on 8 ranks: packs of equal cost reach 0.90.
    rng = np.random.default_rng(0)
    efficiencies = []
    for _ in range(20):
        lengths = np.clip(np.exp(rng.normal(8.3, 0.75, 64)), 200, 19_800).astype(np.int64)
        packing = pack(lengths, row_tokens=32_768, world_size=8, cost=Cost(1.0, 1 / 20_000))
        efficiencies.append(packing.rank_efficiency)
    assert np.mean(efficiencies) > 0.98


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[list[int]], np.ndarray, np.ndarray, int]:
    """Packs as a poor packer would fill them: (packs, lengths, costs, world_size)."""
    world_size, micro_steps = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    packs: list[list[int]] = [[] for _ in range(world_size * micro_steps)]
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=20))
    kept: list[int] = []
    for length in lengths:
        own = draw(st.integers(0, len(packs) - 1))
        if sum(kept[i] for i in packs[own]) + length <= ROW_TOKENS:
            packs[own].append(len(kept))
            kept.append(length)
    sizes = np.array(kept or [1])
    if not kept:
        packs[0] = [0]
    return packs, sizes, Cost(1.0, draw(st.sampled_from([0.0, 0.05]))).of(sizes), world_size


def time_of(packs: list[list[int]], costs: np.ndarray, world_size: int) -> float:
    loads = np.array([costs[own].sum() for own in packs])
    return loads.reshape(-1, world_size).max(axis=1).sum()


@given(steps())
def test_a_step_keeps_its_sequences_and_limits_and_never_takes_longer(step):
    packs, lengths, costs, world_size = step
    found = balance(packs, lengths, costs, row_tokens=ROW_TOKENS, world_size=world_size)
    assert len(found) == len(packs)
    assert sorted(index for own in found for index in own) == list(range(len(lengths)))
    assert all(lengths[own].sum() <= ROW_TOKENS for own in found)
    before, after = time_of(packs, costs, world_size), time_of(found, costs, world_size)
    assert after <= before * (1 + 1e-12)


@given(steps())
def test_no_exchange_or_move_is_left_that_would_shorten_the_step(step):
    packs, lengths, costs, world_size = step
    found = balance(packs, lengths, costs, row_tokens=ROW_TOKENS, world_size=world_size)
    now = time_of(found, costs, world_size)
    for a, b in product(range(len(found)), repeat=2):
        if a == b:
            continue
        for mine, theirs in product(found[a], [*found[b], None]):
            other = [list(own) for own in found]
            other[a].remove(mine)
            other[b].append(mine)
            if theirs is not None:
                other[b].remove(theirs)
                other[a].append(theirs)
            if all(lengths[own].sum() <= ROW_TOKENS for own in other):
                assert time_of(other, costs, world_size) > now - 2e-5 * costs.sum() / world_size


def test_an_expensive_sequence_moves_to_a_micro_step_with_room():
    # Micro-steps {9 + 3, 9} and {4, 1}: the second has time for the 3 that the first waits for.
    costs = np.array([9.0, 3, 9, 4, 1])
    found = balance([[0, 1], [2], [3], [4]], costs.astype(int), costs, row_tokens=12, world_size=2)
    assert found == [[0], [2], [3], [1, 4]]


@pytest.mark.parametrize(
    ("gather", "pairs", "ranks", "steps", "mean", "lowest"),
    [
        ("micro_step", 32, 8, 60, 0.995, 0.985),
        pytest.param("micro_step", 512, 64, 10, 0.994, 0.99, marks=pytest.mark.slow),
        ("step", 32, 8, 60, 0.995, 0.99),
        ("step", 256, 64, 5, 0.99, 0.985),
    ],
)
def test_ranks_hardly_wait_for_one_another_on_long_traces(
    gather, pairs, ranks, steps, mean, lowest
):
    # Lengths like R1's, the costs of a 1.5B model.
    rng = np.random.default_rng(0)
    cost = Cost(linear=6 * 1.54e9, quadratic=6 * 28 * 1536)
    found = []
    for _ in range(steps):
        medians = np.repeat([4300, 7500], pairs)
        lengths = np.clip(medians * np.exp(0.7 * rng.normal(size=2 * pairs)), 300, 19_000)
        packing = pack(
            lengths.astype(int), row_tokens=32_768, world_size=ranks, cost=cost, gather=gather
        )
        found.append(packing.rank_efficiency)
    assert np.mean(found) >= mean
    assert min(found) >= lowest


@pytest.mark.parametrize("lengths", [[], [0, 3], [101]])
def test_lengths_outside_their_range_are_refused(lengths):
    with pytest.raises(ValueError, match="row_tokens = 100"):
        pack(np.array(lengths, np.int64), row_tokens=100, world_size=1, cost=Cost(1.0, 0.0))


def test_costs_must_cost_something():
    for linear, quadratic in ((0.0, 0.0), (-1.0, 2.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="at least 0"):
            Cost(linear, quadratic)


def test_a_window_bounds_the_pairs_of_a_token() -> None:
    lengths = np.array([1, 7, 8, 9, 50])
    full, sliding = Cost(2.0, 3.0), Cost(2.0, 0.0, ((8, 3.0),))
    np.testing.assert_array_equal(full.of(lengths)[:3], sliding.of(lengths)[:3])
    # From there a further token adds its 8 pairs, twice.
    assert np.diff(sliding.of(np.arange(8, 12))).tolist() == [2 + 3 * 2 * 8] * 3
    both = Cost(2.0, 3.0, ((8, 3.0),))
    np.testing.assert_array_equal(
        both.attention_times(2).of(lengths),
        2 * (full.of(lengths) + sliding.of(lengths)) - 6 * lengths,
    )
    with pytest.raises(ValueError, match="at least 0"):
        Cost(1.0, 1.0, ((8, -1.0),))


def pairs_apart(packing, pairs: int) -> int:
    """Number of pairs whose traces are in two packs."""
    packs = [set(own.tolist()) for step in packing.packs for own in step]
    return pairs - sum(
        2 * pair in own and 2 * pair + 1 in own for own in packs for pair in range(pairs)
    )


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 50), st.integers(1, 50)),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 4),
    COSTS,
)
def test_pairs_share_a_pack_if_their_prompts_shorten_the_step(pairs, ranks, cost):
    prompts, *completions = np.array(pairs).T
    sizes = (prompts[:, None] + np.stack(completions, axis=1)).reshape(-1)
    pack_some = partial(pack, sizes, row_tokens=200, world_size=ranks, cost=cost)
    apart = pack_some()
    found = pack_some(shared=prompts - 1)
    packs = [own for step in found.packs for own in step]
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(sizes)))
    assert all(sizes[own].sum() <= 200 for own in packs)

    def slowest(packing) -> float:
        saved = cost.linear * (prompts - 1)
        own = cost.of(sizes)
        return sum(
            max(
                own[some].sum()
                - sum(saved[p] for p in range(len(pairs)) if {2 * p, 2 * p + 1} <= {*some})
                for some in step
            )
            for step in packing.packs
        )

    assert slowest(found) <= cost.of(sizes).sum() / ranks / apart.rank_efficiency * (1 + 1e-9)


def test_long_prompts_keep_pairs_together_and_long_traces_do_not() -> None:
    rng = np.random.default_rng(0)
    prompts, completions = rng.integers(60, 90, 32), rng.integers(40, 90, (32, 2))
    short = (prompts[:, None] + completions).reshape(-1)
    cost = Cost(1.0, 1e-5)
    packed = partial(pack, row_tokens=2000, world_size=8, cost=cost)
    assert pairs_apart(packed(short), 32) > 16
    assert pairs_apart(packed(short, shared=prompts - 1), 32) == 0
    long = short + rng.integers(1000, 9000, 64)
    packed = partial(pack, row_tokens=20_000, world_size=32, cost=cost)
    assert pairs_apart(packed(long, shared=prompts - 1), 32) > 16


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


def test_what_belongs_to_a_token_is_at_the_position_that_predicts_it(tmp_path):
    # Prompt 1 2, completion 3 4 5 without its last token; prompt 6, completion 7 8.
    weights = [[0.5, 0.0, 2.0], None]
    tokens = make_tokens(tmp_path / "made", [2, 1], [3, 2], [1, -1], [0, 0], token_weights=weights)
    rows = [
        (trace, np.array(own)[:, None], np.array(logps)[:, None], np.array(own))
        for trace, own, logps in ((0, [3, 4, 5], [-1, -2, -3]), (1, [7, 8], [-4, -5]))
    ]
    teacher = Distributions([write_store(tmp_path / "store", "made", rows)], [1.0])
    batch = build_batch(tokens, np.array([1, 0]), np.array([3, 4]), teacher)
    assert batch.token_weights is not None
    assert batch.token_weights.tolist() == [1, 1, 1, 1, 0.5, 0, 1]
    assert batch.targets.tolist() == [7, 8, IGNORE, IGNORE, 3, IGNORE, IGNORE]
    assert batch.valid_index.tolist() == [4, 0, 1]
    assert batch.num_targets.tolist() == [2, 1]
    assert batch.target_counts == (1, 2)
    assert batch.teacher_ids is not None
    assert batch.teacher_ids[:, 0].tolist() == [7, 8, PADDING, PADDING, 3, 4, PADDING]
    assert batch.teacher_logps is not None
    nothing = -np.inf
    assert batch.teacher_logps[:, 0].tolist() == [-4, -5, nothing, nothing, -1, -2, nothing]
    # Twice the same trace: the second starts with the last token of the prompt.
    twice = build_batch(tokens, np.array([0, 0]), np.array([4, 4]), teacher, share_prompts=True)
    assert twice.token_weights is not None
    assert twice.token_weights.tolist() == [1, 0.5, 0, 1, 0.5, 0, 1]
    assert twice.teacher_logps is not None
    assert twice.teacher_logps[:, 0].tolist() == [nothing, -1, -2, nothing, -1, -2, nothing]


def test_weights_are_there_only_if_some_differ_from_one(tmp_path):
    tokens = make_tokens(tmp_path / "made", [2] * 3, [3] * 3, [1] * 3, range(3), [1, 0.5, 1])
    batch = build_batch(tokens, np.array([0, 1]), np.array([5, 5]))
    assert batch.weights is not None
    assert batch.weights.dtype == torch.float32
    assert batch.weights.tolist() == [1.0, 0.5]
    assert build_batch(tokens, np.array([0, 2]), np.array([5, 5])).weights is None


def test_a_pack_without_work_is_two_tokens_that_count_for_nothing(tmp_path):
    tokens = make_tokens(tmp_path / "made", [2], [4], [1], [0])
    batch = build_batch(tokens, np.array([], np.int64), np.array([], np.int64))
    assert batch.is_dummy
    assert batch.num_tokens == 0
    assert batch.input_ids.tolist() == [0, 0]
    assert batch.position_ids.tolist() == [0, 1]
    assert batch.targets.tolist() == [IGNORE, IGNORE]
    assert batch.signs.tolist() == batch.num_targets.tolist() == batch.full_targets.tolist() == [0]
    assert (batch.num_positive_targets, batch.target_counts) == (0, (0,))
    assert (batch.sequence_ids.tolist(), batch.max_seqlen) == ([-1], 2)
    assert batch.cu_seqlens.tolist() == [0, 2]
    assert len(batch.valid_index) == 0
    with pytest.raises(ValueError, match="2 lengths for 1 sequences"):
        build_batch(tokens, np.array([0]), np.array([5, 5]))


def test_traces_that_share_a_prompt_start_with_its_last_token() -> None:
    ids = [np.array([1, 2, 3, 4, 5]), np.array([6, 7, 8]), np.array([1, 2, 3, 9, 10, 11])]
    traces: Any = InMemoryTraces(ids, np.array([3, 2, 3]), np.array([1, 1, -1]))
    batch = build_batch(traces, np.arange(3), traces.lengths, share_prompts=True)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 3, 9, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 2, 3, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 12]
    assert batch.targets.tolist()[8:] == [9, 10, 11, IGNORE]
    assert batch.documents.tolist() == [0, 5, 8, 14]
    assert batch.attended is not None
    assert batch.attended.tolist() == [*range(8), 0, 1, 8, 9, 10, 11]
    assert batch.own is not None
    assert batch.own.tolist() == [*range(8), 10, 11, 12, 13]
    assert (batch.max_seqlen, batch.num_tokens) == (6, 12)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(0, 99))
def test_a_pack_with_shared_prompts_has_the_rows_of_whole_traces(prompts, seed):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 1000, rng.integers(1, 6)) for _ in range(5)]
    ids = [np.concatenate([texts[p], rng.integers(0, 9, rng.integers(1, 6))]) for p in prompts]
    starts = np.array([len(texts[p]) for p in prompts])
    traces: Any = InMemoryTraces(ids, starts, rng.choice([-1, 1], len(ids)))
    lengths = rng.integers(starts + 1, traces.lengths + 1)  # some are truncated
    everything = np.arange(len(ids))
    plain = build_batch(traces, everything, lengths)
    shared = build_batch(traces, everything, lengths, share_prompts=True)
    if len(set(prompts)) == len(prompts):
        assert_same(plain, shared)
    if shared.attended is None:
        assert_same(plain, shared)
        return
    assert shared.own is not None
    for name in ("input_ids", "position_ids"):
        assert torch.equal(getattr(shared, name)[shared.attended], getattr(plain, name))
    for name in ("input_ids", "position_ids", "targets"):
        assert torch.equal(getattr(plain, name)[shared.own], getattr(shared, name))
    assert torch.equal(shared.own[shared.valid_index], plain.valid_index)
    assert torch.equal(shared.documents, plain.cu_seqlens)
    first = [prompts.index(p) == place for place, p in enumerate(prompts)]
    kept = [
        length - (0 if f else start - 1)
        for length, f, start in zip(lengths, first, starts, strict=True)
    ]
    assert shared.cu_seqlens.diff().tolist() == kept
    same = {"signs", "num_targets", "full_targets", "sequence_ids", "target_counts", "max_seqlen"}
    for name in same:
        a, b = getattr(plain, name), getattr(shared, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


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
