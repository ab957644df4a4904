"""The closer look at a set, against rows whose properties are known."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import make_tokens, save_tokenizer, settings, write_rows

from redi.engine.console import Console
from redi.engine.data.schedule import select
from redi.engine.data.summary_by_source import (
    ORIGIN_COLUMNS,
    origin_rows,
    share_rows,
    summarize_by_source,
)
from redi.engine.data.tokens import TokenizedTraces, tokenize
from redi.engine.errors import InputError

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
        found = summarize_by_source(tokens, select(tokens, objective_needs="pairs", **LIMITS), 100)
        assert found.overlap == pytest.approx(expected)


def graded(prompt: str, *traces: tuple[str | None, bool, str], **columns: Any) -> dict[str, Any]:
    """A problem with a trace for each (teacher, verdict, text)."""
    keys = ("teacher", "correct", "text")
    named = [dict(zip(keys, trace, strict=True)) for trace in traces]
    return {"prompt": prompt, "traces": named, **columns}


def tokenized(folder: Path, *files: list[dict[str, Any]]) -> TokenizedTraces:
    """Files a.jsonl, b.jsonl, ... of rows, by characters."""
    paths = [
        write_rows(folder / f"{name}.jsonl", rows) for name, rows in zip("abc", files, strict=False)
    ]
    wanted = settings(paths, save_tokenizer(folder / "tokenizer"))
    return tokenize(wanted, folder / "cache", processes=1, console=Console(active=False))


def test_traces_are_counted_by_teacher_source_and_file(tmp_path: Path) -> None:
    first = [
        graded(
            "1", ("r1", True, "x" * 9), ("r1", True, "x" * 9), ("qwq", False, "y"), source="aops"
        ),
        graded("2", ("r1", False, "z" * 90), source="aops"),
        graded("3", ("qwq", True, "z"), ("r1", False, "z"), source=["not", "text"]),
    ]
    tokens = tokenized(tmp_path, first, [{"prompt": "4", "completion": "yes", "source": "own"}])
    found = summarize_by_source(tokens, select(tokens, objective_needs="pairs", **LIMITS), 100)
    rows = [dict(zip(ORIGIN_COLUMNS[8:], row[8:], strict=True)) for row in origin_rows(found)]
    assert [(*row[:3], row[5]) for row in origin_rows(found)] == [
        ("teacher", "r1", "2", "2"),
        ("teacher", "qwq", "1", "1"),
        ("teacher", "none", "1", "0"),
        ("source", "aops", "2", "2"),
        ("source", "none", "1", "1"),
        ("source", "own", "1", "0"),
        ("file", "a.jsonl", "3", "3"),
        ("file", "b.jsonl", "1", "0"),
    ]
    assert [row["used"] for row in rows] == ["2", "2", "0", "2", "2", "0", "4", "0"]
    assert [row["too long"] for row in rows] == ["1", "0", "0", "1", "0", "0", "1", "0"]
    assert [row["repeated"] for row in rows] == ["1", "0", "0", "1", "0", "0", "1", "0"]
    assert [one.identical_pairs for one in found.origins] == [0, 1, 0, 0, 1, 0, 1, 0]
    completions = (tokens.lengths - tokens.prompt_lengths).tolist()
    r1, qwq = found.origins[:2]
    assert (r1.negative.longest, qwq.negative.longest) == (completions[3], completions[2])


def test_of_many_origins_the_largest_are_named_and_the_others_summed_up(tmp_path: Path) -> None:
    rows = [graded(f"{n}", *[(f"t{n}", True, f"{i}") for i in range(1 + n % 2)]) for n in range(50)]
    tokens = tokenized(tmp_path, rows)
    found = summarize_by_source(tokens, select(tokens, objective_needs="positives", **LIMITS), 100)
    *named, others = [one for one in found.origins if one.kind == "teacher"]
    assert [one.name for one in named] == [f"t{n}" for n in range(1, 40, 2)]  # two traces each
    assert (others.name, others.positive.count) == ("30 others", 75 - 40)


def test_teachers_are_chosen_and_weighted_whatever_the_rows_shape(tmp_path: Path) -> None:
    tokens = tokenized(
        tmp_path,
        [graded("1", ("r1", True, "a"), ("qwq", False, "b"), (None, True, "c"))],
        [{"prompt": "2", "chosen": "d", "rejected": "e", "teacher": "qwq", "weight": 3}],
        [{"prompt": "3", "completion": "f", "teacher": "r1"}],
    )
    assert tokens.of_teachers([], {}) is tokens
    weighted = tokens.of_teachers([], {"qwq": 0.5})
    assert weighted.weights.tolist() == [1, 0.5, 1, 1.5, 1.5, 1]
    assert weighted.key == tokens.key
    chosen = pickle.loads(pickle.dumps(tokens.of_teachers(["qwq"], {"qwq": 2})))
    assert [chosen.where(i).rpartition("/")[2] for i in range(len(chosen))] == [
        "a.jsonl:1",
        "b.jsonl:1",
        "b.jsonl:1",
    ]
    for i, whole in enumerate((1, 3, 4)):
        assert np.array_equal(chosen.ids(i), tokens.ids(whole))
        assert chosen.teacher(i) == "qwq"
    assert chosen.signs.tolist() == [-1, 1, -1]
    assert chosen.weights.tolist() == [2, 6, 6]
    assert chosen.dropped == {"of other teachers": 3}
    assert chosen.key != tokens.key
    units = select(chosen, objective_needs="pairs", **LIMITS)
    assert units.units.tolist() == [[1, 2]]
    with pytest.raises(InputError, match="teacher 'r2' is not in the data; it has: r1, qwq"):
        tokens.of_teachers([], {"r2": 2.0})


def test_shares_over_the_limit_are_of_all_traces_of_a_sign(tmp_path: Path) -> None:
    signs, groups = [1, -1, 1, 1, 1], [0, 0, 1, 2, 3]
    tokens = make_tokens(tmp_path / "m", [5] * 5, [95, 96, 96, 10, 10], signs, groups)
    found = summarize_by_source(tokens, select(tokens, objective_needs="positives", **LIMITS), 100)
    assert found.over_limit == {"positive": 0.25, "negative": 1.0}
    assert found.overlap is None
    assert dict(share_rows(found)) == {
        "positives over 100 tokens": "25.0%",
        "negatives over 100 tokens": "100.0%",
    }
