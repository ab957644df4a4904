"""Weights gathered once, for a step (`[shard] gather`) and for generation: what a real run executes
on each rank, and its results."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redi.engine.cli import main

LAYERS = 3
ROW_TOKENS = 2400
# One trace fills a pack and costs as much as the three others, of which no two fit into one.
COMPLETIONS = [2390, 1205, 1205, 1205]

# Runs the command and records of each step: the packs of this rank, its forwards, and the
# collectives that were executed (a trace of the profiler).
SPY = """
import json, os, sys
from torch.profiler import ProfilerActivity, profile
import redi.engine.train.loop as loop
import redi.engine.train.validation as validation

# Not c10d::_allgather_base_: the first forward runs under a dispatch mode, where it counts twice.
KINDS = {"gloo:all_gather": "all_gathers", "c10d::_reduce_scatter_base_": "reduce_scatters"}
train_step, steps = loop.train_step, []

def spy(student, optimizer, batches, *args, **kwargs):
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        result = train_step(student, optimizer, batches, *args, **kwargs)
    events = sorted(trace.events(), key=lambda event: event.time_range.start)
    order = [KINDS[event.name] for event in events if event.name in KINDS]
    found = {kind: order.count(kind) for kind in KINDS.values()}
    found["all_reduces"] = sum(event.name == "gloo:all_reduce" for event in events)
    found["in_order"] = order == sorted(order)  # every gather before every reduction
    found["packs"] = [batch.num_tokens for batch in batches.micro_batches]
    found["forwards"] = sum(event.name == "FSDP::root_pre_forward" for event in events)
    steps.append(found)
    return result

loop.train_step = spy
greedy_accuracy = validation.greedy_accuracy

def spy_generation(*args, **kwargs):
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        result = greedy_accuracy(*args, **kwargs)
    names = [event.name for event in trace.events()]
    block = "FSDP::pre_forward (model.model.layers.0)"
    gathers = names.count("gloo:all_gather")
    steps.append({"generation": result, "all_gathers": gathers, "tokens": names.count(block)})
    return result

validation.greedy_accuracy = spy_generation
from redi.engine.cli import main
code = main(sys.argv[2:])
with open(f"{sys.argv[1]}{os.environ['RANK']}", "w") as file:
    json.dump(steps, file)
