"""Tokenizes a data set once, in parallel, and caches the result on disk."""

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from tqdm import tqdm

from redi.engine.console import Console
from redi.engine.data.cache import SCHEMA, Meta, TokenizedTraces, open_cache, write_cache
from redi.engine.data.chat import is_finished
from redi.engine.data.fingerprints import source_fingerprint, tokenizer_fingerprint
from redi.engine.data.row import Row
from redi.engine.data.rows import scan_source
from redi.engine.data.sources import find_sources, unread_splits
from redi.engine.data.text import (
    Encoded,
    Encoder,
    TokenSettings,
    is_volatile,
)
from redi.engine.data.traces import Trace, normalise
from redi.engine.errors import InputError, faulty_rows

__all__ = ["TokenSettings", "TokenizedTraces", "tokenize"]

CACHE_VERSION = 8
"""Increase it whenever the same input would give other tokens or another file layout."""
_CHUNK_ROWS = 128
# Starting worker processes takes seconds; fewer chunks than this are done sooner without them.
_CHUNKS_WORTH_WORKERS = 16


# The other columns depend on the order of the whole set and are added last.
_CHUNK_SCHEMA = pa.schema([field for field in SCHEMA if field.name not in ("source", "group")])


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The traces of some rows, tokenized."""

    batch: pa.RecordBatch
    """Columns of _CHUNK_SCHEMA, one row per trace."""
    sources: list[str]
    """Name of each trace's source."""
    groups: list[str]
    """Problem of each trace."""
    dropped: Counter[str]
    control_tokens: Counter[str]
    """Number of traces whose text contains a control token, by token."""
    unfinished: int
    """Number of traces without an end to train."""
    faults: list[str]
    """Messages about faulty rows; if there are any, the chunk has no traces."""


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
        "tokenizer": tokenizer,
        "rendering": encoder().rendering() if volatile else "",
        "files": [source_fingerprint(source, cache_dir) for source in sources],
    }
    key = _cache_key(parts)
    folder = cache_dir / key
    cached = open_cache(folder, names)
    if cached is not None:
        return _checked(cached, settings)

    dropped: Counter[str] = Counter()
    control_tokens: Counter[str] = Counter()
    unread: list[set[str]] = [set() for _ in sources]
    unfinished: Counter[str] = Counter()
    rows = chain.from_iterable(
        scan_source(source, settings.format, columns)
        for source, columns in zip(sources, unread, strict=True)
    )
    chunks = _tokenized_chunks(rows, settings, encoder(), processes)

    def describe(size: int, count: int) -> Meta:
        if count == 0:
            reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
            raise InputError(f"{', '.join(names)}: no trace is left; dropped: {reasons}")
        return Meta(
            key,
            size,
            count,
            tuple(names),
            dict(dropped),
            dict(control_tokens),
            unread=tuple(tuple(sorted(found)) for found in unread),
            unfinished=unfinished.total(),
            document_start=encoder().document_start(),
            parts=parts,
        )

    with console.bar("tokenizing", "traces") as bar:
        batches = _numbered_batches(chunks, names, dropped, control_tokens, unfinished, bar)
        write_cache(folder, batches, describe)
    made = open_cache(folder, names)
    assert made is not None, f"the cache just written to {folder} is incomplete"
    return _checked(made, settings)


