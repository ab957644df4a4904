"""Steps packed by worker processes: where, how long training waits, and how the processes end."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_cases import untimed

WriteRecipe = Callable[..., Path]
Start = Callable[[Path], subprocess.Popen[bytes]]

SOON = 30.0
"""Maximum seconds until all processes of a run have ended."""
SETTINGS = {"train.max_steps": 12, "run.save_every": 3, "train.row_tokens": 128}
PACKING = 0.06
"""Seconds that packing a step takes in these tests."""
# Runs the command with slow packing, which writes down its process. Workers import this file too.
SLOW = f"""
import os, sys, time
from redi.engine.data import loader

pack = loader.pack

def slow_pack(*arguments, **options):
    time.sleep({PACKING})
    with open(os.environ["PACKED_BY"], "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    return pack(*arguments, **options)

loader.pack = slow_pack

if __name__ == "__main__":
    from redi.engine.cli import main
    raise SystemExit(main(["train", *sys.argv[1:]]))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a recipe in a session of its own, as from a terminal."""
    (tmp_path / "slow.py").write_text(SLOW)
    started = []

    def begin(recipe: Path) -> subprocess.Popen[bytes]:
        marked = {"PACKED_BY": str(tmp_path / f"{recipe.stem}.pids"), "OMP_NUM_THREADS": "1"}
        with (tmp_path / f"{recipe.stem}.log").open("ab") as log:
            run = subprocess.Popen(
                [sys.executable, str(tmp_path / "slow.py"), str(recipe)],
                stdout=log,
                stderr=log,
                env=os.environ | marked,
                start_new_session=True,
            )
        started.append(run)
        return run

    yield begin
    for run in started:
        run.kill()
        run.wait()


@pytest.fixture
def paths(recipe: WriteRecipe) -> dict[int, Path]:
    """The same recipe with 0 and with 2 workers."""
    return {n: recipe(f"workers-{n}", SETTINGS | {"data.workers": n}) for n in (0, 2)}


def processes_of(folder: Path) -> list[int]:
    """All processes that a test in this folder has started, at any depth."""
    marker, found = f"PACKED_BY={folder}/".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (entry / "environ").read_bytes():  # empty for a zombie
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def lines(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def check_equal(one: Path, other: Path) -> None:
    ours, theirs = (untimed(lines(run_dir)) for run_dir in (one, other))
    assert ours == theirs
    weights = [folder / "export" / "model.safetensors" for folder in (one, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


@pytest.mark.slow
def test_workers_pack_ahead_and_no_process_outlives_a_kill(
    paths: dict[int, Path], start: Start, tmp_path: Path
) -> None:
    for path in paths.values():
        log, run_dir = tmp_path / f"{path.stem}.log", tmp_path / path.stem
        run = start(path)
        if path is paths[2]:
            wait_for(lambda run_dir=run_dir: len(lines(run_dir)) >= 5, log)
            assert len(processes_of(tmp_path)) >= 4, "training, server and two workers"
            run.kill()
            run.wait()
            wait_for(lambda: not processes_of(tmp_path), log, SOON)
            run = start(path)  # resumes
        assert run.wait(300) == 0, log.read_text()
        packed_by = set((tmp_path / f"{path.stem}.pids").read_text().split())
        if path is paths[0]:
            assert packed_by == {str(run.pid)}
        else:
            assert str(run.pid) not in packed_by
            assert len(packed_by) == 4, "two workers, twice"
        wait_for(lambda: not processes_of(tmp_path), log, SOON)
    check_equal(tmp_path / "workers-2", tmp_path / "workers-0")
    waited = {
        n: statistics.median(line["data_seconds"] for line in lines(tmp_path / path.stem)[-6:])
        for n, path in paths.items()
    }
    assert waited[0] > PACKING
    assert waited[2] < PACKING / 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 4])
def test_a_signal_to_all_processes_reaches_training_alone(
    at: int, number: signal.Signals, paths: dict[int, Path], start: Start, tmp_path: Path
) -> None:
    log, run_dir = tmp_path / "workers-2.log", tmp_path / "workers-2"
    run = start(paths[2])
    # As early as the server of the workers is there, or in the middle of training.
    wait_for(lambda: len(lines(run_dir)) >= at and len(processes_of(tmp_path)) >= 2, log)
    os.killpg(run.pid, number)
    assert run.wait(SOON) == 75, log.read_text()
    assert "Traceback" not in log.read_text()
    wait_for(lambda: not processes_of(tmp_path), log, SOON)
    for path in (paths[2], paths[0]):
        assert start(path).wait(300) == 0
    check_equal(run_dir, tmp_path / "workers-0")


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_in_one_line_and_the_same_command_resumes(
    paths: dict[int, Path], start: Start, tmp_path: Path
) -> None:
    log, run_dir = tmp_path / "workers-2.log", tmp_path / "workers-2"
    run = start(paths[2])
    wait_for(lambda: len(lines(run_dir)) >= 5, log)
    worker = int((tmp_path / "workers-2.pids").read_text().split()[-1])
    os.kill(worker, signal.SIGKILL)
    assert run.wait(SOON) == 1, log.read_text()
    assert "Traceback" not in log.read_text()
    assert "redi: a worker process that packs steps was killed" in log.read_text().splitlines()[-1]
    wait_for(lambda: not processes_of(tmp_path), log, SOON)
    for path in (paths[2], paths[0]):
        assert start(path).wait(300) == 0
    check_equal(run_dir, tmp_path / "workers-0")
