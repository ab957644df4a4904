"""Console output while a command runs: lines, tables and one progress line, all on stderr.

stdout is reserved for a command's result (a path, a table). If stderr is not a terminal, output is
plain lines. `--quiet` leaves only warnings and errors.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable, Sequence
from typing import IO

from tqdm import tqdm

from redi.engine.output import printable

PLAIN_SECONDS = 10.0
"""Seconds between progress lines if the output is not a terminal."""
_WORD = 20
"""Characters of a word that a narrow table does not break."""


class Console:
    """Prints on rank 0.

    Args:
        active: whether this process prints anything.
        quiet: print only warnings.
    """

    def __init__(self, active: bool = True, quiet: bool = False) -> None:
        self.active = active
        self.shows = active and not quiet
        self.is_terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Print a line, above the progress line if there is one."""
        if self.shows:
            tqdm.write(printable(text), file=sys.stderr)
            sys.stderr.flush()

    def warn(self, text: str) -> None:
        """Print a warning, which `--quiet` does not hide."""
        if self.active:
            tqdm.write(f"warning: {printable(text)}", file=sys.stderr)
            sys.stderr.flush()

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table; see `print_table`."""
        if self.shows:
            print_table(title, columns, rows, file=sys.stderr)

    def progress(self, what: str, total: int, done: int = 0, *, endpoints: bool = True) -> Progress:
        """Start a progress line that counts up to `total`.

        Args:
            what: the counted unit, in the singular.
            total: units in all.
            done: units that an earlier attempt has completed.
            endpoints: whether plain output also shows the first and the last update.
        """
        return Progress(self, what, total, done, endpoints)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], file: IO[str]
) -> None:
    """Print a table to `file`. If that is not a terminal, print without styles and never truncate.

    A table that needs more than the width of the terminal (120 if it is none) is wider: figures
    stay whole, and words up to _WORD characters.

    Args:
        title, columns: empty strings are not printed.
        rows: one string per column. A column of numbers is right-aligned.
        file: an open text file, such as sys.stdout.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console as RichConsole
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns), pad_edge=False)
    title, *columns = map(printable, (title, *columns))
    lines = [[printable(cell) for cell in row] for row in rows]
    for name, cells in zip(columns, zip(*lines, strict=True), strict=True):
        figures = all(cell[:1] in "+-0123456789" for cell in cells)
        longest = max(map(cell_len, " ".join([name, *cells]).split()), default=0)
        table.add_column(
            name,
            justify="right" if figures else "left",
            overflow="fold",
            min_width=longest if figures else min(longest, _WORD),  # else rich drops columns
        )
    for line in lines:
        table.add_row(*line)
    text = io.StringIO()
    width = None if file.isatty() else 120
    terminal = file.isatty()
    console = RichConsole(
        file=text, force_terminal=terminal, width=width, highlight=False, markup=False
    )
    console.width = max(console.width, _WORD)  # with less, rich prints no rows
    console.print(table, crop=False)
    ruled = text.getvalue()
    try:
        "─".encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        ruled = ruled.replace("─", "-")
    shown = [title, *(line.rstrip() for line in ruled.splitlines())]
    print("\n".join(filter(None, shown)), file=file, flush=True)


class Progress:
    """One progress line on a terminal; otherwise a plain line every PLAIN_SECONDS."""

    def __init__(self, console: Console, what: str, total: int, done: int, endpoints: bool) -> None:
        self._plain = console.shows and not console.is_terminal
        self._what, self._total, self._done, self._endpoints = what, total, done, endpoints
        self._first = -1  # units done after the first update; -1 before it
        self._after_first = self._last = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not (console.shows and console.is_terminal),
            dynamic_ncols=True,
            bar_format=what + " {n_fmt}/{total_fmt} {bar:12} {desc}",  # {postfix} begins with ", "
        )

    def update(self, more: int, *figures: str) -> None:
        """Add `more` completed units and show figures.

        The time left is shown from the second update on. The first one is not representative,
        because libraries compile and warm up.
        """
        now = time.monotonic()
        self._done += more
        shown = list(figures)
        is_first = self._first < 0
        if is_first:
            self._first, self._after_first = self._done, now
        else:
            rate = (now - self._after_first) / (self._done - self._first)
            shown.append(f"left {tqdm.format_interval(rate * (self._total - self._done))}")
        self._bar.set_description_str("  ".join(shown), refresh=False)
        self._bar.update(more)
        at_end = self._endpoints and (is_first or self._done == self._total)
        if self._plain and (at_end or now - self._last > PLAIN_SECONDS):
            self._last = now
            line = "  ".join([f"{self._what} {self._done:,}/{self._total:,}", *shown])
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop updating and leave the bar on the screen."""
        self._bar.close()
