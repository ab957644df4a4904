"""`redi prepare`: select training sets from raw rows, and tokenize the data of a recipe.

`redi prepare openr1` selects D_SFT and D_Pref (`select_openr1`). `redi prepare RECIPE.toml` fills
the token cache of a recipe and prints a summary of the training data (`fill_cache`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.openr1 import PrepareOptions, select_traces
from redi.engine.data.read_position import ReadPosition, ReadProgress
from redi.engine.data.row import Row
from redi.engine.data.rows import scan_source
from redi.engine.data.sources import find_sources, unread_splits
from redi.engine.data.summary import show, warnings
from redi.engine.data.summary_by_source import (
    ORIGIN_COLUMNS,
    origin_rows,
    plot_lengths,
    share_rows,
    summarize_by_source,
)
from redi.engine.data.text import Encoder, TokenSettings
from redi.engine.data.traces import normalise
from redi.engine.distributed import World
from redi.engine.errors import InputError, RunError, faulty_rows
from redi.engine.model.build import check_vocabulary, model_config
from redi.engine.model.flops import model_size
from redi.engine.plan.auto_rows import rows_without_card
from redi.engine.train.prepare_data import prepare_data
from redi.engine.train.teachers import check_teacher

_PAIRS_TOGETHER = 64
"""Pairs per call of the tokenizer."""


def select_openr1(options: PrepareOptions, console: Console) -> dict[str, int]:
    """Write OUT/sft.jsonl, OUT/pref.jsonl and OUT/report.json; nothing if any row is faulty.

    Rows are streamed: memory holds a few numbers for each selected row. The order is that of
    `datasets.Dataset.shuffle(seed)` over all rows read, as in the paper.

    Returns:
        The counts of report.json: rows and generations that each rule removed, problems by whether
        they have correct and incorrect generations, rows of the two sets.

    Raises:
        InputError: rows are faulty; the message lists them.
        RunError: OUT cannot be written.
    """
    sources = find_sources(options.data)
    for notice in unread_splits(options.data):
        console.warn(notice)
    limits = _Limits(options)
    counts: Counter[str] = Counter()
    faults: list[str] = []
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        position = ReadPosition(sources)
        with (
            tempfile.TemporaryDirectory(dir=out) as folder,
            closing(ReadProgress("reading", position, console)) as progress,
        ):
            sft = _Spool(Path(folder) / "sft.jsonl")
            pref = _Spool(Path(folder) / "pref.jsonl")
            waiting: list[tuple[int, Row]] = []
            rows = chain.from_iterable(
                scan_source(source, "openr1", position=position) for source in sources
            )
            for index, row in enumerate(rows):
                progress.show(position.done, f"{index:,} rows")
                try:
                    if isinstance(row, InputError):
                        raise row
                    found = select_traces(row, options, counts)
                except InputError as error:
                    faults.append(str(error))
                    continue
                counts["rows read"] += 1
                for line in found.sft:
                    sft.add(index, line)
                counts["pairs before the limits"] += len(found.pref)
                waiting += [(index, replace(row, value=line)) for line in found.pref]
                if len(waiting) >= _PAIRS_TOGETHER:
                    pref.add_all(limits.kept(waiting, counts))
                    waiting.clear()
            if faults:
                raise faulty_rows(faults)
            pref.add_all(limits.kept(waiting, counts))
            place = _shuffled_places(counts["rows read"], options.seed)
            if not sft.rows:
                raise InputError(
                    f"{', '.join(options.data)}: no correct trace is left; relax the options"
                )
            counts["rows of sft.jsonl"] = sft.write(out / "sft.jsonl", place)
            counts["rows of pref.jsonl"] = pref.write(out / "pref.jsonl", place)
        report = {"options": asdict(options), "counts": _in_order(counts)}
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error}") from error
    table = [(what, f"{number:,}") for what, number in report["counts"].items()]
    console.table(f"{out}: what was selected", ("", ""), table)
    return report["counts"]


def _in_order(counts: Counter[str]) -> dict[str, int]:
    """Counts in the order in which the rules are applied."""
    kinds = ("rows read", "rows", "generations", "problems", "pairs before", "pairs", "rows of")

    def place(what: str) -> int:
        return kinds.index(max((kind for kind in kinds if what.startswith(kind)), key=len))

    return {what: counts[what] for what in sorted(counts, key=lambda what: (place(what), what))}


def _shuffled_places(count: int, seed: int) -> np.ndarray:
    """int64 [count]: position of each row after `datasets.Dataset.shuffle(seed)`."""
    return np.argsort(np.random.default_rng(seed).permutation(count))


class _Limits:
    """Limits on length. They count what training counts, so that it leaves out no further pair."""

    def __init__(self, options: PrepareOptions) -> None:
        self._prompt = options.max_prompt_tokens or None
        self._trace = options.max_trace_tokens or None
        self._encoder: Encoder | None = None
        if options.tokenizer and (self._prompt or self._trace):
            system_prompt = options.system_prompt if options.template == "chat" else None
            settings = TokenSettings(
                (), "preference", options.template, system_prompt, options.tokenizer
            )
            self._encoder = Encoder(settings)

    def kept(
        self, pairs: Sequence[tuple[int, Row]], counts: Counter[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the pairs within the limits; add the others to `counts`.

        Args:
            pairs: the input row of each pair, and the pair as a row of the format "preference".
            counts: numbers of pairs left out, by reason.
        """
        if self._encoder is None:
            yield from ((index, pair.value) for index, pair in pairs)
            return
        traces = [normalise(pair) for _, pair in pairs]
        texts = [self._encoder.texts(one) for one in traces]
        encoded = self._encoder.encode(list(chain(*traces)), list(chain(*texts)))
        both = zip(encoded[::2], encoded[1::2], strict=True)
        for (index, pair), (chosen, rejected) in zip(pairs, both, strict=True):
            if self._prompt and chosen.prompt_length > self._prompt:
                counts[f"pairs: prompt over {self._prompt:,} tokens"] += 1
            elif self._trace and self._trace < max(
                len(one.ids) - one.prompt_length for one in (chosen, rejected)
            ):
                counts[f"pairs: a trace over {self._trace:,} tokens"] += 1
            else:
                yield index, pair.value


