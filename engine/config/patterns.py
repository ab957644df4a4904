"""Regular expressions that users give."""

from __future__ import annotations

import re


def answer_pattern(pattern: str) -> re.Pattern[str]:
    """Compile an expression whose one group holds an answer; ValueError if it is not one."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(f"{pattern!r} has {compiled.groups} groups; one must hold the answer")
    return compiled