raise SystemExit(code)
"""


@pytest.fixture
def spied(
    command: Callable[..., list[str]], tmp_path: Path
) -> Callable[..., list[list[dict[str, Any]]]]:
    """Train on 2 ranks; what each rank executed in each step."""

    def run(recipe: Path, ranks: int = 2) -> list[list[dict[str, Any]]]:
        spy, found = tmp_path / "spy.py", tmp_path / f"{recipe.stem}-rank"
        spy.write_text(SPY)
        line = command("train", recipe, ranks=ranks)
        where = line.index("redi.engine.cli")
        line[where - 1 : where + 1] = [str(spy), str(found)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(line, env=environment, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [json.loads(Path(f"{found}{rank}").read_text()) for rank in range(ranks)]

    return run


@pytest.fixture(scope="module")
def long_traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    with path.open("w") as file:
        for number, tokens in enumerate(COMPLETIONS):
            digits = "".join(str((number + place * place) % 10) for place in range(tokens))
            file.write(json.dumps({"prompt": f"{number}=", "completion": digits}) + "\n")
    return path


def changes(long_traces: Path, world: Path, head: str, **shard: Any) -> dict[str, Any]:
    return {
        "model.path": str(world / head),
        "model.max_position_embeddings": 2 * ROW_TOKENS,
        "data.path": str(long_traces),
        "data.max_tokens": ROW_TOKENS,
        "objective.name": "sft",
        "optim.eps": 1e-3,
        "optim.warmup": 0.0,
        "train.batch": len(COMPLETIONS),
        "train.max_steps": 2,
        "train.row_tokens": ROW_TOKENS,
        **{f"shard.{key}": value for key, value in shard.items()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("head", ["model", "tied"])
def test_ranks_run_three_and_one_micro_steps_and_gather_each_group_once(
    recipe: Callable[..., Path],
    spied: Callable[..., list[list[dict[str, Any]]]],
    steps: Callable[[Path], list[dict[str, Any]]],
    long_traces: Path,
    world: Path,
    tmp_path: Path,
    head: str,
) -> None:
    groups = LAYERS + 1 + (head == "model")  # blocks, the root's, an untied lm_head
    once = changes(long_traces, world, head, gather="step")
    ranks = spied(recipe("once", once))
    assert sorted(len(rank[0]["packs"]) for rank in ranks) == [1, 3]
    for rank in ranks:
        for step in rank:
            assert 0 not in step["packs"], "a dummy ran"
            assert step["forwards"] == len(step["packs"])
            assert step["all_gathers"] == step["reduce_scatters"] == groups
            assert step["in_order"]
    for line in steps(tmp_path / "once"):
        assert line["micro_steps"] == 3
        assert line["rank_efficiency"] > 0.9

    # The same steps in one process, in which the weights are not sharded.
    assert main(["train", str(recipe("alone", changes(long_traces, world, head)))]) == 0
    expected = steps(tmp_path / "alone")
    assert len(expected) == 2
    for ours, theirs in zip(steps(tmp_path / "once"), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["positive_logp"] == pytest.approx(theirs["positive_logp"], rel=1e-6)
        for norm in ("grad_norm", "update_norm"):
            assert ours[norm] == pytest.approx(theirs[norm], rel=2e-5), norm


@pytest.mark.slow
def test_replicas_reduce_once_a_step_however_many_packs_it_has(
    recipe: Callable[..., Path], spied: Callable[..., list[list[dict[str, Any]]]]
) -> None:
    shard = {"shard.replicate": 2, "shard.reduce": "micro_step"}
    path = recipe("run", {**shard, "train.row_tokens": 64, "train.batch": 4})
    for steps_of_rank in spied(path):
        assert len({len(step["packs"]) for step in steps_of_rank}) > 1
        assert len({step["all_reduces"] for step in steps_of_rank}) == 1, steps_of_rank


@pytest.mark.slow
@pytest.mark.parametrize(
    "shard",
    [
        {},
        {"compile": True, "gather": "step"},
        {"checkpointing": "full", "offload": True, "gather": "step"},
    ],
)
def test_other_ways_to_shard_give_the_same_steps(
    recipe: Callable[..., Path],
    spied: Callable[..., list[list[dict[str, Any]]]],
    steps: Callable[[Path], list[dict[str, Any]]],
    long_traces: Path,
    world: Path,
    tmp_path: Path,
    shard: dict[str, Any],
) -> None:
    ranks = spied(recipe("two", changes(long_traces, world, "model", **shard)))
    gathers = {step["all_gathers"] for rank in ranks for step in rank}
    if shard:
        assert gathers == {LAYERS + 2}
    else:  # each block again in each of two micro-steps, and for the backward
        assert {len(step["packs"]) for rank in ranks for step in rank} == {2}
        assert min(gathers) > 2 * LAYERS
    assert main(["train", str(recipe("alone", changes(long_traces, world, "model")))]) == 0
    pairs = zip(steps(tmp_path / "two"), steps(tmp_path / "alone"), strict=True)
    for ours, theirs in pairs:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["micro_step", "step"])
def test_generation_gathers_each_group_once_and_not_for_each_token(
    recipe: Callable[..., Path],
    spied: Callable[..., list[list[dict[str, Any]]]],
    tmp_path: Path,
    gather: str,
) -> None:
    problems = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"{n}=", "chosen": "12", "rejected": "3", "answer": "12"} for n in range(5)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checked = {
        "eval.path": str(problems),
        "eval.every": 1,
        "eval.checker": "exact",
        "eval.max_new_tokens": 30,
        "eval.batch_size": 2,
        "train.max_steps": 1,
        "shard.gather": gather,
    }
    ranks = spied(recipe("run", checked))
    generations = [[step for step in rank if "generation" in step] for rank in ranks]
    assert [len(rank) for rank in generations] == [2, 2]  # before the step and after it
    for generation in generations[0] + generations[1]:
        assert generation["tokens"] > 3 * (LAYERS + 2)  # two batches
        # The last block, the head and the root are left gathered from scoring the same traces.
        assert LAYERS - 1 <= generation["all_gathers"] <= LAYERS + 2
    # Ranks gather together, but each generates only what its problems need.
    assert generations[0][0]["tokens"] != generations[1][0]["tokens"]


def test_reducing_after_each_micro_step_is_refused(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"shard.gather": "step", "shard.reduce": "micro_step"}
    assert main(["train", str(recipe("run", both))]) == 2
    line = capsys.readouterr().err.strip()
    assert 'shard.gather = "step" needs shard.reduce = "step", got "micro_step"' in line
    assert "\n" not in line
