"""The token cache: tokenized traces in a memory-mapped Arrow file, with a `meta.json`.

`meta.json` is written last and contains the size of the Arrow file and a checksum of both files. A
cache that was cut off by a kill or a full disk, or changed since, is therefore detected and made
again.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash

from redi.engine.data.fingerprints import data_checksum
from redi.engine.errors import InputError, RunError

_DATA = "traces.arrow"
_META = "meta.json"
_LEFTOVER_SECONDS = 24 * 3600.0

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int64()),
        ("sign", pa.int8()),
        ("weight", pa.float32()),
        ("teacher", pa.string()),
        ("origin", pa.string()),
        ("row", pa.int64()),
        ("digest", pa.uint64()),
        ("prompt_digest", pa.uint64()),
        ("hash", pa.binary(16)),
        ("unknown", pa.int32()),
        ("control", pa.int32()),
        ("token_weights", pa.list_(pa.float32())),
        ("source", pa.int32()),
        ("group", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Meta:
    """The content of `meta.json`."""

    key: str
    """Hash of everything that determines the tokens; also the name of the cache folder."""
    bytes: int
    """Size of the Arrow file."""
    rows: int
    """Number of traces."""
    sources: tuple[str, ...]
    """Names of the input files at the time when the cache was made."""
    dropped: dict[str, int]
    """Number of rows and traces that `normalise` left out, by reason."""
    control_tokens: dict[str, int] = field(default_factory=dict)
    """Number of traces whose text contains a control token of the tokenizer, by token."""
    unread: tuple[tuple[str, ...], ...] = ()
    """For each source, the columns with meaningful content that are not read."""
    unfinished: int = 0
    """Number of traces that were already cut off in the data: their end is not trained."""
    document_start: str = ""
    """The tokens at the start of each document that are not from the row; "" if there are none."""
    faulty: int = 0
    """Number of faulty rows that were left out."""
    faults: tuple[str, ...] = ()
    """Messages about the first of them."""
    parts: dict[str, Any] = field(default_factory=dict)
    """The parts that `key` is a hash of; `files` has one hash per source. Empty in old caches."""
    split_tokens: int = 0
    """Number of tokens that the edge of a span splits."""
    splits: tuple[str, ...] = ()
    """The first of them: "file.jsonl:12: ' 42'"."""
    checksum: str = ""
    """Hash of the Arrow file and of all other fields. Empty in old caches, which are made again."""

    def with_checksum(self, data: Path) -> "Meta":
        """The same, with the checksum for an Arrow file, see `data_checksum`."""
        plain = json.dumps(asdict(replace(self, checksum="")), sort_keys=True)
        content = f"{plain}\n{data_checksum(data, data.parent.parent)}"
        return replace(self, checksum=xxhash.xxh3_128_hexdigest(content.encode()))


class TokenizedTraces:
    """A complete cache, memory-mapped: token ids are read from disk when they are used.

    Attributes (n traces, in the order of the input):
        key: hash of everything that determines the tokens, and of the selected teachers.
        lengths: int64 [n], tokens of prompt and completion with its end.
        prompt_lengths: int64 [n].
        signs: int8 [n], +1 or -1.
        groups: int64 [n], problem numbers in order of first appearance in the file.
        weights: float32 [n].
        digests: uint64 [n], hash of prompt and completion; equal for equal tokens.
        prompt_digests: uint64 [n], hash of the prompt's tokens.
        unknown: int32 [n], number of tokens that are unknown to the tokenizer.
        control: int32 [n], number of control tokens of the tokenizer in the text of the trace.
        control_tokens: number of traces with such a token, by token.
        weighted: bool [n], whether a token of the completion has another weight than 1.
        split_tokens: number of tokens that the edge of a span splits.
        splits: the first of them, with their rows.
        dropped: number of rows and traces that `normalise` left out, by reason.
        unread: columns with meaningful content that are not read, by name of the source.
        faulty: number of faulty rows that were left out.
        faults: messages about the first of them.
        unfinished: number of traces of the whole set that have no end to train.
        document_start: the tokens at the start of each document that are not from the row.
        sources: names of the input files.
        source_numbers: int32 [n], indices into `sources`.
        parts: the parts that `key` is a hash of, by name; `files` are pairs (name, hash).
    """

    def __init__(
        self,
        folder: Path,
        meta: Meta,
        sources: Sequence[str],
        teachers: Sequence[str] = (),
        teacher_weights: Mapping[str, float] | None = None,
        piece_tokens: int | None = None,
        kept: Path | None = None,
    ) -> None:
        """Open the files.

        For the last four arguments see `of_teachers`, `in_pieces` and `with_kept`.
        """
        self.folder = folder
        self.key = meta.key
        self.dropped = meta.dropped
        self.control_tokens = meta.control_tokens
        self.faulty = meta.faulty
        self.faults = tuple(meta.faults)
        self.unfinished = meta.unfinished
        self.split_tokens = meta.split_tokens
        self.splits = tuple(meta.splits)
        self.document_start = meta.document_start
        self.sources = tuple(sources)
        named = zip(self.sources, meta.parts.get("files", ()), strict=False)
        self.parts = meta.parts and meta.parts | {"files": [list(one) for one in named]}
        found = zip(self.sources, meta.unread, strict=False)
        self.unread = {name: tuple(columns) for name, columns in found if columns}
        self._meta = meta
        self._teachers = tuple(teachers)
        self._teacher_weights = dict(teacher_weights or {})
        self._piece_tokens = piece_tokens
        reader = pa.ipc.open_file(pa.memory_map(str(folder / _DATA)))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts = np.cumsum([0] + [batch.num_rows for batch in self._batches])
        self._offsets = [batch["ids"].offsets.to_numpy() for batch in self._batches]
        self._values = [batch["ids"].values.to_numpy() for batch in self._batches]
        self._places: np.ndarray | None = None  # of the selected traces; None: all
        if self._teachers or self._teacher_weights:
            factors = self._teacher_factors()
            self._places = np.flatnonzero(factors)
        self.lengths = self._chosen([np.diff(offsets) for offsets in self._offsets])
        self.lengths = self.lengths.astype(np.int64)
        self.prompt_lengths = self._column("prompt_length")
        self.signs = self._column("sign")
        self.groups = self._column("group")
        self.weights = self._column("weight")
        self.digests = self._column("digest")
        self.prompt_digests = self._column("prompt_digest")
        self.unknown = self._column("unknown")
        self.control = self._column("control")
        given = [batch["token_weights"].is_valid() for batch in self._batches]
        self.weighted = self._chosen([one.to_numpy(zero_copy_only=False) for one in given])
        self.source_numbers = self._column("source")
        self._row_numbers = self._column("row")
        if self._places is not None:
            self.weights = self.weights * factors[self._places]
        if self._teachers:
            chosen = "\n".join([meta.key, *sorted(self._teachers)])
            self.key = xxhash.xxh3_128_hexdigest(chosen.encode())
            others = len(factors) - len(self)
            self.dropped = {**meta.dropped, "of other teachers": others} if others else meta.dropped
        self._begins: np.ndarray | None = None  # first token of each piece; None: 0 for all
        if piece_tokens is not None and not self.prompt_lengths.all():
            self._cut(piece_tokens)
        self._kept_file = kept
        if kept is not None:
            self._kept = np.load(kept, mmap_mode="r")
            counts = self.lengths - self.prompt_lengths
            self._kept_starts = np.concatenate([[0], np.cumsum(counts)])
            self.weighted = np.ones_like(self.weighted)
            self.key = xxhash.xxh3_128_hexdigest(f"{self.key}\n{kept.name}".encode())

    def _cut(self, piece_tokens: int) -> None:
        """Replace each document by its pieces; see `in_pieces`."""
        whole, self._begins, self.lengths = _pieces(
            self.lengths, self.prompt_lengths == 0, piece_tokens
        )
        places = np.arange(len(self._column("row"))) if self._places is None else self._places
        self._places = places[whole]
        documents = self.prompt_lengths[whole] == 0
        for name in ("signs", "weights", "unknown", "control", "weighted"):
            setattr(self, name, getattr(self, name)[whole])
        for name in ("source_numbers", "_row_numbers"):
            setattr(self, name, getattr(self, name)[whole])
        self.prompt_lengths = np.where(documents, 1, self.prompt_lengths[whole])
        # Equal documents have equal pieces. An odd factor keeps the pieces of one apart.
        apart = self._begins.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self.digests = self.digests[whole] ^ apart
        self.prompt_digests = np.where(documents, self.digests, self.prompt_digests[whole])
        own = int(self.groups.max()) + 1 + np.arange(len(whole))
        self.groups = np.where(documents, own, self.groups[whole])
        cut = f"{self.key}\npieces of {piece_tokens}"
        self.key = xxhash.xxh3_128_hexdigest(cut.encode())

    def _column(self, name: str) -> np.ndarray:
        return self._chosen([batch[name].to_numpy() for batch in self._batches])

    def _chosen(self, parts: list[np.ndarray]) -> np.ndarray:
        whole = np.concatenate(parts)
        return whole if self._places is None else whole[self._places]

    def of_teachers(
        self, teachers: Sequence[str], weights: Mapping[str, float]
    ) -> "TokenizedTraces":
        """Select the traces of these teachers and multiply their weights.

        Args:
            teachers: the teachers to keep; empty: all traces, also those without a teacher.
            weights: factor per teacher, finite and > 0; 1 for the others.

        Raises:
            InputError: the set has no trace of one of the teachers.
        """
        if not (teachers or weights):
            return self
        return TokenizedTraces(
            self.folder, self._meta, self.sources, teachers, weights, self._piece_tokens
        )

    def with_kept(self, path: Path) -> "TokenizedTraces":
        """Mask tokens in addition to those that spans mask.

        Args:
            path: bool [completion tokens of all traces, one after the other] as .npy; False masks.
        """
        chosen = self._teachers, self._teacher_weights, self._piece_tokens
        return TokenizedTraces(self.folder, self._meta, self.sources, *chosen, path)

    def in_pieces(self, tokens: int) -> "TokenizedTraces":
        """Cut each document (a text without a prompt) into pieces of at most this many tokens.

        Each piece is a trace. Every token is in one piece; the first of a piece is its prompt.

        Raises:
            InputError: fewer than 3 tokens: a piece could have none to train.
        """
        if self.prompt_lengths.all():
            return self
        if tokens < 3:
            raise InputError(f"[data] max_tokens = {tokens}: pieces of a text need at least 3")
        chosen = self._teachers, self._teacher_weights
        return TokenizedTraces(self.folder, self._meta, self.sources, *chosen, tokens)

    def _teacher_factors(self) -> np.ndarray:
        """Factor on the weight of each trace, float32; 0 removes the trace."""
        numbers, names = self.names("teacher")
        known = [name for name in names if name is not None]
        for name in (*self._teachers, *self._teacher_weights):
            if name not in known:
                found = ", ".join(known[:20]) or "no column teacher"
                raise InputError(f"[data] teacher {name!r} is not in the data; it has: {found}")
        factors = [
            self._teacher_weights.get(name or "", 1.0)
            if not self._teachers or name in self._teachers
            else 0.0
            for name in names
        ]
        return np.array(factors, dtype=np.float32)[numbers]

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[object, ...]:
        # A memory map cannot be sent to a worker process; the worker opens its own.
        chosen = self._teachers, self._teacher_weights, self._piece_tokens, self._kept_file
        return TokenizedTraces, (self.folder, self._meta, self.sources, *chosen)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the cache."""
        kept = (self._kept_file,) if self._kept_file else ()
        return self.folder / _DATA, self.folder / _META, *kept

    @property
    def is_filtered(self) -> bool:
        """True if a filter masks tokens; see `with_kept`."""
        return self._kept_file is not None

    def ids(self, index: int) -> np.ndarray:
        """Token ids of a trace, int32 [lengths[index]], as a read-only view of the file."""
        batch, position = self._locate(index)
        start = self._offsets[batch][position]
        start += 0 if self._begins is None else self._begins[index]
        return self._values[batch][start : start + self.lengths[index]]

    def token_weights(self, index: int) -> np.ndarray | None:
        """Weight of each token of a completion, float32 [lengths[index] - prompt_lengths[index]].

        0: the token is not trained. None: all are 1.
        """
        if self._kept_file is not None:
            kept = self._kept[self._kept_starts[index] : self._kept_starts[index + 1]]
            weights = self.span_weights(index)
            return kept.astype(np.float32) if weights is None else weights * kept
        return self.span_weights(index) if self.weighted[index] else None

    def span_weights(self, index: int) -> np.ndarray | None:
        """`token_weights` by spans alone."""
        batch, position = self._locate(index)
        if not self._batches[batch]["token_weights"][position].is_valid:
            return None
        weights = self._batches[batch]["token_weights"][position].values.to_numpy()
        # The first token of a piece of a document counts as its prompt, and has a weight in the
        # file.
        prompt = int(self.prompt_lengths[index])
        start = prompt - self._batches[batch]["prompt_length"][position].as_py()
        start += 0 if self._begins is None else int(self._begins[index])
        return weights[start : start + int(self.lengths[index]) - prompt]

    def num_targets(self, indices: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Number of trained tokens of traces: those of the completion that are not masked.

        Args:
            indices: int64 [n], the traces.
            lengths: int64 [n], number of tokens of each that are kept.

        Returns:
            int64 [n].
        """
        counts = lengths - self.prompt_lengths[indices]
        for place in np.flatnonzero(self.weighted[indices]).tolist():
            weights = self.token_weights(int(indices[place]))
            assert weights is not None
            counts[place] = np.count_nonzero(weights[: counts[place]])
        return counts

    def where(self, index: int) -> str:
        """The row of a trace, for messages: "file.jsonl:12"."""
        self._locate(index)
        return f"{self.sources[self.source_numbers[index]]}:{self._row_numbers[index]}"

    def hash(self, index: int) -> str:
        """The `trace_hash` of a trace; of the whole text for a piece of a document."""
        batch, position = self._locate(index)
        return self._batches[batch]["hash"][position].as_py().hex()

    def teacher(self, index: int) -> str | None:
        """The trace's teacher, or None."""
        batch, position = self._locate(index)
        return self._batches[batch]["teacher"][position].as_py()

    def names(self, column: Literal["teacher", "origin"]) -> tuple[np.ndarray, list[str | None]]:
        """(int64 [n] indices into the names, names in order of first appearance or None)"""
        whole = pa.chunked_array([batch[column] for batch in self._batches])
        encoded = whole.dictionary_encode("encode").combine_chunks()
        return self._chosen([encoded.indices.to_numpy()]), encoded.dictionary.to_pylist()

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"trace {index} of {len(self)}")
        place = index if self._places is None else int(self._places[index])
        batch = int(np.searchsorted(self._starts, place, side="right")) - 1
        return batch, int(place - self._starts[batch])


