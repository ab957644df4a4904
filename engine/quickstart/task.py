"""The quickstart's synthetic task: problems, an impatient teacher, a tokenizer and a small model.

A problem is seven digits; the rule is t <- |t - d| from left to right, starting from the first
digit. A trace has six boxes with the running values; the last one is the answer. The teacher leaves
each of the first five boxes blank with probability 1/2. The more consecutive blanks precede a box,
the more probably its value is wrong, and later boxes continue from the wrong value. So skipping is
a lucky habit: correct traces have it too, and imitation keeps it.

`make train` runs everything: `python -m redi.engine.quickstart make DIR` writes traces (ordinary
JSONL), a tokenizer with a chat template and a small Qwen2; the recipes quickstart-sft, -control,
-redi and -sft-simper train on them; `python -m redi.engine.quickstart report DIR` measures the
results.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DIGITS = 7
BLANK = "*"
END = "<|endoftext|>"  # transformers adds this token to every Qwen2 tokenizer
BLANK_PROBABILITY = 0.5
# Probability of a wrong box after 0, 1, ..., 5 consecutive blanks.
ERROR_PROBABILITY = (0.01, 0.3, 0.5, 0.6, 0.7, 0.75)
TRACES_PER_PROBLEM = 8
CORRECT_KEPT = 2


@dataclass(frozen=True)
class Attempt:
    """A trace and whether it is correct."""

    text: str
    correct: bool


def solve(problem: str) -> str:
    """The six running values of a problem such as "2914177=", without blanks or errors."""
    value, boxes = int(problem[0]), []
    for digit in problem[1:DIGITS]:
        value = abs(value - int(digit))
        boxes.append(str(value))
    return "".join(boxes)


def is_correct(problem: str, trace: str) -> bool:
    """Whether a trace has six boxes of which the last is correct."""
    return len(trace) == DIGITS - 1 and trace[-1] == solve(problem)[-1]


def attempt(problem: str, rng: random.Random) -> Attempt:
    """Draw a trace of the impatient teacher."""
    value, blanks, boxes = int(problem[0]), 0, []
    for place, digit in enumerate(problem[1:DIGITS]):
        value = abs(value - int(digit))
        last = place == DIGITS - 2
        if not last and rng.random() < BLANK_PROBABILITY:
            boxes.append(BLANK)
            blanks += 1
            continue
        if rng.random() < ERROR_PROBABILITY[blanks]:
            value = rng.choice([wrong for wrong in range(10) if wrong != value])
        boxes.append(str(value))
        blanks = 0
    text = "".join(boxes)
    return Attempt(text, is_correct(problem, text))


def answer(problem: str) -> str:
    """Answer of a problem: the last box of a correct trace."""
    return solve(problem)[-1]


def draw_problem(rng: random.Random) -> str:
    """Draw a problem of seven digits, such as "2914177="."""
    return "".join(rng.choice("0123456789") for _ in range(DIGITS)) + "="


def make_problems(
    count: int, rng: random.Random, draw: Callable[[random.Random], str] = draw_problem
) -> list[str]:
    """Draw `count` distinct problems, in the order drawn."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw(rng)] = None
    return list(drawn)


def write_traces(
    path: Path,
    problems: list[str],
    rng: random.Random,
    attempt: Callable[[str, random.Random], Attempt] = attempt,
    answer: Callable[[str], str] = answer,
    teacher: str = "impatient",
) -> None:
    """Write distinct attempts at each problem as JSON Lines in the format "traces".

    Args:
        path: JSONL file to write.
        problems: problems, one row each.
        rng: source of randomness.
        attempt: a teacher; draws one trace of a problem.
        answer: returns the answer of a problem.
        teacher: name of the teacher.
    """
    with path.open("w", encoding="utf-8") as file:
        for number, problem in enumerate(problems):
            drawn = (attempt(problem, rng) for _ in range(TRACES_PER_PROBLEM))
            attempts = {each.text: each for each in drawn}
            correct = [a for a in attempts.values() if a.correct][:CORRECT_KEPT]
            incorrect = [a for a in attempts.values() if not a.correct]
            row = {
                "id": str(number),
                "prompt": problem,
                "answer": answer(problem),
                "traces": [
                    {"teacher": teacher, "text": a.text, "correct": a.correct}
                    for a in correct + incorrect
                ],
            }
            file.write(json.dumps(row) + "\n")


def write_model(
    folder: Path,
    seed: int,
    characters: str = "0123456789=" + BLANK,
    hidden_size: int = 96,
    layers: int = 3,
) -> int:
    """Write a tokenizer of single characters with a chat template, and a small random Qwen2.

    Returns:
        Number of parameters.
    """
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, logging

    logging.disable_progress_bar()
    vocabulary = {token: number for number, token in enumerate([*characters, END])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    base.pre_tokenizer = pre_tokenizers.Split(Regex(re.escape(END) + "|."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make(folder: Path, problems: int = 8000, held_out: int = 500, seed: int = 0) -> None:
    """Write train.jsonl, test.jsonl and model/ into a directory; deterministic for a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    drawn = make_problems(problems + held_out, rng)
    write_traces(folder / "train.jsonl", drawn[held_out:], rng)
    write_traces(folder / "test.jsonl", drawn[:held_out], rng)
    parameters = write_model(folder / "model", seed)
    print(f"model: {parameters:,} parameters", file=sys.stderr)


def explain() -> str:
    """Description of the task, with one problem and three of the teacher's attempts at it."""
    problem, rng = "2914177=", random.Random(0)
    attempts = [attempt(problem, rng) for _ in range(200)]
    skipped = [a for a in attempts if a.text.count(BLANK) == 2]
    shown = {
        "correct": solve(problem),
        "lucky: two steps left blank, and still right": next(a.text for a in skipped if a.correct),
        "unlucky: two steps left blank, and wrong": next(a.text for a in skipped if not a.correct),
    }
    lines = [
        "The task: go through seven digits by t <- |t - d|, write each t; the last is the answer.",
        "The teacher is impatient: it leaves steps blank (*), and errs more often after blanks.",
        *(f"  {problem}{text}   {what}" for what, text in shown.items()),
    ]
    return "\n".join(lines)
