"""The recipes of the paper: their settings, and two steps of each with a small model."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from redi.engine.cli import main
from redi.engine.config import sections as engine_config
from redi.engine.config.parse import load_recipe, train_parser
from redi.engine.quickstart.task import attempt

RECIPES = sorted((Path(engine_config.__file__).parents[1] / "recipes").glob("paper-*.toml"))

# arXiv 2505.24850, appendix: objective, learning rate, batch, epochs, tokens.
PAPER: dict[str, tuple[dict[str, Any], float, int, int, int]] = {
    "paper-sft-3": ({"name": "sft"}, 5e-5, 128, 3, 32768),
    "paper-sft-5": ({"name": "sft"}, 5e-5, 128, 5, 32768),
    "paper-7b-sft": ({"name": "sft"}, 5e-5, 128, 3, 32768),
    "paper-redi": ({"name": "redi", "alpha": 0.8}, 1e-6, 32, 1, 19800),
    "paper-7b-redi": ({"name": "redi", "alpha": 0.8}, 1e-6, 32, 1, 19800),
    "paper-control": ({"name": "redi", "alpha": 0.0}, 1e-6, 32, 1, 19800),
    "paper-dpo": ({"name": "dpo", "beta": 0.001}, 2e-7, 32, 1, 19800),
    "paper-simpo": ({"name": "simpo", "beta": 2.0, "margin": 1.0}, 5e-7, 32, 1, 19800),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_papers_settings(path: Path) -> None:
    recipe = load_recipe(train_parser(), str(path), [str(path)])
    objective, lr, batch, epochs, tokens = PAPER[path.stem]
    assert {key: getattr(recipe.objective, key) for key in objective} == objective
    assert recipe.optim.lr == lr
    assert recipe.optim.weight_decay == 1e-4
    assert (*recipe.optim.betas, recipe.optim.eps) == (0.9, 0.999, 1e-8)
    assert (recipe.optim.schedule, recipe.optim.warmup) == ("linear", 0.1)
    assert recipe.optim.max_grad_norm == 1.0
    assert (recipe.train.batch, recipe.train.epochs, recipe.train.seed) == (batch, epochs, 42)
    assert recipe.data.max_tokens == tokens
    parts = (None, None) if recipe.objective.name == "sft" else (800, 19000)
    assert (recipe.data.max_prompt_tokens, recipe.data.max_completion_tokens) == parts
    assert recipe.data.pairing == "first"
    assert recipe.data.system_prompt is not None
    assert recipe.data.system_prompt.endswith(r"\boxed{}.")
    keep_pairs_together = 2 if recipe.objective.name in ("dpo", "simpo") else 1
    assert recipe.train.row_tokens >= keep_pairs_together * tokens or recipe.objective.name == "sft"


def test_every_setting_has_its_recipe() -> None:
    assert {path.stem for path in RECIPES} == set(PAPER)


@pytest.fixture(scope="module")
def openr1(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    """A folder with data/, made of twenty rows of OpenR1-Math-Raw; the filter keeps twelve."""
    rng = random.Random(1)
    folder = tmp_path_factory.mktemp("openr1")
    path = folder / "rows.jsonl"
    rows = []
    for number in range(20):
        problem = "".join(rng.choice("0123456789") for _ in range(7)) + "="
        correct = [True, False, True]
        rows.append(
            {
                "uuid": str(number),
                "problem": problem,
                "source": "cn_k12" if number < 4 else "olympiads",
                "problem_is_valid": "No" if 4 <= number < 8 else "Yes",
                "generations": [attempt(problem, rng).text for _ in correct],
                "correctness": {
                    "llama_verification": correct,
                    "math_verify_reparsed_answer": correct,
                },
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--out", str(folder / "data"), "--tokenizer", str(world / "model")]
    assert main(["prepare", "openr1", str(path), *options]) == 0
    return folder


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=[] if path.stem == "paper-redi" else pytest.mark.slow
        )
        for path in RECIPES
    ],
)
def test_two_steps_of_a_recipe_run_on_what_prepare_wrote(
    path: Path,
    openr1: Path,
    world: Path,
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(openr1)  # the recipes name data/sft.jsonl and data/pref.jsonl
    recipe = load_recipe(train_parser(), str(path), [str(path)])
    small = {
        "model.path": world / "model",
        "data.cache": tmp_path / "cache",
        "data.processes": 1,
        "train.batch": 4,
        "train.max_steps": 2,
        "run.dir": tmp_path / "run",
    }
    overrides = [f"--{key}={value}" for key, value in small.items()]
    assert main(["train", str(path), *overrides]) == 0
    first, second = steps(tmp_path / "run")
    assert (first["lr"], second["lr"]) == (0.0, recipe.optim.lr)
    assert first["update_norm"] == 0
    assert second["update_norm"] > 0
    assert (first["negative_logp"] is None) == (recipe.objective.name == "sft")
    if recipe.objective.name == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    elif recipe.objective.name == "redi":
        expected = -first["positive_logp"] + recipe.objective.alpha * first["negative_logp"]
        assert first["loss"] == pytest.approx(expected, rel=1e-5)
    elif recipe.objective.name == "sft":
        assert first["loss"] == pytest.approx(-first["positive_logp"], rel=1e-5)
        config = AutoConfig.from_pretrained(tmp_path / "run" / "export")
        assert config.rope_parameters["rope_theta"] == 300_000
        assert config.max_position_embeddings == 32_768
