"""What `redi evaluate` shows: progress on stderr, the table on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm


def say(text: str) -> None:
    """A plain line on stderr."""
    print(text, file=sys.stderr, flush=True)


class EvaluateProgress:
    """One progress line on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, total: int, done: int) -> None:
        """`done` of `total` samples were made by an earlier attempt."""
        self._terminal = sys.stderr.isatty()
        self._total, self._start, self._done = total, done, done
        self._correct = self._tokens = 0
        self._began = time.monotonic()
        self._last = self._began
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="sample",
            disable=not self._terminal,
            dynamic_ncols=True,
        )

    def batch(self, lines: Sequence[dict[str, Any]]) -> None:
        """Show a batch of lines of samples.jsonl. Accuracy is that of this attempt so far."""
        self._done += len(lines)
        self._correct += sum(line["correct"] for line in lines)
        self._tokens += sum(line["tokens"] for line in lines)
        now = time.monotonic()
        made, seconds = self._done - self._start, max(now - self._began, 1e-9)
        accuracy, speed = f"{self._correct / made:.3f}", f"{self._tokens / seconds:,.0f}"
        self._bar.set_postfix({"accuracy": accuracy, "tok/s": speed}, refresh=False)
        self._bar.update(len(lines))
        if not self._terminal and (now - self._last > 10 or self._done == self._total):
            self._last = now
            left = tqdm.format_interval((self._total - self._done) * seconds / made)
            say(f"sample {self._done}/{self._total} accuracy {accuracy} tok/s {speed} left {left}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def print_table(benchmarks: Sequence[dict[str, Any]]) -> None:
    """The benchmarks of summary.json as a table in per cent."""
    table = Table(caption="per cent; +- standard error: over samples | over problems")
    table.add_column("data")
    ks = [k for k in benchmarks[0]["pass_at"] if k != 1]
    columns = ("problems", "samples", "pass@1", "+-", *(f"pass@{k}" for k in ks))
    for name in (*columns, "cut off", "tokens"):
        table.add_column(name, justify="right")
    for row in benchmarks:
        table.add_row(
            row["name"],
            str(row["problems"]),
            str(row["samples"]),
            _percent(row["pass_at_1"]),
            f"{_percent(row['sem_over_samples'])} | {_percent(row['sem_over_problems'])}",
            *(_percent(row["pass_at"][k]) for k in ks),
            _percent(row["truncated"]),
            f"{row['mean_tokens']:,.0f}",
        )
    # Elsewhere than on a terminal rich would fold the table into 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
