"""The commands on data as users have them: folders, downloads, columns that nobody reads."""

import re
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
    said = (
        f"warning: {folder}: only its split train is read, test is not; name another one as "
        f'"{folder}:test"'
    )
    for _ in range(2):  # made, then from the cache
        assert main(["prepare", path]) == 0
        err = capsys.readouterr().err
        assert said in warned(err)
        assert re.search(r"^ ?traces read +40 *$", err, re.MULTILINE)
