"""Which traces are trained and when: pairing, length limits, and the order of steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import make_tokens
from hypothesis import given
from hypothesis import strategies as st

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.schedule import Examples, Schedule, select
from redi.engine.errors import InputError

# Problem 0: positives 0, 1, 4 and negatives 2, 3. Problem 1: a positive alone. Problem 2: one of
# each, the negative first. Problem 3: negatives alone.
SIGNS = [1, 1, -1, -1, 1, 1, -1, 1, -1, -1]
GROUPS = [0, 0, 0, 0, 0, 1, 2, 2, 3, 3]
PROMPTS = [4] * 10
COMPLETIONS = [10, 20, 30, 40, 50, 60, 10, 20, 30, 40]
TRACES = (PROMPTS, COMPLETIONS, SIGNS, GROUPS)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenizedTraces:
    return make_tokens(tmp_path / "made", *TRACES)


def chosen(tokens: TokenizedTraces, **options: Any) -> Examples:
    defaults: dict[str, Any] = {
        "objective_needs": "pairs",
        "max_tokens": 1000,
        "overlong": "error",
        "row_tokens": 1000,
    }
    return select(tokens, **{**defaults, **options})


@pytest.mark.parametrize(
    ("pairing", "units", "unpaired"),
    [
        ("zip", [[0, 2], [1, 3], [7, 6]], (2, 2)),
        ("first", [[0, 2], [7, 6]], (3, 3)),
        ("all", [[0, 2], [0, 3], [1, 2], [1, 3], [4, 2], [4, 3], [7, 6]], (1, 2)),
    ],
)
def test_pairs_are_formed_within_a_problem(tokens, pairing, units, unpaired):
    examples = chosen(tokens, pairing=pairing)
    assert examples.units.tolist() == units
    assert examples.units.dtype == np.int64
    assert examples.lengths.tolist() == tokens.lengths.tolist()
    assert examples.left_out == {
        "positives unpaired": unpaired[0],
        "negatives unpaired": unpaired[1],
    }


def test_positives_alone_are_units_of_one(tokens):
    examples = chosen(tokens, objective_needs="positives")
    assert examples.units.tolist() == [[0], [1], [4], [5], [7]]
    assert examples.left_out == {"negatives unused": 5}
    examples = chosen(tokens, objective_needs="positives", pairing="first")
    assert examples.units.tolist() == [[0], [5], [7]]
    assert examples.left_out["positives unused"] == 2


def test_traces_alone_are_units_of_one_problem_by_problem(tokens):
    examples = chosen(tokens, objective_needs="traces")
    assert examples.units[:, 0].tolist() == [0, 1, 4, 2, 3, 5, 7, 6, 8, 9]  # positives first
    assert examples.left_out == {}
    examples = chosen(tokens, objective_needs="traces", pairing="first")
    assert examples.units[:, 0].tolist() == [0, 2, 5, 7, 6, 8]  # one of each sign
    assert examples.left_out == {"traces unused": 4}


def test_a_pair_whose_margin_is_needed_must_fit_into_a_pack(tokens):
    # Of 14 + 34, 24 + 44 and 24 + 14 tokens.
    assert chosen(tokens, objective_needs="margins", row_tokens=68).keep_pairs_together == 2
    with pytest.raises(InputError, match=r"made.jsonl:2: its pair has 68 .* 67 \(1 of 3 pairs"):
        chosen(tokens, objective_needs="margins", row_tokens=67)
    assert chosen(tokens, row_tokens=67).keep_pairs_together == 1


def test_an_overlong_trace_is_an_error_that_names_its_row_and_what_to_do(tokens):
    with pytest.raises(InputError) as caught:
        chosen(tokens, max_tokens=40)
    message = str(caught.value)
    assert message.startswith("made.jsonl:4: 44 tokens are more than [data] max_tokens = 40")
    assert "overlong" in message
    assert "1 of 6 traces" in message


def test_only_traces_that_would_be_trained_can_be_too_long(tokens):
    # Trace 4 and 5 (54 and 64 tokens) are in no pair; no negative matters to positives.
    assert len(chosen(tokens, max_tokens=44).units) == 3
    with pytest.raises(InputError, match=r"made.jsonl:6: 64 tokens"):
        chosen(tokens, objective_needs="positives", max_tokens=54)
    assert len(chosen(tokens, objective_needs="positives", max_tokens=64).units) == 5


def test_a_length_of_exactly_the_limit_is_fine(tokens):
    longest = int(tokens.lengths.max())
    examples = chosen(tokens, pairing="all", max_tokens=longest, row_tokens=longest)
    assert len(examples.units) == 7


def test_drop_leaves_overlong_traces_out_before_pairing(tokens):
    examples = chosen(tokens, max_tokens=24, overlong="drop")
    assert examples.units.tolist() == [[7, 6]]
    assert examples.left_out == {"overlong dropped": 6, "positives unpaired": 2}


def test_truncate_cuts_the_end_and_counts(tokens):
    examples = chosen(tokens, pairing="all", max_tokens=24, overlong="truncate")
    assert examples.lengths.tolist() == np.minimum(tokens.lengths, 24).tolist()
    assert len(examples.units) == 7


def test_a_trace_truncated_to_its_prompt_is_dropped(tmp_path):
    tokens = make_tokens(tmp_path / "made", [4, 20, 19, 4], [9] * 4, [1, 1, 1, -1], [0, 1, 2, 0])
    options: dict[str, Any] = {"max_tokens": 20, "overlong": "truncate"}
    examples = chosen(tokens, objective_needs="positives", **options)
    assert examples.units.tolist() == [[0], [2]]  # 19 + 1 leaves one completion token
    assert examples.left_out == {"prompt too long, dropped": 1, "negatives unused": 1}


PARTS: dict[str, Any] = {"max_prompt_tokens": 5, "max_completion_tokens": 10}


@pytest.fixture
def parts(tmp_path):
    """Prompts and completions of which one, the other, both or neither are over PARTS."""
    return make_tokens(tmp_path / "parts", [5, 6, 5, 6], [10, 10, 11, 11], [1] * 4, range(4))


def test_prompt_and_completion_have_limits_of_their_own(parts):
    dropped = chosen(parts, objective_needs="positives", overlong="drop", **PARTS)
    assert dropped.units.tolist() == [[0]]
    assert dropped.left_out == {"prompt too long, dropped": 2, "overlong dropped": 1}
    cut = chosen(parts, objective_needs="positives", overlong="truncate", **PARTS)
    assert cut.units.tolist() == [[0], [2]]  # a prompt is never cut
    assert cut.left_out == {"prompt too long, dropped": 2}
    assert cut.lengths[[0, 2]].tolist() == [15, 15]
    assert cut.truncated[[0, 2]].tolist() == [False, True]


@pytest.mark.parametrize(
    ("key", "fault"),
    [("max_prompt_tokens", "made.jsonl:2: 6"), ("max_completion_tokens", "made.jsonl:3: 11")],
)
def test_a_part_that_is_too_long_is_an_error_that_names_its_row(parts, key, fault):
    expected = rf"{fault} tokens are more than \[data\] {key} = {PARTS[key]} \(2 of 4 traces"
    with pytest.raises(InputError, match=expected):
        chosen(parts, objective_needs="positives", **{key: PARTS[key]})


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate"])
def test_a_kept_trace_longer_than_a_row_is_an_error_whatever_overlong_says(tokens, overlong):
    with pytest.raises(
        InputError, match=r"made.jsonl:3: 34 tokens are more than \[train\] row_tok"
    ):
        chosen(tokens, overlong=overlong, max_tokens=1000, row_tokens=33)
    # max_tokens > row_tokens alone is legal.
    assert len(chosen(tokens, overlong=overlong, max_tokens=1000, row_tokens=44).units) == 3


@pytest.mark.parametrize(
    ("signs", "groups", "needs", "problem"),
    [
        ([1, 1], [0, 0], "pairs", "only positive traces"),
        ([-1, -1], [0, 0], "pairs", "only negative traces"),
        ([1, -1], [0, 1], "pairs", "no problem has both"),
        ([-1, -1], [0, 0], "positives", "no positive trace"),
    ],
)
def test_traces_that_form_no_unit_are_an_error_with_counts(tmp_path, signs, groups, needs, problem):
    tokens = make_tokens(tmp_path / "made", [2, 2], [3, 3], signs, groups)
    with pytest.raises(InputError, match=rf"made.jsonl: .*{problem}") as caught:
        chosen(tokens, objective_needs=needs)
    assert f"{signs.count(1)} positives, {signs.count(-1)} negatives" in str(caught.value)


def test_nothing_left_within_the_limit_is_an_error_with_counts(tokens):
    with pytest.raises(InputError, match="10 overlong dropped"):
        chosen(tokens, max_tokens=5, overlong="drop")
    with pytest.raises(InputError, match=r"no trace to train on .*10 overlong dropped"):
        chosen(tokens, max_tokens=5, overlong="drop", objective_needs="traces")


schedules = st.builds(
    lambda batch, extra, epochs, seed: Schedule(batch + extra, batch, epochs, None, seed),
    st.integers(1, 9),
    st.integers(0, 40),
    st.integers(1, 3),
    st.integers(0, 2**40),
)


@given(schedules)
def test_an_epoch_draws_every_unit_once_but_for_the_last_partial_batch(schedule):
    assert schedule.total_steps == schedule.epochs * schedule.steps_per_epoch
    for epoch in range(schedule.epochs):
        first = epoch * schedule.steps_per_epoch + 1
        drawn = [schedule.units(first + i) for i in range(schedule.steps_per_epoch)]
        assert all(units.shape == (schedule.batch,) for units in drawn)
        flat = np.concatenate(drawn)
        assert len(np.unique(flat)) == len(flat) == schedule.num_units - schedule.dropped_per_epoch
        assert flat.min() >= 0
        assert flat.max() < schedule.num_units


@given(schedules, st.randoms())
def test_a_step_depends_on_nothing_but_its_number(schedule, random):
    steps = list(range(1, schedule.total_steps + 1))
    in_order = {step: schedule.units(step).tolist() for step in steps}
    random.shuffle(steps)
    assert {step: schedule.units(step).tolist() for step in steps} == in_order


def test_epochs_and_seeds_draw_in_different_orders():
    def first_epoch(seed: int) -> list[int]:
        schedule = Schedule(100, 50, 2, None, seed)
        return [unit for step in (1, 2) for unit in schedule.units(step).tolist()]

    schedule = Schedule(100, 50, 2, None, 1)
    second_epoch = [unit for step in (3, 4) for unit in schedule.units(step).tolist()]
    assert len({tuple(first_epoch(1)), tuple(first_epoch(2)), tuple(second_epoch)}) == 3


def test_the_order_of_a_seed_never_changes():
    # A resumed run must keep the order with which it began, with any installed versions.
    units = Schedule(10, 10, None, None, 42).units(1)
    assert units.tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
    with pytest.raises(ValueError, match="read-only"):
        units[:] = 0  # it is kept for further calls


@pytest.mark.parametrize(
    ("epochs", "max_steps", "total"),
    [(None, None, 3), (2, None, 6), (None, 100, 100), (2, 4, 4), (2, 100, 6), (None, 2, 2)],
)
def test_training_ends_at_the_earlier_of_epochs_and_max_steps(epochs, max_steps, total):
    schedule = Schedule(14, 4, epochs, max_steps, 0)
    assert schedule.total_steps == total
    assert schedule.dropped_per_epoch == 2


def test_fewer_units_than_one_batch_is_an_error():
    with pytest.raises(InputError, match=r"gives 31 units .* and a step takes 32: lower"):
        Schedule(31, 32, None, None, 0)
    with pytest.raises(ValueError, match="at least 1"):
        Schedule(31, 0, None, None, 0)
    with pytest.raises(ValueError, match="from 1"):
        Schedule(31, 1, None, None, 0).units(0)


@pytest.mark.parametrize(("epochs", "max_steps"), [(None, 2), (1, None), (2, None)])
def test_what_is_drawn_is_the_union_of_all_steps(epochs, max_steps):
    schedule = Schedule(num_units=23, batch=4, epochs=epochs, max_steps=max_steps, seed=3)
    units = {int(u) for step in range(1, schedule.total_steps + 1) for u in schedule.units(step)}
    assert schedule.drawn().tolist() == sorted(units)
    assert len(units) == {(None, 2): 8, (1, None): 20}.get((epochs, max_steps), len(units))
