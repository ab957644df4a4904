"""The file samples.jsonl: a line per completion, written as they finish, in order at the end.

Its order is that of the places of an evaluation, whatever the number of workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from redi.engine.data.write_rows import prompt_value
from redi.engine.errors import InputError, RunError
from redi.engine.evaluate.task import Evaluation
from redi.engine.generation.checkers import CheckResult, opened_thought
from redi.engine.generation.engines import Finished
from redi.engine.generation.generate import Completion
from redi.engine.generation.judging import Judge

Place = tuple[int, int]
"""(problem, sample)"""
Written = Callable[[Sequence[dict[str, Any]]], None]


def keep_complete(path: Path, places: Sequence[Place], unit: int) -> set[int]:
    """Remove lines that are cut off or of incomplete units from the file of an earlier attempt.

    Args:
        path: samples.jsonl.
        places: of all completions, in order.
        unit: completions that depend on each other by rounding: those of a batch.

    Returns:
        Indices of the places whose lines are kept.

    Raises:
        InputError: the file is damaged, or of an older version.
    """
    if not path.exists():
        return set()
    found = _spans(path, places)
    have = set(found)
    firsts = range(0, len(places), unit)
    units = [range(first, min(first + unit, len(places))) for first in firsts]
    kept = {index for one in units if have.issuperset(one) for index in one}
    _rewrite(path, [span for index, span in found.items() if index in kept])
    return kept


def put_in_order(path: Path, places: Sequence[Place]) -> None:
    """Sort the lines of a complete file."""
    found = _spans(path, places)
    _rewrite(path, [found[index] for index in range(len(places))])


def _spans(path: Path, places: Sequence[Place]) -> dict[int, tuple[int, int]]:
    """Index of a place -> start and end of its line, in the order of the file."""
    indices = {place: index for index, place in enumerate(places)}
    spans: dict[int, tuple[int, int]] = {}
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            start, end = end, end + len(line)
            try:
                value = json.loads(line)
                index = indices[value["problem"], value["sample"]]
            except (ValueError, KeyError, TypeError):
                if not line.endswith(b"\n"):  # the end of a killed attempt
                    break
                raise InputError(f"{path}:{number}: not a sample; choose another out") from None
            if "traces" not in value:  # a file must not mix columns
                raise InputError(
                    f"{path}: written by an older version of redi (no traces); choose another out"
                )
            if line.endswith(b"\n"):
                spans.setdefault(index, (start, end))
    return spans


def _rewrite(path: Path, spans: Sequence[tuple[int, int]]) -> None:
    """Leave these lines in the file, in this order."""
    ends = [end for _, end in spans]
    if [start for start, _ in spans] == [0, *ends[:-1]][: len(spans)]:
        os.truncate(path, ends[-1] if ends else 0)
        return
    partial = path.with_name(path.name + ".partial")
    with path.open("rb") as source, partial.open("wb") as target:
        for start, end in spans:
            source.seek(start)
            target.write(source.read(end - start))
        target.flush()
        os.fsync(target.fileno())
    os.replace(partial, path)


class Recorder(AbstractContextManager["Recorder"]):
    """Checks and writes completions while others are generated.

    Args:
        task: the evaluation.
        path: samples.jsonl.
        judge: checks a completion.
        written: called with the lines of completions once they are on disk, in another thread.
    """

    def __init__(self, task: Evaluation, path: Path, judge: Judge, written: Written) -> None:
        self._task, self._path, self._judge, self._written = task, path, judge, written
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._writer = ThreadPoolExecutor(1, "samples")
        self._writing: list[Future[None]] = []

    def add(self, finished: Sequence[Finished]) -> None:
        """Check and write completions; their lines reach the disk together.

        Raises:
            RunError: earlier ones cannot be written.
        """
        judged = [self._submit(index, completion) for index, completion in finished]
        self._writing.append(self._writer.submit(self._write, finished, judged))
        while self._writing and self._writing[0].done():
            self._writing.pop(0).result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what has been added."""
        self._writer.shutdown()
        self._file.close()
        if kind is None:
            for one in self._writing:
                one.result()

    def _submit(self, index: int, completion: Completion) -> Future[CheckResult]:
        problem = self._task.places[index][0]
        prompt = self._task.prompts[problem]
        text = opened_thought(prompt, self._text(problem, completion))
        return self._judge(prompt, text, self._task.problems[problem].answer)

    def _text(self, problem: int, completion: Completion) -> str:
        return self._task.prefixes[problem] + completion.text

    def _write(self, finished: Sequence[Finished], judged: Sequence[Future[CheckResult]]) -> None:
        lines = [
            self._line(*self._task.places[index], completion, result.result())
            for (index, completion), result in zip(finished, judged, strict=True)
        ]
        try:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"{self._path} cannot be written: {error.strerror}; the same command resumes"
            ) from None
        self._written(lines)

    def _line(
        self, index: int, sample: int, completion: Completion, result: CheckResult
    ) -> dict[str, Any]:
        """A completion and whether it is correct."""
        problem = self._task.problems[index]
        return {
            "problem": index,
            "id": problem.id,
            "sample": sample,
            # Columns of the data format `traces`, so that samples are valid training data.
            "prompt": prompt_value(problem.prompt),
            "traces": [
                {
                    "text": self._text(index, completion),
                    "correct": result.correct,
                    "teacher": self._task.options.model,
                    "finished": completion.ended,
                }
            ],
            "rendered_prompt": self._task.prompts[index],
            "extracted": result.extracted,
            "answer": problem.answer,
            "doubt": result.doubt,
            "ended": completion.ended,
            "tokens": completion.tokens,
        }
