"""Ranks on a file system that shows files of other machines late."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import free_port

from redi.engine import distributed
from redi.engine.distributed import await_files
from redi.engine.errors import RunError

LATE = """
import sys, time
path, size = sys.argv[1], int(sys.argv[2])
time.sleep(0.5)
with open(path, "wb", buffering=0) as file:
    file.write(bytes(size // 2))
    time.sleep(0.5)
    file.write(bytes(size - size // 2))
"""


def test_a_file_of_another_process_is_awaited_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "late"
    with subprocess.Popen([sys.executable, "-c", LATE, str(path), "1000"]):
        await_files({path: 1000}, rank=3)
        assert path.stat().st_size == 1000


def test_a_file_that_stays_invisible_is_named_with_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "VISIBLE_SECONDS", 0.5)
    path = tmp_path / "never" / "model.safetensors"
    with pytest.raises(RunError) as caught:
        await_files({path: 1000}, rank=3)
    assert str(caught.value).startswith(f"rank 3: {path}: not visible after ")
    assert "\n" not in str(caught.value)


def mirror(here: Path, there: Path, stop: threading.Event) -> None:
    """Copy new files a second late, largest last, as the other machine would see them."""
    while not stop.wait(1.0):
        for file in sorted((f for f in here.rglob("*") if f.is_file()), key=lambda f: f.name):
            copy = there / file.relative_to(here)
            if "partial" in str(file) or file.suffix == ".tmp" or copy.exists():
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


COUNTING = """
import json, os, sys
import redi.engine.train.prepare_data as prepare_data
from redi.engine.cli import main

tokenize, calls = prepare_data.tokenize, []
prepare_data.tokenize = lambda *args, **kwargs: calls.append(args) or tokenize(*args, **kwargs)
code = main(sys.argv[1:])
with open("calls.json", "w") as file:
    json.dump(len(calls), file)
raise SystemExit(code)
"""


@pytest.mark.slow
def test_two_stages_run_on_two_machines_of_which_one_sees_files_late(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Each rank has a working directory, and with it a token cache and run folders, of its own."""
    relative = {"data.cache": "cache", "train.max_steps": 2, "run.save_every": 100}
    stages = [
        recipe("sft", relative | {"run.dir": "runs/sft"}),
        recipe("redi", relative | {"run.dir": "runs/redi", "model.path": None}),
    ]
    machines = [tmp_path / f"machine-{rank}" for rank in range(2)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    stop = threading.Event()
    copying = threading.Thread(target=mirror, args=(*machines, stop))
    processes = []
    for rank, machine in enumerate(machines):
        machine.mkdir()
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", COUNTING, "train", *map(str, stages)],
                cwd=machine,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": "0"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    copying.start()
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        stop.set()
        copying.join()
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert (machines[0] / "runs" / "redi" / "export" / "config.json").exists()
    tokenized = [json.loads((machine / "calls.json").read_text()) for machine in machines]
    assert tokenized == [2, 0], "only rank 0 tokenizes or looks for tokens"


COUNTING_SCANS = """
import os, sys
scans = []
sys.addaudithook(lambda event, args: event == "os.scandir" and scans.append(str(args[0])))
from redi.engine.cli import main
code = main(sys.argv[1:])
print(sum(path.endswith("checkpoints/step-2") for path in scans))
raise SystemExit(code)
"""


@pytest.mark.slow
def test_one_rank_of_a_machine_waits_for_the_files_of_a_checkpoint(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A thousand ranks that each look for a thousand files would stall a file server."""
    path = recipe("run", {"optim.schedule": "constant", "run.keep": 0})

    def scans(steps: int) -> list[int]:
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        argv = [sys.executable, "-c", COUNTING_SCANS, "train", path, "--train.max_steps", steps]
        processes = [
            subprocess.Popen(
                list(map(str, argv)),
                env=os.environ
                | shared
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        return [int(process.communicate(timeout=300)[0]) for process in processes]

    scans(2)
    first, second = scans(3)
    assert first > 0, "rank 0 lists them"
    assert second == 0
