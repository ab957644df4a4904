"""A command stopped by a signal is distinguishable from a finished one."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
REDI = f"{shlex.quote(sys.executable)} -m redi.engine.cli"


def stop(process: subprocess.Popen[str], when: Callable[[], bool]) -> str:
    """Signal the group of a shell line as soon as `when`; returns its output."""
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    return process.communicate(timeout=120)[1]


def shell(line: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["/bin/sh", "-c", line],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds a shell's child in /proc")
def test_a_stopped_run_is_not_exported_by_the_command_that_follows(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path, metrics = recipe("run", {"train.max_steps": 400}), tmp_path / "run" / "metrics.jsonl"
    process = shell(f"{REDI} train {path} && {REDI} export {tmp_path / 'run'}")

    def has_steps() -> bool:
        return metrics.exists() and metrics.read_text().count('"loss"') >= 3

    said = stop(process, has_steps)
    assert process.returncode == 75, said
    assert "the same command resumes" in said
    assert not list((tmp_path / "run").glob("export*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds a shell's child in /proc")
def test_a_stopped_evaluation_keeps_its_samples_and_does_not_pass_for_done(
    world: Path, tmp_path: Path
) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"prompt": f"{n}=", "answer": "1"}) + "\n" for n in range(200))
    )
    line = f"evaluate {world / 'model'} --data {problems} --out {tmp_path / 'out'}"
    line += " --samples 8 --max_new_tokens 20 --batch_size 8 --checker exact --template none"
    process = shell(f"{REDI} {line} && touch {tmp_path / 'done'}")

    def has_samples() -> bool:
        return any(file.stat().st_size for file in (tmp_path / "out").glob("samples.jsonl*"))

    said = stop(process, has_samples)
    assert process.returncode == 75, said
    assert not (tmp_path / "done").exists()
