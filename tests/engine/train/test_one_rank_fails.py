"""One rank fails or hangs while the other waits for it: the job ends soon, with one clear line."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from processes import ranks

WriteRecipe = Callable[..., Path]

RESUMES = "the same command resumes from the newest complete checkpoint"
SOON = 20.0
"""Maximum seconds from the failure to the end of the job."""

# `redi train` with a fault in a step of rank FAULTY; it notes when that happened.
FAULT = """
import os, sys, time
from pathlib import Path
from redi.engine import cli
from redi.engine.errors import RunError
from redi.engine.train import loop

step = loop.train_step

def faulty(student, optimizer, batches, *args, **options):
    if batches.step == 3 and os.environ["RANK"] == os.environ["FAULTY"]:
        Path(os.environ["NOTED"]).write_text(str(time.time()))
        {fault}
    return step(student, optimizer, batches, *args, **options)

loop.train_step = faulty
sys.exit(cli.main())
"""


def train(path: Path, folder: Path, fault: str, rank: int) -> tuple[int, str, float]:
    """The exit code of two ranks under torchrun, what they print, and the seconds to the end."""
    noted = folder / "noted"
    program = FAULT.format(fault=fault)
    job = two_ranks(program, folder, "train", path, FAULTY=str(rank), NOTED=str(noted))
    return job.returncode, job.stdout, time.time() - float(noted.read_text())


def two_ranks(
    program: str, folder: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A program on two ranks under torchrun. stderr is read with stdout."""
    script = folder / "program.py"
    script.write_text(program)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*line, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


def lines_of_redi(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("redi: ")]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_of_one_rank_ends_the_job(rank: int, recipe: WriteRecipe, tmp_path: Path) -> None:
    path = recipe("run", {"run.save_every": 2})
    code, output, seconds = train(path, tmp_path, 'raise RunError("the disk is gone")', rank)
    assert code == 1, output
    assert seconds < SOON, output
    name = f"rank {rank}: " if rank else ""
    assert lines_of_redi(output) == [f"redi: {name}the disk is gone"]
    assert set(re.findall(r"exitcode\s*: (-?\d+)", output)) == {"1"}, output
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.slow
def test_a_bug_on_one_rank_ends_the_job_with_its_traceback(
    recipe: WriteRecipe, tmp_path: Path
) -> None:
    code, output, seconds = train(recipe("run"), tmp_path, "batches.no_such_thing", rank=1)
    assert code == 1, output
    assert seconds < SOON, output
    (line,) = lines_of_redi(output)
    assert line.startswith("redi: rank 1: AttributeError: ")
    assert output.count(", in faulty") == 1
    assert "batches.no_such_thing" in output


@pytest.mark.slow
def test_without_torchrun_the_loss_of_rank_0_and_its_store_ends_the_job(
    recipe: WriteRecipe, tmp_path: Path
) -> None:
    first, other = ranks(2, "train", recipe("run", {"train.max_steps": 200}), log=tmp_path / "log")
    metrics = tmp_path / "run" / "metrics.jsonl"
    first.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    first.kill()
    assert other.end(SOON) == 1
    (line,) = lines_of_redi(other.stderr)
    assert "the same command resumes" in line


RAISES = """
import os
import torch.distributed as dist
from redi.engine.distributed import join_world

try:
    with join_world():
        raise RuntimeError("in the body")
except RuntimeError:
    print("still there" if dist.is_initialized() else "destroyed", flush=True)
os._exit(0)
"""


def test_the_group_is_not_destroyed_when_the_body_raises(tmp_path: Path) -> None:
    """Destroying it waits for the other ranks."""
    output = two_ranks(RAISES, tmp_path).stdout
    assert output.count("still there") == 2, output


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_after_the_timeout(
    recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = recipe("run", {"run.timeout": 5})
    code, output, seconds = train(path, tmp_path, "time.sleep(1e4)", rank=1)
    assert code == 1, output
    assert 5 <= seconds < 5 + SOON, output
    (line,) = lines_of_redi(output)
    assert line.startswith("redi: another rank did not answer for 5 s (")
    assert RESUMES in line


# `redi train` in which rank 1 evaluates slowly and rank 0 writes its files slowly.
SLOW = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from redi.engine import cli
from redi.engine.model import export
from redi.engine.train import loop

def slow(function, rank, seconds):
    def slowly(*args, **options):
        if dist.get_rank() == rank:
            time.sleep(seconds)
        result = function(*args, **options)
        note(function.__name__)
        return result
    return slowly

def note(what):
    with (Path(sys.argv[-1]).parent / f"rank{dist.get_rank()}").open("a") as file:
        file.write(f"{time.time()} {what}\\n")

loop.validate = slow(loop.validate, 1, 6.0)
export.save_file = slow(export.save_file, 0, 0.5)
export._whole = slow(export._whole, 1, 0.0)
export.FILE_BYTES = 100_000
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_a_rank_that_is_slow_outside_of_steps_is_waited_for(
    recipe: WriteRecipe, world: Path, tmp_path: Path
) -> None:
    """An evaluation takes longer than run.timeout; and no gather waits while rank 0 writes."""
    evaluation = {"eval.path": str(world / "traces.jsonl"), "eval.every": 2}
    path = recipe("run", {"run.timeout": 3, **evaluation})
    job = two_ranks(SLOW, tmp_path, "train", path)
    assert job.returncode == 0, job.stdout
    events = {rank: (tmp_path / f"rank{rank}").read_text().split("\n") for rank in (0, 1)}
    notes = [[line.split() for line in events[rank] if line] for rank in (0, 1)]
    assert [what for _, what in notes[1]].count("validate") == 3
    gathered = [float(at) for at, what in notes[1] if what == "_whole"]
    written = [float(at) for at, what in notes[0] if what == "save_file"]
    assert len(written) > 3
    waits = [later - earlier for earlier, later in pairwise(gathered)]
    assert sum(wait > 0.4 for wait in waits) == len(written) - 1  # one wait for each further file
