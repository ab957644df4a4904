"""Runs that learn from a teacher's distributions, by `kd` and in addition to other objectives."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from op_counter import OpCounter
from processes import Run
from run_cases import untimed
from torch import Tensor
from transformers import AutoModelForCausalLM

from redi.engine.cli import main
from redi.engine.config.distill import divergence_weight
from redi.engine.config.parse import check_overrides, load_recipe, train_parser
from redi.engine.config.sections import ObjectiveConfig, Recipe
from redi.engine.console import Console
from redi.engine.data.packing import build_batch
from redi.engine.distributed import join_world
from redi.engine.errors import InputError
from redi.engine.loss.packed_loss import DistilledLoss, PackedLoss, StepTotals, at_temperature
from redi.engine.train.checkpoint import complete_checkpoints
from redi.engine.train.prepare_data import PreparedData, prepare_data
from redi.kernels import chunked

Steps = Callable[[Path], list[dict[str, Any]]]
K = 5


@pytest.fixture(scope="session")
def teacher(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distributions of the small world's traces under its tied model."""
    out = tmp_path_factory.mktemp("teacher") / "teacher.parquet"
    line = ["logprobs", world / "tied", "--data", world / "traces.jsonl", "--out", out]
    assert main([*map(str, line), "--top", str(K)]) == 0
    return out


CASES: dict[str, dict[str, Any]] = {
    "forward": {"objective.name": "kd", "objective.alpha": 0.3, "objective.ce_weight": 0.5},
    "reverse": {
        "objective.name": "kd",
        "objective.direction": "reverse",
        "objective.tail": "ignore",
        "objective.skew": 0.1,
        "objective.normalisation": "token",
    },
    "jsd": {"objective.name": "kd", "objective.direction": "jsd", "objective.ce_weight": 0.1},
    "warm": {
        "objective.name": "kd",
        "objective.temperature": 2.0,
        "objective.tail": "ignore",
        "objective.alpha": 0.0,
    },
    "redi": {"objective.direction": "jsd", "distill.weight": 0.7},
    "sft": {"objective.name": "sft", "distill.weight": 2.0, "objective.normalisation": "token"},
}


def prepared(path: Path) -> tuple[Recipe, PreparedData]:
    recipe = load_recipe(train_parser(), str(path), [str(path)])
    with join_world() as alone:
        return recipe, prepare_data(recipe, alone, Console(active=False))


def divergence(p: Tensor, q: Tensor, direction: str, skew: float) -> Tensor:
    """Of distributions [tokens, outcomes] as papers define it; [tokens]."""
    if direction == "jsd":
        m = (p + q) / 2
        terms = (q * (q / m).log() + p * (p / m).log()) / 2
    elif direction == "forward":
        terms = q * (q / (skew * q + (1 - skew) * p)).log()
    else:
        m = skew * p + (1 - skew) * q
        terms = p * (p / m).log() - p + m
    return terms.sum(-1)


