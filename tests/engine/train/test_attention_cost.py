"""The measured cost of attention: what it measures, and that a run keeps it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from redi.engine.cli import main
from redi.engine.train import attention_cost
from redi.engine.train.attention_cost import measure, rounded

CPU = torch.device("cpu")


def test_the_measurement_is_a_ratio_of_times_per_flop() -> None:
    """On this CPU: attention by SDPA is neither free nor hundreds of times as slow."""
    config = Qwen2Config(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    assert 0.05 < measure(config, "sdpa", CPU, torch.float32, tokens=2048) < 50


def test_attention_that_takes_longer_counts_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock runs three times as fast in attention."""
    config = Qwen2Config(hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    of_flops = {"attention": 2.0, "product": 1.0}
    calls = iter(["one", "split", "product"])

    def seconds(forward: Any, device: torch.device) -> float:
        call = next(calls)
        pairs = {"one": 1024**2, "split": 1024**2 / attention_cost.SPLIT}
        out = forward()
        if call == "product":
            return of_flops["product"] * 6 * 1024 * 64 * out.shape[1]
        linear = 7.0 * 1024  # what is linear in the tokens cancels
        return of_flops["attention"] * 6 * 2 * 32 * pairs[call] + linear

    monkeypatch.setattr(attention_cost, "_seconds", seconds)
    assert measure(config, "sdpa", CPU, torch.float32, tokens=1024) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("measured", "counted"), [(1.1, 1.0), (1.4, 1.5), (0.1, 0.5), (-3.0, 0.5), (90.0, 4.0)]
)
def test_it_is_rounded_and_bounded(measured: float, counted: float) -> None:
    assert rounded(measured) == counted


def test_a_run_keeps_its_value_in_the_manifest(
    recipe: Callable[..., Path],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """1 on a CPU; a resumed run packs by the value of its manifest, if it has one."""
    path = recipe("run", {"train.max_steps": 1, "train.batch": 12})
    assert main(["train", str(path)]) == 0
    file = tmp_path / "run" / "manifest.json"
    content = json.loads(file.read_text())
    assert content["attention_cost"] == 1.0
    assert "a flop of attention" not in capfd.readouterr().err
    file.write_text(json.dumps(content | {"attention_cost": 2.5}))
    assert main(["train", str(path), "--train.max_steps", "2"]) == 0
    assert json.loads(file.read_text())["attention_cost"] == 2.5
    said = "a flop of attention counts 2.5 times in packing, as measured"
    assert said in capfd.readouterr().err
    del content["attention_cost"]  # as an older version left it
    file.write_text(json.dumps(content))
    assert main(["train", str(path), "--train.max_steps", "3"]) == 0
    assert "a flop of attention" not in capfd.readouterr().err
    assert len(steps(tmp_path / "run")) == 3
