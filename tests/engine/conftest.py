"""A small world for the engine's tests: traces of ragged lengths, a tokenizer, two small models."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from redi.engine.quickstart.task import write_model

ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Bitwise equality holds at equal thread counts: here as in the processes of `ENV`."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with traces.jsonl, model/ (untied head) and tied/ (the same, tied)."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("world")
    write_traces(folder / "traces.jsonl", problems=40)
    write_model(folder / "model", seed=0)
    torch.manual_seed(1)
    config = Qwen2Config.from_pretrained(folder / "model")
    config.tie_word_embeddings = True
    Qwen2ForCausalLM(config).save_pretrained(folder / "tied")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "tied")
    return folder


def write_traces(path: Path, problems: int) -> None:
    """Problems with one to three correct and incorrect traces of 1 to 40 characters."""
    rng = random.Random(5)

    def text(most: int) -> str:
        return "".join(rng.choice("0123456789*") for _ in range(rng.randint(1, most)))

    with path.open("w") as file:
        for number in range(problems):
            traces = [
                {"teacher": "t", "text": text(40), "correct": correct}
                for correct in (True, False)
                for _ in range(rng.randint(1, 3))
            ]
            row = {"id": str(number), "prompt": text(12) + "=", "answer": "", "traces": traces}
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def write_recipe(world: Path) -> Callable[..., Path]:
    """Write a recipe of the small world: `write_recipe(folder, "name", {"train.batch": 2})`."""

    def write(folder: Path, name: str, changes: dict[str, Any] | None = None) -> Path:
        values: dict[str, Any] = {
            "model.path": str(world / "model"),
            "data.path": str(world / "traces.jsonl"),
            "data.cache": str(world / "cache"),
            "data.processes": 1,
            "data.max_tokens": 64,
            "objective.name": "redi",
            "optim.lr": 1e-3,
            "train.batch": 8,
            "train.max_steps": 4,
            "train.epochs": 50,
            "train.row_tokens": 256,
            "run.dir": str(folder / name),
            **(changes or {}),
        }
        content: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, option = key.split(".")
            if value is not None:
                content.setdefault(section, {})[option] = value
        path = folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(content))
        return path

    return write


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe of the small world into the test's folder: `recipe("name", {...})`."""
    return partial(write_recipe, tmp_path)


@pytest.fixture(scope="session")
def command() -> Callable[..., list[str]]:
    """The command line of `redi`, under torchrun when `ranks` is given."""

    def line(*args: object, ranks: int = 0) -> list[str]:
        launch = [sys.executable]
        if ranks:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return [*launch, "-m", "redi.engine.cli", *map(str, args)]

    return line


@pytest.fixture(scope="session")
def redi(command: Callable[..., list[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command `redi` in a process of its own, on one core or under torchrun."""

    def run(*args: object, ranks: int = 0) -> subprocess.CompletedProcess[str]:
        line = command(*args, ranks=ranks)
        return subprocess.run(line, env=ENV, text=True, capture_output=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def steps() -> Callable[[Path], list[dict[str, Any]]]:
    """The step lines of a run's metrics.jsonl."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]

    return read
