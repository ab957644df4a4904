"""The study of when incorrect traces help: its tasks, its loop, its sums and its prediction."""

import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redi.bench.learning import report, study, teacher
from redi.bench.learning.prediction import (
    bounded,
    count_habit,
    share_by_contexts,
    share_by_one_row,
    with_floor,
    without_floor,
)
from redi.bench.learning.students import (
    METHODS,
    TEACHER_METHODS,
    StudyRuns,
    load_student,
    train,
)
from redi.bench.learning.tasks import (
    CHOICE,
    HABIT,
    LATE,
    LONGEST_WALK,
    PITFALLS,
    SLIP_PROBABILITY,
    SLIPS,
    TASKS,
    Task,
    distances,
)
from redi.bench.learning.trial import open_trial, read_pairs, write_trial
from redi.engine.cli import main
from redi.engine.config.sections import ObjectiveConfig, OptimConfig
from redi.engine.generation.scoring import mean_and_error, paired_difference
from redi.engine.loss.packed_loss import PackedLoss
from redi.engine.quickstart import task as quickstart
from redi.kernels import redi_loss, sequence_loss


def attempts(task: Task, count: int) -> Iterator[tuple[str, quickstart.Attempt]]:
    rng = random.Random(7)
    for problem in quickstart.make_problems(count, rng, task.draw_problem):
        for _ in range(4):
            yield problem, task.attempt(problem, rng)


# Tasks, against oracles that share no code with them.


def boxes_that_follow(problem: str, trace: str) -> int:
    """Recomputed box by box."""
    values = [int(problem[0]), *map(int, trace)]
    return sum(
        after == abs(before - int(digit))
        for (before, after), digit in zip(pairwise(values), problem[1:7], strict=True)
    )


def walk_ends_in(problem: str, trace: str) -> str:
    """Walk on coordinates; "goal", "pit", "limit", or "nonsense"."""
    place = {cell: divmod(number, 4) for number, cell in enumerate("abcdefghijklmnop")}
    (row, column), ended = place[problem[0]], ""
    for cell in trace:
        if ended or cell not in place:
            return "nonsense"
        after = place[cell]
        if abs(after[0] - row) + abs(after[1] - column) != 1:
            return "nonsense"
        row, column = after
        ended = "goal" if cell == problem[1] else "pit" if cell in problem[3:7] else ""
    return ended or ("limit" if trace else "nonsense")


def test_a_careful_teacher_slips_as_often_as_stated_and_is_judged_by_the_last_box() -> None:
    slips = boxes = 0
    for problem, done in attempts(SLIPS, 500):
        followed = boxes_that_follow(problem, done.text)
        assert SLIPS.fault_share(problem, done.text) == pytest.approx(1 - followed / 6)
        value = int(problem[0])
        for digit in problem[1:7]:
            value = abs(value - int(digit))
        assert done.correct == (int(done.text[-1]) == value)
        slips, boxes = slips + 6 - followed, boxes + 6
    error = math.sqrt(SLIP_PROBABILITY * (1 - SLIP_PROBABILITY) / boxes)
    assert abs(slips / boxes - SLIP_PROBABILITY) < 4 * error


def test_boxes_that_are_missing_count_as_slips() -> None:
    assert SLIPS.fault_share("2914177=", "762161") == 0
    assert SLIPS.fault_share("2914177=", "76") == pytest.approx(4 / 6)
    assert SLIPS.fault_share("2914177=", "") == 1


def test_walks_are_judged_as_a_walk_on_coordinates_is() -> None:
    ends = []
    for problem, done in attempts(PITFALLS, 500):
        end = walk_ends_in(problem, done.text)
        ends.append(end)
        assert done.correct == (end == "goal")
        assert PITFALLS.is_well_formed(problem, done.text)
        assert PITFALLS.fault_share(problem, done.text) == (end == "pit")
        assert end != "limit" or len(done.text) == LONGEST_WALK
    assert set(ends) == {"goal", "pit", "limit"}


