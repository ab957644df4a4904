"""The loader: a step has the same bytes for any workers and any step of resuming."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import make_pairs

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.loader import StepBatches, StepLoader
from redi.engine.data.packing import IGNORE, Cost
from redi.engine.data.schedule import Examples, Schedule, select

ROW_TOKENS = 128
SCHEDULE = Schedule(num_units=20, batch=6, epochs=3, max_steps=8, seed=7)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenizedTraces:
    return make_pairs(tmp_path_factory.mktemp("made") / "made", 20, weighted=True)


def examples_of(tokens: TokenizedTraces, needs: Any = "pairs") -> Examples:
    return select(
        tokens, objective_needs=needs, max_tokens=50, overlong="truncate", row_tokens=ROW_TOKENS
    )


def loader_of(tokens: TokenizedTraces, **options: Any) -> StepLoader:
    examples = options.pop("examples", None) or examples_of(tokens)
    schedule = options.pop("schedule", SCHEDULE)
    rank, world_size = options.pop("rank", 0), options.pop("world_size", 1)
    return StepLoader(
        tokens,
        examples,
        schedule,
        row_tokens=ROW_TOKENS,
        rank=rank,
        world_size=world_size,
        cost=Cost(1.0, 0.01),
        **options,
    )


def raw(steps: list[StepBatches]) -> list[list[Any]]:
    """All that the steps hold, tensors as (dtype, bytes)."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.numpy()
        return (value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else value

    def values(item: Any) -> list[Any]:
        return [plain(getattr(item, field.name)) for field in fields(item)]

    return [
        [values(batch) for batch in step.micro_batches] + values(replace(step, micro_batches=[]))
        for step in steps
    ]


@pytest.mark.parametrize("workers", [0, 1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_workers_and_any_resume_step_give_the_same_bytes(tokens, workers):
    expected = raw(list(loader_of(tokens).steps(0)))
    assert len(expected) == 8
    for start in (0, 5) if workers else (0, 1, 3, 5, 7, 8):  # workers take a second to start
        found = list(loader_of(tokens, workers=workers).steps(start))
        assert [step.step for step in found] == list(range(start + 1, 9))
        assert raw(found) == expected[start:]


@pytest.mark.parametrize("gather", ["micro_step", "step"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_ranks_share_a_step_and_agree_on_its_counts(tokens, world_size, gather):
    examples = examples_of(tokens)
    ranks = [
        list(loader_of(tokens, rank=rank, world_size=world_size, gather=gather).steps(0))
        for rank in range(world_size)
    ]
    for step, parts in enumerate(zip(*ranks, strict=True), start=1):
        first = parts[0]
        for part in parts:
            if gather == "micro_step":
                assert len(part.micro_batches) == first.micro_steps
            elif len(part.micro_batches) > 1:  # a dummy runs only alone
                assert not any(batch.is_dummy for batch in part.micro_batches)
            np.testing.assert_array_equal(part.units, SCHEDULE.units(step))
            for name in ("num_sequences", "num_targets", "num_tokens", "rank_efficiency"):
                assert getattr(part, name) == getattr(first, name)
        assert max(len(part.micro_batches) for part in parts) == first.micro_steps
        batches = [batch for part in parts for batch in part.micro_batches]
        real = [batch for batch in batches if not batch.is_dummy]
        assert all(batch.num_tokens <= ROW_TOKENS for batch in real)
        sequences = torch.cat([batch.sequence_ids for batch in real]).tolist()
        assert sorted(sequences) == sorted(examples.units[SCHEDULE.units(step)].flatten())
        assert first.num_sequences == len(sequences) == 12
        assert first.num_positives == sum(int((batch.signs > 0).sum()) for batch in batches) == 6
        assert first.num_negatives == sum(int((batch.signs < 0).sum()) for batch in batches) == 6
        assert first.num_targets == sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        assert first.num_tokens == sum(batch.num_tokens for batch in batches)
    if world_size == 40:
        assert any(
            batch.is_dummy for steps in ranks for step in steps for batch in step.micro_batches
        )


def test_traces_are_cut_to_their_limit(tokens):
    assert tokens.lengths.max() > 50
    for step in loader_of(tokens).steps(0):
        for batch in step.micro_batches:
            assert batch.max_seqlen <= 50
            kept = np.minimum(tokens.lengths, 50)[batch.sequence_ids]
            assert batch.cu_seqlens.diff().tolist() == kept.tolist()
            assert (
                batch.num_targets.tolist()
                == (kept - tokens.prompt_lengths[batch.sequence_ids]).tolist()
            )


def test_single_positives_are_served_without_negatives(tokens):
    loader = loader_of(tokens, examples=examples_of(tokens, "positives"))
    for step in loader.steps(0):
        assert (step.num_sequences, step.num_positives, step.num_negatives) == (6, 6, 0)
        assert all(bool((batch.signs == 1).all()) for batch in step.micro_batches)


def test_loading_draws_nothing_from_the_global_random_numbers(tokens):
    state = torch.get_rng_state()
    for workers in (0, 1):
        list(loader_of(tokens, workers=workers).steps(5))
    assert torch.equal(state, torch.get_rng_state())


def test_a_loader_can_be_left_early(tokens):
    steps = loader_of(tokens, workers=2).steps(0)
    assert next(steps).step == 1
    del steps


def test_many_packs_do_not_use_up_file_descriptors(tmp_path):
    resource = pytest.importorskip("resource")
    tokens = make_pairs(tmp_path / "made", 200)
    schedule = Schedule(num_units=200, batch=100, epochs=2, max_steps=None, seed=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, open_now + 64), hard))
    try:
        steps = list(loader_of(tokens, schedule=schedule, workers=2).steps(0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(len(step.micro_batches) for step in steps) > 100


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(tokens, rank):
    with pytest.raises(ValueError, match="world_size = 2"):
        loader_of(tokens, rank=rank, world_size=2)
