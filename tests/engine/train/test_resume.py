"""A run killed at any moment resumes with the same metrics and bit-equal weights."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import Run, ranks
from run_cases import has_steps, untimed
from safetensors.torch import load_file

from redi.engine.cli import main
from redi.engine.errors import InputError
from redi.engine.train.checkpoint import _Writer, complete_checkpoints
from redi.engine.train.run_folder import model_path

Steps = Callable[[Path], list[dict[str, Any]]]
WriteRecipe = Callable[..., Path]

STEPS = 12
SOON = 20.0
"""Maximum seconds from a signal to the end of a run of the small model."""
SETTINGS = {"train.max_steps": STEPS, "run.save_every": 3, "train.row_tokens": 128}


@pytest.fixture(scope="module")
def undisturbed(write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["train", str(write_recipe(folder, "run", SETTINGS))]) == 0
    return folder / "run"


@pytest.fixture
def same(undisturbed: Path, steps: Steps) -> Callable[[Path], None]:
    """Assert that a run gave the same result as the uninterrupted one."""

    def check(run_dir: Path) -> None:
        assert untimed(steps(run_dir)) == untimed(steps(undisturbed))
        weights = load_file(run_dir / "export" / "model.safetensors")
        expected = load_file(undisturbed / "export" / "model.safetensors")
        assert weights.keys() == expected.keys()
        for name in expected:
            assert torch.equal(weights[name], expected[name]), name

    return check


def test_killed_between_checkpoints_and_started_again_it_ends_the_same(
    recipe: WriteRecipe, same: Callable[[Path], None], tmp_path: Path
) -> None:
    path, run_dir = recipe("run", SETTINGS), tmp_path / "run"
    run = Run("train", path, log=tmp_path / "log")
    run.wait_for(lambda: has_steps(run_dir, 5))
    run.kill()
    assert main(["train", str(path)]) == 0
    same(run_dir)


@pytest.mark.slow
def test_kto_resumes_with_the_log_probs_of_the_model_before_step_1(
    recipe: WriteRecipe, steps: Steps, tmp_path: Path
) -> None:
    kto = {**SETTINGS, "train.max_steps": 6, "objective.name": "kto", "objective.beta": 0.1}
    paths = {name: recipe(name, kto) for name in ("whole", "killed")}
    run = Run("train", paths["killed"], log=tmp_path / "log")
    run.wait_for(lambda: has_steps(tmp_path / "killed", 4))
    run.kill()
    assert not (tmp_path / "killed" / "export").exists(), "it was killed too late"
    assert main(["train", *map(str, paths.values())]) == 0
    lines = steps(tmp_path / "killed")
    assert untimed(lines) == untimed(steps(tmp_path / "whole"))
    assert lines[3]["kl"] > 0.1  # of the first step after the checkpoint
    ours, theirs = (tmp_path / n / "export" / "model.safetensors" for n in ("killed", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_training_continues_while_a_checkpoint_is_written_and_does_not_change_it(
    recipe: WriteRecipe,
    same: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, run_dir = recipe("run", SETTINGS | {"run.keep": 0}), tmp_path / "run"
    write, went_on = _Writer.write_data, []

    def write_two_steps_later(writer: _Writer, *plan: Any) -> Any:
        deadline = time.monotonic() + 300  # a busy machine
        while writer.path.name == "step-3" and not has_steps(run_dir, 5):
            assert time.monotonic() < deadline, "training waits for the checkpoint"
            time.sleep(0.005)
        went_on.append(writer.path.name)
        return write(writer, *plan)

    monkeypatch.setattr(_Writer, "write_data", write_two_steps_later)
    assert main(["train", str(path)]) == 0
    assert went_on == [f"step-{step}" for step in (3, 6, 9, 12)]
    for step in (6, 9, 12):
        shutil.rmtree(saved(run_dir, step))
    shutil.rmtree(run_dir / "export")
    assert main(["train", str(path)]) == 0
    same(run_dir)


MOMENTS: list[tuple[str, Callable[[Path], bool], float]] = [
    *(
        (f"{30 * n} ms after a checkpoint's folder", lambda d: saved(d, 3).exists(), 0.03 * n)
        for n in range(10)
    ),
    ("model loading", lambda d: "attention" in (d.parent / "log").read_text(), 0.0),
    ("the run folder", lambda d: d.exists(), 0.0),
    ("a whole checkpoint", lambda d: (saved(d, 6) / ".metadata").exists(), 0.0),
    ("a removed one", lambda d: saved(d, 9).exists() and not saved(d, 3).exists(), 0.0),
    *((f"step {n}", lambda d, n=n: has_steps(d, n), 0.0) for n in (1, 2, 4, 7, 8, 10)),
]


def saved(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step}"


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "delay"), [m[1:] for m in MOMENTS], ids=[m[0] for m in MOMENTS])
def test_killed_at_twenty_moments(
    moment: Callable[[Path], bool],
    delay: float,
    recipe: WriteRecipe,
    same: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    path, run_dir, log = recipe("run", SETTINGS), tmp_path / "run", tmp_path / "log"
    log.touch()
    run = Run("train", path, log=log)
    run.wait_for(lambda: moment(run_dir))
    time.sleep(delay)
    run.kill()
    assert not (run_dir / "export").exists(), "it was killed too late to show anything"
    assert main(["train", str(path)]) == 0
    same(run_dir)


@pytest.mark.slow
def test_ranks_come_and_go(recipe: WriteRecipe, steps: Steps, tmp_path: Path) -> None:
    """2 ranks, then 4 that gather once a step, then 1: equal up to rounding."""
    changes = SETTINGS | {"optim.eps": 1e-3}
    whole, moved = recipe("whole", changes), recipe("moved", changes)
    assert main(["train", str(whole)]) == 0
    for count, enough, gather in ((2, 4, "micro_step"), (4, 8, "step")):
        line = ("train", moved, "--shard.gather", gather)
        group = ranks(count, *line, log=tmp_path / f"of-{count}-")
        group[0].wait_for(lambda enough=enough: has_steps(tmp_path / "moved", enough))
        for run in group:
            run.send(signal.SIGTERM)
        assert [run.end() for run in group] == [75] * count, group[0].stderr
        assert not (tmp_path / "moved" / "export").exists()
    assert main(["train", str(moved)]) == 0
    for ours, theirs in zip(steps(tmp_path / "moved"), steps(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_stopped_and_started_again_end_the_same(
    recipe: WriteRecipe, steps: Steps, tmp_path: Path
) -> None:
    paths = {name: recipe(name, SETTINGS) for name in ("whole", "stopped")}
    for run in ranks(2, "train", paths["whole"], log=tmp_path / "whole-"):
        assert run.end() == 0, run.stderr
    group = ranks(2, "train", paths["stopped"], log=tmp_path / "stopped-")
    group[0].wait_for(lambda: has_steps(tmp_path / "stopped", 8))
    group[1].send(signal.SIGTERM)  # one rank is enough
    assert [run.end() for run in group] == [75, 75], group[0].stderr
    assert len(steps(tmp_path / "stopped")) < STEPS
    for run in ranks(2, "train", paths["stopped"], log=tmp_path / "again-"):
        assert run.end() == 0, run.stderr
    assert untimed(steps(tmp_path / "stopped")) == untimed(steps(tmp_path / "whole"))
    ours, theirs = (tmp_path / n / "export" / "model.safetensors" for n in ("stopped", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits_75_and_prints_how_to_resume(
    number: signal.Signals, recipe: WriteRecipe, same: Callable[[Path], None], tmp_path: Path
) -> None:
    path, run_dir = recipe("run", SETTINGS), tmp_path / "run"
    run = Run("train", path, log=tmp_path / "log")
    run.wait_for(lambda: has_steps(run_dir, 4))
    run.send(number, number)  # twice in quick succession is one request
    assert run.end(SOON) == 75, run.stderr
    assert run.stderr.count("stopping after this step and its checkpoint") == 1
    assert ("Ctrl-C again exits without saving" in run.stderr) == (number == signal.SIGINT)
    assert "the same command resumes from here" in run.stderr
    assert "Traceback" not in run.stderr
    assert main(["train", str(path)]) == 0
    same(run_dir)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_checkpoint_cut_off_anywhere_does_not_count(
    file: str, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    victim = tmp_path / "checkpoints" / f"step-{STEPS}" / file
    content = victim.read_bytes()
    assert max(complete_checkpoints(tmp_path)) == STEPS
    cuts = {0, 1, len(content) - 1, *range(0, len(content), max(1, len(content) // 40))}
    for cut in sorted(cuts, reverse=True):
        os.truncate(victim, cut)
        assert max(complete_checkpoints(tmp_path)) == STEPS - 3, f"cut off at byte {cut}"
    victim.parent.rename(victim.parent.with_name(f"step-{STEPS}.damaged"))
    assert max(complete_checkpoints(tmp_path)) == STEPS - 3


@pytest.mark.parametrize("saves", [2, 12])
def test_the_metadata_of_a_checkpoint_is_read_once_at_the_start_and_never_while_training(
    saves: int,
    recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, reads = dcp.FileSystemReader.read_metadata, []

    def count(reader: dcp.FileSystemReader, **options: Any) -> Any:
        reads.append(Path(reader.path).name)
        return read(reader, **options)

    monkeypatch.setattr(dcp.FileSystemReader, "read_metadata", count)
    path = recipe("run", {"train.max_steps": saves, "run.save_every": 1, "run.keep": 2})
    assert main(["train", str(path)]) == 0
    assert reads == []
    kept = [f"step-{saves - 1}", f"step-{saves}"]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == sorted(kept)
    shutil.rmtree(tmp_path / "run" / "export")
    assert main(["train", str(path)]) == 0
    assert sorted(reads) == sorted([*kept, kept[-1]]), "each is verified, the newest is loaded"


def test_a_checkpoint_cut_off_is_passed_over(
    undisturbed: Path, recipe: WriteRecipe, same: Callable[[Path], None], tmp_path: Path
) -> None:
    run_dir = unfinished(undisturbed, tmp_path)
    victim = saved(run_dir, STEPS) / "__0_0.distcp"
    os.truncate(victim, victim.stat().st_size // 3)
    assert main(["train", str(recipe("run", SETTINGS))]) == 0
    same(run_dir)


def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_resumes(
    undisturbed: Path,
    recipe: WriteRecipe,
    same: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, path = unfinished(undisturbed, tmp_path), recipe("run", SETTINGS)
    with (saved(run_dir, STEPS) / "__0_0.distcp").open("r+b") as file:
        file.seek(1000)
        file.write(bytes(2_000_000))
    assert main(["train", str(path)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"redi: {saved(run_dir, STEPS)} cannot be read (")
    assert said.endswith("remove it to resume from the checkpoint before it")
    shutil.rmtree(saved(run_dir, STEPS))
    assert main(["train", str(path)]) == 0
    same(run_dir)


def unfinished(undisturbed: Path, folder: Path) -> Path:
    """A copy of the uninterrupted run, without its export."""
    shutil.copytree(undisturbed, folder / "run")
    shutil.rmtree(folder / "run" / "export")
    return folder / "run"


def test_half_a_line_of_metrics_is_cut_off(
    undisturbed: Path, recipe: WriteRecipe, same: Callable[[Path], None], tmp_path: Path
) -> None:
    run_dir = unfinished(undisturbed, tmp_path)
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS}")
    lines = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(lines + lines.splitlines()[0][:40])
    assert main(["train", str(recipe("run", SETTINGS))]) == 0
    same(run_dir)


def test_a_finished_run_prints_so_and_changes_nothing(
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


# Steps 1 to 6 of a lengthened run equal those of a straight one if the learning rate is the same.
SHORT = 6
CONSTANT = {"optim.schedule": "constant", "optim.warmup": 0, "run.save_every": 4}
LONG = CONSTANT | {"train.max_steps": STEPS}


@pytest.fixture(scope="module")
def dropout(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with attention dropout, which must not depend on the length of the run."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(world / "model", folder)
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def straight(
    write_recipe: WriteRecipe, dropout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run directory of a run with all steps from the start."""
    folder = tmp_path_factory.mktemp("straight")
    changes = LONG | {"model.path": str(dropout)}
    assert main(["train", str(write_recipe(folder, "run", changes))]) == 0
    return folder / "run"


