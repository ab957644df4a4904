"""A run can be killed at any moment and goes on: the same metrics, bit-equal weights."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from redi.engine.cli import main
from redi.engine.train.checkpoint import complete_checkpoints
from redi.engine.train.metrics import TIMINGS

Command = Callable[..., list[str]]
Steps = Callable[[Path], list[dict[str, Any]]]
WriteRecipe = Callable[..., Path]

STEPS = 12
SETTINGS = {"train.max_steps": STEPS, "run.save_every": 3, "train.row_tokens": 128}


@pytest.fixture(scope="module")
def undisturbed(
    write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory, redi: Callable[..., Any]
) -> Path:
    """The run folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_recipe(folder, "run", SETTINGS)
    done = redi("train", path)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def same(undisturbed: Path, steps: Steps) -> Callable[[Path], None]:
    """Assert that a run ended as the undisturbed one did."""

    def check(run_dir: Path) -> None:
        assert untimed(steps(run_dir)) == untimed(steps(undisturbed))
        weights = load_file(run_dir / "export" / "model.safetensors")
        expected = load_file(undisturbed / "export" / "model.safetensors")
        assert weights.keys() == expected.keys()
        for name in expected:
            assert torch.equal(weights[name], expected[name]), name

    return check


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def start(line: list[str]) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for two minutes"
        if process.poll() is not None:
            assert condition(), process.communicate()[1]
        time.sleep(0.002)


def has_steps(run_dir: Path, count: int) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.read_text().count('"loss"') >= count


MOMENTS = {
    "before_any_checkpoint": lambda d: has_steps(d, 2),
    "as_a_checkpoint_appears": lambda d: (d / "checkpoints" / "step-6").exists(),
    "between_checkpoints": lambda d: has_steps(d, 8),
}


@pytest.mark.parametrize(
    "moment",
    [
        "between_checkpoints",
        pytest.param("before_any_checkpoint", marks=pytest.mark.slow),
        pytest.param("as_a_checkpoint_appears", marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again_it_ends_the_same(
    moment: str,
    recipe: WriteRecipe,
    command: Command,
    redi: Callable[..., Any],
    same: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    path, run_dir = recipe("run", SETTINGS), tmp_path / "run"
    process = start(command("train", path))
    wait_for(lambda: MOMENTS[moment](run_dir), process)
    process.kill()
    process.communicate()
    assert not (run_dir / "export").exists(), "it was killed too late to show anything"
    done = redi("train", path)
    assert done.returncode == 0, done.stderr
    same(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("delay", range(20))
def test_killed_at_twenty_moments(
    delay: int,
    recipe: WriteRecipe,
    command: Command,
    redi: Callable[..., Any],
    same: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    """Ten of them within 0.3 s of a checkpoint folder's appearance, ten anywhere."""
    path, run_dir = recipe("run", SETTINGS), tmp_path / "run"
    process = start(command("train", path))
    if delay < 10:
        step = 3 * (1 + delay % 3)
        wait_for(lambda: (run_dir / "checkpoints" / f"step-{step}").exists(), process)
        time.sleep(0.03 * delay)
    else:
        time.sleep(1.0 * (delay - 9))
    process.kill()
    process.communicate()
    done = redi("train", path)
    assert done.returncode == 0, done.stderr
    same(run_dir)


@pytest.mark.slow
def test_stopped_on_two_ranks_it_ends_the_same(
    recipe: WriteRecipe, command: Command, redi: Callable[..., Any], steps: Steps, tmp_path: Path
) -> None:
    paths = {name: recipe(name, SETTINGS) for name in ("whole", "killed")}
    assert redi("train", paths["whole"], ranks=2).returncode == 0
    process = start(command("train", paths["killed"], ranks=2))
    wait_for(lambda: has_steps(tmp_path / "killed", 8), process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to the ranks
    process.communicate(timeout=60)
    assert len(steps(tmp_path / "killed")) < STEPS
    done = redi("train", paths["killed"], ranks=2)
    assert done.returncode == 0, done.stderr
    assert untimed(steps(tmp_path / "killed")) == untimed(steps(tmp_path / "whole"))
    ours, theirs = (tmp_path / n / "export" / "model.safetensors" for n in ("killed", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits_0_and_says_how_to_go_on(
    number: signal.Signals,
    recipe: WriteRecipe,
    command: Command,
    redi: Callable[..., Any],
    same: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    path, run_dir = recipe("run", SETTINGS), tmp_path / "run"
    process = start(command("train", path))
    wait_for(lambda: has_steps(run_dir, 4), process)
    process.send_signal(number)
    process.send_signal(number)  # twice within moments is one request
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err.count("stopping: this step is finished and saved first") == 1
    assert ("Ctrl-C again leaves at once" in err) == (number == signal.SIGINT)
    assert "the same command goes on from here" in err
    assert "Traceback" not in err
    done = redi("train", path)
    assert done.returncode == 0, done.stderr
    same(run_dir)


@pytest.mark.parametrize(
    "at", [0.3, *(pytest.param(at, marks=pytest.mark.slow) for at in (0.0, 0.999))]
)
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_checkpoint_cut_off_is_passed_over(
    at: float,
    file: str,
    undisturbed: Path,
    recipe: WriteRecipe,
    same: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "export")
    path = recipe("run", SETTINGS)
    victim = run_dir / "checkpoints" / f"step-{STEPS}" / file
    content = victim.read_bytes()
    victim.write_bytes(content[: int(at * len(content))])
    assert max(complete_checkpoints(run_dir)) == STEPS - 3
    assert main(["train", str(path)]) == 0
    same(run_dir)


def test_half_a_line_of_metrics_is_cut_off(
    undisturbed: Path, recipe: WriteRecipe, same: Callable[[Path], None], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "export")
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS}")
    lines = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(lines + lines.splitlines()[0][:40])
    assert main(["train", str(recipe("run", SETTINGS))]) == 0
    same(run_dir)


def test_a_finished_run_says_so_and_changes_nothing(
    undisturbed: Path, recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    assert main(["train", str(recipe("run", SETTINGS))]) == 0
    assert "finished already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


def test_another_recipe_in_the_same_folder_is_refused_by_key(
    undisturbed: Path, recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    assert main(["train", str(recipe("run", SETTINGS)), "--optim.lr", "0.5"]) == 2
    err = capsys.readouterr().err
    assert "optim.lr (0.001, now 0.5)" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_other_rows_on_resume_end_the_same_to_rounding(
    undisturbed: Path, recipe: WriteRecipe, steps: Steps, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "export")
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS}")
    path = recipe("run", SETTINGS)
    assert main(["train", str(path), "--train.row_tokens", "4096", "--run.keep", "1"]) == 0
    for ours, theirs in zip(steps(run_dir), steps(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert steps(run_dir)[-1]["micro_steps"] == 1
    assert list(complete_checkpoints(run_dir)) == [STEPS]


def test_changed_data_is_refused(
    undisturbed: Path,
    world: Path,
    recipe: WriteRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "export")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    (run_dir / "manifest.json").write_text(json.dumps(manifest | {"data": "another"}))
    assert main(["train", str(recipe("run", SETTINGS))]) == 2
    assert "data.path: the data or tokenizer has changed" in capsys.readouterr().err
