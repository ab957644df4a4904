"""Selects traces of OpenR1-Math-Raw: the paper's D_SFT and D_Pref, and variations.

The rules are those of arXiv 2505.24850 (appendix on data). What each rule leaves out is counted.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from redi.engine.config.ranges import NOT_NEGATIVE, check_ranges, ranged
from redi.engine.data.final_answer import final_answer
from redi.engine.data.openr1_rows import Generation, read_openr1
from redi.engine.data.row import Row, read_text
from redi.engine.errors import InputError

_START_OF_THOUGHT, _END_OF_THOUGHT = "<think>", "</think>"
# Matches the last line "answer": the thought may contain such a line as well.
_THINK_ANSWER = re.compile(r"think\n(.*)\nanswer\n(.*)", re.DOTALL)


PAPER_SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."
"""The system prompt of arXiv 2505.24850."""


@dataclass(frozen=True)
class PrepareOptions:
    """How the rows of OpenR1-Math-Raw are selected."""

    data: list[str]
    """Files of such rows (JSONL, JSON, Parquet; also gzipped), folders of them, or hub names."""
    out: str
    """Output folder for the two sets and the report."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer by which the two limits count."""
    template: Literal["chat", "none"] = "chat"
    """What the two limits count, as in training (data.template). chat: prompt and trace with the
    tokenizer's chat template; none: without it."""
    system_prompt: str | None = PAPER_SYSTEM_PROMPT
    """System message of the prompts that are counted (data.system_prompt); default: the paper's."""
    take: Literal["first", "shortest", "longest", "all"] = "first"
    """Which correct and which incorrect generation of a problem to take. all: every correct one,
    and every pair of a correct and an incorrect one. Lengths are in characters."""
    verifiers: Literal["both", "agree", "either", "llama", "math"] = "both"
    """When a generation counts as correct. both: both verifiers accept it (the paper); agree: as
    both, but generations on which the verifiers differ are left out; either: at least one accepts
    it; llama, math: this verifier accepts it."""
    max_prompt_tokens: int = ranged(800, NOT_NEGATIVE)
    """Leave out pairs with a longer prompt, in tokens as trained; 0: no limit."""
    max_trace_tokens: int = ranged(19000, NOT_NEGATIVE)
    """Leave out pairs with a longer trace, with its end, in tokens as trained; 0: no limit."""
    exclude_sources: list[str] = field(default_factory=lambda: ["cn_k12"])
    """Leave out rows with these values in the column source."""
    finished: bool = False
    r"""Keep only generations with a </think> and a marked answer after it (\boxed{} or ####)."""
    open_think: bool = False
    """Add missing think tags: <think> before generations that have only </think>, and both tags
    around the thought of those with a first line "think" and a later line "answer" (s1.1)."""
    seed: int = ranged(42, NOT_NEGATIVE)
    """Seed of the shuffle, which is that of `datasets`."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.tokenizer is None and (self.max_prompt_tokens or self.max_trace_tokens):
            raise ValueError(
                "tokenizer is missing: the limits count its tokens (without limits: "
                "--max_prompt_tokens 0 --max_trace_tokens 0)"
            )


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows made from one row, in formats that training reads."""

    sft: list[dict[str, Any]]
    """Rows of D_SFT: id, prompt, source, completion; teacher and weight if the row has them."""
    pref: list[dict[str, Any]]
    """Rows of D_Pref before the limits on length: chosen and rejected instead of completion."""


def select_traces(row: Row, options: PrepareOptions, counts: Counter[str]) -> Selection:
    """Apply all rules except those on length to a row.

    Args:
        row: a row of OpenR1-Math-Raw.
        options: the rules.
        counts: updated with what the rules leave out, by reason, and with the problems, by the
            kinds of generations that are kept.

    Raises:
        InputError: a column is missing or has a wrong type. Names row and column.
    """
    nothing = Selection([], [])
    for column in ("problem", "source", "problem_is_valid", "generations", "correctness"):
        if column not in row.value:
            raise InputError(f"{row.where}: column {column!r} is missing: not OpenR1-Math-Raw")
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
    alone = " alone" if len(kinds) == 1 else ""
    counts[f"problems with {' and '.join(kinds)} generations{alone}"] += 1
    shared = {
        "id": row.value.get("uuid", row.value.get("id")),
        "prompt": read_text(row, "problem", row.value["problem"]),
        **{column: row.value.get(column) for column in ("source", "teacher", "weight")},
    }
    shared = {column: value for column, value in shared.items() if value is not None}
    for column, value in shared.items():
        if isinstance(value, str):
            read_text(row, column, value, empty=True)
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
    """The correct and the incorrect texts that are kept, in the row's order."""
    correct: list[str] = []
    incorrect: list[str] = []
    for one in generations:
        text = one.text
        if options.open_think and (tagged := with_think_tags(text)) != text:
            counts["generations given think tags"] += 1
            text = tagged
        if not is_finished(text):
            if options.finished:
                counts["generations unfinished"] += 1
                continue
            counts["generations unfinished, kept"] += 1
        if options.verifiers == "agree" and one.llama != one.math_verify:
            counts["generations on which the verifiers differ"] += 1
            continue
        (correct if _VERDICTS[options.verifiers](one) else incorrect).append(text)
    return correct, incorrect


_VERDICTS: dict[str, Callable[[Generation], bool]] = {
    "both": lambda one: one.llama and one.math_verify,
    "agree": lambda one: one.llama,
    "either": lambda one: one.llama or one.math_verify,
    "llama": lambda one: one.llama,
    "math": lambda one: one.math_verify,
}


def with_think_tags(text: str) -> str:
    """Put the thought of a trace between <think> and </think>.

    Two other notations are known: </think> alone (R1 after a prompt that opens the thought), and
    the markers of s1.1, a first line "think" and a later line "answer". Any other trace is returned
    unchanged.
    """
    if _START_OF_THOUGHT in text:
        return text
    if _END_OF_THOUGHT in text:
        return f"{_START_OF_THOUGHT}\n{text}"
    if found := _THINK_ANSWER.fullmatch(text):
        thought, answer = found.groups()
        return f"{_START_OF_THOUGHT}\n{thought}\n{_END_OF_THOUGHT}\n\n{answer}"
    return text


def is_finished(text: str) -> bool:
    """True if a trace closes its thought and has a marked answer after it."""
    _, ended, answer = text.rpartition(_END_OF_THOUGHT)
    return bool(ended) and final_answer(answer) is not None


def _taken(texts: list[str], take: str) -> list[str]:
    if take == "all" or not texts:
        return texts
    if take == "first":
        return texts[:1]
    return [min(texts, key=len) if take == "shortest" else max(texts, key=len)]