def of_trace(
    recipe: Recipe, rows: pa.Table, index: int, logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The divergences [tokens] of a trace, and the same with the cross-entropies, weighted."""
    of = recipe.objective
    likely = torch.tensor(rows["top_ids"][index].as_py())
    q = torch.tensor(np.array(rows["top_logps"][index].as_py(), np.float64)).exp()
    if of.temperature != 1:
        q = q ** (1 / of.temperature) / (q ** (1 / of.temperature)).sum(-1, keepdim=True)
    p = (logits / of.temperature).softmax(-1)
    kept = p.gather(1, likely)
    if of.tail == "bucket":
        rest = p.scatter(1, likely, 0.0).sum(-1, keepdim=True)
        kept = torch.cat([kept, rest], dim=-1)
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], dim=-1)
    terms = divergence(kept, q, of.direction, of.skew)
    entropy = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    of_divergence, of_target = recipe.distill.weight, 1.0
    if of.name == "kd":
        of_divergence, of_target = 1.0, of.ce_weight
    return terms, of_divergence * of.temperature**2 * terms + of_target * entropy


def first_step(path: Path, table: Path) -> dict[str, float | None]:
    """The first line of metrics.jsonl by plain transformers in float64, without packing."""
    recipe, data = prepared(path)
    of = recipe.objective
    rows = pq.read_table(table)
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.path, dtype=torch.float64, attn_implementation="eager"
    )
    units = data.examples.units[data.schedule.units(1)]
    loss = torch.zeros((), dtype=torch.float64)
    found: dict[int, list[float]] = {1: [], -1: []}
    targets = sum(
        int(data.tokens.lengths[i] - data.tokens.prompt_lengths[i]) for i in units.flatten()
    )
    for index in units.flatten().tolist():
        ids = torch.from_numpy(data.tokens.ids(index).astype("int64"))
        prompt = int(data.tokens.prompt_lengths[index])
        logits = model(input_ids=ids[None]).logits[0, prompt - 1 : -1]
        terms, both = of_trace(recipe, rows, index, logits, ids[prompt:])
        sign = int(data.tokens.signs[index])
        found[sign].append(terms.mean().item())
        weight = 1.0 if sign > 0 else -of.alpha
        denominator = targets if of.normalisation == "token" else len(units) * len(terms)
        loss = loss + weight * both.sum() / denominator
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    means = {sign: sum(part) / len(part) if part else None for sign, part in found.items()}
    return {
        "loss": loss.item(),
        "grad_norm": norm,
        "positive_divergence": means[1],
        "negative_divergence": means[-1],
    }


def compare(line: dict[str, Any], expected: dict[str, float | None]) -> None:
    for name, value in expected.items():
        tolerance = {"grad_norm": 2e-5, "loss": 2e-6}.get(name, 1e-5)
        if value is None:  # no negatives
            assert line[name] is None, name
        else:
            assert line[name] == pytest.approx(value, rel=tolerance, abs=1e-7), name


def settings(teacher: Path, **changes: Any) -> dict[str, Any]:
    steady = {"optim.eps": 1e-3, "optim.schedule": "constant", "optim.warmup": 0.0}
    return {"distill.path": str(teacher), **steady, **changes}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_first_step_is_the_formula_on_plain_transformers(
    case: str,
    teacher: Path,
    recipe: Callable[..., Path],
    steps: Steps,
    tmp_path: Path,
    capsys: Any,
) -> None:
    changes = {"train.max_steps": 1, **settings(teacher), **CASES[case]}
    path = recipe(case, changes)
    assert main(["train", str(path)]) == 0
    shown = capsys.readouterr().err
    assert "entries of a token (K)" in shown
    assert "cached MB" in shown
    (line,) = steps(tmp_path / case)
    compare(line, first_step(path, teacher))
    manifest = json.loads((tmp_path / case / "manifest.json").read_text())
    assert "topk_divergence" in manifest["ran"][0]["loss"]
    assert "signed_cross_entropy" not in manifest["ran"][0]["loss"]


@pytest.mark.slow
def test_ranks_and_packs_train_alike(
    teacher: Path,
    recipe: Callable[..., Path],
    redi: Callable[..., Any],
    steps: Steps,
    tmp_path: Path,
) -> None:
    recipes: dict[int, list[Path]] = {1: [], 2: []}
    for name, changes in CASES.items():
        for ranks, row_tokens, context in ((1, 4096, 1), (1, 128, 1), (2, 128, 1), (2, 128, 2)):
            same = {**settings(teacher), "train.row_tokens": row_tokens, "data.workers": ranks - 1}
            same["shard.context"] = context
            recipes[ranks].append(recipe(f"{name}-{ranks}-{row_tokens}-{context}", same | changes))
    for ranks, paths in recipes.items():
        done = redi("train", *paths, ranks=ranks if ranks > 1 else 0)
        assert done.returncode == 0, done.stderr
    for name in CASES:
        expected = steps(tmp_path / f"{name}-1-4096-1")
        assert len(expected) == 4
        for other in (f"{name}-1-128-1", f"{name}-2-128-1", f"{name}-2-128-2"):
            for ours, theirs in zip(steps(tmp_path / other), expected, strict=True):
                for key in ("positive_logp", "positive_divergence"):
                    assert ours[key] == pytest.approx(theirs[key], rel=2e-6), (other, key)
                # The terms of positives and of negatives may nearly cancel.
                size = abs(theirs["loss"]) + theirs["positive_divergence"]
                assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-6 * size), other
                assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5), other
        manifest = json.loads((tmp_path / f"{name}-2-128-1" / "manifest.json").read_text())
        assert len(manifest["ran"]) == 2
        assert all("topk_divergence" in ran["loss"] for ran in manifest["ran"])


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_to_the_same_weights(
    teacher: Path, recipe: Callable[..., Path], steps: Steps, tmp_path: Path
) -> None:
    changes = {**settings(teacher), **CASES["redi"], "train.max_steps": 12, "run.save_every": 2}
    whole, cut = (recipe(name, changes) for name in ("whole", "cut"))
    assert Run("train", whole, log=tmp_path / "whole.log").end() == 0
    killed = Run("train", cut, log=tmp_path / "killed.log")
    killed.wait_for(lambda: bool(complete_checkpoints(tmp_path / "cut")))
    killed.kill()
    assert len(steps(tmp_path / "cut")) < 12
    again = Run("train", cut, log=tmp_path / "again.log")
    assert again.end() == 0, again.stderr
    assert "resumes after step" in again.stderr
    assert untimed(steps(tmp_path / "cut")) == untimed(steps(tmp_path / "whole"))
    first, second = (
        (tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert first == second


Problem = Callable[[str, dict[str, Any]], str]


@pytest.fixture
def problem(recipe: Callable[..., Path], capsys: Any) -> Problem:
    """The error of a recipe."""

    def of(name: str, changes: dict[str, Any]) -> str:
        assert main(["train", str(recipe(name, changes))]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        return line

    return of


def test_unused_keys_of_a_teacher_are_errors(problem: Problem) -> None:
    unused = problem("a", {"distill.path": "teacher.parquet"})
    assert 'distill.path is not used by redi: set objective.name = "kd"' in unused
    simpo = {"objective.name": "simpo", "objective.beta": 1.0, "distill.weight": 1.0}
    assert "distill.weight adds to sft, redi and signed, not to simpo" in problem("b", simpo)
    assert "not to redi with objective.negative_gamma" in problem(
        "c", {"objective.negative_gamma": 0.1, "distill.weight": 1.0}
    )
    assert "distill.weight is not used by kd" in problem(
        "d", {"objective.name": "kd", "distill.weight": 1.0}
    )
    assert "objective.direction is not used by redi" in problem(
        "e", {"objective.direction": "reverse"}
    )
    assert "objective.skew is not used by objective.direction" in problem(
        "f", {"objective.name": "kd", "objective.direction": "jsd", "objective.skew": 0.1}
    )
    assert 'objective.temperature = 2 needs objective.tail = "ignore": ' in problem(
        "h", {"distill.weight": 1.0, "objective.temperature": 2.0}
    )
    assert "mixing_weights must have one number per path, got 2 for 1" in problem(
        "g",
        {"objective.name": "kd", "distill.path": "x", "distill.mixing_weights": [1.0, 2.0]},
    )


@pytest.mark.slow
def test_a_teacher_without_distributions_is_an_error(
    problem: Problem, world: Path, tmp_path: Path
) -> None:
    assert "traces.jsonl: has distributions of none of the" in problem(
        "h", {"objective.name": "kd"}
    )
    assert "no such file" in problem("i", {"objective.name": "kd", "distill.path": "missing.jsonl"})
    a_model = problem("i", {"objective.name": "kd", "distill.path": str(world / "tied")})
    assert "is a model, not its distributions; write them with `redi logprobs" in a_model
    scores = tmp_path / "scores.parquet"
    line = ["logprobs", world / "tied", "--data", world / "traces.jsonl", "--out", scores]
    assert main([*map(str, line)]) == 0
    kd = {"objective.name": "kd", "distill.path": str(scores)}
    assert "scores.parquet: a table of `redi logprobs` without distributions" in problem("j", kd)


def test_a_run_without_a_teacher_ignores_an_override_of_it(
    recipe: Callable[..., Path], teacher: Path
) -> None:
    """A recipe does, as another one of the command may use it; if none does, it is an error."""
    path = recipe("sft", {"objective.name": "sft"})
    line = [str(path), "--distill.path", str(teacher)]
    found = load_recipe(train_parser(), str(path), line)
    assert found.distill.path == ""
    with pytest.raises(InputError, match=r"distill.path is not used by sft: set objective.name"):
        check_overrides([found], line)
    kd = load_recipe(train_parser(), str(path), [str(path), "--objective.name", "kd"])
    check_overrides([found, kd], line)
    check_overrides([found], [str(path), "--distill.path", "", "--distill.weight=0"])


def test_a_distilled_pack_takes_three_products_and_others_their_own_ops(
    recipe: Callable[..., Path], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe("redi", {**settings(teacher), **CASES["redi"]})
    found, data = prepared(path)
    assert data.teacher is not None
    traces = data.examples.units[:3].flatten()
    plain = build_batch(data.tokens, traces, data.examples.lengths[traces])
    batch = build_batch(data.tokens, traces, data.examples.lengths[traces], data.teacher)
    assert plain.teacher_ids is None
    assert batch.teacher_ids is not None
    assert torch.equal(plain.targets, batch.targets)
    hidden = torch.randn(len(batch.input_ids), 8, requires_grad=True)
    head = torch.randn(64, 8, requires_grad=True)
    objective = PackedLoss(found.objective, divergence_weight=divergence_weight(found))
    shapes, matmul = [], chunked.matmul

    def spy(a: Tensor, b: Tensor, *more: Any, **options: Any) -> Tensor:
        shapes.append((*a.shape, b.shape[1]))
        return matmul(a, b, *more, **options)

    monkeypatch.setattr(chunked, "matmul", spy)
    objective(hidden, head, batch, StepTotals(3, 1)).loss.backward()
    count = len(batch.valid_index)
    assert sorted(shapes) == sorted([(count, 8, 64), (count, 64, 8), (64, count, 8)])
    with OpCounter() as ops:
        PackedLoss(found.objective)(hidden, head, plain, StepTotals(3, 1))
    assert not any("topk" in name for name in ops.ran)


@pytest.mark.parametrize("case", CASES)
def test_a_distilled_pack_has_the_loss_of_the_formula(
    case: str, recipe: Callable[..., Path], teacher: Path
) -> None:
    found, data = prepared(recipe(case, {**settings(teacher), **CASES[case]}))
    rows = pq.read_table(teacher)
    traces = data.examples.units[:3].flatten()
    batch = build_batch(data.tokens, traces, data.examples.lengths[traces], data.teacher)
    vocab = 64
    logits = torch.randn(len(batch.input_ids), vocab, dtype=torch.float64)
    totals = StepTotals(3, int(batch.num_targets.sum()))
    objective = PackedLoss(found.objective, divergence_weight=divergence_weight(found))
    out = objective(logits, torch.eye(vocab, dtype=torch.float64), batch, totals)
    assert isinstance(out, DistilledLoss)
    loss = 0.0
    for place, index in enumerate(traces.tolist()):
        own = batch.valid_index[
            (batch.valid_index >= batch.cu_seqlens[place])
            & (batch.valid_index < batch.cu_seqlens[place + 1])
        ]
        terms, both = of_trace(found, rows, index, logits[own], batch.targets[own])
        assert out.sequence_divergences[place] == pytest.approx(terms.sum().item(), rel=1e-5)
        weight = 1.0 if batch.signs[place] > 0 else -found.objective.alpha
        mean = found.objective.normalisation == "sequence"
        loss += weight * both.sum().item() / (3 * len(own) if mean else totals.targets)
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)


def test_a_temperature_normalises_over_the_entries() -> None:
    logps = torch.tensor([[0.6, 0.2, 0.0], [0.0, 0.0, 0.0]]).log()
    found = at_temperature(logps.half(), 2.0).exp()
    wanted = torch.tensor([0.6, 0.2]).sqrt()
    assert torch.allclose(found[0], torch.cat([wanted / wanted.sum(), torch.zeros(1)]), rtol=1e-3)
    assert torch.equal(found[1], torch.zeros(3))


def test_a_loss_that_needs_a_teacher_refuses_a_pack_without(
    recipe: Callable[..., Path], teacher: Path
) -> None:
    _, data = prepared(recipe("kd", {**settings(teacher), "objective.name": "kd"}))
    batch = build_batch(data.tokens, np.array([0]), data.examples.lengths[:1])
    with pytest.raises(AssertionError, match="no distributions"):
        PackedLoss(ObjectiveConfig("kd"), divergence_weight=1.0)(
            torch.zeros(len(batch.input_ids), 8), torch.zeros(64, 8), batch, StepTotals(1, 1)
        )


@pytest.mark.slow
def test_the_plan_counts_the_entries_of_a_pack(
    recipe: Callable[..., Path], teacher: Path, world: Path, tmp_path: Path
) -> None:
    found = {}
    for name, changes in (("plain", {}), ("distilled", {**settings(teacher), **CASES["redi"]})):
        path = recipe(name, {"train.row_tokens": 512, **changes})
        out = tmp_path / f"{name}.json"
        assert main(["plan", str(path), "--json", str(out)]) == 0
        found[name] = json.loads(out.read_text())
    wanted = found["plain"][0]["packing"]["fullest_pack"] * K * 6
    totals = {name: sum(one[0]["memory"]["parts"].values()) for name, one in found.items()}
    # The ops differ by some numbers for each trace.
    assert totals["distilled"] - totals["plain"] == pytest.approx(wanted, abs=512)
