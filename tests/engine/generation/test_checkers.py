"""Correct answers in other notations, and incorrect answers that look similar."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from redi.engine.data.final_answer import final_answer
from redi.engine.generation.answer_forms import split_unit
from redi.engine.generation.checkers import (
    NUMBERS_DISAGREE,
    TEXT_DISAGREES,
    UNMARKED,
    ExactChecker,
    MathChecker,
    open_checker,
    opened_thought,
)


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


KINDS: dict[str, list[tuple[str, str, bool]]] = {
    # answer, completion, right
    "cut off": [
        ("4", r"\boxed{4}, or rather \boxed{5", False),
        ("4", r"\boxed{4}, or rather \boxed{4", False),
        ("4", r"\boxed{4}, or rather \boxed", False),
        ("4", r"\boxed{4}, or rather \fbox{5", False),
        ("5", r"\boxed{4}, or rather \boxed 5", True),
        ("4", r"\boxed{4}, or rather \framebox{5}", False),
    ],
    "thinking": [
        ("4", r"<think>\boxed{4}", False),
        ("4", r"<think>it is \boxed{4}</think> I cannot tell.", False),
        ("4", r"it is \boxed{4}</think>", False),
        ("4", r"<think>a</think>\boxed{4}<think>or", False),
        ("4", r"<think>\boxed{3}</think> The answer is 4.", True),
        ("3", r"<think>\boxed{3}</think> The answer is 4.", False),
        ("4", r"\boxed{3}</think>\boxed{4}", True),
    ],
    "words": [
        ("no", r"\boxed{No}", True),
        ("no", r"\boxed{on}", False),
        ("at", r"\boxed{ta}", False),
        ("ab", r"\boxed{ba}", True),  # a product
        ("March 3", r"\boxed{\text{March 3}}", True),
        ("March 3", r"\boxed{\text{March 4}}", False),
        ("even", "The answer is even, because it ends in 2.", True),
    ],
    "lists": [
        ("3,4", r"\boxed{(3,4)}", False),
        ("3,4", r"\boxed{4,3,3}", False),
        ("3,3,4", r"\boxed{3,4}", False),
        ("3,3,4", r"\boxed{4,3,3}", True),
        ("3,4", r"\boxed{3 \text{ or } 4}", True),
        ("(3,4),(5,6)", r"\boxed{(5,6),(3,4)}", True),
        (r"\{3,4\}", r"\boxed{\{4,3,3\}}", True),
        ("(1,234)", r"\boxed{1,234}", False),
        ("1, 234", r"\boxed{1234}", False),
    ],
    "bases": [
        ("201_3", r"\boxed{201_{3}}", True),
        ("201_3", r"\boxed{201}", False),
        ("201", r"\boxed{201_3}", False),
        ("19", r"\boxed{201_3}", True),
        ("201_3", r"\boxed{201_4}", False),
        ("201_3", r"\boxed{19}", False),
    ],
    "choices": [
        ("D", r"\boxed{D) 8}", True),
        ("D", r"\boxed{(D) 8}", True),
        ("D", r"\boxed{\textbf{(D)}\ 8}", True),
        ("E", r"\boxed{\textbf{(D)}\ 8}", False),
        ("D", r"\boxed{\text{Option D}}", True),
        ("8", r"\boxed{D. 8}", True),
        ("9", r"\boxed{D. 8}", False),
        (r"\textbf{(D)}\ 8", r"\boxed{D}", True),
        (r"\textbf{(D)}\ 8", r"\boxed{8}", True),
        (r"\textbf{(D)}\ 8", "So there are 8.", True),
        (r"\textbf{(D)}\ 8", r"\boxed{(D) 9}", False),
        ("D", r"\boxed{(D) 8 and (E) 9}", False),
        ("D", r"\boxed{D or E}", False),
        ("BDE", r"\boxed{E, B, D}", True),
        ("BE", r"\boxed{\text{(B) and (E)}}", True),
        ("BE", r"\boxed{B}", False),
        ("B", r"\boxed{BE}", False),
        ("EDB", r"\boxed{BDE}", False),  # out of order: a ranking
        ("D", "**Answer: D**", True),
        ("D", "The answer is D) 8.", True),
        ("D", "So option D is correct.", True),
        ("D", "The answer is not D.", False),
    ],
    "powers of ten": [
        ("2500", r"\boxed{2.5e3}", True),
        ("2.5e-7", r"\boxed{2.5 \times 10^{-7}}", True),
        (r"2.5\cdot 10^{-7}", r"\boxed{2.5E-7}", True),
        ("2.5e-7", r"\boxed{2.5 × 10⁻⁷}", True),
        ("2.5e-7", "It is 2.5 × 10^-7 C.", True),
        ("2.5e-7", r"\boxed{2.6e-7}", False),
        ("2.5e-7", r"\boxed{0}", False),
        ("0.0000025", r"\boxed{0.0000026}", False),
        ("1500", r"\boxed{3/2 \times 10^3}", True),
        ("3e-1", r"\boxed{-1 + 3e}", True),  # Euler's number
        ("3 million", r"\boxed{3}", False),
        ("3000000", r"\boxed{\text{3 million people}}", True),
    ],
    "thousands": [
        ("4321", r"\boxed{4{,}321}", True),
        ("4321", r"\boxed{4{\scriptstyle,}321}", True),
        ("4321", r"\boxed{4\,321}", True),
        ("7654321", "\\boxed{7\u202f654\u2009321}", True),
        ("7654321", r"\boxed{7 654 321}", True),
        ("43", r"\boxed{4 3}", False),
        ("4321", r"\boxed{4, 321}", False),
    ],
    "Unicode": [
        ("34", "３４", True),
        ("-3", r"\boxed{−3}", True),
        ("-3", "The answer is −3.", True),
        ("3", "The answer is −3.", False),
        ("45", r"\boxed{45°}", True),
        (r"\frac34", r"\boxed{¾}", True),
        ("2.75", r"\boxed{2¾}", True),
        (r"\sqrt{12}", r"\boxed{2√3}", True),
        ("y^2", r"\boxed{y²}", True),
        ("2y", r"\boxed{y²}", False),
        ("y2", r"\boxed{y²}", False),
        ("(3,4)", r"\boxed{（３，４）}", True),
        (r"(-\infty,3]", r"\boxed{(−∞,3]}", True),
        ("34", "答えは３４です。", True),
    ],
    "units": [
        ("9", r"\boxed{\text{9 pears}}", True),
        ("9", r"\boxed{9 pears}", True),
        ("9", r"\boxed{\text{9 pears or 8}}", False),
        ("9", r"\boxed{9\text{ or more}}", False),
        ("9", r"\boxed{9 xyz}", False),
        ("9", r"\boxed{9 pi}", False),
        ("9", r"\boxed{9 \frac{\text{m}}{\text{s}}}", True),
        ("9 m", r"\boxed{9 cm}", False),
        (r"9\text{ m}", r"\boxed{9\text{ meters}}", True),
        (r"9\text{ km/h}", r"\boxed{9\text{ m/s}}", False),
        ("9", r"\boxed{€9}", True),
        ("9", r"\boxed{USD 9.00}", True),
        (r"\$9", r"\boxed{9\text{ cents}}", False),
        ("0.5", r"\boxed{50 percent}", True),
        ("3:20 pm", r"\boxed{3:20 am}", False),
    ],
    "spelling": [
        ("2.75", r"\boxed{2 3/4}", True),
        ("-2.75", r"\boxed{-2 3/4}", True),
        ("1/6", r"\boxed{0.1\overline{6}}", True),
        ("[3,5)", r"\boxed{3 \le x < 5}", True),
        ("[3,5]", r"\boxed{3 \le x < 5}", False),
        ("4", r"\boxed{**4**}", True),
        ("4", r"\boxed{\underline{4}}", True),
        ("4", r"\framebox{4}", True),
        ("3x-1", r"\boxed{y = 3x-1}", True),
        ("8", r"\boxed{\text{approximately } 8}", True),
        ("8", r"\boxed{about 8}", True),
        ("8", r"\boxed{\text{approximately } 9}", False),
        ("8", r"\boxed{\text{at least } 8}", False),
        ("8", r"\boxed{\text{about 8 or more}}", False),
    ],
    "groups of thousands": [
        ("2,000,000", r"\boxed{2000000}", True),
        ("2,000,000", "#### 2000000", True),
        ("2,000,000", r"\boxed{2 \cdot 10^6}", True),
        ("2,000,000", r"\boxed{2 000 000}", True),
        ("2,000,000", r"\boxed{2{,}000{,}000}", True),
        ("2,000,000", r"\boxed{2 million}", True),
        ("-2,000,000.50", r"\boxed{-2000000.5}", True),
        ("2,000,000 people", r"\boxed{\$2,000,000}", True),
        ("4,567,567", "There are 4567567 of them.", True),
        ("2,000,000", r"\boxed{2,000}", False),
        ("2,000,000", r"\boxed{2, 0}", False),
        ("2000000", r"\boxed{(2,000,000)}", False),
        ("6000", r"\boxed{n = 6,000}", True),
        ("6000", r"\boxed{n = 6,001}", False),
        ("6000", r"\boxed{n = 6, 000}", False),
    ],
    "lists with and, or": [
        ("(5,6),(7,8)", r"\boxed{(5,6)\text{ and }(7,8)}", True),
        ("(5,6),(7,8)", r"\boxed{(7,8) or (5,6)}", True),
        (r"(5,6)\text{ or }(7,8)", r"\boxed{(5,6),(7,8)}", True),
        ("5,5,6", r"\boxed{5, 5 \text{ and } 6}", True),
        ("(5,6),(7,8)", r"\boxed{(5,6)\text{ and }(8,7)}", False),
        ("(5,6),(7,8)", r"\boxed{(5,6)\text{ and }(5,6)}", False),
        ("(5,6)", r"\boxed{(5,6)\text{ and }(7,8)}", False),
        ("(5,6),(7,8)", r"\boxed{((5,6),(7,8))}", False),
        (r"5\text{ and }6", r"\boxed{(5,6)}", False),
        ("5,6", r"\boxed{5, 5 \text{ or } 6}", False),
        ("6", r"\boxed{6,6}", False),
        ("6", r"\boxed{6 \text{ and } 6}", False),
        ("6,6", r"\boxed{6}", False),
        (r"\pm 6", r"\boxed{6, -6}", True),
    ],
    "percents": [
        ("2.5", r"\boxed{2.5\%}", True),
        (r"2.5\%", r"\boxed{2.5}", True),
        ("0.4", r"\boxed{0.4\%}", True),
        ("2.5", "#### 2.5%", True),
        ("2.5%", r"\boxed{2.5\text{ percent}}", True),
        ("0.025", r"\boxed{2.5\%}", True),
        ("2.5", r"\boxed{2.6\%}", False),
        ("2.5", r"\boxed{0.025\%}", False),
        (r"2.5\%", r"\boxed{0.025\%}", False),
        (r"2.5\%", r"\boxed{0.25}", False),
    ],
    "inequalities": [
        ("8", r"\boxed{> 8}", False),
        ("8", r"\boxed{\le 8}", False),
        ("8", r"\boxed{≥ 8}", False),
        ("8", r"\boxed{\neq 8}", False),
        ("> 8", r"\boxed{8}", False),
        ("> 8", r"\boxed{< 8}", False),
        ("8", r"\boxed{8, 8 > 0}", False),
        ("8", r"\boxed{x > 8, x \in \mathbb{R}}", False),
        ("8", r"\boxed{= 8}", True),
        ("x > 8", r"\boxed{> 8}", True),
        ("x > 8", r"\boxed{(8,\infty)}", True),
        ("x > 8", r"\boxed{[8,\infty)}", False),
        (r"\mathbb{R} \setminus \{8\}", r"\boxed{x \ne 8}", True),
    ],
    "two units": [
        ("4 hours 15 minutes", r"\boxed{4\text{ hours }15\text{ minutes}}", True),
        ("4 hours 15 minutes", r"\boxed{\text{4 hrs and 15 min}}", True),
        ("4 hours 15 minutes", r"\boxed{4 hours, 15 minutes}", True),
        (r"6\text{ ft }2\text{ in}", r"\boxed{6 \text{ feet } 2 \text{ inches}}", True),
        ("4 hours 15 minutes", r"\boxed{4\text{ hours }16\text{ minutes}}", False),
        ("4 hours 15 minutes", r"\boxed{4\text{ minutes }15\text{ hours}}", False),
        ("4 hours 15 minutes", r"\boxed{4 hours}", False),
        ("4 hours 15 minutes", r"\boxed{60}", False),
        ("4", r"\boxed{4 hours 15 minutes}", False),
        ("415", r"\boxed{4 km 15 m}", False),
    ],
    "letters of either case": [
        ("c", r"\boxed{C}", True),
        ("C", r"\boxed{c}", True),
        ("(c)", r"\boxed{\text{(C)}}", True),
        ("c", "The answer is (C).", True),
        ("c", r"\boxed{D}", False),
        ("x", r"\boxed{D}", False),
    ],
    "ratios and times": [
        ("5:8", "The ratio is 5:8.", True),
        ("5:8", "The ratio is 5 : 8.", True),
        ("5:8:9", "The ratio is $5:8:9$.", True),
        ("5:8", "The ratio is 8:5.", False),
        ("5:8", "The ratio is 5:8:9.", False),
        ("5:8", "It is 5.", False),
        ("5:8", "The ratio was 5:8; now it is 2.", False),
        ("7:00 PM", r"\boxed{7 PM}", True),
        ("7 PM", r"\boxed{7:00\text{ p.m.}}", True),
        ("7:00 PM", "It ends at 7:00 PM.", True),
        ("7:00 PM", "It ends at 7:00 AM.", False),
        ("7:00 PM", r"\boxed{7 AM}", False),
        ("7:30 PM", r"\boxed{7 PM}", False),
    ],
    "letters of units": [
        ("6", r"\boxed{6 N}", True),
        ("6", r"\boxed{6 kJ}", True),
        ("6 N", r"\boxed{6 J}", False),
        ("6 kJ", r"\boxed{6 J}", False),
        ("6", r"\boxed{6 n}", False),
        ("6", r"\boxed{6N}", False),
        ("$6", r"\boxed{6 cents}", False),
    ],
    "residues": [
        ("4", r"\boxed{4 \pmod 9}", True),
        ("4", r"\boxed{n \equiv 4 \pmod{9}}", True),
        (r"4 \pmod 9", r"\boxed{4}", True),
        ("4", r"\boxed{4 (mod 9)}", True),
        ("9", r"\boxed{4 \pmod 9}", False),
        ("13", r"\boxed{4 \pmod 9}", False),
        (r"4 \pmod 9", r"\boxed{4 \pmod 8}", False),
    ],
}


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        pytest.param(*case, id=f"{kind}-{number}")
        for kind, cases in KINDS.items()
        for number, case in enumerate(cases)
    ],
)
def test_each_kind_of_answer_with_correct_and_incorrect_variants(
    answer: str, completion: str, right: bool, math: MathChecker
) -> None:
    assert math("", completion, answer).correct == right


def test_the_shared_cases_are_judged_correctly(math: MathChecker) -> None:
    path = Path(__file__).parents[4] / "shared/cases/answers.jsonl"
    if not path.exists():
        pytest.skip("no shared cases here")
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(cases) >= 41
    misjudged = [
        case["about"]
        for case in cases
        if math("", case["completion"], case["answer"]).correct != case["correct"]
    ]
    assert misjudged == []


@pytest.mark.parametrize(("answer", "completion"), RIGHT)
def test_equal_answers_are_correct(answer: str, completion: str, math: MathChecker) -> None:
    assert math("", completion, answer).correct


@pytest.mark.parametrize(("answer", "completion"), WRONG)
def test_other_answers_are_incorrect(answer: str, completion: str, math: MathChecker) -> None:
    assert not math("", completion, answer).correct


def test_the_extracted_answer_is_reported(math: MathChecker) -> None:
    assert math("", r"$\boxed{\frac{1}{2}}$ it is", "3").extracted == r"\frac{1}{2}"
    assert math("", "4 and then 5", "3").extracted == "5"
    assert math("", "nothing", "3").extracted is None


def test_an_answer_that_never_finishes_computing_times_out_as_incorrect(math: MathChecker) -> None:
    began = time.monotonic()
    assert not math("", r"\boxed{9^{9^{9^{9}}}}", "5").correct
    assert time.monotonic() - began < 30
    assert math("", r"\boxed{\frac{10}{2}}", "5").correct  # the next answer is checked normally


@pytest.mark.parametrize(
    ("answer", "completion", "correct", "doubt"),
    [
        ("5", r"\boxed{5}", True, None),
        (r"\frac12", r"\boxed{0.5}", True, None),
        ("6", r"\boxed{5}", False, None),
        ("5", "So it is 5.", True, UNMARKED),
        ("6", "So it is 5.", False, UNMARKED),
        (r"a \, b ? c", r"\boxed{ab?c}", False, TEXT_DISAGREES),
        ("0.3333333", r"\boxed{0.33333331}", True, NUMBERS_DISAGREE),
        ("2.50", r"\boxed{2.5}", True, None),
    ],
)
def test_a_doubtful_verdict_is_marked_and_not_changed(
    answer: str, completion: str, correct: bool, doubt: str | None, math: MathChecker
) -> None:
    result = math("", completion, answer)
    assert (result.correct, result.doubt) == (correct, doubt)


def test_a_thought_that_the_prompt_opens_is_a_thought(math: MathChecker) -> None:
    cut_off, closed = r"maybe \boxed{5}", r"maybe \boxed{4} </think> \boxed{5}"
    for prompt in ("user: 2 + 3? <think>", "user: 2 + 3? <thinking>\n"):
        assert not math("", opened_thought(prompt, cut_off), "5").correct
        assert math("", opened_thought(prompt, closed), "5").correct
    assert opened_thought("user: 2 + 3?", cut_off) == cut_off
    assert opened_thought("user: 2 + 3? <think>", f"<think>{cut_off}") == f"<think>{cut_off}"


# Repeated parts for which a regular expression or a scan of the braces may take quadratic or
# exponential time.
LONG = {
    "units": ("\\boxed{5 ", r"\text{a} ", "}"),
    "joined units": ("\\boxed{5", r"\text{a}", "}"),
    "spaces before a unit": ("\\boxed{5", " ", r"\text{a}x}"),
    "open boxes": ("", r"\boxed{", ""),
    "open boxes before an answer": ("", r"\boxed{", r"\boxed{5}"),
    "open boxes after an answer": (r"\boxed{5}", r"\boxed{", ""),
    "braces": ("", "{", "}"),
    "spaces after a number": ("5", " ", "million"),
    "spaces after words": ("The answer is ", " ", "x"),
    "commas after words": ("The answer is x", ", ", "x"),
    "digits": ("\\boxed{", "5", "}"),
    "parentheses": ("\\boxed{", "(", "}"),
    "ratios": ("", "1:", ""),
}


@pytest.mark.parametrize("answer", ["7", "no", "1:2"])
def test_long_hostile_texts_are_judged_within_the_time_limit(answer: str) -> None:
    with closing(MathChecker(seconds=10)) as math:
        math("", "4", "4")  # the start of the process does not count
        for name, (before, part, after) in LONG.items():
            began = time.monotonic()
            text = before + part * (100_000 // len(part)) + after
            assert not math("", text, answer).correct, name
            assert time.monotonic() - began < 4, name


def test_a_unit_of_many_parts_is_split_off_quickly() -> None:
    began = time.monotonic()
    assert split_unit("5 " + r"\text{a} " * 30 + "x") == ("5 " + r"\text{a} " * 30 + "x", [])
    assert time.monotonic() - began < 1


def test_a_text_of_nested_boxes_has_the_innermost_answer() -> None:
    began = time.monotonic()
    assert final_answer(r"\boxed{" * 14_000 + "5" + "}" * 14_000) == "5"
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("given", "right"), [("x" * 400, True), ("x" * 401, False)])
def test_a_long_answer_is_compared_as_text(given: str, right: bool, math: MathChecker) -> None:
    assert math("", rf"\boxed{{{given}}}", "x" * 400).correct == right


def test_answers_are_also_checked_outside_the_main_thread(math: MathChecker) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(math("", r"\boxed{4/2}", "2")))
    thread.start()
    thread.join()
    assert results[0].correct


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
        (r"\boxed{ \boxed{5}\boxed{6} }", r"\boxed{5}\boxed{6}"),
        (r"\boxed{\boxed{5", None),
        (r"\boxed{\boxed{5}", "5"),
        (r"\boxed{\boxed{}}", ""),
        (r"\boxed{5} } \boxed{\}}", r"\}"),
        (r"\boxed{1", None),
        ("18", None),
        ("####", None),
    ],
)
def test_the_marked_answer_is_the_last_complete_box_else_after_the_hashes(
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
