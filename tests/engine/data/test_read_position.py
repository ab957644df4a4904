"""Data is read in bounded memory, and a progress line follows it to its end."""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redi.engine.console import Console
from redi.engine.data import rows as rows_module
from redi.engine.data import tokens as tokens_module
from redi.engine.data.read_position import ReadPosition, ReadProgress
from redi.engine.data.rows import read_rows, scan_source
from redi.engine.data.sources import find_sources
from redi.engine.errors import InputError

ROWS = [{"prompt": f"What is {n}?", "completion": "It is é \U0001f600 " * 20} for n in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.csv": lambda path: path.write_text("prompt,completion\n" + "q,a\n" * 300),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_position_grows_to_the_end_of_every_kind(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    (tmp_path / "z.jsonl").write_bytes(LINES)  # another source follows
    sources = find_sources([str(tmp_path / name), str(tmp_path / "z.jsonl")])
    position = ReadPosition(sources)
    found = [0]
    for source in sources:
        for _ in scan_source(source, "auto", position=position):
            assert position.done >= found[-1]
            found.append(position.done)
    assert len(found) == 601
    assert position.done == position.total >= len(LINES)
    assert found[300] <= position.total - len(LINES)


def test_progress_has_an_end_and_counts_what_is_done(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redi.engine.console.PLAIN_SECONDS", 0.0)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b" " * 2_500_000)
    progress = ReadProgress("tokenizing", ReadPosition(find_sources([str(path)])), Console())
    for done in (400_000, 1_000_000, 1_300_000, 2_500_000):
        progress.show(done, "7 traces")
    progress.close()
    first, second, last = capfd.readouterr().err.splitlines()
    assert first == "tokenizing MB 1/3  7 traces"
    assert second.startswith("tokenizing MB 2/3  7 traces  left ")
    assert last == "tokenizing MB 3/3  7 traces  left 00:00"


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [4, 7, 1 << 20])
def test_a_list_is_read_row_by_row_as_it_is_parsed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    monkeypatch.setattr(rows_module, "_BLOCK", block)
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(ROWS[:5], indent=indent).encode() + b" \n")
    assert [row.value for row in read_rows([str(path)], "auto")] == ROWS[:5]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"prompt": "a", "completion": "b"},\n{"prompt": "c"', "a.json:2: not valid JSON"),
        ('[{"prompt": "a", "completion": "b"}\n{}]', "a.json:2: not valid JSON: Expecting ','"),
        ('[{"prompt": "a", "completion": "b"}]\n[]', "a.json:2: not valid JSON: Extra data"),
        ('[{"prompt": "a", "completion": "b"}, {"a": 1, "a": 2}]', "key 'a' occurs 2 times"),
        ('[{"prompt": "a", "completion": "b"}, "\ud800"]', "a.json:1: not valid UTF-8"),
    ],
)
def test_a_faulty_list_has_the_error_of_the_whole_file(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    *before, error = scan_source(find_sources([str(path)])[0], "auto")
    assert not any(isinstance(row, InputError) for row in before)
    assert isinstance(error, InputError)
    assert problem in str(error)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_rows_of_any_length_are_held_a_few_megabytes_at_a_time(tmp_path: Path, kind: str) -> None:
    """30 MB in rows of 1 MB: a chunk has few of them, and only its own rows are in memory."""
    rows = [{"prompt": "q", "completion": "12 + 34 = 46. " * 70_000} for _ in range(30)]
    path = tmp_path / f"a.{kind}"
    path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    del rows
    sources = find_sources([str(path)])
    position = ReadPosition(sources)
    tracemalloc.start()
    try:
        chunks = tokens_module._in_chunks(scan_source(sources[0], "auto"), position)
        sizes = [len(chunk) for chunk, _ in chunks]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sizes) == 30
    assert max(sizes) == 5
    assert peak < 16e6
