"""Writes rows of the shape `traces`, as JSON Lines or Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from redi.engine.data.messages import Message
from redi.engine.errors import InputError, RunError

_PARQUET_ROWS = 256


def check_target(path: str, option: str) -> None:
    """Check that rows can be written to a file, before the work that makes them.

    Raises:
        InputError: the suffix is neither .jsonl nor .parquet, or there is no such directory.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{option}: {path} is a directory; name a file in it")
    if target.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{option}: {path} must end in .jsonl or .parquet")
    if not target.absolute().parent.is_dir():
        raise InputError(f"{option}: {target.parent} is not a directory")
    if not os.access(target.absolute().parent, os.W_OK):
        raise InputError(f"{option}: {target.parent} is not writable")


def prompt_value(prompt: tuple[Message, ...] | str) -> str | list[dict[str, Any]]:
    """A prompt as a value of the column `prompt`, from which `read_prompt` reads it unchanged."""
    return prompt if isinstance(prompt, str) else [_message_value(one) for one in prompt]


def _message_value(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thought:
        value["reasoning_content"] = message.thought
    if message.calls:
        value["tool_calls"] = json.loads(message.calls)
    return value | (json.loads(message.extra) if message.extra else {})


@contextmanager
def row_writer(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Replace a file by the rows passed to the yielded function, once the block has ended.

    The file is replaced atomically. Rows are streamed to disk. A Parquet file has the columns id,
    prompt (text, or messages if any row has messages), answer, solution, source, tools and traces;
    ids are text, tools and tool calls JSON text.

    Raises:
        RunError: the file cannot be written.
    """
    lines, partial = (path.with_name(f"{path.name}.{end}") for end in ("lines", "partial"))
    try:
        with lines.open("w", encoding="utf-8") as file:
            yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)
        if path.suffix == ".parquet":
            _write_parquet(lines, partial)
            os.replace(partial, path)
        else:
            os.replace(lines, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error}") from error
    finally:
        lines.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)


def _write_parquet(lines: Path, target: Path) -> None:
    import pyarrow as pa  # imported late: reading options does not need it
    import pyarrow.parquet as pq

    with lines.open(encoding="utf-8") as file:
        as_text = all(isinstance(json.loads(line)["prompt"], str) for line in file)
    texts = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
    message = pa.struct([(name, pa.string()) for name in texts])
    trace = pa.struct(
        [
            *((name, pa.string()) for name in ("text", "reasoning_content", "teacher")),
            *((name, pa.bool_()) for name in ("correct", "finished")),
            ("weight", pa.float32()),
            ("spans", pa.list_(pa.list_(pa.float64()))),
        ]
    )
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("prompt", pa.string() if as_text else pa.list_(message)),
            *((name, pa.string()) for name in ("answer", "solution", "source", "tools")),
            ("traces", pa.list_(trace)),
        ]
    )
    with lines.open(encoding="utf-8") as file, pq.ParquetWriter(target, schema) as writer:
        rows = map(json.loads, file)
        while batch := list(islice(rows, _PARQUET_ROWS)):
            for row in batch:
                if "id" in row:
                    row["id"] = str(row["id"])
                if "tools" in row:
                    row["tools"] = json.dumps(row["tools"])
                if not as_text:
                    row["prompt"] = _parquet_messages(row["prompt"])
            writer.write_table(pa.Table.from_pylist(batch, schema))


def _parquet_messages(prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A prompt as messages whose values are text."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [
        {**message, "tool_calls": json.dumps(message["tool_calls"])}
        if "tool_calls" in message
        else message
        for message in prompt
    ]
