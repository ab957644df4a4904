"""Reads teachers' distributions from files, and aligns them with the traces of a data set.

A source is a table of `redi logprobs --top`, a file of DistillKit, or rows of traces with columns
of distributions, such as the data set itself. Tables and rows are joined by the hash of prompt and
completion, files of DistillKit by their tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from redi.engine.console import Console
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.content_hash import trace_hash
from redi.engine.data.distributions import Store, open_store, write_store
from redi.engine.data.fingerprints import source_fingerprint
from redi.engine.data.messages import DISTRIBUTION_COLUMNS
from redi.engine.data.read_position import ReadPosition, ReadProgress
from redi.engine.data.rows import scan_source
from redi.engine.data.sources import Source, find_sources
from redi.engine.data.text import load_tokenizer
from redi.engine.data.traces import normalise
from redi.engine.distill import distillkit
from redi.engine.distill.columns import read_columns
from redi.engine.distill.given import PADDING, Given, Misaligned, align, check
from redi.engine.distill.tables import list_of, numbers, typed
from redi.engine.distill.token_texts import TokenTexts
from redi.engine.errors import FaultyRow, InputError, faulty_rows

VERSION = "1"
"""Increase it if the same files would give other distributions."""
_TABLE = {
    "hash": pa.string(),
    "row": pa.string(),
    "token_ids": list_of(pa.int32()),
    "top_ids": list_of(pa.int32(), 2),
    "top_logps": list_of(pa.float32(), 2),
}
_DISTILLKIT = {
    "input_ids": list_of(pa.int32()),
    **dict.fromkeys(distillkit.COLUMNS[1:], list_of(pa.uint8(), 2)),
}
_ADVICE = (
    "a teacher's file has rows of traces with columns of docs/distillation.md, or is a .parquet "
    "table of `redi logprobs --top K`"
)
_ROWS = 16
"""Rows of a columnar file that are read at a time: one may have megabytes."""

_Aligned = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""(trace, ids, log-probs, the completion's own tokens)"""


def read_teacher(
    paths: Sequence[str],
    tokens: TokenizedTraces,
    *,
    format: str,
    train_on: str,
    faulty: str,
    tokenizer: str,
    cache_dir: Path,
    console: Console,
) -> Store:
    """The distributions of one teacher for the traces of a data set, from the cache or from files.

    Args:
        paths: files, folders and hub names.
        tokens: the data set; the cache is in its folder.
        format, train_on, faulty: how rows of traces are read, as in `[data]`.
        tokenizer: of the data set, for tokens that are given as text.
        cache_dir: of hashes of files.
        console: where progress is shown.

    Raises:
        InputError: a file has no distributions, or those of other tokens; names file and row. Or no
            trace has any.
    """
    sources = find_sources(paths)
    files = [source_fingerprint(source, cache_dir) for source in sources]
    files += [distillkit.fingerprint(Path(source.name)) for source in sources]
    parts = [VERSION, tokens.key, format, train_on, faulty, *files]
    folder = tokens.folder / f"teacher-{xxhash.xxh3_128_hexdigest(chr(10).join(parts).encode())}"
    if (made := open_store(folder)) is not None:
        return made
    names = ", ".join(source.name for source in sources)
    position = ReadPosition(sources)
    reader = _Reader(tokens, format, train_on, faulty, tokenizer, position)
    with closing(ReadProgress("reading distributions MB of", position, console)) as progress:

        def aligned() -> Iterator[_Aligned]:
            for source in sources:
                for count, one in enumerate(reader.read(source), start=1):
                    progress.show(position.done, f"{count:,} traces")
                    yield one
            if reader.faults:
                raise faulty_rows(reader.faults)
            if not reader.found:
                raise InputError(
                    f"{names}: has distributions of none of the {len(tokens):,} traces of the "
                    "data; distill.path must name a table of `redi logprobs --top K`, or files "
                    "with the same prompts and completions (DistillKit: the same tokens) and "
                    "columns of docs/distillation.md"
                )

        return write_store(folder, names, aligned())


