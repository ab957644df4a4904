"""Finds the final answer that is marked in a text."""

from __future__ import annotations

import re

BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
"""The start of a box; its opening brace is the last character of the match."""
_ONLY_BOX = re.compile(rf"\s*(?:{BOX.pattern})")
_BRACE = re.compile(r"(?<!\\)[{}]")


def final_answer(text: str) -> str | None:
    r"""The marked answer: the last complete \boxed{...}, else the text after "####" in its line.

    If a box contains only another box, the content of the inner one is returned. None if no answer
    is marked.
    """
    closing = closing_braces(text)
    span, end = None, 0
    for opened in BOX.finditer(text):
        closed = closing.get(opened.end() - 1)
        if opened.start() >= end and closed is not None:
            span, end = (opened.end(), closed), closed + 1
    while span is not None:
        start, end = span
        inner = _ONLY_BOX.match(text, start)
        closed = closing.get(inner.end() - 1) if inner else None
        if inner is None or closed is None or text[closed + 1 : end].strip():
            return text[start:end].strip()
        span = inner.end(), closed
    _, found, rest = text.rpartition("####")
    line = rest.strip().split("\n")[0].strip()
    return line if found and line else None


def closing_braces(text: str) -> dict[int, int]:
    """Position of each opening brace that is closed -> position of its closing brace."""
    closing, opened = {}, []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closing[opened.pop()] = brace.start()
    return closing