@pytest.fixture
def short(recipe: WriteRecipe, dropout: Path) -> Path:
    """The recipe of a finished run of SHORT steps in the test's directory."""
    path = recipe("run", LONG | {"model.path": str(dropout), "train.max_steps": SHORT})
    assert main(["train", str(path)]) == 0
    return path


def assert_equal_runs(ours: Path, theirs: Path, steps: Steps) -> None:
    assert untimed(steps(ours)) == untimed(steps(theirs))
    weights, expected = (load_file(d / "export" / "model.safetensors") for d in (ours, theirs))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_finished_run_is_lengthened_and_ends_as_a_straight_one(
    short: Path,
    straight: Path,
    steps: Steps,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", str(short), "--train.max_steps", str(STEPS)]) == 0
    said = capsys.readouterr().err
    assert f"lengthened from {SHORT} to {STEPS} steps" in said
    assert f"resumes after step {SHORT}" in said
    assert "optim.schedule" not in said
    assert_equal_runs(tmp_path / "run", straight, steps)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["lengthened"] == [{"from": SHORT, "to": STEPS, "pending": False}]
    assert manifest["overview"]["steps"] == STEPS
    assert not list((tmp_path / "run").glob("export?*"))
    assert main(["train", str(short), "--train.max_steps", str(STEPS)]) == 0
    assert "finished already" in capsys.readouterr().err


def test_stage_2_of_a_lengthened_stage_1_is_not_called_finished(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        recipe("sft", LONG | {"train.max_steps": 1}),
        recipe("redi", {"train.max_steps": 1, "model.path": str(tmp_path / "sft" / "export")}),
    ]
    for path in stages:
        assert main(["train", str(path)]) == 0
    assert main(["train", str(stages[0]), "--train.max_steps", "2"]) == 0
    capsys.readouterr()
    assert main(["train", str(stages[1])]) == 2
    assert "model.path: the weights have changed since" in capsys.readouterr().err


def test_a_finished_run_names_the_data_that_has_changed(
    recipe: WriteRecipe, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_bytes((world / "traces.jsonl").read_bytes())
    path = recipe("run", {"data.path": str(data), "train.max_steps": 1})
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path)]) == 0
    assert "finished already" in capsys.readouterr().err
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    assert main(["train", str(path)]) == 2
    assert f"was finished: {data}; choose another run.dir" in capsys.readouterr().err


