"""`redi plan`: its packing equals training's, its memory that of a real step."""

import json
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from architecture_cases import tiny_config
from data_cases import packed_row
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from redi.engine.cli import main
from redi.engine.config.objectives import OBJECTIVES
from redi.engine.config.parse import load_recipe, train_parser
from redi.engine.config.sections import (
    AdapterConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    Recipe,
    ShardConfig,
    TrainConfig,
)
from redi.engine.console import Console
from redi.engine.data.loader import StepBatches
from redi.engine.data.packing import PackedBatch
from redi.engine.distributed import join_world
from redi.engine.loss.packed_loss import PackedLoss
from redi.engine.model.adapter import add_adapter
from redi.engine.model.build import build_model
from redi.engine.model.checkpointing import checkpoint_blocks
from redi.engine.model.flops import model_size
from redi.engine.model.load import empty_model, read_config
from redi.engine.model.sharding import shard
from redi.engine.model.student import Student
from redi.engine.plan.cards import CARDS, RESERVE, Cluster
from redi.engine.plan.memory import SHALLOW, Load, cache_memory, phase_peaks, step_memory
from redi.engine.plan.packed_run import pack_run
from redi.engine.train.generation_accuracy import HeldOutProblems
from redi.engine.train.optimizer import make_optimizer, squared_update, step_if
from redi.engine.train.prepare_data import prepare_data
from redi.engine.train.step import clip, forward_backward
from redi.engine.train.tensor_steps import TensorSteps

CPU = torch.device("cpu")
TOKENS = 1024


