"""One rank fails or hangs while the other waits for it: the job ends soon, with one clear line."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

WriteRecipe = Callable[..., Path]

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
    script = folder / "train.py"
    script.write_text(FAULT.format(fault=fault))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    noted = folder / "noted"
    job = subprocess.run(
        [sys.executable, *line, "train", path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FAULTY": str(rank), "NOTED": str(noted)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    return job.returncode, job.stdout, time.time() - float(noted.read_text())


def lines_of_redi(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("redi: ")]


@pytest.mark.parametrize("rank", [0, 1])
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


RAISES = """
import sys
import torch.distributed as dist
from redi.engine.distributed import join_world

try:
    with join_world():
        raise RuntimeError("in the body")
except RuntimeError:
    print("still there" if dist.is_initialized() else "destroyed", flush=True)
import os
os._exit(0)
"""


def test_the_group_is_not_destroyed_when_the_body_raises(tmp_path: Path) -> None:
    """Destroying it waits for the other ranks."""
    script = tmp_path / "raises.py"
    script.write_text(RAISES)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    output = subprocess.run([*line, script], text=True, capture_output=True, timeout=300)
    assert output.stdout.split("\n")[:-1] == ["still there"] * 2, output.stderr
