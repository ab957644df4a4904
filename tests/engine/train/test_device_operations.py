"""Operations of a training step: few besides forward and backward, and one wait for the device."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

# Runs the command and counts, in the second step of each recipe: operations by the step's parts,
# without views and allocations, and everything that makes the host wait for the device.
SPY = """
import json, os, sys
from collections import Counter

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from redi.engine.train import loop

ENTER, EXIT = "profiler::_record_function_enter_new", "profiler::_record_function_exit"
FREE = ("aten::empty", "aten::detach", "aten::_unsafe_view", "profiler::")
# These read a value on the host, or have an output whose size depends on one.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor")
found = []


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.parts, self.counts, self.waits = [], Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # counted on the local tensors
        name = func.name()
        if name.startswith(ENTER):
            self.parts.append(args[0])
        elif name.startswith(EXIT):
            self.parts.pop()
        elif not func.is_view and not name.startswith(FREE):
            ours = [part for part in self.parts if part.startswith("redi.")]
            self.counts[ours[-1] if ours else "rest"] += 1
        by_mask = name in ("aten::index.Tensor", "aten::index_put_") and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if by_mask or any(wait in name for wait in WAITS):
            self.waits[f"{name} {self.caller()}"] += 1
        return func(*args, **(kwargs or {}))

    def caller(self):
        frame = sys._getframe(2)
        while frame and not frame.f_globals["__name__"].startswith("redi."):
            frame = frame.f_back
        return frame.f_code.co_name if frame else "?"


def step(student, optimizer, batches, *arguments, original=loop.train_step, **options):
    if batches.step != 2:
        return original(student, optimizer, batches, *arguments, **options)
    counting = Counting()

    def reads(self, *arguments, original):
        counting.waits[f"{original.__name__} {counting.caller()}"] += 1
        return original(self, *arguments)

    names = ("tolist", "numpy", "cpu")
    originals = {name: getattr(torch.Tensor, name) for name in names}
    for name, method in originals.items():
        setattr(
            torch.Tensor, name,
            lambda self, *arguments, method=method: reads(self, *arguments, original=method),
        )
    try:
        with counting:
            return original(student, optimizer, batches, *arguments, **options)
    finally:
        for name, method in originals.items():
            setattr(torch.Tensor, name, method)
        found.append({
            "micro_steps": len(batches.micro_batches),
            "parameters": len(list(student.parameters())),
            "counts": counting.counts,
            "waits": counting.waits,
        })


loop.train_step = step
from redi.engine.cli import main

code = main(sys.argv[2:])
with open(sys.argv[1] + os.environ.get("RANK", "0"), "w") as file:
    json.dump(found, file)
raise SystemExit(code)
"""


def deep_model(world: Path, folder: Path, layers: int) -> Path:
    config = Qwen2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(world / "model")),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(folder)
    return folder


# Most operations of a step, whatever the number of parameters and micro-steps: each fails if one
# operation is made for every parameter (of which 30 blocks have 363).
BUDGET = {"redi.clip": 12, "redi.optimizer": 16}
# Most operations for each micro-step, and for each of its blocks.
PER_MICRO_STEP = {"redi.loss": 8, "rest": 10}
METRICS = 66
METRICS_PER_MICRO_STEP = 16
# On CUDA neither reads a value: `_sdpa` is not used, and `order_tokens` has the packs' valid_index.
ON_A_CPU = {"tolist _sdpa", "tolist order_tokens"}
PER_BLOCK = {"redi.forward": 70, "redi.backward": 120}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_operations_of_a_step_do_not_depend_on_the_number_of_parameters(
    ranks: int,
    world: Path,
    recipe: Callable[..., Path],
    command: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    (tmp_path / "spy.py").write_text(SPY)
    depths = (30, 3)
    paths = []
    for layers in depths:
        model = deep_model(world, tmp_path / f"model-{layers}", layers)
        changes = {"model.path": str(model), "train.max_steps": 2}
        paths.append(recipe(f"layers-{layers}", changes))
    line = command("train", *paths, ranks=ranks if ranks > 1 else 0)
    where = line.index("redi.engine.cli")
    line[where - 1 : where + 1] = [str(tmp_path / "spy.py"), str(tmp_path / "found")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        deep, shallow = json.loads((tmp_path / f"found{rank}").read_text())
        check(deep, shallow, depths[0])


def check(deep: dict[str, Any], shallow: dict[str, Any], layers: int) -> None:
    assert deep["parameters"] > 10 * layers
    micro_steps = deep["micro_steps"]
    assert micro_steps == shallow["micro_steps"] > 0
    counts = deep["counts"]
    for part in counts.keys() - PER_BLOCK.keys():
        assert counts[part] == shallow["counts"][part], f"{part} depends on the parameters"
    for part, most in BUDGET.items():
        assert 0 < counts[part] <= most, part
    for part, most in PER_MICRO_STEP.items():
        assert 0 < counts[part] <= most * micro_steps, part
    assert 0 < counts["redi.metrics"] <= METRICS + METRICS_PER_MICRO_STEP * micro_steps
    for part, most in PER_BLOCK.items():
        assert 0 < counts[part] <= most * layers * micro_steps, part
    waits = {name: n for name, n in deep["waits"].items() if name not in ON_A_CPU}
    assert waits == {"tolist train_step": 1}
