"""The closer look at a set, against rows whose properties are known."""

from pathlib import Path
from typing import Any

import pytest
from data_cases import make_tokens, save_tokenizer, settings, write_rows

from redi.engine.console import Console
from redi.engine.data.breakdown import break_down, origin_rows, share_rows
from redi.engine.data.schedule import select
from redi.engine.data.tokens import tokenize

LIMITS: dict[str, Any] = {"max_tokens": 100, "row_tokens": 200, "overlong": "truncate"}


def test_overlap_is_the_shared_part_of_a_pairs_token_frequencies(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "abcd", "rejected": "dcba"},  # the same letters: all but nothing
        {"prompt": "r", "chosen": "xxx", "rejected": "xyz"},  # one of three and the end: 2 of 4
    ]
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=None)
    for number, (row, expected) in enumerate(zip(rows, (1.0, 0.5), strict=True)):
        path = write_rows(tmp_path / f"{number}.jsonl", [row])
        wanted = settings(path, tokenizer, template="none")
        tokens = tokenize(wanted, tmp_path / "cache", processes=1, console=Console(active=False))
        found = break_down(tokens, select(tokens, objective_needs="pairs", **LIMITS), 100)
        assert found.overlap == pytest.approx(expected)


def test_traces_are_counted_by_teacher_and_by_file(tmp_path: Path) -> None:
    def row(prompt: str, **graded: bool) -> dict[str, Any]:
        traces = [
            {"text": "x" * (1 + i), "correct": correct, "teacher": name}
            for i, (name, correct) in enumerate(graded.items())
        ]
        return {"prompt": prompt, "traces": traces}

    write_rows(tmp_path / "a.jsonl", [row("1", r1=True, qwq=False), row("2", r1=False)])
    write_rows(tmp_path / "b.jsonl", [{"prompt": "3", "completion": "yes"}])
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    wanted = settings([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tokenizer)
    tokens = tokenize(wanted, tmp_path / "cache", processes=1, console=Console(active=False))
    found = break_down(tokens, select(tokens, objective_needs="pairs", **LIMITS), 100)
    assert [row[:5] for row in origin_rows(found)] == [
        ("teacher", "r1", "1", "1", "1"),
        ("teacher", "qwq", "0", "1", "1"),
        ("teacher", "none", "1", "0", "0"),
        ("file", "a.jsonl", "1", "2", "2"),
        ("file", "b.jsonl", "1", "0", "0"),
    ]


def test_shares_over_the_limit_are_of_all_traces_of_a_sign(tmp_path: Path) -> None:
    signs, groups = [1, -1, 1, 1, 1], [0, 0, 1, 2, 3]
    tokens = make_tokens(tmp_path / "m", [5] * 5, [95, 96, 96, 10, 10], signs, groups)
    found = break_down(tokens, select(tokens, objective_needs="positives", **LIMITS), 100)
    assert found.over_limit == {"positive": 0.25, "negative": 1.0}
    assert found.overlap is None
    assert dict(share_rows(found)) == {
        "positives over 100 tokens": "25.0%",
        "negatives over 100 tokens": "100.0%",
    }
