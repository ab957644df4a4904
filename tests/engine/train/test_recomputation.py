"""What each mode of activation checkpointing recomputes in a real run, counted; nothing changes."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import op_counter
import pytest
import torch
from architecture_cases import draw_weights, tiny_config
from data_cases import packed_row
from op_counter import OpCounter
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from redi.engine.cli import main
from redi.engine.config.sections import ObjectiveConfig
from redi.engine.loss.packed_loss import PackedLoss
from redi.engine.model.build import build_model
from redi.engine.model.checkpointing import ATTENTION_OPS, checkpoint_blocks
from redi.engine.model.student import Student
from redi.engine.train import preflight

Steps = Callable[[Path], list[dict[str, Any]]]

LAYERS, STEPS, BATCH = 3, 2, 8
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
# Of a block's 7 linear layers the last is not recomputed: nothing needs its result again. Those of
# queries, keys and values have a bias, which makes theirs another op.
PRODUCTS = {"aten::addmm": 3, "aten::mm": 3}
GROUPED = {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}
RECOMPUTED = {"none": set(), "selective": set(), "attention": {"mm"}, "full": {"mm", "attention"}}


def train(path: Path) -> Counter[str]:
    with OpCounter() as ops:
        assert main(["train", str(path)]) == 0
    return ops.ran


def test_attention_runs_once_and_products_twice(
    recipe: Callable[..., Path], steps: Steps, tmp_path: Path
) -> None:
    ran, lines, weights = {}, {}, {}
    for mode in RECOMPUTED:
        changes = {"shard.checkpointing": mode, "train.max_steps": STEPS, "train.batch": BATCH}
        ran[mode] = train(recipe(mode, changes))
        lines[mode] = steps(tmp_path / mode)
        weights[mode] = load_file(tmp_path / mode / "export" / "model.safetensors")
    documents = STEPS * 2 * BATCH
    for mode, again in RECOMPUTED.items():
        assert ran[mode][ATTENTION] == documents * LAYERS * (2 if "attention" in again else 1)
        micro_steps = sum(line["micro_steps"] for line in lines[mode])
        for product, in_block in PRODUCTS.items():
            more = micro_steps * LAYERS * in_block if "mm" in again else 0
            assert ran[mode][product] == ran["none"][product] + more, (mode, product)
        for line, plain in zip(lines[mode], lines["none"], strict=True):
            for figure in ("loss", "grad_norm", "update_norm"):
                assert line[figure] == plain[figure]
        for name, weight in weights[mode].items():
            assert torch.equal(weight, weights["none"][name]), (mode, name)


# Counts ops as above and writes them where the next argument names, then runs the command.
COUNTED = """
import json, os, sys
sys.path.insert(0, os.environ["TESTS"])
from op_counter import OpCounter
from redi.engine.cli import main
with OpCounter() as ops:
    code = main(sys.argv[2:])
with open(f"{sys.argv[1]}{os.environ['RANK']}", "w") as file:
    json.dump(ops.ran, file)
