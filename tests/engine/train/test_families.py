"""Families of models whose forward differs from Llama's, by the real commands on 2 ranks.

The oracle of the first step is plain transformers in float64, one document at a time.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_cases import draw_weights, tiny_config
from first_step import plain_first_step
from transformers import AutoModelForCausalLM, AutoTokenizer

from redi.engine.cli import main

# Family -> layers by window, as the manifest has them.
FAMILIES: dict[str, dict[str, int]] = {
    "granite": {},
    "cohere": {},
    "mistral": {"4": 4},
    "gemma2": {"4": 2},
    "gemma3_text": {"4": 3},
    "gpt_oss": {"4": 2},
    "nemotron": {},
    "apertus": {},
    "qwen3_next": {},
    "lfm2": {},
}


@pytest.fixture(scope="module")
def trained(
    world: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_recipe: Callable[..., Path],
    redi: Callable[..., Any],
) -> Path:
    """All families by one launch on 2 ranks."""
    folder = tmp_path_factory.mktemp("families")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    recipes = []
    for kind in FAMILIES:
        torch.manual_seed(0)
        config = tiny_config(kind)
        config.vocab_size = len(tokenizer)
        config.max_position_embeddings = 128
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        draw_weights(model)
        model.save_pretrained(folder / f"{kind}-model")
        tokenizer.save_pretrained(folder / f"{kind}-model")
        changes = {
            "model.path": str(folder / f"{kind}-model"),
            "optim.schedule": "constant",
            "optim.warmup": 0.0,
            "train.max_steps": 2,
        }
        recipes.append(write_recipe(folder, kind, changes))
    done = redi("train", *recipes, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_real_run_s_first_step_is_plain_transformers(
    kind: str, trained: Path, steps: Callable[[Path], list[dict[str, Any]]]
) -> None:
    line = steps(trained / kind)[0]
    expected = plain_first_step(trained / f"{kind}.toml")
    for name, value in expected._asdict().items():
        assert line[name] == pytest.approx(value, rel=2e-5), name
    ran = json.loads((trained / kind / "manifest.json").read_text())["ran"]
    layers = tiny_config(kind).num_hidden_layers
    assert [one["attention_calls"] + one["mixers"] for one in ran] == [layers] * 2
    assert [one["windows"] for one in ran] == [FAMILIES[kind]] * 2
    exported = AutoModelForCausalLM.from_pretrained(trained / kind / "export")
    assert type(exported.config) is type(tiny_config(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_can_be_planned(kind: str, trained: Path, tmp_path: Path) -> None:
    found = tmp_path / "plan.json"
    assert main(["plan", str(trained / f"{kind}.toml"), "--json", str(found)]) == 0
    (plan,) = json.loads(found.read_text())
    assert plan["fits"]
