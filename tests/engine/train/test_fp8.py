"""Training in float8: which layers run in it, near bfloat16, alike in all packs and modes."""

import json
import math
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from redi.engine.cli import main

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="the extra 'torchao' is not installed"
)
Steps = Callable[[Path], list[dict[str, Any]]]
FP8 = {"train.fp8": True, "train.max_steps": 2, "optim.schedule": "constant", "optim.warmup": 0.0}
LAYERS = 3 * 7
NEAR = 2**-4
"""Half a unit in the last place of e4m3, whose fractions have 3 bits."""


@needs_torchao
@pytest.mark.slow
def test_a_real_run_computes_in_float8_and_exports_plain_weights(
    recipe: Callable[..., Path],
    redi: Callable[..., subprocess.CompletedProcess[str]],
    steps: Steps,
    tmp_path: Path,
) -> None:
    """On two ranks, in bfloat16; the loss is near that without float8, but is another."""
    both = {"train.dtype": "bfloat16", "train.row_tokens": 64}
    paths = [recipe("fp8", FP8 | both), recipe("plain", FP8 | both | {"train.fp8": False})]
    done = redi("train", *paths, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"{LAYERS} of {LAYERS} linear layers (emulated)" in done.stderr
    for run, linear in (("fp8", {"Float8Linear": LAYERS}), ("plain", {})):
        ran = json.loads((tmp_path / run / "manifest.json").read_text())["ran"]
        assert [rank["linear"] for rank in ran] == [linear, linear]
    for ours, theirs in zip(steps(tmp_path / "fp8"), steps(tmp_path / "plain"), strict=True):
        for figure in ("loss", "positive_logp", "negative_logp", "grad_norm"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=NEAR), figure
            assert ours[figure] != theirs[figure], figure
    exports = [tmp_path / run / "export" for run in ("fp8", "plain")]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in exports)
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    AutoModelForCausalLM.from_pretrained(exports[0])


@needs_torchao
@pytest.mark.slow
def test_packs_and_recomputation_change_nothing(
    recipe: Callable[..., Path], steps: Steps, tmp_path: Path
) -> None:
    """Each token has its own scale, so that of its neighbours does not matter."""
    changes: dict[str, dict[str, Any]] = {
        "whole": {},
        "short": {"train.row_tokens": 64},
        "full": {"shard.checkpointing": "full"},
        "selective": {"shard.checkpointing": "selective"},
    }
    for name, change in changes.items():
        assert main(["train", str(recipe(name, FP8 | change))]) == 0
    exports = [tmp_path / name / "export" / "model.safetensors" for name in changes]
    assert exports[0].read_bytes() == exports[2].read_bytes() == exports[3].read_bytes()
    ours, theirs = (steps(tmp_path / name) for name in ("short", "whole"))
    assert ours[0]["micro_steps"] > theirs[0]["micro_steps"]
    for figure in ("loss", "positive_logp", "negative_logp"):
        assert ours[0][figure] == pytest.approx(theirs[0][figure], rel=1e-6), figure


@needs_torchao
@pytest.mark.slow
def test_the_reference_is_computed_in_float8(
    recipe: Callable[..., Path], steps: Steps, tmp_path: Path
) -> None:
    """Not the cached scores without it: before the first update DPO's loss is log 2."""
    dpo = FP8 | {"objective.name": "dpo", "objective.beta": 0.1, "train.max_steps": 1}
    paths = [recipe(name, dpo | {"train.fp8": name == "fp8"}) for name in ("plain", "fp8")]
    assert main(["train", *map(str, paths)]) == 0
    for name in ("plain", "fp8"):
        (line,) = steps(tmp_path / name)
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6), name


def test_what_does_not_go_with_float8_is_one_line(
    recipe: Callable[..., Path], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(**changes: Any) -> str:
        assert main(["train", str(recipe("run", FP8 | changes)), "--quiet"]) == 2
        line: str = capfd.readouterr().err.strip()
        assert "\n" not in line
        return line

    monkeypatch.setattr("redi.engine.extras.find_spec", lambda name: None)
    assert refusal().endswith("torchao is not installed: pip install 'redi-engine[torchao]'")
    monkeypatch.setattr("redi.engine.extras.find_spec", lambda name: True)
    assert "[adapter] freezes them; remove one of them" in refusal(**{"adapter.rank": 4})
