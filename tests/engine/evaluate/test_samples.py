"""samples.jsonl after a kill: what is kept, and its order."""

import json
from pathlib import Path

import pytest

from redi.engine.errors import InputError
from redi.engine.evaluate.samples import keep_complete, put_in_order

PLACES = [(problem, sample) for problem in (2, 0, 1) for sample in (0, 1, 2)]


def text(index: int) -> str:
    problem, sample = PLACES[index]
    return json.dumps({"problem": problem, "sample": sample, "traces": [], "n": index}) + "\n"


def written(path: Path, indices: list[int], rest: str = "") -> Path:
    path.write_text("".join(map(text, indices)) + rest)
    return path


def content(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("indices", "unit", "kept"),
    [
        ([0, 1, 2, 3], 1, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 4, [0, 1, 2, 3]),
        ([0, 1, 2, 3, 4], 4, [0, 1, 2, 3]),
        ([4, 5, 6, 7, 0, 1], 4, [4, 5, 6, 7]),  # another worker's batch is not complete
        ([8, 0, 1, 2, 3], 4, [8, 0, 1, 2, 3]),  # the last batch is smaller
        ([7, 3, 5], 1, [7, 3, 5]),
        ([7, 3, 5], 2, []),
    ],
)
@pytest.mark.parametrize("rest", ["", text(6)[:-1], text(6)[:20], '{"pro'])
def test_complete_batches_are_kept_and_a_line_without_an_end_is_not(
    indices: list[int], unit: int, kept: list[int], rest: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "samples.jsonl", indices, rest)
    assert keep_complete(path, PLACES, unit) == set(kept)
    assert content(path) == kept
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_lines_are_sorted_by_place_whatever_their_order(tmp_path: Path) -> None:
    path = written(tmp_path / "samples.jsonl", [7, 3, 5, 0, 8, 1, 6, 2, 4])
    put_in_order(path, PLACES)
    assert content(path) == list(range(9))
    before = path.stat()
    put_in_order(path, PLACES)
    assert path.stat().st_ino == before.st_ino  # not written again


def test_a_line_of_something_else_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "samples.jsonl", [0, 1], "{}\n")
    with pytest.raises(InputError, match=r"samples\.jsonl:3: not a sample"):
        keep_complete(path, PLACES, 1)
    assert keep_complete(tmp_path / "none", PLACES, 1) == set()
