"""What a run measures, step by step: metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from redi.engine.train.trackers import Tracker

# Written of the same step at every attempt, but never equal: wall-clock and memory.
TIMINGS = ("seconds", "tokens_per_s", "peak_memory_gib")


class MetricsLog:
    """metrics.jsonl: a line a step, and lines with `event`. Rank 0 writes, the others do nothing.

    Args:
        path: the file; it is continued.
        last_step: lines of later steps (and half a line that a killed run left) are cut off, and
            the evaluation after this one, which is done again: it may have been broken off.
        trackers: take every line too.
        active: whether this rank writes.
    """

    def __init__(
        self, path: Path, last_step: int, trackers: Sequence[Tracker], *, active: bool
    ) -> None:
        self._file = None
        self._trackers = trackers
        if not active:
            return
        if path.exists():
            # Nothing is kept of an attempt that left no checkpoint: not even what preceded step 1.
            kept = [
                line
                for line in read_metrics(path)
                if last_step and (line["step"], line.get("event") == "eval") <= (last_step, False)
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

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _encode(line: dict[str, Any]) -> str:
    # JSON knows no NaN; a step that has one ends the run and is still written.
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
    }
    return json.dumps(plain) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, in order."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # half a line: nothing was written behind it
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the card, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
