"""What a run tells: metrics.jsonl, the progress line, the manifest."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

# Written of the same step at every attempt, but never equal: wall-clock and memory.
TIMINGS = ("seconds", "tokens_per_s", "peak_memory_gib")


class MetricsLog:
    """metrics.jsonl: a line a step, and lines with `event`. Rank 0 writes, the others do nothing.

    Args:
        path: the file; it is continued.
        last_step: lines of later steps (and half a line that a killed run left) are cut off.
        active: whether this rank writes.
    """

    def __init__(self, path: Path, last_step: int, active: bool) -> None:
        self._file = None
        if not active:
            return
        if path.exists():
            # Nothing is kept of an attempt that left no checkpoint: not even what preceded step 1.
            kept = [line for line in _lines(path) if last_step and line["step"] <= last_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(map(_encode, kept)), encoding="utf-8")
            os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and flush it."""
        if self._file:
            self._file.write(_encode(line))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


def _encode(line: dict[str, Any]) -> str:
    # JSON knows no NaN; a step that has one ends the run and is still written.
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
    }
    return json.dumps(plain) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # half a line: nothing was written behind it
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Progress:
    """One progress line on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, total: int, done: int, active: bool) -> None:
        self._active = active
        self._terminal = sys.stderr.isatty()
        self._total = total
        self._last = 0.0
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            disable=not (active and self._terminal),
            dynamic_ncols=True,
        )

    def step(self, line: dict[str, Any]) -> None:
        """Show a step's metrics."""
        shown = {
            "loss": f"{line['loss']:.4f}",
            "logp+": _short(line["positive_logp"]),
            "logp-": _short(line["negative_logp"]),
            "tok/s": f"{line['tokens_per_s']:,.0f}",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        done = line["step"] in (1, self._total) or time.monotonic() - self._last > 10
        if self._active and not self._terminal and done:
            self._last = time.monotonic()
            text = " ".join(f"{name} {value}" for name, value in shown.items() if value)
            print(f"step {line['step']}/{self._total} {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the card, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def manifest(world_size: int, device: torch.device, **facts: Any) -> dict[str, Any]:
    """What a run was made with: versions, commit, machine, and the hashes given as `facts`."""
    packages = ("redi-engine", "torch", "transformers", "triton", "flash-attn", "liger-kernel")
    return {
        "versions": {name: v for name in packages if (v := _version(name))},
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The engine's git commit, when it runs from a checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
