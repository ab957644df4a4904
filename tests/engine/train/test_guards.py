"""Steps that are not finite are skipped and named; collapse is distinguished from a good run.

`guard_curves.json` holds [loss, positive_logp, grad_norm] of real runs of the quickstart's stage 2
from the same stage 1: "sound" with alpha 0.8 at 5e-5, "collapse" with alpha 1 at 2e-4.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import COLLAPSES

from redi.engine.cli import main
from redi.engine.config.sections import GuardConfig, OptimConfig
from redi.engine.distributed import join_world
from redi.engine.quickstart.task import make
from redi.engine.train.checkpoint import kept_checkpoints
from redi.engine.train.guards import WINDOW, GuardEvent, Guards, Trend
from redi.engine.train.optimizer import make_optimizer, squared_update, step_if

CURVES = json.loads((Path(__file__).parent / "guard_curves.json").read_text())


def lines(name: str) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": loss, "positive_logp": logp, "grad_norm": norm}
        for step, (loss, logp, norm) in enumerate(CURVES[name], 1)
    ]


def judge(
    section: GuardConfig, all_lines: list[dict[str, Any]], run: Path, done: int
) -> list[GuardEvent]:
    """Events after step `done` of a guard that resumes there."""
    said, _ = judge_and_date(section, all_lines, run, done)
    return said


def judge_and_date(
    section: GuardConfig, all_lines: list[dict[str, Any]], run: Path, done: int = 0
) -> tuple[list[GuardEvent], int | None]:
    """As `judge`, with the final `good_before`."""
    with join_world() as world:
        guards = Guards(section, run / "metrics.jsonl", done, world)
        said = []
        for line in all_lines[done:]:
            if event := guards.after(line):
                said.append(event)
                if not event.is_warning:
                    break
        return said, guards.good_before


def test_a_good_run_is_left_alone(tmp_path: Path) -> None:
    assert judge(GuardConfig(), lines("sound"), tmp_path, 0) == []


def test_collapse_is_warned_of_and_then_ends_the_run(tmp_path: Path) -> None:
    (warning, end), good_before = judge_and_date(GuardConfig(), lines("collapse"), tmp_path)
    assert warning.is_warning
    assert "step 32: this looks like collapse: the log-prob of correct traces fell" in warning.text
    assert not end.is_warning
    assert good_before == 32 - 8
    (only,) = judge(GuardConfig(collapse="warn"), lines("collapse"), tmp_path, 0)
    assert only.is_warning
    assert judge(GuardConfig(collapse="off"), lines("collapse"), tmp_path, 0) == []


@pytest.mark.parametrize("done", [10, 31, 32, 36])
def test_a_resumed_run_gives_the_same_events(done: int, tmp_path: Path) -> None:
    all_lines = lines("collapse")
    text = "".join(json.dumps(line) + "\n" for line in all_lines[:done])
    (tmp_path / "metrics.jsonl").write_text(text)
    said, good_before = judge_and_date(GuardConfig(), all_lines, tmp_path)
    again, as_before = judge_and_date(GuardConfig(), all_lines, tmp_path, done)
    assert (again[-1], as_before) == (said[-1], good_before)


def test_one_sign_alone_is_no_collapse() -> None:
    falling = [line | {"grad_norm": 2.0} for line in lines("collapse")]
    surging = [line | {"positive_logp": -0.8} for line in lines("collapse")]
    assert at_the_end(lines("collapse"))
    assert at_the_end(falling) is None
    assert at_the_end(surging) is None


def test_a_collapse_lasts_even_if_the_gradient_calms_down(tmp_path: Path) -> None:
    all_lines = lines("collapse")
    calm = [line | {"grad_norm": 2.0} for line in all_lines[33:]]
    warning, end = judge(GuardConfig(), [*all_lines[:33], *calm], tmp_path, 0)
    assert warning.is_warning
    assert not end.is_warning


def at_the_end(all_lines: list[dict[str, Any]]) -> str | None:
    trend = Trend()
    for line in all_lines:
        trend.add(line["positive_logp"], line["grad_norm"])
    return trend.collapse()


def test_checkpoints_after_the_fall_are_not_good_even_if_the_gradient_surges_later(
    tmp_path: Path,
) -> None:
    curve = [(-1.0, 1.0)] * 12 + [(-3.0, 1.0)] * 20 + [(-3.0, 3.0)] * 20
    all_lines = [
        {"step": step, "loss": 1.0, "positive_logp": logp, "grad_norm": norm}
        for step, (logp, norm) in enumerate(curve, 1)
    ]
    said, good_before = judge_and_date(GuardConfig(), all_lines, tmp_path)
    assert not said[-1].is_warning
    assert good_before is not None
    assert 12 - WINDOW < good_before <= 13


def test_skipped_steps_do_not_spoil_the_checkpoints_between_them(tmp_path: Path) -> None:
    """Their weights are those of the last step taken."""
    good = lines("sound")[:10]
    bad = [good[-1] | {"step": step, "loss": float("nan")} for step in (11, 12, 13)]
    (end,), good_before = judge_and_date(GuardConfig(collapse="off"), [*good, *bad], tmp_path)
    assert end.text.startswith("3 steps in a row (from 11)")
    assert good_before == 13


def parameters() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))


def backward(module: torch.nn.Module, scale: float) -> None:
    (module(torch.randn(4, 5)).square().sum() * scale).backward()


def test_update_norm_is_the_norm_of_the_parameter_change() -> None:
    module = parameters()
    optimizer = make_optimizer(module, OptimConfig(lr=0.02, weight_decay=0.3))
    for _ in range(4):
        before = [p.detach().clone() for p in module.parameters()]
        backward(module, 1.0)
        step_if(optimizer, torch.tensor(True))
        optimizer.zero_grad()
        changes = [p.detach() - b for p, b in zip(module.parameters(), before, strict=True)]
        expected = sum(change.double().square().sum().item() for change in changes)
        found = squared_update(optimizer, torch.tensor(True)).item()
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    """Weights, moments and step count; the next step is as without it."""
    left_out, plain = parameters(), parameters()
    optimizers = [make_optimizer(m, OptimConfig(lr=0.02)) for m in (left_out, plain)]
    for step, scale in enumerate((1.0, float("nan"), 1.0, float("inf"), 1.0)):
        finite = torch.tensor(scale == 1.0)
        for module, optimizer in zip((left_out, plain), optimizers, strict=True):
            if module is plain and not finite:
                continue
            torch.manual_seed(step)
            backward(module, scale)
            step_if(optimizer, finite)
            optimizer.zero_grad()
        if not finite:
            assert squared_update(optimizers[0], finite).item() == 0
    for ours, theirs in zip(left_out.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimizers[1].state[theirs].items():
            assert torch.equal(optimizers[0].state[ours][key], value), key


@pytest.mark.parametrize(("save_every", "keep"), [(1, 1), (2, 1), (5, 2), (9, 1), (100, 2)])
def test_a_checkpoint_from_before_a_collapse_is_kept(save_every: int, keep: int) -> None:
    complete: list[int] = []
    for step in range(save_every, 40 * save_every, save_every):
        complete = sorted(kept_checkpoints(complete, keep, step - WINDOW))
        assert len(complete) <= keep + 2
        if step > 3 * (WINDOW + save_every):
            # A warning may come at any step before the next checkpoint.
            for good_before in range(step - WINDOW, step + save_every - WINDOW):
                good = [saved for saved in (*complete, step) if saved < good_before]
                assert good
                assert max(good) > good_before - 2 * WINDOW - 2 * save_every
        complete.append(step)
    assert kept_checkpoints(complete, keep, None) == set(complete[-keep:])


@pytest.fixture
def overflowing(world: Path, tmp_path: Path) -> Path:
    """Traces; one, in row 3, has a weight whose product with a log-prob overflows."""
    rows = [json.loads(line) for line in (world / "traces.jsonl").read_text().splitlines()]
    rows[2]["traces"][0]["weight"] = 3e38
    path = tmp_path / "overflowing.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_that_overflows_is_named_and_the_run_continues(
    overflowing: Path, recipe: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    """Packs are short, so that few other traces are named."""
    changes = {
        "data.path": str(overflowing),
        "data.pairing": "first",
        "train.epochs": 1,
        "train.max_steps": None,
        "train.row_tokens": 64,
        "data.max_tokens": 60,
        "train.batch": 2,
    }
    began = time.perf_counter()
    assert main(["train", str(recipe("run", changes))]) == 0
    seconds = time.perf_counter() - began
    metrics = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    found = list(metrics)
    (event,) = [line for line in found if line.get("event") == "skipped"]
    named = [where.rpartition("/")[2] for where in event["rows"]["0"]]
    assert "overflowing.jsonl:3" in named
    assert len(named) <= 2  # only traces of its pack
    steps = [line for line in found if "loss" in line]
    assert len(steps) == 20
    assert sum(line["seconds"] for line in steps) < seconds
    for line in steps:
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"])
        assert (line["loss"] is None) == (line["step"] == event["step"])
        if line["step"] == event["step"]:
            assert line["update_norm"] == 0
        elif line["step"] > 2:
            assert line["update_norm"] > 0
    err = capsys.readouterr().err
    assert f"step {event['step']} is skipped: loss inf" in err
    assert "not finite at rank 0: " in err


def test_too_many_in_a_row_end_the_run_which_may_resume(
    overflowing: Path, recipe: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    """Skipped steps do not change weights, and the cause may be outside the run."""
    changes = {
        "data.path": str(overflowing),
        "data.pairing": "first",
        "train.batch": 40,  # all of them
        "train.max_steps": 3,
        "train.row_tokens": 1024,
        "guard.max_skips": 2,
        "run.save_every": 1,
    }
    path = str(recipe("run", changes))
    assert main(["train", path]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "2 steps in a row (from " in last
    assert "not finite; the last good checkpoint: " in last
    assert not (tmp_path / "run" / "export").exists()
    assert main(["train", path, "--guard.max_skips", "9"]) == 0


def test_the_command_of_a_collapsed_run_does_not_train_its_ruined_weights_on(
    recipe: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    path = str(recipe("run", COLLAPSES | {"run.save_every": 2}))
    assert main(["train", path]) == 1
    *earlier, ended = capsys.readouterr().err.splitlines()
    (warning,) = [line for line in earlier if "this looks like collapse" in line]
    assert warning.startswith("warning: step ")
    advice = ended[ended.index("the last good checkpoint:") :]
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    last = json.loads(metrics.splitlines()[-1])
    assert (last["event"], last["goes_on"]) == ("collapse", False)
    newest = (last["good_before"] - 1) // 2 * 2
    assert newest > 0
    assert advice.startswith(f"the last good checkpoint: that of step {newest}; to continue")

    assert main(["train", path]) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1
    assert f"{tmp_path / 'run'} collapsed and was ended at step {last['step']}; {advice}" in refused
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics

    assert main(["export", str(tmp_path / "run")]) == 0
    assert f"warning: {tmp_path / 'run'} collapsed" in capsys.readouterr().err

    assert main(["train", path, "--guard.collapse", "warn"]) == 0
    assert (tmp_path / "run" / "export").is_dir()


@pytest.mark.slow
def test_on_the_quickstart_alpha_1_at_a_high_rate_stops_and_the_sound_run_does_not(
    recipe: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    make(tmp_path / "data", held_out=1)
    common = {
        "data.path": str(tmp_path / "data" / "train.jsonl"),
        "data.pairing": "first",
        "train.batch": 64,
        "train.max_steps": 60,
        "train.row_tokens": 32768,
        "model.path": str(tmp_path / "sft" / "export"),
    }
    first = {
        "objective.name": "sft",
        "model.path": str(tmp_path / "data" / "model"),
        "optim.lr": 3e-3,
        "train.max_steps": 700,
    }
    assert main(["train", str(recipe("sft", common | first))]) == 0
    assert main(["train", str(recipe("sound", common | {"optim.lr": 5e-5}))]) == 0
    assert "collapse" not in capsys.readouterr().err
    high = {"objective.alpha": 1.0, "optim.lr": 5e-4, "run.save_every": 2, "run.keep": 1}
    assert main(["train", str(recipe("high", common | high))]) == 1
    err = capsys.readouterr().err
    assert "this looks like collapse" in err
    last = err.splitlines()[-1]
    assert "the last good checkpoint: that of step" in last
    assert f"redi export {tmp_path / 'high'} --step " in last
