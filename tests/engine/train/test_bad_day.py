"""1,500 steps of a small model: nothing grows, and twenty kills at random moments change nothing.

Only Linux: memory, threads and open files are read in /proc.
"""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from processes import Run
from run_cases import untimed

WriteRecipe = Callable[..., Path]

STEPS = 1_500
KILLS = 20
SETTINGS = {
    "objective.name": "sft_simper",
    "guard.collapse": "off",  # in so many epochs it learns the traces by heart
    "train.max_steps": STEPS,
    "train.epochs": 2_000,
    "train.batch": 2,
    "run.save_every": 50,
    "eval.every": 100,
    "data.workers": 1,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(world: Path) -> dict[str, Any]:
    """With held-out traces, checkpoints and a worker, so that all of them are repeated."""
    return SETTINGS | {"eval.path": str(world / "traces.jsonl")}


def lines(run_dir: Path) -> list[str]:
    """The complete lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def resources(pid: int) -> dict[str, int]:
    """KiB of memory that no file backs, threads and open files of a process."""
    words = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    status = {fields[0]: fields[1] for fields in words if len(fields) > 1}
    return {
        "memory": int(status["RssAnon:"]),
        "threads": int(status["Threads:"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


@pytest.fixture(scope="module")
def watched(
    write_recipe: WriteRecipe, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, int]]]:
    """The run directory of an uninterrupted run, and its resources every 25 steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_recipe(folder, "run", settings)
    run, found = Run("train", path, log=folder / "log"), []
    for steps in range(25, STEPS, 25):
        run.wait_for(lambda enough=steps: len(lines(folder / "run")) >= enough)
        found.append(resources(run.pid))
    assert run.end() == 0, run.stderr
    return folder / "run", found


def test_memory_threads_and_open_files_do_not_grow(
    watched: tuple[Path, list[dict[str, int]]],
) -> None:
    _, found = watched
    third = len(found) // 3
    for what in ("memory", "threads", "files"):
        early = median(one[what] for one in found[third : 2 * third])
        late = median(one[what] for one in found[2 * third :])
        assert late <= 1.01 * early, (what, [one[what] for one in found])


def test_twenty_kills_at_random_moments_change_nothing(
    watched: tuple[Path, list[dict[str, int]]],
    recipe: WriteRecipe,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    undisturbed, _ = watched
    path, run_dir = recipe("run", settings), tmp_path / "run"
    rng = random.Random(0)
    for kill in range(KILLS):
        until = STEPS * (kill + 1) // (KILLS + 1) - rng.randrange(40)
        run = Run("train", path, log=tmp_path / "log")
        run.wait_for(lambda enough=until: len(lines(run_dir)) >= enough)
        time.sleep(rng.random() / 10)
        run.kill()
        if kill == KILLS // 2:  # the clock is set back: all files are of tomorrow
            tomorrow = time.time() + 86_400
            for file in run_dir.rglob("*"):
                os.utime(file, (tomorrow, tomorrow))
    last = Run("train", path, log=tmp_path / "log")
    assert last.end() == 0, last.stderr
    assert "Traceback" not in last.stderr
    ours, theirs = (untimed(map(json.loads, lines(one))) for one in (run_dir, undisturbed))
    assert ours == theirs
    exported = [one / "export" / "model.safetensors" for one in (run_dir, undisturbed)]
    assert exported[0].read_bytes() == exported[1].read_bytes()