def small_model(folder: Path, layers: int, **changes: Any) -> Path:
    """Config with a small vocabulary, because the loss's memory differs between devices."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 192,
        "vocab_size": 64,
        "max_position_embeddings": TOKENS,
        "tie_word_embeddings": False,
    }
    config = Qwen2Config(num_hidden_layers=layers, **sizes | changes)
    config.save_pretrained(folder)
    return folder


def seven_billion(folder: Path, tokens: int) -> tuple[Recipe, PretrainedConfig, Load]:
    """The shape of Qwen2.5-7B, checkpointed, with packs of two equal sequences."""
    small_model(
        folder,
        layers=28,
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
    )
    recipe = recipe_of(folder, ShardConfig(checkpointing="full"))
    recipe = replace(recipe, train=TrainConfig(row_tokens=tokens, dtype="bfloat16"))
    load = Load(packed_row((tokens // 2, tokens // 2), 0, 64), frozenset([tokens - 2]), 2)
    return recipe, read_config(str(folder), weights=False), load


def small_pack() -> PackedBatch:
    """A positive and a negative of 512 tokens each."""
    return packed_row((TOKENS // 2, TOKENS // 2), 0, 64)


LOAD = Load(small_pack(), frozenset([TOKENS - 2]), micro_steps=2)


def recipe_of(model: Path, section: ShardConfig, **objective: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(model)),
        objective=ObjectiveConfig(**{"name": "redi", **objective}),
        train=TrainConfig(dtype="float32"),
        shard=section,
    )


class RealStep:
    """Bytes of a real step of two micro-steps on one rank, from tensors and from the allocator."""

    def __init__(self, recipe: Recipe) -> None:
        config = read_config(recipe.model.path or "", weights=False)
        with join_world():
            model = build_model(recipe.model.path or "", config, "sdpa")
            zeros = torch.zeros(2)
            objective = PackedLoss(recipe.objective, zeros, mismatched_reference=zeros)
            adapter = None
            if recipe.adapter.wanted:
                adapter = add_adapter(model, recipe.adapter, torch.float32)
            student = Student(model.train(), objective, adapter)
            shard(student, recipe.shard, torch.float32, CPU, TOKENS)
            student.to_empty(device=CPU)
            parameters = list(student.parameters())
            for parameter in parameters:
                torch.nn.init.constant_(parameter, 0.01)
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer = make_optimizer(student, recipe.optim)
            optimizer.step()
            optimizer.zero_grad()
            parts = optimizer.optimizers if isinstance(optimizer, TensorSteps) else [optimizer]
            states = [state for part in parts for state in part.state.values()]
            self.masters = sum(p.to_local().nbytes for p in parameters)
            self.moments = sum(value.nbytes for state in states for value in state.values())
            batches = StepBatches(
                step=1,
                micro_batches=[small_pack(), small_pack()],
                units=torch.zeros(2).numpy(),
                num_sequences=4,
                num_positives=2,
                num_negatives=2,
                num_targets=2 * (TOKENS - 2),
                num_tokens=2 * TOKENS,
                shared_tokens=0,
                micro_steps=2,
                rank_efficiency=1.0,
                mismatched=[small_pack(), small_pack()],
            )
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
                forward_backward(student, batches, CPU, recipe.shard)
                gradients = [p.grad for p in parameters if p.grad is not None]
                self.gradients = sum(gradient.to_local().nbytes for gradient in gradients)
                norm = clip(student, recipe.optim.max_grad_norm)
                step_if(optimizer, norm.isfinite())
                optimizer.zero_grad()
                squared_update(optimizer, norm.isfinite())
        held = self.peak = 0
        for event in trace.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                self.peak = max(self.peak, held)


@pytest.mark.parametrize(
    ("checkpointing", "more", "objective"),
    [
        ("full", {}, {}),
        pytest.param("attention", {}, {}, marks=pytest.mark.slow),
        pytest.param("selective", {}, {}, marks=pytest.mark.slow),
        pytest.param("none", {}, {}, marks=pytest.mark.slow),
        pytest.param("none", {"reduce": "micro_step"}, {}, marks=pytest.mark.slow),
        pytest.param("none", {"gather": "step"}, {}, marks=pytest.mark.slow),
        pytest.param("none", {}, {"name": "dpo", "beta": 0.1}, marks=pytest.mark.slow),
        pytest.param("full", {}, {"name": "kto", "beta": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_the_planned_memory_equals_that_of_a_real_step(
    tmp_path: Path, checkpointing: Any, more: dict[str, Any], objective: dict[str, Any]
) -> None:
    """Weights, moments and gradients within a kilobyte; the allocator's peak within 4 %, because
    attention on a CPU runs document by document and copies its results together."""
    recipe = recipe_of(
        small_model(tmp_path, layers=SHALLOW),
        ShardConfig(checkpointing=checkpointing, **more),
        **objective,
    )
    config = read_config(str(tmp_path), weights=False)
    planned = step_memory(recipe, config, LOAD, 1, CARDS["h100"])
    real = RealStep(recipe)
    assert planned.parts["masters"] == pytest.approx(real.masters, abs=1024)
    assert planned.parts["moments"] == pytest.approx(real.moments, abs=1024)
    assert planned.parts["gradients"] == pytest.approx(real.gradients, abs=1024)
    in_step = planned.total - planned.parts["masters"] - planned.parts["moments"]
    assert in_step == pytest.approx(real.peak, rel=0.04)
    without_gradients = in_step - real.gradients
    assert without_gradients != pytest.approx(real.peak, rel=0.04)


@pytest.mark.slow
def test_an_adapters_memory_equals_that_of_a_real_step(tmp_path: Path) -> None:
    """Moments and gradients are the adapter's alone."""
    recipe = recipe_of(small_model(tmp_path, layers=SHALLOW), ShardConfig(checkpointing="full"))
    recipe = replace(recipe, adapter=AdapterConfig(rank=4))
    config = read_config(str(tmp_path), weights=False)
    planned = step_memory(recipe, config, LOAD, 1, CARDS["h100"])
    real = RealStep(recipe)
    assert planned.parts["masters"] == pytest.approx(real.masters, abs=1024)
    assert planned.parts["moments"] == pytest.approx(real.moments, abs=1024)
    size = model_size(config, recipe.adapter)
    assert real.moments == pytest.approx(8 * size.adapter, rel=1e-2)
    assert real.masters == 4 * (size.parameters + size.adapter)
    in_step = planned.total - planned.parts["masters"] - planned.parts["moments"]
    assert in_step == pytest.approx(real.peak, rel=0.04)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is None, reason="the extra 'torchao' is not installed")
