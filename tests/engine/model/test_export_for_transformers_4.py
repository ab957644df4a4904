"""An export computes the same in transformers 4, which most inference servers have."""

import json
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from redi.engine.cli import main

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 300000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 300000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 300000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
IDS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]]
LOGITS = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).float()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
torch.save((transformers.__version__, logits, tokenizer("12=3").input_ids), sys.argv[3])
"""


@pytest.fixture(params=ROPES)
def export(
    request: pytest.FixtureRequest, world: Path, recipe: Callable[..., Path], tmp_path: Path
) -> Path:
    """What `redi train` exports of a small Llama with this rope."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters=ROPES[request.param],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    path = recipe("run", {"model.path": str(tmp_path / "llama"), "train.max_steps": 1})
    assert main(["train", str(path)]) == 0
    return tmp_path / "run" / "export"


def test_both_generations_of_transformers_find_the_rope_that_was_trained(
    export: Path, tmp_path: Path
) -> None:
    content = json.loads((export / "config.json").read_text())
    trained = AutoConfig.from_pretrained(tmp_path / "llama").rope_parameters
    assert AutoConfig.from_pretrained(export).rope_parameters == trained
    assert content["rope_theta"] == 300000.0
    assert content["torch_dtype"] == "float32"
    scaling = {key: value for key, value in trained.items() if key != "rope_theta"}
    if scaling["rope_type"] == "default":
        assert "rope_scaling" not in content
    else:
        assert content["rope_scaling"] == scaling


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with transformers 4.57."""
    folder = tmp_path_factory.mktemp("transformers-4")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    packages = ["transformers==4.57.*", f"torch=={torch.__version__.partition('+')[0]}"]
    install = [str(python), "-m", "pip", "install", "--quiet", *packages]
    subprocess.run(install, check=True, timeout=1200)
    return python


@pytest.mark.slow
def test_transformers_4_computes_the_same_logits(
    export: Path, transformers_4: Path, tmp_path: Path
) -> None:
    found = []
    for number, python in enumerate((sys.executable, transformers_4)):
        out = tmp_path / f"logits{number}.pt"
        line = [str(python), "-c", LOGITS, str(export), json.dumps(IDS), str(out)]
        subprocess.run(line, check=True, timeout=300)
        found.append(torch.load(out))
    (ours, logits, ids), (theirs, logits_4, ids_4) = found
    assert (ours[0], theirs[:4]) == ("5", "4.57")
    assert ids == ids_4
    torch.testing.assert_close(logits, logits_4, atol=1e-6, rtol=1e-5)
