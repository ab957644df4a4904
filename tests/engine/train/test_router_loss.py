"""The router loss of a mixture of experts is that of the whole step, in any layout.

The oracle is transformers' own, in float64, on the step's documents one by one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_cases import draw_weights, tiny_config
from first_step import plain_first_step
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from redi.engine.cli import main
from redi.engine.config.sections import Recipe, TrainConfig
from redi.engine.model.router_loss import router_coefficient

Steps = Callable[[Path], list[dict[str, Any]]]
FAMILIES = ("qwen3_moe", "olmoe", "mixtral")
STEADY = {
    "optim.eps": 1e-3,
    "optim.schedule": "constant",
    "optim.warmup": 0.0,
    "train.max_steps": 3,
    "train.router_aux_loss": 0.5,
}
WHOLE = {"train.row_tokens": 4096}
SPLIT = {"train.row_tokens": 64}
# Layout -> ranks and changes.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "whole-1": (1, WHOLE),
    "split-1": (1, SPLIT),
    "recomputed-1": (1, SPLIT | {"shard.checkpointing": "full"}),
    "selective-1": (1, SPLIT | {"shard.checkpointing": "selective"}),
    "offloaded-1": (1, SPLIT | {"shard.checkpointing": "full", "shard.offload": True}),
    "whole-2": (2, WHOLE),
    "split-2": (2, SPLIT),
    "gathered-2": (2, SPLIT | {"shard.gather": "step"}),
    "replicated-2": (2, SPLIT | {"shard.replicate": 2}),
    "context-2": (2, WHOLE | {"shard.context": 2}),
    "context-split-2": (2, SPLIT | {"shard.context": 2, "shard.checkpointing": "full"}),
    "off-1": (1, WHOLE | {"train.router_aux_loss": 0.0}),
    "dummy-1": (1, WHOLE | {"objective.name": "sft", "train.batch": 1}),
    "dummy-2": (2, WHOLE | {"objective.name": "sft", "train.batch": 1}),
    "dummy-context-2": (2, WHOLE | {"objective.name": "sft", "train.batch": 1, "shard.context": 2}),
}


def write_mixture(folder: Path, kind: str, tokenizer: Any, **changes: Any) -> None:
    torch.manual_seed(0)
    config = tiny_config(kind)
    config.vocab_size = len(tokenizer)
    config.max_position_embeddings = 128
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_weights(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
        assert ours["router_aux_loss"] == pytest.approx(theirs["router_aux_loss"], rel=2e-6)
        for norm in ("grad_norm", "update_norm"):
            assert ours[norm] == pytest.approx(theirs[norm], rel=5e-5), norm


def test_the_first_step_of_many_packs_has_the_router_loss_of_transformers(
    world: Path, recipe: Callable[..., Path], steps: Steps, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    write_mixture(tmp_path / "moe", "qwen3_moe", tokenizer, num_hidden_layers=2)
    changes = {**STEADY, **SPLIT, "model.path": str(tmp_path / "moe"), "train.max_steps": 1}
    path = recipe("run", changes)
    assert main(["train", str(path)]) == 0
    line = steps(tmp_path / "run")[0]
    assert line["micro_steps"] > 3
    for name, value in plain_first_step(path)._asdict().items():
        assert line[name] == pytest.approx(value, rel=2e-5), name
    assert line["router_aux_loss"] > 1  # 2 experts of a token: 2 if all are chosen equally often
    (ran,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["ran"]
    assert ran["routers"] == 2


@pytest.fixture(scope="module", params=FAMILIES)
def runs(
    request: pytest.FixtureRequest,
    world: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_recipe: Callable[..., Path],
    redi: Callable[..., Any],
) -> Path:
    """A family in all layouts."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    write_mixture(folder / "moe", kind, AutoTokenizer.from_pretrained(world / "model"))
    for ranks in (1, 2):
        paths = [
            write_recipe(folder, name, STEADY | of_layout | {"model.path": str(folder / "moe")})
            for name, (on, of_layout) in LAYOUTS.items()
            if on == ranks
        ]
        done = redi("train", *paths, ranks=ranks if ranks > 1 else 0)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_layout_and_world_size_do_not_matter_to_mixtures(runs: Path, steps: Steps) -> None:
    whole, off = steps(runs / "whole-1"), steps(runs / "off-1")
    for name in LAYOUTS.keys() - {"off-1"}:
        assert_same(steps(runs / name), steps(runs / "dummy-1") if "dummy" in name else whole)
        ran = json.loads((runs / name / "manifest.json").read_text())["ran"]
        assert {one["routers"] for one in ran} == {4}, name
    for name in ("whole-1", "dummy-1"):
        line, plain = steps(runs / name)[0], plain_first_step(runs / f"{name}.toml")
        assert line["loss"] == pytest.approx(plain.loss, rel=2e-6)
        assert line["grad_norm"] == pytest.approx(plain.grad_norm, rel=2e-5)
    assert "router_aux_loss" not in off[0]
    added = whole[0]["loss"] - off[0]["loss"]
    assert added == pytest.approx(0.5 * whole[0]["router_aux_loss"], rel=1e-5)
    assert whole[0]["grad_norm"] != pytest.approx(off[0]["grad_norm"], rel=1e-3)

    def planned(name: str, *changes: str) -> float:
        line = ["plan", str(runs / f"{name}.toml"), *changes, "--json", str(runs / "plan.json")]
        assert main(line) == 0
        seconds: float = json.loads((runs / "plan.json").read_text())[0]["packing"]["seconds"]
        return seconds

    # One more forward; a step of one pack has none.
    slow = ("--mfu", "1e-6")
    share = planned("split-1", *slow) / planned("split-1", *slow, "--train.router_aux_loss", "0")
    assert 1.2 < share < 1.34
    share = planned("whole-1", *slow) / planned("whole-1", *slow, "--train.router_aux_loss", "0")
    assert share == 1


def test_the_coefficient_is_the_recipe_s_or_the_one_that_the_model_asks_for() -> None:
    quiet, asks = (
        AutoConfig.for_model("qwen3_moe", output_router_logits=asks) for asks in (False, True)
    )
    own, other, off = (Recipe(train=TrainConfig(router_aux_loss=x)) for x in (None, 0.5, 0.0))
    assert router_coefficient(own, quiet) == 0
    assert router_coefficient(own, asks) == asks.router_aux_loss_coef > 0
    assert router_coefficient(other, quiet) == router_coefficient(other, asks) == 0.5
    assert router_coefficient(off, asks) == 0


def test_a_router_loss_that_cannot_be_is_refused_in_one_line(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe("dense", {"train.router_aux_loss": 0.1}))]) == 2
    assert capsys.readouterr().err == (
        "redi: train.router_aux_loss: transformers has no router loss for qwen2; remove it\n"
    )
    AutoConfig.for_model("mixtral", output_router_logits=True).save_pretrained(tmp_path / "moe")
    (tmp_path / "moe" / "model.safetensors").touch()
    changes = {"model.path": str(tmp_path / "moe"), "shard.compile": True}
    assert main(["train", str(recipe("compiled", changes))]) == 2
    error = capsys.readouterr().err
    assert "set train.router_aux_loss = 0" in error
    assert error.count("\n") == 1
