"""Tokenizes a data set once, in parallel, and keeps the result in a cache on disk."""

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
from redi.engine.data.fingerprints import source_fingerprint, tokenizer_fingerprint
from redi.engine.data.rows import Row, scan_source
from redi.engine.data.sources import find_sources, unread_splits
from redi.engine.data.text import (
    Encoded,
    Encoder,
    TokenSettings,
    is_finished,
    is_volatile,
)
from redi.engine.data.traces import Trace, normalise
from redi.engine.errors import InputError, faulty_rows

__all__ = ["TokenSettings", "TokenizedTraces", "tokenize"]

CACHE_VERSION = 7
"""Raise it whenever the same input would give other tokens or another file layout."""
_CHUNK_ROWS = 128
# Starting worker processes takes seconds: a set of fewer chunks is done before they are up.
_CHUNKS_WORTH_WORKERS = 16


# Columns that are known only once the whole set is seen in order are added last.
_CHUNK_SCHEMA = pa.schema([field for field in SCHEMA if field.name not in ("source", "group")])


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The traces of some rows, tokenized."""

    batch: pa.RecordBatch
    """Columns of _CHUNK_SCHEMA, one row a trace."""
    sources: list[str]
    """Name of each trace's source."""
    groups: list[str]
    """Problem of each trace."""
    dropped: Counter[str]
    control_tokens: Counter[str]
    """Traces whose text holds a control token, by token."""
    unfinished: int
    """Traces without an end to train."""
    faults: list[str]
    """What is wrong with rows; if anything is, the chunk holds no trace."""


def tokenize(
    settings: TokenSettings, cache_dir: Path, *, processes: int, console: Console
) -> TokenizedTraces:
    """The tokenized traces of a data set: from the cache, or made now and cached.

    Args:
        settings: the data and how to tokenize it.
        cache_dir: holds one folder for each key.
        processes: worker processes; with 1, the tokenizer's own threads do the work.
        console: where progress is shown.

    Several processes may do this at once; each ends with the same complete cache.

    Raises InputError for anything wrong with the data, naming file and row: the whole set is
    checked, so that one look shows the first 20 faulty rows and how many there are. RunError if
    the cache cannot be written.
    """
    sources = find_sources(settings.paths)
    for line in unread_splits(settings.paths):
        console.warn(line)
    names = [source.name for source in sources]
    # Loading the tokenizer takes longer than all the rest, where the cache has what is needed.
    encoder = cache(lambda: Encoder(settings))
    tokenizer = tokenizer_fingerprint(
        settings.tokenizer_path, cache_dir, lambda: encoder().digest()
    )
    # What a template prints today is not what it printed when its digest was remembered.
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
    assert made is not None, f"the cache just written to {folder} is not whole"
    return _checked(made, settings)


def _checked(tokens: TokenizedTraces, settings: TokenSettings) -> TokenizedTraces:
    if settings.control_tokens == "error" and tokens.control.any():
        names = ", ".join(tokens.control_tokens)
        raise faulty_rows(
            [
                f"{tokens.where(index)}: the trace spells {tokens.control[index]} control tokens "
                f'(the set: {names}), which [data] control_tokens = "error" refuses'
                for index in np.flatnonzero(tokens.control).tolist()
            ]
        )
    return tokens


def _cache_key(parts: dict[str, Any]) -> str:
    """Hash of everything that shapes the tokens; file names do not."""
    applied = json.dumps([parts["format"], parts["template"], parts["system_prompt"]])
    tokenizer = parts["tokenizer"] + parts["rendering"]
    lines = [str(parts["version"]), applied, tokenizer, *parts["files"]]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def _tokenized_chunks(
    rows: Iterator[Row | InputError], settings: TokenSettings, encoder: Encoder, processes: int
) -> Iterator[_Chunk]:
    """The chunks in the rows' order, whatever the number of processes.

    After a chunk with faults the others are only checked: nothing will be trained on them.
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
    # Spawned, not forked: the caller may hold threads (gloo, CUDA) that a fork would break.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (settings,))
    try:
        # Few chunks in flight: the pool would else take in the whole set at once.
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
    """Tokenizes rows; where any is wrong, or on request, only checks them."""
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
    # The prompt's length belongs to it: the same tokens cut elsewhere train other ones.
    return xxhash.xxh3_64_intdigest(one.ids.tobytes(), seed=one.prompt_length)


def _numbered_batches(
    chunks: Iterable[_Chunk],
    names: list[str],
    dropped: Counter[str],
    control_tokens: Counter[str],
    unfinished: Counter[str],
    bar: tqdm,
) -> Iterator[pa.RecordBatch]:
    """Batches with sources and problems numbered; counts into the counters on the way."""
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
    # A Ctrl-C reaches all processes, and only the one that trains acts; the pool outlives no one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The processes are the parallelism; threads on top of them would only contend.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = Encoder(settings)


def _end_with_parent() -> None:
    """A worker that waits for work would outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os._exit(1)


def _tokenize_in_worker(rows: list[Row | InputError]) -> _Chunk:
    assert _worker_encoder is not None, "the pool's initializer makes it"
    return _tokenize_chunk(rows, _worker_encoder, check_only=False)
