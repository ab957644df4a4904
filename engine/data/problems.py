"""Problems to evaluate on: a prompt and its right answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from redi.engine.data.final_answer import final_answer
from redi.engine.data.formats import ANSWER_COLUMNS, ID_COLUMNS, PROMPT_COLUMNS
from redi.engine.data.rows import Row, read_source
from redi.engine.data.sources import find_sources
from redi.engine.data.traces import Message, as_messages, read_prompt
from redi.engine.errors import InputError


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem."""

    id: str
    """Its id in the data, else the row's place."""
    prompt: tuple[Message, ...] | str
    answer: str
    source: str
    """The file or hub name that it came from."""
    where: str
    """Its row, for messages: "file.jsonl:12"."""


def read_problems(paths: Sequence[str], limit: int | None = None) -> list[Problem]:
    """The problems of `paths`, each prompt once, in order.

    A row has a prompt in the first of `PROMPT_COLUMNS` that it has, and an answer in the first of
    `ANSWER_COLUMNS`: the marked one (`final_answer`) if the text marks one, else, in the column
    answer, the whole text. Other columns are left alone, so that training data with answers can
    be evaluated on as well.

    Args:
        paths: files, folders and hub names, as training reads them.
        limit: problems of each file at most.

    Raises InputError naming file and row: no prompt, no answer, or one prompt with two answers.
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
                    f"{row.where}: the prompt is that of {known.where}, the answer is not "
                    f"({problem.answer!r}, there {known.answer!r}); remove one of the two"
                )
    return list(problems.values())


def _problem(row: Row) -> Problem:
    prompt = read_prompt(row, _column(row, PROMPT_COLUMNS, "prompt"))
    column = _column(row, ANSWER_COLUMNS, "right answer")
    value = row.value[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{row.where}: column {column!r} must be text or a number")
    text = str(value).strip()
    answer = final_answer(text) or ("" if column == "solution" else text)
    if not answer:
        problem = "marks no answer by \\boxed{...} or ####" if text else "is empty"
        raise InputError(f"{row.where}: column {column!r} {problem}")
    identity = next((row.value[c] for c in ID_COLUMNS if row.value.get(c) is not None), row.where)
    return Problem(str(identity), prompt, answer, row.source, row.where)


def _column(row: Row, names: Sequence[str], what: str) -> str:
    for name in names:
        if row.value.get(name) is not None:
            return name
    found = ", ".join(row.value) or "none"
    raise InputError(
        f"{row.where}: no {what}: a row needs a column {' or '.join(names)}; it has: {found}"
    )
