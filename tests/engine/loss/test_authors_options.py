"""Recipe options for the behaviour of the authors' code that differs from the paper."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_cases import make_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from redi.engine.cli import main
from redi.engine.config.sections import ObjectiveConfig
from redi.engine.data.packing import build_batch
from redi.engine.data.schedule import select
from redi.engine.loss.packed_loss import PackedLoss, StepTotals

Steps = Callable[[Path], list[dict[str, Any]]]


@pytest.mark.parametrize("name", ["sft", "redi"])
def test_original_length_weighs_a_truncated_trace_less(name: str, tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "set", [2, 2], [30, 5], [1, -1], [0, 0])
    limits: dict[str, Any] = {"max_tokens": 12, "overlong": "truncate", "row_tokens": 100}
    examples = select(tokens, objective_needs="pairs", **limits)
    assert examples.lengths.tolist() == [12, 7]
    batch = build_batch(tokens, np.array([0, 1]), examples.lengths)
    hidden, head = torch.randn(19, 8).double(), torch.randn(64, 8).double()
    totals = StepTotals(units=1, targets=15)
    section = ObjectiveConfig(name=name, length="original")  # type: ignore[arg-type]
    out = PackedLoss(section)(hidden, head, batch, totals)
    positive, negative = out.sequence_logps.tolist()
    alpha = 0.8 if name == "redi" else 0.0
    # 10 and 5 tokens are trained; there were 30 and 5 before truncation.
    assert out.loss.item() == pytest.approx(-positive / 30 + alpha * negative / 5, rel=1e-6)


def test_an_untrained_end_is_not_a_target(tmp_path: Path) -> None:
    """Token ids are consecutive numbers: 8, 14, 17 and 21 end the traces."""
    tokens = make_tokens(tmp_path / "set", [3, 2, 2, 2], [5, 4, 1, 2], [1, -1, 1, 1], [0, 0, 1, 1])
    options: dict[str, Any] = {"max_tokens": 7, "overlong": "truncate", "row_tokens": 99}

    def targets(end: int | None) -> list[int]:
        found = select(tokens, objective_needs="traces", untrained_end=end, **options)
        assert found.truncated.tolist() == [end != 8, False, False, False]
        batch = build_batch(tokens, np.arange(4), found.lengths)
        assert int(batch.num_targets.sum()) == len(batch.valid_index)
        return sorted(batch.targets[batch.valid_index].tolist())

    assert targets(None) == [4, 5, 6, 7, 11, 12, 13, 14, 17, 20, 21]  # the first is truncated
    assert targets(8) == targets(None)  # its end was truncated anyway
    assert targets(14) == [4, 5, 6, 7, 11, 12, 13, 17, 20, 21]
    assert targets(21) == [4, 5, 6, 7, 11, 12, 13, 14, 17, 20]
    assert targets(17) == targets(None)  # the only token of its completion


def test_a_recipe_can_leave_the_end_out(
    recipe: Callable[..., Path], steps: Steps, tmp_path: Path
) -> None:
    sft = {"objective.name": "sft", "train.max_steps": 1}
    assert main(["train", str(recipe("with", sft))]) == 0
    assert main(["train", str(recipe("without", sft | {"data.eos": "left_out"}))]) == 0
    with_end, without = (steps(tmp_path / name)[0]["targets"] for name in ("with", "without"))
    assert with_end - 8 == without  # a batch of 8


def test_the_base_model_is_edited_for_training_and_in_the_export(
    recipe: Callable[..., Path], steps: Steps, tmp_path: Path, world: Path
) -> None:
    changes = {"model.rope_theta": 50.0, "model.max_position_embeddings": 96}
    short = {"train.max_steps": 1}
    assert main(["train", str(recipe("edited", changes | short))]) == 0
    assert main(["train", str(recipe("plain", short))]) == 0
    edited, plain = (steps(tmp_path / name)[0]["positive_logp"] for name in ("edited", "plain"))
    assert edited != pytest.approx(plain, rel=1e-5)
    for folder in ("export", "export-step-1"):
        if folder == "export-step-1":
            assert main(["export", str(tmp_path / "edited")]) == 0
        config = AutoConfig.from_pretrained(tmp_path / "edited" / folder)
        assert config.rope_parameters["rope_theta"] == 50.0
        assert config.max_position_embeddings == 96
    # A step with rate 0 does not change the weights: the export gives the log-probs of training.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "edited" / "export")
    ids = torch.arange(11)[None]
    ours = model(ids).logits
    config = AutoConfig.from_pretrained(world / "model")
    config.rope_parameters["rope_theta"] = 50.0
    expected = AutoModelForCausalLM.from_pretrained(world / "model", config=config)(ids).logits
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("key", ["rope_theta", "max_position_embeddings"])
def test_an_edit_out_of_range_is_named(
    key: str, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe("a")), f"--model.{key}", "0"]) == 2
    assert f"model.{key} must be > 0, got 0" in capsys.readouterr().err


def test_a_model_without_rope_theta_is_an_input_error(
    recipe: Callable[..., Path], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "model.safetensors").write_bytes(b"")
    path = recipe("a", {"model.path": str(folder), "model.rope_theta": 3.0})
    assert main(["train", str(path)]) == 2
    assert "model.rope_theta: " in capsys.readouterr().err


def test_a_run_without_ends_is_scored_without_them_and_evaluate_warns(
    recipe: Callable[..., Path], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = {}
    for eos in ("trained", "left_out"):
        changes = {"objective.name": "sft", "data.eos": eos, "train.max_steps": 1}
        assert main(["train", str(recipe(eos, changes))]) == 0
        out = tmp_path / f"{eos}.parquet"
        data = ["--data", str(world / "traces.jsonl")]
        assert main(["logprobs", str(tmp_path / eos), *data, "--out", str(out)]) == 0
        tokens[eos] = pq.read_table(out)["tokens"].to_pylist()
        capsys.readouterr()
        problems = tmp_path / "problems.jsonl"
        problems.write_text('{"prompt": "12=", "answer": "3"}\n')
        options = ["--max_new_tokens", "2", "--checker", "exact"]
        line = ["evaluate", str(tmp_path / eos), "--data", str(problems), *options]
        assert main(line) == 0
        warned = "without the ends of traces" in " ".join(capsys.readouterr().err.split())
        assert warned == (eos == "left_out")
    assert tokens["left_out"] == [count - 1 for count in tokens["trained"]]
