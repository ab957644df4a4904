"""One raw row, and the reading of its single values: text, verdict, weight, id."""

import json
import math
import unicodedata
from dataclasses import dataclass
from typing import Any

from redi.engine.errors import FaultyRow

MAX_ROW_MB = 16
"""Longest text of a row, in MB, unless `[data] max_row_mb` sets another limit."""

# Weights are float32: outside these bounds a weight would lose digits, or become 0 or infinite.
_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 2.0**-126, 3.4e38


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row."""

    value: dict[str, Any]
    """The row's columns, as parsed."""
    source: str
    """The file or hub name of the row."""
    number: int
    """Line number in a JSON Lines or CSV file, otherwise row number; both count from 1."""
    format: str
    """The row's format, a key of `FORMATS`."""

    @property
    def where(self) -> str:
        """The row's place for a message: "file.jsonl:12"."""
        return f"{self.source}:{self.number}"


def row_error(row: Row, column: str, problem: str) -> FaultyRow:
    """The error of a row that names file, row and column."""
    return FaultyRow(f"{row.where}: column {column!r} {problem}")


def type_name(value: object) -> str:
    """The type of a JSON value, for messages."""
    return "null" if value is None else type(value).__name__


def is_blank(text: str) -> bool:
    """True if it has only white space, control and zero-width characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def read_text(row: Row, column: str, value: object, *, empty: bool = False) -> str:
    """The text in a column. It must be valid Unicode, and not blank unless `empty`.

    Raises:
        FaultyRow: it is not such a text. Names row and column.
    """
    if not isinstance(value, str):
        raise row_error(row, column, f"must be text, not {type_name(value)}")
    if not empty and is_blank(value):
        raise row_error(row, column, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise row_error(row, column, f"is not valid Unicode text: {error.reason}") from error
    return value


def read_json(row: Row, column: str, value: object) -> Any:
    """The content of a column that may be written as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise row_error(row, column, f"is text, but not valid JSON: {error}") from None


_VERDICTS = {
    **dict.fromkeys(("true", "1", "1.0"), 1),
    **dict.fromkeys(("false", "0", "0.0"), -1),
}


def read_sign(row: Row, column: str, value: object) -> int:
    """A verdict: +1 if correct, -1 if incorrect.

    In CSV pandas writes 1.0 and 0.0 where a verdict is missing.
    """
    if isinstance(value, str) and (sign := _VERDICTS.get(value.strip().lower())):
        return sign
    if isinstance(value, bool | int | float) and value in (0, 1):
        return 1 if value else -1
    got = "null" if value is None else repr(value)
    raise row_error(row, column, f"must be true or false (or 1 or 0), not {got}")


def read_weight(row: Row, value: object) -> float:
    """The weight of a trace, 1 if it has none."""
    if value is None:
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not _SMALLEST_WEIGHT <= weight <= _LARGEST_WEIGHT:
        raise row_error(
            row,
            "weight",
            "must be a positive number within float32's range (2^-126 to 3.4e38), "
            f"not {repr(value)[:40]}",
        )
    return weight


def read_id(row: Row, column: str) -> str | int | None:
    """The id in a column: text, or a whole number; None if there is none.

    pandas writes whole numbers as 1.0, 2.0 and a missing one as NaN, if any is missing.
    """
    value = row.value.get(column)
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        return None if math.isnan(value) else int(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        got = repr(value) if isinstance(value, float) else type_name(value)
        raise row_error(row, column, f"must be text or a whole number, not {got}")
    return read_text(row, column, value, empty=True) if isinstance(value, str) else value


def count_characters(value: object) -> int:
    """Number of characters of the texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(count_characters, value.values()))
    return sum(map(count_characters, value)) if isinstance(value, list) else 0
