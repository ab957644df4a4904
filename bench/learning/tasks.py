"""Five teachers who err in different ways: the tasks of `python -m redi.bench.learning`.

A task draws problems, lets its teacher attempt them, and judges any trace; every problem and trace
is a string of single-character tokens. The tasks differ in the faults of their incorrect traces:

- habit: an impatient teacher leaves steps blank, which is often lucky. Correct traces have the
  habit too, so imitation keeps it; incorrect ones have more of it. (The quickstart's task.)
- slips: a careful teacher miscalculates at random. Incorrect traces have no common pattern to
  avoid, and most of their tokens are right.
- pits: a walker falls into a pit, which ends its trace: incorrect traces are shorter, and end where
  a correct trace never does.
- choice: a guesser writes one of two letters at each step, and is correct with three of six right.
  Both kinds of trace have the same letters equally often, so no habit can be counted: a letter is
  wrong by its place alone.
- late: a careful teacher writes nine boxes and often errs in the last one. Correct and incorrect
  traces of a problem share all tokens but one or two.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from redi.engine.quickstart import task as quickstart
from redi.engine.quickstart.task import Attempt


@dataclass(frozen=True)
class Task:
    """A kind of problem, a teacher, and how traces are judged."""

    name: str
    title: str
    """For tables and pictures."""
    characters: str
    """The characters of problems and traces."""
    draw_problem: Callable[[random.Random], str]
    attempt: Callable[[str, random.Random], Attempt]
    """One trace of the teacher."""
    answer: Callable[[str], str]
    """The end of a correct trace."""
    is_correct: Callable[[str, str], bool]
    """(problem, trace) -> whether it solves the problem."""
    is_well_formed: Callable[[str, str], bool]
    """(problem, trace) -> True if it has the form of a trace, right or wrong."""
    fault: str
    """The teacher's fault, as `fault_share` counts it."""
    fault_share: Callable[[str, str], float]
    """(problem, trace) -> share of the fault in a trace, from 0 to 1."""
    longest_trace: int
    """In characters."""
    stage_1_steps: int
    """Few enough that the student can still learn in stage 2."""


# Habit: see quickstart.py for the rule and the teacher.


def _blank_share(problem: str, trace: str) -> float:
    """Of the five boxes that may be left blank."""
    return trace[: quickstart.DIGITS - 2].count(quickstart.BLANK) / (quickstart.DIGITS - 2)


HABIT = Task(
    name="habit",
    title="Habit: an impatient teacher",
    characters="0123456789=" + quickstart.BLANK,
    draw_problem=quickstart.draw_problem,
    attempt=quickstart.attempt,
    answer=quickstart.answer,
    is_correct=quickstart.is_correct,
    is_well_formed=lambda problem, trace: re.fullmatch(r"[0-9*]{5}[0-9]", trace) is not None,
    fault="boxes left blank",
    fault_share=_blank_share,
    longest_trace=quickstart.DIGITS - 1,
    stage_1_steps=1000,
)


# Slips: the same problems with another teacher, so that only the kind of error differs.

SLIP_PROBABILITY = 0.1
"""Of each box."""


def attempt_carefully(problem: str, rng: random.Random) -> Attempt:
    """All six running values; a random one may be wrong, and later ones follow from it."""
    value, boxes = int(problem[0]), ""
    for digit in problem[1 : quickstart.DIGITS]:
        value = abs(value - int(digit))
        if rng.random() < SLIP_PROBABILITY:
            value = rng.choice([wrong for wrong in range(10) if wrong != value])
        boxes += str(value)
    return Attempt(boxes, quickstart.is_correct(problem, boxes))


def slip_share(problem: str, trace: str) -> float:
    """Share of the six boxes that do not follow from the one before; missing ones count too."""
    followed = 0
    for before, digit, box in zip(problem[0] + trace, problem[1:-1], trace, strict=False):
        if (before + box).isdecimal():
            followed += abs(int(before) - int(digit)) == int(box)
    return 1 - followed / (quickstart.DIGITS - 1)


