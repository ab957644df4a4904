"""No process holds a whole model, neither while loading nor while exporting."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# Loads and exports as a run does, and prints by how much the peak memory of the process rose.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from redi.engine.config.sections import ModelConfig, Recipe
from redi.engine.console import Console
from redi.engine.distributed import join_world
from redi.engine.model import export
from redi.engine.model.build import build_student, model_config

def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

path, out = sys.argv[1:]
export.FILE_BYTES = 100_000_000
with join_world() as world:
    before = memory("VmRSS")
    recipe = Recipe(model=ModelConfig(path=path))
    config = model_config(recipe)
    student, tokenizer = build_student(recipe, config, torch.float32, world, Console(active=False))
    loading = memory("VmHWM") - before
    after = memory("VmRSS") - before
    export.export(student, tokenizer, Path(out) / "export", torch.bfloat16, world)
    found = {"loading": loading, "loaded": after, "exporting": memory("VmHWM") - before}
    (Path(out) / f"{world.rank}.json").write_text(json.dumps(found))
"""


def dense() -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    return Qwen2ForCausalLM(config)


def mixture() -> PreTrainedModel:
    """Nearly all of its weights are experts, which files have one by one."""
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=1024,
        moe_intermediate_size=1024,
        num_experts=20,
        num_experts_per_tok=2,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        mlp_only_layers=[],
    )
    return Qwen3MoeForCausalLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("make", [dense, mixture])
def test_a_rank_never_holds_more_than_its_shard_and_a_file(
    make: Callable[[], PreTrainedModel], world: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    whole = 4 * model.num_parameters()
    assert whole > 1.9e9
    del model
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(tmp_path / "model")
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [tmp_path / "program.py", tmp_path / "model", tmp_path]
    subprocess.run(
        [*launch, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=500,
    )
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        print(f"rank {rank}, of {whole}: {found}")
        assert found["loaded"] > 0.45 * whole  # the shard is in memory
        assert found["loading"] < 0.7 * whole
        assert found["exporting"] < 0.75 * whole
