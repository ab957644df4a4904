"""Reads problems to evaluate on: prompts with their correct answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from redi.engine.data.final_answer import final_answer
from redi.engine.data.messages import Message, as_messages, read_prompt
from redi.engine.data.row import Row
from redi.engine.data.rows import read_source
from redi.engine.data.sources import find_sources
from redi.engine.data.traces import ANSWER_COLUMNS, ID_COLUMNS, PROMPT_COLUMNS, with_system
from redi.engine.data.where import Where
from redi.engine.errors import InputError


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem to evaluate on."""

    id: str
    """Its id in the data; default: the place of the row."""
    prompt: tuple[Message, ...] | str
    answer: str
    source: str
    """The file or hub name of the row, or the name of the benchmark."""
    where: str
    """The place of the row, for messages: "file.jsonl:12"."""


def read_problems(paths: Sequence[str], limit: int | None = None) -> list[Problem]:
    """Read the problems of `paths` in order; a repeated prompt is read once.

    The prompt of a row is in the first of `PROMPT_COLUMNS` that the row has, the answer in the
    first of `ANSWER_COLUMNS`. If an answer is marked in that text (`final_answer`), it is used;
    otherwise the whole text, if the column is `answer`. Other columns are ignored, so that training
    data with answers can be used for evaluation as well.

    Args:
        paths: files, folders and hub names, as for training.
        limit: most problems per file.

    Raises:
        InputError: a row has no prompt or no answer, or two rows have the same prompt but
            different answers. Names file and row.
    """
    problems: dict[tuple[Message, ...], Problem] = {}
    for source in find_sources(paths):
        count = 0
        for row in read_source(source, "problem"):
            if count == limit:
                break
            problem = _problem(row)
            key = as_messages(problem.prompt)
            known = problems.setdefault(key, problem)
            count += known is problem
            if known.answer != problem.answer:
                raise InputError(
                    f"{row.where}: the prompt is that of {known.where}, but the answer differs "
                    f"({problem.answer!r}, there {known.answer!r}); remove one of the two rows"
                )
    return list(problems.values())


def read_benchmark(
    name: str,
    path: str,
    prompt: str,
    answer: str,
    where: str | None = None,
    limit: int | None = None,
) -> list[Problem]:
    """Read the problems of a benchmark, all of its rows, since its score counts each of them.

    Args:
        name: of the benchmark, the `source` of each problem.
        path: file, folder or hub name.
        prompt, answer: columns; a row without one is read as by `read_problems`.
        where: expression that selects rows.
        limit: most problems.

    Raises:
        InputError: a row has no prompt or no answer, or no row is selected. Names file and row.
    """
    condition = Where(where) if where else None
    columns = {prompt, answer, *(condition.columns if condition else ())}
    rows = [row for one in find_sources([path]) for row in read_source(one, "problem", columns)]
    if condition:
        kept = condition.keep([row.value for row in rows], [row.where for row in rows])
        if fault := next((one for one in kept if isinstance(one, InputError)), None):
            raise fault
        rows = [row for row, is_kept in zip(rows, kept, strict=True) if is_kept]
        if not rows:
            raise InputError(f"{path}: {name}: no row in which {where}")
    names = (prompt, *PROMPT_COLUMNS), (answer, *ANSWER_COLUMNS)
    return [replace(_problem(row, *names), source=name) for row in rows[:limit]]


def _problem(
    row: Row,
    prompts: Sequence[str] = PROMPT_COLUMNS,
    answers: Sequence[str] = ANSWER_COLUMNS,
) -> Problem:
    prompt = with_system(row, read_prompt(row, _column(row, prompts, "prompt")))
    column = _column(row, answers, "answer")
    text = _answer_text(row, column)
    answer = final_answer(text) or ("" if column == "solution" else text)
    if not answer:
        problem = "has no answer marked by \\boxed{...} or ####" if text else "is empty"
        raise InputError(f"{row.where}: column {column!r} {problem}")
    identity = next((row.value[c] for c in ID_COLUMNS if row.value.get(c) is not None), row.where)
    return Problem(str(identity), prompt, answer, row.source, row.where)


def _answer_text(row: Row, column: str) -> str:
    """The text of an answer; a list, such as all solutions of an equation, becomes "1, 2"."""
    value = row.value[column]
    parts = value if isinstance(value, list) else [value]
    if any(isinstance(part, bool) or not isinstance(part, str | int | float) for part in parts):
        raise InputError(f"{row.where}: column {column!r} must be text, a number or a list of them")
    if len(parts) == 1:
        return str(parts[0]).strip()
    return ", ".join(str(part).strip().strip("$").strip() for part in parts)


def _column(row: Row, names: Sequence[str], what: str) -> str:
    for name in names:
        if row.value.get(name) is not None:
            return name
    found = ", ".join(row.value) or "none"
    raise InputError(
        f"{row.where}: no {what}: a row needs a column {' or '.join(dict.fromkeys(names))}; it "
        f"has: {found}"
    )
