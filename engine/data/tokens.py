"""Tokenizes a data set once, in parallel, and caches the result on disk."""

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from redi.engine.console import Console
from redi.engine.data.cache import SCHEMA, Meta, TokenizedTraces, open_cache, write_cache
from redi.engine.data.chat import Texts, is_finished
from redi.engine.data.content_hash import trace_hash
from redi.engine.data.fingerprints import source_fingerprint, tokenizer_fingerprint
from redi.engine.data.read_position import ReadPosition, ReadProgress
from redi.engine.data.row import MAX_ROW_MB, Row, count_characters
from redi.engine.data.rows import scan_source
from redi.engine.data.sources import find_sources, unread_splits
from redi.engine.data.text import Encoded, Encoder, TokenSettings, is_volatile
from redi.engine.data.traces import Trace, normalise
from redi.engine.data.where import TRACE_NAMES, Where
from redi.engine.errors import MOST_FAULTS, FaultyRow, InputError, faulty_rows

__all__ = ["TokenSettings", "TokenizedTraces", "tokenize"]

CACHE_VERSION = 10
"""Increase it whenever the same input would give other tokens or another file layout."""
_CHUNK_ROWS = 128
_CHUNK_CHARACTERS = 1 << 22
"""Most characters in the rows of a chunk, up to a row more: it bounds what is held in memory."""
_MOST_SPLITS = 5
"""Most tokens split by spans that a warning names."""
# Starting worker processes takes seconds; fewer chunks than this are done sooner without them.
_CHUNKS_WORTH_WORKERS = 16


# The other columns depend on the order of the whole set and are added last.
_CHUNK_SCHEMA = pa.schema([field for field in SCHEMA if field.name not in ("source", "group")])


@dataclass(slots=True)
class _Counts:
    """What is counted while rows are read."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Rows and traces that are left out, by reason."""
    control_tokens: Counter[str] = field(default_factory=Counter)
    """Traces whose text contains a control token, by token."""
    unfinished: int = 0
    """Traces without an end to train."""
    texts: int = 0
    """Texts without a prompt."""
    skipped: list[str] = field(default_factory=list)
    """Messages about faulty rows that are left out."""
    columns: set[str] = field(default_factory=set)
    """Columns of the rows that an expression `where` reads."""
    split_tokens: int = 0
    """Tokens that the edge of a span splits."""
    splits: list[str] = field(default_factory=list)
    """The first of them, with their rows."""

    def add(self, other: "_Counts") -> None:
        """Add the counts of a part."""
        self.dropped.update(other.dropped)
        self.control_tokens.update(other.control_tokens)
        self.unfinished += other.unfinished
        self.texts += other.texts
        self.skipped += other.skipped
        self.columns |= other.columns
        self.split_tokens += other.split_tokens
        self.splits = (self.splits + other.splits)[:_MOST_SPLITS]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The traces of some rows, tokenized."""

    batch: pa.RecordBatch
    """Columns of _CHUNK_SCHEMA, one row per trace."""
    sources: list[str]
    """Name of each trace's source."""
    groups: list[str]
    """Problem of each trace."""
    counts: _Counts
    faults: list[str]
    """Messages about faults that end the command; if there are any, the chunk has no traces."""
    read: int = 0
    """Bytes of the sources up to the end of its rows."""


