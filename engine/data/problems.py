"""Reads problems to evaluate on: prompts with their correct answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from redi.engine.data.final_answer import final_answer
from redi.engine.data.messages import Message, as_messages, read_prompt
from redi.engine.data.row import Row
from redi.engine.data.rows import read_source
from redi.engine.data.sources import find_sources
from redi.engine.data.traces import ANSWER_COLUMNS, ID_COLUMNS, PROMPT_COLUMNS, with_system
from redi.engine.errors import InputError


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem to evaluate on."""

    id: str
    """Its id in the data; default: the place of the row."""
    prompt: tuple[Message, ...] | str
    answer: str
    source: str
    """The file or hub name of the row."""
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


def _problem(row: Row) -> Problem:
    prompt = with_system(row, read_prompt(row, _column(row, PROMPT_COLUMNS, "prompt")))
    column = _column(row, ANSWER_COLUMNS, "answer")
    value = row.value[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{row.where}: column {column!r} must be text or a number")
    text = str(value).strip()
    answer = final_answer(text) or ("" if column == "solution" else text)
    if not answer:
        problem = "has no answer marked by \\boxed{...} or ####" if text else "is empty"
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
