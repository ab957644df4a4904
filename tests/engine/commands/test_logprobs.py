"""Log-probs of whole traces: DPO's reference, and the table of `redi logprobs`."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from redi.engine.cli import main
from redi.engine.data import cache
from redi.engine.data.content_hash import trace_hash
from redi.engine.data.rows import read_rows
from redi.engine.data.traces import normalise
from redi.engine.train import score_traces

Steps = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Set blocks of 32 traces; returns a cache directory used only by this test."""
    monkeypatch.setattr(score_traces, "BLOCK", 32)
    monkeypatch.setenv("REDI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_table_of_a_run_is_plain_transformers_in_float64_on_its_export(
    world: Path, small_blocks: Path, tmp_path: Path, capsys: Any
) -> None:
    run, out = tmp_path / "run", tmp_path / "scores.parquet"
    shutil.copytree(world / "model", run / "export")
    (run / "recipe.toml").touch()
    line = ["logprobs", run, "--data", world / "traces.jsonl", "--out", out]
    assert main([*map(str, line), "--row_tokens", "128"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    table = pq.read_table(out).to_pylist()
    (folder,) = [path for path in small_blocks.iterdir() if path.is_dir()]
    tokens = cache.open_cache(folder)
    assert tokens is not None
    assert len(table) == len(tokens) > 100
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(
        world / "model", dtype=torch.float64, attn_implementation="eager"
    )
    for index in (0, 1, 40, len(table) - 1):
        ids = torch.from_numpy(tokens.ids(index).astype("int64"))
        prompt = int(tokens.prompt_lengths[index])
        assert ids[-1] == tokenizer.eos_token_id  # the end is scored
        logp = model(input_ids=ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, ids[prompt:, None]).sum().item()
        entropy = -(logp.exp() * logp).sum(-1).mean().item()
        assert table[index]["tokens"] == len(ids) - prompt
        assert table[index]["logp_sum"] == pytest.approx(expected, rel=2e-6)
        assert table[index]["logp_mean"] == pytest.approx(expected / (len(ids) - prompt), rel=2e-6)
        assert table[index]["entropy_mean"] == pytest.approx(entropy, rel=2e-6)
        assert table[index]["correct"] == (tokens.signs[index] > 0)
        assert table[index]["row"].rpartition("/")[2] == Path(tokens.where(index)).name
        assert table[index]["teacher"] == "t"
        assert table[index]["prompt_tokens"] == prompt
    traces = [
        trace
        for row in read_rows([str(world / "traces.jsonl")], "auto")
        for trace in normalise(row)
    ]
    assert [row["hash"] for row in table] == [trace_hash(trace) for trace in traces]
    assert len({row["hash"] for row in table}) == len(table)


@pytest.mark.parametrize(
    ("device", "row_tokens", "longest", "expected"),
    [
        ("cpu", 32768, 900, 4096),
        ("cpu", 32768, 9000, 9000),
        ("cpu", 256, 90, 256),
        ("cuda", 32768, 900, 32768),
    ],
)
def test_without_a_gradient_a_cpu_gets_short_packs_that_hold_the_longest_trace(
    device: str, row_tokens: int, longest: int, expected: int
) -> None:
    lengths = np.array([3, longest, 5])
    found = score_traces.scoring_pack_tokens(row_tokens, lengths, torch.device(device))
    assert found == expected


def test_a_pass_that_was_killed_scores_only_what_is_missing(
    world: Path, small_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores.parquet"
    line = ["logprobs", world / "model", "--data", world / "traces.jsonl", "--out", out]
    assert main([*map(str, line)]) == 0
    first = pq.read_table(out)
    blocks = sorted(small_blocks.glob("*/logprobs-*/*.npy"))
    assert len(blocks) > 3
    blocks[1].unlink()
    blocks[2].write_bytes(blocks[2].read_bytes()[:-9])  # cut off
    done: list[int] = []
    score = score_traces._score_block

    def counted(*args: Any) -> np.ndarray:
        done.append(len(args[2]))
        return score(*args)

    monkeypatch.setattr(score_traces, "_score_block", counted)
    assert main([*map(str, line)]) == 0
    assert len(done) == 2
    assert pq.read_table(out).equals(first)


def test_another_model_has_other_scores(world: Path, small_blocks: Path, tmp_path: Path) -> None:
    tables = []
    for name in ("model", "tied"):
        out = tmp_path / f"{name}.parquet"
        line = ["logprobs", world / name, "--data", world / "traces.jsonl", "--out", out]
        assert main([*map(str, line)]) == 0
        tables.append(pq.read_table(out)["logp_sum"].to_numpy())
    assert np.abs(tables[0] - tables[1]).min() > 1e-6


def test_what_cannot_be_scored_or_written_is_reported_before_the_pass(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "1=", "chosen": "2", "rejected": "3" * 70}) + "\n")
    for data, out, fault in (
        (
            long,
            tmp_path / "a.parquet",
            f"{long}:1: 73 tokens are more than the model's 64 positions",
        ),
        (world / "traces.jsonl", tmp_path, f"--out: {tmp_path} is a directory"),
        (
            world / "traces.jsonl",
            tmp_path / "a.csv",
            f"--out: {tmp_path / 'a.csv'} is not a .parquet file",
        ),
        (
            world / "traces.jsonl",
            tmp_path / "none" / "a",
            f"--out: {tmp_path / 'none'} is not a directory",
        ),
    ):
        line = ["logprobs", world / "model", "--data", data, "--out", out]
        assert main([*map(str, line)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"redi: {fault}")
    assert [path.name for path in tmp_path.iterdir()] == ["long.jsonl"]


@pytest.mark.slow
def test_a_resumed_dpo_run_measures_against_the_model_before_step_1(
    recipe: Callable[..., Path], world: Path, steps: Steps, tmp_path: Path, capsys: Any
) -> None:
    """Also if the cached scores are deleted, and not against another model at the same path."""
    shutil.copytree(world / "model", tmp_path / "model")
    changes = {
        "model.path": str(tmp_path / "model"),
        "objective.name": "dpo",
        "objective.beta": 0.1,
        "optim.lr": 1e-2,
        "optim.warmup": 0.0,
        "data.cache": str(tmp_path / "cache"),
        "run.save_every": 2,
    }
    line = ["train", str(recipe("run", changes))]
    assert main(line) == 0
    run, expected = tmp_path / "run", steps(tmp_path / "run")

    def back_to_step_2() -> None:
        shutil.rmtree(run / "export")
        shutil.rmtree(run / "checkpoints" / "step-4")

    back_to_step_2()
    (scores,) = (tmp_path / "cache").glob("*/logprobs-*")
    shutil.rmtree(scores)
    assert main(line) == 0
    assert "resumes after step 2" in capsys.readouterr().err
    assert [step["loss"] for step in steps(run)] == [step["loss"] for step in expected]

    back_to_step_2()
    path = tmp_path / "model" / "model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(path).items()}, path, {"format": "pt"})
    assert main(line) == 2
    assert "model.path: the weights have changed since" in capsys.readouterr().err


@pytest.mark.slow
def test_dpo_starts_at_ln_2_on_any_number_of_ranks_and_continues_alike(
    recipe: Callable[..., Path], redi: Callable[..., Any], steps: Steps, tmp_path: Path
) -> None:
    changes = {
        "objective.name": "dpo",
        "objective.beta": 0.1,
        "optim.warmup": 0.0,
        "optim.eps": 1e-3,
        "data.cache": str(tmp_path / "cache"),
    }
    assert main(["train", str(recipe("whole", changes | {"train.row_tokens": 4096}))]) == 0
    split = recipe("split", changes | {"train.row_tokens": 128})
    done = redi("train", split, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, on_two = steps(tmp_path / "whole"), steps(tmp_path / "split")
    assert len(list((tmp_path / "cache").glob("*/logprobs-*"))) == 1  # found again on two ranks
    assert whole[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert whole[-1]["loss"] < math.log(2) - 1e-3
    for ours, theirs in zip(on_two, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5)
    assert on_two[0]["micro_steps"] > whole[0]["micro_steps"]
