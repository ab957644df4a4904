"""The log of a run's metrics, step by step: metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import record_function

from redi.engine.train.trackers import Tracker

Item = TypeVar("Item")

# Keys whose values differ between attempts at the same step: wall-clock time and memory.
TIMINGS = (
    "seconds",
    "data_seconds",
    "tokens_per_s",
    "model_tflops",
    "mfu",
    "peak_memory_gib",
    "peak_reserved_gib",
    "allocation_retries",
)


class MetricsLog:
    """metrics.jsonl: one line per step, and lines with `event`. Only rank 0 writes.

    Args:
        path: the file; it is appended to.
        last_step: step of the checkpoint. Lines of later steps are removed, as is an incomplete
            line of a killed run. The evaluation after `last_step` and its samples are removed too,
            and repeated, because they may have been interrupted.
        trackers: get every line too.
        active: True if this rank writes.
    """

    def __init__(
        self, path: Path, last_step: int, trackers: Sequence[Tracker], *, active: bool
    ) -> None:
        self._file = None
        self._trackers = trackers
        if not active:
            return
        if path.exists():
            # Without a checkpoint no line is kept, not even those from before step 1.
            kept = [
                line
                for line in read_metrics(path)
                if last_step
                and (line["step"], line.get("event") in ("eval", "samples")) <= (last_step, False)
            ]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(map(_encode, kept)), encoding="utf-8")
            os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and flush it."""
        if self._file:
            self._file.write(_encode(line))
            self._file.flush()
        for tracker in self._trackers:
            tracker.write(line)

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Give the trackers the lines of samples.jsonl of a step."""
        for tracker in self._trackers:
            tracker.write_samples(step, samples)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _encode(line: dict[str, Any]) -> str:
    # JSON has no NaN or infinity; a step with such a value is written with null.
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
    }
    return json.dumps(plain) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, in order."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # an incomplete line is always the last
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def memory_figures(device: torch.device) -> dict[str, float]:
    """Memory of this process since the run's start, by key of the metrics.

    peak_memory_gib is what tensors held on the GPU at most, or what was resident on the host. On
    CUDA also peak_reserved_gib, which includes the allocator's unused memory, and
    allocation_retries, how often the allocator had to free that to serve a request (slow: lower
    `train.row_tokens`).
    """
    if device.type == "cuda":
        found = torch.cuda.memory_stats(device)
        return {
            "peak_memory_gib": found["allocated_bytes.all.peak"] / 2**30,
            "peak_reserved_gib": found["reserved_bytes.all.peak"] / 2**30,
            "allocation_retries": found["num_alloc_retries"],
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def timed(items: Iterator[Item]) -> Iterator[tuple[Item, float]]:
    """Each item, and the seconds that this thread waited for it."""
    while True:
        began = time.perf_counter()
        with record_function("redi.data"):
            item = next(items, None)
        if item is None:
            return
        yield item, time.perf_counter() - began
