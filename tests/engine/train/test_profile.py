"""`run.profile`: the trace has the chosen steps and no others, the table names their parts."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Run
from run_cases import untimed

from redi.engine.cli import main

Redi = Callable[..., subprocess.CompletedProcess[str]]
Steps = Callable[[Path], list[dict[str, Any]]]
WriteRecipe = Callable[..., Path]

PARTS = ("data", "forward", "loss", "backward", "clip", "optimizer", "metrics")


def traced(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The timed events of a trace."""
    with gzip.open(run_dir / "profile" / f"{name}.trace.json.gz", "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def steps_in(events: list[dict[str, Any]]) -> list[int]:
    found = [re.fullmatch(r"redi\.step (\d+)", str(event["name"])) for event in events]
    return sorted(int(match[1]) for match in found if match)


def count(events: list[dict[str, Any]], name: str) -> int:
    return sum(event["name"] == name for event in events)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_the_chosen_steps_are_traced_and_change_nothing(
    ranks: int, recipe: WriteRecipe, redi: Redi, steps: Steps, tmp_path: Path
) -> None:
    done = redi("train", recipe("run"), "--run.profile", "2:4", ranks=ranks)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / "run" / "profile" / f"steps-2-3.{end}" for end in ("md", "trace.json.gz")]
    assert f"profile of steps 2 to 3: {files[0]}, {files[1]}\n" in done.stderr
    assert sorted((tmp_path / "run" / "profile").iterdir()) == files

    events = traced(tmp_path / "run", "steps-2-3")
    assert steps_in(events) == [2, 3]
    micro_steps = sum(line["micro_steps"] for line in steps(tmp_path / "run")[1:3])
    for part in ("forward", "loss", "backward"):
        assert count(events, f"redi.{part}") == micro_steps, part
    for part in ("data", "clip", "optimizer"):
        assert count(events, f"redi.{part}") == 2, part
    assert count(events, "redi::signed_cross_entropy") == micro_steps

    table = files[0].read_text()
    for part in PARTS:
        assert f"\n| {part} " in table
    if not ranks:  # of two, what FSDP does takes longer, and the table has the longest
        assert "signed_cross_entropy" in table
        assert "_scaled_dot_product" in table
    rows = re.findall(r"^\| (\w+) \| \d+ \| ([\d.]+) \|", table, re.MULTILINE)
    seconds = float(re.search(r"^([\d.]+) s with", table, re.MULTILINE)[1])
    spent = sum(float(value) for name, value in rows if name in PARTS)
    assert 0.5 * seconds < spent < 1.01 * seconds, "the parts are most of the steps"

    if ranks:
        return  # sums of two ranks are rounded differently
    assert main(["train", str(recipe("plain"))]) == 0
    ours, theirs = (untimed(steps(tmp_path / name)) for name in ("run", "plain"))
    assert ours == theirs


@pytest.mark.slow
def test_a_run_that_is_stopped_or_killed_inside_the_profile_resumes(
    recipe: WriteRecipe, steps: Steps, tmp_path: Path
) -> None:
    settings = {"train.max_steps": 24, "run.save_every": 1, "run.profile": "2:20"}
    path, run_dir = recipe("run", settings), tmp_path / "run"
    run = Run("train", path, log=tmp_path / "log")
    run.wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(steps(run_dir)) > 3)
    run.kill()
    assert not (run_dir / "profile").exists()
    run = Run("train", path, log=tmp_path / "log")
    seen = len(steps(run_dir))
    run.wait_for(lambda: len(steps(run_dir)) > seen + 2)
    run.send(signal.SIGTERM)
    assert run.end() == 75, run.stderr
    (trace,) = (run_dir / "profile").glob("*.trace.json.gz")
    first, last = map(int, re.findall(r"\d+", trace.name))
    assert 2 < first <= last == len(steps(run_dir))
    assert steps_in(traced(run_dir, f"steps-{first}-{last}")) == list(range(first, last + 1))
    # Profiled steps may change on resume.
    assert main(["train", str(path), "--run.profile", f"{last + 1}:{last + 2}"]) == 0
    assert steps_in(traced(run_dir, f"steps-{last + 1}-{last + 1}")) == [last + 1]


# `redi train` on a rank whose trace takes 10 s to write.
SLOW_TO_WRITE = """
import sys, time
from redi.engine import cli
from redi.engine.train import profile

write = profile.Profile._table

def slowly(*args):
    time.sleep(10)
    return write(*args)

profile.Profile._table = slowly
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("profiled", ["2:3", "3:9"])
def test_the_other_ranks_wait_while_rank_0_writes_the_profile(
    profiled: str, recipe: WriteRecipe, tmp_path: Path
) -> None:
    """Longer than a collective's timeout, between steps and after the last one."""
    script = tmp_path / "program.py"
    script.write_text(SLOW_TO_WRITE)
    path = recipe("run", {"run.timeout": 4, "run.profile": profiled})
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = subprocess.run(
        [*line, str(script), "train", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    last = min(int(profiled[-1]) - 1, 4)
    assert steps_in(traced(tmp_path / "run", f"steps-{profiled[0]}-{last}")) == list(
        range(int(profiled[0]), last + 1)
    )


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:3", "-1:3", "3", "3:", "a:b", "2:4:2"])
def test_other_values_are_one_line(
    text: str, recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe("run", {"run.profile": text}))]) == 2
    line = capsys.readouterr().err.strip()
    assert "run.profile must be" in line
    assert repr(text) in line
    assert "\n" not in line


def test_steps_after_the_last_are_reported(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"run.profile": "9:12", "train.max_steps": 2}
    assert main(["train", str(recipe("run", changes))]) == 0
    assert "run.profile = 9:12: the run ends after step 2" in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()