class _Reader:
    """Reads sources of any kind; the first distributions of a trace count."""

    def __init__(
        self,
        tokens: TokenizedTraces,
        format: str,
        train_on: str,
        faulty: str,
        tokenizer: str,
        position: ReadPosition,
    ) -> None:
        self._tokens = tokens
        self._format, self._train_on, self._faulty = format, train_on, faulty
        self._position = position
        self._tokenizer = tokenizer
        self.found: set[int] = set()
        self.faults: list[str] = []

    def read(self, source: Source) -> Iterator[_Aligned]:
        """Yield the distributions of the traces of the data set."""
        if source.kind != "parquet":
            yield from self._rows(source)
            return
        try:
            columns = set(pq.read_schema(source.name).names)
        except (OSError, pa.ArrowException) as error:
            problem = " ".join(str(error).split())
            raise InputError(f"{source.name}: cannot be read: {problem}") from None
        if columns.issuperset(distillkit.COLUMNS):
            yield from self._distillkit(source)
        elif "top_ids" in columns:
            yield from self._table(source)
        elif {"hash", "logp_mean"} <= columns:
            raise InputError(
                f"{source.name}: a table of `redi logprobs` without distributions; write it with "
                "--top K"
            )
        else:
            yield from self._rows(source)

    def _aligned(self, given: Given, traces: Sequence[int], where: str) -> Iterator[_Aligned]:
        """Align with each of the traces that has the same tokens; a fault if none has."""
        problem, matched = "", False
        for trace in traces:
            ids, prompt = self._tokens.ids(trace), int(self._tokens.prompt_lengths[trace])
            weights = self._tokens.token_weights(trace)
            try:
                likely, logps = align(spread(given, weights), ids, prompt)
            except Misaligned as error:
                problem = problem or f"{error}, in the trace of {self._tokens.where(trace)}"
                continue
            matched = True
            if trace not in self.found:
                self.found.add(trace)
                yield trace, likely, logps, ids[prompt:]
        if problem and not matched:
            self.faults.append(f"{where}: the teacher's tokens are not the student's: {problem}")

    def _table(self, source: Source) -> Iterator[_Aligned]:
        """A table of `redi logprobs --top`."""
        for row, batch, place in self._parquet_rows(source, _TABLE):
            where = f"{source.name}:{row} (of {batch['row'][place]})"
            try:
                own, ids, logps = (numbers(batch, name, place) for name in list(_TABLE)[2:])
                if ids.shape != logps.shape or len(ids) != len(own):
                    raise ValueError(
                        f"top_ids [{', '.join(map(str, ids.shape))}] and top_logps "
                        f"[{', '.join(map(str, logps.shape))}] must have K entries of each of the "
                        f"{len(own)} token_ids"
                    )
                given = check(Given(ids, logps, own))
            except ValueError as error:
                self.faults.append(f"{where}: {error}")
                continue
            yield from self._aligned(given, self._by_hash[batch["hash"][place].as_py()], where)

    def _distillkit(self, source: Source) -> Iterator[_Aligned]:
        """A file of DistillKit. It may have one more token, which pads the text."""
        settings = distillkit.read_compression(Path(source.name))
        for row, batch, place in self._parquet_rows(source, _DISTILLKIT):
            try:
                ids, *packed = (numbers(batch, name, place) for name in _DISTILLKIT)
                for length in (len(ids), len(ids) - 1):
                    if traces := self._by_tokens[_digest(ids[:length])]:
                        break
                else:
                    continue
                given = distillkit.decompress(settings, *(one[: length - 1] for one in packed))
            except ValueError as error:
                self.faults.append(f"{source.name}:{row}: {error}")
                continue
            yield from self._aligned(given, traces, f"{source.name}:{row}")

    def _rows(self, source: Source) -> Iterator[_Aligned]:
        """Rows of traces with columns of distributions."""
        for row in scan_source(
            source, self._format, columns=DISTRIBUTION_COLUMNS, position=self._position
        ):
            try:
                if isinstance(row, FaultyRow):
                    raise row
                if isinstance(row, InputError):
                    raise InputError(f"{row}; {_ADVICE}")
                traces = normalise(row, row.format, train_on=self._train_on)
            except FaultyRow as error:
                if self._faulty == "error":
                    self.faults.append(str(error))
                continue
            for trace in traces:
                places = self._by_hash[trace_hash(trace)]
                if trace.distributions is None or not places:
                    continue
                try:
                    given = read_columns(row, *trace.distributions, self._spell)
                except FaultyRow as error:
                    self.faults.append(str(error))
                else:
                    yield from self._aligned(given, places, row.where)

    def _spell(self, text: str, given: list[int] | None) -> int:
        return self._texts(text, given)

    def _parquet_rows(
        self, source: Source, columns: Mapping[str, pa.DataType]
    ) -> Iterator[tuple[int, pa.RecordBatch, int]]:
        """(row number, from 1; a batch; the row's place in it) of each row."""
        try:
            file = pq.ParquetFile(pa.memory_map(source.name))
            if missing := set(columns) - set(file.schema_arrow.names):
                raise InputError(f"{source.name}: has no column {min(missing)!r}")
            number, rows = 0, max(file.metadata.num_rows, 1)
            self._position.begin(source, lambda size: size * number / rows)
            for batch in file.iter_batches(batch_size=_ROWS, columns=list(columns)):
                batch = typed(batch, columns)
                for place in range(batch.num_rows):
                    number += 1
                    yield number, batch, place
        except (OSError, pa.ArrowException) as error:
            problem = " ".join(str(error).split())
            raise InputError(f"{source.name}: cannot be read: {problem}") from None

    @cached_property
    def _texts(self) -> TokenTexts:
        return TokenTexts(load_tokenizer(self._tokenizer))

    @cached_property
    def _by_hash(self) -> defaultdict[str, list[int]]:
        found = defaultdict(list)
        for trace in range(len(self._tokens)):
            found[self._tokens.hash(trace)].append(trace)
        return found

    @cached_property
    def _by_tokens(self) -> defaultdict[int, list[int]]:
        found = defaultdict(list)
        for trace in range(len(self._tokens)):
            found[_digest(self._tokens.ids(trace))].append(trace)
        return found


def spread(given: Given, weights: np.ndarray | None) -> Given:
    """Distributions of the trained tokens of a completion as those of all its tokens.

    Args:
        given: as the table has them, without the tokens that spans mask; others are returned as
            they are.
        weights: float32 [completion], 0 where a token is masked; None: none is.
    """
    if weights is None or given.own is None:
        return given
    places = np.flatnonzero(weights)
    count = len(given.ids)
    if len(places) == len(weights) or count not in (len(places), len(places) - 1):
        return given
    whole = len(weights) - (count < len(places))
    ids = np.full((whole, given.ids.shape[1]), PADDING, np.int32)
    logps = np.full(ids.shape, -np.inf, np.float32)
    own = np.full(whole, PADDING, np.int32)
    places = places[:count]
    ids[places], logps[places], own[places] = given.ids, given.logps, given.own
    return Given(ids, logps, own)


def _digest(ids: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids).tobytes())
