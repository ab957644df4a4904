"""Runs of the command `redi` in processes of their own that start at once.

Importing torch and transformers takes seconds. multiprocessing's fork server does it one time;
each run is then a fork of a process that has imported everything and run nothing.
"""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["redi.engine.train.run", "transformers.models.qwen2.modeling_qwen2", "pandas"]
)


class Run:
    """`redi ARGUMENTS`, running.

    Args:
        arguments: of the command.
        log: a file that takes its stderr.
        environment: added to this process's.
    """

    def __init__(
        self, *arguments: object, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        argv = [str(argument) for argument in arguments]
        self._process = _CONTEXT.Process(target=_run, args=(argv, log, dict(environment or {})))
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._log.read_text() if self._log.exists() else ""

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return as soon as it holds; fail if the run ends before."""
        deadline = time.monotonic() + 600
        while not condition():
            assert time.monotonic() < deadline, f"nothing happened for ten minutes\n{self.stderr}"
            assert self._process.is_alive() or condition(), self.stderr
            time.sleep(0.001)

    def send(self, *numbers: int) -> None:
        """Send signals, one behind the other."""
        for number in numbers:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as the kernel does."""
        self._process.kill()
        self._process.join()

    def end(self, seconds: float = 600) -> int:
        """Its exit code, which it must have within `seconds`."""
        self._process.join(seconds)
        if self._process.is_alive():
            self.kill()  # pytest waits for its children
            raise AssertionError(f"still running after {seconds} s\n{self.stderr}")
        assert self._process.exitcode is not None
        return self._process.exitcode


def ranks(count: int, *arguments: object, log: Path) -> list[Run]:
    """A run of several ranks, without torchrun; rank n logs to `log` with n behind."""
    shared = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
    }
    return [
        Run(*arguments, log=log.with_name(f"{log.name}{n}"), environment=shared | {"RANK": str(n)})
        for n in range(count)
    ]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _run(argv: list[str], log: Path, environment: Mapping[str, str]) -> None:
    import torch

    from redi.engine.cli import main

    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    raise SystemExit(main(argv))
