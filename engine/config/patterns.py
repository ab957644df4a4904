"""Regular expressions that users give."""

from __future__ import annotations

import re


def answer_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression with one group, which holds the answer.

    Raises:
        ValueError: it is not a regular expression, or has another number of groups.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(f"{pattern!r} has {compiled.groups} groups; one must hold the answer")
    return compiled