def tokenize(
    settings: TokenSettings, cache_dir: Path, *, processes: int, console: Console
) -> TokenizedTraces:
    """Read the tokenized traces of a data set from the cache, or make the cache.

    Several processes may do this at once; each gets the same complete cache.

    Args:
        settings: the data and how to tokenize it.
        cache_dir: contains one folder per key.
        processes: number of worker processes; with 1, the tokenizer's threads are used.
        console: where progress is shown.

    Raises:
        InputError: the data is faulty. The whole set is checked; the message has the first 20
            faulty rows, with file and row, and their total number.
        RunError: the cache cannot be written.
    """
    sources = find_sources(settings.paths)
    for line in unread_splits(settings.paths):
        console.warn(line)
    names = [source.name for source in sources]
    # With a complete cache, loading the tokenizer would take longer than everything else.
    encoder = cache(lambda: Encoder(settings))
    tokenizer = tokenizer_fingerprint(
        settings.tokenizer_path, cache_dir, lambda: encoder().fingerprint()
    )
    # A volatile template may render differently than when the fingerprint was cached.
    volatile = settings.template == "chat" and is_volatile(tokenizer)
    parts = {
        "version": CACHE_VERSION,
        "format": settings.format,
        "template": settings.template,
        "system_prompt": settings.system_prompt,
        "template_variables": dict(sorted(settings.template_variables.items())),
        "train_on": settings.train_on,
        "where": settings.where,
        "tokenizer": tokenizer,
        "rendering": encoder().rendering() if volatile else "",
        "files": [source_fingerprint(source, cache_dir) for source in sources],
    }
    if settings.max_row_mb != MAX_ROW_MB:  # it decides which rows are faulty
        parts["max_row_mb"] = settings.max_row_mb
    key = _cache_key(parts)
    folder = cache_dir / key
    cached = open_cache(folder, names)
    if cached is not None:
        return _checked(cached, settings, console)

    counts = _Counts()
    unread: list[set[str]] = [set() for _ in sources]
    where = Where(settings.where) if settings.where else None
    position = ReadPosition(sources)
    rows = chain.from_iterable(
        scan_source(
            source,
            settings.format,
            columns,
            where.columns if where else (),
            position,
            settings.max_row_mb,
        )
        for source, columns in zip(sources, unread, strict=True)
    )
    chunks = _tokenized_chunks(_in_chunks(rows, position), settings, encoder(), processes)

    def describe(size: int, count: int) -> Meta:
        if where and (missing := sorted(where.columns - counts.columns)):
            raise InputError(
                f"[data] where = {where.text!r}: no row of {', '.join(names)} has a column "
                f"{missing[0]!r}"
            )
        if count == 0:
            reasons = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.items())
            problem = f"{', '.join(names)}: no trace is left; dropped: {reasons}"
            if counts.skipped:
                problem += f"\n{faulty_rows(counts.skipped, counts.dropped['faulty rows'])}"
            raise InputError(problem)
        return Meta(
            key,
            size,
            count,
            tuple(names),
            dict(counts.dropped),
            dict(counts.control_tokens),
            unread=tuple(tuple(sorted(found)) for found in unread),
            unfinished=counts.unfinished,
            document_start=encoder().document_start(texts_alone=counts.texts == count),
            faulty=counts.dropped["faulty rows"],
            faults=tuple(counts.skipped[:MOST_FAULTS]),
            parts=parts,
            split_tokens=counts.split_tokens,
            splits=tuple(counts.splits),
        )

    with closing(ReadProgress("tokenizing", position, console)) as progress:
        batches = _numbered_batches(chunks, names, counts, progress)
        write_cache(folder, batches, describe)
    made = open_cache(folder, names)
    assert made is not None, f"the cache just written to {folder} is incomplete"
    return _checked(made, settings, console)


def _checked(tokens: TokenizedTraces, settings: TokenSettings, console: Console) -> TokenizedTraces:
    """Raise, or warn, about traces and rows that the cache has but the settings may refuse."""
    if tokens.faulty:
        found = faulty_rows(tokens.faults, tokens.faulty)
        if settings.faulty == "error":
            raise found
        rows = "row is" if tokens.faulty == 1 else "rows are"
        console.warn(f"{tokens.faulty:,} faulty {rows} left out:\n{found}")
    if tokens.split_tokens:
        edges = "token is" if tokens.split_tokens == 1 else "tokens are"
        more = ", ..." if tokens.split_tokens > len(tokens.splits) else ""
        console.warn(
            f"{tokens.split_tokens:,} {edges} split by the edge of a span and weighted by their "
            f"first character: {', '.join(tokens.splits)}{more}"
        )
    if settings.control_tokens == "error" and tokens.control.any():
        names = ", ".join(tokens.control_tokens)
        raise faulty_rows(
            [
                f"{tokens.where(index)}: the trace contains {tokens.control[index]} control tokens "
                f'(in the data: {names}), which [data] control_tokens = "error" refuses'
                for index in np.flatnonzero(tokens.control).tolist()
            ]
        )
    return tokens


