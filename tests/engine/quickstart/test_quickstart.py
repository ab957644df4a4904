"""The quickstart: its teacher, the figures of its report, and (slow) the gain of REDI."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from redi.engine.cli import main
from redi.engine.errors import InputError
from redi.engine.quickstart import report as quickstart_report
from redi.engine.quickstart import task as quickstart

RECIPES = Path(quickstart.__file__).parents[1] / "recipes"


def train(folder: Path, *, sft_steps: int, redi_steps: int) -> None:
    """Run all quickstart recipes in another directory and shorter."""
    for run in ("sft", "control", "redi", "sft-simper"):
        steps = sft_steps if run == "sft" else redi_steps
        model = folder / "model" if run == "sft" else folder / "sft" / "export"
        arguments = {
            "model.path": model,
            "data.path": folder / "train.jsonl",
            "data.cache": folder / "cache",
            "data.processes": 1,
            "eval.path": folder / "test.jsonl",
            "train.max_steps": steps,
            "run.dir": folder / run,
        }
        overrides = [f"--{key}={value}" for key, value in arguments.items()]
        assert main(["train", str(RECIPES / f"quickstart-{run}.toml"), "--quiet", *overrides]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    quickstart.make(folder, problems=200, held_out=12)
    train(folder, sft_steps=3, redi_steps=2)
    return folder


def test_the_teacher_errs_more_the_longer_it_skips() -> None:
    rng = random.Random(3)
    right = {blanks: [0, 0] for blanks in range(6)}
    for problem in quickstart.make_problems(4000, rng):
        for _ in range(4):
            done = quickstart.attempt(problem, rng)
            run = len(re.search(r"\**(?=.$)", done.text).group())  # type: ignore[union-attr]
            before = done.text[: 5 - run]
            if before.replace(quickstart.BLANK, "") == "" and run < 5:
                continue
            right[run][0] += done.correct
            right[run][1] += 1
    shares = [good / count for good, count in right.values()]
    assert shares == sorted(shares, reverse=True)
    # After five blanks the last box is the only one that can be wrong.
    assert shares[5] == pytest.approx(1 - quickstart.ERROR_PROBABILITY[5], abs=0.05)


@pytest.mark.parametrize(
    ("trace", "correct"),
    [("762161", True), ("*****1", True), ("762162", False), ("76216", False), ("7621611", False)],
)
def test_only_six_boxes_with_a_correct_last_one_are_correct(trace: str, correct: bool) -> None:
    assert quickstart.solve("2914177=") == "762161"
    assert quickstart.is_correct("2914177=", trace) is correct


def test_the_data_are_distinct_correctly_labelled_and_held_out(tmp_path: Path) -> None:
    quickstart.make(tmp_path, problems=300, held_out=30, seed=1)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        for name in ("train", "test")
    }
    prompts = {name: {row["prompt"] for row in found} for name, found in rows.items()}
    assert (len(prompts["train"]), len(prompts["test"])) == (300, 30)
    assert not prompts["train"] & prompts["test"]
    for row in rows["train"]:
        texts = [trace["text"] for trace in row["traces"]]
        assert len(set(texts)) == len(texts)
        for trace in row["traces"]:
            assert trace["correct"] == (trace["text"][-1] == row["answer"])
    again = tmp_path / "again"
    quickstart.make(again, problems=300, held_out=30, seed=1)
    for name in ("train.jsonl", "test.jsonl", "model/model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_explanation_shows_a_correct_a_lucky_and_an_unlucky_trace() -> None:
    shown = re.findall(r"(\d{7}=)([\d*]{6}) +(\w+)", quickstart.explain())
    assert [kind for *_, kind in shown] == ["correct", "lucky", "unlucky"]
    labels = [quickstart.is_correct(problem, trace) for problem, trace, _ in shown]
    assert labels == [True, True, False]
    assert ["*" in trace for _, trace, _ in shown] == [False, True, True]


def test_the_printed_report_agrees_with_its_json(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = quickstart_report.report_quickstart(trained)
    printed = capsys.readouterr().out
    written = json.loads((trained / "quickstart.json").read_text())
    assert list(found) == list(written) == ["SFT", "control", "REDI", "SFT+SimPER"]
    for name, one in written.items():
        assert len(one["sampled"]) == len(one["greedy"]) == 12
        row = next(line for line in printed.splitlines() if line.startswith(f" {name}"))
        assert f"{100 * sum(one['sampled']) / 12:.1f} ±" in row
        assert f"{one['blank_share']:.0%}" in row
        assert f"{one['positive_logp']:.2f}" in row
    difference = sum(written["REDI"]["sampled"]) - sum(written["control"]["sampled"])
    assert f"{100 * difference / 12:+.1f} ±" in printed
    assert "synthetic" in printed
    assert (trained / "quickstart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_last_held_out_log_probs_are_those_of_the_exported_model(trained: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained / "redi" / "export")
    model = AutoModelForCausalLM.from_pretrained(trained / "redi" / "export").double()
    rows = [json.loads(line) for line in (trained / "test.jsonl").open()]
    means: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        first = {kind: [t["text"] for t in row["traces"] if t["correct"] == kind] for kind in means}
        if not all(first.values()):
            continue
        for kind, texts in first.items():
            ids = tokenizer(row["prompt"] + texts[0] + quickstart.END, return_tensors="pt")
            logps = model(**ids).logits[0, 7:-1].log_softmax(-1)
            taken = logps.gather(1, ids["input_ids"][0, 8:, None])
            means[kind].append(taken.mean().item())
    assert means[True]
    one = quickstart_report.measure_model(trained / "redi", [row["prompt"] for row in rows])
    assert one.positive_logp == pytest.approx(torch.tensor(means[True]).mean().item(), rel=1e-5)
    assert one.negative_logp == pytest.approx(torch.tensor(means[False]).mean().item(), rel=1e-5)


def test_a_report_before_training_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `make train` first"):
        quickstart_report.report_quickstart(tmp_path)


@pytest.mark.slow
def test_redi_gains_on_the_control_and_unlearns_the_habit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickstart.make(tmp_path)
    train(tmp_path, sft_steps=1400, redi_steps=100)
    found = quickstart_report.report_quickstart(tmp_path)

    def mean(values: list[Any]) -> float:
        return sum(values) / len(values)

    redi, control, sft, bounded = found.values()
    assert mean(redi.sampled) - mean(control.sampled) >= 0.10
    assert redi.blank_share < 0.75 * control.blank_share
    assert mean(bounded.sampled) - mean(control.sampled) >= 0.10
    assert mean(bounded.greedy) >= mean(control.greedy)
    assert abs(mean(control.sampled) - mean(sft.sampled)) < 0.10
    assert redi.negative_logp < control.negative_logp
