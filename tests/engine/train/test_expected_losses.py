"""A short run gives the committed losses: a change of the mathematics does not slip in.

After a change that is meant to alter them: `REDI_WRITE_EXPECTED=1 pytest <this file>`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redi.engine.cli import main
from redi.engine.quickstart.task import make

EXPECTED = Path(__file__).parent / "expected_losses.json"
SHOWN = ("loss", "positive_logp", "negative_logp", "grad_norm", "lr", "tokens")


def test_a_short_run_of_both_stages_gives_the_committed_curve(
    write_recipe: Callable[..., Path],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    make(tmp_path / "data", problems=300, held_out=1, seed=3)
    common = {
        "model.path": str(tmp_path / "data" / "model"),
        "data.path": str(tmp_path / "data" / "train.jsonl"),
        "data.cache": str(tmp_path / "cache"),
        "train.batch": 16,
        "train.max_steps": 20,
        "optim.lr": 3e-3,
    }
    first = write_recipe(tmp_path, "sft", common | {"objective.name": "sft"})
    second = write_recipe(tmp_path, "redi", common | {"model.path": None, "optim.lr": 1e-4})
    assert main(["train", str(first), str(second)]) == 0
    curves = {
        stage: [[line[name] for name in SHOWN] for line in steps(tmp_path / stage)]
        for stage in ("sft", "redi")
    }
    if os.environ.get("REDI_WRITE_EXPECTED"):
        lines = (f'"{s}": [\n' + ",\n".join(map(json.dumps, c)) + "\n]" for s, c in curves.items())
        EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    expected = json.loads(EXPECTED.read_text())
    for stage, curve in curves.items():
        assert len(curve) == len(expected[stage]) == 20
        for ours, theirs in zip(curve, expected[stage], strict=True):
            # Another CPU rounds otherwise, and twenty steps of Adam carry it on.
            assert ours == [x if x is None else pytest.approx(x, rel=1e-3) for x in theirs]
