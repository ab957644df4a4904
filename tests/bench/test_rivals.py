"""The comparison of whole trainers: equal figures of the same batches, and what finds others."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from redi.bench import rival_trainers, rivals
from redi.engine.quickstart.task import write_model


def _traces(path: Path) -> Path:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(20):
            traces = [
                {"text": "".join(rng.choices("0123456789", k=rng.randint(3, 40))), "correct": sign}
                for sign in (True, False)
            ]
            row = {"id": str(number), "prompt": f"{number}=", "answer": "", "traces": traces}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["redi", "sft"])
def test_a_plain_loop_computes_what_redi_train_does(objective: str, tmp_path: Path) -> None:
    """The loss, gradient norm and rate of each step, from outside, on the batches of the run."""
    write_model(tmp_path / "model", seed=0)
    case = rivals.Case("", "", objective, batch=3, steps=4, max_tokens=64, trainers=())
    traces = _traces(tmp_path / "traces.jsonl")
    folder = rivals.prepare(case, tmp_path / "case", tmp_path / "model", traces, tmp_path / "cache")
    job = json.loads((folder / "job.json").read_text())
    runs = []
    for name in (rivals.OURS_NAME, "loop"):
        run = rivals.watch(name, folder, job, 4, 1, Path(sys.executable))
        runs.append({"name": name, "turn": 0, **run})
        assert len(run["stamps"]) == 4
        assert run["stamps"][-1][0] > 1, "seconds: both import torch"
        assert run["peak_mib"] > 100
    assert [line["lr"] for line in runs[0]["lines"]] == pytest.approx([0, 1e-4, 2e-4 / 3, 1e-4 / 3])
    ours, loop = runs
    for key in ("loss", "grad_norm", "lr"):
        assert rivals.difference(key, [(loop, ours)]) < 1e-5


def test_the_loop_steps_along_the_gradient_of_redi(tmp_path: Path) -> None:
    """Its gradient norm is that of the formula, sequence by sequence and without padding."""
    write_model(tmp_path, seed=0)
    pair = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    job = {"model": str(tmp_path), "objective": "redi", "alpha": 0.5, "lr": 0.0, "warmup": 0.0}
    job |= {"batches": [[pair, [[1], [5], [2, 3, 4]]]], "metrics": str(tmp_path / "metrics.jsonl")}
    rival_trainers.TRAINERS["redi"]["loop"][1](job)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loss = torch.zeros(())
    for prompt, *completions in job["batches"][0]:
        for weight, completion in zip((-1.0, 0.5), completions, strict=True):
            ids = torch.tensor([prompt + completion])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            chosen = logps[len(prompt) - 1 :].gather(1, ids[0, len(prompt) :, None])
            loss = loss + weight * chosen.mean() / 2
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_each_case_names_trainers_of_its_objective() -> None:
    for case in rivals.CASES.values():
        assert set(case.trainers) <= rival_trainers.TRAINERS[case.objective].keys()


def _run(name: str, turn: int, cpu: float, norm: float = 2.0) -> dict[str, Any]:
    lines = [{"loss": 0.5, "grad_norm": norm, "lr": 0.0} | {"lr": step / 2} for step in range(3)]
    stamps = [[9 + step * cpu, step * 0.5, step * 2.0] for step in range(3)]
    return {"name": name, "turn": turn, "lines": lines, "stamps": stamps} | {
        "peak_mib": cpu * 100,
        "tokens": [30, 30, 30],
    }


def test_ratios_are_of_one_turn_and_leave_the_first_step_out() -> None:
    runs = [_run("redi", 0, 1.0), _run("loop", 0, 2.0), _run("redi", 1, 4.0), _run("loop", 1, 9.0)]
    found = rivals.compare(runs)
    assert found["loop"]["cpu_ratios"] == pytest.approx([2.5 / 1.5, 9.5 / 4.5])
    assert found["loop"]["user_s"] == pytest.approx((2 + 9) / 2)
    assert found["redi"]["tokens_per_cpu_s"] == pytest.approx((30 / 1.5 + 30 / 4.5) / 2)
    assert found["redi"]["wall_s"] == 2.0
    assert found["redi"]["start_cpu_s"] == 9.0
    assert rivals.disagreements(found) == []


def test_a_peer_that_was_stopped_earlier_is_compared_on_its_steps() -> None:
    """Our third step, which the peer has not run, takes longer; no ratio knows of it."""
    ours, loop = _run("redi", 0, 1.0), _run("loop", 0, 1.0)
    ours["stamps"][2][0] += 100
    for key in ("lines", "stamps", "tokens"):
        loop[key] = loop[key][:2]
    found = rivals.compare([ours, loop])
    assert found["loop"]["cpu_ratios"] == [1.0]
    assert found["loop"]["steps"] == [2]
    assert found["redi"]["cpu_s"] == pytest.approx((3.0 + 100) / 2)


def test_another_gradient_is_reported() -> None:
    runs = [_run("redi", 0, 1.0), _run("loop", 0, 2.0, norm=2.001)]
    (problem,) = rivals.disagreements(rivals.compare(runs))
    assert problem == "loop: grad_norm differs by 5.0e-04"