def test_the_memory_of_8_bit_moments_equals_that_of_a_real_step(tmp_path: Path) -> None:
    """Two bytes a weight, and a scale of four for each block of 64 values, a row here."""
    recipe = recipe_of(small_model(tmp_path, layers=SHALLOW), ShardConfig(checkpointing="full"))
    recipe = replace(recipe, optim=OptimConfig(name="adamw-8bit"))
    config = read_config(str(tmp_path), weights=False)
    planned = step_memory(recipe, config, LOAD, 1, CARDS["h100"])
    real = RealStep(recipe)
    tables = 2 * 256 * 4  # the values of the codes
    assert planned.parts["moments"] == pytest.approx(real.moments + tables, abs=1024)
    assert real.moments == pytest.approx(2 * (1 + 4 / 64) * real.masters / 4, rel=0.05)
    in_step = planned.total - planned.parts["masters"] - planned.parts["moments"]
    assert in_step == pytest.approx(real.peak, rel=0.04)


@pytest.mark.slow
def test_an_adapter_of_7b_fits_one_card_of_80_gb(tmp_path: Path) -> None:
    """With traces of 32,768 tokens; all weights do not fit it."""
    recipe, config, load = seven_billion(tmp_path, 32_768)
    adapted = replace(recipe, adapter=AdapterConfig(rank=16))
    size = model_size(config, adapted.adapter)
    assert size.parameters == pytest.approx(7.6e9, rel=0.01)
    usable = CARDS["h100"].usable_memory
    found = step_memory(adapted, config, load, 1, CARDS["h100"])
    assert found.parts["masters"] == pytest.approx(2 * size.parameters + 4 * size.adapter, rel=1e-4)
    assert found.parts["moments"] == pytest.approx(8 * size.adapter, rel=1e-2)
    assert found.total < usable
    assert step_memory(recipe, config, load, 1, CARDS["h100"]).total > usable


needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="the extra 'bitsandbytes' is not installed"
)


@pytest.mark.slow
@needs_bitsandbytes
def test_the_memory_of_a_4_bit_model_equals_that_of_a_real_step(tmp_path: Path) -> None:
    recipe = recipe_of(small_model(tmp_path, layers=SHALLOW), ShardConfig(checkpointing="full"))
    recipe = replace(recipe, adapter=AdapterConfig(rank=4, base="nf4"))
    config = read_config(str(tmp_path), weights=False)
    planned = step_memory(recipe, config, LOAD, 1, CARDS["h100"])
    real = RealStep(recipe)
    assert planned.parts["masters"] == pytest.approx(real.masters, abs=1024)
    quantized = SHALLOW * (4 * 64 * 64 + 3 * 64 * 192)
    size = model_size(config, recipe.adapter)
    rest = 4 * (size.parameters + size.adapter - quantized)
    assert real.masters == quantized * (4 + 32 / 64) / 8 + rest
    in_step = planned.total - planned.parts["masters"] - planned.parts["moments"]
    assert in_step == pytest.approx(real.peak, rel=0.04)


@pytest.mark.slow
@needs_bitsandbytes
def test_a_4_bit_adapter_of_7b_fits_one_card_of_24_gb(tmp_path: Path) -> None:
    """With packs of 8,192 tokens; in 16 bits it does not."""
    recipe, config, load = seven_billion(tmp_path, 8192)
    card = replace(CARDS["a100"], memory=24 * 10**9)
    found = {}
    for base in ("nf4", "auto"):
        adapted = replace(recipe, adapter=AdapterConfig(rank=16, base=base))
        found[base] = step_memory(adapted, config, load, 1, card)
    assert found["nf4"].parts["masters"] / 2**30 == pytest.approx(5.6, abs=0.1)
    assert found["nf4"].total < card.usable_memory < found["auto"].total


