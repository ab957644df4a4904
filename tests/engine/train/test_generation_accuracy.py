"""Greedy accuracy during training against plain forwards of the same weights."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ranks

from redi.engine.cli import main
from redi.engine.generation import generate

PROBLEMS = 21  # odd: two ranks have unequal shares


def likeliest(folder: Path, prompt: str, most: int) -> str:
    """The greedy completion, by single forwards without padding or cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < most:
        with torch.no_grad():
            new.append(
                int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            )
        if new[-1] == tokenizer.eos_token_id:
            break
    return "".join(tokenizer.convert_ids_to_tokens(new)).replace(tokenizer.eos_token, "")


@pytest.fixture(scope="module")
def held_out(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems; the untrained model solves every third."""
    path = tmp_path_factory.mktemp("held_out") / "test.jsonl"
    with path.open("w") as file:
        for number in range(PROBLEMS):
            prompt = f"{number * 7}="
            right = likeliest(world / "model", prompt, 5)
            row = {"prompt": prompt, "chosen": "12", "rejected": "3"}
            row["answer"] = right if number % 3 == 0 else right + "0"
            file.write(json.dumps(row) + "\n")
    return path


def changes(held_out: Path) -> dict[str, Any]:
    return {
        "eval.path": str(held_out),
        "eval.every": 2,
        "eval.checker": "exact",
        "eval.max_new_tokens": 5,
        "eval.batch_size": 4,
        "train.max_steps": 2,
        "optim.warmup": 0.0,
    }


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line.get("event") == "eval"}


def test_accuracy_is_that_of_the_weights_and_training_is_unaffected(
    recipe: Callable[..., Path], held_out: Path, tmp_path: Path
) -> None:
    checked = changes(held_out)
    assert main(["train", str(recipe("with", checked))]) == 0
    assert main(["train", str(recipe("without", checked | {"eval.checker": "none"}))]) == 0
    found = evaluations(tmp_path / "with")
    assert found[0]["greedy_accuracy"] == pytest.approx(7 / 21)
    rows = [json.loads(text) for text in held_out.read_text().splitlines()]
    texts = [likeliest(tmp_path / "with" / "export", row["prompt"], 5) for row in rows]
    right = sum(text == row["answer"] for text, row in zip(texts, rows, strict=True))
    assert found[2]["greedy_accuracy"] == pytest.approx(right / 21)
    # Generation must not affect training.
    weights = "export/model.safetensors"
    assert (tmp_path / "with" / weights).read_bytes() == (
        tmp_path / "without" / weights
    ).read_bytes()
    assert "greedy_accuracy" not in evaluations(tmp_path / "without")[0]


@pytest.mark.slow
def test_two_ranks_find_the_same_accuracy(
    recipe: Callable[..., Path], redi: Callable[..., Any], held_out: Path, tmp_path: Path
) -> None:
    extra = {"shard.checkpointing": "full", "shard.offload": True}
    assert main(["train", str(recipe("one", changes(held_out)))]) == 0
    done = redi("train", recipe("two", changes(held_out) | extra), ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = evaluations(tmp_path / "one"), evaluations(tmp_path / "two")
    for step in (0, 2):
        for figure in ("greedy_accuracy", "greedy_truncated"):
            assert two[step][figure] == pytest.approx(one[step][figure])
    assert one[0]["greedy_accuracy"] == pytest.approx(7 / 21)


ENDLESS = {"eval.max_new_tokens": 1_000_000, "model.max_position_embeddings": 2_000_000}


def test_a_signal_interrupts_a_long_generation_at_the_next_token(
    recipe: Callable[..., Path],
    held_out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked = generate._StopIf.__call__
    tokens = 0

    def count(*args: Any, **kwargs: Any) -> torch.BoolTensor:
        nonlocal tokens
        tokens += 1
        if tokens == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        assert tokens <= 4
        return asked(*args, **kwargs)

    monkeypatch.setattr(generate._StopIf, "__call__", count)
    assert main(["train", str(recipe("run", changes(held_out) | ENDLESS))]) == 75
    assert tokens in (3, 4)
    assert "stopped after step 0 of 2" in capfd.readouterr().err


@pytest.mark.slow
def test_ranks_of_which_one_has_the_signal_end_together(
    recipe: Callable[..., Path], held_out: Path, tmp_path: Path
) -> None:
    some = {"eval.max_new_tokens": 400, "model.max_position_embeddings": 500}
    path = recipe("run", changes(held_out) | some)
    runs = ranks(2, "train", path, log=tmp_path / "log")
    runs[0].wait_for(lambda: "held out:" in runs[0].stderr)
    time.sleep(2)  # at any point of the run
    runs[1].send(signal.SIGTERM)
    for run in runs:
        assert run.end(120) == 75, run.stderr
    assert "stopped after step 0 of 2" in runs[0].stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eval.path": None}, "needs eval.path"),
        ({"eval.answer_pattern": "("}, "eval.answer_pattern: '(' is not a regular expression"),
        ({"eval.checker": "math", "eval.answer_pattern": "(.)"}, 'needs eval.checker = "exact"'),
        ({"eval.max_new_tokens": 0}, "eval.max_new_tokens must be >= 1, got 0"),
        ({"eval.checker": "maths"}, "eval.checker: needs one of"),
    ],
)
def test_wrong_settings_are_one_line(
    change: dict[str, Any],
    said: str,
    recipe: Callable[..., Path],
    held_out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", str(recipe("r", changes(held_out) | change))]) == 2
    assert said in capsys.readouterr().err


def test_held_out_rows_without_answers_are_refused_before_training(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "test.jsonl"
    data.write_text('{"prompt": "1=", "chosen": "12", "rejected": "3"}\n')
    assert main(["train", str(recipe("r", changes(data)))]) == 2
    assert "test.jsonl:1: no answer" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
