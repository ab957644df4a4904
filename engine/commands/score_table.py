"""The Parquet table of `redi logprobs`, written block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from redi.engine.config.sections import Recipe
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.rows import read_rows
from redi.engine.data.text import Encoder
from redi.engine.data.traces import Trace, normalise
from redi.engine.errors import RunError
from redi.engine.train.prepare_data import token_settings
from redi.engine.train.score_traces import BlockScores

_GROUP_BYTES = 1 << 26
"""Bytes of a row group, which are in memory."""
_OF_TRACES = [
    *(("row", pa.string()), ("trace", pa.int64()), ("hash", pa.string())),
    *(("correct", pa.bool_()), ("teacher", pa.string()), ("prompt_tokens", pa.int64())),
    *(("completion_tokens", pa.int64()), ("tokens", pa.int64()), ("logp_sum", pa.float64())),
    *(("logp_mean", pa.float64()), ("entropy_mean", pa.float64())),
]
_OF_TOKENS = [
    ("token_ids", pa.list_(pa.int32())),
    ("token_logps", pa.list_(pa.float32())),
    ("token_entropies", pa.list_(pa.float32())),
    ("token_starts", pa.list_(pa.int32())),
    ("token_ends", pa.list_(pa.int32())),
]
_TOP = [
    ("top_ids", pa.list_(pa.list_(pa.int32()))),
    ("top_logps", pa.list_(pa.list_(pa.float16()))),
]


class ScoreTable:
    """A table with a row for each trace, in order; see `write_logprobs` for its columns.

    Use it as a context manager, which completes the file.
    """

    def __init__(
        self,
        path: Path,
        recipe: Recipe,
        tokens: TokenizedTraces,
        lengths: np.ndarray,
        per_token: bool,
        top: bool = False,
    ) -> None:
        """Begin the file.

        Args:
            recipe: its `[data]` and `[model]`, by which `tokens` were made.
            lengths: int64 [traces], tokens kept of each.
            per_token: whether it has the columns of tokens.
            top: whether it has those of the most likely tokens too.
        """
        self._tokens = tokens
        self._lengths = lengths
        self._settings = token_settings(recipe, recipe.data.paths) if per_token else None
        self._traces = _traces(recipe, tokens)  # read only for the places of tokens
        self._encoder: Encoder | None = None
        self._next = 0
        self._schema = pa.schema(
            _OF_TRACES + (_OF_TOKENS if per_token else []) + (_TOP if top else [])
        )
        self._waiting: list[pa.Table] = []
        self._writer = pq.ParquetWriter(path, self._schema)

    def __enter__(self) -> ScoreTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, scores: BlockScores) -> None:
        """Add the next traces, as many as have scores."""
        count = scores.sums.shape[1]
        indices = np.arange(self._next, self._next + count)
        self._next += count
        counts = self._tokens.num_targets(indices, self._lengths[indices])
        logps, entropies = scores.sums[:2]
        with np.errstate(invalid="ignore"):  # NaN where every token is masked
            means = logps / counts, entropies / counts
        prompts = self._tokens.prompt_lengths[indices]
        columns: dict[str, Any] = {
            "row": [self._tokens.where(index) for index in indices.tolist()],
            "trace": indices,
            "hash": [self._tokens.hash(index) for index in indices.tolist()],
            "correct": self._tokens.signs[indices] > 0,
            "teacher": [self._tokens.teacher(index) for index in indices.tolist()],
            "prompt_tokens": prompts,
            "completion_tokens": self._tokens.lengths[indices] - prompts,
            "tokens": counts,
            "logp_sum": logps,
            "logp_mean": means[0],
            "entropy_mean": means[1],
        }
        if self._settings is not None:
            assert scores.tokens is not None, "asked for"
            parts = np.split(scores.tokens, np.cumsum(counts)[:-1], axis=1)
            columns["token_logps"] = [logps for logps, _ in parts]
            columns["token_entropies"] = [entropies for _, entropies in parts]
            columns |= self._token_columns(indices, list(islice(self._traces, count)))
        if scores.top_ids is not None and scores.top_logps is not None:
            columns["top_ids"] = _nested(scores.top_ids, counts)
            columns["top_logps"] = _nested(scores.top_logps, counts)
        self._waiting.append(pa.table(columns).select(self._schema.names).cast(self._schema))
        if sum(table.nbytes for table in self._waiting) > _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
            self._waiting.clear()

    def _token_columns(self, indices: np.ndarray, traces: Sequence[Trace]) -> dict[str, list[Any]]:
        """Ids and places of the scored tokens of traces."""
        columns: dict[str, list[Any]] = {
            name: [] for name in ("token_ids", "token_starts", "token_ends")
        }
        for index, places in zip(indices.tolist(), self._places(traces), strict=True):
            scored = slice(int(self._tokens.prompt_lengths[index]), int(self._lengths[index]))
            ids = self._tokens.ids(index)[scored]
            weights = self._tokens.token_weights(index)
            kept = slice(None) if weights is None else weights[: len(ids)] != 0
            columns["token_ids"].append(ids[kept])
            if places is not None:
                places = places[:, : len(ids)][:, kept]
            for name, row in (("token_starts", 0), ("token_ends", 1)):
                columns[name].append(None if places is None else places[row])
        return columns

    def _places(self, traces: Sequence[Trace]) -> list[np.ndarray | None]:
        """Where the tokens of each trace are in its text; None for a document."""
        if self._encoder is None:
            assert self._settings is not None, "only tokens have places"
            self._encoder = Encoder(self._settings)
        with_prompt = [trace for trace in traces if not trace.document]
        texts = [
            text
            for _, of_row in groupby(with_prompt, key=lambda trace: trace.where)
            for text in self._encoder.texts(list(of_row))
        ]
        found = iter(self._encoder.offsets(with_prompt, texts))
        return [None if trace.document else next(found) for trace in traces]


def _nested(values: np.ndarray, counts: np.ndarray) -> pa.ListArray:
    """[N, K] as a list for each trace of a list for each of its tokens."""
    tokens, kept = values.shape
    inner = pa.ListArray.from_arrays(
        pa.array(kept * np.arange(tokens + 1), pa.int32()), pa.array(values.reshape(-1))
    )
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *counts]), pa.int32()), inner)


def _traces(recipe: Recipe, tokens: TokenizedTraces) -> Iterator[Trace]:
    """The trace of each index of the tokens, read again; that of a text for each of its pieces.

    Raises:
        RunError: the data have changed since they were tokenized.
    """
    index = 0
    for row in read_rows(recipe.data.paths, recipe.data.format):
        for trace in normalise(row, row.format, train_on=recipe.data.train_on):
            start = index
            while index < len(tokens) and tokens.where(index) == trace.where:
                index += 1
                yield trace
                if not trace.document:
                    break
            if index == start:
                raise RunError(
                    f"{trace.where}: the data have changed during the command; repeat it"
                )
