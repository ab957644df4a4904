"""`redi select`: choose traces to train on, and write them as rows of the shape `traces`.

Rows are read one by one, and what the first rules keep is spooled to disk, so memory holds a few
numbers for each trace. The rules, in order: repeated traces, `where`, `pass_rate`, `top`,
`max_per_problem`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from redi.engine.commands.select_options import SelectOptions
from redi.engine.console import Console
from redi.engine.data.content_hash import prompt_hash, trace_hash
from redi.engine.data.diversity import farthest_first
from redi.engine.data.read_position import ReadPosition, ReadProgress
from redi.engine.data.row import Row, read_id, row_error
from redi.engine.data.rows import scan_source
from redi.engine.data.sources import find_sources, unread_splits
from redi.engine.data.summary import unread_warnings
from redi.engine.data.traces import ANSWER_COLUMNS, Trace, normalise
from redi.engine.data.where import TRACE_NAMES, Where
from redi.engine.data.write_rows import prompt_value, row_writer
from redi.engine.errors import FaultyRow, InputError, RunError, faulty_rows

_TOGETHER = 256
"""Traces per evaluation of `where`."""
_EMPTY = "empty incorrect trace"
"""Name under which `normalise` counts incorrect traces without text."""
_MOST_TEACHERS = 20
"""Teachers with a line of their own in the table: those with most traces."""


def select(options: SelectOptions, console: Console) -> None:
    """Apply the rules to all traces, print what each one dropped, and write what is left.

    A row of the file is a problem: `id`, `prompt`, `answer`, `source`, `tools` if it has them, and
    `traces`: the correct ones, then the incorrect ones, each in the order in which they were
    chosen (by --by if given, else as in the data).

    Raises:
        InputError: the data, scores or samples are invalid or do not belong together, or no trace
            is left. The file is unchanged.
        RunError: the file cannot be written.
    """
    for notice in unread_splits([*options.data, *options.samples]):
        console.warn(notice)
    selection = _Selection(options, console)
    try:
        with tempfile.TemporaryFile(dir=Path(options.out).absolute().parent) as spool:
            selection.read(spool)
            problems = selection.problems()
            if not problems:
                selection.show()
                raise InputError(
                    f"{options.out}: not written, as no trace is left; relax the rules"
                )
            progress = console.progress("problem", len(problems), endpoints=False)
            with row_writer(Path(options.out)) as write:
                for problem in problems:
                    write(selection.row(problem, spool))
                    progress.update(1)
            progress.close()
    except OSError as error:
        raise RunError(f"{options.out}: cannot be written: {error}") from error
    selection.show()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A trace that the first rules have kept."""

    start: int
    """Place of its line in the spool."""
    sign: int
    teacher: str | None
    order: float
    """Traces of a problem are ordered by it, smallest first; 0 for all without --by."""


