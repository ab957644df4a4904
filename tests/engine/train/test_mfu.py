"""MFU: its flops equal those that torch counts, and a run writes them for its true documents."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architecture_cases import tiny_config
from data_cases import packed_row
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from redi.engine.cli import main
from redi.engine.config.sections import ModelConfig, ObjectiveConfig, Recipe
from redi.engine.console import Console
from redi.engine.distributed import join_world
from redi.engine.loss.packed_loss import StepTotals
from redi.engine.model.build import build_student, model_config
from redi.engine.model.flops import model_size, training_cost
from redi.engine.plan.cards import CARDS, card_of
from redi.engine.quickstart.task import write_model
from redi.engine.train.loop import _step_figures
from redi.engine.train.mfu import peak_flops

LENGTHS = (5, 21, 9)


@pytest.mark.parametrize(
    "kind",
    [
        "qwen2",
        "phi3",  # one product for query, key and value
        "mixtral",
        "qwen2_moe",  # shared experts with a gate
        "qwen3_moe",
        "olmoe",
        "glm4_moe",  # the first layer is dense
        "ernie4_5_moe",  # a bias of two dimensions
        "deepseek_v3",  # latent attention: keys wider than values
    ],
)
def test_the_flops_of_a_step_equal_those_that_torch_counts(kind: str, tmp_path: Path) -> None:
    """Exactly: forward and backward of a pack by the engine's own student.

    Without a flash kernel, torch runs and counts the whole square of attention and masks half of
    it; the convention counts the other half, once. Experts run one by one and the loss in plain
    PyTorch, because torch's counter does not look into grouped products and custom ops.
    """
    write_model(tmp_path, seed=0)  # for its tokenizer
    config = tiny_config(kind)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    recipe = Recipe(
        model=ModelConfig(path=str(tmp_path), liger="off"),
        objective=ObjectiveConfig(name="redi", backend="reference"),
    )
    config = model_config(recipe)
    config._experts_implementation = "eager"
    pack = packed_row(LENGTHS, 0, 64)
    targets = len(pack.valid_index)
    assert 0 < targets < sum(LENGTHS)  # lm_head counts for trained tokens alone
    with join_world() as world:
        quiet = Console(active=False)
        student, _ = build_student(recipe, config, torch.float32, world, quiet)
        with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
            student(pack, StepTotals(units=2, targets=targets)).loss.backward()
    size = model_size(config)
    squares = sum(length**2 for length in LENGTHS)
    flops = size.step_flops(np.array(LENGTHS), targets)
    assert counted.get_total_flops() == flops + 3 * size.attention * squares
    # Packing counts lm_head for all tokens, because it sees lengths alone.
    cost = training_cost(config).of(np.array(LENGTHS)).sum()
    assert cost == flops + 6 * size.head * (sum(LENGTHS) - targets)


def test_layers_with_a_window_cost_the_pairs_within_it() -> None:
    """Gemma 3: three layers with a window of 4 tokens, one without."""
    size = model_size(tiny_config("gemma3_text"))
    of_layer = 4 * (8 + 8)
    assert size.attention == of_layer
    assert size.windows == ((4, 3 * of_layer),)
    pairs = 10 * 10 + 3 * 4 * (2 * 10 - 4)  # of one document of 10 tokens, twice
    assert size.step_flops(np.array([10]), 0) == 60 * size.trunk + 3 * of_layer * pairs


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_reports_the_flops_of_its_documents(
    recipe: Callable[..., Path],
    redi: Callable[..., subprocess.CompletedProcess[str]],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    ranks: int,
) -> None:
    """Per step and rank, from the documents alone: dummies make no difference, and packs only in
    that a pair has its prompt once, but for its last token."""
    data = tmp_path / "rows.jsonl"
    texts = [("1*1=", "1", "33"), ("7*8=", "56", "1" * 50)]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = recipe(
        "run",
        {
            "data.path": str(data),
            "data.template": "none",
            "train.batch": 2,
            "train.max_steps": 2,
            "train.row_tokens": 64,
            "shard.checkpointing": "full",
        },
    )
    if ranks:
        done = redi("train", path, ranks=ranks)
        assert done.returncode == 0, done.stderr
        said = done.stderr
    else:
        assert main(["train", str(path)]) == 0
        said = capfd.readouterr().err
    assert "step 2/2  loss" in said
    assert "mfu" not in said  # a CPU's peak is unknown
    # The tokenizer of the small world has one token a character, and each trace one end.
    traces = [(len(row[0]), len(text) + 1) for row in texts for text in row[1:]]
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    own = width // heads
    block = width * own * (2 * heads + 2 * config["num_key_value_heads"]) + 3 * width * inner
    flops = 0
    for prompt, completion in traces:
        tokens = prompt + completion
        flops += 6 * layers * block * tokens + 6 * config["vocab_size"] * width * completion
        flops += 6 * layers * heads * own * tokens**2
    # Two ranks have the long pair apart, which is shorter.
    shared = sum(len(prompt) - 1 for prompt, *_ in texts[: 1 if ranks == 2 else 2])
    flops -= 6 * layers * block * shared
    for line in steps(tmp_path / "run"):
        assert line["tokens"] == sum(map(sum, traces))
        assert line["shared_tokens"] == shared
        speed = line["model_tflops"] * 1e12 * line["seconds"] * (ranks or 1)
        assert speed == pytest.approx(flops, rel=1e-12)
        assert line["mfu"] is None
    assert main(["report", str(tmp_path / "run")]) == 0
    shown = capfd.readouterr().out.splitlines()
    (row,) = [line for line in shown if "model TFLOP/s of a rank" in line]
    assert float(row.split()[-1]) > 0
    (row,) = [line for line in shown if "MFU" in line]
    assert row.split()[-1] == "-"


def test_the_peak_is_that_of_the_exact_card_in_bfloat16() -> None:
    for key, card in CARDS.items():
        assert {card_of(name) for name in card.names} == {key}
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA H200 NVL"):
        assert card_of(other) is None
    assert card_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None  # a seventh of its processors
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert peak_flops(torch.device("cuda"), torch.float32) is None


def test_the_progress_line_shows_a_known_mfu() -> None:
    line: dict[str, Any] = {"loss": 0.5, "positive_logp": None, "negative_logp": None}
    line |= {"tokens_per_s": 100.0, "mfu": 0.412}
    assert _step_figures(line)[-1] == "mfu 41.2%"
    assert _step_figures(line | {"mfu": None}) == ["loss 0.5000", "100 tok/s"]