class _Spool:
    """Lines on disk in reading order, to be written in a different order.

    Attributes:
        rows: input row of each line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self.rows: list[int] = []
        self._starts = [0]

    def add(self, row: int, value: dict[str, Any]) -> None:
        """Append a line of an input row, which may have several lines."""
        line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
        self._file.write(line)
        self.rows.append(row)
        self._starts.append(self._starts[-1] + len(line))

    def add_all(self, values: Iterator[tuple[int, dict[str, Any]]]) -> None:
        """Append a line for each (row, value)."""
        for row, value in values:
            self.add(row, value)

    def write(self, target: Path, places: np.ndarray) -> int:
        """Write the lines to `target`, sorted by the places of their rows; returns their number."""
        order = np.argsort(places[np.array(self.rows, dtype=np.int64)], kind="stable")
        partial = self._path.with_suffix(".ordered")
        with self._file, partial.open("wb") as file:
            for index in order.tolist():
                self._file.seek(self._starts[index])
                file.write(self._file.read(self._starts[index + 1] - self._starts[index]))
        os.replace(partial, target)
        return len(order)


def fill_cache(
    recipe: Recipe, world: World, console: Console, ranks: int, report: Path | None
) -> None:
    """Tokenize the data of a recipe, unless it is cached, and print a summary of it.

    Args:
        recipe: resolved; `model.path` is set.
        world: this process.
        console: output of tables and warnings.
        ranks: number of ranks of the planned run, for its rank efficiency.
        report: directory of report.json and lengths.png; None: no report.

    Raises:
        InputError: the recipe, data or tokenizer are invalid, or `report` cannot be written.
    """
    config = model_config(recipe, weights=False)
    check_vocabulary(recipe, config)
    data = prepare_data(recipe, world, console)
    check_teacher(data.teacher, config)
    size = model_size(config, recipe.adapter)
    row_tokens = recipe.train.row_tokens
    if row_tokens == "auto":
        row_tokens = rows_without_card(recipe, size, data, ranks)
    summary = data.summarize(recipe, row_tokens, ranks, size.training_cost(), size)
    show(summary, ", ".join(recipe.data.paths), console)
    found = summarize_by_source(data.tokens, data.examples, recipe.data.max_tokens)
    console.table("traces by source", ORIGIN_COLUMNS, origin_rows(found))
    console.table("", ("", ""), share_rows(found))
    for warning in warnings(summary):
        console.warn(warning)
    if report is not None:
        content = {"overview": asdict(summary), "breakdown": asdict(found)}
        try:
            report.mkdir(parents=True, exist_ok=True)
            (report / "report.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
            plot_lengths(data.tokens, data.examples, recipe.data.max_tokens, report / "lengths.png")
        except OSError as error:
            raise InputError(f"report: {report} cannot be written: {error}") from None
