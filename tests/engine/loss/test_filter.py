"""Training with `[objective] filter_epsilon`: logged at each step, refused if not supported."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redi.engine.cli import main

Recipe = Callable[..., Path]
Steps = Callable[[Path], list[dict[str, Any]]]
FILTER = {"objective.filter_epsilon": 0.2, "train.dtype": "bfloat16", "train.max_steps": 2}


@pytest.fixture(scope="session")
def large_vocabulary(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The small world's model with 2,048 words: 16 tiles."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("large") / "model"
    config = Qwen2Config.from_pretrained(world / "model", vocab_size=2048)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return {"model.path": str(folder), "model.tokenizer": str(world / "model")}


def test_each_step_logs_the_dropped_probability(
    large_vocabulary: dict[str, str], recipe: Recipe, steps: Steps, tmp_path: Path
) -> None:
    exact = {"objective.backend": "torch", "train.dtype": "bfloat16", "train.max_steps": 2}
    assert main(["train", str(recipe("exact", exact | large_vocabulary))]) == 0
    assert main(["train", str(recipe("filtered", FILTER | large_vocabulary))]) == 0
    expected, got = steps(tmp_path / "exact"), steps(tmp_path / "filtered")
    of_other_settings = {"positive_dropped", "positive_divergence", "kl", "kept", "router_aux_loss"}
    assert not of_other_settings & expected[0].keys()
    # The rate of the first step is 0 (warm-up), so log-probs are equal in both steps; gradients are
    # not.
    for a, b in zip(expected, got, strict=True):
        for name in ("loss", "positive_logp", "negative_logp"):
            assert math.isclose(a[name], b[name], rel_tol=1e-4), name
        assert 0 < b["positive_dropped"] < 1
        assert 0 < b["negative_dropped"] < 1
        assert a["grad_norm"] != b["grad_norm"]


def test_sft_logs_no_dropped_probability_of_negatives(
    large_vocabulary: dict[str, str], recipe: Recipe, steps: Steps, tmp_path: Path
) -> None:
    sft = {"objective.name": "sft", "train.max_steps": 1}
    assert main(["train", str(recipe("sft", FILTER | sft | large_vocabulary))]) == 0
    (line,) = steps(tmp_path / "sft")
    assert line["negative_dropped"] is None
    assert line["positive_dropped"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.dtype": "float32"}, 'needs bfloat16: set train.dtype = "bfloat16"'),
        ({"objective.backend": "triton"}, "filter_epsilon needs objective.backend = 'auto' or"),
        ({"objective.negative_gamma": 1.0}, "filter_epsilon needs objective.negative_gamma = 0"),
        ({"objective.filter_epsilon": 2.0}, "objective.filter_epsilon must be in [0, 1], got 2.0"),
        ({"objective.name": "unlikelihood"}, "objective.filter_epsilon"),
    ],
)
def test_unsupported_settings_with_a_filter_are_one_line(
    changes: dict[str, Any],
    message: str,
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert main(["train", str(recipe("a", FILTER | changes))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_model_with_scaled_logits_has_no_filter(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from architecture_cases import tiny_config

    folder = tmp_path / "granite"
    tiny_config("granite").save_pretrained(folder)
    (folder / "model.safetensors").touch()
    assert main(["train", str(recipe("a", FILTER | {"model.path": str(folder)}))]) == 2
    assert "filter_epsilon is not available for a model with scaled" in capsys.readouterr().err


def test_weighted_traces_keep_their_weights(
    large_vocabulary: dict[str, str], recipe: Recipe, steps: Steps, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"{i}+1=", "chosen": "2", "rejected": "3", "weight": 1 + (i == 4)}
        for i in range(9)
    ]
    path = tmp_path / "weighted.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.path": str(path), "train.max_steps": 1, "train.dtype": "bfloat16"}
    losses = []
    for name, filtered in (("exact", {}), ("filtered", FILTER)):
        file = recipe(name, filtered | changes | large_vocabulary)
        assert main(["train", str(file)]) == 0
        losses.append(steps(tmp_path / name)[0]["loss"])
    assert math.isclose(*losses, rel_tol=1e-4)
