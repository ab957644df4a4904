"""Output for the user: plain lines, quiet mode, curves, trackers, help with examples."""

import json
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from redi.engine.cli import COMMANDS, main
from redi.engine.console import Console

WriteRecipe = Callable[..., Path]
EVENTS = "loss", "positive_logp", "negative_logp", "grad_norm", "lr"


@pytest.fixture(scope="module")
def run(
    write_recipe: WriteRecipe,
    redi: Callable[..., subprocess.CompletedProcess[str]],
    world: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """A finished run with held-out traces and TensorBoard, and its stderr."""
    folder = tmp_path_factory.mktemp("terminal")
    changes = {
        "eval.path": str(world / "traces.jsonl"),
        "eval.every": 2,
        "run.trackers": ["tensorboard"],
    }
    done = redi("train", write_recipe(folder, "run", changes))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return folder / "run", done.stderr


def test_off_a_terminal_progress_is_plain_lines_with_the_time_left(run: tuple[Path, str]) -> None:
    lines = run[1].splitlines()
    (last,) = [line for line in lines if line.startswith("step 4/4")]
    assert "\r" not in run[1]
    assert "\x1b" not in run[1]
    for text in ("loss", "logp+", "logp-", "tok/s", "left 00:00"):
        assert text in last


def test_the_time_left_is_that_of_the_steps_after_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("redi.engine.console.time.monotonic", lambda: now)
    progress = Console().progress("step", total=12, done=2)
    for seconds in (600.0, 20.0, 40.0):
        now += seconds
        progress.update(1, "loss 1.0")
    first, *later = capsys.readouterr().err.splitlines()
    assert "left" not in first
    assert [line.rpartition("left ")[2] for line in later] == ["02:40", "03:30"]


def test_the_table_before_training_comes_before_the_first_step(run: tuple[Path, str]) -> None:
    text = run[1]
    assert text.index("pairs to train on") < text.index("rank efficiency") < text.index("step 1/4")
    overview = json.loads((run[0] / "manifest.json").read_text())["overview"]
    assert overview["steps"] == 4
    assert f"{overview['units']}" in text


def test_held_out_traces_are_counted_before_they_are_evaluated(run: tuple[Path, str]) -> None:
    overview = json.loads((run[0] / "manifest.json").read_text())["overview"]
    said = f"held out: {2 * overview['units']} traces, evaluated before step 1, every 2 steps and"
    assert 0 < run[1].find(said) < run[1].find("held out after step 0")


def test_quiet_leaves_nothing_but_errors(
    recipe: WriteRecipe, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", str(recipe("run", {"train.max_steps": 1})), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "run" / "export").is_dir()


def test_the_report_shows_runs_side_by_side_and_draws_them(
    run: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run[0]), str(run[0])]) == 0
    out = capsys.readouterr().out
    steps = [json.loads(line) for line in (run[0] / "metrics.jsonl").open()]
    losses = [line["loss"] for line in steps if "loss" in line]
    assert f"{losses[0]:.4f} to {losses[-1]:.4f}" in out
    picture, page = run[0] / "curves.png", run[0] / "report.html"
    assert out.splitlines()[-2:] == [str(picture), str(page)]
    assert page.read_text().count("<svg") == 8
    assert (run[0] / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_report_shows_the_greedy_accuracy_of_checked_answers(
    run: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("redi.engine.commands.report.draw_curves", lambda *_: None)
    monkeypatch.setattr("redi.engine.commands.report_page.write_page", lambda *_: None)
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").open()]
    lines += [{"event": "eval", "step": n, "greedy_accuracy": n / 8} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(tmp_path)]) == 0
    (row,) = [x for x in capsys.readouterr().out.splitlines() if "greedy accuracy" in x]
    assert row.endswith("0.1250 to 0.2500")


@pytest.mark.parametrize(
    ("events", "finished", "said"),
    [
        ([], True, "4"),
        ([], False, "4, unfinished"),
        ([("collapse", 2, True)], True, "4, collapse warning at step 2"),
        ([("collapse", 2, True)], False, "4, unfinished, collapse warning at step 2"),
        ([("collapse", 2, True), ("collapse", 4, False)], False, "4, collapsed at step 4"),
        ([("not_finite", 4, False)], False, "4, not finite at step 4"),
    ],
)
def test_the_report_shows_the_outcome_of_a_run(
    events: list[tuple[str, int, bool]],
    finished: bool,
    said: str,
    run: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Drawing takes most of the time.
    monkeypatch.setattr("redi.engine.commands.report.draw_curves", lambda *_: None)
    monkeypatch.setattr("redi.engine.commands.report_page.write_page", lambda *_: None)
    lines = (run[0] / "metrics.jsonl").read_text()
    for event, step, goes_on in events:
        lines += json.dumps({"event": event, "step": step, "goes_on": goes_on}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(lines)
    if finished:
        (tmp_path / "export").mkdir()
    assert main(["report", str(tmp_path)]) == 0
    (row,) = [x.strip() for x in capsys.readouterr().out.splitlines() if " steps " in x]
    assert row.removeprefix("steps").strip() == said


def test_a_report_of_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"redi: {tmp_path}: not a run directory (it has no metrics.jsonl)\n"
    )


def test_tensorboard_holds_the_figures_of_metrics_jsonl(run: tuple[Path, str]) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="an extra"
    )
    events = accumulator.EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").open()]
    for key in EVENTS:
        logged = {event.step: event.value for event in events.Scalars(f"train/{key}")}
        written = {line["step"]: line[key] for line in lines if "loss" in line}
        assert logged == pytest.approx(written, rel=1e-6)
    held_out = {event.step for event in events.Scalars("eval/margin_accuracy")}
    assert held_out == {0, 2, 4}


def test_a_tracker_that_is_not_installed_is_named_with_its_pip_line(
    recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("redi.engine.train.trackers.find_spec", lambda name: None)
    path = recipe("run", {"run.trackers": ["wandb"]})
    assert main(["train", str(path)]) == 2
    assert "pip install 'redi-engine[wandb]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_ends_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    _, found, examples = capsys.readouterr().out.partition("\nexamples:\n")
    assert found
    assert f"  redi {command}" in examples


def test_a_mistyped_command_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["trian", "x.toml"]) == 2
    assert capsys.readouterr().err == "redi: unknown command trian; did you mean train?\n"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"redi-engine {version('redi-engine')}\n"


def test_the_help_of_train_shows_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("default: ") > 30
    assert "default: 19800)" in shown


@pytest.mark.parametrize("damage", ["[1]", '"text"'])
def test_a_report_of_damaged_metrics_is_one_line(
    run: tuple[Path, str], damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.loads((run[0] / "metrics.jsonl").read_text().splitlines()[-2])
    assert "loss" in line
    text = json.dumps(line | {"loss": "damage"}).replace('"damage"', damage)
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"redi: {tmp_path}")
