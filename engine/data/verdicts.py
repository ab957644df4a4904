"""Which trace is correct: the column `label`, and verdicts that other programs name differently."""

from typing import Any

from redi.engine.data.row import Row, read_sign, row_error

VERDICT_COLUMNS = ("correct", "is_correct", "correctness", "verdict", "passed", "is_passed")
"""Names that other programs use for the verdict on a row; here it is `label`."""
SCORE_COLUMNS = ("score", "reward", "accuracy", "acc", "success", "grade")
"""Names of a grade. It is a verdict if it is a boolean, or only 0 and 1 in the whole file."""


def read_label(row: Row) -> int:
    """The row's verdict, +1 or -1; a row without a verdict is correct."""
    label = read_sign(row, "label", row.value["label"]) if "label" in row.value else None
    for column in (*VERDICT_COLUMNS, *SCORE_COLUMNS):
        value = row.value.get(column)
        verdict = _WORDS.get(str(value).strip().lower())
        if value is None or value == "" or (column in SCORE_COLUMNS and _is_number(value)):
            continue
        if label is not None:
            if verdict is not None and verdict != label:
                raise row_error(
                    row, column, f"is {value!r} and contradicts label: remove one of them"
                )
        elif column in VERDICT_COLUMNS or verdict is not None:
            raise row_error(
                row,
                column,
                "has a verdict, but verdicts are read from 'label': rename it to label "
                "(true: correct), or remove it",
            )
    return 1 if label is None else label


_WORDS = {
    **dict.fromkeys(("true", "correct", "yes", "right", "pass", "passed", "1", "1.0"), 1),
    **dict.fromkeys(("false", "incorrect", "no", "wrong", "fail", "failed", "0", "0.0"), -1),
}


def _is_number(value: object) -> bool:
    """True if it may be a score; `scan_source` detects verdicts written as numbers."""
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


class Grades:
    """Distinguishes columns of verdicts, written as 0 and 1 (or -1 and 1), from scores."""

    def __init__(self) -> None:
        self._low: dict[str, int] = {}
        self._scores: set[str] = set()

    def add(self, number: int, value: dict[str, Any]) -> None:
        """Count the grades of one row."""
        for column in SCORE_COLUMNS:
            grade = value.get(column)
            # A missing value, as in a CSV file or as pandas writes it.
            if grade is None or grade in ("", "nan") or grade != grade or column in self._scores:
                continue
            try:
                figure = float(grade)
            except (TypeError, ValueError, OverflowError):
                figure = 0.5
            if figure not in (-1, 0, 1):
                self._scores.add(column)
            elif figure < 1:
                self._low.setdefault(column, number)

    def verdicts(self) -> dict[str, int]:
        """The columns of verdicts, and for each the first row that is graded incorrect."""
        return {column: row for column, row in self._low.items() if column not in self._scores}
