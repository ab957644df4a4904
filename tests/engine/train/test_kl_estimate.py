"""KTO's statistic against plain transformers, one row at a time in float64."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from redi.engine.cli import main
from redi.engine.config.parse import load_recipe, train_parser
from redi.engine.config.sections import ObjectiveConfig
from redi.engine.console import Console
from redi.engine.data.loader import StepLoader
from redi.engine.data.packing import Cost
from redi.engine.distributed import join_world
from redi.engine.model.build import build_student, model_config
from redi.engine.train.kl_estimate import estimate_kl
from redi.engine.train.prepare_data import PreparedData, prepare_data
from redi.engine.train.run import _balance_warnings, _recipe_warnings

KTO = {
    "objective.name": "kto",
    "objective.beta": 0.1,
    "optim.schedule": "constant",
    "optim.warmup": 0.0,
    "train.row_tokens": 96,
}


def prepared(path: Path) -> PreparedData:
    recipe = load_recipe(train_parser(), str(path), [str(path)])
    with join_world() as alone:
        return prepare_data(recipe, alone, Console(active=False))


def row_logps(folder: Path, data: PreparedData, step: int) -> torch.Tensor:
    """Log-prob sums of the completions of a step's mismatched rows, float64 [traces]."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    rows = data.mismatched
    assert rows is not None
    found = []
    for index in data.examples.units[data.schedule.units(step)].reshape(-1).tolist():
        ids = torch.from_numpy(rows.ids(index).astype("int64"))
        with torch.no_grad():
            logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        of_tokens = logps.gather(1, ids[1:, None])[:, 0]
        found.append(of_tokens[int(rows.prompt_lengths[index]) - 1 :].sum())
    return torch.stack(found)


def test_it_is_the_mean_log_ratio_of_the_rows_and_at_least_0(
    recipe: Callable[..., Path], world: Path
) -> None:
    path = recipe("run", KTO)
    data = prepared(path)
    kto = load_recipe(train_parser(), str(path), [str(path)])
    expected = row_logps(world / "model", data, 1).mean().item()
    with join_world() as alone:
        quiet = Console(active=False)
        student, _ = build_student(kto, model_config(kto), torch.float32, alone, quiet)
        # All rows in one pack or in several, and a reference below and above the policy.
        for row_tokens, reference in ((4096, -60.0), (96, -60.0), (96, 0.0)):
            loader = StepLoader(
                data.tokens,
                data.examples,
                data.schedule,
                row_tokens=row_tokens,
                rank=0,
                world_size=1,
                cost=Cost(1.0, 0.0),
                mismatched=data.mismatched,
            )
            batches = next(iter(loader.steps(0)))
            assert (len(batches.mismatched) > 1) == (row_tokens == 96)
            of_rows = torch.full((len(data.tokens),), reference)
            student.objective = replace(student.objective, mismatched_reference=of_rows)
            found = estimate_kl(student, batches, alone.device)
            assert found is not None
            assert found.item() == pytest.approx(max(0.0, expected - reference), rel=1e-5)
            assert (found > 0) == (reference < 0)
            assert student.training


@pytest.mark.parametrize(
    ("positives", "negatives", "weight", "warned"),
    [
        (30, 30, 1.0, ""),
        (40, 30, 1.0, ""),
        (30, 60, 0.4, ""),
        (58, 123, 1.0, "set objective.desirable_weight to a value of 2.12 to 2.83"),
        (600, 1, 1.0, "set objective.undesirable_weight to a value of 450 to 600"),
        (30, 60, 0.0, "set objective.undesirable_weight to a value of 0.375 to 0.5"),
        (30, 0, 1.0, "no trace is incorrect, but kto learns from incorrect ones too"),
        (0, 30, 1.0, "no trace is correct, but kto learns from correct ones too"),
    ],
)
def test_unequal_numbers_of_traces_warn(
    recipe: Callable[..., Path], positives: int, negatives: int, weight: float, warned: str
) -> None:
    path = recipe("run", {**KTO, "objective.undesirable_weight": weight})
    kto = load_recipe(train_parser(), str(path), [str(path)])
    found = _recipe_warnings(kto, 1, positives, negatives)
    assert (len(found) == 1 and warned in found[0]) if warned else not found


@pytest.mark.parametrize(
    ("objective", "positives", "negatives", "warned"),
    [
        ({"name": "signed"}, 30, 0, "no trace is incorrect, but signed learns from incorrect ones"),
        ({"name": "signed", "positive_weight": 0.0}, 30, 0, "no trace is incorrect"),
        ({"name": "signed", "alpha": 0.0}, 30, 0, ""),
        ({"name": "signed"}, 0, 30, "no trace is correct"),
        ({"name": "signed", "positive_weight": 0.0}, 0, 30, ""),
        ({"name": "apo_zero_unpaired", "beta": 0.1}, 30, 0, "no trace is incorrect"),
        ({"name": "apo_zero_unpaired", "beta": 0.1}, 30, 1, ""),
        ({"name": "kd"}, 30, 0, ""),
    ],
)
def test_an_objective_of_both_verdicts_warns_if_one_is_missing(
    objective: dict[str, Any], positives: int, negatives: int, warned: str
) -> None:
    found = _balance_warnings(ObjectiveConfig(**objective), positives, negatives)
    assert (len(found) == 1 and warned in found[0]) if warned else not found


@pytest.mark.slow
def test_a_real_run_compares_with_the_model_before_step_1(
    recipe: Callable[..., Path],
    steps: Callable[[Path], list[dict[str, Any]]],
    world: Path,
    tmp_path: Path,
) -> None:
    """The export of a run of one step is the policy of the second step."""
    paths = [recipe(f"run-{count}", {**KTO, "train.max_steps": count}) for count in (1, 2)]
    assert main(["train", *map(str, paths)]) == 0
    first, second = steps(tmp_path / "run-2")
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    data = prepared(paths[1])
    policy = row_logps(tmp_path / "run-1" / "export", data, 2)
    expected = (policy - row_logps(world / "model", data, 2)).mean().item()
    assert expected > 0.1
    assert second["kl"] == pytest.approx(expected, abs=1e-4)
