"""A frozen model of 4 bits: the adapter trains on exactly the rounded weights, on any ranks."""

import json
import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import untimed
from safetensors.torch import load_file

from redi.engine.cli import main
from redi.engine.model.adapter import WEIGHTS
from redi.engine.quickstart.task import write_model

pytestmark = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="the extra 'bitsandbytes' is not installed"
)
Steps = Callable[[Path], list[dict[str, Any]]]
LINEAR = 3 * 7
NF4 = {
    "adapter.rank": 4,
    "adapter.base": "nf4",
    "optim.lr": 1e-2,
    "optim.schedule": "constant",
    "optim.warmup": 0.0,
    "optim.eps": 1e-3,
    "train.max_steps": 3,
    "run.save_every": 1,
    "run.keep": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers have multiples of 64 inputs, those of the small world have not."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, seed=0, hidden_size=128)
    return folder


@pytest.fixture(scope="module")
def run(write_recipe: Callable[..., Path], model: Path, tmp_path_factory: Any) -> Path:
    """The folder of a finished run that exports the adapter alone."""
    folder = tmp_path_factory.mktemp("runs")
    path = write_recipe(folder, "nf4", NF4 | {"model.path": str(model)})
    assert main(["train", str(path)]) == 0
    return folder / "nf4"


@pytest.fixture(scope="module")
def rounded(write_recipe: Callable[..., Path], model: Path, tmp_path_factory: Any) -> Path:
    """The rounded model in float32: merged with an adapter that was not trained."""
    folder = tmp_path_factory.mktemp("rounded")
    changes = {"model.path": str(model), "adapter.merge": True, "optim.lr": 0.0}
    path = write_recipe(folder, "merged", NF4 | changes | {"train.max_steps": 1})
    assert main(["train", str(path)]) == 0
    return folder / "merged" / "export"


def test_linear_layers_of_blocks_alone_are_rounded_as_bitsandbytes_does(
    rounded: Path, model: Path
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    ours, plain = (load_file(folder / "model.safetensors") for folder in (rounded, model))
    changed = {name for name, weight in plain.items() if not torch.equal(weight, ours[name])}
    assert len(changed) == LINEAR
    for name in changed:
        assert "_proj.weight" in name
        codes, state = quantize_4bit(plain[name], blocksize=64, quant_type="nf4")
        assert torch.equal(dequantize_4bit(codes, state), ours[name]), name


@pytest.mark.slow
def test_the_reference_is_the_rounded_model(
    model: Path, recipe: Callable[..., Path], tmp_path: Path, steps: Steps
) -> None:
    """Not the cached scores of the plain one: before the first update DPO's loss is log 2."""
    dpo = {"objective.name": "dpo", "objective.beta": 0.1, "train.max_steps": 1}
    changes = NF4 | dpo | {"model.path": str(model)}
    paths = [recipe(base, changes | {"adapter.base": base}) for base in ("auto", "nf4")]
    assert main(["train", *map(str, paths)]) == 0
    for base in ("auto", "nf4"):
        (line,) = steps(tmp_path / base)
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6), base


@pytest.mark.slow
def test_steps_are_those_of_an_adapter_on_the_rounded_model(
    run: Path, rounded: Path, recipe: Callable[..., Path], tmp_path: Path, steps: Steps
) -> None:
    """Whose steps are those of plain peft (test_adapter.py)."""
    plain = NF4 | {"adapter.base": "auto", "model.path": str(rounded)}
    assert main(["train", str(recipe("plain", plain))]) == 0
    ours, theirs = (load_file(folder / "export" / WEIGHTS) for folder in (run, tmp_path / "plain"))
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < 1e-6, name
    assert max(weight.abs().max() for name, weight in ours.items() if "lora_B" in name) > 1e-2
    for mine, other in zip(steps(run), steps(tmp_path / "plain"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
    ran = json.loads((run / "manifest.json").read_text())["ran"]
    assert ran[0]["linear"] == {"Nf4Linear": LINEAR}
    assert sum(ran[0]["adapter"].values()) == LINEAR


@pytest.mark.slow
def test_a_merged_model_is_the_rounded_one_with_the_adapter(
    run: Path, rounded: Path, model: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """At the end of a run as by `redi export`."""
    merging = recipe("merged", NF4 | {"model.path": str(model), "adapter.merge": True})
    assert main(["train", str(merging)]) == 0
    assert main(["export", str(tmp_path / "merged")]) == 0
    whole, again = (
        load_file(tmp_path / "merged" / folder / "model.safetensors")
        for folder in ("export", "export-step-3")
    )
    base, adapter = load_file(rounded / "model.safetensors"), load_file(run / "export" / WEIGHTS)
    for name, weight in whole.items():
        expected = base[name]
        if "_proj.weight" in name:
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (adapter[f"{layer}.lora_{factor}.weight"] for factor in "AB")
            expected = expected + 2 * b @ a
        assert torch.equal(weight, expected), name
        assert torch.equal(weight, again[name]), name


@pytest.mark.slow
def test_a_resumed_run_ends_bit_equal(
    run: Path, model: Path, recipe: Callable[..., Path], tmp_path: Path, steps: Steps
) -> None:
    ignored = shutil.ignore_patterns("export*", "step-2", "step-3")
    shutil.copytree(run, tmp_path / "nf4", ignore=ignored)
    assert main(["train", str(recipe("nf4", NF4 | {"model.path": str(model)}))]) == 0
    ours, theirs = (folder / "export" / WEIGHTS for folder in (tmp_path / "nf4", run))
    assert ours.read_bytes() == theirs.read_bytes()
    assert untimed(steps(tmp_path / "nf4")) == untimed(steps(run))


LAYOUTS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "recomputed": {"shard.checkpointing": "selective", "shard.reduce": "micro_step"},
    "gathered": {"shard.gather": "step"},
    "replicated": {"shard.replicate": 2},
}


@pytest.mark.slow
def test_two_ranks_train_the_same_adapter(
    run: Path, model: Path, recipe: Callable[..., Path], redi: Callable[..., Any], tmp_path: Path
) -> None:
    settings = NF4 | {"model.path": str(model), "train.row_tokens": 64}
    paths = [recipe(name, settings | changes) for name, changes in LAYOUTS.items()]
    done = redi("train", *paths, ranks=2)
    assert done.returncode == 0, done.stderr
    theirs = load_file(run / "export" / WEIGHTS)
    for name in LAYOUTS:
        ours = load_file(tmp_path / name / "export" / WEIGHTS)
        for key, weight in ours.items():
            assert (weight - theirs[key]).abs().max() < 1e-6, (name, key)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"adapter.dora": True}, 'adapter.dora is not available with adapter.base = "nf4"'),
    "alone": ({"adapter.rank": None}, "adapter.base needs adapter.rank"),
    "inputs": ({}, "has a multiple of 64 inputs"),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_are_one_line(
    recipe: Callable[..., Path], model: Path, world: Path, capfd: Any, what: str
) -> None:
    changes, message = WRONG[what]
    path = {"model.path": str(world / "model" if what == "inputs" else model)}
    assert main(["train", str(recipe("run", NF4 | changes | path)), "--quiet"]) == 2
    line = capfd.readouterr().err.strip()
    assert message in line
    assert "\n" not in line
