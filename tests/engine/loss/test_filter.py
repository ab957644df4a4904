"""Training with `[objective] filter_epsilon`: told at each step, and refused where it cannot be."""

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


def test_each_step_tells_what_was_left_out(
    large_vocabulary: dict[str, str], recipe: Recipe, steps: Steps, tmp_path: Path
) -> None:
    exact = {"objective.backend": "torch", "train.dtype": "bfloat16", "train.max_steps": 2}
    assert main(["train", str(recipe("exact", exact | large_vocabulary))]) == 0
    assert main(["train", str(recipe("filtered", FILTER | large_vocabulary))]) == 0
    expected, got = steps(tmp_path / "exact"), steps(tmp_path / "filtered")
    assert "positive_dropped" not in expected[0]
    # The first step's rate is 0 under warm-up: log-probs are exact in both steps, gradients not.
    for a, b in zip(expected, got, strict=True):
        for name in ("loss", "positive_logp", "negative_logp"):
            assert math.isclose(a[name], b[name], rel_tol=1e-4), name
        assert 0 < b["positive_dropped"] < 1
        assert 0 < b["negative_dropped"] < 1
        assert a["grad_norm"] != b["grad_norm"]


def test_sft_has_no_negatives_to_tell_of(
    large_vocabulary: dict[str, str], recipe: Recipe, steps: Steps, tmp_path: Path
) -> None:
    sft = {"objective.name": "sft", "train.max_steps": 1}
    assert main(["train", str(recipe("sft", FILTER | sft | large_vocabulary))]) == 0
    (line,) = steps(tmp_path / "sft")
    assert line["negative_dropped"] is None
    assert line["positive_dropped"] > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train.dtype": "float32"}, 'needs bfloat16: set train.dtype = "bfloat16"'),
        ({"objective.backend": "triton"}, "filter_epsilon needs objective.backend = 'auto' or"),
        ({"objective.negative_gamma": 1.0}, "filter_epsilon needs objective.negative_gamma = 0"),
        ({"objective.filter_epsilon": 2.0}, "objective.filter_epsilon must lie in [0, 1], got 2.0"),
        ({"objective.name": "unlikelihood"}, "objective.filter_epsilon"),
    ],
)
def test_what_a_filter_cannot_do_is_one_line(
    changes: dict[str, Any],
    told: str,
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert main(["train", str(recipe("a", FILTER | changes))]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


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