def damage(checkpoint: Path) -> None:
    for file in checkpoint.glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)


def test_damaged_checkpoints_are_named_and_never_all_passed_over(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe("run", CONSTANT | {"train.max_steps": 3, "run.save_every": 1, "run.keep": 0})
    run_dir = tmp_path / "run"
    assert main(["train", str(path)]) == 0
    expected = load_file(run_dir / "export" / "model.safetensors")
    shutil.rmtree(run_dir / "export")
    damage(run_dir / "checkpoints" / "step-3")
    capsys.readouterr()
    assert main(["train", str(path)]) == 0
    said = capsys.readouterr().err
    assert "damaged (files are missing or truncated): step 3; resuming from step 2" in said
    weights = load_file(run_dir / "export" / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    shutil.rmtree(run_dir / "export")
    for checkpoint in (run_dir / "checkpoints").iterdir():
        damage(checkpoint)
    lines = (run_dir / "metrics.jsonl").read_bytes()
    assert main(["train", str(path)]) == 2
    assert "step 1, 2, 3; restore them, or remove" in capsys.readouterr().err
    assert (run_dir / "metrics.jsonl").read_bytes() == lines


def test_a_directory_with_a_recipe_of_the_user_is_not_a_run(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "mine" / "recipe.toml"
    own.parent.mkdir()
    own.write_bytes(recipe("run").read_bytes())
    text = own.read_text()
    assert main(["train", str(own), "--run.dir", str(own.parent)]) == 2
    assert "exists and is not a run directory" in capsys.readouterr().err
    assert own.read_text() == text


def test_the_old_export_of_a_run_that_is_lengthened_is_not_evaluated_as_the_run(
    tmp_path: Path,
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "recipe.toml").write_text("")
    pending = {"lengthened": [{"from": 1, "to": 2, "pending": True}]}
    (tmp_path / "manifest.json").write_text(json.dumps(pending))
    with pytest.raises(InputError, match="is being lengthened; finish it, or give"):
        model_path(str(tmp_path), "model")


@pytest.mark.slow
def test_a_run_killed_while_it_is_lengthened_resumes_and_ends_as_a_straight_one(
    short: Path,
    straight: Path,
    steps: Steps,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, longer = tmp_path / "run", ["train", short, "--train.max_steps", STEPS]
    old = (run_dir / "export" / "model.safetensors").read_bytes()
    run = Run(*longer, log=tmp_path / "noted")
    run.wait_for(lambda: "pending" in (run_dir / "manifest.json").read_text())
    run.kill()  # before its recipe is replaced, or just after
    assert main(["train", str(short)]) == 2
    assert f"holds a run of {STEPS} steps" in capsys.readouterr().err
    run = Run(*longer, log=tmp_path / "trained")
    run.wait_for(lambda: has_steps(run_dir, 9))
    run.kill()
    assert (run_dir / "export" / "model.safetensors").read_bytes() == old
    assert main(["report", str(run_dir)]) == 0
    assert ", unfinished" in capsys.readouterr().out
    assert main([str(word) for word in longer]) == 0
    assert_equal_runs(run_dir, straight, steps)
    assert main(["report", str(run_dir)]) == 0
    assert "unfinished" not in capsys.readouterr().out


def test_a_run_gets_no_fewer_steps(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    assert main(["train", str(short), "--train.max_steps", "5"]) == 2
    (said,) = [li for li in capsys.readouterr().err.splitlines() if li.startswith("redi: ")]
    assert f"{run_dir} holds a run of 6 steps, and train.epochs and train.max_steps now" in said
    assert main(["train", str(short), "--train.epochs", "60"]) == 0  # as many steps
    assert "finished already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before
    shutil.rmtree(run_dir / "checkpoints")
    assert main(["train", str(short), "--train.max_steps", "7"]) == 2
    assert "cannot be lengthened to 7 steps: it has no checkpoint left" in capsys.readouterr().err


def test_more_epochs_keep_the_first_warm_up_and_warn_of_a_rate_that_had_ended(
    recipe: WriteRecipe, steps: Steps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"train.max_steps": None, "train.epochs": 1, "optim.warmup": 0.25}
    path, run_dir = recipe("run", changes), tmp_path / "run"
    assert main(["train", str(path)]) == 0
    first = len(steps(run_dir))
    assert main(["train", str(path), "--train.epochs", "3"]) == 0
    rates = [line["lr"] for line in steps(run_dir)]
    assert len(rates) == 3 * first
    warmup = -(-first // 4)
    left = [3 * first - step for step in range(first, 3 * first)]
    assert rates[first:] == pytest.approx([1e-3 * n / (3 * first - warmup) for n in left])
    said = " ".join(capsys.readouterr().err.split())
    assert f'optim.schedule = "linear" was planned to reach 0 after step {first}' in said


@pytest.mark.slow
def test_an_unfinished_run_on_two_ranks_is_lengthened_and_ends_as_a_straight_one(
    recipe: WriteRecipe, dropout: Path, steps: Steps, tmp_path: Path
) -> None:
    changes = LONG | {"model.path": str(dropout)}
    paths = {name: recipe(name, changes) for name in ("whole", "longer")}
    for run in ranks(2, "train", paths["whole"], log=tmp_path / "whole-"):
        assert run.end() == 0, run.stderr
    group = ranks(2, "train", paths["longer"], "--train.max_steps", 10, log=tmp_path / "short-")
    group[0].wait_for(lambda: has_steps(tmp_path / "longer", 5))
    for run in group:
        run.kill()
    for run in ranks(2, "train", paths["longer"], log=tmp_path / "longer-"):
        assert run.end() == 0, run.stderr
    assert "lengthened from 10 to 12 steps" in (tmp_path / "longer-0").read_text()
    assert_equal_runs(tmp_path / "longer", tmp_path / "whole", steps)


@pytest.mark.slow
def test_other_packs_on_resume_end_the_same_to_rounding(
    undisturbed: Path, recipe: WriteRecipe, steps: Steps, tmp_path: Path
) -> None:
    run_dir = unfinished(undisturbed, tmp_path)
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
    run_dir = unfinished(undisturbed, tmp_path)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    (run_dir / "manifest.json").write_text(json.dumps(manifest | {"data": "another"}))
    assert main(["train", str(recipe("run", SETTINGS))]) == 2
    assert "data.path: the data or tokenizer has changed" in capsys.readouterr().err


@pytest.fixture
def two_files(recipe: WriteRecipe, world: Path, tmp_path: Path) -> Path:
    """The recipe of a run on a directory of two files, with a tokenizer that prints the time.

    It has one step, and may be lengthened.
    """
    data, tokenizer = tmp_path / "data", tmp_path / "tokenizer"
    data.mkdir()
    lines = (world / "traces.jsonl").read_text().splitlines(keepends=True)
    (data / "a.jsonl").write_text("".join(lines[:30]))
    (data / "b.jsonl").write_text("".join(lines[30:]))
    shutil.copytree(world / "model", tokenizer)
    changes = {"data.path": str(data), "model.tokenizer": str(tokenizer), "train.max_steps": 1}
    return recipe("run", changes)


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error message of a run that cannot resume."""
    capsys.readouterr()
    assert main(["train", str(path), "--train.max_steps", "2"]) == 2
    (line,) = [li for li in capsys.readouterr().err.splitlines() if li.startswith("redi: ")]
    return line


def test_a_resume_names_what_has_changed(
    two_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(two_files)]) == 0
    data, run_dir = tmp_path / "data", tmp_path / "run"
    began = f"data.path: changed since {run_dir} was started: "
    ending = "; choose another run.dir, or restore it to resume"
    whole = (data / "b.jsonl").read_text()
    (data / "b.jsonl").write_text("".join(whole.splitlines(keepends=True)[1:]))
    assert refusal(two_files, capsys) == f"redi: {began}{data / 'b.jsonl'}{ending}"
    (data / "b.jsonl").write_text(whole)
    (data / "c.jsonl").write_text(whole.replace("*", "1"))
    assert f"{began}{data / 'c.jsonl'} (new){ending}" in refusal(two_files, capsys)
    (data / "c.jsonl").unlink()
    (data / "b.jsonl").unlink()
    assert f"{began}{data / 'b.jsonl'} (gone){ending}" in refusal(two_files, capsys)
    (data / "b.jsonl").write_text(whole)
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    config = file.read_text()
    file.write_text(json.dumps(json.loads(config) | {"eos_token": "0"}))
    tokens = began.replace("data.path", "model.tokenizer")
    assert f"{tokens}the tokenizer or its chat template{ending}" in refusal(two_files, capsys)
    file.write_text(config)
    (data / "b.jsonl").rename(data / "renamed.jsonl")  # the same tokens
    assert main(["train", str(two_files), "--train.max_steps", "2"]) == 0


def test_a_resume_names_the_changed_output_of_a_template(
    two_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = (tmp_path / "tokenizer").glob("chat_template.jinja")
    file.write_text("{{ strftime_now('%H%M%S') }}" + file.read_text())
    assert main(["train", str(two_files)]) == 0
    done = time.strftime("%H%M%S")  # the template was rendered by then
    while time.strftime("%H%M%S") == done:
        time.sleep(0.1)
    said = refusal(two_files, capsys)
    assert "was started: the output of the chat template ('" in said
    assert "', now '" in said
    assert "tokenizer" not in said


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one that was moved to another disk."""
    path = recipe("run", CONSTANT | {"run.save_every": 1, "run.keep": 1})
    assert main(["train", str(path), "--train.max_steps", "1"]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    checkpoint.rename(tmp_path / "moved")
    checkpoint.symlink_to(tmp_path / "moved")
    capsys.readouterr()
    assert main(["train", str(path), "--train.max_steps", "3"]) == 0
    warning = f"warning: {checkpoint} cannot be removed: Cannot call rmtree on a symbolic link"
    assert warning in capsys.readouterr().err.splitlines()
    assert [p.name for p in checkpoint.parent.iterdir() if p != checkpoint] == ["step-3"]
