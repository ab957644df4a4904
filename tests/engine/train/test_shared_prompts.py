"""A real run computes a prompt once for all its traces in a pack, and learns the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from redi.engine.cli import main
from redi.engine.data.packing import PackedBatch
from redi.engine.model.student import Student


@pytest.mark.parametrize("objective", ["redi", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_run_with_shared_prompts_computes_fewer_tokens_and_learns_the_same(
    recipe: Callable[..., Path],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
) -> None:
    computed: list[int] = []
    whole = Student.hidden_states

    def counted(self: Student, batch: PackedBatch) -> torch.Tensor:
        computed.append(len(batch.input_ids))
        return whole(self, batch)

    monkeypatch.setattr(Student, "hidden_states", counted)
    lines, ran, weights = {}, {}, {}
    for name, share in (("shared", True), ("apart", False)):
        changes = {
            "objective.name": objective,
            "objective.beta": 0.1 if objective == "dpo" else None,
            "train.share_prompts": share,
            "train.row_tokens": 2048,  # each step is one pack
            "train.max_steps": 3,
        }
        computed.clear()
        assert main(["train", str(recipe(name, changes))]) == 0
        lines[name] = steps(tmp_path / name)
        trained = computed[-3:]  # before them the reference, if there is one
        assert trained == [line["tokens"] - line["shared_tokens"] for line in lines[name]]
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        ran[name] = manifest["ran"][0]["shared_prompts"]
        weights[name] = load_file(tmp_path / name / "export" / "model.safetensors")
    assert ran == {"shared": True, "apart": False}
    for shared, apart in zip(lines["shared"], lines["apart"], strict=True):
        assert shared["tokens"] == apart["tokens"]
        assert shared["shared_tokens"] > 0 == apart["shared_tokens"]
        for figure in ("loss", "positive_logp", "negative_logp", "grad_norm", "update_norm"):
            assert shared[figure] == pytest.approx(apart[figure], rel=1e-5)
    for name, value in weights["apart"].items():
        torch.testing.assert_close(weights["shared"][name], value, atol=1e-6, rtol=1e-5)
