"""The ways a command ends before its work is done, each with its own exit code."""

from collections.abc import Sequence

MOST_FAULTS = 20
"""Faulty rows that are named one by one."""


class InputError(Exception):
    """The user's input is wrong: exit code 2.

    The message is one line that says what is wrong, where (file, row, column or key) and what
    to do about it; for several faulty rows, a line each. It is shown without a traceback.
    """


class RunError(Exception):
    """The input was right but the run failed: exit code 1."""


class Stopped(Exception):
    """A signal stopped the command: exit code 75 (EX_TEMPFAIL). The same command resumes.

    Not 0: in `redi train a.toml && redi export runs/a` the second must not run on half a run. A
    message, if there is one, is shown as a line.
    """


def faulty_rows(faults: Sequence[str]) -> InputError:
    """The error of faulty rows: a line for each of the first MOST_FAULTS, and how many more."""
    shown = list(faults[:MOST_FAULTS])
    if len(faults) > MOST_FAULTS:
        shown.append(f"... and {len(faults) - MOST_FAULTS:,} more")
    return InputError("\n".join(shown))
