"""AdamW with moments of 8 bits: torchao's updates, checkpoints that resume, on any ranks."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_adamw_cases import OPTIONS, SHAPES, drawn, sharded_steps
from rank_pool import RankPool
from run_cases import untimed
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from redi.engine.cli import main
from redi.engine.config.sections import OptimConfig
from redi.engine.train import quantized_adamw
from redi.engine.train.optimizer import make_optimizer, squared_update, step_if
from redi.engine.train.quantized_adamw import QuantizedAdamW, is_quantizable
from redi.engine.train.tensor_steps import TensorSteps

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None,
    reason="the extra 'torchao' is not installed",
)
Steps = Callable[[Path], list[dict[str, Any]]]
EIGHT = {"optim.name": "adamw-8bit", "optim.schedule": "constant", "optim.warmup": 0.0}
EIGHT |= {"run.save_every": 1, "run.keep": 0, "train.max_steps": 3}


def stepped(matrix: torch.Tensor, gradients: list[torch.Tensor]) -> Any:
    parameter = nn.Parameter(matrix.clone())
    optimizer = QuantizedAdamW([{"params": [parameter], "weight_decay": 0.1}], **OPTIONS)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach(), optimizer


@needs_torchao
@pytest.mark.parametrize("piece", [2**22, 1024])
def test_steps_are_those_of_torchao(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its blocks of 256 values are within a row; in one piece, and in several."""
    from torchao.optim import AdamW8bit

    monkeypatch.setattr(quantized_adamw, "PIECE", piece)
    matrix, *gradients = drawn((24, 512))
    theirs = nn.Parameter(matrix.clone())
    optimizer = AdamW8bit([theirs], weight_decay=0.1, **OPTIONS)
    with torch.compiler.set_stance("force_eager"):
        for gradient in gradients:
            theirs.grad = gradient
            optimizer.step()
    ours, mine = stepped(matrix, gradients)
    assert torch.equal(ours, theirs.detach())
    state = mine.state[next(iter(mine.state))]
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[theirs][name]
        assert state[name].dtype == torch.uint8
        assert torch.equal(state[name], moment.codes)
        assert torch.equal(state[f"{name}_scale"].view(-1), moment.scale)


def test_which_moments_have_8_bits() -> None:
    sizes = {(64, 96): True, (64, 63): False, (4096,): False, (32, 32): False, (3, 48, 96): True}
    for shape, quantized in sizes.items():
        assert is_quantizable(torch.empty(shape, device="meta")) == quantized, shape


@needs_torchao
def test_a_step_that_is_not_finite_is_skipped_and_the_update_is_measured() -> None:
    model = nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64))
    optimizer = make_optimizer(model, OptimConfig(name="adamw-8bit", lr=1e-2, weight_decay=0.1))
    assert isinstance(optimizer, TensorSteps)
    small, large = optimizer.optimizers
    assert [len(group["params"]) for group in large.param_groups] == [1]
    assert sum(len(group["params"]) for group in small.param_groups) == 3
    for finite in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        step_if(optimizer, torch.tensor(finite))
        optimizer.zero_grad()
        pairs = zip(model.parameters(), before, strict=True)
        changed = sum((p.detach() - b).double().square().sum().item() for p, b in pairs)
        assert squared_update(optimizer, torch.tensor(finite)).item() == pytest.approx(changed)
        assert (changed > 0) == finite
        assert bool(large.state) == finite


@needs_torchao
@pytest.mark.slow
def test_two_ranks_have_the_weights_and_codes_of_one() -> None:
    """Bit for bit, also where the second rank has no row, or fewer rows than the first."""
    pool = RankPool(2)
    try:
        ours = pool.run(sharded_steps)
    finally:
        pool.close()
    for index, shape in enumerate(SHAPES):
        matrix, *gradients = drawn(shape)
        weights, optimizer = stepped(matrix, gradients)
        state = optimizer.state[next(iter(optimizer.state))]
        for rank in ours:
            there, moments = rank[index]
            assert torch.equal(there, weights)
            for name, value in moments.items():
                assert torch.equal(value, state[name]), name


@needs_torchao
@pytest.mark.slow
def test_the_compiled_step_is_that_of_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA it is compiled. A code may differ by rounding."""
    matrix, *gradients = drawn((24, 512))
    plain, _ = stepped(matrix, gradients)
    update = quantized_adamw._compiled()
    monkeypatch.setattr(quantized_adamw, "_plain", lambda: update)
    compiled, _ = stepped(matrix, gradients)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


@needs_torchao
@pytest.mark.slow
def test_a_run_resumes_bit_equal(recipe: Callable[..., Path], tmp_path: Path, steps: Steps) -> None:
    whole = recipe("whole", EIGHT)
    assert main(["train", str(whole)]) == 0
    saved = tmp_path / "whole" / "checkpoints" / "step-1"
    metadata = FileSystemReader(saved).read_metadata().state_dict_metadata
    codes = {n: t for n, t in metadata.items() if n.endswith(("exp_avg", "exp_avg_sq"))}
    eight = [name for name, tensor in codes.items() if tensor.properties.dtype == torch.uint8]
    assert len(eight) == 2 * 3 * 7, "the matrices of 3 blocks"
    assert all(f"{name}_scale" in metadata for name in eight)
    shutil.copytree(
        tmp_path / "whole",
        tmp_path / "again",
        ignore=shutil.ignore_patterns("export", "step-2", "step-3"),
    )
    assert main(["train", str(recipe("again", EIGHT))]) == 0
    weights = [tmp_path / run / "export" / "model.safetensors" for run in ("whole", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert untimed(steps(tmp_path / "again")) == untimed(steps(tmp_path / "whole"))


@needs_torchao
@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(
    recipe: Callable[..., Path], redi: Callable[..., Any], tmp_path: Path, steps: Steps
) -> None:
    """Two ranks go on from a checkpoint of one, and three from one of two. Rounding may change a
    code, so the figures of steps are near those of one rank."""
    settings = EIGHT | {"train.row_tokens": 64}
    one = recipe("one", settings)
    assert main(["train", str(one)]) == 0
    for count, source in ((2, "one"), (3, "two")):
        name = {2: "two", 3: "three"}[count]
        shutil.copytree(
            tmp_path / source,
            tmp_path / name,
            ignore=shutil.ignore_patterns("export", f"step-{count}", "step-3"),
        )
        done = redi("train", recipe(name, settings), ranks=count)
        assert done.returncode == 0, done.stderr
    for name in ("two", "three"):
        for ours, theirs in zip(steps(tmp_path / name), steps(tmp_path / "one"), strict=True):
            for figure in ("loss", "grad_norm", "update_norm"):
                assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3), (name, figure)


def test_a_missing_package_is_one_line(
    recipe: Callable[..., Path], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redi.engine.extras.find_spec", lambda name: None)
    assert main(["train", str(recipe("run", EIGHT)), "--quiet"]) == 2
    line = capfd.readouterr().err.strip()
    assert line.endswith("torchao is not installed: pip install 'redi-engine[torchao]'")
    assert "\n" not in line