@settings(deadline=None, max_examples=100)
@given(st.text("abcdefghijklmnop:=*", max_size=6))
def test_any_text_is_judged_as_the_walk_it_is_or_is_not(trace: str) -> None:
    problem = "ap:cfhk="
    end = walk_ends_in(problem, trace)
    assert PITFALLS.is_correct(problem, trace) == (end == "goal")
    assert PITFALLS.is_well_formed(problem, trace) == (end != "nonsense")


def test_every_grid_has_a_way_of_at_least_three_moves_and_its_length_is_right() -> None:
    rng = random.Random(1)
    for problem in quickstart.make_problems(100, rng, PITFALLS.draw_problem):
        # Every way of n moves, for rising n, until one arrives.
        ends, moves = {problem[0]}, 0
        while problem[1] not in ends:
            ends = {
                cell
                for before in ends
                for cell in "abcdefghijklmnop"
                if walk_ends_in(before + problem[1:], cell) in ("goal", "limit")
            }
            moves += 1
        assert distances(problem)[problem[0]] == moves >= 3


def test_incorrect_walks_are_shorter_and_habits_are_in_both_kinds_of_trace() -> None:
    length = {True: [], False: []}
    for _, done in attempts(PITFALLS, 300):
        length[done.correct].append(len(done.text))
    assert statistics.fmean(length[False]) < statistics.fmean(length[True]) - 0.5
    blank = {True: [], False: []}
    for problem, done in attempts(HABIT, 300):
        blank[done.correct].append(HABIT.fault_share(problem, done.text))
    assert 0.35 < statistics.fmean(blank[True]) < statistics.fmean(blank[False]) - 0.05


def test_choices_of_both_kinds_of_trace_have_the_same_letters_at_other_places() -> None:
    high, wrong = {True: [], False: []}, {True: [], False: []}
    for problem, done in attempts(CHOICE, 600):
        digits = map(int, problem[1:7])
        errors = sum(
            (digit >= 5) != (letter == "u") for digit, letter in zip(digits, done.text, strict=True)
        )
        assert CHOICE.fault_share(problem, done.text) == pytest.approx(errors / 6)
        assert done.correct == (errors <= 3)
        high[done.correct].append(done.text.count("u") / 6)
        wrong[done.correct].append(errors / 6)
    assert abs(statistics.fmean(high[True]) - statistics.fmean(high[False])) < 0.02
    for correct, counts in ((True, range(3, 7)), (False, range(3))):
        chances = {n: math.comb(6, n) * 0.35**n * 0.65 ** (6 - n) for n in counts}
        expected = sum((6 - n) / 6 * chance for n, chance in chances.items())
        assert statistics.fmean(wrong[correct]) == pytest.approx(
            expected / sum(chances.values()), abs=0.02
        )


def test_late_traces_of_a_problem_share_all_but_the_end() -> None:
    shared = []
    for problem, done in attempts(LATE, 300):
        values = [int(problem[0])]
        for digit in problem[1:10]:
            values.append(abs(values[-1] - int(digit)))
        right = "".join(map(str, values[1:]))
        assert done.correct == (done.text[-1] == right[-1])
        follows = abs(int(done.text[7]) - int(problem[9])) == int(done.text[8])
        assert LATE.fault_share(problem, done.text) == (not follows)
        shared.append(done.text[:8] == right[:8])
    assert statistics.fmean(shared) > 0.88  # 0.99 to the eighth power is 0.92
    assert LATE.fault_share("2914177001=", "7") == 1


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_traces_fit_the_tokenizer_the_limit_and_the_answer(task: Task) -> None:
    for problem, done in attempts(task, 100):
        assert set(problem + done.text) <= set(task.characters)
        assert 0 < len(done.text) <= task.longest_trace
        assert task.is_correct(problem, done.text) == done.correct
        assert not done.correct or done.text.endswith(task.answer(problem))


# The prediction: a table of probabilities, trained by the product's own loss.

POSITIVES = np.array([8, 5, 3, 4])
NEGATIVES = np.array([2, 2, 6, 10])


