"""Reads raw rows, one dictionary at a time, and detects their format from their columns.

Rows come from JSON Lines, JSON, Parquet or CSV files, gzipped or not, or from the Hugging Face hub.
Only the current row is held in memory, except that a JSON file that is an object is parsed as a
whole. Errors name file and row.
"""

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from redi.engine.data.messages import DISTRIBUTION_COLUMNS, THOUGHT_KEYS, TOOL_KEYS
from redi.engine.data.read_position import ReadPosition
from redi.engine.data.row import MAX_ROW_MB, Row, count_characters
from redi.engine.data.sources import Source, find_sources, hub_dataset, saved_dataset
from redi.engine.data.traces import COLUMNS, COMMON_COLUMNS, FORMATS, is_empty, resolve_format
from redi.engine.data.verdicts import SCORE_COLUMNS, VERDICT_COLUMNS, Grades
from redi.engine.errors import FaultyRow, InputError

# They affect what a model should learn from a row, but no format reads them yet.
UNREAD_COLUMNS = frozenset(
    {
        *("tools", "functions", "tool_calls", "documents", "images", "image", "videos", "audio"),
        *("system", "system_prompt", "chat_template", "chat_template_kwargs"),
        *("thoughts", *THOUGHT_KEYS),
        *("mask", "loss_mask", "completion_mask", "assistant_masks", "token_weights", "spans"),
        *("loss_weights", "sample_weight", "weights", "label", "labels", "margin"),
        *("step_rewards", "step_labels", "step_scores", "process_rewards", "rewards", "scores"),
        *("target_logprobs", "teacher_logprobs", "token_logprobs", *DISTRIBUTION_COLUMNS),
        *("ref_chosen_logps", "ref_rejected_logps", "score_chosen", "score_rejected"),
        *("chosen", "rejected", "completions", "traces"),
        *VERDICT_COLUMNS,
        *SCORE_COLUMNS,
    }
)
UNREAD_MESSAGE_KEYS = frozenset(
    {
        *("weight", "mask", "loss", "loss_mask", "train", "trainable", "token_weights"),
        *("logprobs", "tools", "refusal", "images", "audio", "prefix", *TOOL_KEYS),
    }
)

# A CSV cell is text; in these columns the text is JSON.
_CSV_JSON_COLUMNS = ("messages", "conversations", "traces", "generations", "correctness")
_PARQUET_ROWS = 64
_PARQUET_ROWS_OF_DISTRIBUTIONS = 4
"""A row may have 64 entries for each of 10,000 tokens."""
_MEGABYTE = 1_000_000
_STORED = 4
"""Most bytes in a file for each character of a row: escapes, names, and numbers beside its text."""
_BLOCK = 1 << 20
"""Bytes of a JSON list or a CSV file that are read at a time; less than the longest line."""
_CR_ALONE = "lines end in CR alone, as on old Macs; save it with LF line ends"
_ZERO_BYTES = "holds zero bytes; it looks like UTF-16; save it as UTF-8"


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


def read_source(source: Source, format: str, columns: Collection[str] = ()) -> Iterator[Row]:
    """Yield the rows of one source, with further `columns`; see `read_rows`."""
    for row in scan_source(source, format, columns=columns):
        if isinstance(row, InputError):
            raise row
        yield row