def file_fingerprints(paths: tuple[str, ...], cache_dir: Path) -> list[list[str]]:
    """[name, hash of the content] of each file that the paths name; empty with a hub name.

    Raises:
        InputError: a path does not exist.
    """
    sources = find_sources(paths)
    if any(source.kind == "hub" for source in sources):
        return []
    return [[source.name, source_fingerprint(source, cache_dir)] for source in sources]


def _cache_key(parts: dict[str, Any]) -> str:
    """Hash of everything that determines the tokens; file names do not."""
    names = ("format", "template", "system_prompt", "template_variables", "train_on", "where")
    applied = json.dumps(
        [parts[name] for name in names] + [parts[name] for name in ("max_row_mb",) if name in parts]
    )
    tokenizer = parts["tokenizer"] + parts["rendering"]
    lines = [str(parts["version"]), applied, tokenizer, *parts["files"]]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


_Rows = list[Row | InputError]


def _in_chunks(
    rows: Iterator[Row | InputError], position: ReadPosition
) -> Iterator[tuple[_Rows, int]]:
    """Yield the rows in chunks, each with the bytes of the sources up to its end."""
    chunk: _Rows = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += 0 if isinstance(row, InputError) else count_characters(row.value)
        if len(chunk) == _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            yield chunk, position.done
            chunk, characters = [], 0
    if chunk:
        yield chunk, position.done


def _tokenized_chunks(
    chunks: Iterator[tuple[_Rows, int]], settings: TokenSettings, encoder: Encoder, processes: int
) -> Iterator[_Chunk]:
    """Yield the chunks in the order of the rows, for any number of processes.

    After a chunk with faults the remaining ones are only checked, as no cache will be written.
    """
    first = list(islice(chunks, _CHUNKS_WORTH_WORKERS))
    few = len(first) < _CHUNKS_WORTH_WORKERS
    chunks = chain(first, chunks)
    del first  # it is freed once it is read
    tokenizer = _Tokenizer(encoder, settings)
    faulty = False
    if processes <= 1 or few:
        for rows, read in chunks:
            tokenized = tokenizer.chunk(rows, check_only=faulty)
            faulty = faulty or bool(tokenized.faults)
            yield replace(tokenized, read=read)
        return
    # Spawned, not forked: the caller may have threads (gloo, CUDA) that break in a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (settings,))
    try:
        # Few chunks in flight: otherwise the pool would read the whole set at once.
        pending: deque[tuple[Future[_Chunk], int]] = deque()
        for rows, read in chunks:
            pending.append((pool.submit(_tokenize_in_worker, rows), read))
            if len(pending) > 2 * processes:
                future, read = pending.popleft()
                tokenized = future.result()
                faulty = bool(tokenized.faults)
                yield replace(tokenized, read=read)
                if faulty:
                    break
        while pending:
            future, read = pending.popleft()
            yield replace(future.result(), read=read)
        for rows, read in chunks:
            yield replace(tokenizer.chunk(rows, check_only=True), read=read)
    finally:
        pool.shutdown(cancel_futures=True)


_NO_TEXTS = Texts("", "")


@dataclass(frozen=True, slots=True)
class _Found:
    """A trace of a chunk."""

    place: int
    """Position of its row in the chunk."""
    row: Row
    trace: Trace
    texts: Texts = _NO_TEXTS
    """Its text, once it is rendered."""


