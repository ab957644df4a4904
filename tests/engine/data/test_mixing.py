"""Mixing weights: how often an epoch draws the units of each path, and which of them."""

import pickle
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import make_pairs, save_tokenizer, settings, write_rows
from hypothesis import given
from hypothesis import strategies as st

from redi.engine.console import Console
from redi.engine.data.loader import StepBatches, StepLoader
from redi.engine.data.mixing import MixedPath, epoch_draws, mix
from redi.engine.data.packing import Cost
from redi.engine.data.schedule import Schedule, select
from redi.engine.data.summary import MIXTURE_COLUMNS, count_rows, mixture_rows, summarize
from redi.engine.data.tokens import TokenizedTraces, tokenize
from redi.engine.errors import InputError

LIMITS: dict[str, Any] = {"max_tokens": 100, "row_tokens": 200, "overlong": "error"}
COST = Cost(linear=1.0, quadratic=0.0)


def mixed(path_of_unit: list[int], weights: list[float]) -> tuple[MixedPath, ...]:
    """A mixture of units 0, 1, ... whose paths are given."""
    own = [np.flatnonzero(np.array(path_of_unit) == number) for number in range(len(weights))]
    return tuple(
        MixedPath(f"{number}.jsonl", weight, units, round(weight * len(units)))
        for number, (units, weight) in enumerate(zip(own, weights, strict=True))
    )


def scheduled(mixture: tuple[MixedPath, ...], **changes: Any) -> Schedule:
    units = sum(len(one.units) for one in mixture)
    whole = Schedule(units, batch=1, epochs=3, max_steps=None, seed=7, mixture=mixture)
    return replace(whole, **changes)


def all_steps(schedule: Schedule) -> list[list[int]]:
    return [schedule.units(step).tolist() for step in range(1, schedule.total_steps + 1)]


WEIGHTS = [0.05, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.7]
mixtures = st.integers(1, 4).flatmap(
    lambda paths: st.builds(
        mixed,
        st.lists(st.integers(0, paths - 1), min_size=1, max_size=40),
        st.lists(st.sampled_from(WEIGHTS), min_size=paths, max_size=paths),
    )
)
drawable = mixtures.filter(lambda mixture: any(one.draws for one in mixture))
seeds = st.integers(0, 2**40)


@given(drawable, seeds)
def test_an_epoch_draws_weight_times_the_units_of_each_path(mixture, seed):
    for epoch in range(5):
        drawn = epoch_draws(mixture, seed, epoch)
        for one in mixture:
            assert np.isin(drawn, one.units).sum() == round(one.weight * len(one.units))
        assert len(drawn) == sum(one.draws for one in mixture)


@given(drawable, seeds)
def test_no_unit_is_drawn_again_before_all_of_its_path_were_drawn(mixture, seed):
    times = np.zeros(sum(len(one.units) for one in mixture), dtype=int)
    for epoch in range(5):
        np.add.at(times, epoch_draws(mixture, seed, epoch), 1)
        for one in mixture:
            if len(one.units):
                assert times[one.units].max() - times[one.units].min() <= 1


@given(drawable, seeds, st.integers(1, 9))
def test_steps_draw_what_their_epoch_does_but_for_the_last_partial_batch(mixture, seed, batch):
    batch = min(batch, sum(one.draws for one in mixture))
    schedule = scheduled(mixture, batch=batch, seed=seed)
    steps = all_steps(schedule)
    assert all(len(units) == batch for units in steps)
    per_epoch = schedule.steps_per_epoch
    assert len(steps) == 3 * per_epoch
    for epoch in range(3):
        trained = Counter(chain(*steps[epoch * per_epoch : (epoch + 1) * per_epoch]))
        left = Counter(epoch_draws(mixture, seed, epoch).tolist())
        left.subtract(trained)
        assert min(left.values()) >= 0
        assert left.total() == schedule.dropped_per_epoch < batch
    assert schedule.drawn().tolist() == sorted(set(chain(*steps)))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), seeds)
