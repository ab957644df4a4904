"""Keeps the tokens of each trace whose loss falls most from the student to a reference.

A token's gap is its log-prob under the reference minus that under the student, both from tables of
`redi logprobs --tokens` (AdaSPEC, arXiv 2510.19779; reference-based selection as in Rho-1, arXiv
2404.07965). The others get the weight 0.
"""

from __future__ import annotations

import os
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from redi.engine.console import Console
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.fingerprints import source_fingerprint
from redi.engine.data.sources import Source
from redi.engine.distill.tables import list_of, numbers, typed
from redi.engine.errors import InputError, RunError

_COLUMNS = {
    "hash": pa.string(),
    "token_ids": list_of(pa.int32()),
    "token_logps": list_of(pa.float32()),
}
_ROWS = 64
_ADVICE = "write the table with `redi logprobs MODEL --data DATA --tokens --out FILE.parquet`"
VERSION = "1"
"""Increase it if the same tables would keep other tokens."""


def filtered(
    tokens: TokenizedTraces,
    reference: Path,
    student: Path,
    keep: float,
    cache_dir: Path,
    console: Console,
) -> TokenizedTraces:
    """The traces with the share `keep` of the trained tokens of each, at least one.

    Args:
        reference, student: tables of `redi logprobs --tokens` for these traces.
        keep: in (0, 1].
        cache_dir: of hashes of files.

    Raises:
        InputError: a file is no such table, or has other tokens or not all traces; names the row.
        RunError: the selection cannot be written.
    """
    for path in (reference, student):
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "no such file"
            raise InputError(f"[token_filter] {path}: {problem}; {_ADVICE}")
    sources = [Source(str(path), "parquet") for path in (reference, student)]
    files = [source_fingerprint(source, cache_dir) for source in sources]
    parts = [VERSION, tokens.key, f"{keep!r}", *files]
    path = tokens.folder / f"kept-{xxhash.xxh3_128_hexdigest(chr(10).join(parts).encode())}.npy"
    if not _is_whole(path, int((tokens.lengths - tokens.prompt_lengths).sum())):
        _write(path, tokens, reference, student, keep, console)
    return tokens.with_kept(path)


def _is_whole(path: Path, count: int) -> bool:
    """True if a file has a choice for each of `count` tokens."""
    try:
        kept = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return bool(kept.dtype == np.bool_ and kept.shape == (count,))


def _write(
    path: Path,
    tokens: TokenizedTraces,
    reference: Path,
    student: Path,
    keep: float,
    console: Console,
) -> None:
    starts = np.concatenate([[0], np.cumsum(tokens.lengths - tokens.prompt_lengths)])
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    gaps_file = partial.with_suffix(".gaps")
    try:
        gaps = np.lib.format.open_memmap(gaps_file, "w+", np.float32, (int(starts[-1]),))
        gaps[:] = 0
        for table, sign in ((reference, 1.0), (student, -1.0)):
            _add(gaps, starts, tokens, table, sign, console)
        kept = np.lib.format.open_memmap(partial, "w+", np.bool_, gaps.shape)
        for trace in range(len(tokens)):
            part = slice(starts[trace], starts[trace + 1])
            kept[part] = largest(gaps[part], tokens.token_weights(trace), keep)
        kept.flush()
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path.parent}: the tokens to keep cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
        gaps_file.unlink(missing_ok=True)


def largest(gaps: np.ndarray, weights: np.ndarray | None, keep: float) -> np.ndarray:
    """bool [tokens]: the share `keep` of the trained tokens with the largest gaps, at least one.

    Of equal gaps the first is kept; tokens of weight 0 are not counted.
    """
    trained = np.arange(len(gaps)) if weights is None else np.flatnonzero(weights)
    count = max(1, round(keep * len(trained)))
    found = np.zeros(len(gaps), bool)
    found[trained[np.argsort(-gaps[trained], kind="stable")[:count]]] = True
    return found


def _add(
    gaps: np.ndarray,
    starts: np.ndarray,
    tokens: TokenizedTraces,
    table: Path,
    sign: float,
    console: Console,
) -> None:
    """Add a table's log-probs, times `sign`, at the trained tokens of all traces."""
    by_hash: defaultdict[str, list[int]] = defaultdict(list)
    for trace in range(len(tokens)):
        by_hash[tokens.hash(trace)].append(trace)
    missing = np.ones(len(tokens), bool)
    for where, digest, ids, logps in _rows(table, console):
        problem = ""
        for trace in by_hash[digest]:
            places = _trained(tokens, trace, len(ids))
            own = tokens.ids(trace)[tokens.prompt_lengths[trace] :]
            if len(places) != len(ids) or np.any(own[places] != ids):
                problem = problem or tokens.where(trace)
                continue
            problem = ""
            if missing[trace]:
                missing[trace] = False
                gaps[starts[trace] + places] += sign * logps
            break
        if problem:
            raise InputError(
                f"{where}: its token_ids are not the tokens of {problem}; score the same data with "
                "a model that has this tokenizer"
            )
    if missing.any():
        first = tokens.where(int(np.argmax(missing)))
        raise InputError(
            f"{table}: has no scores of {missing.sum():,} of {len(tokens):,} traces, such as that "
            f"of {first}; {_ADVICE}, DATA being that of the recipe"
        )


def _trained(tokens: TokenizedTraces, trace: int, count: int) -> np.ndarray:
    """Places of a completion's trained tokens; without its end if the table has one fewer."""
    weights = tokens.token_weights(trace)
    whole = int(tokens.lengths[trace] - tokens.prompt_lengths[trace])
    places = np.arange(whole) if weights is None else np.flatnonzero(weights)
    return places[:-1] if count == len(places) - 1 else places


def _rows(table: Path, console: Console) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(place, hash, token_ids, token_logps) of each row."""
    try:
        file = pq.ParquetFile(table)
        if absent := set(_COLUMNS) - set(file.schema_arrow.names):
            raise InputError(f"{table}: has no column {min(absent)}; {_ADVICE}")
        number = 0
        with closing(console.progress("scores of trace", file.metadata.num_rows)) as progress:
            for batch in file.iter_batches(batch_size=_ROWS, columns=list(_COLUMNS)):
                batch = typed(batch, _COLUMNS)
                for place in range(batch.num_rows):
                    number += 1
                    where = f"{table}:{number}"
                    try:
                        ids, logps = (numbers(batch, name, place) for name in list(_COLUMNS)[1:])
                    except ValueError as error:
                        raise InputError(f"{where}: {error}") from None
                    if len(ids) != len(logps) or not np.isfinite(logps).all():
                        raise InputError(
                            f"{where}: token_logps must have a finite number for each of the "
                            f"{len(ids)} token_ids"
                        )
                    yield where, batch["hash"][place].as_py(), ids, logps
                progress.update(batch.num_rows)
    except (OSError, pa.ArrowException) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{table}: cannot be read ({problem}); {_ADVICE}") from None