SLIPS = Task(
    name="slips",
    title="Slips: a teacher who miscalculates",
    characters="0123456789=",
    draw_problem=quickstart.draw_problem,
    attempt=attempt_carefully,
    answer=quickstart.answer,
    is_correct=quickstart.is_correct,
    is_well_formed=lambda problem, trace: re.fullmatch(r"[0-9]{6}", trace) is not None,
    fault="boxes that do not follow",
    fault_share=slip_share,
    longest_trace=quickstart.DIGITS - 1,
    stage_1_steps=250,
)


# Pits: a walk over the cells a .. p of a 4 x 4 grid. "ap:cfhk=" is from a to p, pits c, f, h, k.

WIDTH = 4
CELLS = "abcdefghijklmnop"
PITS = 4
SHORTEST_WALK = 3
STRAY_PROBABILITY = 0.35
"""Of a move that is drawn from all neighbours, pits among them."""
LONGEST_WALK = 10


@lru_cache(maxsize=len(CELLS))
def neighbours(cell: str) -> str:
    """The cells that share a side with this one."""
    row, column = divmod(CELLS.index(cell), WIDTH)
    near = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return "".join(CELLS[r * WIDTH + c] for r, c in near if 0 <= r < WIDTH and 0 <= c < WIDTH)


@lru_cache(maxsize=1)
def distances(problem: str) -> dict[str, int]:
    """Moves from each cell to the goal without a pit, by breadth-first search; pits have none."""
    goal, pits = problem[1], problem[3 : 3 + PITS]
    found, queue = {goal: 0}, deque(goal)
    while queue:
        cell = queue.popleft()
        for near in neighbours(cell):
            if near not in pits and near not in found:
                found[near] = found[cell] + 1
                queue.append(near)
    return found


def draw_grid(rng: random.Random) -> str:
    """Start, goal and pits, with a path of at least three moves."""
    while True:
        start, goal, *pits = rng.sample(CELLS, 2 + PITS)
        problem = f"{start}{goal}:{''.join(sorted(pits))}="
        if distances(problem).get(start, 0) >= SHORTEST_WALK:
            return problem


def attempt_walk(problem: str, rng: random.Random) -> Attempt:
    """A walk along shortest paths, with random moves, to the goal, a pit or the limit."""
    cell, goal, pits, walk = problem[0], problem[1], problem[3 : 3 + PITS], ""
    to_go = distances(problem)
    while cell != goal and cell not in pits and len(walk) < LONGEST_WALK:
        options = neighbours(cell)
        if rng.random() >= STRAY_PROBABILITY:
            options = "".join(c for c in options if to_go.get(c) == to_go[cell] - 1)
        cell = rng.choice(options)
        walk += cell
    return Attempt(walk, is_correct_walk(problem, walk))


def is_walk(problem: str, trace: str) -> bool:
    """True if there is a move, each goes to a neighbour, and none leaves a pit or the goal."""
    if not trace or not set(trace) <= set(CELLS):
        return False
    ends = problem[1] + problem[3 : 3 + PITS]
    return all(
        after in neighbours(cell) and cell not in ends
        for cell, after in pairwise(problem[0] + trace)
    )


def is_correct_walk(problem: str, trace: str) -> bool:
    """True if it is a walk that ends at the goal."""
    return is_walk(problem, trace) and trace[-1] == problem[1]


PITFALLS = Task(
    name="pits",
    title="Pits: failures that end the trace",
    characters=CELLS + ":=",
    draw_problem=draw_grid,
    attempt=attempt_walk,
    answer=lambda problem: problem[1],
    is_correct=is_correct_walk,
    is_well_formed=is_walk,
    fault="walks that enter a pit",
    fault_share=lambda problem, trace: float(not set(trace).isdisjoint(problem[3 : 3 + PITS])),
    longest_trace=LONGEST_WALK,
    stage_1_steps=200,
)


# Choice: for each of six digits, whether it is at least 5 ("u") or not ("d").

CHOICES = "du"
RIGHT_PROBABILITY = 0.35
"""Of each letter."""
NEEDED = 3
"""Right letters of a correct trace, of six."""