class _Selection:
    """The rules, and the count of what each has dropped."""

    def __init__(self, options: SelectOptions, console: Console) -> None:
        self._options = options
        self._console = console
        self._where = Where(options.where) if options.where else None
        self._columns = set(self._where.columns) if self._where else set()
        if self._where and self._where.needs_tokens:
            self._columns |= set(TRACE_NAMES)
        if options.by:
            self._columns.add(options.by)
        self._scores = _Scores(options.scores, self._columns) if options.scores else None
        self._rates: dict[str, tuple[int, int]] | None = None
        if options.pass_rate or "pass_rate" in self._columns:
            self._rates = _count_samples(options.samples or options.data, console)
        self._found: set[str] = set()  # names of `_columns` that some trace has
        self._dropped: dict[str, Counter[str | None]] = {"traces": Counter(), "repeated": Counter()}
        rules = {
            "where": options.where,
            "pass_rate": options.pass_rate,
            f"no {options.by}": options.by,
            "top": options.top,
            "max_per_problem": options.max_per_problem,
        }
        self._dropped |= {rule: Counter() for rule, value in rules.items() if value is not None}
        self._kept: Counter[tuple[str | None, int]] = Counter()
        self._problems: dict[str, list[_Candidate]] = {}

    def read(self, spool: IO[bytes]) -> None:
        """Spool the traces that the rules on single traces keep."""
        seen: set[tuple[str, str, int]] = set()
        scored = 0
        dropped: Counter[str] = Counter()
        traces = _read(self._options.data, self._columns, dropped, self._console)
        for batch in iter(lambda: list(islice(traces, _TOGETHER)), []):
            fresh = []
            for row, trace in batch:
                self._dropped["traces"][trace.teacher] += 1
                key = trace.group, (digest := trace_hash(trace)), trace.sign
                if key in seen:
                    self._dropped["repeated"][trace.teacher] += 1
                    continue
                seen.add(key)
                scores = self._scores.of(digest) if self._scores else None
                scored += scores is not None
                fresh.append((row, trace, self._values(row, trace, scores or {})))
            for row, trace, values in self._selected(fresh):
                self._spool(spool, row, trace, values)
        if self._scores and not scored:
            raise InputError(
                f"scores: {self._options.scores} has none of the {len(seen):,} traces of "
                f"{', '.join(self._options.data)}; score these with `redi logprobs`"
            )
        if self._scores and scored < len(seen):
            self._console.warn(
                f"{self._options.scores}: {len(seen) - scored:,} of {len(seen):,} traces have no "
                "score; comparisons with a score do not select them"
            )
        if missing := sorted(self._columns - self._found):
            option = "by" if missing[0] == self._options.by else "where"
            lacking = f"no row has a column {missing[0]!r}; columns of scores need --scores"
            if self._scores:
                lacking = f"neither {self._options.scores} nor any row has a column {missing[0]!r}"
            raise InputError(f"{option}: {lacking}")
        if count := dropped[_EMPTY]:
            self._console.say(f"{count:,} incorrect traces without text left out")

    def _values(self, row: Row, trace: Trace, scores: dict[str, Any]) -> dict[str, Any]:
        """What the names of --where and --by stand for."""
        values = {**row.value, **scores, "correct": trace.sign > 0, "teacher": trace.teacher}
        if self._rates is not None:
            values["pass_rate"] = self._pass_rate(trace)
        self._found |= self._columns & values.keys()
        return values

    def _pass_rate(self, trace: Trace) -> float | None:
        """Share of correct samples of the trace's problem; None if it has no samples."""
        assert self._rates is not None, "counted if a rule needs it"
        correct, total = self._rates.get(prompt_hash(trace), (0, 0))
        return correct / total if total else None

    def _selected(
        self, traces: Sequence[tuple[Row, Trace, dict[str, Any]]]
    ) -> Iterator[tuple[Row, Trace, dict[str, Any]]]:
        """Those that `where` and `pass_rate` keep."""
        kept: Sequence[bool | FaultyRow] = [True] * len(traces)
        if self._where and traces:
            places = [row.where for row, *_ in traces]
            kept = self._where.keep([values for *_, values in traces], places)
        for found, keep in zip(traces, kept, strict=True):
            _, trace, values = found
            if isinstance(keep, FaultyRow):
                raise InputError(str(keep).replace("[data] where", "where"))
            if not keep:
                self._dropped["where"][trace.teacher] += 1
                continue
            if limits := self._options.pass_rates:
                rate = values["pass_rate"]
                if rate is None or not limits[0] <= rate <= limits[1]:
                    self._dropped["pass_rate"][trace.teacher] += 1
                    continue
            yield found

    def _spool(self, spool: IO[bytes], row: Row, trace: Trace, values: dict[str, Any]) -> None:
        order = 0.0
        if by := self._options.by:
            value = values.get(by)
            try:
                order = math.nan if value is None else float(value)
            except (TypeError, ValueError, OverflowError):
                raise InputError(f"by: {row.where}: {by} is {value!r:.60}, no number") from None
            if math.isnan(order):
                self._dropped[f"no {by}"][trace.teacher] += 1
                return
            order = order if self._options.smallest else -order
        start = spool.tell()
        line = {"row": _row_of(row, trace), "trace": _entry_of(trace), "text": trace.completion}
        spool.write(json.dumps(line).encode() + b"\n")
        one = _Candidate(start, trace.sign, trace.teacher, order)
        self._problems.setdefault(trace.group, []).append(one)

    def problems(self) -> list[list[_Candidate]]:
        """What --top keeps of each problem: in the order in which traces are chosen."""
        found = []
        for candidates in self._problems.values():
            candidates.sort(key=lambda one: (-one.sign, one.order))
            found.append(list(chain(*(self._top(candidates, sign) for sign in (1, -1)))))
        return found

    def _top(self, candidates: Iterable[_Candidate], sign: int) -> list[_Candidate]:
        found = [one for one in candidates if one.sign == sign]
        return self._limited("top", found, found[: self._options.top])

    def row(self, problem: list[_Candidate], spool: IO[bytes]) -> dict[str, Any]:
        """The row to write for a problem."""
        lines = []
        for sign in (1, -1):
            found = [one for one in problem if one.sign == sign]
            read = []
            for one in found:
                spool.seek(one.start)
                read.append(json.loads(spool.readline()))
            most = self._options.max_per_problem
            chosen = list(range(len(found)))[:most]
            if self._options.diverse and most is not None:
                chosen = farthest_first([line["text"] for line in read], most)
            self._limited("max_per_problem", found, [found[index] for index in chosen])
            self._kept.update((found[index].teacher, sign) for index in chosen)
            lines += [read[index] for index in chosen]
        return lines[0]["row"] | {"traces": [line["trace"] for line in lines]}

    def _limited(
        self, rule: str, found: list[_Candidate], kept: list[_Candidate]
    ) -> list[_Candidate]:
        """`kept`, after counting the rest of `found` as dropped by the rule."""
        if len(kept) < len(found):
            self._dropped[rule].update(one.teacher for one in found)
            self._dropped[rule].subtract(one.teacher for one in kept)
        return kept

    def show(self) -> None:
        """Print the table: what each rule dropped, in all and by teacher."""
        read = self._dropped["traces"]
        teachers = [name for name, _ in read.most_common()]
        lines: list[tuple[str, list[str | None]]] = [("all", teachers)]
        if len(teachers) > 1:
            shown = teachers[:_MOST_TEACHERS]
            lines += [(name or "(none)", [name]) for name in shown]
            if others := teachers[_MOST_TEACHERS:]:
                lines.append((f"{len(others)} others", others))
        title = f"{self._options.out}: traces that each rule dropped"
        columns = ["teacher", *self._dropped, "kept", "correct", "incorrect"]
        rows = []
        for name, names in lines:
            counts = [sum(counter[one] for one in names) for counter in self._dropped.values()]
            kept = [sum(self._kept[one, sign] for one in names) for sign in (1, -1)]
            rows.append([name, *(f"{count:,}" for count in (*counts, sum(kept), *kept))])
        self._console.table(title, columns, rows)


