"""Reads raw rows, one dictionary at a time, and detects their format from their columns.

Rows come from JSON Lines, JSON, Parquet or CSV files, gzipped or not, or from the Hugging Face hub.
Only the current row is held in memory, except that a JSON array is parsed as a whole. Errors name
file and row.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from redi.engine.data.sources import Source, find_sources, hub_dataset, saved_dataset
from redi.engine.errors import InputError


@dataclass(frozen=True, slots=True)
class Format:
    """The columns of one row format. A row may have others, which are ignored."""

    required: tuple[str, ...]
    """The columns by which the format is detected; empty: it is never detected."""
    optional: tuple[str, ...]


_COMMON = ("id", "teacher", "weight", "source", "finished")

# Columns of a problem to evaluate on. Benchmarks use several names; the first one found counts.
PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "solution")
ID_COLUMNS = ("id", "unique_id", "uuid")

# In the order of detection, the more specific columns first: a preference set often has a
# `messages` column as well.
FORMATS: dict[str, Format] = {
    "preference": Format(("chosen", "rejected"), ("prompt", *_COMMON)),
    "traces": Format(("prompt", "traces"), _COMMON),
    "openr1": Format(
        ("problem", "generations", "correctness", "problem_is_valid", "source"),
        ("uuid", *_COMMON),
    ),
    "prompt-completion": Format(("prompt", "completion"), ("label", *_COMMON)),
    "messages": Format(("messages",), ("label", *_COMMON)),
    "problem": Format((), (*PROMPT_COLUMNS, *ANSWER_COLUMNS, *ID_COLUMNS)),
}

VERDICT_COLUMNS = ("correct", "is_correct", "correctness", "verdict", "passed", "is_passed")
"""Names that other programs use for the verdict on a row; here it is `label`."""
SCORE_COLUMNS = ("score", "reward", "accuracy", "acc", "success", "grade")
"""Names of a grade. It is a verdict if it is a boolean, or only 0 and 1 in the whole file."""

# They affect what a model should learn from a row, but no format reads them yet.
UNREAD_COLUMNS = frozenset(
    {
        *("tools", "functions", "tool_calls", "documents", "images", "image", "videos", "audio"),
        *("system", "system_prompt", "chat_template", "chat_template_kwargs"),
        *("reasoning", "reasoning_content", "thinking", "thoughts"),
        *("mask", "loss_mask", "completion_mask", "assistant_masks", "token_weights"),
        *("loss_weights", "sample_weight", "weights", "label", "labels", "margin"),
        *("step_rewards", "step_labels", "step_scores", "process_rewards", "rewards", "scores"),
        *("target_logprobs", "teacher_logprobs", "logprobs", "token_logprobs"),
        *("ref_chosen_logps", "ref_rejected_logps", "score_chosen", "score_rejected"),
        *("chosen", "rejected", "completions", "traces"),
        *VERDICT_COLUMNS,
        *SCORE_COLUMNS,
    }
)
UNREAD_MESSAGE_KEYS = frozenset(
    {
        *("weight", "mask", "loss", "loss_mask", "train", "trainable", "token_weights"),
        *("logprobs", "name", "tool_call_id", "tools", "refusal", "images", "audio", "prefix"),
    }
)

COLUMNS = frozenset(name for shape in FORMATS.values() for name in shape.required + shape.optional)
"""Every column that some format reads."""

# A CSV cell is text; in these columns the text is JSON.
_CSV_JSON_COLUMNS = ("messages", "traces", "generations", "correctness")
_PARQUET_ROWS = 64
_CR_ALONE = "lines end in CR alone, as on old Macs; save it with LF line ends"
_ZERO_BYTES = "holds zero bytes; it looks like UTF-16; save it as UTF-8"


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


def resolve_format(format: str, columns: Collection[str], where: str) -> str:
    """The format of a row: `format` itself, or with "auto" the one detected from its columns.

    Args:
        format: a key of `FORMATS`, or "auto".
        columns: the columns of the row.
        where: the row's place, for messages.

    Raises:
        InputError: the name of the format is unknown, or the columns match no format.
    """
    if format in FORMATS:
        return format
    detected = {name: shape for name, shape in FORMATS.items() if shape.required}
    if format != "auto":
        available = ", ".join(detected)
        raise InputError(f"[data] format {format!r} is unknown; available: auto, {available}")
    for name, shape in detected.items():
        if all(column in columns for column in shape.required):
            return name
    small = {column.lower() for column in columns}
    found = ", ".join(columns) or "none"
    for shape in detected.values():
        if all(column in small for column in shape.required):
            raise InputError(
                f"{where}: the columns ({found}) must be written in lower case: "
                f"{', '.join(shape.required)}"
            )
    known = "; ".join(f"{name} ({', '.join(_usual(shape))})" for name, shape in detected.items())
    raise InputError(f"{where}: the columns ({found}) match no row format; available: {known}")


def _usual(shape: Format) -> list[str]:
    """Columns that most rows of a format have. `prompt` is optional for conversations."""
    return ["prompt"] * ("prompt" in shape.optional) + list(shape.required)


def read_rows(paths: Sequence[str], format: str) -> Iterator[Row]:
    """Yield every row of `paths` in order.

    Args:
        paths: files, folders and hub names, as for `find_sources`.
        format: a key of `FORMATS`, or "auto": detected from the first row of each file.

    Raises:
        InputError: a file is missing, empty, unreadable or damaged. Names file and row.
    """
    for source in find_sources(paths):
        yield from read_source(source, format)


def read_source(source: Source, format: str) -> Iterator[Row]:
    """Yield the rows of one source; see `read_rows`."""
    for row in scan_source(source, format):
        if isinstance(row, InputError):
            raise row
        yield row


def scan_source(
    source: Source, format: str, unread: set[str] | None = None
) -> Iterator[Row | InputError]:
    """Yield the rows of one source, and an InputError instead of each faulty row.

    Nothing is raised. If the rest of a file cannot be read, its error is the last item.

    Args:
        source: the file or data set.
        format: as for `read_rows`.
        unread: collects the names of columns and keys with meaningful content that the format
            does not read ("tools", "traces[].mask", "messages[].weight").
    """
    number = 0
    shape = ""
    labelled = False
    unread = set() if unread is None else unread
    grades = _Grades()
    try:
        for number, value in _numbered_values(source, format, unread):
            where = f"{source.name}:{number}"
            if isinstance(value, InputError):
                yield value
                continue
            if not isinstance(value, dict):
                kind = _kind_name(value)
                yield InputError(f"{where}: a row must be a JSON object, not {kind}")
                continue
            if not shape:
                place = _header_place(source.name, value) if source.kind == "csv" else where
                shape = resolve_format(format, value.keys(), place)
                labelled = "label" in value
            # A row whose label is missing must not count as a positive.
            if "label" in FORMATS[shape].optional and ("label" in value) != labelled:
                yield InputError(
                    f"{where}: column 'label' must be in every row of a file or in none; "
                    f"the first row has {'it' if labelled else 'none'}"
                )
                continue
            if "label" in FORMATS[shape].optional and not labelled:
                grades.add(number, value)
            unread |= _unread_names(value, shape)
            yield Row(value, source.name, number, shape)
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException) as error:
        problem = " ".join(str(error).split())
        yield InputError(f"{source.name}:{number + 1}: the file is damaged: {problem}")
    except InputError as error:
        yield error
    else:
        if not number:
            below = " below its header line" if source.kind == "csv" else ""
            yield InputError(f"{source.name}: holds no rows{below}")
        for column, row in grades.verdicts().items():
            yield InputError(
                f"{source.name}:{row}: column {column!r} has a verdict (only 0 and 1, or -1, in "
                "the whole file), but verdicts are read from 'label': rename it to label "
                "(1: correct, 0: incorrect), or remove it"
            )


class _Grades:
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


def _unread_names(value: dict[str, Any], shape: str) -> set[str]:
    """Names of columns and keys of a row with meaningful content that are not read."""
    form = FORMATS[shape]
    found = {
        name
        for name in UNREAD_COLUMNS & value.keys()
        if _is_filled(value[name]) and name not in form.required and name not in form.optional
    }
    for column in form.required + form.optional:
        entries = value.get(column)
        if not isinstance(entries, list):
            continue
        # In entries of `traces` the verdict is read from `correct`.
        names = UNREAD_COLUMNS - {"correct"} if column == "traces" else UNREAD_MESSAGE_KEYS
        for entry in entries:
            if isinstance(entry, dict):
                filled = (name for name in names & entry.keys() if _is_filled(entry[name]))
                found.update(f"{column}[].{name}" for name in filled)
    return found


def _is_filled(value: object) -> bool:
    return value is not None and value not in ("", [], {})


def _numbered_values(source: Source, format: str, unread: set[str]) -> Iterator[tuple[int, Any]]:
    """Parsed rows with their numbers, from 1; an InputError for a row that cannot be parsed."""
    if source.kind in ("hub", "saved"):
        dataset = (hub_dataset if source.kind == "hub" else saved_dataset)(source.name)
        columns = _wanted_columns(dataset.column_names, format, source.name)
        for name in _unread_columns(dataset.column_names, columns):
            if dataset.data.column(name).null_count < len(dataset.data):
                unread.add(name)
        yield from enumerate(dataset.select_columns(columns), start=1)
        return
    with _open(source.name) as file:
        if source.kind == "parquet":
            yield from _parquet_values(file, source.name, format, unread)
        elif source.kind == "csv":
            yield from _csv_values(file, source.name)
        elif source.kind == "json" and _first_byte(file) == b"[":
            yield from enumerate(_parse_json(file.read(), source.name, line=None), start=1)
        else:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parsed_or_error(line, source.name, number)


def _open(name: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(name)) if name.endswith(".gz") else open(name, "rb")


def _parquet_values(
    file: IO[bytes], name: str, format: str, unread: set[str]
) -> Iterator[tuple[int, Any]]:
    number = 0
    parquet = pq.ParquetFile(file)
    columns = _wanted_columns(parquet.schema_arrow.names, format, name)
    others = _unread_columns(parquet.schema_arrow.names, columns)
    for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=[*columns, *others]):
        # Columns that are not read are not converted to Python objects.
        unread |= {name for name in others if batch[name].null_count < len(batch)}
        for value in batch.select(columns).to_pylist():
            number += 1
            yield number, value


def _wanted_columns(columns: list[str], format: str, where: str) -> list[str]:
    """The columns that the format reads; a columnar file need not load the others."""
    shape = FORMATS[resolve_format(format, columns, where)]
    wanted = {*shape.required, *shape.optional}
    if "label" in shape.optional:
        wanted.update(VERDICT_COLUMNS, SCORE_COLUMNS)
    return [name for name in columns if name in wanted]


def _unread_columns(columns: Collection[str], wanted: Collection[str]) -> list[str]:
    return [name for name in columns if name in UNREAD_COLUMNS and name not in wanted]


def _csv_values(file: IO[bytes], name: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # a long trace is one cell; the default limit is 128 KiB
    lines = _decoded_lines(file, name)
    first = next(lines, "")
    if "\r" in first.rstrip("\r\n"):
        raise InputError(f"{name}:1: {_CR_ALONE}")
    if excel := first.lower().startswith("sep="):  # Excel names the delimiter this way
        first = next(lines, "")
    delimiter = max(",;\t", key=first.count)  # in many locales spreadsheets write ";"
    reader = csv.reader(chain([""] * excel + [first], lines), delimiter=delimiter)
    header = [column.strip() for column in next(filter(None, reader), [])]
    if not header:
        raise InputError(f"{name}: holds neither rows nor a header line")
    if twice := [column for column in header if header.count(column) > 1]:
        raise InputError(f"{name}:1: column {twice[0]!r} occurs {header.count(twice[0])} times")
    number = reader.line_num + 1
    for cells in reader:
        if any(cells):  # spreadsheets leave rows of empty cells
            if len(cells) == len(header):
                yield number, _csv_row(header, cells, name, number)
            else:
                yield (
                    number,
                    InputError(
                        f"{name}:{number}: {len(cells)} cells, but the header has {len(header)} "
                        f"(separator {delimiter!r}; is a quotation mark not closed?)"
                    ),
                )
        number = reader.line_num + 1


def _header_place(name: str, columns: Collection[str]) -> str:
    known = any(column.lower() in COLUMNS for column in columns)
    return f"{name}:1: the header line{'' if known else ' (is it missing?)'}"


def _csv_row(
    header: list[str], cells: list[str], name: str, number: int
) -> dict[str, Any] | InputError:
    value: dict[str, Any] = dict(zip(header, cells, strict=True))
    for column in _COMMON:
        if value.get(column) == "":
            del value[column]
    for column in _CSV_JSON_COLUMNS:
        if column in value:
            value[column] = _parsed_or_error(value[column].encode(), name, number)
            if isinstance(value[column], InputError):
                return value[column]
    return value


def _decoded_lines(file: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if b"\0" in line:
            raise InputError(f"{name}:{number}: {_ZERO_BYTES}")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}:{number}: {_not_utf8(line, error)}") from error


def _not_utf8(text: bytes, error: UnicodeDecodeError) -> str:
    hint = "; it looks like UTF-16" if text.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
    return f"not valid UTF-8: {error.reason}{hint}; save it as UTF-8"


def _parsed_or_error(text: bytes, name: str, line: int) -> Any:
    try:
        return _parse_json(text, name, line)
    except InputError as error:
        return error


def _parse_json(text: bytes, name: str, line: int | None) -> Any:
    """Parse `text`; `line` is its line number in the file, None if it is the whole file."""
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        row = error.lineno if line is None else line
        problem = f"not valid JSON: {error.msg} (column {error.colno})"
        if b"\0" in text:
            problem = _ZERO_BYTES
        elif line is not None and b"\r" in text.strip():
            problem = _CR_ALONE
        raise InputError(f"{name}:{row}: {problem}") from error
    except UnicodeDecodeError as error:
        row = text[: error.start].count(b"\n") + 1 if line is None else line
        raise InputError(f"{name}:{row}: {_not_utf8(text, error)}") from error
    except RecursionError as error:
        raise InputError(f"{name}:{line or 1}: not valid JSON: nested too deeply") from error
    except ValueError as error:  # a repeated key, or a number with thousands of digits
        raise InputError(f"{name}:{line or 1}: not valid JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} occurs {names.count(twice)} times in one object")
    return value


def _first_byte(file: IO[bytes]) -> bytes:
    """The first byte after white space and a byte-order mark; the file is rewound."""
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    file.seek(0)
    return start


def _kind_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
