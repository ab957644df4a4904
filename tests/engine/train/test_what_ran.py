"""What a real run ran on each rank: counted, logged, and written to the manifest."""

import json
import os
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Phi3Config, Phi3ForCausalLM

from redi.bench.traces import InMemoryTraces
from redi.engine.cli import main
from redi.engine.config.sections import ObjectiveConfig
from redi.engine.data.packing import PackedBatch, build_batch
from redi.engine.errors import InputError
from redi.engine.loss.packed_loss import PackedLoss
from redi.engine.model.architecture import (
    check_architecture,
    check_dropout,
    per_document_rope,
)
from redi.engine.model.build import build_model
from redi.engine.model.load import empty_model
from redi.engine.model.student import Student

Redi = Callable[..., subprocess.CompletedProcess[str]]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": None,
}
LAYERS = 3
# Runs the command and records the real calls of attention: their arguments and number.
SPY = """
import json, sys
import torch.nn.functional as F
import transformers.integrations.sdpa_attention as dense
import transformers.modeling_utils as utils

found = {"dense": 0, "masks": 0, "packed": 0}
whole, one = dense.sdpa_attention_forward, F.scaled_dot_product_attention

def spy_dense(*args, **kwargs):
    found["dense"] += 1
    return whole(*args, **kwargs)

def spy_one(*args, **kwargs):
    found["masks"] += kwargs.get("attn_mask") is not None
    found["packed"] += 1
    return one(*args, **kwargs)

utils.AttentionInterface._global_mapping["sdpa"] = spy_dense
F.scaled_dot_product_attention = spy_one

from redi.engine.cli import main
code = main(sys.argv[2:])
import os
with open(f"{sys.argv[1]}{os.environ.get('RANK', '0')}", "w") as file:
    json.dump(found, file)
raise SystemExit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_layer_of_a_real_run_has_packed_attention_on_each_rank(
    recipe: Callable[..., Path], command: Callable[..., list[str]], tmp_path: Path, ranks: int
) -> None:
    spy = tmp_path / "spy.py"
    spy.write_text(SPY)
    line = command("train", recipe("run", {"train.max_steps": 2}), ranks=ranks if ranks > 1 else 0)
    where = line.index("redi.engine.cli")
    line[where - 1 : where + 1] = [str(spy), str(tmp_path / "found")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        found = json.loads((tmp_path / f"found{rank}").read_text())
        assert found["dense"] == 0, "transformers' own attention ran"
        assert found["masks"] == 0, "a mask was built"
        assert found["packed"] >= 2 * LAYERS
    ran = json.loads((tmp_path / "run" / "manifest.json").read_text())["ran"]
    ops = ("token_weights", "signed_cross_entropy", "segment_sum")
    loss = {op: ["torch"] for op in ops}
    one = {
        "attention": "sdpa",
        "attention_calls": LAYERS,
        "context_ranks": 1,
        "windows": {},
        "mixers": 0,
        "loss": loss,
        "liger": {},
        "adapter": {},
        "linear": {},
        "shared_prompts": True,
        "routers": 0,
    }
    assert ran == [one] * ranks
    said = f"ran: attention sdpa in {LAYERS} layers with shared prompts; loss token_weights (torch)"
    assert said in done.stderr


def test_an_empty_model_leaves_the_configuration_of_another_alone(world: Path) -> None:
    config = AutoConfig.from_pretrained(world / "model")
    model = build_model(str(world / "model"), config, "sdpa")
    before = model.config._attn_implementation
    empty_model(model.config)
    empty_model(config, attention="eager")
    assert model.config._attn_implementation == before == "redi_packed"
    assert config._attn_implementation != "eager"


def test_a_model_that_lost_its_attention_is_refused_in_its_first_forward(world: Path) -> None:
    config = AutoConfig.from_pretrained(world / "model")
    model = build_model(str(world / "model"), config, "sdpa")
    # A block with a separate configuration, as a careless copy would have.
    block = model.base_model.layers[1].self_attn
    block.config = AutoConfig.from_pretrained(world / "model", attn_implementation="sdpa")
    student = Student(model.to_empty(device="cpu"), PackedLoss(ObjectiveConfig(name="sft")))
    with pytest.raises(InputError, match=r"ran in 2 of 3 layers \(configured: .*1 of sdpa"):
        student(_row([5, 7]), None)


REFUSED = {
    "doge": "its own mask",
    "llama4_text": "layers of type chunked_attention",
    "falcon": "an attention that cannot be replaced",
    "gptj": "an attention that cannot be replaced",
    "gemma3": "composite model",
    "qwen2_5_vl": "composite model",
    "mistral3": "composite model",
    "phi": "a bias is not supported",
    "bart": "encoder-decoder",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_trained_wrongly_is_refused_before_data_is_read(
    kind: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(kind)
    before = config.to_dict()
    with pytest.raises(InputError, match=REFUSED[kind]) as error:
        check_architecture(str(tmp_path), config)
    assert "\n" not in str(error.value)
    assert config.to_dict() == before


@pytest.mark.parametrize("name", ["train", "prepare", "plan"])
def test_each_command_refuses_a_model_before_it_reads_data(
    name: str,
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "composite"
    AutoConfig.for_model("llava").save_pretrained(folder)
    (folder / "model.safetensors").touch()
    data = tmp_path / "broken.jsonl"
    data.write_text("no JSON\n")
    path = recipe("run", {"model.path": str(folder), "data.path": str(data)})
    assert main([name, str(path)]) == 2
    line = capsys.readouterr().err.strip()
    assert "composite model" in line
    assert "\n" not in line


def test_dropout_on_attention_is_applied_or_refused(world: Path) -> None:
    config = AutoConfig.from_pretrained(world / "model")
    config.attention_dropout = 0.5
    model = build_model(str(world / "model"), config, "sdpa").to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for buffer in model.buffers():
        buffer.fill_(0.5)
    student = Student(model.train(), None)
    first, second = (student.hidden_states(_row([9, 6])) for _ in range(2))
    assert not torch.equal(first, second)
    student.eval()
    first, second = (student.hidden_states(_row([9, 6])) for _ in range(2))
    assert torch.equal(first, second)
    check_dropout("model", config, "flash-2")
    with pytest.raises(InputError, match=r'attention_dropout = 0.5 is not available .*"varlen"'):
        check_dropout("model", config, "varlen")


def longrope(vocabulary: int, short: int) -> Phi3Config:
    """A small Phi-3 with other rotary factors for documents of more than `short` tokens."""
    factors = {"long_factor": [8.0] * 4, "short_factor": [1.0] * 4}
    return Phi3Config(
        **TINY,
        vocab_size=vocabulary,
        initializer_range=0.3,  # otherwise rotary factors have little effect
        max_position_embeddings=64,
        original_max_position_embeddings=short,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )


@pytest.mark.slow
def test_a_run_with_longrope_does_not_depend_on_what_is_packed_together(
    world: Path,
    recipe: Callable[..., Path],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    torch.manual_seed(0)
    model = Phi3ForCausalLM(longrope(len(tokenizer), short=32))
    model.save_pretrained(tmp_path / "phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    first = []
    for tokens in (64, 2048):
        changes = {"model.path": str(tmp_path / "phi"), "train.row_tokens": tokens}
        path = recipe(f"rows-{tokens}", changes | {"train.max_steps": 1})
        for name in ("plan", "train"):
            assert main([name, str(path)]) == 0
        first.append(steps(tmp_path / f"rows-{tokens}")[0])
    assert first[0]["micro_steps"] > first[1]["micro_steps"] == 1
    for figure in ("loss", "positive_logp", "negative_logp"):
        assert first[0][figure] == pytest.approx(first[1][figure], rel=1e-6)


def test_with_longrope_a_document_does_not_depend_on_its_neighbours(world: Path) -> None:
    config = longrope(19, short=8)
    torch.manual_seed(0)
    plain = Phi3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    model = build_model(str(world / "model"), config, "sdpa").to_empty(device="cpu")
    per_document_rope(model, config)
    model.load_state_dict(plain.state_dict())
    for name, buffer in plain.named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer.clone())
    row = _row([6, 20, 7])
    # In float64: how a CPU rounds float32 products depends on their size.
    plain.double()
    packed = Student(model.double().eval(), None).hidden_states(row)
    bounds = row.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        alone = plain.base_model(row.input_ids[None, start:end]).last_hidden_state[0]
        torch.testing.assert_close(packed[start:end], alone, atol=2e-6, rtol=1e-5)


def test_dynamic_rope_is_refused() -> None:
    config = AutoConfig.for_model("llama")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(InputError, match="rope_type is dynamic"):
        check_architecture("model", config)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_moe", "olmo2", "smollm3"])
def test_what_trains_passes(kind: str) -> None:
    check_architecture("model", AutoConfig.for_model(kind))


def _row(lengths: list[int]) -> PackedBatch:
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 10, length) for length in lengths]
    ones = np.ones(len(lengths), np.int64)
    traces: Any = InMemoryTraces(ids, prompt_lengths=ones, signs=ones)
    return build_batch(traces, np.arange(len(lengths)), np.array(lengths))
