"""Exceptions that end a command early, each with its own exit code."""

from collections.abc import Sequence

MOST_FAULTS = 20
"""Maximum number of faulty rows that a message lists."""


class InputError(Exception):
    """Invalid user input: exit code 2.

    The message is one line: what is wrong, where (file, row, column or key) and the remedy;
    several faulty rows have a line each. It is shown without a traceback.
    """


class FaultyRow(InputError):
    """One row of the data is faulty; `[data] faulty = "skip"` leaves it out. One line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` with line ends as escapes: names in data may have some."""
    return text.replace("\n", "\\n")


class RunError(Exception):
    """The run failed although the input is valid: exit code 1."""


class Stopped(Exception):
    """A signal stopped the command: exit code 75 (EX_TEMPFAIL). The same command resumes.

    The exit code is not 0, so that in `redi train a.toml && redi export runs/a` the export does not
    use an unfinished run. The message, if any, is printed as one line.
    """


def faulty_rows(faults: Sequence[str], total: int | None = None) -> InputError:
    """InputError that lists the first MOST_FAULTS faulty rows, a line each, and counts the rest.

    Args:
        faults: a line for each faulty row, or for the first ones.
        total: number of faulty rows; default: that of `faults`.
    """
    total = len(faults) if total is None else total
    shown = list(faults[:MOST_FAULTS])
    if total > len(shown):
        shown.append(f"... and {total - len(shown):,} more")
    return InputError("\n".join(shown))
