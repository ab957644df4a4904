"""Tokenized traces on disk: one Arrow file, memory-mapped, and a `meta.json` that says it is whole.

`meta.json` is written last and holds the Arrow file's size: a cache that was cut off, by a kill
or a full disk, is told from a complete one without reading it, and made again.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from redi.engine.errors import RunError

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
        ("row", pa.int64()),
        ("digest", pa.uint64()),
        ("unknown", pa.int32()),
        ("control", pa.int32()),
        ("source", pa.int32()),
        ("group", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Meta:
    """What `meta.json` holds."""

    key: str
    """Hash of everything that shaped the tokens; the cache folder's name."""
    bytes: int
    """Size of the Arrow file."""
    rows: int
    """Number of traces."""
    sources: tuple[str, ...]
    """Names of the input files, when the cache was made."""
    dropped: dict[str, int]
    """Rows and traces that normalising left out, by reason."""
    control_tokens: dict[str, int] = field(default_factory=dict)
    """Traces whose text spells a control token of the tokenizer, by token."""


class TokenizedTraces:
    """A complete cache, memory-mapped: token ids stay on disk until they are asked for.

    Attributes (n traces, in the order of the input):
        key: hash of everything that shaped the tokens.
        lengths: int64 [n], prompt and completion with its end.
        prompt_lengths: int64 [n].
        signs: int8 [n], +1 or -1.
        groups: int64 [n], dense problem numbers in order of first appearance.
        weights: float32 [n].
        digests: uint64 [n], hash of prompt and completion; equal for equal tokens.
        unknown: int32 [n], tokens that the tokenizer does not know.
        control: int32 [n], control tokens of the tokenizer that the trace's text spells.
        control_tokens: traces with such a token, by token.
        dropped: rows and traces that normalising left out, by reason.
        sources: names of the input files.
    """

    def __init__(self, folder: Path, meta: Meta, sources: Sequence[str]) -> None:
        self.folder = folder
        self.key = meta.key
        self.dropped = meta.dropped
        self.control_tokens = meta.control_tokens
        self.sources = tuple(sources)
        self._meta = meta
        reader = pa.ipc.open_file(pa.memory_map(str(folder / _DATA)))
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts = np.cumsum([0] + [batch.num_rows for batch in batches])
        self._offsets = [batch["ids"].offsets.to_numpy() for batch in batches]
        self._values = [batch["ids"].values.to_numpy() for batch in batches]
        self._teachers = [batch["teacher"] for batch in batches]
        lengths = [np.diff(offsets) for offsets in self._offsets]
        self.lengths = np.concatenate(lengths).astype(np.int64)

        def column(name: str) -> np.ndarray:
            return np.concatenate([batch[name].to_numpy() for batch in batches])

        self.prompt_lengths = column("prompt_length")
        self.signs = column("sign")
        self.groups = column("group")
        self.weights = column("weight")
        self.digests = column("digest")
        self.unknown = column("unknown")
        self.control = column("control")
        self._source_numbers = column("source")
        self._row_numbers = column("row")

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[object, ...]:
        # A memory map cannot be sent to a worker process; the worker opens its own.
        return TokenizedTraces, (self.folder, self._meta, self.sources)

    def ids(self, index: int) -> np.ndarray:
        """Token ids of a trace, int32 [lengths[index]]: a read-only view of the file."""
        batch, position = self._locate(index)
        start, end = self._offsets[batch][position : position + 2]
        return self._values[batch][start:end]

    def where(self, index: int) -> str:
        """The row that a trace came from, for messages: "file.jsonl:12"."""
        self._locate(index)
        return f"{self.sources[self._source_numbers[index]]}:{self._row_numbers[index]}"

    def teacher(self, index: int) -> str | None:
        """The trace's teacher, if the row named one."""
        batch, position = self._locate(index)
        return self._teachers[batch][position].as_py()

    def teacher_numbers(self) -> tuple[np.ndarray, list[str]]:
        """(int64 [n] into the names, names); traces without a teacher count as "none"."""
        known = pa.chunked_array(self._teachers).fill_null("none").combine_chunks()
        encoded = known.dictionary_encode()
        return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()

    @property
    def source_numbers(self) -> np.ndarray:
        """int32 [n]: positions in `sources`."""
        return self._source_numbers

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"trace {index} of {len(self)}")
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return batch, int(index - self._starts[batch])


def open_cache(folder: Path, sources: Sequence[str] | None = None) -> TokenizedTraces | None:
    """Opens the cache in `folder`; None if there is none, or not a whole one.

    Args:
        folder: the folder named by the cache's key.
        sources: today's names of the input files, for messages; by default those of the time
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
    """Writes `batches` (of SCHEMA) as the cache in `folder`, in place of what was there.

    Args:
        folder: made if absent.
        batches: consumed one by one; the set is never held in memory.
        describe: makes the meta data once all is written, from (bytes, rows).

    Both files get a name of their own first and are then renamed, so that a reader or a second
    writer never meets half a file. Two writers of one key write the same bytes.

    Raises RunError if the folder cannot be written.
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
            size = path.stat().st_size
        meta = describe(size, rows)
        with _Temporary(folder / _META) as path:
            path.write_text(json.dumps(asdict(meta), indent=1))
    except OSError as error:
        raise RunError(f"{folder}: the token cache cannot be written: {error}") from error


class _Temporary:
    """A file under a passing name that takes its real one when the block ends well."""

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
    try:
        meta = Meta(**json.loads((folder / _META).read_text()))
        whole = meta.key == folder.name and meta.bytes == (folder / _DATA).stat().st_size
    except (OSError, ValueError, TypeError):
        return None
    return meta if whole and meta.rows > 0 else None


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed runs left; a live writer's file is younger."""
    for path in folder.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()
