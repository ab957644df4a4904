"""What `redi evaluate` shows: progress on stderr, the table on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from redi.engine.console import PLAIN_SECONDS, Console, print_table


class EvaluateProgress:
    """One progress line on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        """`done` of `total` samples were made by an earlier attempt."""
        self._console = console
        self._total, self._first, self._done = total, done, done
        self._correct = self._tokens = 0
        self._began = self._last = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not (console.shows and console.is_terminal),
            dynamic_ncols=True,
            bar_format="sample {n_fmt}/{total_fmt} {bar:12} {postfix} left {remaining}",
        )

    def batch(self, lines: Sequence[dict[str, Any]]) -> None:
        """Show a batch of lines of samples.jsonl. Accuracy is that of this attempt so far."""
        self._done += len(lines)
        self._correct += sum(line["traces"][0]["correct"] for line in lines)
        self._tokens += sum(line["tokens"] for line in lines)
        now = time.monotonic()
        made, seconds = self._done - self._first, max(now - self._began, 1e-9)
        figures = f"accuracy {self._correct / made:.3f}  {self._tokens / seconds:,.0f} tok/s"
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(len(lines))
        at_end = made == len(lines) or self._done == self._total
        if not self._console.is_terminal and (at_end or now - self._last > PLAIN_SECONDS):
            self._last = now
            left = tqdm.format_interval((self._total - self._done) * seconds / made)
            self._console.say(f"sample {self._done}/{self._total}  {figures}  left {left}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def print_scores(benchmarks: Sequence[dict[str, Any]]) -> None:
    """The benchmarks of summary.json as a table in per cent, on stdout."""
    ks = [k for k in benchmarks[0]["pass_at"] if k != 1]
    columns = ("data", "problems", "samples", "pass@1", "+-")
    rows = [
        (
            Path(row["name"]).name,
            f"{row['problems']:,}",
            str(row["samples"]),
            _percent(row["pass_at_1"]),
            f"{_percent(row['sem_over_samples'])} | {_percent(row['sem_over_problems'])}",
            *(_percent(row["pass_at"][k]) for k in ks),
            _percent(row["truncated"]),
            f"{row['mean_tokens']:,.0f}",
        )
        for row in benchmarks
    ]
    print_table(
        "per cent; +-: standard error over samples | over problems",
        (*columns, *(f"pass@{k}" for k in ks), "cut off", "tokens"),
        rows,
        file=sys.stdout,
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
