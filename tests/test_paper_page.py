"""docs/paper.md: all of its commands, with a small model and 8 problems a benchmark."""

import json
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
from test_docs import ROOT, Block, blocks_of, run

from redi.engine.evaluate.benchmarks import BENCHMARKS, PRESETS
from redi.engine.quickstart.task import write_model

PAGE = ROOT / "docs" / "paper.md"
MODELS = ("Qwen/Qwen2.5-Math-1.5B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
PROBLEMS = 8
# What this machine lacks: the hub, GPUs, hours.
INSTEAD = {
    "open-r1/OpenR1-Math-Raw": "openr1.jsonl",
    **dict.fromkeys(MODELS, "model"),
    "--gpus 8": "--gpus 1 --dtype float32",
    "--preset paper": "--preset paper --benchmark_dir benchmarks --samples 2 --max_new_tokens 8",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with small recipes, a small model, rows like OpenR1-Math-Raw and benchmarks."""
    rng = random.Random(0)
    write_model(tmp_path / "model", 0, string.printable, hidden_size=16, layers=1)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 512})
    )
    (tmp_path / "engine" / "recipes").mkdir(parents=True)
    for path in (ROOT / "engine" / "recipes").glob("paper-*.toml"):
        text = re.sub(r"^batch = \d+$", "batch = 4", path.read_text(), flags=re.M)
        for model in MODELS:
            text = text.replace(model, "model")
        (tmp_path / "engine" / "recipes" / path.name).write_text(text)
    write(tmp_path / "openr1.jsonl", [row(number, rng) for number in range(12)])
    (tmp_path / "benchmarks").mkdir()
    for name in PRESETS["paper"]["benchmarks"]:
        one = BENCHMARKS[name]
        rows = [
            {
                one.prompt: f"What is {n} + 1?",
                one.answer: [answer] if name == "olympiad" else answer,
            }
            for n, answer in enumerate(map(str, range(1, PROBLEMS + 1)))
        ]
        write(tmp_path / "benchmarks" / f"{name}.jsonl", rows)
    return tmp_path


def row(number: int, rng: random.Random) -> dict[str, Any]:
    """A problem with a correct and an incorrect trace of different lengths."""
    correct = [True, False]
    return {
        "uuid": str(number),
        "problem": f"What is {number} + 1?",
        "source": "olympiads",
        "problem_is_valid": "Yes",
        "generations": [
            f"<think>{'so ' * rng.randint(1, 9)}</think>\\boxed{{{number + one}}}"
            for one in correct
        ],
        "correctness": {
            "llama_verification": correct,
            "math_verify_reparsed_answer": correct,
        },
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.mark.slow
def test_every_command_of_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_docs.ELSEWHERE", {})  # all of it is run here
    commands = [block for block in blocks_of(PAGE) if block.language == "sh"]
    assert len(commands) == 5
    for block in commands:
        text = block.text
        for wanted, done in INSTEAD.items():
            text = text.replace(wanted, done)
        run(Block(block.language, block.fails, text), folder)
    named = set(re.findall(r"`(paper-[\w-]+)`\)", PAGE.read_text()))
    assert len(named) == 8
    for name in named:
        manifest = json.loads((folder / "runs" / name / "manifest.json").read_text())
        assert manifest["world_size"] == 2
        evaluation = folder / "runs" / name / "evaluate-paper"
        summary = json.loads((evaluation / "summary.json").read_text())
        assert [one["problems"] for one in summary["benchmarks"]] == [PROBLEMS] * 5
        lines = (evaluation / "samples.jsonl").read_text().splitlines()
        assert len(lines) == 2 * 5 * PROBLEMS
        assert "<think>" in json.loads(lines[0])["rendered_prompt"]
    table = (folder / "table.md").read_text()
    assert len(re.findall(r"^\|", table, re.M)) == 2 + 9
    assert (folder / "report.html").stat().st_size > 10_000