def scan_source(
    source: Source,
    format: str,
    unread: set[str] | None = None,
    columns: Collection[str] = (),
    position: ReadPosition | None = None,
    max_row_mb: int = MAX_ROW_MB,
) -> Iterator[Row | InputError]:
    """Yield the rows of one source, and a FaultyRow instead of each faulty row.

    Nothing is raised. If the rest of a file cannot be read, its InputError is the last item.

    Args:
        source: the file or data set.
        format: as for `read_rows`.
        unread: collects the names of columns and keys with meaningful content that the format
            does not read ("images", "traces[].mask", "messages[].weight").
        columns: further columns to read, which the format does not need.
        position: follows how far the source has been read.
        max_row_mb: longest text of a row. A file of kilobytes may unfold to a row of gigabytes.
    """
    number = 0
    shape = ""
    labelled = False
    unread = set() if unread is None else unread
    grades = Grades()
    try:
        for number, value in _numbered_values(
            source, format, unread, columns, position, max_row_mb
        ):
            where = f"{source.name}:{number}"
            if isinstance(value, InputError):
                yield value
                continue
            if not isinstance(value, dict):
                kind = _kind_name(value)
                whole = isinstance(value, list) and source.kind == "jsonl"
                hint = "; a file that is one list of rows must be named .json" if whole else ""
                yield FaultyRow(f"{where}: a row must be a JSON object, not {kind}{hint}")
                continue
            if count_characters(value) > max_row_mb * _MEGABYTE:
                yield FaultyRow(_too_long(where, max_row_mb))
                continue
            if not shape:
                place = _header_place(source.name, value) if source.kind == "csv" else where
                shape = resolve_format(format, value.keys(), place)
                labelled = "label" in value
            # A row whose label is missing must not count as a positive.
            if "label" in FORMATS[shape].optional and ("label" in value) != labelled:
                yield FaultyRow(
                    f"{where}: column 'label' must be in every row of a file or in none; "
                    f"the first row has {'it' if labelled else 'none'}"
                )
                continue
            if "label" in FORMATS[shape].optional and not labelled:
                grades.add(number, value)
            unread |= _unread_names(value, shape)
            yield Row(value, source.name, number, shape)
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException, UnicodeError) as error:
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


def _unread_names(value: dict[str, Any], shape: str) -> set[str]:
    """Names of columns and keys of a row with meaningful content that are not read."""
    form = FORMATS[shape]
    found = {
        name
        for name in UNREAD_COLUMNS & value.keys()
        if not is_empty(value[name]) and name not in form.required and name not in form.optional
    }
    for column in form.required + form.optional:
        entries = value.get(column)
        if not isinstance(entries, list):
            continue
        # In entries of `traces` the verdict is read from `correct`.
        read = {"correct", "spans", *THOUGHT_KEYS}
        names = UNREAD_COLUMNS - read if column == "traces" else UNREAD_MESSAGE_KEYS
        for entry in entries:
            if isinstance(entry, dict):
                own = TOOL_KEYS if entry.get("role") == "tool" else ()
                filled = (name for name in names & entry.keys() if not is_empty(entry[name]))
                found.update(f"{column}[].{name}" for name in filled if name not in own)
    return found


def _numbered_values(
    source: Source,
    format: str,
    unread: set[str],
    more: Collection[str],
    position: ReadPosition | None,
    max_row_mb: int,
) -> Iterator[tuple[int, Any]]:
    """Parsed rows with their numbers, from 1; an InputError for a row that cannot be parsed."""
    if source.kind in ("hub", "saved"):
        dataset = (hub_dataset if source.kind == "hub" else saved_dataset)(source.name)
        columns = _wanted_columns(dataset.column_names, format, source.name, more)
        for name in _unread_columns(dataset.column_names, columns):
            if dataset.data.column(name).null_count < len(dataset.data):
                unread.add(name)
        values = _dataset_values(dataset.select_columns(columns))
        yield from _counted(values, len(dataset), source, position)
        return
    with open(source.name, "rb") as raw, _unzipped(source.name, raw) as file:
        if position is not None and source.kind != "parquet":
            position.begin(source, lambda size: size if raw.closed else raw.tell())
        if source.kind == "parquet":
            yield from _parquet_values(file, source, format, unread, more, position, max_row_mb)
        elif source.kind == "csv":
            yield from _csv_values(file, source.name, max_row_mb)
        elif _is_document(file, source, max_row_mb):
            size = os.fstat(raw.fileno()).st_size
            yield from enumerate(
                _document_rows(file, format, source.name, max_row_mb, size), start=1
            )
        else:
            for number, line in enumerate(_lines(file, max_row_mb), start=1):
                if line is None:
                    yield number, FaultyRow(_too_long(f"{source.name}:{number}", max_row_mb))
                elif line.strip():
                    yield number, _parsed_or_error(line.rstrip(b"\r\n"), source.name, number)


def _lines(file: IO[bytes], max_row_mb: int) -> Iterator[bytes | None]:
    """The lines of a file; None for a longer one, which is read over in blocks."""
    longest = _STORED * max_row_mb * _MEGABYTE
    while line := file.readline(longest + 1):
        if len(line) <= longest:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_BLOCK)
        yield None