@pytest.mark.slow
def test_offloaded_inputs_are_not_on_the_gpu_but_two_at_a_time(tmp_path: Path) -> None:
    """A real step's peak on a CPU has the plan's GPU memory and the host memory of the copies, as
    exact as above."""
    layers = 12
    changes = {"checkpointing": "full", "offload": True}
    recipe = recipe_of(small_model(tmp_path, layers), ShardConfig(**changes))
    recipe = replace(recipe, train=replace(recipe.train, row_tokens=TOKENS))
    config = read_config(str(tmp_path), weights=False)
    of_input = 4 * TOKENS * 64  # a power of two, to which host memory is rounded
    planned = step_memory(recipe, config, LOAD, 1, CARDS["h100"])
    kept = replace(recipe, shard=ShardConfig(checkpointing="full"))
    without = step_memory(kept, config, LOAD, 1, CARDS["h100"])
    real = RealStep(recipe)
    in_step = planned.total - planned.parts["masters"] - planned.parts["moments"]
    assert in_step + (layers - 1) * of_input == pytest.approx(real.peak, rel=0.04)
    assert in_step != pytest.approx(real.peak, rel=0.04)
    assert planned.host == (layers - 1) * of_input
    left_out = without.parts["activations"] - planned.parts["activations"]
    assert left_out == (layers - 2) * of_input


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "attention", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_deep_models_memory_is_extrapolated_from_shallow_ones(
    tmp_path: Path, checkpointing: Any, tied: bool
) -> None:
    small_model(tmp_path, layers=9)
    config = read_config(str(tmp_path), weights=False)
    config.tie_word_embeddings = tied
    recipe = recipe_of(tmp_path, ShardConfig(checkpointing=checkpointing))
    found = step_memory(recipe, config, LOAD, 4, CARDS["h100"])
    whole = phase_peaks(recipe, config, LOAD, 4, CARDS["h100"])
    phase, parts = max(whole.items(), key=lambda peak: peak[1].total())
    assert found.phase == phase[1]
    assert found.total == pytest.approx(parts.total(), rel=1e-4)
    for name, size in found.parts.items():
        assert size == pytest.approx(parts[name], rel=1e-3, abs=1024), name


@pytest.mark.slow
def test_gradients_are_whole_on_each_rank_until_the_step_ends_or_sharded(tmp_path: Path) -> None:
    config = read_config(str(small_model(tmp_path, layers=SHALLOW)), weights=False)
    count = sum(parameter.numel() for parameter in empty_model(config).parameters())
    for section, shards in (
        (ShardConfig(checkpointing="full"), 1),
        (ShardConfig(checkpointing="full", reduce="micro_step"), 8),
        (ShardConfig(checkpointing="full", reduce="micro_step", replicate=2), 4),
    ):
        peaks = phase_peaks(recipe_of(tmp_path, section), config, LOAD, 8, CARDS["h100"])
        assert peaks[0, "loss"]["gradients"] < 1024  # only the figures that a pack reports
        assert peaks[1, "loss"]["gradients"] == pytest.approx(4 * count / shards, abs=1024)


@pytest.mark.parametrize("replicate", [1, 2])
def test_weights_gathered_once_are_whole_on_each_rank_between_micro_steps(
    tmp_path: Path, replicate: int
) -> None:
    config = read_config(str(small_model(tmp_path, layers=SHALLOW)), weights=False)
    count = sum(parameter.numel() for parameter in empty_model(config).parameters())
    section = ShardConfig(checkpointing="full", gather="step", replicate=replicate)
    recipe = replace(recipe_of(tmp_path, section), train=TrainConfig(dtype="bfloat16"))
    peaks = phase_peaks(recipe, config, LOAD, 8, CARDS["h100"])
    assert peaks[1, "forward"]["gathered"] == pytest.approx(2 * count, abs=1024)
    assert peaks[1, "forward"]["gradients"] == pytest.approx(4 * count, abs=1024)
    assert peaks[2, "update"]["gathered"] < 1024
    shards = 8 // replicate
    assert peaks[2, "update"]["masters"] == pytest.approx(4 * count / shards, abs=1024)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_activations_of_ranks_that_share_a_pack_are_their_share(
    tmp_path: Path, checkpointing: Any
) -> None:
    config = read_config(str(small_model(tmp_path, layers=SHALLOW)), weights=False)
    peaks = {}
    for context in (1, 2, 4):
        recipe = recipe_of(tmp_path, ShardConfig(context=context, checkpointing=checkpointing))
        peaks[context] = step_memory(recipe, config, LOAD, 4, CARDS["h100"])
    assert {peak.phase for peak in peaks.values()} == {"backward"}
    for context in (2, 4):
        share = peaks[context].parts["activations"] / peaks[1].parts["activations"]
        assert share == pytest.approx(1 / context, rel=0.05)
        for part in ("masters", "moments"):
            assert peaks[context].parts[part] == peaks[1].parts[part]