def test_weights_of_1_leave_the_order_as_it_is_without_weights(path_of_unit, seed):
    schedule = scheduled(mixed(path_of_unit, [1.0] * 3), seed=seed)
    assert all_steps(schedule) == all_steps(replace(schedule, mixture=()))


@given(drawable, seeds, st.randoms())
def test_a_step_depends_on_nothing_but_its_number(mixture, seed, random):
    schedule = scheduled(mixture, batch=min(8, sum(one.draws for one in mixture)), seed=seed)
    expected = dict(enumerate(all_steps(schedule), start=1))
    another = pickle.loads(pickle.dumps(schedule))  # as a process that resumes has it
    steps = list(expected)
    random.shuffle(steps)
    assert {step: another.units(step).tolist() for step in steps} == expected


def test_a_weight_of_one_half_draws_one_half_and_then_the_other():
    mixture = mixed([0] * 100 + [1] * 100, [0.5, 0.5])
    halves = [set(epoch_draws(mixture, 7, epoch).tolist()) for epoch in range(4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(200))
    assert not halves[0] & halves[1]
    assert halves[2] not in halves[:2]  # each pass has an order of its own
    first, second = ({u % 100 for u in halves[0] if u // 100 == path} for path in (0, 1))
    assert first != second  # and so has each path
    assert halves[0] != set(epoch_draws(mixture, 8, 0).tolist())


def test_which_units_of_a_path_are_drawn_does_not_hang_on_the_others_weights():
    paths = [0, 1] * 50
    few, many = (epoch_draws(mixed(paths, [0.3, other]), 7, 2) for other in (0.5, 3.0))
    assert few[few % 2 == 0].tolist() == many[many % 2 == 0].tolist()


def test_the_mixed_order_of_a_seed_never_changes():
    # A resume must go on in the order that the run began with, whatever the versions installed.
    schedule = scheduled(mixed([0] * 4 + [1] * 6, [2.0, 0.5]), batch=11, seed=42)
    assert all_steps(schedule) == [
        [2, 5, 9, 0, 7, 1, 3, 0, 3, 1, 2],
        [8, 0, 1, 4, 2, 1, 6, 3, 0, 2, 3],
        [1, 3, 0, 1, 2, 7, 6, 3, 2, 5, 0],
    ]


def test_a_unit_drawn_twice_is_trained_twice_on_any_number_of_ranks(tmp_path: Path) -> None:
    tokens = make_pairs(tmp_path / "made", 12)
    examples = select(tokens, objective_needs="pairs", **LIMITS)
    schedule = scheduled(mixed([0] * 4 + [1] * 8, [2.5, 0.25]), batch=6)
    assert any(len(set(units)) < len(units) for units in all_steps(schedule))

    def served(rank: int, world_size: int, start: int) -> list[StepBatches]:
        loader = StepLoader(
            tokens,
            examples,
            schedule,
            row_tokens=128,
            rank=rank,
            world_size=world_size,
            cost=COST,
        )
        return list(loader.steps(start))

    for start, world_size in ((0, 1), (0, 3), (4, 2)):
        ranks = [served(rank, world_size, start) for rank in range(world_size)]
        for step, parts in enumerate(zip(*ranks, strict=True), start=start + 1):
            rows = [row for part in parts for row in part.micro_batches if not row.is_dummy]
            sequences = torch.cat([row.sequence_ids for row in rows]).tolist()
            wanted = examples.units[schedule.units(step)].flatten().tolist()
            assert sorted(sequences) == sorted(wanted)
        assert step == schedule.total_steps == 6


def traces(*letters: str, start: int = 0, **columns: Any) -> list[dict[str, Any]]:
    """A row for each of the letters + or -: a correct or incorrect trace of the next problem."""
    return [
        {"prompt": f"{number}", "completion": f"{number}{sign}", "label": sign == "+", **columns}
        for number, sign in enumerate(letters, start=start)
    ]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenizedTraces:
    """Folder "a" with two files, files b.jsonl and c.jsonl; some problems lie in several."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "a").mkdir()
    write_rows(folder / "a" / "1.jsonl", traces(*"++--"))
    write_rows(folder / "a" / "2.jsonl", traces(*"--+", start=4, teacher="r1"))
    write_rows(folder / "b.jsonl", traces(*"--++++++"))
    write_rows(folder / "c.jsonl", traces(*"---", start=4))
    paths = [str(folder / name) for name in ("a", "b.jsonl", "c.jsonl")]
    wanted = settings(paths, save_tokenizer(folder / "tokenizer"))
    return tokenize(wanted, folder / "cache", processes=1, console=Console(active=False))


def mixture_of(
    tokens: TokenizedTraces, needs: Any, weights: list[float]
) -> tuple[np.ndarray, tuple[MixedPath, ...]]:
    """The units, and what an epoch takes of the three paths."""
    folder = tokens.folder.parents[1]
    paths = [str(folder / name) for name in ("a", "b.jsonl", "c.jsonl")]
    units = select(tokens, objective_needs=needs, **LIMITS).units
    return units, mix(tokens, units, paths, weights)


@pytest.mark.parametrize(
    ("needs", "units", "draws"),
    [("positives", (3, 6, 0), (6, 3, 0)), ("pairs", (3, 4, 0), (6, 2, 0))],
)
def test_a_folder_is_one_path_and_a_pair_comes_from_where_its_positive_lies(
    needs, units, draws, tokens
):
    found, mixture = mixture_of(tokens, needs, [2.0, 0.5, 1.0])
    assert tuple(len(one.units) for one in mixture) == units
    assert tuple(one.draws for one in mixture) == draws
    for one in mixture:
        for unit in one.units:
            assert tokens.where(int(found[unit, 0])).startswith(one.path)
    assert sorted(np.concatenate([one.units for one in mixture])) == list(range(len(found)))


def test_the_choice_of_teachers_comes_before_the_mixing(tokens):
    _, mixture = mixture_of(tokens.of_teachers(["r1"], {}), "traces", [2.0, 1.0, 1.0])
    assert [(len(one.units), one.draws) for one in mixture] == [(3, 6), (0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ([1.0, 0.1, 1.0], r"b.jsonl: \[data\] mixing_weights 0.1 times 4 units .*: raise it"),
        ([1.0, 1.0, 2.0], r"c.jsonl: \[data\] mixing_weights 2 times 0 units .*: set it to 1"),
        ([1e300, 1.0, 1.0], r"a: \[data\] mixing_weights 1e\+300 times 3 .*: lower it"),
    ],
)
def test_a_weight_that_draws_nothing_or_far_too_much_is_an_error_that_names_its_path(
    weights, fault, tokens
):
    with pytest.raises(InputError, match=fault):
        mixture_of(tokens, "pairs", weights)


def test_an_epoch_of_fewer_draws_than_a_batch_is_an_error_that_names_the_weights():
    with pytest.raises(InputError, match=r"gives 5 units .* step takes 6: .* mixing_weights"):
        scheduled(mixed([0] * 10, [0.5]), batch=6)


def test_the_table_shows_what_an_epoch_draws_of_each_path(tokens):
    _, mixture = mixture_of(tokens, "positives", [3.0, 0.5, 1.0])
    schedule = scheduled(mixture, batch=5, epochs=2)
    examples = select(tokens, objective_needs="positives", **LIMITS)
    found = summarize(tokens, examples, schedule, row_tokens=200, world_size=1, cost=COST)
    rows = [dict(zip(MIXTURE_COLUMNS, row, strict=True)) for row in mixture_rows(found)]
    assert [Path(row.pop("path")).name for row in rows] == ["a", "b.jsonl", "c.jsonl"]
    assert [list(row.values()) for row in rows] == [
        ["3", "3", "9", "75.0%"],
        ["0.5", "6", "3", "25.0%"],
        ["1", "0", "0", "0.0%"],
    ]
    counts = dict(count_rows(found))
    assert (counts["sequences to train on"], counts["- drawn in an epoch"]) == ("9", "12")
    assert (counts["steps of 5 sequences"], counts["left over in an epoch"]) == ("4", "2")