def _pieces(
    lengths: np.ndarray, cut: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(trace, first token, length) of each piece, int64 [pieces].

    No piece has a single token: the one before it then ends a token earlier.

    Args:
        lengths: int64 [n], tokens of each trace.
        cut: bool [n], the traces to cut; the others are one piece each.
        most: longest piece.
    """
    counts = np.where(cut, -(-lengths // most), 1)
    whole = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(whole)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = number * most
    last = number == counts[whole] - 1
    begins -= last & (number > 0) & (lengths[whole] - begins == 1)
    ends = np.append(begins[1:], 0)
    ends[last] = lengths[whole[last]]
    return whole, begins, ends - begins


def open_cache(folder: Path, sources: Sequence[str] | None = None) -> TokenizedTraces | None:
    """Open the cache in `folder`; None if it is missing, incomplete or damaged.

    Args:
        folder: the cache folder, whose name is the cache's key.
        sources: current names of the input files, for messages; default: the names at the time
            when the cache was made.
    """
    meta = _read_meta(folder)
    if meta is None:
        return None
    try:
        traces = TokenizedTraces(folder, meta, meta.sources if sources is None else sources)
    except (OSError, pa.ArrowException, ValueError, KeyError):
        return None
    return traces if len(traces) == meta.rows else None


def write_cache(
    folder: Path,
    batches: Iterable[pa.RecordBatch],
    describe: Callable[[int, int], Meta],
) -> None:
    """Write `batches` as the cache in `folder`, replacing an existing one.

    Both files are written under a temporary name and then renamed, so that no reader or second
    writer sees an incomplete file. Two writers of the same key write the same bytes.

    Args:
        folder: created if missing.
        batches: batches of SCHEMA, consumed one by one; only one is held in memory.
        describe: makes the metadata from (bytes, rows) after all batches are written. If it
            raises, no file remains.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        rows = 0
        with _Temporary(folder / _DATA) as path:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
                for batch in batches:
                    writer.write_batch(batch)
                    rows += batch.num_rows
            meta = describe(path.stat().st_size, rows)
        meta = meta.with_checksum(folder / _DATA)
        with _Temporary(folder / _META) as path:
            path.write_text(json.dumps(asdict(meta), indent=1))
    except OSError as error:
        raise RunError(f"{folder}: the token cache cannot be written: {error}") from error


class _Temporary:
    """A file with a temporary name; it gets its real name if the block ends without an error."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._path = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._path.unlink(missing_ok=True)
            return
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._path, self._target)


def _read_meta(folder: Path) -> Meta | None:
    data = folder / _DATA
    try:
        meta = Meta(**json.loads((folder / _META).read_text()))
        if meta.key != folder.name or meta.bytes != data.stat().st_size:
            return None
        return meta if meta.checksum == meta.with_checksum(data).checksum else None
    except (OSError, ValueError, TypeError):
        return None


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed runs. The file of a live writer is newer."""
    for path in folder.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()
