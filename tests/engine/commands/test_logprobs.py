"""Log-probs of whole traces: DPO's reference, and the table of `redi logprobs`."""

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_cases import save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from redi.engine.cli import main
from redi.engine.data import cache
from redi.engine.data.content_hash import trace_hash
from redi.engine.data.rows import read_rows
from redi.engine.data.text import Encoder, TokenSettings
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


def write_spans(world: Path, path: Path) -> list[dict[str, Any]]:
    """Write the small world's rows, the first with a thought, masked parts and no end."""
    rows = [json.loads(line) for line in (world / "traces.jsonl").read_text().splitlines()]
    first = rows[0]["traces"][0]
    first |= {"text": "123456", "spans": [[1, 3, 0.0], [3, 4, 2.0]]}
    rows[1]["traces"][0] |= {"text": "12", "finished": False}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_the_scores_of_tokens_are_those_of_plain_transformers_with_their_places(
    world: Path, small_blocks: Path, tmp_path: Path
) -> None:
    rows = write_spans(world, tmp_path / "traces.jsonl")
    given = [(row["prompt"], trace) for row in rows for trace in row["traces"]]
    out = tmp_path / "tokens.parquet"
    line = ["logprobs", world / "model", "--data", tmp_path / "traces.jsonl", "--out", out]
    assert main([*map(str, line), "--tokens", "--row_tokens", "128"]) == 0
    table = pq.read_table(out)
    assert table.schema.field("token_logps").type == pa.list_(pa.float32())
    assert table.schema.field("token_starts").type == pa.list_(pa.int32())
    assert not list(small_blocks.glob("*/logprobs-*/*.tokens.npy"))
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float64)
    assert table.num_rows == len(given) > 100
    for index, ((prompt, trace), found) in enumerate(zip(given, table.to_pylist(), strict=True)):
        text = trace["text"]
        kept = [place for place in range(len(text)) if "spans" not in trace or place not in (1, 2)]
        end = [] if trace.get("finished") is False else [tokenizer.eos_token_id]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + end
        places = [*kept, *([len(text)] if end else [])]
        assert found["token_ids"] == [ids[place] for place in places]
        assert found["token_starts"] == places
        assert found["token_ends"] == [min(place + 1, len(text)) for place in places]
        assert [
            text[a:b] for a, b in zip(found["token_starts"], found["token_ends"], strict=True)
        ] == [
            *(text[place] for place in kept),
            *([""] if end else []),
        ]
        assert found["tokens"] == len(places)
        if index % 9 and index != 1:
            continue
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([asked + ids])).logits[0]
        logps = logits[len(asked) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, torch.tensor(ids)[:, None])[places, 0]
        entropies = -(logps.exp() * logps).sum(-1)[places]
        np.testing.assert_allclose(found["token_logps"], expected, rtol=2e-6, atol=2e-7)
        np.testing.assert_allclose(found["token_entropies"], entropies, rtol=2e-6)
        assert found["logp_sum"] == pytest.approx(sum(found["token_logps"]), rel=1e-6)


def test_places_are_those_of_the_trace_in_a_template_that_opens_its_thought(
    world: Path, tmp_path: Path
) -> None:
    """In characters of the thought, if it is separate, followed by the answer."""
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    tokenizer = save_tokenizer(
        tmp_path / "tokenizer",
        template="{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}"
        "{% else %}A<think>\n{% if m.reasoning_content %}{{ m.reasoning_content }}\n"
        "</think>\n\n{% endif %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A<think>\n{% endif %}",
    )
    traces = [
        {"text": "<think>\nit is é\n</think>\n\n6", "correct": True},
        {"text": " 6 \n", "correct": True, "reasoning_content": "it is 😀"},
    ]
    row = {"prompt": "2 * 3?", "traces": traces}
    (tmp_path / "row.jsonl").write_text(json.dumps(row) + "\n")
    settings = TokenSettings((str(tmp_path / "row.jsonl"),), "auto", "chat", None, tokenizer)
    encoder = Encoder(settings)
    read = [one for row in read_rows(settings.paths, "auto") for one in normalise(row)]
    texts = encoder.texts(read)
    for trace, encoded, places in zip(
        read, encoder.encode(read, texts), encoder.offsets(read, texts), strict=True
    ):
        assert places is not None
        assert places.shape[1] == len(encoded.ids) - encoded.prompt_length
        text = trace.thought + trace.content
        covered = sorted({place for a, b in places.T.tolist() for place in range(a, b)})
        opened = 0 if trace.thought else len("<think>\n")  # a part of the prompt
        assert covered == list(range(opened, len(text)))
        ids = encoded.ids[encoded.prompt_length :]
        for token, (a, b) in zip(ids, places.T.tolist(), strict=True):
            spelled = encoder.tokenizer.decode([token])
            if a < b and "\ufffd" not in spelled:
                assert text[a:b] == spelled
        assert places[:, -1].tolist() == [len(text), len(text)]


