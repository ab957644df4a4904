"""Signals at awkward moments, killed ranks and full disks: all are reported, and runs resume.

Only Linux: ranks are found in /proc.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import Run, free_port, ranks
from run_cases import has_steps, untimed

from redi.engine.cli import main
from redi.engine.distributed import _own_store
from redi.engine.train import run as run_module
from redi.engine.train.checkpoint import complete_checkpoints
from redi.engine.train.prepare_data import PreparedData
from redi.engine.train.run_lock import RunLock

WriteRecipe = Callable[..., Path]

STEPS = 12
SOON = 20.0
"""Maximum seconds from a signal to the end of a run of the small model."""
RESUMES = "the same command resumes"


@pytest.fixture(scope="module")
def settings(world: Path) -> dict[str, Any]:
    """Evaluations of many small packs, long enough to be interrupted."""
    return {
        "train.max_steps": STEPS,
        "train.batch": 4,
        "train.row_tokens": 96,
        "run.save_every": 4,
        "eval.path": str(world / "traces.jsonl"),
        "eval.every": 6,
    }


@pytest.fixture(scope="module")
def undisturbed(
    write_recipe: WriteRecipe, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run directory of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["train", str(write_recipe(folder, "run", settings))]) == 0
    return folder / "run"


@pytest.fixture
def path(recipe: WriteRecipe, settings: dict[str, Any]) -> Path:
    """The same recipe in the test's directory."""
    return recipe("run", settings)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the values that differ between runs."""
    found = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return untimed(found)


def same(run_dir: Path, other: Path) -> bool:
    weights = [folder / "export" / "model.safetensors" for folder in (run_dir, other)]
    return lines(run_dir) == lines(other) and weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture(scope="module")
def on_two_ranks(
    write_recipe: WriteRecipe, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As `undisturbed`, on two ranks."""
    folder = tmp_path_factory.mktemp("on_two_ranks")
    train_on_two_ranks(write_recipe(folder, "run", settings), folder)
    return folder / "run"


def train_on_two_ranks(path: Path, folder: Path) -> None:
    for run in ranks(2, "train", path, log=folder / "ranks"):
        assert run.end() == 0, run.stderr


def torchrun(path: Path, *options: str, log: Path) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "torch.distributed.run", *options]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*line, "-m", "redi.engine.cli", "train", str(path)],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


