"""The update norm: equal to the change of the weights, in few device operations."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from muon_cases import OPTIONS, drawn, sharded_steps
from rank_pool import RankPool
from run_cases import untimed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from redi.engine.cli import main
from redi.engine.config.sections import ObjectiveConfig, OptimConfig
from redi.engine.loss.packed_loss import PackedLoss
from redi.engine.model.student import Student
from redi.engine.train import optimizer as optimizer_module
from redi.engine.train.optimizer import make_optimizer, squared_update, step_if

TRUE = torch.tensor(True)
LAYERS = 60
BUDGET = 45
"""Device operations of `squared_update` for one block of parameters in each of 2 groups. (One by
one, 120 parameters took about 2,500.)"""


def trained(layers: int, steps: int, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """A model of 2 * layers parameters after some steps, its optimizer, and the weights before the
    last step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(7, 7) for _ in range(layers))).to(dtype)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))
    before: list[torch.Tensor] = []
    for step in range(steps):
        before = [p.detach().clone() for p in model.parameters()]
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn_like(parameter) * 10.0 ** ((number + step) % 4 - 3)
        step_if(optimizer, TRUE)
    return model, optimizer, before


@torch.no_grad()
def loop_form(optimizer: torch.optim.AdamW) -> float:
    """The same sum, parameter by parameter."""
    total = 0.0
    for group in optimizer.param_groups:
        (beta1, beta2), rate, decay = group["betas"], group["lr"], group["weight_decay"]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            step = state["step"].double()
            scale = (1 - beta2**step).sqrt()
            adam = state["exp_avg"] / (state["exp_avg_sq"].sqrt() / scale + group["eps"])
            adam = adam / (1 - beta1**step)
            before = (parameter + rate * adam) / (1 - rate * decay)
            total += (rate * (adam + decay * before)).double().square().sum().item()
    return total


def squared_difference(model: nn.Module, before: list[torch.Tensor]) -> float:
    pairs = zip(model.parameters(), before, strict=True)
    return sum((a.detach() - b).double().square().sum().item() for a, b in pairs)


@pytest.mark.parametrize("block", [2**24, 100, 5])
@pytest.mark.parametrize("steps", [1, 5])
def test_update_equals_the_change_of_the_weights(block: int, steps: int) -> None:
    """In one block, in blocks of a few parameters, and with parameters cut into pieces."""
    model, optimizer, before = trained(4, steps)
    squared = squared_update(optimizer, TRUE, block)
    assert squared.dtype == torch.float64
    assert squared.item() == pytest.approx(loop_form(optimizer), rel=1e-8)
    assert squared.item() == pytest.approx(squared_difference(model, before), rel=1e-8)


def test_update_of_float32_masters() -> None:
    model, optimizer, before = trained(4, 5, torch.float32)
    squared = squared_update(optimizer, TRUE).item()
    assert squared == pytest.approx(squared_difference(model, before), rel=1e-5)


def test_no_update() -> None:
    """A step that was left out, and parameters that have not been trained yet."""
    _, optimizer, _ = trained(4, 2)
    assert squared_update(optimizer, torch.tensor(False)).item() == 0
    _, optimizer, _ = trained(4, 0)
    assert squared_update(optimizer, TRUE).item() == 0


class CountOps(TorchDispatchMode):
    """Counts operations that run on the device: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_few_device_operations() -> None:
    counts = []
    for layers in (LAYERS, 2 * LAYERS):
        model, optimizer, _ = trained(layers, 1, torch.float32)
        assert len(list(model.parameters())) >= 100
        with CountOps() as ops:
            squared_update(optimizer, TRUE)
        counts.append(ops.count)
    assert counts[0] <= BUDGET
    assert counts[0] == counts[1], "the count depends on the number of parameters"


def test_block_size_bounds_the_blocks() -> None:
    tensors = [(torch.arange(n), torch.arange(n)) for n in (30, 0, 250, 60, 40, 1)]
    blocks = optimizer_module._blocks(tensors, 100)
    sizes = [[piece[0].numel() for piece in block] for block in blocks]
    assert sizes == [[30], [100], [100], [50], [60, 40], [1]]


MUON = {"optim.name": "muon", "train.max_steps": 3, "run.save_every": 1, "run.keep": 0}
MUON |= {"optim.eps": 1e-3, "optim.schedule": "constant", "optim.warmup": 0.0}


@pytest.fixture(scope="module")
def muon_run(write_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    assert main(["train", str(write_recipe(folder, "run", MUON))]) == 0
    return folder / "run"


@pytest.mark.slow
def test_muon_on_two_ranks_is_torchs_on_one() -> None:
    """Torch's own fails on sharded matrices of one row, and rounds partial sums of others."""
    pool = RankPool(2)
    try:
        ours = pool.run(sharded_steps)
    finally:
        pool.close()
    for index, (matrix, *gradients) in enumerate(drawn()):
        plain = nn.Parameter(matrix)
        optimizer = torch.optim.Muon([plain], **OPTIONS)
        for gradient in gradients:
            plain.grad = gradient
            optimizer.step()
        for rank in ours:
            torch.testing.assert_close(rank[index], plain.detach(), rtol=1e-6, atol=1e-7)


def test_muon_takes_matrices_of_blocks_and_skips_what_is_not_finite() -> None:
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))
    student = Student(model, PackedLoss(ObjectiveConfig(name="sft")))
    optimizer = make_optimizer(student, OptimConfig(name="muon", lr=1e-2))
    muon, adamw = optimizer.optimizers
    assert len(muon.param_groups[0]["params"]) == 2 * 7
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert id(student.head.weight) in rest
    assert id(model.model.embed_tokens.weight) in rest
    assert sum(len(group["params"]) for group in adamw.param_groups) + 14 == len(
        list(student.parameters())
    )
    for finite in (False, True):
        before = [p.detach().clone() for p in student.parameters()]
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter)
        step_if(optimizer, torch.tensor(finite))
        optimizer.zero_grad()
        changed = squared_update(optimizer, torch.tensor(finite)).item()
        assert changed == pytest.approx(squared_difference(student, before), rel=1e-6)
        assert (changed > 0) == finite
        assert bool(muon.state) == finite


@pytest.mark.slow
def test_a_run_with_muon_resumes_bit_equal(
    muon_run: Path, write_recipe: Any, tmp_path: Path, steps: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(muon_run, run, ignore=shutil.ignore_patterns("export", "step-2", "step-3"))
    assert main(["train", str(write_recipe(tmp_path, "run", MUON))]) == 0
    weights = [folder / "export" / "model.safetensors" for folder in (run, muon_run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert untimed(steps(run)) == untimed(steps(muon_run))
    assert len(steps(run)) == 3


@pytest.mark.slow
def test_a_run_with_muon_does_not_depend_on_the_ranks(
    muon_run: Path, write_recipe: Any, redi: Any, tmp_path: Path, steps: Any
) -> None:
    """But for rounding, which is that of bfloat16: torch orthogonalizes in it."""
    changes = {"train.row_tokens": 64}
    paths = [write_recipe(tmp_path, "two", MUON | changes)]
    paths.append(write_recipe(tmp_path, "replicated", MUON | changes | {"shard.replicate": 2}))
    done = redi("train", *paths, ranks=2)
    assert done.returncode == 0, done.stderr
    for path in paths:
        for ours, theirs in zip(steps(path.with_suffix("")), steps(muon_run), strict=True):
            assert ours["update_norm"] == pytest.approx(theirs["update_norm"], rel=2**-8)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2**-8)