def _too_long(where: str, max_row_mb: int) -> str:
    return f"{where}: the row has more than {max_row_mb} MB of text (data.max_row_mb)"


def _unzipped(name: str, raw: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if name.endswith(".gz") else raw


def _counted(
    values: Iterable[Any],
    count: int,
    source: Source,
    position: ReadPosition | None,
) -> Iterator[tuple[int, Any]]:
    """Number the rows from 1; the position is their share of `count`."""
    number = 0
    if position is not None:
        position.begin(source, lambda size: size * number / max(count, 1))
    for number, value in enumerate(values, start=1):
        where = f"{source.name}:{number}"
        if isinstance(value, UnicodeDecodeError):
            yield number, FaultyRow(f"{where}: {_not_utf8(b'', value)}")
        elif isinstance(value, Exception):
            yield number, FaultyRow(f"{where}: cannot be read: {' '.join(str(value).split())}")
        else:
            yield number, value


def _dataset_values(dataset: Any) -> Iterator[Any]:
    """The rows of a data set; an error in the place of a row that cannot be converted."""
    done = 0
    while done < len(dataset):
        try:
            for value in dataset.select(range(done, len(dataset))):
                done += 1
                yield value
        except (ValueError, OverflowError) as error:
            done += 1
            yield error


def _batch_values(batch: pa.RecordBatch) -> Iterator[Any]:
    """As `_dataset_values`, of a batch."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            yield error
            return
        for row in range(batch.num_rows):
            yield from _batch_values(batch.slice(row, 1))


def _parquet_values(
    file: IO[bytes],
    source: Source,
    format: str,
    unread: set[str],
    more: Collection[str],
    position: ReadPosition | None,
    max_row_mb: int,
) -> Iterator[tuple[int, Any]]:
    # Mapped, a file is not copied: pandas writes all rows as one group, which is read as a whole.
    mapped = pa.memory_map(source.name) if not source.name.endswith(".gz") else file
    parquet = pq.ParquetFile(mapped)
    columns = _wanted_columns(parquet.schema_arrow.names, format, source.name, more)
    others = _unread_columns(parquet.schema_arrow.names, columns)
    wide = not set(DISTRIBUTION_COLUMNS).isdisjoint(columns)
    rows = _PARQUET_ROWS_OF_DISTRIBUTIONS if wide else _PARQUET_ROWS
    _check_unfolded(parquet.metadata, {*columns, *others}, source.name, max_row_mb)

    def values() -> Iterator[Any]:
        for batch in parquet.iter_batches(batch_size=rows, columns=[*columns, *others]):
            # Columns that are not read are not converted to Python objects.
            unread.update(name for name in others if batch[name].null_count < len(batch))
            yield from _batch_values(batch.select(columns))

    yield from _counted(values(), parquet.metadata.num_rows, source, position)


def _check_unfolded(
    metadata: pq.FileMetaData, columns: Collection[str], name: str, max_row_mb: int
) -> None:
    """Raise InputError if a row must be too long, before the column is unfolded in memory."""
    first = 1
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            mean = chunk.total_uncompressed_size / max(group.num_rows, 1)
            read = chunk.path_in_schema.partition(".")[0] in columns
            if read and mean > _STORED * max_row_mb * _MEGABYTE:
                rows = (
                    f"{first}" if group.num_rows == 1 else f"{first}-{first + group.num_rows - 1}"
                )
                raise InputError(_too_long(f"{name}:{rows}", max_row_mb))
        first += group.num_rows


def _wanted_columns(
    columns: list[str], format: str, where: str, more: Collection[str]
) -> list[str]:
    """The columns that the format reads, and `more`; a columnar file need not load the others."""
    shape = FORMATS[resolve_format(format, columns, where)]
    wanted = {*shape.required, *shape.optional, *more}
    if "label" in shape.optional:
        wanted.update(VERDICT_COLUMNS, SCORE_COLUMNS)
    return [name for name in columns if name in wanted]


def _unread_columns(columns: Collection[str], wanted: Collection[str]) -> list[str]:
    return [name for name in columns if name in UNREAD_COLUMNS and name not in wanted]


def _csv_values(file: IO[bytes], name: str, max_row_mb: int) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_STORED * max_row_mb * _MEGABYTE)  # the default is 128 KiB
    lines = _decoded_lines(file, name, max_row_mb)
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
    # Spreadsheets write cells without a header: they have no name, and are not read.
    counts = Counter(filter(None, header))
    if twice := [column for column, count in counts.items() if count > 1]:
        raise InputError(f"{name}:1: column {twice[0]!r} occurs {counts[twice[0]]} times")
    number = reader.line_num + 1
    for cells in _csv_rows(reader, name, max_row_mb):
        if any(cells):  # spreadsheets leave rows of empty cells
            if len(cells) == len(header):
                yield number, _csv_row(header, cells, name, number)
            else:
                yield (
                    number,
                    FaultyRow(
                        f"{name}:{number}: {len(cells)} cells, but the header has {len(header)} "
                        f"(separator {delimiter!r}; is a quotation mark not closed?)"
                    ),
                )
        number = reader.line_num + 1


def _csv_rows(reader: Iterator[list[str]], name: str, max_row_mb: int) -> Iterator[list[str]]:
    """The rows of a reader, each of a limited length."""
    while True:
        number = reader.line_num + 1  # type: ignore[attr-defined]  # of csv's own iterator
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "field limit" not in str(error):
                raise
            raise InputError(_too_long(f"{name}:{number}", max_row_mb)) from None
        if cells is None:
            return
        yield cells


def _header_place(name: str, columns: Collection[str]) -> str:
    known = any(column.lower() in COLUMNS for column in columns)
    return f"{name}:1: the header line{'' if known else ' (is it missing?)'}"


def _csv_row(
    header: list[str], cells: list[str], name: str, number: int
) -> dict[str, Any] | InputError:
    value: dict[str, Any] = dict(zip(header, cells, strict=True))
    for column in COMMON_COLUMNS:
        if value.get(column) == "":
            del value[column]
    for column in _CSV_JSON_COLUMNS:
        if column in value:
            value[column] = _parsed_or_error(value[column].encode(), name, number)
            if isinstance(value[column], InputError):
                return value[column]
    return value


def _decoded_lines(file: IO[bytes], name: str, max_row_mb: int) -> Iterator[str]:
    """The lines of a file. They are decoded in blocks, because a cell may have millions."""
    return chain.from_iterable(_decoded_blocks(file, name, max_row_mb))


def _decoded_blocks(file: IO[bytes], name: str, max_row_mb: int) -> Iterator[Iterable[str]]:
    longest = _STORED * max_row_mb * _MEGABYTE
    number = 1
    while block := file.read(_BLOCK):
        if number == 1:
            block = block.removeprefix(codecs.BOM_UTF8)
        cut = block.rfind(b"\n") + 1
        lines, last = block[:cut], block[cut:] + file.readline(longest + 1)
        try:
            text = lines.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" not in text:
            yield io.StringIO(text, newline="\n")
        else:  # one of the lines cannot be read
            yield (_decoded(line, name, at) for at, line in enumerate(io.BytesIO(lines), number))
        number += lines.count(b"\n")
        if len(last) > longest:
            raise InputError(_too_long(f"{name}:{number}", max_row_mb))
        if last:
            yield (_decoded(last, name, number),)
            number += 1


def _decoded(line: bytes, name: str, number: int) -> str:
    if b"\0" in line:
        raise InputError(f"{name}:{number}: {_ZERO_BYTES}")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}:{number}: {_not_utf8(line, error)}") from error


def _not_utf8(text: bytes, error: UnicodeDecodeError) -> str:
    hint = "; it looks like UTF-16" if text.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
    return f"not valid UTF-8: {error.reason}{hint}; save it as UTF-8"


def _parsed_or_error(text: bytes, name: str, line: int) -> Any:
    try:
        return _parse_json(text, name, line)
    except InputError as error:
        return FaultyRow(str(error))


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


def _document_rows(
    file: IO[bytes], format: str, name: str, max_row_mb: int, size: int
) -> Iterator[Any]:
    """The rows of a file that is one JSON document: a list is read a row at a time.

    What is parsed as a whole may be longer than a row if the file is, whose `size` is in bytes.
    """
    done = 0
    longest = _STORED * max_row_mb * _MEGABYTE
    try:
        for value in _list_items(file, longest):
            yield value
            done += 1
        return
    except _TooLongError:
        raise InputError(_too_long(f"{name}:{done + 1}", max_row_mb)) from None
    except (ValueError, RecursionError):  # no list, or a faulty one: read as a whole, for its error
        file.seek(0)
    most = max(longest, size)
    text = file.read(most + 1)
    if len(text) > most:
        raise InputError(_too_long(name, max_row_mb))
    document = _parse_json(text, name, line=None)
    yield from islice(_rows_of(document, format, name), done, None)


class _TooLongError(Exception):
    """An item is longer than a row may be."""


def _list_items(file: IO[bytes], longest: int) -> Iterator[Any]:
    """The items of a JSON list; ValueError if it is none, _TooLongError for a longer item."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    parse = json.JSONDecoder(object_pairs_hook=_object).raw_decode
    text, at, block, ended = "", 0, _BLOCK, False

    def skip_white_space() -> str:
        """The next character that is no white space; empty at the end of the file."""
        nonlocal text, at, ended
        while True:
            while at < len(text) and text[at] in " \t\n\r":
                at += 1
            if at < len(text) or ended:
                return text[at : at + 1]
            read = file.read(_BLOCK)
            text, at, ended = decode(read, final=not read), 0, not read

    if skip_white_space() != "[":
        raise ValueError("no list")
    at += 1
    if skip_white_space() != "]":
        while True:
            skip_white_space()
            try:
                value, end = parse(text, at)
            except json.JSONDecodeError:
                end = len(text)
            if end == len(text):  # perhaps only the beginning of an item has been read
                if ended:
                    raise ValueError("the list has no end")
                if len(text) - at > longest + _BLOCK:  # the next items may be in it too
                    raise _TooLongError
                read = file.read(block)
                text, at, ended = text[at:] + decode(read, final=not read), 0, not read
                block *= 2
                continue
            if end - at > longest:
                raise _TooLongError
            at, block = end, _BLOCK
            yield value
            found = skip_white_space()
            if found == "]":
                break
            if found != ",":
                raise ValueError("no comma between items")
            at += 1
    at += 1
    if skip_white_space():
        raise ValueError("more than one list")


def _is_document(file: IO[bytes], source: Source, max_row_mb: int) -> bool:
    """True if a file is one JSON document, not one in each line; the file is rewound."""
    first = b""
    while not first and (line := file.readline(_BLOCK)):  # a line may be the whole file
        first = line.removeprefix(b"\xef\xbb\xbf").strip()
    if first[:1] == b"{" and len(line) == _BLOCK:
        first += file.readline(_STORED * max_row_mb * _MEGABYTE)
    file.seek(0)
    if first in (b"[", b"{"):  # written over several lines
        return True
    if source.kind != "json" or first[:1] not in (b"[", b"{"):
        return False
    if first[:1] == b"[":
        return True
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return _is_by_column(value) or bool(_lists_of_rows(value))


def _is_by_column(value: dict[str, Any]) -> bool:
    """True for a table as pandas' `to_json` writes it: columns of numbered values."""
    return bool(value) and all(
        isinstance(column, dict) and column and all(number.isdecimal() for number in column)
        for column in value.values()
    )


def _lists_of_rows(document: dict[str, Any]) -> list[str]:
    """The keys under which a JSON object has a list of objects, unless it is itself a row."""
    if any(set(shape.required) <= document.keys() for shape in FORMATS.values() if shape.required):
        return []
    return [
        key
        for key, value in document.items()
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
    ]


def _rows_of(document: Any, format: str, name: str) -> list[Any]:
    """The rows of a file that is one JSON document: a list, or an object with one list."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise InputError(f"{name}: is one JSON value, not a list of rows")
    if _is_by_column(document):
        raise InputError(
            f"{name}: is a table written column by column ({', '.join(document)}); write it row by "
            'row: in pandas, to_json(path, orient="records", lines=True)'
        )
    lists = _lists_of_rows(document)
    if not lists:
        return [document]  # one row, written over several lines
    if len(lists) > 1:
        raise InputError(
            f"{name}: is one JSON object with several lists of rows ({', '.join(lists)}); save the "
            "list to train on as a file"
        )
    return document[lists[0]]


def _kind_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
