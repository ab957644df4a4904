"""One rank fails or hangs while the other waits for it: the job ends soon, with one clear line."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import ranks
from run_cases import COLLAPSES

from redi.engine.distributed import explained
from redi.engine.errors import RunError

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
    line, options = torchrun(program, folder, *arguments, **environment)
    return subprocess.run(line, **options, timeout=300)


def torchrun(
    program: str, folder: Path, *arguments: object, **environment: str
) -> tuple[list[str], dict[str, Any]]:
    """The command line of a program on two ranks, and its options for `subprocess`."""
    script = folder / "program.py"
    script.write_text(program)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*line, str(script), *map(str, arguments)], {
        "env": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }


def lines_of_redi(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("redi: ")]


@pytest.mark.slow
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


@pytest.mark.slow
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


# `redi train` in which a tracker of rank 0 takes CLOSING seconds to close. Rank 0 notes when that
# began and ended. With FAULTY, rank 0 alone fails in step 3.
SLOW_TO_CLOSE = """
import os, sys, time
from pathlib import Path
from redi.engine import cli
from redi.engine.errors import RunError
from redi.engine.train import loop

class Tracker:
    def write(self, line):
        if line["step"] == 2 and "FAULTY" in os.environ:
            raise RunError("the tracker refuses")
    def close(self):
        note("closing")
        time.sleep(float(os.environ["CLOSING"]))
        note("closed")

def note(what):
    Path(os.environ["NOTES"], what).write_text(str(time.time()))

loop.open_trackers = lambda *_: [Tracker()]
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_if_all_ranks_fail_rank_0_may_close_its_files(recipe: WriteRecipe, tmp_path: Path) -> None:
    """A collapse. Its event gets into the bucket, so that the same command does not continue."""
    bucket = tmp_path / "bucket"
    place = {"run.dir": f"file://{bucket}", "data.cache": str(tmp_path / "cache")}
    path = recipe("run", COLLAPSES | place)
    job = two_ranks(SLOW_TO_CLOSE, tmp_path, "train", path, CLOSING="6", NOTES=str(tmp_path))
    assert job.returncode == 1, job.stdout
    (line,) = lines_of_redi(job.stdout)
    assert "redi: collapse since step " in line
    assert "rank 1" not in line
    assert (tmp_path / "closed").exists(), job.stdout
    last = json.loads((bucket / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["goes_on"]) == ("collapse", False)


@pytest.mark.slow
def test_if_rank_0_fails_alone_the_others_do_not_wait_until_it_has_closed_its_files(
    recipe: WriteRecipe, tmp_path: Path
) -> None:
    line, options = torchrun(
        SLOW_TO_CLOSE,
        tmp_path,
        "train",
        recipe("run"),
        CLOSING="12",
        FAULTY="yes",
        NOTES=str(tmp_path),
    )
    with subprocess.Popen(line, **options) as job:
        assert job.stdout is not None
        output = [(time.time(), text) for text in job.stdout]
    everything = "".join(text for _, text in output)
    assert job.returncode == 1, everything
    failed, closed = (float((tmp_path / name).read_text()) for name in ("closing", "closed"))
    assert closed - failed > 11
    said = [(at, text) for at, text in output if text.startswith("redi: ")]
    assert [text for _, text in said] == ["redi: the tracker refuses\n"], everything
    assert said[0][0] - failed < 3, everything
    # torchrun stops rank 0 because rank 1 has ended.
    stopped = [at for at, text in output if "closing signal SIGTERM" in text]
    assert stopped, everything
    assert stopped[0] - failed < 8, everything


# All connections to the store break once, also that of a watch. Another rank fails afterwards.
RESET = """
import json, os, socket, time
import torch.distributed as dist
from redi.engine.failure import FailureWatch

store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
watch = FailureWatch(store, rank=0, size=2)
for descriptor in os.listdir("/proc/self/fd"):
    try:
        connection = socket.socket(fileno=os.dup(int(descriptor)))
        if connection.getpeername()[1] == store.port:
            connection.shutdown(socket.SHUT_RDWR)
            print("reset")
    except OSError:
        pass
time.sleep(3)
print("healthy", flush=True)
other = dist.TCPStore("localhost", store.port, is_master=False)
other.set("failure", json.dumps({"rank": 1, "line": "redi: the disk is gone", "code": 7}))
time.sleep(20)
"""


@pytest.mark.slow
def test_a_reset_connection_to_the_store_is_made_again() -> None:
    job = subprocess.run([sys.executable, "-c", RESET], text=True, capture_output=True, timeout=60)
    assert job.returncode == 7, job.stderr
    assert job.stdout.split() == ["reset", "reset", "healthy"]
    assert lines_of_redi(job.stderr) == ["redi: rank 1: the disk is gone"]


NCCL = "NCCL error in: /pytorch/torch/csrc/NCCLUtils.cpp:94, {}, NCCL version 2.27.3\n{}\n"


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (
            NCCL.format("remote process exited or there was a network error", "ncclRemoteError:")
            + "Last error:\nsocketProgress: Connection closed by remote peer node-3<40112>",
            "another rank was lost (NCCL error in: ",
        ),
        (
            NCCL.format("unhandled system error", "ncclSystemError: System call failed.")
            + "Last error:\nError while creating shared memory segment /dev/shm/nccl-x (size 9637)",
            "communication between ranks failed (NCCL error in: ",
        ),
    ],
)
def test_an_error_of_nccl_is_one_line_with_its_cause(message: str, what: str) -> None:
    with pytest.raises(RunError) as caught, explained():
        raise dist.DistBackendError(message)
    line = str(caught.value)
    assert line.startswith(what)
    assert message.splitlines()[-1] in line
    assert line.endswith(RESUMES)
    assert "\n" not in line


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
