"""Checkers: decide whether a completion's answer is correct."""

from __future__ import annotations

import logging
import multiprocessing
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from multiprocessing.connection import Connection

from redi.engine.config.patterns import answer_pattern
from redi.engine.data.final_answer import BOX, closing_braces, final_answer
from redi.engine.generation import answer_forms as forms
from redi.engine.generation.processes import end_with_parent, limit_cpu

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# Three letters or more, or a two-letter word: xy is a product, equal to yx.
_WORDS = re.compile(
    r"(?:[^\W\d_]{3,}|\b(?:am|an|as|at|be|by|do|go|if|in|is|it|no|of|ok|on|or|pm|so|to|up|us|we)\b)"
    r"(?:[\s'-]+[^\W\d_]+)*",
    re.IGNORECASE,
)
_ANSWER_IS = re.compile(
    r"(?:answer|option|choice)(?:\s+is\b|:)[\s:*]*(\S.*)"
    r"|(?:option|choice)\s+(\(?[A-J]\)?)(?:[.\s]*$|\s+is\s+(?:the\s+)?(?:correct|right))",
    re.IGNORECASE | re.MULTILINE,
)
_REASON = re.compile(r"(?<![\s,;])[\s,;]*\b(?:because|since)\b.*", re.IGNORECASE)
_THINK = re.compile(r"</?think(?:ing)?>")
_OPENED_THINK = re.compile(r"<think(?:ing)?>\s*$")
# Boxes that final_answer does not handle: \framebox{7}, \boxed 7.
_OTHER_BOX = re.compile(r"\\framebox\s*(?=\{)|\\boxed\s+(-?[\d.]+|[A-J])\b")
_OPEN_BOX = re.compile(r"\\(?:f|frame)?box(?:ed)?\s*$")
# Longer answers are compared as text only: the regular expressions for shorter ones would be slow.
_LONGEST = 300
_START_SECONDS = 120.0
_LOOK = re.compile(r"\\(?:left|right|displaystyle|text|mathrm|mathbf)(?![a-z])|\\[,;:! ]|[\s${}]")
_DECIMAL = re.compile(r"-?\d{1,40}(?:\.\d{1,40})?")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Result of a checker."""

    extracted: str | None
    """Answer found in the completion, or None."""
    correct: bool
    doubt: str | None = None
    """Why a person should look at it, one of the constants below; it does not change `correct`."""


NOT_JUDGED = "not judged in time"
"""The comparison took too long, or its process ended. Counts as incorrect."""
UNMARKED = "no marked answer"
"""Neither a box nor ####: the answer was looked for in the text."""
TEXT_DISAGREES = "equal as text, not as mathematics"
NUMBERS_DISAGREE = "equal as mathematics, but other decimals"


Checker = Callable[[str, str, str], CheckResult]
"""(prompt, completion, correct answer) -> result."""


class ExactChecker:
    r"""Compares the answers as text.

    The completion's answer is the group of the pattern's last match, if there is a pattern; else
    the marked answer (`final_answer`), else the last non-empty line. Before comparison, runs of
    white space become one space, and $ around the answer and a final full stop are removed.
    """

    def __init__(self, pattern: str | None = None) -> None:
        """Raises ValueError if the pattern is not a regular expression with one group."""
        self._pattern = None if pattern is None else answer_pattern(pattern)

    def __call__(self, prompt: str, completion: str, answer: str) -> CheckResult:
        """Compare; the prompt does not count."""
        extracted = self._extract(completion)
        correct = extracted is not None and _plain(extracted) == _plain(answer)
        return CheckResult(extracted, correct)

    def _extract(self, completion: str) -> str | None:
        if self._pattern is not None:
            matches = list(self._pattern.finditer(completion))
            return matches[-1][1] if matches else None
        lines = [line for line in completion.splitlines() if line.strip()]
        return final_answer(completion) or (lines[-1].strip() if lines else None)


def _plain(text: str) -> str:
    text = " ".join(text.split())
    text = text.removesuffix(".")
    return text.strip("$").strip()


