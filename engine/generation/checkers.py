"""Whether a completion's answer is the right one."""

from __future__ import annotations

import logging
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from redi.engine.config.patterns import answer_pattern
from redi.engine.data.final_answer import BOX, closing_brace, final_answer
from redi.engine.generation import answer_forms as forms

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# Three letters, or two that are a word: xy is a product, and equals yx.
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
_REASON = re.compile(r"[\s,;]*\b(?:because|since)\b.*", re.IGNORECASE)
_THINK = re.compile(r"</?think(?:ing)?>")
# Boxes that final_answer does not know: \framebox{7}, \boxed 7.
_OTHER_BOX = re.compile(r"\\framebox\s*(?=\{)|\\boxed\s+(-?[\d.]+|[A-J])\b")
_OPEN_BOX = re.compile(r"\\(?:f|frame)?box(?:ed)?\s*$")
_START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a checker found."""

    extracted: str | None
    """The answer as the completion has it; None: there is none."""
    correct: bool


Checker = Callable[[str, str, str], CheckResult]
"""(prompt, completion, right answer) -> verdict."""


class ExactChecker:
    r"""Right when the completion's answer is the right answer, letter by letter.

    The completion's answer is the group of the pattern's last match, if a pattern is given; else
    the marked one (`final_answer`), else the last line with text in it. Runs of white space count
    as one space, $ around the answer and a full stop behind it do not count.
    """

    def __init__(self, pattern: str | None = None) -> None:
        """Raises ValueError for a pattern that is no regular expression with one group."""
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
    r"""Right when the answers are mathematically equal, by the library math-verify.

    Thoughts (<think>) do not count; a text that ends in a thought or an open box has no answer.
    The completion's answer is the marked one (`final_answer`), else what math-verify finds, which
    is the last formula or number unless words such as "the answer is" point to one. A right answer
    that is words, or the letter of a choice, is compared as text, whatever the case: as a formula
    it would be a product of letters, equal to any anagram. Unmarked, such an answer is what
    follows the last "answer is" or "answer:", else the last line.

    Answers are compared in a process of its own, which is killed after `seconds`: an answer such
    as 9^{9^{9^9}} keeps Python busy for ever, where no signal reaches it. Such an answer is wrong.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._worker: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def __call__(self, prompt: str, completion: str, answer: str) -> CheckResult:
        """Compare; the prompt does not count."""
        said = _conclusion(completion)
        if said is None:
            return CheckResult(None, False)
        marked = final_answer(said)
        if not (marked or said).strip():
            return CheckResult(marked, False)
        right = forms.clean_formula(answer)
        if marked is None and (_words(right) or forms.split_choice(right)[0]):
            pointed = _unmarked_words(said)
            # A choice with its value may be answered by the value alone, somewhere in the text.
            _, value = forms.split_choice(right)
            if value is None or forms.split_choice(forms.clean_formula(pointed))[0]:
                return CheckResult(pointed, self._same(forms.clean_formula(pointed), right))
            right = value
        if marked is None:
            value, _ = forms.split_unit(forms.scientific(forms.clean_numbers(right)))
            return self._ask(forms.clean_prose(said), None, value)
        return CheckResult(marked, self._same(forms.clean_formula(marked), right))

    def _same(self, given: str, right: str) -> bool:
        """Whether two cleaned answers are equal."""
        if given == right:
            return True
        letters, value = forms.split_choice(right)
        given_letters, given_value = forms.split_choice(given)
        if (words := _words(right)) and not (letters and given_letters):  # ACD may be both
            return _words(given) == words
        if letters and (given_letters or not value):
            if not given_letters or not forms.same_letters(given_letters, letters):
                return False
            return not (value and given_value) or self._same(given_value, value)
        if letters or given_value:
            return self._same(given_value or given, value or right)
        return self._same_formula(forms.clean_numbers(given), forms.clean_numbers(right))

    def _same_formula(self, given: str, right: str) -> bool:
        if given_base := forms.split_base(given):
            if right_base := forms.split_base(right):
                return given_base == right_base
            given = str(int(*given_base))
        elif forms.split_base(right):
            return False
        given, given_unit = forms.split_unit(given)
        right, right_unit = forms.split_unit(right)
        if given_unit and right_unit and given_unit != right_unit:
            return False
        if forms.bounds(given) != forms.bounds(right):
            return False
        if len(forms.elements(right)) > 1 and (
            forms.is_tuple(given) or forms.repeats(given)[0] != forms.repeats(right)[0]
        ):
            return False
        # 2e-1 is 0.2, or Euler's number twice, less one: right if it is equal in either reading.
        readings = {(given, right), (forms.scientific(given), forms.scientific(right))}
        return any(self._ask("", *reading).correct for reading in sorted(readings))

    def _ask(self, completion: str, marked: str | None, answer: str) -> CheckResult:
        """What math-verify finds, in the process of its own."""
        connection = self._connection or self._start()
        try:
            connection.send((completion, marked, answer))
            if connection.poll(self._seconds):
                return connection.recv()
        except (EOFError, OSError):  # the worker died: out of memory, or too deep a recursion
            pass
        self.close()
        return CheckResult(marked, False)

    def _start(self) -> Connection:
        # spawn: a fork of a process that runs torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._worker = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._worker.start()
        theirs.close()
        if not self._connection.poll(_START_SECONDS):
            raise RuntimeError(f"math-verify did not start within {_START_SECONDS:.0f} s")
        self._connection.recv()
        return self._connection

    def close(self) -> None:
        """End the process; the next comparison starts another."""
        if self._worker is not None and self._connection is not None:
            self._worker.kill()
            self._worker.join()
            self._connection.close()
        self._worker = self._connection = None