def test_a_pass_over_tokens_that_was_interrupted_scores_only_what_is_missing(
    world: Path, small_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tokens.parquet"
    line = ["logprobs", world / "model", "--data", world / "traces.jsonl", "--out", out, "--tokens"]
    score, done = score_traces._score_block, []

    def interrupted(*args: Any) -> score_traces.BlockScores:
        done.append(len(args[2]))
        if len(done) == 3:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(score_traces, "_score_block", interrupted)
    assert main([*map(str, line)]) == 75
    assert not list(tmp_path.glob("tokens*"))
    assert main([*map(str, line)]) == 0
    table = pq.read_table(out)
    assert len(done) - 1 == -(-table.num_rows // 32)  # each block is scored once
    shutil.rmtree(small_blocks)
    assert main([*map(str, line)]) == 0
    assert pq.read_table(out).equals(table)


def test_the_most_likely_tokens_are_those_of_plain_transformers(
    world: Path, small_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the pass was interrupted; and K = V is the whole distribution."""
    write_spans(world, tmp_path / "traces.jsonl")
    out = tmp_path / "teacher.parquet"
    line = ["logprobs", world / "model", "--data", tmp_path / "traces.jsonl", "--out", out]
    score, done = score_traces._score_block, []

    def interrupted(*args: Any) -> score_traces.BlockScores:
        done.append(len(args[2]))
        if len(done) == 3:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(score_traces, "_score_block", interrupted)
    assert main([*map(str, line), "--top", "4"]) == 75
    assert main([*map(str, line), "--top", "4"]) == 0
    table = pq.read_table(out)
    assert len(done) - 1 == -(-table.num_rows // 32)
    assert table.schema.field("top_logps").type == pa.list_(pa.list_(pa.float16()))
    assert not list(small_blocks.glob("*/logprobs-*/*.top_*.npy"))
    (folder,) = [path for path in small_blocks.iterdir() if path.is_dir()]
    tokens = cache.open_cache(folder)
    assert tokens is not None
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float64)
    vocabulary = model.config.vocab_size
    assert main([*map(str, line), "--top", str(vocabulary)]) == 0
    whole = pq.read_table(out)
    for index in (0, 3, table.num_rows - 1):
        ids = torch.from_numpy(tokens.ids(index).astype("int64"))
        prompt = int(tokens.prompt_lengths[index])
        weights = tokens.token_weights(index)
        kept = slice(None) if weights is None else np.flatnonzero(weights)
        with torch.no_grad():
            logps = model(input_ids=ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)[kept]
        values, places = logps.topk(4)
        assert table["token_ids"][index].as_py() == ids[prompt:][kept].tolist()
        assert table["top_ids"][index].as_py() == places.tolist()
        found = np.array(table["top_logps"][index].as_py(), np.float64)
        np.testing.assert_allclose(found, values, rtol=2**-11 * 1.01)
        found = np.array(whole["top_logps"][index].as_py(), np.float64)
        order = np.argsort(whole["top_ids"][index].as_py(), axis=1)
        np.testing.assert_allclose(
            np.take_along_axis(found, order, axis=1), logps, rtol=2**-11 * 1.01
        )


@pytest.mark.parametrize(
    ("count", "problem"), [("0", "must be >= 1, got 0"), ("99999", "the model has only")]
)
def test_a_number_of_likely_tokens_that_cannot_be_is_an_error(
    world: Path, tmp_path: Path, count: str, problem: str, capsys: Any
) -> None:
    line = ["logprobs", world / "model", "--data", world / "traces.jsonl"]
    assert main([*map(str, line), "--out", str(tmp_path / "t.parquet"), "--top", count]) == 2
    message = capsys.readouterr().err
    assert problem in message
    assert "--top" in message


@pytest.mark.slow
def test_two_ranks_write_the_scores_of_tokens_that_one_writes(
    world: Path, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    tables = []
    for ranks in (0, 2):
        out = tmp_path / f"{ranks}.parquet"
        line = ["logprobs", world / "model", "--data", world / "traces.jsonl", "--out", out]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "REDI_CACHE": str(tmp_path / str(ranks)),
        }
        subprocess.run(command(*line, "--top", 3, ranks=ranks), env=environment, check=True)
        tables.append(pq.read_table(out))
    one, two = tables
    for name in one.schema.names:
        if "logp" not in name and "entrop" not in name:
            assert one[name].equals(two[name]), name
    for name in ("token_logps", "token_entropies"):
        values = [table[name].combine_chunks().values.to_numpy() for table in tables]
        np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6)
    values = [table["top_logps"].combine_chunks().flatten().flatten() for table in tables]
    np.testing.assert_allclose(*(one.to_numpy() for one in values), rtol=2**-10, atol=1e-6)


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