class _Scores:
    """Scores of traces by the hash of their content."""

    def __init__(self, path: str, wanted: set[str]) -> None:
        """Read the columns that are wanted.

        Raises:
            InputError: it is no such file.
        """
        try:
            names = pq.read_schema(path).names
            if "hash" not in names:
                raise InputError(
                    f"scores: {path} has no column hash; write it with this version of "
                    "`redi logprobs`"
                )
            # Those about the trace itself are read from the data.
            own = {"hash", "row", "trace", "correct", "teacher"}
            columns = [name for name in names if name in wanted - own]
            # As in `[data] where`, not the number of scored ones.
            parts = {"prompt_tokens", "completion_tokens"}
            self._counts_tokens = "tokens" in wanted and parts <= set(names)
            if self._counts_tokens:
                columns = list({*columns, *parts} - {"tokens"})
            table = pq.read_table(path, columns=["hash", *columns])
        except (OSError, pa.ArrowException) as error:
            problem = " ".join(str(error).split())
            raise InputError(f"scores: {path} cannot be read: {problem}") from None
        self._columns = {name: table[name].combine_chunks() for name in columns}
        self._places: dict[str, int] = {}
        for place, digest in enumerate(table["hash"].to_pylist()):
            self._places.setdefault(digest, place)

    def of(self, digest: str) -> dict[str, Any] | None:
        """The scores of a trace, by column; None if it has none."""
        place = self._places.get(digest)
        if place is None:
            return None
        found = {name: column[place].as_py() for name, column in self._columns.items()}
        if self._counts_tokens:
            found["tokens"] = found["prompt_tokens"] + found["completion_tokens"]
        return found


