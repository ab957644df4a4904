"""The commands on data as users have it: folders, downloads, columns that are not read."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redi.engine.cli import main

WriteRecipe = Callable[..., Path]


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{n}=", "chosen": str(2 * n), "rejected": str(3 * n + 1)}
        for n in range(first, first + count)
    ]


def warned(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("kind", ["saved splits", "download"])
def test_of_a_folder_with_splits_train_is_prepared_and_the_other_named(
    kind: str, recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rows"
    splits = {"train": pairs(20), "test": pairs(3, 50)}
    if kind == "download":
        (folder / "data").mkdir(parents=True)
        for name, rows in splits.items():
            path = folder / "data" / f"{name}-00000-of-00001.parquet"
            pq.write_table(pa.Table.from_pylist(rows), path)
        (folder / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    else:
        made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        datasets.DatasetDict(made).save_to_disk(folder)
    path = str(recipe("r", {"data.path": str(folder), "data.cache": str(tmp_path / "cache")}))
    expected = (
        f"warning: {folder}: only its split train is read, test is not; name another one as "
        f'"{folder}:test"'
    )
    for _ in range(2):  # made, then from the cache
        assert main(["prepare", path]) == 0
        err = capsys.readouterr().err
        assert expected in warned(err)
        assert re.search(r"^ ?traces read +40 *$", err, re.MULTILINE)


VERDICTS: dict[str, tuple[list[Any], str]] = {
    # column: (its values, the row and words that the line must name)
    "correct": ([True, False], "data.jsonl:1: column 'correct' has a verdict"),
    "is_correct": ([1, 0], "data.jsonl:1: column 'is_correct' has a verdict"),
    "verdict": (["right", "wrong"], "data.jsonl:1: column 'verdict' has a verdict"),
    "reward": ([1.0, 0.0], "data.jsonl:2: column 'reward' has a verdict (only 0 and 1"),
    "score": ([1, -1], "data.jsonl:2: column 'score' has a verdict (only 0 and 1"),
    "success": ([True, False], "data.jsonl:1: column 'success' has a verdict"),
}


def graded(column: str, values: list[Any]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{n}=", "completion": str(2 * n), column: values[n % len(values)]}
        for n in range(20)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", VERDICTS)
def test_a_verdict_under_another_name_is_refused(
    column: str,
    suffix: str,
    recipe: WriteRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values, expected = VERDICTS[column]
    data = write(tmp_path / f"data.{suffix}", graded(column, values))
    changes = {"data.path": data, "data.cache": str(tmp_path / "cache"), "objective.name": "sft"}
    assert main(["train", str(recipe("r", changes))]) == 2
    err = capsys.readouterr().err
    assert expected.replace("jsonl", suffix) in err
    assert "rename it to label" in err
    assert not (tmp_path / "r").exists()


def test_a_verdict_that_contradicts_the_label_is_refused(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "label": True} for row in graded("correct", [True])]
    changes = {"data.cache": str(tmp_path / "cache"), "objective.name": "sft"}
    path = recipe("same", {**changes, "data.path": write(tmp_path / "same.jsonl", rows)})
    assert main(["prepare", str(path)]) == 0
    rows[4]["correct"] = False
    path = recipe("other", {**changes, "data.path": write(tmp_path / "other.jsonl", rows)})
    assert main(["prepare", str(path)]) == 2
    expected = "other.jsonl:5: column 'correct' is False and contradicts label: remove one of them"
    assert expected in capsys.readouterr().err


def test_a_score_next_to_a_label_is_not_a_verdict(recipe: WriteRecipe, tmp_path: Path) -> None:
    rows = [{**row, "label": n % 2 == 0} for n, row in enumerate(graded("score", [0, 1, 4]))]
    data = write(tmp_path / "data.jsonl", rows)
    changes = {"data.path": data, "data.cache": str(tmp_path / "cache"), "objective.name": "sft"}
    assert main(["prepare", str(recipe("r", changes))]) == 0


def test_a_missing_grade_does_not_hide_the_verdicts_of_a_csv(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.csv"
    data.write_text("prompt,completion,reward\n1=,2,1\n2=,4,\n3=,7,0\n")
    changes = {"data.path": str(data), "objective.name": "sft", "train.batch": 1}
    assert main(["prepare", str(recipe("r", changes))]) == 2
    assert "data.csv:4: column 'reward' has a verdict" in capsys.readouterr().err


def test_scores_that_are_no_verdicts_are_warned_of(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", graded("score", [0, 0.3, 1]))
    changes = {"data.path": data, "data.cache": str(tmp_path / "cache"), "objective.name": "sft"}
    assert main(["prepare", str(recipe("r", changes))]) == 0
    assert f"warning: {data}: score is not read" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_that_mean_something_are_named_once_a_file_from_the_cache_too(
    suffix: str, recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "videos": ["add"], "reasoning": "2x", "notes": "n"} for row in pairs(20)]
    rows = [{**row, "thinking": None, "step_rewards": [0.5]} for row in rows]
    data = write(tmp_path / f"data.{suffix}", rows)
    changes = {"data.path": data, "data.cache": str(tmp_path / "cache"), "train.max_steps": 1}
    path = str(recipe("r", changes))
    for command in ("prepare", "prepare", "train"):
        assert main([command, path]) == 0
        lines = [line for line in warned(capsys.readouterr().err) if "not read" in line]
        assert lines == [
            f"warning: {data}: reasoning, step_rewards, videos are not read, and the traces are "
            "used without them; see docs/data.md for the columns that are read"
        ]


def test_keys_of_traces_and_messages_that_mean_something_are_named(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n}=", "name": "ann"}],
            "traces": [
                {"text": "12", "correct": True, "token_weights": [1.0, 0.5]},
                {"text": "13", "correct": False, "logprobs": [-1.0]},
            ],
        }
        for n in range(20)
    ]
    data = write(tmp_path / "data.jsonl", rows)
    path = recipe("r", {"data.path": data, "data.cache": str(tmp_path / "cache")})
    assert main(["prepare", str(path)]) == 0
    expected = "prompt[].name, traces[].logprobs, traces[].token_weights are not read"
    assert f"warning: {data}: {expected}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_training_takes_the_shapes_that_users_have_and_each_token_of_a_text(
    ranks: int,
    recipe: WriteRecipe,
    redi: Callable[..., subprocess.CompletedProcess[str]],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    def said(n: int) -> list[dict[str, str]]:
        return [{"from": "human", "value": f"{n}="}, {"from": "gpt", "value": str(2 * n)}]

    numbers = range(10, 14)
    shapes: dict[str, list[dict[str, Any]]] = {
        "sharegpt": [{"conversations": said(n)} for n in numbers],
        "alpaca": [{"instruction": f"{n}=", "input": "", "output": str(2 * n)} for n in numbers],
        "as_text": [{"messages": json.dumps(said(n))} for n in numbers],
        "text": [{"text": "0123456789" * n} for n in (1, 2)],
    }
    paths = []
    for name, rows in shapes.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"data": rows}, indent=1))
    changes = {
        "data.path": [str(path) for path in paths],
        "data.cache": str(tmp_path / "cache"),
        "data.max_tokens": 8,
        "data.workers": 1 if ranks else 0,
        "objective.name": "sft",
        "train.batch": 17,
        "train.epochs": 1,
    }
    done = redi("train", recipe("r", changes), ranks=ranks)
    assert done.returncode == 0, done.stderr
    # 12 answers of 2 digits; texts of 10 and 20 tokens, each with one EOS: 2 and 3 pieces.
    (step,) = steps(tmp_path / "r")
    assert step["tokens"] == 12 * (3 + 2 + 1) + (10 + 1) + (20 + 1)
