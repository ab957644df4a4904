"""Finds the final answer that is marked in a text."""

from __future__ import annotations

import re

BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
"""The start of a box; its opening brace is the last character of the match."""


def final_answer(text: str) -> str | None:
    r"""The marked answer: the last complete \boxed{...}, else the text after "####" in its line.

    If a box contains only another box, the content of the inner one is returned. None if no answer
    is marked.
    """
    content, end = None, 0
    for opened in BOX.finditer(text):
        if opened.start() >= end and (closed := closing_brace(text, opened.end())) is not None:
            content, end = text[opened.end() : closed].strip(), closed + 1
    if content is not None:
        inner = BOX.match(content)
        if inner and closing_brace(content, inner.end()) == len(content) - 1:
            return final_answer(content)
        return content
    _, found, rest = text.rpartition("####")
    line = rest.strip().split("\n")[0].strip()
    return line if found and line else None


def closing_brace(text: str, start: int) -> int | None:
    """Position of the brace that closes the one before `start`; None if there is none."""
    depth = 1
    for place in range(start, len(text)):
        if text[place] in "{}" and (place == 0 or text[place - 1] != "\\"):
            depth += 1 if text[place] == "{" else -1
            if not depth:
                return place
    return None
