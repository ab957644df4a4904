"""Runs on data with spans: rewards of steps train, whatever the ranks and packs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from run_cases import untimed
from transformers import AutoModelForCausalLM

from redi.engine.cli import main
from redi.engine.config.parse import load_recipe, train_parser
from redi.engine.console import Console
from redi.engine.distributed import join_world
from redi.engine.train.prepare_data import prepare_data

Steps = Callable[[Path], list[dict[str, Any]]]
STEP = 7
"""Characters of a step of reasoning in the data of these tests."""


def write_spans(world: Path, path: Path, reward: Callable[[int, int], float]) -> str:
    """The traces of the small world, with a span for each step: `reward(trace, step)`."""
    rows = []
    for line in (world / "traces.jsonl").read_text().splitlines():
        row = json.loads(line)
        for number, trace in enumerate(row["traces"]):
            trace["spans"] = [
                [start, min(start + STEP, len(trace["text"])), reward(number, step)]
                for step, start in enumerate(range(0, len(trace["text"]), STEP))
            ]
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))
    return str(path)


def rewards(trace: int, step: int) -> float:
    """Of either sign, some 0; the whole last trace of a problem may be masked."""
    return (1.0, -0.5, 0.0, 2.0)[(step + trace) % 4]


CASES: dict[str, dict[str, Any]] = {
    "redi": {"objective.name": "redi"},
    "token": {"objective.name": "sft", "objective.normalisation": "token"},
    "unlikelihood": {"objective.name": "unlikelihood"},
    "simpo": {"objective.name": "simpo", "objective.beta": 2.0},
    "dpo": {"objective.name": "dpo", "objective.beta": 0.1},
}


@pytest.mark.slow
def test_rewards_of_steps_train_alike_on_any_ranks_and_packs(
    recipe: Callable[..., Path],
    redi: Callable[..., Any],
    steps: Steps,
    world: Path,
    tmp_path: Path,
) -> None:
    data = write_spans(world, tmp_path / "rewards.jsonl", rewards)
    recipes: dict[int, list[Path]] = {1: [], 2: []}
    for name, changes in CASES.items():
        for ranks, row_tokens in ((1, 4096), (1, 128), (2, 128)):
            steady = {"optim.eps": 1e-3, "optim.schedule": "constant", "optim.warmup": 0.0}
            # The data has traces of one token, masked: a step may then have none to train.
            same = {**steady, "data.path": data, "train.row_tokens": row_tokens}
            recipes[ranks].append(recipe(f"{name}-{ranks}-{row_tokens}", same | changes))
    for ranks, paths in recipes.items():
        done = redi("train", *paths, ranks=ranks if ranks > 1 else 0)
        assert done.returncode == 0, done.stderr
        assert "tokens masked by spans" in done.stderr
        assert "tokens weighted by spans" in done.stderr
    for name in CASES:
        expected = steps(tmp_path / f"{name}-1-4096")
        for other in (f"{name}-1-128", f"{name}-2-128"):
            for ours, theirs in zip(steps(tmp_path / other), expected, strict=True):
                for key in ("loss", "positive_logp", "targets"):
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-6), (other, key)
                assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5), other
        manifest = json.loads((tmp_path / f"{name}-2-128" / "manifest.json").read_text())
        for ran in manifest["ran"]:
            kernel = "linear_logprobs" if name in ("simpo", "dpo") else "signed_cross_entropy"
            assert kernel in ran["loss"]
            assert "token_weights" not in ran["loss"], "REDI's own weights: those of spans are lost"
    # Before any step policy and reference agree, if the reference has the same weights.
    assert steps(tmp_path / "dpo-2-128")[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert_first_step(tmp_path / "redi-1-128.toml", steps(tmp_path / "redi-1-128")[0])


def assert_first_step(path: Path, line: dict[str, Any]) -> None:
    """The loss of REDI on plain transformers in float64, with a weight for each character.

    A token of the small tokenizer is a character, and the end has the weight of the last one.
    """
    recipe = load_recipe(train_parser(), str(path), [str(path)])
    with join_world() as alone:
        data = prepare_data(recipe, alone, Console(active=False))
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.path, dtype=torch.float64, attn_implementation="eager"
    )
    rows = Path(recipe.data.paths[0]).read_text().splitlines()
    texts = [trace for row in rows for trace in json.loads(row)["traces"]]
    loss = torch.zeros((), dtype=torch.float64)
    units = data.examples.units[data.schedule.units(1)]
    for index in units.flatten().tolist():
        ids = torch.from_numpy(data.tokens.ids(index).astype("int64"))
        prompt = int(data.tokens.prompt_lengths[index])
        logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        logps = logps.gather(1, ids[1:, None])[prompt - 1 :, 0]
        spans = texts[index]["spans"]
        weights = torch.tensor([w for start, end, w in spans for _ in range(start, end)])
        weights = torch.cat([weights, weights[-1:]]).double()
        assert len(weights) == len(logps)
        coefficient = -1.0 if data.tokens.signs[index] > 0 else recipe.objective.alpha
        trained = max(int((weights != 0).sum()), 1)
        loss = loss + coefficient * (weights * logps).sum() / trained / len(units)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert line["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert line["grad_norm"] == pytest.approx(norm, rel=2e-5)


@pytest.mark.slow
def test_ones_are_bitwise_no_spans_and_zeros_train_nothing(
    recipe: Callable[..., Path], redi: Callable[..., Any], steps: Steps, world: Path, tmp_path: Path
) -> None:
    recipes = []
    for name, weight in (("plain", None), ("ones", 1.0), ("zeros", 0.0)):
        data = str(world / "traces.jsonl")
        if weight is not None:
            data = write_spans(world, tmp_path / f"{name}.jsonl", lambda *_, w=weight: w)
        held_out = str(world / "traces.jsonl") if weight == 0 else data
        changes = {"data.path": data, "eval.path": held_out, "eval.every": 4}
        recipes.append(recipe(name, {**changes, "optim.weight_decay": 0.0}))
    done = redi("train", *recipes, ranks=2)
    assert done.returncode == 0, done.stderr
    ran = {}
    for name in ("plain", "ones", "zeros"):
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        ran[name] = [list(of_rank["loss"]) for of_rank in manifest["ran"]]
    assert (
        ran["plain"]
        == ran["ones"]
        == [["token_weights", "signed_cross_entropy", "segment_sum"]] * 2
    )
    lines = {name: untimed(steps(tmp_path / name)) for name in ran}
    assert lines["ones"] == lines["plain"]
    for line in lines["zeros"]:
        assert (line["loss"], line["grad_norm"], line["update_norm"]) == (0, 0, 0)
        assert (line["positive_logp"], line["negative_logp"], line["targets"]) == (None, None, 0)
    weights = [(tmp_path / name / "export" / "model.safetensors") for name in ran]
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()


def test_held_out_traces_that_are_all_masked_are_refused(
    recipe: Callable[..., Path], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_spans(world, tmp_path / "zeros.jsonl", lambda *_: 0.0)
    assert main(["prepare", str(recipe("run", {"eval.path": data}))]) == 2
    assert capsys.readouterr().err == f"redi: eval.path: {data}: spans mask all that is scored\n"


@pytest.mark.slow
def test_logprobs_leave_out_what_is_masked(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And are those of the data without spans elsewhere, whatever its weight."""
    tables = []
    for name, reward in (("plain", lambda *_: 1.0), ("masked", rewards)):
        data = write_spans(world, tmp_path / f"{name}.jsonl", reward)
        out = tmp_path / f"{name}.parquet"
        line = ["logprobs", str(world / "model"), "--data", data, "--out", str(out)]
        assert main(line) == 0, capsys.readouterr().err
        tables.append(pq.read_table(out).to_pydict())
    plain, masked = tables
    fewer = np.array(masked["tokens"]) < np.array(plain["tokens"])
    assert fewer.any()
    assert np.all(np.array(masked["logp_sum"])[fewer] > np.array(plain["logp_sum"])[fewer])
    same = np.array(masked["tokens"]) == np.array(plain["tokens"])
    assert same.any()
    np.testing.assert_allclose(
        np.array(masked["logp_sum"])[same], np.array(plain["logp_sum"])[same], rtol=1e-6
    )
    nothing = np.array(masked["tokens"]) == 0
    assert nothing.any()
    assert np.isnan(np.array(masked["logp_mean"])[nothing]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.name": "simper"}, 'objective.name = "simper" takes the exponential'),
        pytest.param(
            {"objective.name": "bounded_redi"},
            'objective.name = "bounded_redi" takes the exponential',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"objective.negative_gamma": 0.5},
            "objective.negative_gamma takes the exponential",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"objective.filter_epsilon": 1e-3},
            "objective.filter_epsilon cannot be used with",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_objective_without_a_meaning_for_such_weights_names_the_key(
    recipe: Callable[..., Path],
    world: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_spans(world, tmp_path / "rewards.jsonl", rewards)
    path = recipe("run", {**changes, "data.path": data})
    assert main(["prepare", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.startswith(f"redi: {data}:")
