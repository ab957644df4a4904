"""The result of a step does not depend on packing, micro-steps, ranks or sharding.

One launch per world size runs all its recipes: a launch costs seconds. The oracle is plain
transformers in float64, one sequence at a time.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from first_step import plain_first_step

from redi.engine.cli import main

Steps = Callable[[Path], list[dict[str, Any]]]

# Adam's first updates are the signs of the gradient. A large eps keeps gradients that are rounding
# noise from becoming whole steps.
STEADY = {"optim.eps": 1e-3, "optim.schedule": "constant", "optim.warmup": 0.0}
OBJECTIVES = {
    "sft": {"objective.name": "sft"},
    "token": {"objective.name": "sft", "objective.normalisation": "token"},
    "redi": {"objective.name": "redi"},
    "alpha0": {"objective.name": "redi", "objective.alpha": 0.0},
}
# An objective and a head. The slow suite has the others, as a launch is fast and a recipe is not.
CASES = [("sft", "model"), ("redi", "tied")]
MORE_CASES = [("alpha0", "tied"), ("sft", "tied"), ("token", "model"), ("redi", "model")]
ALL_CASES = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)]
# One objective per kind: weights of traces, a token's log-prob, a sequence's (by autograd, and in
# one pass), a pair in one pack; with a reference for pairs and for single traces, and with
# mismatched rows.
SIBLINGS = {
    "signed": {"objective.name": "signed"},
    "unlikelihood": {"objective.name": "unlikelihood"},
    "discounted": {"objective.name": "redi", "objective.negative_gamma": 0.5},
    "bounded": {"objective.name": "bounded_redi"},
    "simper": {"objective.name": "simper"},
    "simpo": {"objective.name": "simpo", "objective.beta": 2.0},
    "dpo": {"objective.name": "dpo", "objective.beta": 0.1},
    "topr": {"objective.name": "topr"},
    "unpaired": {"objective.name": "apo_zero_unpaired", "objective.beta": 0.1},
    "kto": {"objective.name": "kto", "objective.beta": 0.1},
}
PAIRS = 8  # of a step, as `write_recipe` has it
# Fewer sequences than ranks: of 2 ranks one has only a dummy, or only a negative. (The slow test on
# 4 ranks does this with a tied head.)
FEW = {
    "dummy": {"objective.name": "sft", "train.batch": 1},
    "apart": {"objective.name": "redi", "train.batch": 1},
}
# Packs of 64 tokens hold one or two sequences, packs of 4096 a whole step.
LAYOUTS = {
    "whole": {"train.row_tokens": 4096},
    "split": {"train.row_tokens": 64},
    "recomputed": {"train.row_tokens": 128, "shard.checkpointing": "full"},
    "selective": {"train.row_tokens": 128, "shard.checkpointing": "selective"},
}


@pytest.fixture(scope="module")
def runs(
    world: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_recipe: Callable[..., Path],
    redi: Callable[..., Any],
) -> Path:
    """All of `CASES` in this process and on 2 ranks (torchrun)."""
    folder = tmp_path_factory.mktemp("invariants")
    recipes: dict[int, list[Path]] = {}
    for ranks in (1, 2):
        few_of = {
            f"{few}-model-whole-{ranks}": {**STEADY, **of_few, "train.max_steps": 3}
            for few, of_few in FEW.items()
        }
        recipes[ranks] = [
            *(
                write_recipe(folder, name, {**changes, "run.dir": str(folder / name)})
                for name, changes in few_of.items()
            ),
            *recipes_of(CASES, ranks, world, folder, write_recipe),
        ]
    # Starts from the export of the previous recipe, which rank 1 must not read too early.
    chained = {**STEADY, "model.path": None, "train.max_steps": 3, "run.dir": str(folder / "next")}
    recipes[2].append(write_recipe(folder, "next", chained))
    train(recipes, redi)
    return folder


@pytest.fixture(scope="module")
def more_runs(
    world: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_recipe: Callable[..., Path],
    redi: Callable[..., Any],
) -> Path:
    """`MORE_CASES` likewise."""
    folder = tmp_path_factory.mktemp("more")
    more = {ranks: recipes_of(MORE_CASES, ranks, world, folder, write_recipe) for ranks in (1, 2)}
    train(more, redi)
    return folder


@pytest.fixture
def runs_of(request: pytest.FixtureRequest) -> Callable[[str, str], Path]:
    """The folder of the runs of an objective and a head."""

    def folder(objective: str, head: str) -> Path:
        name = "runs" if (objective, head) in CASES else "more_runs"
        found: Path = request.getfixturevalue(name)
        return found

    return folder


def recipes_of(
    cases: list[tuple[str, str]],
    ranks: int,
    world: Path,
    folder: Path,
    write_recipe: Callable[..., Path],
) -> list[Path]:
    """Each case in each layout; recomputation only where nothing else is special."""
    layouts = dict(LAYOUTS)
    if ranks == 2:
        layouts["replicated"] = {"train.row_tokens": 128, "shard.replicate": 2}
        layouts["context"] = {"train.row_tokens": 128, "shard.context": 2}
    recipes = []
    for objective, head in cases:
        for layout, of_layout in layouts.items():
            simple = objective != "redi" or head == "tied"
            if simple and layout in ("recomputed", "selective"):
                continue
            name = f"{objective}-{head}-{layout}-{ranks}"
            changes = {
                **STEADY,
                **OBJECTIVES[objective],
                **of_layout,
                "model.path": str(world / head),
                "run.dir": str(folder / name),
                "train.max_steps": 3,
            }
            recipes.append(write_recipe(folder, name, changes))
    return recipes


def train(recipes: dict[int, list[Path]], redi: Callable[..., Any]) -> None:
    """Train recipes of one rank in this process, others by one launch per number of ranks."""
    for ranks, paths in recipes.items():
        if ranks == 1:
            assert main(["train", *map(str, paths)]) == 0
        else:
            done = redi("train", *paths, ranks=ranks)
            assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs_on_4(
    world: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_recipe: Callable[..., Path],
    redi: Callable[..., Any],
) -> Path:
    """7 sequences or pairs a step on 1 and 4 ranks, sharded over all, or over two and reduced after
    each micro-step; fewer sequences than the ranks need. Every gradient is clipped."""
    folder = tmp_path_factory.mktemp("four")
    recipes: dict[int, list[Path]] = {1: [], 4: []}
    steps_of = {
        "sft": {"objective.name": "sft", "train.batch": 7},
        "redi": {"objective.name": "redi", "train.batch": 7},
        "dummy": {"objective.name": "sft", "train.batch": 3},
        "apart": {"objective.name": "redi", "train.batch": 2},
    }
    for objective, of_objective in steps_of.items():
        for head in ("model", "tied"):
            layouts = {("whole", 1): {}, ("hsdp", 4): {"shard.replicate": 2}}
            if objective in ("sft", "redi"):
                layouts["hsdp", 4] |= {"train.row_tokens": 64, "shard.reduce": "micro_step"}
                layouts["split", 4] = {"train.row_tokens": 64}
                layouts["gathered", 4] = {"train.row_tokens": 64, "shard.gather": "step"}
                layouts["gathered-hsdp", 4] = layouts["gathered", 4] | {"shard.replicate": 2}
                for layout in ("hsdp", "gathered"):
                    layouts[f"context-{layout}", 4] = layouts[layout, 4] | {"shard.context": 2}
            layouts["context", 4] = {"shard.context": 4}
            for (layout, ranks), of_layout in layouts.items():
                name = f"{objective}-{head}-{layout}-{ranks}"
                changes = {**STEADY, **of_objective, "train.row_tokens": 4096, **of_layout}
                changes |= {"run.dir": str(folder / name), "model.path": str(world / head)}
                changes |= {"train.max_steps": 3, "optim.max_grad_norm": 0.1}
                recipes[ranks].append(write_recipe(folder, name, changes))
    train(recipes, redi)
    return folder


@pytest.fixture(scope="module")
def sibling_runs(
    tmp_path_factory: pytest.TempPathFactory,
    write_recipe: Callable[..., Path],
    redi: Callable[..., Any],
) -> Path:
    """The other objectives: one process with whole and split packs, 2 ranks with split ones."""
    folder = tmp_path_factory.mktemp("siblings")
    recipes: dict[int, list[Path]] = {1: [], 2: []}
    layouts = (("whole", 1), ("split", 1), ("split", 2), ("context", 2), ("gathered", 2))
    for objective, of_objective in SIBLINGS.items():
        for layout, ranks in layouts:
            name = f"{objective}-model-{layout}-{ranks}"
            changes = {**STEADY, **of_objective}
            changes["train.row_tokens"] = 4096 if layout == "whole" else 128
            changes["shard.context"] = 2 if layout == "context" else 1
            changes["shard.gather"] = "step" if layout == "gathered" else "micro_step"
            changes |= {"run.dir": str(folder / name), "train.max_steps": 3}
            recipes[ranks].append(write_recipe(folder, name, changes))
    train(recipes, redi)
    return folder


@pytest.mark.parametrize(("objective", "head"), ALL_CASES)
def test_layout_and_world_size_do_not_matter(
    runs_of: Callable[[str, str], Path], steps: Steps, objective: str, head: str
) -> None:
    assert compare(runs_of(objective, head), steps, objective, head) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("objective", SIBLINGS)
def test_layout_and_world_size_do_not_matter_to_other_objectives(
    sibling_runs: Path, steps: Steps, objective: str
) -> None:
    assert compare(sibling_runs, steps, objective, "model") == 5
    if objective == "kto":
        assert max(line["kl"] for line in steps(sibling_runs / "kto-model-whole-1")) > 0.1


@pytest.mark.parametrize("few", FEW)
def test_a_rank_with_only_a_dummy_or_only_a_negative_changes_nothing(
    runs: Path, steps: Steps, few: str
) -> None:
    assert compare(runs, steps, few, "model") == 2
    for line in steps(runs / f"{few}-model-whole-2"):
        assert line["micro_steps"] == 1
        # One sequence: the other rank has none. Two: each has one.
        assert (line["rank_efficiency"] == 0.5) == (few == "dummy")


@pytest.mark.slow
@pytest.mark.parametrize("head", ["model", "tied"])
@pytest.mark.parametrize("objective", ["sft", "redi", "dummy", "apart"])
def test_four_ranks_sharded_over_all_or_two_are_one(
    runs_on_4: Path, steps: Steps, objective: str, head: str
) -> None:
    assert compare(runs_on_4, steps, objective, head) == (8 if objective in ("sft", "redi") else 3)
    lines = steps(runs_on_4 / f"{objective}-{head}-hsdp-4")
    assert all(line["grad_norm"] > 0.1 for line in lines)  # clipping did something
    if objective == "dummy":
        assert all(line["rank_efficiency"] <= 0.75 for line in lines)


def compare(runs: Path, steps: Steps, objective: str, head: str) -> int:
    """Compare every run of an objective with that of one process and whole packs; count them."""
    expected = steps(runs / f"{objective}-{head}-whole-1")
    assert len(expected) == 3
    compared = 0
    for run in sorted(runs.glob(f"{objective}-{head}-*")):
        if not run.is_dir():
            continue
        for ours, theirs in zip(steps(run), expected, strict=True):
            terms = abs(theirs["loss"])
            if objective == "simper":  # a difference of mean probabilities, as exact as these
                terms = math.exp(theirs["positive_logp"]) + math.exp(theirs["negative_logp"])
            elif objective == "topr":  # exp of a sequence's log-prob has the error of that sum
                mean_length = theirs["targets"] / (2 * PAIRS)
                terms *= -theirs["negative_logp"] * mean_length
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6 * terms), run.name
            assert ours["positive_logp"] == pytest.approx(theirs["positive_logp"], rel=1e-6)
            if theirs["negative_logp"] is not None:
                assert ours["negative_logp"] == pytest.approx(theirs["negative_logp"], rel=1e-6)
            else:
                assert ours["negative_logp"] is None
            for norm in ("grad_norm", "update_norm"):
                assert ours[norm] == pytest.approx(theirs[norm], rel=2e-5), (run.name, norm)
            assert ours["tokens"] == theirs["tokens"], run.name
            if objective == "kto":  # a mean difference of log-probs, as exact as these
                terms = -theirs["positive_logp"] * theirs["targets"] / PAIRS
                assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-6 * terms), run.name
        compared += 1
    return compared


def test_the_layouts_really_differ(runs: Path, steps: Steps) -> None:
    micro_steps = {
        layout: steps(runs / f"redi-tied-{layout}")[0]["micro_steps"]
        for layout in ("whole-1", "split-1", "split-2", "whole-2")
    }
    assert micro_steps["whole-1"] == micro_steps["whole-2"] == 1
    assert micro_steps["split-1"] > micro_steps["split-2"] > 3
    ran = json.loads((runs / "redi-tied-context-2" / "manifest.json").read_text())["ran"]
    assert [one["context_ranks"] for one in ran] == [2, 2]


@pytest.mark.slow
def test_alpha_0_is_sft_with_a_mean_per_sequence(more_runs: Path, steps: Steps) -> None:
    """Its loss is that of the positives alone; only the log-prob of negatives is logged."""
    line = steps(more_runs / "alpha0-tied-whole-1")[0]
    assert line["loss"] == pytest.approx(-line["positive_logp"], rel=1e-6)
    assert line["negative_logp"] is not None


@pytest.mark.parametrize(("objective", "head"), ALL_CASES)
def test_the_first_step_is_plain_transformers_in_float64(
    runs_of: Callable[[str, str], Path], steps: Steps, objective: str, head: str
) -> None:
    name = f"{objective}-{head}-split-1"
    runs = runs_of(objective, head)
    expected = plain_first_step(runs / f"{name}.toml")
    line = steps(runs / name)[0]
    assert line["loss"] == pytest.approx(expected.loss, rel=2e-6)
    assert line["grad_norm"] == pytest.approx(expected.grad_norm, rel=2e-5)
    assert line["positive_logp"] == pytest.approx(expected.positive_logp, rel=2e-6)
    if expected.negative_logp is None:
        assert line["negative_logp"] is None
    else:
        assert line["negative_logp"] == pytest.approx(expected.negative_logp, rel=2e-6)


def test_a_recipe_that_follows_starts_from_the_export_on_every_rank(
    runs: Path, steps: Steps
) -> None:
    before, after = steps(runs / "redi-tied-replicated-2"), steps(runs / "next")
    assert len(after) == 3
    assert after[0]["positive_logp"] > before[0]["positive_logp"]


@pytest.mark.slow
def test_a_different_alpha_is_a_different_loss(runs: Path, more_runs: Path, steps: Steps) -> None:
    with_negatives = steps(runs / "redi-tied-whole-1")[0]
    assert with_negatives["loss"] != pytest.approx(
        steps(more_runs / "alpha0-tied-whole-1")[0]["loss"], rel=1e-3
    )
