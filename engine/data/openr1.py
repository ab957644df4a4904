"""Which traces of OpenR1-Math-Raw are trained on: the paper's D_SFT and D_Pref, and variations.

The rules are those of arXiv 2505.24850 (appendix on data); what each leaves out is counted.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from redi.engine.checkers import final_answer
from redi.engine.data.rows import Row
from redi.engine.data.traces import Generation, read_openr1
from redi.engine.errors import InputError
from redi.engine.prepare_options import PrepareOptions

_END_OF_THOUGHT = "</think>"


@dataclass(frozen=True, slots=True)
class Selection:
    """What one row gives: rows of the shapes that training reads."""

    sft: list[dict[str, Any]]
    """Of D_SFT: id, prompt, completion."""
    pref: list[dict[str, Any]]
    """Of D_Pref before its limits on length: id, prompt, chosen, rejected."""


def select_traces(row: Row, options: PrepareOptions, counts: Counter[str]) -> Selection:
    """Applies every rule but those on length to a row.

    Args:
        row: a row of OpenR1-Math-Raw; it may have a column teacher.
        options: the rules.
        counts: what the rules leave out is added here, by reason, and the problems by what
            generations they keep.

    Raises InputError naming the row and the column.
    """
    nothing = Selection([], [])
    for column in ("problem", "source", "problem_is_valid", "generations", "correctness"):
        if column not in row.value:
            raise InputError(f"{row.where}: column {column!r} is missing: not OpenR1-Math-Raw")
    teacher = row.value.get("teacher")
    if options.teachers and teacher not in options.teachers:
        counts["rows of another teacher"] += 1
        return nothing
    dropped: Counter[str] = Counter()
    generations = read_openr1(row, dropped, options.exclude_sources)
    if not generations and not dropped:
        dropped["no generation"] += 1
    for reason, number in dropped.items():
        counts["generations empty" if reason == "empty generation" else f"rows: {reason}"] += number
    correct, incorrect = _sorted_out(generations, options, counts)
    if not correct and not incorrect:
        if generations:
            counts["problems without a generation that stays"] += 1
        return nothing
    kinds = [name for name, one in (("correct", correct), ("incorrect", incorrect)) if one]
    counts[f"problems with {' and '.join(kinds)} generations"] += 1
    prompt = row.value["problem"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{row.where}: column 'problem' must be text")
    shared: dict[str, Any] = {"prompt": prompt}
    if (name := row.value.get("uuid", row.value.get("id"))) is not None:
        shared = {"id": name, **shared}
    if teacher is not None:
        shared["teacher"] = teacher
    if teacher in options.teacher_weights:
        shared["weight"] = options.teacher_weights[teacher]
    return Selection(
        [{**shared, "completion": text} for text in _taken(correct, options.take)],
        [
            {**shared, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in product(
                _taken(correct, options.take), _taken(incorrect, options.take)
            )
        ],
    )


def _sorted_out(
    generations: list[Generation], options: PrepareOptions, counts: Counter[str]
) -> tuple[list[str], list[str]]:
    """The correct and the incorrect texts that stay, in the row's order."""
    correct: list[str] = []
    incorrect: list[str] = []
    for one in generations:
        text = one.text
        if options.finished and not is_finished(text):
            counts["generations unfinished"] += 1
            continue
        if options.verifiers == "agree" and one.llama != one.math_verify:
            counts["generations on which the verifiers differ"] += 1
            continue
        if options.open_think and _END_OF_THOUGHT in text and "<think>" not in text:
            counts["generations given a <think>"] += 1
            text = f"<think>\n{text}"
        (correct if _VERDICTS[options.verifiers](one) else incorrect).append(text)
    return correct, incorrect


_VERDICTS: dict[str, Callable[[Generation], bool]] = {
    "both": lambda one: one.llama and one.math_verify,
    "agree": lambda one: one.llama,
    "either": lambda one: one.llama or one.math_verify,
    "llama": lambda one: one.llama,
    "math": lambda one: one.math_verify,
}


def is_finished(text: str) -> bool:
    """Whether a trace ends its thought and marks an answer behind it."""
    _, ended, answer = text.rpartition(_END_OF_THOUGHT)
    return bool(ended) and final_answer(answer) is not None


def _taken(texts: list[str], take: str) -> list[str]:
    if take == "all" or not texts:
        return texts
    if take == "first":
        return texts[:1]
    return [min(texts, key=len) if take == "shortest" else max(texts, key=len)]
