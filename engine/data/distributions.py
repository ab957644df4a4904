"""The cache of a teacher's distributions, aligned with the tokens of a data set.

An Arrow file has the K entries of each token of a completion: int32 ids and float16 log-probs.
`meta.json`, written last, has the figures that are shown before training, and a checksum of both
files: a cache that was cut off or changed is made again.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from redi.engine.data.fingerprints import data_checksum
from redi.engine.errors import RunError

PADDING = -1
"""Id of an entry that a token lacks; its log-prob is -inf."""
_DATA, _META = "distributions.arrow", "meta.json"
_BATCH_BYTES = 1 << 26
_SCHEMA = pa.schema(
    [
        ("trace", pa.int64()),
        ("ids", pa.list_(pa.int32())),
        ("logps", pa.list_(pa.float16())),
    ]
)


@dataclass(frozen=True)
class StoreMeta:
    """Figures of a teacher's distributions."""

    source: str
    traces: int
    """Traces that have distributions."""
    tokens: int
    """Tokens that have one."""
    kept: int
    """K: the most entries of a token."""
    likely: int
    """Tokens of traces that are among the entries of their own distribution."""
    mass: float
    """Sum over tokens of the probability that the entries have."""
    largest_id: int
    bytes: int
    checksum: str = ""
    """Hash of the Arrow file and of all other fields. Empty in old caches, which are made again."""

    def with_checksum(self, data: Path) -> StoreMeta:
        """The same, with the checksum for an Arrow file in a folder of the token cache's."""
        plain = json.dumps(asdict(replace(self, checksum="")), sort_keys=True)
        content = f"{plain}\n{data_checksum(data, data.parent.parent.parent)}"
        return replace(self, checksum=xxhash.xxh3_128_hexdigest(content.encode()))