@pytest.mark.slow
def test_the_loss_is_counted_as_on_a_gpu(tmp_path: Path) -> None:
    """In bfloat16: gradients and a chunk of logits in float32; p - onehot is kept if it fits."""
    width, tokens = 64, TOKENS - 2
    config = read_config(str(small_model(tmp_path, layers=1)), weights=False)
    simpo = {"name": "simpo", "beta": 2.0}
    for objective, vocab, rows, keeps in (
        ({}, 150_000, 1024, False),
        (simpo, 1_000_000, 1024, True),  # 2 GB, of at most 10 on this GPU
        (simpo, 6_000_000, 512, False),  # 12 GB
    ):
        config.vocab_size = vocab
        recipe = replace(
            recipe_of(tmp_path, ShardConfig(), **objective), train=TrainConfig(dtype="bfloat16")
        )
        chunk = 4 * rows * vocab  # float32 logits, rounded to 512 rows
        gradients = 4 * (TOKENS + vocab) * width
        if keeps:
            expected = chunk + 2 * tokens * vocab
        else:
            # The backward of simpo holds its gradients in both precisions at once.
            rounded = gradients // 2 if objective else 0
            expected = chunk + gradients + rounded
        found = phase_peaks(recipe, config, LOAD, 1, CARDS["h100"])[1, "loss"]["loss"]
        assert found == pytest.approx(expected, rel=0.01), (objective, vocab)


@pytest.mark.slow
def test_a_pack_too_large_to_be_kept_counts_although_another_is_kept(tmp_path: Path) -> None:
    config = read_config(str(small_model(tmp_path, layers=1)), weights=False)
    config.vocab_size = 6_000_000
    recipe = recipe_of(tmp_path, ShardConfig(), name="simpo", beta=2.0)
    recipe = replace(recipe, train=TrainConfig(dtype="bfloat16"))
    found = []
    for targets in ({TOKENS - 2}, {TOKENS - 2, 10}):
        load = replace(LOAD, targets=frozenset(targets))
        peaks = phase_peaks(recipe, config, load, 1, CARDS["h100"])
        found.append(peaks[1, "loss"]["loss"])
    assert found[1] >= found[0]


