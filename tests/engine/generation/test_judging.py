"""Answers checked in several processes: the results of one, in any order, within time limits."""

import gzip
import json
import random
import time
from contextlib import closing

import pytest
from data_cases import shared_data

from redi.engine.generation.checkers import NOT_JUDGED, CheckResult, MathChecker
from redi.engine.generation.judging import open_judges

HANGING = r"\boxed{9^{9^{9^{9}}}}"


def judged(
    questions: list[tuple[str, str]], count: int, seconds: float, seed: int = 0
) -> list[CheckResult]:
    """Results of (completion, answer), which are checked in another order."""
    order = list(range(len(questions)))
    random.Random(seed).shuffle(order)
    with open_judges("math", None, count, seconds) as judge:
        results = {index: judge("", *questions[index]) for index in order}
    return [results[index].result() for index in range(len(questions))]


QUESTIONS = [(rf"\boxed{{{n} + 1}}", str(n + n % 2)) for n in range(40)]


def test_several_judges_check_each_answer_in_any_order() -> None:
    expected = [CheckResult(f"{n} + 1", bool(n % 2)) for n in range(40)]
    assert judged(QUESTIONS, count=2, seconds=5) == expected


@pytest.mark.slow
def test_a_hanging_answer_costs_its_process_only_and_is_reported() -> None:
    hanging = [*QUESTIONS[:20], (HANGING, "5"), *QUESTIONS[20:]]
    found = judged(hanging, count=2, seconds=3)
    assert found.pop(20) == CheckResult("9^{9^{9^{9}}}", False, NOT_JUDGED)
    assert found == judged(QUESTIONS, count=1, seconds=3)


@pytest.mark.slow
def test_real_traces_get_the_verdicts_of_one_checker_quickly() -> None:
    with gzip.open(shared_data() / "long_cot_gsm8k.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    questions = [(trace["text"], row["answer"]) for row in rows for trace in row["traces"]]
    with closing(MathChecker()) as math:
        alone = [math("", *question) for question in questions]
    began = time.monotonic()
    assert judged(questions, count=2, seconds=5, seed=1) == alone
    rate = len(questions) / (time.monotonic() - began)
    print(f"{rate:,.0f} samples/s by two judges, {len(questions)} texts")
    assert rate > 24_000 / (10 * 60)  # the paper's evaluation within ten minutes
