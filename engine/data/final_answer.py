"""The final answer that a text marks."""

from __future__ import annotations

import re

BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
"""Where a box opens; its brace is the last character of the match."""


def final_answer(text: str) -> str | None:
    r"""The answer that a text marks: its last complete \boxed{...}, else what follows "####".

    A box that holds nothing but a box is opened too. None if the text marks no answer.
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
    """Where the brace that opened before `start` closes."""
    depth = 1
    for place in range(start, len(text)):
        if text[place] in "{}" and (place == 0 or text[place - 1] != "\\"):
            depth += 1 if text[place] == "{" else -1
            if not depth:
                return place
    return None
