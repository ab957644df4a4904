"""Invalid user input: exit code 2, one clear line, no partial output."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redi.engine.cli import main

WriteRecipe = Callable[..., Path]


def row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "12=", "chosen": "34", "rejected": "56", **changes}


def jsonl(*rows: Any) -> bytes:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()


GOOD = [row(prompt=f"{n}=") for n in range(10)]
FILES: dict[str, tuple[bytes | None, dict[str, Any], list[str]]] = {
    # case: (content of data.jsonl, changes to the recipe, words in the message)
    "missing file": (None, {}, ["data.jsonl"]),
    "empty file": (b"", {}, ["data.jsonl: holds no rows"]),
    "broken JSON": (jsonl(*GOOD[:2], '{"prompt": '), {}, ["data.jsonl:3"]),
    "no object": (jsonl(GOOD[0], "[1]"), {}, ["data.jsonl:2"]),
    "missing column": (jsonl(GOOD[0], {"prompt": "1="}), {}, ["data.jsonl:2"]),
    "wrong type": (jsonl(GOOD[0], row(chosen=7)), {}, ["data.jsonl:2", "chosen"]),
    "no completion": (jsonl(GOOD[0], row(rejected=" ")), {}, ["data.jsonl:2", "rejected"]),
    "empty prompt": (jsonl(GOOD[0], row(prompt="")), {}, ["data.jsonl:2", "prompt"]),
    "over max_tokens": (
        jsonl(*GOOD, row(chosen="1" * 99)),
        {},
        ["data.jsonl:11", "max_tokens", "drop"],
    ),
    "over row_tokens": (
        jsonl(*GOOD, row(chosen="1" * 40)),
        {"train.row_tokens": 32, "data.overlong": "drop"},
        ["data.jsonl:11", "row_tokens"],
    ),
    "fewer rows than a batch": (jsonl(*GOOD[:3]), {}, ["batch"]),
    "only positives": (
        jsonl(*({"prompt": "1=", "completion": "2"} for _ in range(20))),
        {},
        ["only positive"],
    ),
    "only negatives": (
        jsonl(*({"prompt": "1=", "completion": "2", "label": False} for _ in range(20))),
        {},
        ["only negative"],
    ),
    "no positives for SFT": (
        jsonl(*({"prompt": "1=", "completion": "2", "label": False} for _ in range(20))),
        {"objective.name": "sft"},
        ["no positive"],
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_bad_data_is_one_line_with_file_and_row(
    what: str, recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, changes, said = FILES[what]
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_bytes(content)
    path = recipe("r", {"data.path": str(data), "data.cache": str(tmp_path / "cache"), **changes})
    assert main(["train", str(path)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len([line for line in err if line.startswith("redi: ")]) == 1, err
    for words in said:
        assert words in err[-1]
    assert not (tmp_path / "r").exists()


def test_missing_data_is_reported_before_torch_is_imported(
    recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = str(recipe("r", {"data.path": "none.jsonl"}))
    lines = [
        ["train", path],
        ["prepare", path],
        ["prepare", "openr1", "none.jsonl", "--out", "out", "--tokenizer", "t"],
        ["evaluate", "model", "--data", "none.jsonl"],
        ["logprobs", "model", "--data", "none.jsonl", "--out", "out.parquet"],
    ]
    program = (
        "import sys\n"
        "from redi.engine.cli import main\n"
        f"assert [main(line) for line in {lines}] == [2] * {len(lines)}\n"
        "assert 'torch' not in sys.modules\n"
    )
    launch = [sys.executable, "-c", program]
    done = subprocess.run(launch, cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("redi: none.jsonl: no such file") == len(lines)


def test_a_gzipped_file_that_is_cut_off_is_named(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(gzip.compress(jsonl(*GOOD))[:-20])
    assert main(["train", str(recipe("r", {"data.path": str(data)}))]) == 2
    assert "data.jsonl.gz" in capsys.readouterr().err


def test_a_model_folder_without_safetensors_is_refused(
    world: Path, recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert main(["train", str(recipe("r", {"model.path": str(folder)}))]) == 2
    assert "has no *.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model"])
def test_a_missing_model_is_named(
    path: str, recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe("r", {"model.path": path}))]) == 2
    assert f"model.path: {path}" in capsys.readouterr().err


def test_a_truncated_model_file_is_refused(
    world: Path, recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert main(["train", str(recipe("r", {"model.path": str(folder)}))]) == 2
    err = capsys.readouterr().err
    assert "model.path" in err
    assert "Traceback" not in err
    assert not (tmp_path / "r").exists()


def test_a_directory_that_is_not_a_run_is_not_touched(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(["train", str(recipe("r", {"run.dir": str(tmp_path / "mine")}))]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_under_torchrun_one_rank_reports(
    recipe: WriteRecipe, redi: Callable[..., Any], tmp_path: Path
) -> None:
    path = recipe("r", {"data.path": str(tmp_path / "none.jsonl")})
    done = redi("train", path, ranks=2)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("redi: ")]
    assert len(lines) == 1, done.stderr
    assert "none.jsonl" in lines[0]


def test_a_trace_longer_than_the_model_s_positions_is_refused(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(*GOOD, row(chosen="1" * 70)))
    assert main(["train", str(recipe("r", {"data.path": str(path), "data.max_tokens": 99}))]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(
        f"redi: {path}:11: 74 tokens are more than the model's"
    )
    assert "(1 of 22 traces are): set data.max_tokens = 64" in error
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_rank_that_fails_alone_reports_it(recipe: WriteRecipe, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        "from redi.engine.cli import main\n"
        "sys.exit(main(['train', sys.argv[1 + int(os.environ['RANK'])]]))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), str(recipe("r")), str(tmp_path / "none.toml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("redi: ")]
    assert lines == [f"redi: rank 1: {tmp_path / 'none.toml'}: no such recipe file"]


def test_an_architecture_that_cannot_run_packs_is_refused(
    world: Path, recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "model"
    config = GPT2Config(vocab_size=13, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(folder)
    assert main(["train", str(recipe("r", {"model.path": str(folder)}))]) == 2
    assert "not built of attention blocks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shard.replicate": 2}, "shard.replicate = 2 does not divide the 1 ranks"),
        (
            {"run.dir": "/proc/none/run"},
            "run.dir: /proc/none/run cannot be written: /proc: No such",
        ),
        ({"eval.path": "none.jsonl"}, "none.jsonl"),
        ({"model.path": "nowhere"}, "nowhere: no such directory, nor a hub name"),
        ({"model.path": "here/nowhere"}, "here/nowhere: no such directory, nor a hub name"),
        ({"data.path": "here/nowhere"}, "here/nowhere: no such file or folder, nor a hub name"),
        ({"model.tokenizer": "here/nowhere"}, "here/nowhere: no such folder with a tokenizer"),
    ],
)
def test_what_cannot_run_here_is_one_line(
    changes: dict[str, Any],
    said: str,
    recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe("r", changes))]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_hub_look_up_is_announced(
    recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A mistyped path may look like a hub name; without a network the look-up takes long."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--known").mkdir()
    changes = {"model.path": "mdoels/mine", "model.tokenizer": "owner/known"}
    path = recipe("r", changes | {"data.path": "data/trces:test", "eval.path": "none.jsonl"})
    assert main(["train", str(path)]) == 2
    *notices, error = capsys.readouterr().err.splitlines()
    assert "none.jsonl: no such file" in error  # before any import or look-up
    said = "no local path and not cached; looking it up on the Hugging Face hub"
    assert notices == [f"mdoels/mine: {said}", f"data/trces: {said}"]


@pytest.mark.parametrize(
    "changes",
    [
        {"run.dir": "/proc/none/run"},
        {"model.attention": "flash"},
        {"shard.compile": True, "shard.checkpointing": "full"},
    ],
    ids="-".join,
)
def test_what_cannot_run_here_is_reported_before_anything_is_tokenized(
    changes: dict[str, Any], recipe: WriteRecipe, tmp_path: Path
) -> None:
    assert main(["train", str(recipe("r", {**changes, "data.cache": str(tmp_path / "new")}))]) == 2
    assert not (tmp_path / "new").exists()


def test_triton_without_a_gpu_is_one_line(
    recipe: WriteRecipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redi.kernels.backends.TRITON_INTERPRETS", False)
    monkeypatch.setattr("redi.kernels.backends.TRITON_INSTALLED", True)
    if torch.cuda.is_available():
        pytest.skip("here it can run")
    assert main(["train", str(recipe("r", {"objective.backend": "triton"}))]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert 'objective.backend: backend="triton" needs a GPU' in said


def test_a_second_recipe_with_missing_data_stops_the_first_from_training(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [recipe("one"), recipe("two", {"data.path": "none.jsonl"})]
    assert main(["train", *map(str, paths)]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()


def test_a_damaged_run_folder_and_a_wrong_step_are_named(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "recipe.toml").write_text("junk")
    (tmp_path / "r" / "manifest.json").write_text("{}")
    assert main(["train", str(recipe("r"))]) == 2
    assert "recipe.toml: damaged" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "r"), "--step", "abc"]) == 2
    assert "step: needs another value, got abc" in capsys.readouterr().err
