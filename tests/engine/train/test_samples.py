"""`[eval] samples`: completions of held-out problems, by a process that runs during training."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Run

from redi.engine.cli import main
from redi.engine.config.resume import changed_keys
from redi.engine.config.sections import EvalConfig, Recipe
from redi.engine.train import sampling_process
from redi.engine.train.metrics import TIMINGS

WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve held-out problems with pairs and answers."""
    path = tmp_path_factory.mktemp("problems") / "test.jsonl"
    with path.open("w") as file:
        for number in range(12):
            row = {"prompt": f"{number * 7}=", "chosen": "12", "rejected": "3", "answer": "1"}
            file.write(json.dumps(row) + "\n")
    return path


def changes(problems: Path, **more: Any) -> dict[str, Any]:
    return {
        "eval.path": str(problems),
        "eval.every": 1,
        "eval.checker": "exact",
        "eval.answer_pattern": "(1)",
        "eval.max_new_tokens": 5,
        "eval.samples": 8,
        **more,
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_process_ends_when_its_standard_input_closes() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", sampling_process.__name__, "{}"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    time.sleep(0.5)  # it imports torch
    assert process.poll() is None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(2) == -9


def test_samples_need_a_checker_and_may_change_on_resume() -> None:
    with pytest.raises(ValueError, match=r'eval.samples needs eval.checker = "math" or "exact"'):
        EvalConfig(path="x.jsonl", samples=8)
    assert changed_keys({"eval": {"samples": 3}}, Recipe()) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_samples_are_written_logged_and_leave_training_as_it_is(
    ranks: int,
    recipe: WriteRecipe,
    redi: Callable[..., subprocess.CompletedProcess[str]],
    problems: Path,
    tmp_path: Path,
) -> None:
    with_samples = changes(problems, **{"run.trackers": ["tensorboard"]})
    done = redi("train", recipe("with", with_samples), ranks=ranks)
    assert done.returncode == 0, done.stderr
    without = changes(problems, **{"eval.samples": 0})
    assert redi("train", recipe("without", without), ranks=ranks).returncode == 0

    def figures(run: str) -> list[dict[str, Any]]:
        found = lines(tmp_path / run / "metrics.jsonl")
        found = [one for one in found if one.get("event") != "samples"]
        return [{k: v for k, v in one.items() if k not in TIMINGS} for one in found]

    assert figures("with") == figures("without")
    weights = "export/model.safetensors"
    assert (tmp_path / "with" / weights).read_bytes() == (
        tmp_path / "without" / weights
    ).read_bytes()
    # Steps of milliseconds: those between the first and the last are skipped.
    written = lines(tmp_path / "with" / "samples.jsonl")
    assert [(one["step"], one["problem"]) for one in written] == [
        (step, problem) for step in (0, 4) for problem in range(8)
    ]
    assert "samples after step 2: skipped, those after step 0 are still being" in done.stderr
    assert "samples after step 4: skipped" not in done.stderr
    assert [one["prompt"] for one in written[:2]] == ["0=", "7="]
    for one in written:
        assert one["traces"][0]["teacher"] == f"with step {one['step']}"
        assert one["traces"][0]["correct"] == ("1" in one["traces"][0]["text"])
    events = [one for one in lines(tmp_path / "with" / "metrics.jsonl") if "accuracy" in one]
    right = [sum(one["traces"][0]["correct"] for one in written[at : at + 8]) for at in (0, 8)]
    assert [one["accuracy"] for one in events] == [count / 8 for count in right]
    assert not (tmp_path / "with" / "samples.partial").exists()

    from tensorboard.backend.event_processing import event_accumulator

    log = event_accumulator.EventAccumulator(str(tmp_path / "with" / "tensorboard"))
    log.Reload()
    assert [one.step for one in log.Tensors("samples/3/text_summary")] == [0, 4]

    # Those of the export are those of `redi evaluate` with the same options.
    out = tmp_path / "evaluated"
    line = ["evaluate", tmp_path / "with" / "export", "--data", problems, "--limit", 8]
    line += ["--max_new_tokens", 5, "--answer_pattern", "(1)", "--out", out, "--quiet"]
    assert main([str(word) for word in line]) == 0
    again = {one["problem"]: one["traces"][0]["text"] for one in lines(out / "samples.jsonl")}
    assert {one["problem"]: one["traces"][0]["text"] for one in written[8:]} == again


def sampling(of: int) -> list[int]:
    """Process numbers of the sampling processes that process `of` has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == of and b"sampling_process" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_the_process_ends_with_a_killed_run_and_the_same_command_samples_again(
    recipe: WriteRecipe, problems: Path, tmp_path: Path
) -> None:
    path = recipe("run", changes(problems, **{"train.max_steps": 100_000, "run.save_every": 5}))
    run = Run("train", path, log=tmp_path / "log")
    run.wait_for(lambda: (tmp_path / "run" / "samples.jsonl").exists())
    run.wait_for(lambda: bool(sampling(run.pid)))
    (process,) = sampling(run.pid)
    run.kill()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{process}/cmdline").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}/cmdline").exists()

    samples, saved = tmp_path / "run" / "samples.jsonl", tmp_path / "run" / "checkpoints"
    step = max(int(one.name.removeprefix("step-")) for one in saved.glob("step-*"))
    before = [one["step"] for one in lines(samples)]
    with samples.open("a") as file:
        file.write(json.dumps({"step": step + 10**6}) + '\n{"step": ')
    resumed = Run("train", path, log=tmp_path / "log2")
    resumed.wait_for(lambda: f"samples after step {step}:" in resumed.stderr.replace("right;", ""))
    resumed.send(15)
    assert resumed.end() == 75
    kept = [one["step"] for one in lines(samples)]
    assert kept[: len(before)] == before
    assert 10**6 not in [one - step for one in kept]
    assert not sampling(resumed.pid)


@pytest.mark.slow
def test_a_process_that_fails_is_a_warning_with_its_reason(
    recipe: WriteRecipe,
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "path"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'redi.engine.train.sampling_process' in sys.orig_argv:\n"
        "    os.write(2, b'no memory left\\n')\n"
        "    os._exit(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert main(["train", str(recipe("run", changes(problems)))]) == 0
    err = capsys.readouterr().err
    assert "warning: samples after step 4: none: no memory left" in err
    assert not (tmp_path / "run" / "samples.jsonl").exists()


@pytest.mark.slow
def test_a_tracker_without_its_server_does_not_end_training(
    recipe: WriteRecipe,
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("the server\nis down")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_text", fail)
    path = recipe("run", changes(problems, **{"run.trackers": ["tensorboard"]}))
    assert main(["train", str(path)]) == 0
    err = capsys.readouterr().err
    assert "warning: samples after step 4: not in the trackers: the server is down" in err
    assert {one["step"] for one in lines(tmp_path / "run" / "samples.jsonl")} >= {4}
