"""Weights of parts of a trace: `spans`, `[[start, end, weight], ...]` in characters of its text.

A row's spans become weights of tokens in three steps: `read_spans` checks them, `place_spans` moves
them to the text as it is rendered, `token_weights` maps them to the tokens of that text.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from redi.engine.data.messages import THOUGHT_OPENED, Message, with_thought
from redi.engine.data.row import Row, read_json, row_error

Span = tuple[int, int, float]
"""(start, end, weight): the characters [start, end) have this weight."""


def read_spans(row: Row, answer: Message) -> tuple[Span, ...]:
    """The spans of an answer, in the order of its text; empty if it has none.

    They count the characters of the answer's thought, if it is separate, followed by those of its
    content. The result counts those of `answer.thought + answer.content`, that is without the
    newlines that were removed around the thought.

    Raises:
        FaultyRow: they are no spans of this text: not numbers, out of range, falling, overlapping,
            or not finite. Names row and column.
    """
    if answer.spans is None:
        return ()
    column, value = answer.spans
    value = read_json(row, column, value)
    if answer.calls:
        raise row_error(row, column, "is for the text of an answer, but this one has tool calls")
    if not isinstance(value, list):
        raise row_error(row, column, "must be a list of [start, end, weight]")
    before, after = answer.thought_margins
    given = before + len(answer.thought) + after
    length = given + len(answer.content)
    spans = sorted(_span(row, f"{column}[{n}]", one, length) for n, one in enumerate(value))
    for (_, end, _), (start, _, _) in pairwise(spans):
        if start < end:
            raise row_error(row, column, f"has two spans that overlap at character {start}")

    def without_margins(place: int) -> int:
        if place >= given:
            return place - before - after
        return min(max(place - before, 0), len(answer.thought))

    moved = [(without_margins(start), without_margins(end), weight) for start, end, weight in spans]
    return tuple(span for span in moved if span[0] < span[1])


def _span(row: Row, column: str, value: Any, length: int) -> Span:
    if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
        raise row_error(row, column, "must be [start, end, weight], three numbers")
    start, end, weight = value
    if not all(float(place).is_integer() for place in (start, end)):  # Parquet has floats alone
        raise row_error(row, column, "must start and end at whole numbers")
    if not 0 <= start < end <= length:
        raise row_error(
            row,
            column,
            f"must have 0 <= start < end <= {length}, the characters of the trace, not "
            f"{start:g} and {end:g}",
        )
    with np.errstate(over="ignore"):
        stored = float(np.float32(weight))
    if not math.isfinite(stored) or (stored == 0) != (weight == 0):
        raise row_error(row, column, f"must have a weight within float32's range, not {weight}")
    return int(start), int(end), stored


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a rendered completion has the text of a trace."""

    thought: int
    """Where its separate thought begins."""
    content: int
    """Where its content begins; below 0 if its beginning was removed."""


def placed_by_tags(thought: str) -> Placement:
    """The placement in `with_thought(thought, content)`."""
    return Placement(len(THOUGHT_OPENED), len(with_thought(thought, "")))


def place_spans(
    spans: Sequence[Span], thought: str, content: str, where: Placement, length: int
) -> tuple[Span, ...]:
    """Move spans to a rendered completion.

    Text that is not the trace's own has the weight of the character before it; before the first
    character, that one's.

    Args:
        spans: in characters of `thought + content`.
        thought, content: the trace; the thought is empty unless it is separate.
        where: the place of both in the completion.
        length: characters of the completion.
    """
    cut = len(thought)

    def begin(at: int) -> int:
        if at == 0:
            return 0
        return where.thought + at if at < cut else max(0, where.content + at - cut)

    def end(at: int) -> int:
        if at == cut + len(content):
            return length
        return where.thought + at if at < cut else max(0, where.content + at - cut)

    moved = [(begin(start), end(stop), weight) for start, stop, weight in spans]
    return tuple(span for span in moved if span[0] < span[1])


def places_in_trace(places: np.ndarray, thought: str, content: str, where: Placement) -> np.ndarray:
    """Move places in a rendered completion to characters of `thought + content`; int32.

    A place in text that is not the trace's own becomes the nearest one of the trace.
    """
    cut = len(thought)
    of_thought = np.clip(places - where.thought, 0, cut)
    of_content = np.minimum(places - where.content + cut, cut + len(content))
    return np.where(places >= where.content, of_content, of_thought).astype(np.int32)


def token_weights(
    text: str, spans: Sequence[Span], offsets: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, list[str]]:
    """The weight of each token, and the tokens that the edge of a span splits.

    A token has the weight of its first character that is not white space, or of its first one. It
    is split if its characters, without white space around them, have several weights.

    Args:
        text: a completion, not empty.
        spans: in characters of it.
        offsets: (start, end) of each token in it.

    Returns:
        float32 [tokens], and the text of each split token.
    """
    weights = np.ones(len(text), dtype=np.float32)
    for start, end, weight in spans:
        weights[start:end] = weight
    changes = np.concatenate([[0], np.cumsum(weights[1:] != weights[:-1])])
    # The next character that is not white space, from each on, and the last one up to each.
    solid = np.array([not character.isspace() for character in text])
    places = np.arange(len(text))
    following = np.minimum.accumulate(np.where(solid, places, len(text))[::-1])[::-1]
    preceding = np.maximum.accumulate(np.where(solid, places, -1))
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    starts = np.minimum(starts, len(text) - 1)
    ends = np.maximum(ends, starts + 1)
    first, last = following[starts], preceding[ends - 1]
    blank = first >= ends
    first, last = np.where(blank, starts, first), np.where(blank, starts, last)
    split = np.flatnonzero(changes[first] != changes[last])
    return weights[first], [text[starts[one] : ends[one]] for one in split]
