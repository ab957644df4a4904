"""Rows of the shape `traces` are read back as they were written, from both formats."""

import json
from pathlib import Path
from typing import Any

import pytest

from redi.engine.data.rows import read_rows
from redi.engine.data.traces import Trace, normalise
from redi.engine.data.write_rows import check_target, prompt_value, row_writer
from redi.engine.errors import InputError

CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "", "reasoning_content": "a tool", "tool_calls": CALL},
    {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"},
    {"role": "user", "content": "and 3 + 4? é☃"},
]
TRACES = [
    {"text": "7", "correct": True, "teacher": "r1", "reasoning_content": "3 + 4", "weight": 0.5},
    {"text": "1 2", "correct": True, "spans": [[0, 1, 0.5], [2, 3, -1.0]]},
    {"text": "8\n", "correct": False, "finished": False},
]


def read(path: Path) -> list[Trace]:
    return [trace for row in read_rows([str(path)], "auto") for trace in normalise(row)]


@pytest.mark.parametrize(
    "prompts", [["2*3?", "1+1?"], ["2*3?", CONVERSATION]], ids=["text", "mixed"]
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_is_read_back_as_it_was_written(
    prompts: list[Any], suffix: str, tmp_path: Path
) -> None:
    given = tmp_path / "given.jsonl"
    tools = [{"type": "function", "function": {"name": "add", "description": "é"}}]
    rows: list[dict[str, Any]] = [{"id": "7", "prompt": one, "traces": TRACES} for one in prompts]
    rows[1] |= {"tools": tools, "source": "math"}
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    traces = read(given)
    target = tmp_path / f"written.{suffix}"
    with row_writer(target) as write:
        for row, trace in zip(rows, traces[::3], strict=True):
            write({**row, "prompt": prompt_value(trace.prompt)})
        assert not target.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.jsonl", target.name]
    again = read(target)
    assert len(again) == 6
    for one, expected in zip(again, traces, strict=True):
        # Columns of a Parquet file have one type: a text there becomes a message of the user.
        if suffix == "parquet" and not isinstance(prompts[1], str):
            assert all(not isinstance(one.prompt, str) for one in again)
        else:
            assert one.prompt == expected.prompt
        for name in ("completion", "thought", "sign", "weight", "teacher", "finished", "spans"):
            assert getattr(one, name) == getattr(expected, name), name
        assert (one.tools, one.origin) == (expected.tools, expected.origin)
        assert one.group.startswith("7|")


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "rows.parquet"
    target.write_text("old")
    with pytest.raises(KeyError), row_writer(target) as write:
        write({"no prompt": "1"})
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("rows.csv", "must end in .jsonl or .parquet"),
        ("none/rows.jsonl", "is not a directory"),
        ("", "is a directory; name a file in it"),
    ],
)
def test_a_target_that_cannot_be_written_is_named(name: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=fault):
        check_target(str(tmp_path / name), "out")