def table_loss(logps: Tensor, alpha: float) -> Tensor:
    """REDI of a student that is a table: every trace is one token of one context."""
    counts = torch.from_numpy(np.concatenate([POSITIVES, NEGATIVES]))
    targets = torch.arange(4).repeat(2).repeat_interleave(counts)
    signs = torch.tensor([1, -1]).repeat_interleave(torch.tensor([20, 20]))
    return redi_loss(
        torch.ones(40, 1, dtype=torch.float64),
        logps[:, None],  # hidden states of 1: the logits are the lm_head
        targets,
        torch.arange(41),
        signs,
        alpha=alpha,
        num_pairs=20,
    ).loss


def descend(alpha: float, floor: float, steps: int, rate: float) -> np.ndarray:
    """Probabilities after gradient descent from a uniform table."""
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def probabilities() -> Tensor:
        return floor + (1 - 4 * floor) * logits.softmax(0)

    for _ in range(steps):
        (gradient,) = torch.autograd.grad(table_loss(probabilities().log(), alpha), logits)
        with torch.no_grad():
            logits -= rate * gradient
    return probabilities().detach().numpy()


def frequencies() -> tuple[np.ndarray, np.ndarray]:
    return POSITIVES / 20, NEGATIVES / 20


def test_where_nothing_is_unwanted_a_table_learns_the_difference_of_the_frequencies() -> None:
    wanted, unwanted = frequencies()
    expected = (wanted - 0.3 * unwanted) / 0.7
    assert (expected > 0).all()
    found = descend(0.3, floor=0.0, steps=100, rate=4.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(with_floor(wanted, unwanted, 0.3), expected, atol=1e-12)
    np.testing.assert_allclose(without_floor(wanted, unwanted, 0.3), expected, atol=1e-12)
    # What imitation alone would learn is far from it.
    assert abs(expected - wanted).max() > 0.1


def test_where_something_is_unwanted_the_limit_depends_on_the_floor() -> None:
    wanted, unwanted = frequencies()
    balance = wanted - 0.8 * unwanted
    assert sorted(np.sign(balance)) == [-1, -1, 1, 1]
    proportional = with_floor(wanted, unwanted, 0.8)
    np.testing.assert_allclose(proportional, np.maximum(balance, 0) / balance[balance > 0].sum())
    projected = without_floor(wanted, unwanted, 0.8)
    np.testing.assert_allclose(descend(0.8, 1e-5, 250, 4.0), proportional, atol=1e-3)
    np.testing.assert_allclose(descend(0.8, 0.0, 150, 4.0), projected, atol=1e-3)
    assert abs(proportional - projected).max() > 0.2


def bounded_table_loss(logps: Tensor, counts: np.ndarray, alpha: float, both: bool) -> Tensor:
    """`bounded_redi`, or `sft_simper`, of a table as in `table_loss`; counts by sign and choice."""
    targets = (
        torch.arange(counts.shape[1])
        .repeat(2)
        .repeat_interleave(torch.from_numpy(counts.reshape(-1)))
    )
    positive = torch.arange(len(targets)) < counts[0].sum()
    weights = torch.where(positive, alpha if both else 0.0, -alpha).double()
    return sequence_loss(
        torch.ones(len(targets), 1, dtype=torch.float64),
        logps[:, None],
        targets,
        torch.arange(len(targets) + 1),
        positive.double() / counts[0].sum(),
        weights / torch.where(positive, counts[0].sum(), counts[1].sum()),
    ).loss


@pytest.mark.parametrize("both", [False, True], ids=["bounded_redi", "sft_simper"])
@pytest.mark.parametrize(
    "counts",
    [[POSITIVES, NEGATIVES], [[19, 1, 0, 0], [10, 4, 6, 0]], [[5, 3, 0], [7, 0, 1]]],
    ids=["all in both", "some in one, one in none", "some in one"],
)
def test_a_table_trained_with_bounded_terms_has_the_predicted_optimum(
    counts: list[Any], both: bool
) -> None:
    table, alpha = np.array(counts), 4.0
    wanted, unwanted = table / table.sum(1, keepdims=True)
    expected = bounded(wanted, unwanted, alpha, both=both)
    assert expected.sum() == pytest.approx(1, abs=1e-12)
    logits = torch.zeros(table.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=100,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bounded_table_loss(logits.log_softmax(0), table, alpha, both)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = logits.detach().softmax(0).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # Nothing that correct traces have is lost, at an alpha at which REDI's loss has no minimum.
    assert (found[wanted > 0] > 0.01).all()


def test_what_both_kinds_of_trace_share_is_left_to_imitation_or_flattened() -> None:
    frequencies = np.array([0.9, 0.1])
    left = bounded(frequencies, frequencies, 4.0, both=True)
    np.testing.assert_allclose(left, frequencies, atol=1e-9)
    assert bounded(frequencies, frequencies, 4.0)[1] > 0.2  # the rare one is more frequent


def test_without_incorrect_traces_both_tables_predict_the_habit_that_is_imitated() -> None:
    traces = [done.text for _, done in attempts(HABIT, 200) if done.correct]
    share = "".join(trace[:5] for trace in traces).count("*") / (5 * len(traces))
    counts = count_habit(traces)
    assert share_by_one_row(counts, counts, 0.0) == pytest.approx(share, abs=1e-12)
    assert share_by_contexts(counts, counts, 0.0) == pytest.approx(share, abs=1e-12)


def test_tables_predict_what_a_calculation_by_hand_gives() -> None:
    # Blank shares 2/5 and 3/5, so at alpha 0.5 it is 0.4 - 0.3 against 0.6 - 0.2.
    positive, negative = count_habit(["**3331"]), count_habit(["***331"])
    assert share_by_one_row(positive, negative, 0.5) == pytest.approx(0.1 / 0.5)
    assert share_by_one_row(positive, negative, 0.8) == 0.0
    # By context: boxes 0 and 1 are always blank; box 2 after two blanks wants to be written.
    assert share_by_contexts(positive, negative, 0.5) == pytest.approx(2 / 5)


# Sums.


def test_means_and_paired_differences_are_those_of_a_hand_calculation() -> None:
    first, second = [0.6, 0.7, 0.8], [0.5, 0.65, 0.6]
    mean, error = paired_difference(first, second)
    assert mean == pytest.approx(0.35 / 3)
    # Differences .1, .05, .2: squared deviations sum to .035 / 3.
    assert error == pytest.approx(math.sqrt(0.035 / 3 / 2 / 3))
    unpaired = math.hypot(mean_and_error(first)[1], mean_and_error(second)[1])
    assert error < unpaired
    assert math.isnan(mean_and_error([0.5])[1])


def figures(validation: float, sampled: list[float]) -> dict[str, Any]:
    count = len(sampled)
    keys = ("greedy", "pass@8", "well formed", "fault", "positive", "negative")
    constant = {key: [0.5] * count for key in keys}
    return {"figures": {**constant, "validation": [validation] * count, "sampled": sampled}}


def test_the_rate_is_chosen_on_validation_and_differences_are_taken_seed_by_seed() -> None:
    methods = {
        "control": {"2e-05": figures(0.5, [0.1, 0.1]), "0.0001": figures(0.6, [0.4, 0.6])},
        # The rate that tests best is not the one that validates best.
        "REDI 0.8": {"2e-05": figures(0.7, [0.5, 0.8]), "0.0001": figures(0.6, [0.9, 0.9])},
    }
    record = {
        "task": "habit",
        "stage 1": figures(0.4, [0.3, 0.3])["figures"],
        "methods": {
            name: {"chosen": report.choose_rate(rates), "rates": rates}
            for name, rates in methods.items()
        },
    }
    columns, rows = report.result_table(record)
    (redi,) = (dict(zip(columns, row, strict=True)) for row in rows if row[0] == "REDI 0.8")
    assert redi["lr"] == "2e-05"
    assert redi["sampled"] == "65.0±15.0"
    # Differences .1 and .2.
    assert redi["Δ sampled"] == "+15.0±5.0"
    (control,) = (row for row in rows if row[0] == "control")
    assert control[1] == "0.0001"


# The study itself.

TINY = study.TINY


def test_the_study_trains_as_the_product_does(tmp_path: Path) -> None:
    folder = tmp_path / "habit-1"
    write_trial(HABIT, 1, TINY, folder)
    trial = open_trial(HABIT, 1, TINY, folder, torch.device("cpu"))
    objective = PackedLoss(ObjectiveConfig("redi", alpha=0.8))
    model = load_student(trial, folder / "model")
    optim = OptimConfig(lr=1e-3, weight_decay=0.0)
    ours = list(train(trial, model, objective, optim, steps=3, batch=4, log_every=1))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        model.path = "{folder / "model"}"
        data = {{ path = "{folder / "train.jsonl"}", template = "none", pairing = "first",
                  cache = "{tmp_path / "cache"}", processes = 1 }}
        objective = {{ name = "redi", alpha = 0.8 }}
        optim = {{ lr = 1e-3, weight_decay = 0.0 }}
        train = {{ batch = 4, max_steps = 3, seed = 1 }}
        run.dir = "{tmp_path / "run"}"
        """.replace("\n                  ", " ")
    )
    assert main(["train", str(recipe), "--quiet"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    theirs = [line for line in lines if "loss" in line]
    assert len(theirs) == 3
    assert theirs[2]["update_norm"] > 0
    for own, line in zip(ours, theirs, strict=True):
        for key, value in own.items():
            assert value == pytest.approx(line[key], rel=1e-4, abs=1e-7), key


def run_seed(folder: Path, runs: StudyRuns) -> dict[str, Any]:
    """A tiny seed of the habit task; every record but for its time."""
    study.run_seed("habit", 1, runs, TINY, folder, "cpu")
    found = {}
    for path in sorted((folder / "habit-1").rglob("*.json")):
        if path.name == "stage-1.json" or path.parent.name == "cells":
            found[path.name] = {**json.loads(path.read_text()), "cpu_seconds": None}
    return found


@pytest.mark.parametrize(("outcome", "counted"), [(1, {True}), (-1, {False}), (0, {True, False})])
def test_the_habit_s_distributions_are_the_frequencies_of_its_traces(
    outcome: int, counted: set[bool]
) -> None:
    """At the third box, after a value and a blank: of all traces, and of either kind."""
    problem, rng = "2914177=", random.Random(3)
    after = [quickstart.attempt(problem, rng) for _ in range(60_000)]
    boxes = [one.text[2] for one in after if one.text.startswith("7*") and one.correct in counted]
    tokens = torch.tensor(
        [["0123456789=*".index(c) for c in problem + "7*0000"] + [teacher.END_ID]]
    )
    (found,) = teacher.distributions(tokens, torch.tensor([outcome]))
    torch.testing.assert_close(found.sum(-1), torch.ones(7, dtype=torch.float64))
    for box, share in zip("0123456789=*", found[2], strict=False):
        assert boxes.count(box) / len(boxes) == pytest.approx(float(share), abs=0.02)


@pytest.mark.slow
def test_students_of_distributions_run_and_differ_from_those_of_samples(tmp_path: Path) -> None:
    made = run_seed(tmp_path, StudyRuns(["habit"], 1, TEACHER_METHODS, (1e-3,)))
    losses = {name: run["steps"][0]["loss"] for name, run in made.items() if "steps" in run}
    assert len(losses) == len(TEACHER_METHODS)
    assert all(math.isfinite(loss) for loss in losses.values())
    assert len(set(losses.values())) == len(losses)


def test_a_seed_run_again_makes_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    wanted = {"control 2x", "DPO"}
    runs = StudyRuns(["habit"], 1, [one for one in METHODS if one.name in wanted], (1e-3,))
    first = run_seed(tmp_path, runs)
    assert list(first) == ["DPO_0.001.json", "control-2x_0.001.json", "stage-1.json"]
    cells = tmp_path / "habit-1" / "cells"
    kept = (cells / "DPO_0.001.json").stat().st_mtime_ns
    # As a kill leaves it: a record half written, a student half saved.
    (cells / "control-2x_0.001.json").rename(cells / "control-2x_0.001.unfinished")
    (tmp_path / "habit-1" / "student").rename(tmp_path / "habit-1" / "student.unfinished")
    (tmp_path / "habit-1" / "stage-1.json").unlink()
    assert run_seed(tmp_path, runs) == first
    assert (cells / "DPO_0.001.json").stat().st_mtime_ns == kept


def test_runs_of_other_sizes_are_not_mixed(tmp_path: Path) -> None:
    study.check_settings(tmp_path, TINY, "cpu")
    study.check_settings(tmp_path, TINY, "cpu")
    with pytest.raises(SystemExit, match="problems = 80, now 6000"):
        study.check_settings(tmp_path, study.StudySizes(), "cpu")
    with pytest.raises(ValueError, match="multiple of 20, got 50"):
        study.StudySizes(steps=50)  # no look would show what such a run ends with


def test_no_problem_is_in_two_splits_and_pairs_are_first_traces(tmp_path: Path) -> None:
    write_trial(PITFALLS, 3, TINY, tmp_path)
    rows = {
        split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").open()]
        for split in ("train", "validation", "test")
    }
    prompts = [row["prompt"] for some in rows.values() for row in some]
    assert len(set(prompts)) == len(prompts) == 96
    pairs = read_pairs(tmp_path)
    for problem, positive, negative in pairs:
        (row,) = (row for row in rows["train"] if row["prompt"] == problem)
        texts = {
            kind: [t["text"] for t in row["traces"] if t["correct"] == kind] for kind in (0, 1)
        }
        assert (positive, negative) == (texts[1][0], texts[0][0])
    both = [row for row in rows["train"] if len({t["correct"] for t in row["traces"]}) == 2]
    assert len(pairs) == len(both) > 0


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-W", "ignore", "-m", "redi.bench.learning", "--tiny"]
    line += ["--tasks", "pits", "--seeds", "1", "--folder", str(folder), *more]
    return subprocess.Popen(
        line,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_ctrl_c_during_imports_is_one_line(tmp_path: Path) -> None:
    running = start(tmp_path)
    modules = Path(f"/proc/{running.pid}/maps")
    while "libtorch" not in modules.read_text():  # in the midst of them
        assert running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert (running.returncode, said) == (130, "stopped before the study began\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ctrl_c_ends_a_study_with_one_line_and_no_process_left(tmp_path: Path) -> None:
    running = start(tmp_path)
    while not list(tmp_path.glob("*/cells/*.json")):
        assert running.poll() is None
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, said = running.communicate(timeout=30)  # until no process holds its stderr
    assert running.returncode == 130
    assert said.splitlines()[-1].startswith("stopped; the same command resumes")
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_worker_that_fails_ends_a_study_at_once(tmp_path: Path) -> None:
    (tmp_path / "pits-1").mkdir()  # and nothing in it
    running = start(tmp_path, "--seeds", "2", "--workers", "2")
    _, said = running.communicate(timeout=300)
    assert running.returncode == 1
    assert "pits-1" in said.splitlines()[-1]
    assert len(list(tmp_path.glob("pits-2/cells/*.json"))) < 40


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_the_same_figures(tmp_path: Path) -> None:
    killed = start(tmp_path / "killed")
    while not list((tmp_path / "killed").glob("*/cells/*.json")):
        assert killed.poll() is None
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    made = len(list((tmp_path / "killed").glob("*/cells/*.json")))
    assert 0 < made < 40
    records = []
    for name in ("killed", "whole"):
        done = start(tmp_path / name, "--out", str(tmp_path / "results" / name))
        printed, _ = done.communicate(timeout=900)
        assert done.returncode == 0
        assert re.search(r"REDI 0.8 .*±", printed)
        record = json.loads((tmp_path / "results" / name / "learning-pits.json").read_text())
        # Work may be committed while this runs.
        records.append({**record, "cpu_seconds": None, "commit": None, "uncommitted_changes": None})
        picture = tmp_path / "results" / name / "learning-pits.png"
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert records[0] == records[1]
