"""Processes of one gloo group that wait for functions to run together.

A group of processes starts once and serves many tests: starting takes longer than most of them.
"""

import io
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from processes import _CONTEXT

SECONDS = 120  # that a function may take, and a collective may wait


class RankFailed(Exception):
    """A function raised on some ranks; the message has their tracebacks."""


class RankPool:
    """`count` processes, rank i of the default group in the i-th."""

    def __init__(self, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(count):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, count, store, theirs))
            process.start()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """What `function(*arguments, **options)` returns on each rank.

        The function is found by its name, so its module must be importable: not a test module.
        """
        for end in self._ends:
            end.send_bytes(_packed((function, arguments, options)))
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(SECONDS):
                raise RankFailed(f"rank {rank} did not answer within {SECONDS} s")
            answers.append(_unpacked(end.recv_bytes()))
        errors = [f"rank {n}: {error}" for n, (_, error) in enumerate(answers) if error]
        if errors:
            raise RankFailed("\n".join(errors))
        return [value for value, _ in answers]

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _serve(rank: int, count: int, store: str, end: Connection) -> None:
    from datetime import timedelta

    import torch.distributed as dist
    from conftest import poison_memory, speed_up_interpreter

    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    speed_up_interpreter()
    poison_memory(cast(Any, _Setter()))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=SECONDS),
    )
    while True:
        try:
            function, arguments, options = _unpacked(end.recv_bytes())
        except EOFError:
            return
        try:
            answer = function(*arguments, **options), None
        except BaseException:  # the test reports it, whatever it is
            answer = None, traceback.format_exc()
        end.send_bytes(_packed(answer))


class _Setter:
    """Of pytest's monkeypatch what a process needs that does not undo it."""

    setattr = staticmethod(setattr)


def _packed(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
