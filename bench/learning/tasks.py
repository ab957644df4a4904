"""Three teachers who err in different ways: the tasks of `python -m redi.bench.learning`.

A task draws problems, lets its teacher attempt them, and judges any trace; every problem and trace
is a string of single-character tokens. What sets the tasks apart is what an incorrect trace says:

- habit: an impatient teacher leaves steps blank, which is often lucky. Correct traces have the
  habit too, so imitation keeps it; incorrect ones have more of it. (The quickstart's task.)
- slips: a careful teacher miscalculates at random. Incorrect traces show no rule to avoid, and
  most of their tokens are right.
- pits: a walker falls into a pit, and there its trace ends: incorrect traces are shorter, and end
  where a correct trace never does.
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
    """What problems and traces are made of."""
    draw_problem: Callable[[random.Random], str]
    attempt: Callable[[str, random.Random], Attempt]
    """One trace of the teacher."""
    answer: Callable[[str], str]
    """What a correct trace ends in."""
    is_correct: Callable[[str, str], bool]
    """(problem, trace) -> whether it solves the problem."""
    is_well_formed: Callable[[str, str], bool]
    """(problem, trace) -> whether it looks like a trace, right or wrong."""
    fault: str
    """What the teacher does wrong, as `fault_share` counts it."""
    fault_share: Callable[[str, str], float]
    """(problem, trace) -> how much of the fault a trace has, from 0 to 1."""
    longest_trace: int
    """In characters."""
    stage_1_steps: int
    """Few enough that the student has something left to learn."""


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


# Slips: the same problems, another teacher, so that nothing but the kind of error differs.

SLIP_PROBABILITY = 0.1
"""Of each box."""


def attempt_carefully(problem: str, rng: random.Random) -> Attempt:
    """All six running values; now and then one is wrong, and later ones go on from it."""
    value, boxes = int(problem[0]), ""
    for digit in problem[1 : quickstart.DIGITS]:
        value = abs(value - int(digit))
        if rng.random() < SLIP_PROBABILITY:
            value = rng.choice([wrong for wrong in range(10) if wrong != value])
        boxes += str(value)
    return Attempt(boxes, quickstart.is_correct(problem, boxes))


def slip_share(problem: str, trace: str) -> float:
    """Boxes that do not follow from the one before, of six; a missing one counts too."""
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
    beside = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return "".join(CELLS[r * WIDTH + c] for r, c in beside if 0 <= r < WIDTH and 0 <= c < WIDTH)


@lru_cache(maxsize=1)
def distances(problem: str) -> dict[str, int]:
    """Moves from each cell to the goal without a pit, by breadth-first search; pits have none."""
    goal, pits = problem[1], problem[3 : 3 + PITS]
    found, queue = {goal: 0}, deque(goal)
    while queue:
        cell = queue.popleft()
        for beside in neighbours(cell):
            if beside not in pits and beside not in found:
                found[beside] = found[cell] + 1
                queue.append(beside)
    return found


def draw_grid(rng: random.Random) -> str:
    """Start, goal and pits, with a way of at least three moves."""
    while True:
        start, goal, *pits = rng.sample(CELLS, 2 + PITS)
        problem = f"{start}{goal}:{''.join(sorted(pits))}="
        if distances(problem).get(start, 0) >= SHORTEST_WALK:
            return problem


def attempt_walk(problem: str, rng: random.Random) -> Attempt:
    """A walk along shortest ways, with stray moves, to the goal, a pit or the limit."""
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
    """Whether every move goes to a neighbour, there is one, and none leaves a pit or the goal."""
    if not trace or not set(trace) <= set(CELLS):
        return False
    ends = problem[1] + problem[3 : 3 + PITS]
    return all(
        after in neighbours(cell) and cell not in ends
        for cell, after in pairwise(problem[0] + trace)
    )


def is_correct_walk(problem: str, trace: str) -> bool:
    """Whether it is a walk that ends at the goal."""
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

TASKS = {task.name: task for task in (HABIT, SLIPS, PITFALLS)}