class Store:
    """The distributions of one teacher, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Open a complete cache; see `open_store`."""
        self.folder = folder
        self.meta = _read_meta(folder)
        reader = pa.ipc.open_file(pa.memory_map(str(folder / _DATA)))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._places = {
            trace: (number, place)
            for number, batch in enumerate(self._batches)
            for place, trace in enumerate(batch["trace"].to_pylist())
        }

    def __reduce__(self) -> tuple[object, ...]:
        return Store, (self.folder,)  # a worker maps the file itself

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the cache."""
        return self.folder / _DATA, self.folder / _META

    def has(self, trace: int) -> bool:
        """Whether a trace has distributions."""
        return trace in self._places

    def of(self, trace: int, tokens: int) -> tuple[np.ndarray, np.ndarray] | None:
        """int32 ids and float16 log-probs [tokens, K] of a completion, or None.

        Args:
            trace: its index in the data set.
            tokens: of the completion, before it is truncated.
        """
        found = self._places.get(trace)
        if found is None:
            return None
        batch = self._batches[found[0]]
        ids = batch["ids"][found[1]].values.to_numpy().reshape(tokens, -1)
        logps = batch["logps"][found[1]].values.to_numpy().reshape(tokens, -1)
        return ids, logps


def open_store(folder: Path) -> Store | None:
    """The cache in a folder; None if it is missing, incomplete or damaged."""
    try:
        meta = _read_meta(folder)
        whole = meta == meta.with_checksum(folder / _DATA)
    except (OSError, ValueError, TypeError):
        return None
    return Store(folder) if whole else None


def _read_meta(folder: Path) -> StoreMeta:
    return StoreMeta(**json.loads((folder / _META).read_text()))


def write_store(
    folder: Path,
    source: str,
    distributions: Iterable[tuple[int, np.ndarray, np.ndarray, np.ndarray]],
) -> Store:
    """Write distributions as they come; only a batch is held in memory.

    Args:
        folder: created if missing.
        source: what they were read from, for messages.
        distributions: (trace, ids [tokens, K], log-probs [tokens, K], the completion's own tokens).

    Raises:
        RunError: the folder cannot be written.
    """
    waiting: list[tuple[int, np.ndarray, np.ndarray]] = []
    traces = tokens = kept = likely = held = 0
    mass, largest = 0.0, -1

    def batch() -> pa.RecordBatch:
        columns = (
            pa.array([trace for trace, _, _ in waiting], pa.int64()),
            pa.array([ids.reshape(-1) for _, ids, _ in waiting], _SCHEMA.field("ids").type),
            pa.array([logps.reshape(-1) for _, _, logps in waiting], _SCHEMA.field("logps").type),
        )
        return pa.RecordBatch.from_arrays(list(columns), schema=_SCHEMA)

    partial = folder / f"{_DATA}.{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            for trace, ids, logps, own in distributions:
                used = ids != PADDING
                traces += 1
                tokens += int(used.any(axis=1).sum())
                kept = max(kept, ids.shape[1])
                likely += int((ids == own[:, None]).any(axis=1).sum())
                mass += float(np.exp(logps, dtype=np.float64).sum())
                largest = max(largest, int(ids.max(initial=-1)))
                waiting.append((trace, ids.astype(np.int32), logps.astype(np.float16)))
                held += 6 * ids.size
                if held > _BATCH_BYTES:
                    writer.write_batch(batch())
                    waiting.clear()
                    held = 0
            if waiting:
                writer.write_batch(batch())
        size = partial.stat().st_size
        meta = StoreMeta(source, traces, tokens, kept, likely, mass, largest, size)
        os.replace(partial, folder / _DATA)
        meta = meta.with_checksum(folder / _DATA)
        described = partial.with_suffix(".meta")
        described.write_text(json.dumps(asdict(meta), indent=1))
        os.replace(described, folder / _META)
    except OSError as error:
        raise RunError(f"{folder}: distributions cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Store(folder)


@dataclass(frozen=True)
class Distributions:
    """The distributions of one or several teachers of a data set."""

    stores: Sequence[Store]
    weights: Sequence[float]
    """Of each teacher, as shares of their sum at each token that has distributions of them."""

    @property
    def kept(self) -> int:
        """K: entries of a token. Those of several teachers are joined."""
        return sum(store.meta.kept for store in self.stores)

    @property
    def key(self) -> str:
        """Identifies them: hashes of their content."""
        parts = zip(self.stores, self.weights, strict=True)
        return " ".join(f"{store.folder.name}*{weight:g}" for store, weight in parts)

    @property
    def files(self) -> list[Path]:
        """The files of the caches."""
        return [file for store in self.stores for file in store.files]

    def has(self, trace: int) -> bool:
        """Whether a trace has distributions of any teacher."""
        return any(store.has(trace) for store in self.stores)

    def of(self, trace: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids and float16 log-probs [tokens, K] of a completion.

        A token without a distribution has PADDING and -inf.

        Args:
            trace: its index in the data set.
            tokens: of the completion, before it is truncated.
        """
        ids = np.full((tokens, self.kept), PADDING, np.int32)
        logps = np.full((tokens, self.kept), -np.inf, np.float32)
        start = 0
        weights = np.zeros((tokens, self.kept), np.float64)
        total = np.zeros(tokens)
        for store, weight in zip(self.stores, self.weights, strict=True):
            found = store.of(trace, tokens)
            if found is not None:
                columns = slice(start, start + found[0].shape[1])
                ids[:, columns], logps[:, columns] = found
                weights[:, columns] = weight
                total += weight * (found[0] != PADDING).any(axis=1)
            start += store.meta.kept
        if len(self.stores) > 1:
            with np.errstate(divide="ignore", invalid="ignore"):
                logps += np.log(weights / total[:, None])
            ids, logps = _joined(ids, logps)
        return ids, logps.astype(np.float16)


def _joined(ids: np.ndarray, logps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add up the probabilities of entries of one token with equal ids."""
    logps = np.where(ids == PADDING, -np.inf, logps)
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    logps = np.take_along_axis(logps, order, axis=1)
    # From right to left, so that the first of equal ids gets the sum of all.
    for column in range(ids.shape[1] - 1, 0, -1):
        same = (ids[:, column] == ids[:, column - 1]) & (ids[:, column] != PADDING)
        logps[same, column - 1] = np.logaddexp(logps[same, column - 1], logps[same, column])
        ids[same, column] = PADDING
        logps[same, column] = -np.inf
    return ids, np.minimum(logps, 0)  # rounding of the sum of shares
