"""Answers that are right in other words, and wrong ones that look alike."""

import threading
import time
from collections.abc import Iterator

import pytest

from redi.engine.checkers import ExactChecker, MathChecker, final_answer, open_checker


@pytest.fixture(scope="module")
def math() -> Iterator[MathChecker]:
    checker = MathChecker(seconds=3)
    yield checker
    checker.close()


RIGHT = [
    # answer, completion
    ("18", "She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18"),
    ("18", "A: 18"),
    ("18", "She makes $18.00 a day."),
    ("18", "The answer is 18 eggs."),
    ("70,000", r"\boxed{70000}"),
    ("70000", r"\boxed{\$70,000}"),
    (r"\frac{1}{2}", r"so $p = \boxed{\dfrac12}$"),
    ("1/2", r"\boxed{0.5}"),
    ("0.5", "The probability is $\\frac{2}{4}$."),
    (r"$\frac{3}{4}$", r"\boxed{3/4}"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    ("(-\\infty, 3]", r"\boxed{(-\infty,3]}"),
    ("[-2,7]", r"\boxed{x \in [-2,7]}"),
    (r"\left(3, \frac{\pi}{2}\right)", r"\boxed{(3,\pi/2)}"),
    ("10", r"\boxed{10\text{ cm}^2}"),
    (r"10\text{ cm}", r"\boxed{10}"),
    (r"90^\circ", r"\boxed{90}"),
    ("50\\%", r"\boxed{50}"),
    ("50\\%", r"\boxed{0.5}"),
    ("1,2", r"\boxed{2, 1}"),
    ("5", r"\boxed{\boxed{5}}"),
    ("5", r"\boxed{3}? No: \boxed{5}"),
    ("5", r"\fbox{5}"),
    ("18", r"\boxed{x = 18}"),
    ("p - q", r"\boxed{-q + p}"),
    (r"\text{Evelyn}", r"\boxed{Evelyn}"),
    ("even", r"\boxed{\text{Even}}"),
    ("even", "Think.\nThe answer is even."),
    ("B", r"\boxed{\textbf{(B)}}"),
    ("C", "Therefore the answer is (C)."),
]
WRONG = [
    ("18", ""),
    ("18", " \n"),
    ("18", "no number here"),
    ("18", r"\boxed{}"),
    ("18", "18 eggs less 2 is 16"),
    ("18", r"\boxed{-18}"),
    ("1/3", r"\boxed{0.33}"),
    ("(0,1)", r"\boxed{[0,1)}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    ("5", r"\boxed{5}? No: \boxed{3}"),
    ("5", r"\boxed{\boxed{3}}"),
    ("5", r"\boxed{5}, since \boxed{\frac{3}{"),  # cut off in another answer
    ("even", r"\boxed{odd}"),
    ("even", r"\boxed{neve}"),  # as products of letters they would be equal
    ("B", r"\boxed{(C)}"),
    ("x", r"\boxed{y}"),
]


@pytest.mark.parametrize(("answer", "completion"), RIGHT)
def test_equal_answers_are_right(answer: str, completion: str, math: MathChecker) -> None:
    assert math("", completion, answer).correct


@pytest.mark.parametrize(("answer", "completion"), WRONG)
def test_other_answers_are_wrong(answer: str, completion: str, math: MathChecker) -> None:
    assert not math("", completion, answer).correct


def test_the_extracted_answer_is_reported(math: MathChecker) -> None:
    assert math("", r"$\boxed{\frac{1}{2}}$ it is", "3").extracted == r"\frac{1}{2}"
    assert math("", "4 and then 5", "3").extracted == "5"
    assert math("", "nothing", "3").extracted is None


def test_an_answer_that_never_finishes_computing_is_wrong_in_time(math: MathChecker) -> None:
    began = time.monotonic()
    assert not math("", r"\boxed{9^{9^{9^{9}}}}", "5").correct
    assert time.monotonic() - began < 30
    assert math("", r"\boxed{\frac{10}{2}}", "5").correct  # and the next is checked


def test_answers_are_checked_outside_the_main_thread_too(math: MathChecker) -> None:
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(math("", r"\boxed{4/2}", "2")))
    thread.start()
    thread.join()
    assert verdicts[0].correct


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("#### 18", "18"),
        ("a #### 1\nb #### 2\nc", "2"),
        (r"#### 1 but \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and then", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x = \boxed{5} + 1}", r"x = \boxed{5} + 1"),
        (r"\boxed{ \boxed{ 5 } }", "5"),
        (r"\boxed{1", None),
        ("18", None),
        ("####", None),
    ],
)
def test_the_marked_answer_is_the_last_whole_box_else_behind_the_hashes(
    text: str, marked: str | None
) -> None:
    assert final_answer(text) == marked


@pytest.mark.parametrize(
    ("pattern", "completion", "answer", "right"),
    [
        ("(.)$", "27*442", "2", True),
        ("(.)$", "27*442", "4", False),
        ("(.)$", "", "4", False),
        (r"A: (\d+)", "A: 1 or A: 22", "22", True),  # the last match counts
        (None, r"\boxed{a b}", "a  b", True),
        (None, "first\n The cat. \n\n", "The cat", True),
        (None, "$x$", "x", True),
        (None, "The answer is 4", "4", False),
        (None, "0.5", "1/2", False),
        (None, "Even", "even", False),
    ],
)
def test_exact_compares_letter_by_letter(
    pattern: str | None, completion: str, answer: str, right: bool
) -> None:
    assert ExactChecker(pattern)("", completion, answer).correct == right


@pytest.mark.parametrize("pattern", ["(", "no group", "(two) (groups)"])
def test_a_pattern_without_its_one_group_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"regular expression|groups"):
        ExactChecker(pattern)


def test_auto_is_exact_with_a_pattern_and_math_without() -> None:
    with open_checker("auto", "(.)$") as check:
        assert not check("", "1/2", "0.5").correct
    with open_checker("auto") as check:
        assert check("", "1/2", "0.5").correct
    with pytest.raises(ValueError, match='needs the checker "exact"'), open_checker("math", "(.)"):
        pass