class _Tokenizer:
    """Tokenizes rows, a chunk at a time. Faults are kept by the position of their row."""

    def __init__(self, encoder: Encoder, settings: TokenSettings) -> None:
        self._encoder = encoder
        self._settings = settings
        self._where = Where(settings.where) if settings.where else None

    def chunk(self, rows: list[Row | InputError], check_only: bool) -> _Chunk:
        """Tokenize rows; if a fault ends the command, or with `check_only`, only check them."""
        counts = _Counts()
        faults: dict[int, InputError] = {}
        found = self._rendered(self._read(rows, counts, faults), faults)
        encoded: list[tuple[_Found, Encoded]] = []
        if not check_only and not self._fatal(faults):
            encoded = self._encoded(found, faults)
            if self._where and self._where.needs_tokens:
                lengths = [(len(one.ids), one.prompt_length) for _, one in encoded]
                kept = self._selected([one for one, _ in encoded], counts, faults, lengths)
                encoded = [one for one, keep in zip(encoded, kept, strict=True) if keep]
        fatal = self._fatal(faults)
        if check_only or fatal:
            nothing = _record_batch([[]] * len(_CHUNK_SCHEMA), _CHUNK_SCHEMA)
            return _Chunk(nothing, [], [], _Counts(), fatal)
        if faults:
            counts.skipped = _lines(faults)
            counts.dropped["faulty rows"] += len(faults)
        return self._packed(encoded, counts)

    def _fatal(self, faults: dict[int, InputError]) -> list[str]:
        """Messages of the faults that end the command."""
        if self._settings.faulty == "error":
            return _lines(faults)
        return _lines({n: one for n, one in faults.items() if not isinstance(one, FaultyRow)})

    def _read(
        self, rows: list[Row | InputError], counts: _Counts, faults: dict[int, InputError]
    ) -> list[_Found]:
        """The traces of the rows that `where` selects, if it does not need their tokens."""
        found: list[_Found] = []
        for place, row in enumerate(rows):
            try:
                if isinstance(row, InputError):
                    raise row
                if self._where:
                    counts.columns |= self._where.columns & row.value.keys()
                traces = normalise(row, row.format, counts.dropped, self._settings.train_on)
                found += [_Found(place, row, trace) for trace in traces]
            except InputError as error:
                faults[place] = error
        if self._where and not self._where.needs_tokens:
            kept = self._selected(found, counts, faults)
            found = [one for one, keep in zip(found, kept, strict=True) if keep]
        return found

    def _rendered(self, found: list[_Found], faults: dict[int, InputError]) -> list[_Found]:
        """The traces with their texts."""
        rendered: list[_Found] = []
        for place, group in groupby(found, key=lambda one: one.place):
            of_row = list(group)
            try:
                texts = self._encoder.texts([one.trace for one in of_row])
                pairs = zip(of_row, texts, strict=True)
                rendered += [replace(one, texts=both) for one, both in pairs]
            except InputError as error:
                faults[place] = error
        return rendered

    def _encoded(
        self, found: list[_Found], faults: dict[int, InputError]
    ) -> list[tuple[_Found, Encoded]]:
        """The traces with their tokens; all traces of a faulty row are left out."""
        try:
            texts = [one.texts for one in found]
            ids = self._encoder.encode([one.trace for one in found], texts)
            return list(zip(found, ids, strict=True))
        except FaultyRow as error:
            rows = [list(group) for _, group in groupby(found, key=lambda one: one.place)]
            if len(rows) == 1:
                faults[found[0].place] = error
                return []
        return [one for of_row in rows for one in self._encoded(of_row, faults)]

    def _selected(
        self,
        found: list[_Found],
        counts: _Counts,
        faults: dict[int, InputError],
        lengths: Sequence[tuple[int, int]] = (),
    ) -> list[bool]:
        """Whether `where` selects each trace; `lengths` are those of the trace and its prompt."""
        assert self._where is not None, "called only with an expression"
        values: list[dict[str, Any]] = [
            one.row.value | ({"teacher": one.trace.teacher} if one.trace.teacher else {})
            for one in found
        ]
        for value, (whole, prompt) in zip(values, lengths, strict=False):
            value |= dict(zip(TRACE_NAMES, (whole, prompt, whole - prompt), strict=True))
        kept = []
        results = self._where.keep(values, [one.row.where for one in found])
        for one, result in zip(found, results, strict=True):
            if isinstance(result, FaultyRow):
                faults[one.place] = result
            elif not result:
                counts.dropped["not selected by where"] += 1
            kept.append(result is True)
        return kept

    def _packed(self, encoded: list[tuple[_Found, Encoded]], counts: _Counts) -> _Chunk:
        """The chunk as columns."""
        rows = [one.row for one, _ in encoded]
        traces = [one.trace for one, _ in encoded]
        ids = [one for _, one in encoded]
        control_tokens = [self._encoder.control_tokens(trace) for trace in traces]
        offsets = np.cumsum([0, *(len(one.ids) for one in ids)], dtype=np.int32)
        values = np.concatenate([np.zeros(0, np.int32), *(one.ids for one in ids)])
        columns = [
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
            [one.prompt_length for one in ids],
            [trace.sign for trace in traces],
            [trace.weight for trace in traces],
            [trace.teacher for trace in traces],
            [trace.origin for trace in traces],
            [row.number for row in rows],
            [_digest(one) for one in ids],
            [xxhash.xxh3_64_intdigest(one.ids[: one.prompt_length].tobytes()) for one in ids],
            [bytes.fromhex(trace_hash(trace)) for trace in traces],
            [one.unknown for one in ids],
            [spelled.total() for spelled in control_tokens],
            [one.weights for one in ids],
        ]
        for row, one in zip(rows, ids, strict=True):
            counts.split_tokens += len(one.split)
            counts.splits += [f"{row.where}: {text!r}" for text in one.split]
        del counts.splits[_MOST_SPLITS:]
        counts.control_tokens.update(token for spelled in control_tokens for token in spelled)
        counts.unfinished += sum(not is_finished(trace) for trace in traces)
        counts.texts += sum(trace.document for trace in traces)
        return _Chunk(
            _record_batch(columns, _CHUNK_SCHEMA),
            [row.source for row in rows],
            [trace.group for trace in traces],
            counts,
            [],
        )