def _checked(tokens: TokenizedTraces, settings: TokenSettings) -> TokenizedTraces:
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
    applied = json.dumps([parts["format"], parts["template"], parts["system_prompt"]])
    tokenizer = parts["tokenizer"] + parts["rendering"]
    lines = [str(parts["version"]), applied, tokenizer, *parts["files"]]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def _tokenized_chunks(
    rows: Iterator[Row | InputError], settings: TokenSettings, encoder: Encoder, processes: int
) -> Iterator[_Chunk]:
    """Yield the chunks in the order of the rows, for any number of processes.

    After a chunk with faults the remaining ones are only checked, as no cache will be written.
    """
    chunks = iter(lambda: list(islice(rows, _CHUNK_ROWS)), [])
    first = list(islice(chunks, _CHUNKS_WORTH_WORKERS))
    faulty = False
    if processes <= 1 or len(first) < _CHUNKS_WORTH_WORKERS:
        for chunk in chain(first, chunks):
            tokenized = _tokenize_chunk(chunk, encoder, check_only=faulty)
            faulty = faulty or bool(tokenized.faults)
            yield tokenized
        return
    # Spawned, not forked: the caller may have threads (gloo, CUDA) that break in a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (settings,))
    try:
        # Few chunks in flight: otherwise the pool would read the whole set at once.
        pending: deque[Future[_Chunk]] = deque()
        for chunk in chain(first, chunks):
            pending.append(pool.submit(_tokenize_in_worker, chunk))
            if len(pending) > 2 * processes:
                tokenized = pending.popleft().result()
                faulty = bool(tokenized.faults)
                yield tokenized
                if faulty:
                    break
        while pending:
            yield pending.popleft().result()
        for chunk in chunks:
            yield _tokenize_chunk(chunk, encoder, check_only=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _tokenize_chunk(rows: list[Row | InputError], encoder: Encoder, check_only: bool) -> _Chunk:
    """Tokenize rows; if any is faulty, or with `check_only`, only check them."""
    dropped: Counter[str] = Counter()
    found: list[tuple[Row, Trace, tuple[str, str]]] = []
    faults = []
    for row in rows:
        try:
            if isinstance(row, InputError):
                raise row
            traces = normalise(row, row.format, dropped)
            texts = encoder.texts(traces)
            found += [(row, *one) for one in zip(traces, texts, strict=True)]
        except InputError as error:
            faults.append(str(error))
    rows_of = [row for row, _, _ in found]
    traces = [trace for _, trace, _ in found]
    encoded: list[Encoded] = []
    if not (check_only or faults):
        try:
            encoded = encoder.encode(traces, [texts for _, _, texts in found])
        except InputError as error:
            faults += str(error).splitlines()
    if check_only or faults:
        nothing = _record_batch([[]] * len(_CHUNK_SCHEMA), _CHUNK_SCHEMA)
        return _Chunk(nothing, [], [], Counter(), Counter(), 0, faults)
    control_tokens = [encoder.control_tokens(trace) for trace in traces]
    offsets = np.cumsum([0, *(len(one.ids) for one in encoded)], dtype=np.int32)
    values = np.concatenate([np.zeros(0, np.int32), *(one.ids for one in encoded)])
    columns = [
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
        [one.prompt_length for one in encoded],
        [trace.sign for trace in traces],
        [trace.weight for trace in traces],
        [trace.teacher for trace in traces],
        [trace.origin for trace in traces],
        [row.number for row in rows_of],
        [_digest(one) for one in encoded],
        [xxhash.xxh3_64_intdigest(one.ids[: one.prompt_length].tobytes()) for one in encoded],
        [one.unknown for one in encoded],
        [spelled.total() for spelled in control_tokens],
    ]
    return _Chunk(
        _record_batch(columns, _CHUNK_SCHEMA),
        [row.source for row in rows_of],
        [trace.group for trace in traces],
        dropped,
        Counter(token for spelled in control_tokens for token in spelled),
        sum(not is_finished(trace) for trace in traces),
        [],
    )


def _digest(one: Encoded) -> int:
    # Includes the prompt's length: with another split, other tokens are trained.
    return xxhash.xxh3_64_intdigest(one.ids.tobytes(), seed=one.prompt_length)


def _numbered_batches(
    chunks: Iterable[_Chunk],
    names: list[str],
    dropped: Counter[str],
    control_tokens: Counter[str],
    unfinished: Counter[str],
    bar: tqdm,
) -> Iterator[pa.RecordBatch]:
    """Yield batches with numbered sources and problems, and update the counters."""
    faults: list[str] = []
    source_numbers = {name: number for number, name in enumerate(names)}
    group_numbers: dict[str, int] = {}
    tokens = 0
    for chunk in chunks:
        dropped.update(chunk.dropped)
        control_tokens.update(chunk.control_tokens)
        unfinished["traces"] += chunk.unfinished
        faults += chunk.faults
        if chunk.batch.num_rows == 0:
            continue
        sources = [source_numbers[name] for name in chunk.sources]
        groups = [group_numbers.setdefault(name, len(group_numbers)) for name in chunk.groups]
        yield _record_batch([*chunk.batch.columns, sources, groups], SCHEMA)
        tokens += len(chunk.batch["ids"].values)
        bar.update(chunk.batch.num_rows)
        bar.set_postfix_str(f"{tokens / 1e6:.1f} M tokens", refresh=False)
    if faults:
        raise faulty_rows(faults)


def _record_batch(columns: list[Any], schema: pa.Schema) -> pa.RecordBatch:
    typed = zip(columns, schema, strict=True)
    arrays = [pa.array(column, field.type) for column, field in typed]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


_worker_encoder: Encoder | None = None


def _start_worker(settings: TokenSettings) -> None:
    global _worker_encoder
    # Ctrl-C reaches all processes, but only the training process handles it and ends the pool.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Threads in addition to the processes would only compete for cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = Encoder(settings)


def _end_with_parent() -> None:
    """End this worker when its parent ends; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os._exit(1)


def _tokenize_in_worker(rows: list[Row | InputError]) -> _Chunk:
    assert _worker_encoder is not None, "the pool's initializer makes it"
    return _tokenize_chunk(rows, _worker_encoder, check_only=False)