def test_keys_and_values_equal_the_cache_of_generation(tmp_path: Path) -> None:
    config = read_config(str(small_model(tmp_path, layers=2)), weights=False)
    config.num_key_value_heads = 2
    problems = HeldOutProblems(
        prompts=["12="] * 3,
        prompt_ids=[(1, 2, 3, 4, 5)] * 3,
        answers=["3"] * 3,
        tokenizer=None,
        checker="exact",
        answer_pattern=None,
        max_new_tokens=7,
        batch_size=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    cache = model(torch.zeros(3, 12, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_memory(recipe_of(tmp_path, ShardConfig()), config, problems) == kept
    endless = replace(problems, max_new_tokens=10 * TOKENS)
    assert cache_memory(recipe_of(tmp_path, ShardConfig()), config, endless) == kept * TOKENS // 12


@pytest.mark.slow
def test_generation_holds_all_weights_in_the_compute_dtype(
    recipe: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    """On 4 ranks a quarter of the masters and moments, but every weight in bfloat16."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "1=", "chosen": "12", "rejected": "3", "answer": "12"}\n')
    checked = {"eval.path": str(problems), "eval.checker": "exact", "eval.max_new_tokens": 1}
    (plan,) = planned(recipe("run", checked), "--ranks", 4, tmp_path / "plan.json")
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    count = sum(parameter.numel() for parameter in model.parameters())
    sharded = (4 + 8) * count / 4  # masters and moments
    assert plan["generating"] == pytest.approx(sharded + 2 * count, rel=0.01)


@pytest.mark.slow
def test_settings_are_not_said_to_fit_if_generation_does_not(
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    problems = tmp_path / "problems.jsonl"
    row = '{{"prompt": "{}=", "chosen": "12", "rejected": "3", "answer": "12"}}\n'
    problems.write_text("".join(row.format(number) for number in range(400)))
    checked = {"eval.path": str(problems), "eval.checker": "exact", "eval.max_new_tokens": 400}
    path = recipe("run", {**checked, "eval.batch_size": 400, "shard.checkpointing": "full"})
    (roomy,) = planned(path, tmp_path / "plan.json")
    assert "the fastest settings that fit" in " ".join(capfd.readouterr().err.split())
    step = sum(roomy["memory"]["parts"].values())
    assert 1.1 * step < roomy["generating"]
    memory = int((step + roomy["generating"]) / 2 / (1 - RESERVE))
    monkeypatch.setitem(CARDS, "h100", replace(CARDS["h100"], memory=memory))
    (tight,) = planned(path, tmp_path / "plan.json")
    said = " ".join(capfd.readouterr().err.split())
    assert not tight["fits"]
    assert "generation for eval.checker does not fit" in said
    assert "the fastest settings that fit" not in said
    assert "settings whose training steps fit" in said or "no setting of train.row_tokens" in said
    assert tight["generating"] == roomy["generating"]


@pytest.mark.parametrize("kind", ["qwen2", "phi3", "olmo2", "glm4"])
def test_recomputation_costs_the_flops_that_torch_counts(kind: str) -> None:
    """Exactly, for dense blocks. The last two have a norm after their last product."""
    config = tiny_config(kind)
    size = model_size(config)
    tokens = 16
    for checkpointing in ("none", "selective", "attention", "full"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        checkpoint_blocks(model, checkpointing)
        with FlopCounterMode(display=False) as counted:
            logits = model(torch.ones(1, tokens, dtype=torch.long), use_cache=False).logits
            logits.sum().backward()
        counts = counted.get_flop_counts()["Global"]
        products = sum(flops for op, flops in counts.items() if "mm" in str(op))
        cost = size.run_cost(checkpointing)
        assert products == cost.linear * tokens, checkpointing
        again = 2 * 0.5 * size.attention if checkpointing == "full" else 0
        assert cost.quadratic == 3 * size.attention + again
        # A forward that counts experts, of the same products without lm_head.
        counting = size.run_cost(checkpointing, counts_experts=True)
        assert counting.linear - cost.linear == 2 * size.trunk
        assert counting.quadratic - cost.quadratic == size.attention


def planned(*arguments: object) -> list[dict[str, Any]]:
    """Run `redi plan ... --json` and return the contents of the file."""
    path = Path(str(arguments[-1]))
    assert main(["plan", *map(str, arguments[:-1]), "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
def test_each_objective_has_a_plan(recipe: Callable[..., Path], tmp_path: Path) -> None:
    names = [name for name in OBJECTIVES if name != "kd"]  # which needs a teacher's table
    paths = []
    for name in names:
        beta = {"objective.beta": 0.1} if "beta" in OBJECTIVES[name].parameters else {}
        paths.append(recipe(name, {"objective.name": name, "train.batch": 16} | beta))
    plans = dict(zip(names, planned(*paths, tmp_path / "plan.json"), strict=True))
    same_units = {"positives": "sft", "traces": "signed", "pairs": "redi", "margins": "dpo"}
    for name, plan in plans.items():
        assert plan["fits"], name
        assert plan["memory"]["parts"]["loss"] > 0, name
        flops = plan["packing"]["flops"]
        others = plans[same_units[OBJECTIVES[name].units]]["packing"]["flops"]
        assert flops > others if name == "kto" else flops == others, name


def test_a_plan_counts_the_forward_of_mismatched_rows(recipe: Callable[..., Path]) -> None:
    kto = {"objective.name": "kto", "objective.beta": 0.1, "train.row_tokens": 96}
    cluster = Cluster(2, "h100", 1e-6)
    path = recipe("kto", kto)
    of = load_recipe(train_parser(), str(path), [str(path)])
    with join_world() as alone:
        data = prepare_data(of, alone, Console(active=False))
    assert data.mismatched is not None
    size = model_size(read_config(of.model.path or "", weights=False))
    for gather in ("micro_step", "step"):
        chosen = replace(of, shard=replace(of.shard, gather=gather))
        quiet = Console(active=False)
        found, _ = pack_run(chosen, size, data, cluster, quiet)
        without, _ = pack_run(chosen, size, replace(data, mismatched=None), cluster, quiet)
        steps = [data.schedule.units(step) for step in range(1, found.steps + 1)]
        lengths = data.mismatched.lengths[data.examples.units[np.concatenate(steps), 0]]
        # 2 flops per weight and token, and per dimension and pair of tokens (length^2 / 2 pairs).
        products = 2 * (size.trunk + size.head) * lengths.sum()
        flops = products + size.attention * (lengths**2).sum()
        assert found.flops - without.flops == pytest.approx(flops / found.steps)
        waited = found.slowest_flops - without.slowest_flops
        assert flops / found.steps / 2 <= waited < flops / found.steps
        # At this speed compute is all that takes time.
        assert found.seconds - without.seconds == pytest.approx(waited / cluster.flops_per_second)


@pytest.mark.slow
def test_the_plan_equals_the_training_that_follows(
    recipe: Callable[..., Path],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Steps with more tokens than a pack; the second recipe gets the first one's model."""
    sft = recipe("sft", {"objective.name": "sft", "train.max_steps": 3, "train.batch": 16})
    redi = recipe("redi", {"model.path": None, "train.max_steps": 3, "train.batch": 16})
    plans = planned(sft, redi, "--mfu", "1e-6", tmp_path / "plan.json")
    shown = capfd.readouterr().err
    assert "assumed, not measured" in shown
    assert main(["train", str(sft), str(redi)]) == 0
    for name, plan in zip(("sft", "redi"), plans, strict=True):
        lines = steps(tmp_path / name)
        found = plan["packing"]
        assert found["steps"] == len(lines)
        assert found["tokens"] == sum(line["tokens"] for line in lines)
        micro_steps = [line["micro_steps"] for line in lines]
        assert found["micro_steps"] == pytest.approx(sum(micro_steps) / len(lines))
        assert found["most_micro_steps"] == max(micro_steps) > 1
        efficiencies = [line["rank_efficiency"] for line in lines]
        assert found["rank_efficiency"] == pytest.approx(sum(efficiencies) / len(lines))
        # A single rank never waits: its time is that of all flops. At a millionth of an H100's
        # peak they take longer than to launch the kernels.
        assert found["seconds"] == pytest.approx(found["flops"] / (1e-6 * 989e12))
        assert plan["tokens_per_s"] == pytest.approx(found["tokens"] / plan["seconds"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_hook_of_autograd_ends_the_plan(
    number: signal.Signals, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A KeyboardInterrupt there would abort the process in native code."""
    (tmp_path / "signalled.py").write_text(
        "import os, signal, sys\n"
        "from torch.autograd.graph import saved_tensors_hooks\n"
        "from redi.engine import cli\n"
        "from redi.engine.plan import memory\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def unpack(tensor):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    return tensor\n"
        "def hooked(*arguments, original=memory.forward_backward):\n"
        "    with saved_tensors_hooks(lambda tensor: tensor, unpack):\n"
        "        return original(*arguments)\n"
        "memory.forward_backward = hooked\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    line = [sys.executable, "-m", "signalled", "plan", str(recipe("run"))]
    done = subprocess.run(line, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1] == "redi: interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["micro_step", "step"])
def test_the_plan_for_two_ranks_equals_their_training(
    gather: str,
    recipe: Callable[..., Path],
    redi: Callable[..., Any],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    changes = {"train.batch": 9, "train.row_tokens": 96, "shard.gather": gather}
    path = recipe("run", changes)
    (plan,) = planned(path, "--ranks", 2, tmp_path / "plan.json")
    assert redi("train", path, ranks=2).returncode == 0
    lines = steps(tmp_path / "run")
    efficiencies = [line["rank_efficiency"] for line in lines]
    found = plan["packing"]
    assert found["most_micro_steps"] == max(line["micro_steps"] for line in lines) > 1
    assert found["rank_efficiency"] == pytest.approx(sum(efficiencies) / len(lines))
    assert found["worst"]["rank_efficiency"] == pytest.approx(min(efficiencies))
    assert efficiencies[found["worst"]["step"] - 1] == min(efficiencies)
    # float64 sums of packs in another order
    slowest = found["flops"] / 2 / found["slowest_flops"]
    assert slowest == pytest.approx(found["rank_efficiency"], rel=0.01)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_prints_settings_that_do(
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The printed lines, pasted into the recipe, are planned to fit."""
    changes = {"train.batch": 16, "train.row_tokens": 512, "train.dtype": "float32"}
    path = recipe("run", changes)
    (roomy,) = planned(path, "--ranks", 2, tmp_path / "roomy.json")
    assert roomy["fits"]
    assert roomy["fastest"]["shard"]["checkpointing"] == "none"
    (frugal,) = planned(
        path,
        *("--ranks", 2, "--shard.checkpointing", "full", "--shard.reduce", "micro_step"),
        *("--train.row_tokens", 128, tmp_path / "frugal.json"),
    )
    peaks = [sum(plan["memory"]["parts"].values()) for plan in (frugal, roomy)]
    assert peaks[0] < 0.8 * peaks[1]
    memory = int(1.2 * peaks[0] / (1 - RESERVE))
    monkeypatch.setitem(CARDS, "h100", replace(CARDS["h100"], memory=memory))
    capfd.readouterr()
    (plan,) = planned(path, "--ranks", 2, tmp_path / "tight.json")
    assert not plan["fits"]
    shown = capfd.readouterr().err
    lines = tomllib.loads(shown[shown.index("[train]") :])
    found = plan["fastest"]
    assert lines == {"train": {"row_tokens": found["row_tokens"]}, "shard": found["shard"]}
    assert found["peak"] <= plan["card_memory"]
    content = tomllib.loads(path.read_text())
    content["train"] |= lines["train"]
    content["shard"] = lines["shard"]
    path.write_text(tomli_w.dumps(content))
    (again,) = planned(path, "--ranks", 2, tmp_path / "again.json")
    assert again["fits"]
    assert again["fastest"] == found
    # Each trace of a pack adds some bytes, and a full row is counted with the longest traces.
    assert sum(again["memory"]["parts"].values()) <= found["peak"] + 1024


@pytest.mark.slow
def test_a_plan_that_no_setting_makes_fit_names_the_remedies(
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The peak is in the update, which neither recomputation nor shorter rows lower."""
    monkeypatch.setitem(CARDS, "h100", replace(CARDS["h100"], memory=2**10))
    (plan,) = planned(recipe("run", {"train.batch": 2}), tmp_path / "plan.json")
    assert plan["memory"]["phase"] == "update"
    assert plan["fastest"] is None
    assert "no setting of train.row_tokens and [shard] fits; use more" in capfd.readouterr().err


def test_a_vocabulary_smaller_than_the_tokenizers_is_one_line(
    recipe: Callable[..., Path], world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "model", tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 4}))
    path = recipe("run", {"model.path": str(tmp_path / "small")})
    for command in ("plan", "prepare"):
        assert main([command, str(path)]) == 2
        assert "tokens, the model's vocabulary only 4" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "0"], "ranks must be >= 1, got 0"),
        (["--card", "h1000"], "card: h1000 is not known; available: a100, h100, h200, b200"),
        (["--mfu", "0"], "mfu, a fraction of the peak, must be in (0, 1], got 0"),
        (["--mfu", "2"], "mfu, a fraction of the peak, must be in (0, 1], got 2"),
        (["--ranks", "4", "--shard.replicate", "3"], "shard.replicate = 3 does not divide"),
        (["--model.path", "./nowhere"], "model.path: ./nowhere: no such directory"),
        (["--json", "no/such/plan.json"], "json: no/such: no such directory"),
        (["--json", "."], "json: . is a directory; name a file"),
    ],
)
def test_wrong_input_is_one_line(
    recipe: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    assert main(["plan", str(recipe("run")), "--quiet", *arguments]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.slow
def test_a_recipe_may_change_the_model_of_the_previous_one(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    short = {"data.max_tokens": 30, "data.overlong": "drop", "model.max_position_embeddings": 30}
    sft = recipe("sft", {"objective.name": "sft", "train.batch": 4, **short})
    redi = recipe("redi", {"model.path": None, "model.max_position_embeddings": 512})
    assert len(planned(sft, redi, tmp_path / "plan.json")) == 2


def test_no_recipe_and_a_recipe_without_a_model_are_one_line(
    recipe: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan"]) == 2
    assert main(["plan", str(tmp_path / "none.toml")]) == 2
    assert main(["plan", str(recipe("run", {"model.path": None}))]) == 2
    missing, unknown, without = capfd.readouterr().err.splitlines()
    assert "RECIPE.toml" in missing
    assert "no such recipe file" in unknown
    assert "model.path is missing" in without