ALONE = ("--standalone", "--nproc-per-node=2")


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def rank_pid(agent: int, rank: int) -> int:
    """The process id of a rank, given that of its torchrun."""
    (found,) = (
        pid
        for pid in children(agent)
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    return found


def wait_for(condition: Callable[[], bool], agent: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        assert agent.poll() is None or condition(), log.read_text()
        time.sleep(0.005)


@pytest.mark.slow
def test_a_signal_interrupts_an_evaluation_and_a_resume_repeats_it(
    path: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run = Run("train", path, log=tmp_path / "log")
    run.wait_for(lambda: has_steps(run_dir, 6))
    run.send(signal.SIGTERM)
    assert run.end(SOON) == 75, run.stderr
    last = lines(run_dir)[-1]
    assert (last["step"], "loss" in last) == (6, True), "it was not during the evaluation"
    assert sorted(complete_checkpoints(run_dir)) == [4, 6]
    assert f"stopped after step 6 of {STEPS}, saved in {run_dir}; {RESUMES}" in run.stderr
    assert main(["train", str(path)]) == 0
    assert same(run_dir, undisturbed)


@pytest.mark.parametrize(("command", "code"), [("train", 75), ("doctor", 75)])
def test_ctrl_c_in_code_made_from_text_ends_with_the_exit_code_that_is_documented(
    command: str, code: int, tmp_path: Path
) -> None:
    """Imports run such code, and under -m CPython takes the interrupt for unhandled."""
    (tmp_path / "interrupted.py").write_text(
        "import signal, sys\n"
        "from redi.engine import cli\n"
        # Ignored in processes that a shell started in the background, as may be this test.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def interrupt(*_):\n"
        "    exec('import os, signal; os.kill(os.getpid(), signal.SIGINT)')\n"
        "cli._read_recipes = cli.COMMANDS['doctor'] = interrupt\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    line = [sys.executable, "-m", "interrupted", command]
    done = subprocess.run(line, cwd=tmp_path, text=True, capture_output=True, timeout=SOON)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].startswith(("stopped before", "redi: interrupted"))


@pytest.mark.slow
def test_a_failed_save_is_reported_before_the_next_and_keeps_the_older_one(
    path: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run = Run("train", path, log=tmp_path / "log")
    run.wait_for((run_dir / "checkpoints" / "step-4" / ".metadata").exists)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # a checkpoint has 4 MiB
    assert run.end() == 1
    assert run.stderr.splitlines()[-1] == (
        f"redi: {run_dir}/checkpoints/step-8 could not be saved ([Errno 27] File too large); "
        f"older checkpoints are intact, {RESUMES} from the newest"
    )
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-4"]
    assert not has_steps(run_dir, STEPS), "it was reported only at the end"
    assert main(["train", str(path)]) == 0
    assert same(run_dir, undisturbed)


def test_an_unwritable_run_directory_is_reported_before_data_is_read(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    changes = {"run.dir": str(tmp_path / "file" / "run"), "data.cache": str(tmp_path / "cache")}
    assert main(["train", str(recipe("run", changes))]) == 2
    said = (
        f"redi: run.dir: {tmp_path}/file/run cannot be written: {tmp_path}/file: Not a directory\n"
    )
    assert capsys.readouterr().err == said
    assert not (tmp_path / "cache").exists()


def test_ranks_that_are_started_again_read_nothing_of_those_before() -> None:
    """torchrun gives every attempt the same store."""
    shared = dist.HashStore()
    shared.set("start", "of ranks that died early")

    def start(*order: int) -> list[dist.Store]:
        with ThreadPoolExecutor(3) as pool:
            stores = {rank: pool.submit(_own_store, shared, rank, 3) for rank in order}
            return [store.result(30) for store in stores.values()]

    for attempt in (start(0, 1, 2), start(1, 2, 0), start(2, 0, 1)):
        assert not any(store.check(["left"]) for store in attempt)
        attempt[1].set("left", "")
        assert all(store.check(["left"]) for store in attempt)


def slow_to_tokenize(world: Path, folder: Path) -> dict[str, Any]:
    """A data set that the run tokenizes, which takes some seconds."""
    rows = (world / "traces.jsonl").read_text().splitlines()
    many = [row.replace('"id": "', f'"id": "{n}-') for n in range(150) for row in rows]
    (folder / "many.jsonl").write_text("\n".join(many))
    return {"data.path": str(folder / "many.jsonl"), "data.cache": str(folder / "cache")}


def tokenizes(folder: Path) -> bool:
    return any(folder.glob("cache/*/*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_tokenizing_ends_at_once_and_leaves_no_run(
    number: int, recipe: WriteRecipe, world: Path, tmp_path: Path
) -> None:
    path = recipe("run", slow_to_tokenize(world, tmp_path))
    run = Run("train", path, log=tmp_path / "log")
    run.wait_for(lambda: tokenizes(tmp_path))
    run.send(number, number)
    assert run.end(SOON) == 75, run.stderr
    assert run.stderr == "stopped before training started; the same command resumes\n"
    assert not tokenizes(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_kill_while_tokenizing_leaves_no_process(
    recipe: WriteRecipe, world: Path, tmp_path: Path
) -> None:
    changes = slow_to_tokenize(world, tmp_path) | {"data.processes": 2}
    run = Run("train", recipe("run", changes), log=tmp_path / "log")
    run.wait_for(lambda: tokenizes(tmp_path) and len(children(run.pid)) >= 2)
    left = children(run.pid)
    run.kill()
    deadline = time.monotonic() + SOON
    while left := [pid for pid in left if is_alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_while_rank_0_tokenizes_ends_both(
    rank: int, recipe: WriteRecipe, world: Path, tmp_path: Path
) -> None:
    path, log = recipe("run", slow_to_tokenize(world, tmp_path)), tmp_path / "log"
    agent = torchrun(path, *ALONE, log=log)
    wait_for(lambda: tokenizes(tmp_path), agent, log)
    os.kill(rank_pid(agent.pid, rank), signal.SIGTERM)
    assert agent.wait(600) == 1, log.read_text()  # torchrun's own
    said = log.read_text()
    assert said.count("stopped before") + said.count("stopped after step 0 of") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the model is loaded": lambda d: "attention:" in (d / "log").read_text(),
    "the first evaluation": lambda d: (d / "run" / "metrics.jsonl").exists(),
    "a checkpoint is written": lambda d: (d / "run" / "checkpoints" / "step-8").exists(),
    "the last step": lambda d: has_steps(d / "run", STEPS),
    "the export": lambda d: (d / "run" / "export.partial").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_ends_soon_and_the_same_command_ends_the_same(
    moment: str, path: Path, undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "log").touch()
    run = Run("train", path, log=tmp_path / "log")
    run.wait_for(lambda: MOMENTS[moment](tmp_path))
    run.send(signal.SIGTERM)
    code = run.end(SOON)
    if moment == "the export" and "done" in run.stderr:
        assert code == 0, run.stderr
    else:
        assert code == 75, run.stderr
        assert "stopped" in run.stderr
    assert "Traceback" not in run.stderr
    assert main(["train", str(path)]) == 0
    assert same(tmp_path / "run", undisturbed)


def catches(pid: int, number: signal.Signals) -> bool:
    """True if a process has a handler for a signal."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_ctrl_c_while_it_starts_is_no_traceback(path: Path) -> None:
    line = [sys.executable, "-m", "redi.engine.cli", "train", str(path)]
    for seconds in (0.0, 1.0, 3.0):
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
        while not catches(process.pid, signal.SIGTERM):  # Python has no handler by default
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert process.wait(SOON) == 75
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1].startswith("stopped ")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("size=7m")`: a file system of that size, or resized."""
    folder = tmp_path / "disk"

    def mount(options: str) -> Path:
        if folder.exists():
            subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
            return folder
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder])
        if mounted.returncode:
            pytest.skip("mounting is not permitted here")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", folder], check=False)


FULL = {
    # what does not fit: (size of the disk, steps between checkpoints of 4.1 MiB, said)
    "a checkpoint": ("7m", 4, "step-8 could not be saved ([Errno 28] No space left on device)"),
    "the metrics": ("7m", 100, "No space left on device"),
    "the export": ("9m", 6, "No space left on device"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_reported_and_with_more_space_the_run_resumes(
    what: str,
    recipe: WriteRecipe,
    settings: dict[str, Any],
    undisturbed: Path,
    small_disk: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    size, save_every, said = FULL[what]
    disk = small_disk(f"size={size}")
    changes = {"run.dir": str(disk / "run"), "run.save_every": save_every}
    path = recipe("run", settings | changes)
    run = Run("train", path, log=tmp_path / "log")
    if what == "the metrics":
        run.wait_for(lambda: has_steps(disk / "run", 1))
        with (disk / "ballast").open("wb") as file, suppress(OSError):
            file.write(bytes(7 << 20))
    assert run.end() == 1, run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith("redi: ")
    assert said in last
    assert RESUMES in last
    saved = {"a checkpoint": [4], "the metrics": [], "the export": [6, 12]}[what]
    assert sorted(complete_checkpoints(disk / "run")) == saved
    (disk / "ballast").unlink(missing_ok=True)
    small_disk("size=64m")
    assert main(["train", str(path)]) == 0
    assert same(disk / "run", undisturbed)


@pytest.mark.slow
def test_a_read_only_disk_is_reported_before_data_is_read(
    recipe: WriteRecipe,
    small_disk: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = small_disk("size=1m,ro")
    changes = {"run.dir": str(disk / "run"), "data.cache": str(tmp_path / "cache")}
    assert main(["train", str(recipe("run", changes))]) == 2
    assert capsys.readouterr().err.endswith(f"cannot be written: {disk}: Read-only file system\n")
    assert not (tmp_path / "cache").exists()
    small_disk("size=1m,rw")
    assert not list(disk.iterdir())


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_alone_ends_all_with_its_cause(
    path: Path, tmp_path: Path
) -> None:
    group = ranks(2, "train", path, log=tmp_path / "log")
    group[0].wait_for((tmp_path / "run" / "checkpoints" / "step-4" / ".metadata").exists)
    resource.prlimit(group[1].pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    assert [run.end() for run in group] == [1, 1]
    said = "".join(run.stderr for run in group)
    assert said.count("step-8 could not be saved ([Errno 27] File too large)") == 1
    assert list(complete_checkpoints(tmp_path / "run")) == [4]


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_by_torchrun(
    path: Path, on_two_ranks: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    agent = torchrun(path, *ALONE, "--max-restarts=2", log=log)
    for rank, count in ((1, 4), (0, 8)):
        wait_for(lambda count=count: has_steps(run_dir, count), agent, log)
        os.kill(rank_pid(agent.pid, rank), signal.SIGKILL)
        wait_for(lambda count=count: not has_steps(run_dir, count), agent, log)
    assert agent.wait(600) == 0, log.read_text()
    assert same(run_dir, on_two_ranks)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_same_command_resumes(
    path: Path, on_two_ranks: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    agent = torchrun(path, *ALONE, log=log)
    wait_for(lambda: has_steps(run_dir, 5), agent, log)
    os.kill(rank_pid(agent.pid, 1), signal.SIGKILL)
    assert agent.wait(120) == 1
    assert "redi: another rank was lost" in log.read_text()
    train_on_two_ranks(path, tmp_path)
    assert same(run_dir, on_two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "to"),
    [
        ("the first evaluation", "agent"),
        ("a checkpoint is written", "ranks"),
        ("a checkpoint is written", "agent and ranks"),
    ],
)
def test_a_signal_under_torchrun_saves_soon_and_the_same_command_resumes(
    moment: str, to: str, path: Path, on_two_ranks: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    agent = torchrun(path, *ALONE, log=log)
    wait_for(lambda: MOMENTS[moment](tmp_path), agent, log)
    targets = {"agent": [agent.pid], "ranks": [rank_pid(agent.pid, rank) for rank in (0, 1)]}
    for pid in (pid for name, found in targets.items() if name in to for pid in found):
        os.kill(pid, signal.SIGTERM)
    code = agent.wait(SOON)
    assert code == 1, log.read_text()  # torchrun's own: a rank exited with another code than 0
    assert "stopped after step" in log.read_text()
    assert not (run_dir / "export").exists()
    stopped = max(complete_checkpoints(run_dir), default=0)
    assert not has_steps(run_dir, stopped + 1)
    train_on_two_ranks(path, tmp_path)
    assert same(run_dir, on_two_ranks)


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_nodes_and_outlives_a_rank(
    path: Path, on_two_ranks: Path, tmp_path: Path
) -> None:
    """Both nodes are this machine, and SLURM is two lines of shell; torchrun is real."""
    slurm = {
        "srun": "while [[ $1 = -* ]]; do shift; done; "
        'for node in 1 2; do "$@" & done; wait -n && wait -n',
        "scontrol": "echo localhost",
    }
    for name, text in slurm.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    with log.open("ab") as file:
        job = subprocess.Popen(
            ["bash", "docs/slurm.sh", str(path)],
            cwd=Path(__file__).parents[3],
            stdout=file,
            stderr=file,
            env={
                **os.environ,
                "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                "PORT": str(free_port()),
                "SLURM_JOB_ID": "1",
                "SLURM_JOB_NODELIST": "two",
                "SLURM_NNODES": "2",
                "SLURM_CPUS_ON_NODE": "1",
                "INTERFACE": "lo",
            },
        )
    wait_for(lambda: has_steps(tmp_path / "run", 5), job, log)
    agents = children(job.pid)
    assert len(agents) == 2
    os.kill(children(agents[1])[0], signal.SIGKILL)
    assert job.wait(600) == 0, log.read_text()
    assert same(tmp_path / "run", on_two_ranks)


def test_a_run_directory_in_which_another_command_trains_is_not_touched(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    path = recipe("run", {"train.max_steps": 1})
    assert main(["train", str(path), "--quiet"]) == 0
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with RunLock() as lock:
        lock.take(run)
        assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"redi: run.dir: another command trains in {run}; wait for its end, or choose another "
        "run.dir\n"
    )
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    assert main(["train", str(path)]) == 0
    assert "finished already" in capsys.readouterr().err


@pytest.mark.parametrize(("ended", "problem"), [(False, "trains in"), (True, "has trained in")])
def test_a_run_directory_that_another_command_makes_meanwhile_is_not_touched(
    ended: bool,
    problem: str,
    recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = recipe("run", {"train.max_steps": 1})
    prepare, run = run_module.prepare_data, tmp_path / "run"
    with RunLock() as lock:

        def meanwhile(*given: Any) -> PreparedData:
            run.mkdir()
            (run / "recipe.toml").write_text("of the other command")
            if not ended:
                lock.take(run)
            return prepare(*given)

        monkeypatch.setattr(run_module, "prepare_data", meanwhile)
        assert main(["train", str(path), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith(f"redi: run.dir: another command {problem} {run}")
    assert [file.read_text() for file in run.iterdir()] == ["of the other command"]


@pytest.mark.slow
def test_the_second_of_two_runs_at_once_ends_and_the_first_is_undisturbed(
    path: Path, undisturbed: Path, tmp_path: Path
) -> None:
    first = Run("train", path, log=tmp_path / "first")
    first.wait_for(lambda: has_steps(tmp_path / "run", 2))
    second = Run("train", path, log=tmp_path / "second")
    assert second.end() == 2
    assert second.stderr.startswith("redi: run.dir: another command trains in")
    assert first.end() == 0
    assert same(tmp_path / "run", undisturbed)
    third = Run("train", path, log=tmp_path / "third")
    assert third.end() == 0