@contextmanager
def open_checker(name: str, pattern: str | None = None) -> Iterator[Checker]:
    """The checker "math", "exact", or "auto": exact if a pattern is given, else math.

    Raises:
        ValueError: an unknown name, or a pattern that is wrong or for the checker "math".
    """
    if name not in ("auto", "math", "exact"):
        raise ValueError(f"unknown checker {name!r}; known: auto, math, exact")
    if name == "math" and pattern is not None:
        raise ValueError('a pattern for the answer needs the checker "exact"')
    if name == "exact" or pattern is not None:
        yield ExactChecker(pattern)
        return
    with closing(MathChecker()) as checker:
        yield checker


def _conclusion(completion: str) -> str | None:
    """The text that holds the answer: what follows the thinking. None if it was cut off."""
    start = 0
    for tag in _THINK.finditer(completion):
        start = tag.end() if tag[0].startswith("</") else -1
    if start < 0:
        return None
    said = _OTHER_BOX.sub(
        lambda box: rf"\boxed{{{box[1]}}}" if box[1] else r"\boxed", completion[start:]
    )
    opened = list(BOX.finditer(said))
    if _OPEN_BOX.search(said) or (opened and closing_brace(said, opened[-1].end()) is None):
        return None
    return said


def _words(text: str) -> str | None:
    """The text in lower case if it is words and no formula."""
    plain = _plain(_TEXT_COMMAND.sub(r"\1", text)).removeprefix("(").removesuffix(")")
    return plain.casefold() if _WORDS.fullmatch(plain) else None


def _unmarked_words(completion: str) -> str:
    said = list(_ANSWER_IS.finditer(completion))
    if not said:
        return completion.strip().splitlines()[-1]
    return _REASON.sub("", said[-1][1] or said[-1][2])


def _serve(connection: Connection) -> None:
    """The worker: answers until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other end to handle
    logging.disable()  # math-verify warns that it has no time limit: the limit is the process's
    import math_verify  # noqa: F401  # imported before the clock runs

    connection.send(None)
    while True:
        try:
            completion, marked, answer = connection.recv()
        except EOFError:
            return
        connection.send(_compare(completion, marked, answer))


def _compare(completion: str, marked: str | None, answer: str) -> CheckResult:
    from math_verify import parse, verify

    found = parse(completion if marked is None else _boxed(marked), parsing_timeout=None)
    extracted = marked or (str(found[-1]) if found else None)
    right = parse(_boxed(answer), parsing_timeout=None)
    # 1 <= x < 2 is the interval [1, 2).
    correct = verify(right, found, allow_set_relation_comp=True, timeout_seconds=None)
    return CheckResult(extracted, correct)


def _boxed(answer: str) -> str:
    # Where math-verify looks first, and reads a formula in full.
    return f"\\boxed{{{answer.strip().strip('$')}}}"