def right_choices(problem: str) -> str:
    """The right letter of each of the six steps."""
    return "".join(CHOICES[int(digit) >= 5] for digit in problem[1:-1])


def choice_share(problem: str, trace: str) -> float:
    """Share of the six letters that are wrong; missing ones count too."""
    wanted = right_choices(problem)
    right = sum(one == other for one, other in zip(wanted, trace, strict=False))
    return 1 - right / len(wanted)


def is_choice(problem: str, trace: str) -> bool:
    """True if it is six letters."""
    return len(trace) == quickstart.DIGITS - 1 and set(trace) <= set(CHOICES)


def is_right_choice(problem: str, trace: str) -> bool:
    """True if it is six letters of which enough are right."""
    wanted = right_choices(problem)
    right = sum(one == other for one, other in zip(wanted, trace, strict=False))
    return is_choice(problem, trace) and right >= NEEDED


def attempt_guess(problem: str, rng: random.Random) -> Attempt:
    """Six letters, most of them wrong."""
    trace = "".join(
        right if rng.random() < RIGHT_PROBABILITY else CHOICES[1 - CHOICES.index(right)]
        for right in right_choices(problem)
    )
    return Attempt(trace, is_right_choice(problem, trace))


CHOICE = Task(
    name="choice",
    title="Choice: a teacher who guesses",
    characters="0123456789=" + CHOICES,
    draw_problem=quickstart.draw_problem,
    attempt=attempt_guess,
    answer=lambda problem: "",
    is_correct=is_right_choice,
    is_well_formed=is_choice,
    fault="wrong letters",
    fault_share=choice_share,
    longest_trace=quickstart.DIGITS - 1,
    stage_1_steps=500,
)


# Late: the quickstart's rule over ten digits, all boxes written, the last one often wrong.

LATE_DIGITS = 10
EARLY_SLIP, LATE_SLIP = 0.01, 0.5
"""Probabilities of a wrong box before the last one, and of a wrong last box."""


def draw_long_problem(rng: random.Random) -> str:
    """Draw a problem of ten digits."""
    return "".join(rng.choice("0123456789") for _ in range(LATE_DIGITS)) + "="


def last_value(problem: str) -> str:
    """The value after the last digit."""
    value = int(problem[0])
    for digit in problem[1:-1]:
        value = abs(value - int(digit))
    return str(value)


def is_late_correct(problem: str, trace: str) -> bool:
    """True if it has nine boxes of which the last is correct."""
    return len(trace) == LATE_DIGITS - 1 and trace[-1] == last_value(problem)


def attempt_until_late(problem: str, rng: random.Random) -> Attempt:
    """All nine running values; a random one may be wrong, most often the last."""
    value, boxes = int(problem[0]), ""
    for place, digit in enumerate(problem[1:-1]):
        value = abs(value - int(digit))
        if rng.random() < (LATE_SLIP if place == LATE_DIGITS - 2 else EARLY_SLIP):
            value = rng.choice([wrong for wrong in range(10) if wrong != value])
        boxes += str(value)
    return Attempt(boxes, is_late_correct(problem, boxes))


def late_share(problem: str, trace: str) -> float:
    """1 if the last box does not follow from the one before or is missing, else 0."""
    before, last = trace[-2:-1], trace[-1:]
    if len(trace) != LATE_DIGITS - 1 or not (before + last).isdecimal():
        return 1.0
    return float(abs(int(before) - int(problem[-2])) != int(last))


LATE = Task(
    name="late",
    title="Late: an error at the end",
    characters="0123456789=",
    draw_problem=draw_long_problem,
    attempt=attempt_until_late,
    answer=last_value,
    is_correct=is_late_correct,
    is_well_formed=lambda problem, trace: re.fullmatch(r"[0-9]{9}", trace) is not None,
    fault="last boxes that do not follow",
    fault_share=late_share,
    longest_trace=LATE_DIGITS - 1,
    stage_1_steps=220,
)

TASKS = {task.name: task for task in (HABIT, SLIPS, PITFALLS, CHOICE, LATE)}