def _count_samples(paths: Sequence[str], console: Console) -> dict[str, tuple[int, int]]:
    """(correct, all) samples of each prompt, by its hash; those without text are incorrect."""
    counts: dict[str, tuple[int, int]] = {}
    for _, trace in _read(paths, (), Counter(), console, keep_empty=True):
        key = prompt_hash(trace)
        correct, total = counts.get(key, (0, 0))
        counts[key] = correct + (trace.sign > 0), total + 1
    return counts


def _read(
    paths: Sequence[str],
    columns: Iterable[str],
    dropped: Counter[str],
    console: Console,
    keep_empty: bool = False,
) -> Iterator[tuple[Row, Trace]]:
    """Yield each trace with its row.

    Args:
        columns: further columns of the rows to read.
        dropped: see `normalise`.
        keep_empty: whether to yield incorrect traces without text too, with another text.

    Raises:
        InputError: rows are faulty; the message lists them. Raised after all rows are read.
    """
    faults: list[str] = []
    more = [*columns, *ANSWER_COLUMNS, "uuid"]
    sources = find_sources(paths)
    position = ReadPosition(sources)
    with closing(ReadProgress("reading", position, console)) as progress:
        for source in sources:
            unread: set[str] = set()
            for row in scan_source(source, "auto", unread, more, position):
                progress.show(position.done)
                try:
                    if isinstance(row, InputError):
                        raise row
                    row = _with_texts(row) if keep_empty else row
                    traces = normalise(row, row.format, dropped)
                    if any(trace.document for trace in traces):
                        raise row_error(row, "text", "is a document, not the trace of a problem")
                    if any(trace.calls for trace in traces):
                        raise FaultyRow(
                            f"{row.where}: ends with a tool call, which the shape "
                            "traces cannot hold; leave such rows out"
                        )
                except InputError as error:
                    faults.append(str(error))
                    continue
                if not faults:
                    yield from ((row, trace) for trace in traces)
            if unread := unread - set(columns):
                for line in unread_warnings({source.name: tuple(sorted(unread))}):
                    console.warn(line)
    if faults:
        raise faulty_rows(faults)


def _with_texts(row: Row) -> Row:
    """The row with a text in each empty entry of the column `traces`."""
    entries = row.value.get("traces")
    if row.format != "traces" or not isinstance(entries, list):
        return row

    def filled(entry: Any) -> Any:
        is_empty = isinstance(entry, dict) and entry.get("text") == ""
        return {**entry, "text": "(empty)"} if is_empty else entry

    return replace(row, value=row.value | {"traces": [filled(entry) for entry in entries]})


def _row_of(row: Row, trace: Trace) -> dict[str, Any]:
    """The columns of a problem, of the shape `traces`."""
    identity = read_id(row, "uuid" if row.value.get("uuid") is not None else "id")
    if identity is None and trace.group == row.where:
        identity = row.where  # a pair without an id is a problem
    found: dict[str, Any] = {} if identity is None else {"id": identity}
    found["prompt"] = prompt_value(trace.prompt)
    for name in ANSWER_COLUMNS:
        if isinstance(value := row.value.get(name), str | int | float):
            found[name] = str(value)
    if trace.origin is not None:
        found["source"] = trace.origin
    if trace.tools:
        found["tools"] = json.loads(trace.tools)
    return found


def _entry_of(trace: Trace) -> dict[str, Any]:
    """An entry of the column `traces`, with the values that are not the default."""
    found: dict[str, Any] = {
        "text": trace.content,
        "correct": trace.sign > 0,
        "teacher": trace.teacher,
    }
    if trace.thought:
        found["reasoning_content"] = trace.thought
    if trace.weight != 1:
        found["weight"] = trace.weight
    if trace.finished is not None:
        found["finished"] = trace.finished
    if trace.spans:
        found["spans"] = [list(span) for span in trace.spans]
    return found