def _lines(faults: dict[int, InputError]) -> list[str]:
    """Messages in the order of the rows, a line each."""
    ordered = [str(faults[place]) for place in sorted(faults)]
    return [line for message in ordered for line in message.splitlines()]


def _digest(one: Encoded) -> int:
    # Includes the prompt's length: with another split, other tokens are trained.
    return xxhash.xxh3_64_intdigest(one.ids.tobytes(), seed=one.prompt_length)


def _numbered_batches(
    chunks: Iterable[_Chunk],
    names: list[str],
    counts: _Counts,
    progress: ReadProgress,
) -> Iterator[pa.RecordBatch]:
    """Yield batches with numbered sources and problems, and update the counts."""
    faults: list[str] = []
    source_numbers = {name: number for number, name in enumerate(names)}
    group_numbers: dict[str, int] = {}
    traces = tokens = 0
    for chunk in chunks:
        counts.add(chunk.counts)
        faults += chunk.faults
        if chunk.batch.num_rows == 0:
            progress.show(chunk.read)
            continue
        sources = [source_numbers[name] for name in chunk.sources]
        groups = [group_numbers.setdefault(name, len(group_numbers)) for name in chunk.groups]
        yield _record_batch([*chunk.batch.columns, sources, groups], SCHEMA)
        tokens += len(chunk.batch["ids"].values)
        traces += chunk.batch.num_rows
        progress.show(chunk.read, f"{traces:,} traces", f"{tokens / 1e6:.1f} M tokens")
    if faults:
        raise faulty_rows(faults)


def _record_batch(columns: list[Any], schema: pa.Schema) -> pa.RecordBatch:
    typed = zip(columns, schema, strict=True)
    arrays = [pa.array(column, field.type) for column, field in typed]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


_worker_tokenizer: _Tokenizer | None = None


def _start_worker(settings: TokenSettings) -> None:
    global _worker_tokenizer
    # Ctrl-C reaches all processes, but only the training process handles it and ends the pool.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Threads in addition to the processes would only compete for cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = _Tokenizer(Encoder(settings), settings)


def _end_with_parent() -> None:
    """End this worker when its parent ends; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os._exit(1)


def _tokenize_in_worker(rows: list[Row | InputError]) -> _Chunk:
    assert _worker_tokenizer is not None, "the pool's initializer makes it"
    return _worker_tokenizer.chunk(rows, check_only=False)
