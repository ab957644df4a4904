"""Checks answers in several worker processes at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from redi.engine.generation.checkers import Checker, CheckResult, open_checker

MOST_JUDGES = 8

Judge = Callable[[str, str, str], Future[CheckResult]]
"""(prompt, completion, correct answer) -> result, as soon as a checker is free."""


@contextmanager
def open_judges(
    name: str, pattern: str | None = None, count: int | None = None, seconds: float = 5.0
) -> Iterator[Judge]:
    """Open `count` checkers, each in a thread; the checker "math" compares in a process of its own.

    The results are those of one checker, in any order. An answer that takes too long ends only the
    process that compares it. A checker is opened when there is work for it. On exit, submitted
    checks are finished first.

    Args:
        name, pattern, seconds: as for `open_checker`.
        count: default: half the CPUs, at most MOST_JUDGES.
    """
    opened = threading.local()
    with ExitStack() as checkers:

        def start() -> None:
            opened.check = checkers.enter_context(open_checker(name, pattern, seconds))

        def check(prompt: str, completion: str, answer: str) -> CheckResult:
            checker: Checker = opened.check
            return checker(prompt, completion, answer)

        count = count or min(MOST_JUDGES, -(-(os.cpu_count() or 1) // 2))
        with ThreadPoolExecutor(count, "judge", initializer=start) as pool:
            yield lambda prompt, completion, answer: pool.submit(check, prompt, completion, answer)
