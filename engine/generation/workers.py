"""Generation in several worker processes, each with an engine and its own GPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from redi.engine.errors import InputError, RunError
from redi.engine.generation.engines import EngineSettings, Finished, Item, open_engine
from redi.engine.generation.processes import end_with_parent

_EXIT_SECONDS = 30.0

Blocks = Iterator[Sequence[Item]]


def generate_items(
    settings: EngineSettings, items: Sequence[Item], workers: int = 1
) -> Iterator[list[Finished]]:
    """Complete all requests and yield completions as they finish, in any order.

    transformers with one worker runs in this process. Otherwise each worker is a process; vLLM gets
    an equal share of the requests at once, transformers one batch after another. The batches are
    the same for any number of workers, so the completions are, too.

    Args:
        settings: of each worker's engine.
        items: requests with numbers, longest prompt first.
        workers: number of engines. On CUDA, worker n uses the n-th `tensor_parallel` visible GPUs.

    Raises:
        InputError: the model cannot be loaded.
        RunError: a worker failed or was killed. The completions so far are valid.
    """
    if settings.kind == "transformers" and workers == 1:
        yield from open_engine(settings)(items)
        return
    running: list[_Worker] = []
    try:
        for number, blocks in enumerate(_dealt(settings, items, workers)):
            running.append(_start(settings, number, workers, blocks))
        yield from _completed(running)
        for worker in running:
            worker.process.join(_EXIT_SECONDS)
    finally:
        for worker in running:
            worker.kill()


def _dealt(settings: EngineSettings, items: Sequence[Item], workers: int) -> list[Blocks]:
    """The requests of each worker, in blocks that its engine gets at once; no worker has none."""
    if settings.kind == "vllm":
        return [iter([items[first::workers]]) for first in range(min(workers, len(items)))]
    size = settings.batch_size
    blocks = [items[first : first + size] for first in range(0, len(items), size)]
    shared = iter(blocks)  # a worker that is free takes the next one
    return [shared] * min(workers, len(blocks))


@dataclass(frozen=True)
class _Worker:
    number: int
    process: ForkServerProcess
    connection: Connection
    blocks: Blocks
    """Of requests that it has not got."""

    def lost(self) -> RunError:
        """The error of a worker that has ended too early."""
        self.process.join(_EXIT_SECONDS)
        code = self.process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else "ended"
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return RunError(f"generation worker {self.number} {how}{memory}; the same command resumes")

    def kill(self) -> None:
        """Kill it, with the processes that it has started."""
        if self.process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _completed(workers: Sequence[_Worker]) -> Iterator[list[Finished]]:
    """Give each worker that is free the next of its blocks, and yield what they complete."""
    by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in workers}
    by_sentinel: dict[Any, _Worker] = {worker.process.sentinel: worker for worker in workers}
    while by_connection:
        ready = wait([*by_connection, *by_sentinel])
        talking = [by_connection[one] for one in ready if one in by_connection]
        if not talking:  # one of its processes may hold the pipe of a worker open
            raise by_sentinel[ready[0]].lost()
        for worker in talking:
            try:
                what, value = worker.connection.recv()
                if what == "free":
                    block = next(worker.blocks, None)
                    worker.connection.send(block)
            except (EOFError, OSError):
                raise worker.lost() from None
            if what == "completions":
                yield value
            elif what != "free":
                raise (InputError if what == "input" else RunError)(value)
            elif block is None:
                del by_connection[worker.connection], by_sentinel[worker.process.sentinel]


def _start(settings: EngineSettings, number: int, workers: int, blocks: Blocks) -> _Worker:
    # A fork of the command could not use CUDA, and threads of the command may hold locks.
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    threads = max(1, torch.get_num_threads() // workers)
    # Not a daemon: vLLM's engine has processes.
    process = context.Process(
        target=_work, args=(theirs, settings, _gpus(settings, number), threads), daemon=False
    )
    process.start()
    theirs.close()
    return _Worker(number, process, ours, blocks)


def _gpus(settings: EngineSettings, number: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a worker; None without CUDA."""
    if settings.kind != "vllm" and torch.device(settings.device).type != "cuda":
        return None
    first = number * settings.tensor_parallel
    wanted = range(first, first + settings.tensor_parallel)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(wanted.stop)]
    return ",".join(names[gpu] for gpu in wanted)


def _work(connection: Connection, settings: EngineSettings, gpus: str | None, threads: int) -> None:
    """Worker process: complete blocks until there are no more."""
    end_with_parent()
    os.dup2(2, 1)  # stdout is for the command's result; libraries print there
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # read when CUDA is used for the first time
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    try:
        generate = open_engine(settings)
        connection.send(("free", None))
        while (block := connection.recv()) is not None:
            for finished in generate(block):
                connection.send(("completions", finished))
            connection.send(("free", None))
    except InputError as error:
        connection.send(("input", str(error)))
    except RunError as error:
        connection.send(("run", str(error)))
    except Exception as error:  # of the engine's libraries
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        connection.send(("run", f"a generation worker failed: {text}; the same command resumes"))
