"""Folders to the data sets in them: what `datasets` saved, downloads with splits, metadata."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import save_tokenizer, settings, write_rows

from redi.engine.console import Console
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.fingerprints import source_fingerprint
from redi.engine.data.rows import read_rows
from redi.engine.data.sources import find_sources, unread_splits
from redi.engine.data.tokens import tokenize
from redi.engine.errors import InputError


def rows(*names: str) -> list[dict[str, Any]]:
    return [{"prompt": f"Is {name} right?", "chosen": name, "rejected": "no"} for name in names]


def write_parquet(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows(*names)), path)


def read(*paths: str | Path) -> list[str]:
    """The chosen traces of all rows, in order."""
    return [row.value["chosen"] for row in read_rows([str(path) for path in paths], "auto")]


def tokens_of(path: Path, tokenizer: str, cache: Path) -> TokenizedTraces:
    return tokenize(settings(str(path), tokenizer), cache, processes=1, console=Console(False))


def test_metadata_of_a_download_is_no_data(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", "a", "b")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    (tmp_path / "dataset_info.json").write_text('{"splits": {}}')
    assert read(tmp_path) == ["a", "b"]
    assert unread_splits([str(tmp_path)]) == []


def test_what_an_evaluation_and_a_selection_write_beside_their_rows_is_no_data(
    tmp_path: Path,
) -> None:
    for rows_file, facts in (("samples.jsonl", "evaluation.json"), ("sft.jsonl", "report.json")):
        folder = tmp_path / rows_file.split(".")[0]
        folder.mkdir()
        write_rows(folder / rows_file, rows("a"))
        (folder / facts).write_text('{\n "settings": {}\n}\n')
        assert read(folder) == ["a"]


def test_a_name_that_metadata_has_elsewhere_may_be_data(tmp_path: Path) -> None:
    for name in ("state.json", "summary.json", "report.json"):
        (tmp_path / name).write_text(json.dumps(rows(name)))
    assert read(tmp_path) == ["report.json", "state.json", "summary.json"]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_data_set_is_read(tmp_path: Path, shards: int) -> None:
    made = datasets.Dataset.from_list(rows("a", "b", "c", "d")).with_format("numpy")
    made.save_to_disk(tmp_path / "saved", num_shards=shards)
    assert read(tmp_path / "saved") == ["a", "b", "c", "d"]
    assert [row.where for row in read_rows([str(tmp_path / "saved")], "auto")][2].endswith("d:3")
    # one among other files
    write_rows(tmp_path / "more.jsonl", rows("e"))
    assert read(tmp_path) == ["e", "a", "b", "c", "d"]


def test_a_saved_selection_gives_the_selected_rows_in_their_order(tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows("a", "b", "c")).select([2, 0]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ["c", "a"]


def test_of_saved_splits_train_is_read_or_the_one_named(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    splits = {"test": rows("t"), "train": rows("a", "b"), "dev": rows("v")}
    made = {name: datasets.Dataset.from_list(split) for name, split in splits.items()}
    datasets.DatasetDict(made).save_to_disk(folder)
    assert read(folder) == ["a", "b"]
    assert read(f"{folder}:test") == ["t"]
    assert read(folder / "dev") == ["v"]
    assert unread_splits([str(folder), f"{folder}:test"]) == [
        f"{folder}: only its split train is read, test and dev are not; name another one as "
        f'"{folder}:test"'
    ]
    with pytest.raises(InputError, match=r"no split 'tset'; it has: test, train, dev; name one"):
        find_sources([f"{folder}:tset"])


def test_saved_splits_without_train_are_named(tmp_path: Path) -> None:
    made = {name: datasets.Dataset.from_list(rows(name)) for name in ("easy", "hard")}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError) as caught:
        find_sources([str(tmp_path / "saved")])
    assert str(caught.value) == (
        f"{tmp_path / 'saved'}: the folder has no split 'train'; it has: easy, hard; name one as "
        f'"{tmp_path / "saved"}:easy"'
    )


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("data/train-00000-of-00001-9d3f0a.parquet", "data/test-00000-of-00001-77ab12.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"),
        ("train.parquet", "test.parquet"),
        ("gsm8k_training.parquet", "gsm8k-eval.parquet"),
        ("train/0.parquet", "validation/0.parquet"),
    ],
)
def test_of_a_download_with_several_splits_train_is_read(
    tmp_path: Path, train: str, test: str
) -> None:
    write_parquet(tmp_path / train, "a", "b")
    write_parquet(tmp_path / test, "t")
    write_parquet(tmp_path / "latest.parquet", "c")  # of no split
    assert sorted(read(tmp_path)) == ["a", "b", "c"]
    (line,) = unread_splits([str(tmp_path)])
    assert line.startswith(f"{tmp_path}: only its split train is read, ")
    other = line.rpartition(":")[2].rstrip('"')
    assert read(f"{tmp_path}:{other}") == ["t"]


def test_files_of_one_split_alone_are_all_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", "a")
    write_parquet(tmp_path / "other.parquet", "b")
    assert read(tmp_path) == ["a", "b"]
    assert unread_splits([str(tmp_path)]) == []


def test_a_download_with_several_splits_and_no_train_names_them(tmp_path: Path) -> None:
    for split in ("test_sft", "train_gen", "train_sft"):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", split)
    with pytest.raises(InputError, match="it has: test_sft, train_gen, train_sft; name one as"):
        find_sources([str(tmp_path)])
    assert read(f"{tmp_path}:train_sft") == ["train_sft"]


def test_a_damaged_saved_data_set_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows("a", "b")).save_to_disk(folder)
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(InputError) as caught:
        read(folder)
    assert str(caught.value).startswith(f"{folder}: the saved data set cannot be read: ")
    assert "\n" not in str(caught.value)


def test_the_cache_key_follows_the_files_that_are_read_and_no_others(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    data, cache = tmp_path / "rows", tmp_path / "cache"
    write_parquet(data / "data" / "train-00000-of-00001.parquet", "a", "b")
    write_parquet(data / "data" / "test-00000-of-00001.parquet", "t")
    first = tokens_of(data, tokenizer, cache).key
    write_parquet(data / "data" / "test-00000-of-00001.parquet", "other")
    (data / "dataset_infos.json").write_text("{}")
    assert tokens_of(data, tokenizer, cache).key == first
    write_parquet(data / "data" / "train-00000-of-00001.parquet", "a", "c")
    assert tokens_of(data, tokenizer, cache).key != first


def test_a_saved_data_set_has_the_digest_of_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        datasets.Dataset.from_list(rows(name)).save_to_disk(tmp_path / name)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    digests = {
        name: source_fingerprint(find_sources([str(tmp_path / name)])[0], tmp_path / "cache")
        for name in ("a", "b", "copy")
    }
    assert digests["a"] == digests["copy"] != digests["b"]
