"""What people read while a command runs: lines, tables and one progress line, all on stderr.

stdout stays free for what a command was asked for (a path, a result). Off a terminal everything is
plain lines; `--quiet` leaves only warnings and errors.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable, Sequence
from typing import IO, Any

from tqdm import tqdm

PLAIN_SECONDS = 10.0
"""Seconds between progress lines where the output is no terminal."""


class Console:
    """Speaks for rank 0.

    Args:
        active: whether this process speaks at all.
        quiet: only warnings.
    """

    def __init__(self, active: bool = True, quiet: bool = False) -> None:
        self.active = active
        self.shows = active and not quiet
        self.is_terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """A line, above the progress line if there is one."""
        if self.shows:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def warn(self, text: str) -> None:
        """A line that `--quiet` does not hide."""
        if self.active:
            tqdm.write(f"warning: {text}", file=sys.stderr)
            sys.stderr.flush()

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table; see `print_table`."""
        if self.shows:
            print_table(title, columns, rows, file=sys.stderr)

    def bar(self, what: str, unit: str) -> tqdm:
        """A counter of unknown end, on a terminal only."""
        return tqdm(desc=what, unit=f" {unit}", disable=not (self.shows and self.is_terminal))

    def count(self, what: str, unit: str, total: int) -> Count:
        """A counter towards `total`."""
        return Count(self, what, unit, total)

    def steps(self, total: int, done: int) -> Progress:
        """The progress of training, from step `done` to `total`."""
        return Progress(self, total, done)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], file: IO[str]
) -> None:
    """Print a table to `file`; where that is no terminal, without styles and never cut off.

    Args:
        title, columns: empty ones are left out.
        rows: one text for each column; a column of figures alone is set flush right.
    """
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns), pad_edge=False)
    lines = list(rows)
    for name, cells in zip(columns, zip(*lines, strict=True), strict=True):
        figures = all(cell[:1] in "+-0123456789" for cell in cells)
        table.add_column(name, justify="right" if figures else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    text = io.StringIO()
    width = None if file.isatty() else 120
    terminal = file.isatty()
    console = RichConsole(
        file=text, force_terminal=terminal, width=width, highlight=False, markup=False
    )
    console.print(table)
    shown = [title, *(line.rstrip() for line in text.getvalue().splitlines())]
    print("\n".join(filter(None, shown)), file=file, flush=True)


class Count:
    """A counter with a known end: a bar on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, console: Console, what: str, unit: str, total: int) -> None:
        self._console = console
        self._what = f"{what}: {{:,}} of {total:,} {unit}"
        self._last = time.monotonic()
        shows_bar = console.shows and console.is_terminal
        self._bar = tqdm(desc=what, unit=f" {unit}", total=total, disable=not shows_bar)
        self._done = 0

    def update(self, more: int) -> None:
        """So many more are done."""
        self._done += more
        self._bar.update(more)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last > PLAIN_SECONDS:
            self._last = now
            self._console.say(self._what.format(self._done))

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class Progress:
    """One progress line on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._plain = console.shows and not console.is_terminal
        self._total = total
        self._first = done + 1
        self._after_first = self._last = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not (console.shows and console.is_terminal),
            dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt} {bar:12} {postfix}",
        )

    def step(self, line: dict[str, Any]) -> None:
        """Show a step's metrics, and from the second one on the time left.

        The first takes longer: libraries compile and warm up, and held-out traces come before it.
        """
        now, step = time.monotonic(), line["step"]
        figures = [f"loss {line['loss']:.4f}"]
        for name, key in (("logp+", "positive_logp"), ("logp-", "negative_logp")):
            if line[key] is not None:
                figures.append(f"{name} {line[key]:.3f}")
        figures.append(f"{line['tokens_per_s']:,.0f} tok/s")
        if step == self._first:
            self._after_first = now
        else:
            seconds = (now - self._after_first) / (step - self._first) * (self._total - step)
            figures.append(f"left {tqdm.format_interval(seconds)}")
        self._bar.set_postfix_str("  ".join(figures), refresh=False)
        self._bar.update()
        at_end = step in (self._first, self._total)
        if self._plain and (at_end or now - self._last > PLAIN_SECONDS):
            self._last = now
            print("  ".join([f"step {step}/{self._total}", *figures]), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
