"""Raw rows from local files or the Hugging Face hub, one dictionary at a time.

JSON Lines, JSON, Parquet and CSV are read as they are or gzipped. Nothing is held in memory but
the row (a JSON array excepted: it can only be parsed whole). Errors name the file and the row.
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

from redi.engine.data.formats import (
    COLUMNS,
    FORMATS,
    SCORE_COLUMNS,
    UNREAD_COLUMNS,
    UNREAD_MESSAGE_KEYS,
    VERDICT_COLUMNS,
    resolve_format,
)
from redi.engine.data.sources import Source, find_sources, hub_dataset, saved_dataset
from redi.engine.errors import InputError

# A CSV cell is text; in these columns the text is JSON.
_CSV_JSON_COLUMNS = ("messages", "traces", "generations", "correctness")
_CSV_OPTIONAL_COLUMNS = ("id", "teacher", "weight", "source", "finished")
_PARQUET_ROWS = 64
_CR_ALONE = "lines end in CR alone, as on old Macs; save it with LF"
_ZERO_BYTES = "holds zero bytes; it looks like UTF-16; save it as UTF-8"


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row."""

    value: dict[str, Any]
    """The row's columns, as parsed."""
    source: str
    """The file or hub name that it came from."""
    number: int
    """Line of a JSON Lines or CSV file, else the row's number; both count from 1."""
    format: str
    """The row's shape, a key of `FORMATS`."""

    @property
    def where(self) -> str:
        """The row's place for a message: "file.jsonl:12"."""
        return f"{self.source}:{self.number}"


def read_rows(paths: Sequence[str], format: str) -> Iterator[Row]:
    """Yields every row of `paths` in order.

    Args:
        paths: files, folders and hub names, as `find_sources` takes them.
        format: a key of `FORMATS`, or "auto": told from the columns of each file's first row.

    Raises InputError for missing, empty, unreadable or broken files, naming file and row.
    """
    for source in find_sources(paths):
        yield from read_source(source, format)


def read_source(source: Source, format: str) -> Iterator[Row]:
    """Yields the rows of one source; see `read_rows`."""
    for row in scan_source(source, format):
        if isinstance(row, InputError):
            raise row
        yield row


def scan_source(
    source: Source, format: str, unread: set[str] | None = None
) -> Iterator[Row | InputError]:
    """Yields the rows of one source, and in the place of a broken one what is wrong with it.

    A file that cannot be read on ends with its error; nothing is raised.

    Args:
        source: where the rows are.
        format: as `read_rows` takes it.
        unread: gets the names of columns and keys that are filled and mean something, and that
            the shape does not read ("tools", "traces[].mask", "messages[].weight").
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
            # A row whose label was forgotten must not pass for a positive.
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
        yield InputError(f"{source.name}:{number + 1}: the file is broken: {problem}")
    except InputError as error:
        yield error
    else:
        if not number:
            below = " below its header line" if source.kind == "csv" else ""
            yield InputError(f"{source.name}: holds no rows{below}")
        for column, row in grades.verdicts().items():
            yield InputError(
                f"{source.name}:{row}: column {column!r} has a verdict (only 0 and 1, or -1, in "
                "the whole file), and the verdict is read from 'label': rename it to label "
                "(1: correct, 0: incorrect), or remove it"
            )


class _Grades:
    """Tells a file's columns of verdicts, written as 0 and 1 (or -1 and 1), from its scores."""

    def __init__(self) -> None:
        self._low: dict[str, int] = {}
        self._scores: set[str] = set()

    def add(self, number: int, value: dict[str, Any]) -> None:
        """Look at one row."""
        for column in SCORE_COLUMNS:
            grade = value.get(column)
            # Missing in a CSV file, and in one that pandas wrote.
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
        """The columns that hold verdicts, and for each the first row that is graded incorrect."""
        return {column: row for column, row in self._low.items() if column not in self._scores}


def _unread_names(value: dict[str, Any], shape: str) -> set[str]:
    """Names of what is filled in a row, means something, and is not read."""
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
        # Entries of `traces` have their verdict in `correct`.
        names = UNREAD_COLUMNS - {"correct"} if column == "traces" else UNREAD_MESSAGE_KEYS
        for entry in entries:
            if isinstance(entry, dict):
                filled = (name for name in names & entry.keys() if _is_filled(entry[name]))
                found.update(f"{column}[].{name}" for name in filled)
    return found


def _is_filled(value: object) -> bool:
    return value is not None and value not in ("", [], {})


def _numbered_values(source: Source, format: str, unread: set[str]) -> Iterator[tuple[int, Any]]:
    """Rows as parsed, counted from 1; an InputError for one that cannot be."""
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
        # What is not read is not made into Python's objects either.
        unread |= {name for name in others if batch[name].null_count < len(batch)}
        for value in batch.select(columns).to_pylist():
            number += 1
            yield number, value


def _wanted_columns(columns: list[str], format: str, where: str) -> list[str]:
    """Those of `columns` that the format reads: a column store can leave the others alone."""
    shape = FORMATS[resolve_format(format, columns, where)]
    wanted = {*shape.required, *shape.optional}
    if "label" in shape.optional:
        wanted.update(VERDICT_COLUMNS, SCORE_COLUMNS)
    return [name for name in columns if name in wanted]


def _unread_columns(columns: Collection[str], wanted: Collection[str]) -> list[str]:
    return [name for name in columns if name in UNREAD_COLUMNS and name not in wanted]


def _csv_values(file: IO[bytes], name: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # a long trace is one cell; the default stops at 128 KiB
    lines = _decoded_lines(file, name)
    first = next(lines, "")
    if "\r" in first.rstrip("\r\n"):
        raise InputError(f"{name}:1: {_CR_ALONE}")
    if excel := first.lower().startswith("sep="):  # Excel's own way to name the delimiter
        first = next(lines, "")
    delimiter = max(",;\t", key=first.count)  # spreadsheets of half the world write ";"
    reader = csv.reader(chain([""] * excel + [first], lines), delimiter=delimiter)
    header = [column.strip() for column in next(filter(None, reader), [])]
    if not header:
        raise InputError(f"{name}: holds no rows, nor a header line")
    if twice := [column for column in header if header.count(column) > 1]:
        raise InputError(f"{name}:1: column {twice[0]!r} is there {header.count(twice[0])} times")
    number = reader.line_num + 1
    for cells in reader:
        if any(cells):  # spreadsheets leave rows of empty cells
            if len(cells) == len(header):
                yield number, _csv_row(header, cells, name, number)
            else:
                yield (
                    number,
                    InputError(
                        f"{name}:{number}: {len(cells)} cells where the header has {len(header)} "
                        f"(separated by {delimiter!r}; is a quotation mark not closed?)"
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
    for column in _CSV_OPTIONAL_COLUMNS:
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
    """Parses `text`; `line` is its line in the file, None if it is the whole file."""
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
    except ValueError as error:  # a key twice, or a number of thousands of digits
        raise InputError(f"{name}:{line or 1}: not valid JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is there {names.count(twice)} times in one object")
    return value


def _first_byte(file: IO[bytes]) -> bytes:
    """The first byte that is not white space (or a byte-order mark); rewinds the file."""
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    file.seek(0)
    return start


def _kind_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