class MathChecker:
    r"""Compares the answers mathematically, by the library math-verify.

    Text in <think> is ignored; a text that ends in a thought or an open box has no answer. The
    completion's answer is the marked one (`final_answer`), else what math-verify finds: the last
    formula or number, unless words such as "the answer is" point to another. If the correct answer
    is words or the letter of a choice, it is compared as case-insensitive text: as a formula it
    would be a product of letters, equal to any anagram. An unmarked answer of that kind is the text
    after the last "answer is" or "answer:", else the last line.

    Answers are compared in a separate process, which is killed after `seconds`: an answer such as
    9^{9^{9^9}} computes practically forever and cannot be interrupted by a signal. It counts as
    incorrect. Answers of more than 300 characters are compared as text.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._worker: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def __call__(self, prompt: str, completion: str, answer: str) -> CheckResult:
        """Compare; the prompt does not count."""
        conclusion = _conclusion(completion)
        if conclusion is None:
            return CheckResult(None, False)
        marked = final_answer(conclusion)
        if not (marked or conclusion).strip():
            return CheckResult(marked, False)
        connection = self._connection or self._start()
        try:
            connection.send((conclusion, marked, answer))
            if connection.poll(self._seconds):
                return connection.recv()
        except (EOFError, OSError):  # the worker died: out of memory, or recursion too deep
            pass
        self.close()
        return CheckResult(marked, False, NOT_JUDGED)

    def _start(self) -> Connection:
        # spawn: a fork of a process with torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._worker = context.Process(target=_serve, args=(theirs, self._seconds), daemon=True)
        self._worker.start()
        theirs.close()
        if not self._connection.poll(_START_SECONDS):
            raise RuntimeError(f"math-verify did not start within {_START_SECONDS:.0f} s")
        self._connection.recv()
        return self._connection

    def close(self) -> None:
        """Kill the process; the next comparison starts a new one."""
        if self._worker is not None and self._connection is not None:
            self._worker.kill()
            self._worker.join()
            self._connection.close()
        self._worker = self._connection = None


@contextmanager
def open_checker(name: str, pattern: str | None = None, seconds: float = 5.0) -> Iterator[Checker]:
    """Open the checker "math", "exact", or "auto" (exact if there is a pattern, else math).

    Args:
        name: of the checker.
        pattern: of the answer, for "exact".
        seconds: time limit of one comparison, for "math".

    Raises:
        ValueError: the name is unknown, or the pattern is invalid or given for the checker "math".
    """
    if name not in ("auto", "math", "exact"):
        raise ValueError(f"unknown checker {name!r}; available: auto, math, exact")
    if name == "math" and pattern is not None:
        raise ValueError('a pattern for the answer needs the checker "exact"')
    if name == "exact" or pattern is not None:
        yield ExactChecker(pattern)
        return
    with closing(MathChecker(seconds)) as checker:
        yield checker


def opened_thought(prompt: str, completion: str) -> str:
    """The completion, with the thought's tag if the prompt ends with it.

    Without the tag a thought that is cut off would pass for an answer.
    """
    opened = _OPENED_THINK.search(prompt)
    if opened is None or completion.lstrip().startswith("<think"):
        return completion
    return opened.group() + completion


def _conclusion(completion: str) -> str | None:
    """Text after the thinking, which contains the answer; None if it was truncated."""
    start = 0
    for tag in _THINK.finditer(completion):
        start = tag.end() if tag[0].startswith("</") else -1
    if start < 0:
        return None
    text = _OTHER_BOX.sub(
        lambda box: rf"\boxed{{{box[1]}}}" if box[1] else r"\boxed", completion[start:]
    )
    opened = list(BOX.finditer(text))
    if _OPEN_BOX.search(text) or (opened and opened[-1].end() - 1 not in closing_braces(text)):
        return None
    return text


def _words(text: str) -> str | None:
    """The text in lower case if it is words, None if it is a formula."""
    plain = _plain(_TEXT_COMMAND.sub(r"\1", text)).removeprefix("(").removesuffix(")")
    return plain.casefold() if _WORDS.fullmatch(plain) else None


def _unmarked_words(completion: str) -> str:
    found = list(_ANSWER_IS.finditer(completion))
    if not found:
        return completion.strip().splitlines()[-1]
    return _REASON.sub("", found[-1][1] or found[-1][2])


def _serve(connection: Connection, seconds: float) -> None:
    """Worker process: serve comparisons until the connection closes."""
    end_with_parent()
    logging.disable()  # math-verify warns of a missing time limit; the process has one
    import math_verify  # noqa: F401  # imported before the time limit applies

    connection.send(None)
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        conclusion, marked, answer = question
        # Native code can hold the GIL. Then only the kernel can end a process without a parent.
        limit_cpu(2 * seconds + 1)
        result = _judge(conclusion, marked, answer)
        connection.send(replace(result, doubt=_doubt(result, marked, answer)))


def _doubt(result: CheckResult, marked: str | None, answer: str) -> str | None:
    """The second opinion on a verdict: comparing the texts."""
    if marked is None:
        return UNMARKED
    given, right = _squashed(marked), _squashed(answer)
    if given == right:
        return None if result.correct else TEXT_DISAGREES
    if result.correct and _DECIMAL.fullmatch(given) and _DECIMAL.fullmatch(right):
        return None if Decimal(given) == Decimal(right) else NUMBERS_DISAGREE
    return None


def _squashed(text: str) -> str:
    """The text without white space and what only changes the look of a formula."""
    return _LOOK.sub("", text).removesuffix(".").casefold()


def _judge(conclusion: str, marked: str | None, answer: str) -> CheckResult:
    right = forms.clean_formula(answer)
    if marked is None and len(answer) <= _LONGEST:
        if _words(right) or forms.split_choice(right)[0]:
            pointed = _unmarked_words(conclusion)
            # A choice that has a value may be answered by that value, anywhere in the text.
            _, value = forms.split_choice(right)
            if value is None or forms.split_choice(forms.clean_formula(pointed))[0]:
                return CheckResult(pointed, _same_answer(pointed, answer))
            right = value
        marked = forms.last_ratio(conclusion, right)
        if marked is None:
            value, _ = forms.split_unit(forms.scientific(forms.clean_numbers(right)))
            return _compare(forms.clean_prose(conclusion), None, forms.clean_answer(value))
    pointed = _unmarked_words(conclusion) if marked is None else marked
    return CheckResult(pointed, _same_answer(pointed, answer))


def _same_answer(given: str, right: str) -> bool:
    """Return whether two answers as found are equal."""
    if max(len(given), len(right)) > _LONGEST:
        return _plain(given) == _plain(right)
    return _same(forms.clean_formula(given), forms.clean_formula(right))


def _same(given: str, right: str) -> bool:
    """Return whether two cleaned answers are equal."""
    if given == right:
        return True
    letters, value = forms.split_choice(right)
    given_letters, given_value = forms.split_choice(given)
    if (words := _words(right)) and not (letters and given_letters):  # ACD: word or choices
        return _words(given) == words
    if letters and (given_letters or not value):
        if not given_letters or not forms.same_letters(given_letters, letters):
            return False
        return not (value and given_value) or _same(given_value, value)
    if letters or given_value:
        return _same(given_value or given, value or right)
    return _same_formula(forms.clean_numbers(given), forms.clean_numbers(right))


def _same_formula(given: str, right: str) -> bool:
    if given_base := forms.split_base(given):
        if right_base := forms.split_base(right):
            return given_base == right_base
        given = str(int(*given_base))
    elif forms.split_base(right):
        return False
    if quantities := forms.quantities(right):
        return forms.quantities(given) == quantities
    given, given_modulus = forms.split_modulus(given)
    right, right_modulus = forms.split_modulus(right)
    if given_modulus and right_modulus and given_modulus != right_modulus:
        return False
    given, given_unit = forms.split_unit(given)
    right, right_unit = forms.split_unit(right)
    if given_unit and right_unit:
        if given_unit != right_unit:
            return False
        if right_unit in (["am"], ["pm"]):  # 6 pm is 6:00 pm
            given, right = given.removesuffix(":00"), right.removesuffix(":00")
    given, given_percent = forms.split_percent(forms.clean_answer(given))
    right, right_percent = forms.split_percent(forms.clean_answer(right))
    if not forms.same_structure(given, right):
        return False
    # 2e-1 is 0.2, or 2 * e - 1: correct if the answers are equal in either reading.
    readings = {(given, right), (forms.scientific(given), forms.scientific(right))}
    # 12.5\% is 12.5, or 0.125.
    if given_percent != right_percent:
        readings.add((given + r"\%" * given_percent, right + r"\%" * right_percent))
    return any(_compare("", *reading).correct for reading in sorted(readings))


def _compare(completion: str, marked: str | None, answer: str) -> CheckResult:
    """Result of math-verify."""
    from math_verify import parse, verify

    found = parse(completion if marked is None else _boxed(marked), parsing_timeout=None)
    extracted = marked or (str(found[-1]) if found else None)
    right = parse(_boxed(answer), parsing_timeout=None)
    # allow_set_relation_comp: 1 <= x < 2 equals the interval [1, 2).
    correct = verify(right, found, allow_set_relation_comp=True, timeout_seconds=None)
    return CheckResult(extracted, correct)


def _boxed(answer: str) -> str:
    # math-verify looks for a box first, and parses the whole formula in it.
    return f"\\boxed{{{answer.strip().strip('$')}}}"
