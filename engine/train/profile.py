"""`[run] profile`: a trace of some steps on rank 0, and a table of their largest parts."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from redi.engine.console import Console
from redi.engine.distributed import World

FOLDER = "profile"
TOP = 40
"""Operations in the table."""
PREFIX = "redi."
"""Of the names of a step's parts, set by `record_function` where they run."""
INSIDE = {"loss": "forward"}
"""Parts that are inside another one."""


@contextmanager
def profiling(
    steps: range | None, total: int, run_dir: Path, world: World, console: Console
) -> Iterator[Profile]:
    """Within the context, profile `steps` on rank 0; if it is left early, those done so far.

    After an error nothing is written.

    Args:
        total: the run's last step.
    """
    wanted = range(steps.start, min(steps.stop, total + 1)) if steps else range(0)
    profiled = Profile(wanted, run_dir / FOLDER, world, console)
    try:
        yield profiled
        profiled.before(None)
    finally:
        profiled.abandon()


class Profile:
    """Starts and stops the profiler between steps; without steps to profile it does nothing.

    The other ranks wait while rank 0 writes: that may take longer than a collective's timeout.
    """

    def __init__(self, steps: range, folder: Path, world: World, console: Console) -> None:
        self._steps = steps
        self._folder = folder
        self._world = world
        self._on_cuda = world.device.type == "cuda"
        self._console = console
        self._profiler: profile | None = None
        self._step: record_function | None = None
        self._done: list[int] = []
        self._written = False  # on every rank, though only rank 0 writes
        self._began = 0.0

    def before(self, step: int | None) -> None:
        """Call it before a step's data are fetched, and with None after the last step. Collective.

        Args:
            step: equal on every rank.
        """
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
        if step is None or step not in self._steps:
            if self._done and not self._written:
                if self._profiler is not None:
                    self._stop(self._profiler)
                self._written = True
                self._world.after_rank0()
            return
        self._done.append(step)
        if not self._world.is_main:
            return
        if self._profiler is None:
            self._start()
        self._step = record_function(f"{PREFIX}step {step}")
        self._step.__enter__()

    def abandon(self) -> None:
        """Stop a profiler that still runs, and write nothing."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
        if self._profiler is not None:
            self._profiler.stop()
            if self._on_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
        self._step = self._profiler = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._on_cuda:
            torch.cuda.synchronize()  # kernels of earlier steps are not in the trace
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._began = time.perf_counter()

    def _stop(self, profiler: profile) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        profiler.stop()
        self._profiler = None
        self._folder.mkdir(exist_ok=True)
        base = self._folder / f"steps-{self._done[0]}-{self._done[-1]}"
        trace, table = base.with_suffix(".trace.json.gz"), base.with_suffix(".md")
        # The name has to end in .gz; a killed run leaves no incomplete trace under the real one.
        partial = base.with_suffix(".partial.gz")
        profiler.export_chrome_trace(str(partial))
        os.replace(partial, trace)
        if self._on_cuda:
            torch.cuda.memory._dump_snapshot(str(base.with_suffix(".memory.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        table.write_text(self._table(profiler.key_averages(), seconds), encoding="utf-8")
        files = ", ".join(str(path) for path in sorted(self._folder.glob(f"{base.name}.*")))
        self._console.say(f"profile of steps {self._done[0]} to {self._done[-1]}: {files}")

    def _table(self, events: Any, seconds: float) -> str:
        """The parts of the steps by host time, and the operations by self time, in Markdown."""
        steps = f"steps {self._done[0]} to {self._done[-1]}"
        lines = [f"# Profile of {steps}, rank 0", "", f"{seconds:.3f} s with the profiler on.", ""]
        lines += ["| part | times | host, s | share |", "|---|---:|---:|---:|"]
        found = {
            event.key.removeprefix(PREFIX): event
            for event in events
            if event.key.startswith(PREFIX) and not event.key.startswith(f"{PREFIX}step ")
        }
        rest = seconds
        for name, event in sorted(found.items(), key=lambda item: -item[1].cpu_time_total):
            spent = event.cpu_time_total / 1e6
            label = f"{name} (in {INSIDE[name]})" if name in INSIDE else name
            rest -= 0.0 if name in INSIDE else spent
            lines.append(f"| {label} | {event.count} | {spent:.3f} | {spent / seconds:.1%} |")
        lines.append(f"| rest: saving, evaluating, logging | | {rest:.3f} | {rest / seconds:.1%} |")
        if self._on_cuda:
            lines += ["", "Host time: the host queues kernels, and waits for them in metrics."]
        lines += ["", *self._operations(events, "CPU", "self_cpu_time_total", seconds)]
        if self._on_cuda:
            lines += ["", *self._operations(events, "GPU", "self_device_time_total", seconds)]
        return "\n".join(lines) + "\n"

    def _operations(self, events: Any, where: str, key: str, seconds: float) -> list[str]:
        calls: Counter[str] = Counter()
        spent: Counter[str] = Counter()
        for event in events:
            if not event.key.startswith(PREFIX):
                # FSDP's ranges have the module's name, in parentheses: all modules are one row.
                name = event.key.partition(" (")[0][:80].replace("|", "\\|")
                calls[name] += event.count
                spent[name] += getattr(event, key)
        lines = [f"| operation | calls | {where}, s without inner ones | share |"]
        lines.append("|---|---:|---:|---:|")
        for name, microseconds in spent.most_common(TOP):
            own = microseconds / 1e6
            lines.append(f"| {name} | {calls[name]} | {own:.4f} | {own / seconds:.1%} |")
        return lines
