"""A run of two recipes frees the first one's memory, and collects garbage between steps alone."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Runs the command and records: what is alive when the second recipe builds its model, when Python
# collected garbage, and the bytes of tensors before each step.
SPY = """
import gc, json, os, sys, weakref

import torch

from redi.engine.train import checkpoint, garbage, loop, run

garbage.EVERY = 2
found = {"alive": [], "collections": [], "bytes": []}
of_first, now = {}, {"step": None, "inside": False}


def tensor_bytes():
    storages = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and not one.is_meta:
            local = one._local_tensor if hasattr(one, "_local_tensor") else one
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Stager(checkpoint.DefaultStager):
    def stage(self, state, **options):
        copy = super().stage(state, **options)
        for kind, values in copy.items():
            tensors = [t for t in torch.utils._pytree.tree_leaves(values) if torch.is_tensor(t)]
            assert tensors
            for number, tensor in enumerate(tensors):
                of_first.setdefault(f"host copy of {kind} {number}", weakref.ref(tensor))
        return copy


def build(*arguments, original=run._build):
    if of_first:  # the second recipe
        found["alive"] = [name for name, one in of_first.items() if one() is not None]
        found["left_bytes"] = tensor_bytes() - found["start_bytes"]
        found["frozen"] = gc.get_freeze_count()
    else:
        found["start_bytes"] = tensor_bytes()
    student, tokenizer, optimizer = original(*arguments)
    if not of_first:
        found["model_bytes"] = sum(p.to_local().nbytes for p in student.parameters())
        of_first.update(student=weakref.ref(student), optimizer=weakref.ref(optimizer))
        for name, parameter in student.named_parameters():
            of_first[name] = weakref.ref(parameter)
    return student, tokenizer, optimizer


def step(student, optimizer, batches, *arguments, original=loop.train_step, **options):
    now.update(step=batches.step, inside=True)
    found["bytes"].append(tensor_bytes())
    try:
        return original(student, optimizer, batches, *arguments, **options)
    finally:
        now["inside"] = False
        for number, state in enumerate(optimizer.state.values()):
            if len(of_first) < 400:
                of_first.setdefault(f"moment {number}", weakref.ref(state["exp_avg"]))


def collected(phase, facts):
    if phase == "start":
        found["collections"].append([now["step"], facts["generation"], now["inside"]])


checkpoint.DefaultStager, run._build, loop.train_step = Stager, build, step
gc.callbacks.append(collected)
if "never" in sys.argv[2]:
    gc.disable()
from redi.engine.cli import main

code = main(sys.argv[3:])
gc.callbacks.remove(collected)
found["enabled"] = gc.isenabled()
with open(sys.argv[1] + os.environ.get("RANK", "0"), "w") as file:
    json.dump(found, file)
raise SystemExit(code)
"""


def spy_on(line: list[str], tmp_path: Path, collects: str, ranks: int) -> list[dict[str, Any]]:
    """Run a command line of `redi` with the spy; what it found on each rank."""
    (tmp_path / "spy.py").write_text(SPY)
    where = line.index("redi.engine.cli")
    line[where - 1 : where + 1] = [str(tmp_path / "spy.py"), str(tmp_path / "found"), collects]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((tmp_path / f"found{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["redi", "dpo"])
def test_nothing_of_a_recipe_is_alive_in_the_next_though_python_never_collects(
    name: str,
    ranks: int,
    recipe: Callable[..., Path],
    command: Callable[..., list[str]],
    world: Path,
    tmp_path: Path,
) -> None:
    held_out = {"eval.path": str(world / "traces.jsonl"), "eval.every": 2}
    beta = {"objective.beta": 0.1} if name == "dpo" else {}
    first = recipe("first", held_out | beta | {"objective.name": name})
    second = recipe("second", {"model.path": None, "train.max_steps": 1})
    line = command("train", first, second, ranks=ranks if ranks > 1 else 0)
    for found in spy_on(line, tmp_path, "never", ranks):
        assert found["alive"] == []
        assert found["left_bytes"] < 0.01 * found["model_bytes"]
        of_steps = [[2, 1, False], [4, 1, False]]
        of_evaluation = [[None, 2, False], [2, 2, False], [4, 2, False]]
        at_the_ends = [[4, 2, False], [1, 2, False]]
        assert sorted(map(str, found["collections"])) == sorted(
            map(str, [*of_steps, *of_evaluation, *at_the_ends])
        )
        assert not found["enabled"], "it was off before the run"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_garbage_is_collected_after_every_nth_step_and_never_in_one(
    ranks: int, recipe: Callable[..., Path], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    path = recipe("run", {"train.max_steps": 7})
    line = command("train", path, ranks=ranks if ranks > 1 else 0)
    for found in spy_on(line, tmp_path, "usual", ranks):
        before, during = (
            [one for one in found["collections"] if one[0] in steps]
            for steps in ([None], range(1, 7))
        )
        assert len(before) > 2, "the spy sees automatic collections"
        assert during == [[step, 1, False] for step in (2, 4, 6)]
        assert found["enabled"]
        assert len(found["bytes"]) == 7
        # Moments appear in step 1; after that a step leaves no tensor in a cycle.
        assert max(found["bytes"][1:]) < 1.01 * min(found["bytes"][1:])
