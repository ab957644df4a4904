"""`[data] mixing_weights` in a run: what is told, what is trained, what a resume may not change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redi.engine.cli import main


def write_pairs(path: Path, count: int, first: int) -> None:
    rows = (
        {"prompt": f"{n}=", "chosen": f"{n}*2", "rejected": f"{n}*34"}
        for n in range(first, first + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_trains_and_tells_its_draws_and_resumes_bit_equal_with_the_same_weights_alone(
    recipe: Callable[..., Path],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("a.jsonl"), 6, 100)
    write_pairs(Path("b.jsonl"), 9, 200)
    settings = {
        "data.path": ["a.jsonl", "b.jsonl"],
        "data.mixing_weights": [2, 0.4],
        "train.batch": 8,
        "train.epochs": 2,
        "train.max_steps": None,
        "run.save_every": 3,
        "run.keep": 0,
    }
    path, run = str(recipe("run", settings)), tmp_path / "run"
    for command in ("prepare", "train"):
        assert main([command, path]) == 0
        shown = [line.split() for line in capsys.readouterr().err.splitlines()]
        assert ["a.jsonl", "2", "6", "12", "75.0%"] in shown
        assert ["b.jsonl", "0.4", "9", "4", "25.0%"] in shown
    manifest = json.loads((run / "manifest.json").read_text())
    assert [one["draws"] for one in manifest["overview"]["mixture"]] == [12, 4]
    lines = steps(run)
    assert [line["epoch"] for line in lines] == [0] * 2 + [1] * 2

    exported = (run / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints" / "step-4")
    assert main(["train", path]) == 0
    assert "resumes after step 3" in capsys.readouterr().err
    assert (run / "export" / "model.safetensors").read_bytes() == exported
    assert [line["loss"] for line in steps(run)] == [line["loss"] for line in lines]

    assert main(["train", path, "--data.mixing_weights", "[2, 1]"]) == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert "another data.mixing_weights ([2.0, 0.4], now [2.0, 1.0])" in refusal