raise SystemExit(code)
"""


@pytest.mark.slow
def test_attention_runs_once_on_each_of_two_ranks(
    recipe: Callable[..., Path], command: Callable[..., list[str]], steps: Steps, tmp_path: Path
) -> None:
    (tmp_path / "counted.py").write_text(COUNTED)
    found = {}
    for mode in ("none", "attention"):
        changes = {"shard.checkpointing": mode, "train.max_steps": STEPS, "train.batch": BATCH}
        line = command("train", recipe(mode, changes), ranks=2)
        where = line.index("redi.engine.cli")
        line[where - 1 : where + 1] = [str(tmp_path / "counted.py"), str(tmp_path / f"{mode}-")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TESTS": str(Path(op_counter.__file__).parent),
        }
        done = subprocess.run(line, env=environment, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        of_ranks = [json.loads((tmp_path / f"{mode}-{rank}").read_text()) for rank in (0, 1)]
        assert sum(ran[ATTENTION] for ran in of_ranks) == STEPS * 2 * BATCH * LAYERS
        found[mode] = of_ranks
    blocks = LAYERS * sum(line["micro_steps"] for line in steps(tmp_path / "none"))
    for plain, recomputed in zip(found["none"], found["attention"], strict=True):
        for product, in_block in PRODUCTS.items():
            assert recomputed[product] == plain[product] + blocks * in_block
    for one, other in zip(steps(tmp_path / "none"), steps(tmp_path / "attention"), strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])


def test_flash_attn_4_cannot_be_kept_and_is_an_error(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "attention_for", lambda *_: ("flash-4", "installed"))
    assert main(["train", str(recipe("r", {"shard.checkpointing": "attention"}))]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert 'shard.checkpointing: "attention" keeps the results of attention' in line
    assert 'use "full", or set model.attention to "varlen"' in line


def test_selective_keeps_the_products_of_experts(
    world: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[],
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    counts = {}
    for mode in ("none", "selective", "full"):
        changes = {"model.path": str(tmp_path / "moe"), "shard.checkpointing": mode}
        ran = train(recipe(mode, changes | {"train.max_steps": 1}))
        counts[mode] = sum(count for op, count in ran.items() if op in GROUPED)
    assert counts["none"] == counts["selective"] > 0
    assert counts["full"] > counts["none"]


@pytest.mark.slow
def test_experts_with_a_bias_are_recomputed(
    world: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers adds it to their product in place, so that the product cannot be kept."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    torch.manual_seed(0)
    config = tiny_config("gpt_oss")
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_weights(model)
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    weights = []
    for mode in ("none", "selective"):
        changes = {"model.path": str(tmp_path / "moe"), "shard.checkpointing": mode}
        train(recipe(mode, changes | {"train.max_steps": 2, "optim.warmup": 0.0}))
        weights.append((tmp_path / mode / "export" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("attention", 1), ("full", 2)])
def test_torch_s_varlen_attention_is_kept(world: Path, mode: str, times: int) -> None:
    """On tensors without memory, as in `redi plan`: here the op has no other implementation."""
    config = AutoConfig.from_pretrained(world / "model")
    model = build_model(str(world / "model"), config, "varlen").train()
    checkpoint_blocks(model, mode)
    student = Student(model, PackedLoss(ObjectiveConfig()))
    pack = packed_row((9, 7), 3, 12)
    with FakeTensorMode(allow_non_fake_inputs=True), OpCounter() as ops:
        student.to_empty(device="cpu")
        student.hidden_states(pack).sum().backward()
    assert ops.ran["torch_attn::_varlen_attn"] == times * LAYERS
    assert ops.ran["torch_attn::_varlen_attn_backward"] == LAYERS


FLASH = [name for name in sorted(ATTENTION_OPS) if name.startswith("flash")]


@pytest.mark.parametrize("name", FLASH)
def test_an_op_of_flash_attn_s_name_is_kept(name: str) -> None:
    """Stand-ins, registered as flash-attn registers its forward: it needs a GPU."""

    def forward(query: Tensor) -> tuple[Tensor, Tensor]:
        return query.sin(), query.sum(-1)

    op = torch.library.custom_op(name, forward, mutates_args=())
    op.register_autograd(
        lambda ctx, grad, _: grad * ctx.saved_tensors[0].cos(),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )

    class Block(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return op(super().forward(x))[0] + x

    counts = {}
    for mode in ("none", "attention", "full"):
        model = PreTrainedModel(PreTrainedConfig())
        model.layers = torch.nn.ModuleList([Block(8, 8), Block(8, 8)])
        checkpoint_blocks(model, mode)
        x = torch.ones(3, 8, requires_grad=True)
        with OpCounter() as ops:
            for block in model.layers:
                x = block(x)
            x.sum().backward()
        counts[mode] = ops.ran[name]
    assert counts == {"none": 2, "attention": 2, "full": 4}
