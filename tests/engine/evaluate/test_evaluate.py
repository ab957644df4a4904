"""`redi evaluate`: samples and scores on disk, resuming, and invalid input."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from redi.engine.cli import main
from redi.engine.data.cache import open_cache
from redi.engine.data.rows import read_rows
from redi.engine.generation.scoring import pass_at_k
from redi.engine.quickstart.task import make_problems, solve

PROBLEMS = 40
OPTIONS = ["--samples", "4", "--max_new_tokens", "7", "--answer_pattern", "(.)$", "--seed", "3"]
OPTIONS += ["--batch_size", "4"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of the quickstart, with prompts of two lengths and one problem twice."""
    path = tmp_path_factory.mktemp("problems") / "test.jsonl"
    drawn = make_problems(PROBLEMS, random.Random(1))
    prompts = [p if i % 2 else p[3:] for i, p in enumerate(drawn)]
    rows = [
        {"id": f"q{i}", "prompt": p, "answer": solve(drawn[i])[-1]} for i, p in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return path


@pytest.fixture(scope="module")
def finished(world: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an evaluation that was never interrupted."""
    folder = tmp_path_factory.mktemp("evaluations") / "finished"
    assert main(line(world, problems, folder)) == 0
    return folder


def line(world: Path, problems: Path, out: Path, *more: str) -> list[str]:
    model, data = str(world / "model"), str(problems)
    return ["evaluate", model, "--data", data, "--out", str(out), *OPTIONS, *more]


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "samples.jsonl").read_text().splitlines()]


def test_every_sample_is_written_with_its_correctness(finished: Path, problems: Path) -> None:
    rows = [json.loads(text) for text in problems.read_text().splitlines()][:PROBLEMS]
    found = samples(finished)
    places = sorted((each["problem"], each["sample"]) for each in found)
    assert places == [(p, s) for p in range(PROBLEMS) for s in range(4)]
    for each in found:
        row = rows[each["problem"]]
        assert (each["id"], each["prompt"], each["answer"]) == (
            row["id"],
            row["prompt"],
            row["answer"],
        )
        (trace,) = each["traces"]
        assert each["extracted"] == (trace["text"][-1:] or None)
        assert trace["correct"] == (each["extracted"] == row["answer"])
        assert trace["finished"] == each["ended"]
        assert each["tokens"] == len(trace["text"]) + each["ended"]
    assert 0 < sum(each["traces"][0]["correct"] for each in found) < len(found)


def test_samples_train_with_their_labels_and_the_prompt_templated_once(
    world: Path,
    tmp_path: Path,
    recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    # The tiny vocabulary has only characters, so a template applied twice is visible.
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ '*' + m.content + '*' }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    (model / "chat_template.jinja").write_text(template)
    data = tmp_path / "problems.jsonl"
    prompts = [f"{number}=" for number in range(10, 30)]
    data.write_text(
        "".join(json.dumps({"prompt": text, "answer": text[0]}) + "\n" for text in prompts)
    )
    out = tmp_path / "evaluation"
    argv = ["evaluate", str(model), "--data", str(data), "--out", str(out), *OPTIONS]
    assert main([*argv, "--temperature", "1.0"]) == 0
    # An empty completion is always incorrect. It is counted and dropped.
    found = [each for each in samples(out) if each["traces"][0]["text"]]
    assert len(found) < len(samples(out))
    labels = [each["traces"][0]["correct"] for each in found]
    assert 0 < sum(labels) < len(labels)
    assert {each["rendered_prompt"] for each in found} == {f"*{text}*" for text in prompts}
    cache = tmp_path / "cache"
    changes = {
        "model.path": str(model),
        "data.path": str(out / "samples.jsonl"),
        "data.cache": str(cache),
        "objective.name": "signed",
        "objective.alpha": 0.5,
        "train.max_steps": 1,
    }
    capsys.readouterr()
    assert main(["train", str(recipe("r", changes))]) == 0
    err = capsys.readouterr().err
    assert "not read" not in err
    assert re.search(rf"empty incorrect trace +{len(samples(out)) - len(found)}\s", err)
    tokens = open_cache(next(path.parent for path in cache.glob("*/meta.json")))
    assert tokens is not None
    assert (tokens.signs > 0).tolist() == labels
    tokenizer = AutoTokenizer.from_pretrained(model)
    for index, each in enumerate(found):
        prompt = tokens.ids(index)[: tokens.prompt_lengths[index]]
        assert tokenizer.decode(prompt) == f"*{each['prompt']}*"
        assert tokens.teacher(index) == str(model)


@pytest.mark.parametrize("name", ["samples.jsonl", "samples.parquet"])
def test_the_samples_of_a_problem_are_one_row_to_train_on(
    name: str, finished: Path, world: Path, problems: Path, tmp_path: Path
) -> None:
    out = tmp_path / name
    out.write_text("replaced")
    assert main(line(world, problems, finished, "--traces", str(out))) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert json.loads((finished / "summary.json").read_text())["settings"].get("traces") is None
    drawn = sorted(samples(finished), key=lambda each: (each["problem"], each["sample"]))
    rows = list(read_rows([str(out)], "traces"))
    assert len(rows) == PROBLEMS
    for number, row in enumerate(rows):
        mine = drawn[4 * number : 4 * number + 4]
        expected = {"id": f"q{number}", "prompt": mine[0]["prompt"]}
        assert {name: row.value[name] for name in expected} == expected
        found = [(t["text"], t["correct"], t["finished"]) for t in row.value["traces"]]
        assert found == [
            (t["text"], t["correct"], t["finished"]) for (t,) in (each["traces"] for each in mine)
        ]
        assert {trace["teacher"] for trace in row.value["traces"]} == {str(world / "model")}


def test_samples_of_an_older_version_are_refused_in_one_line(
    finished: Path,
    world: Path,
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "old"
    shutil.copytree(finished, out)
    lines = [{**each, "completion": "", "correct": True} for each in samples(out)]
    for each in lines:
        del each["traces"]
    (out / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    before = (out / "samples.jsonl").read_bytes()
    assert main(line(world, problems, out)) == 2
    assert "older version of redi (no traces); choose another out" in capsys.readouterr().err
    assert (out / "samples.jsonl").read_bytes() == before


def test_the_summary_agrees_with_the_samples(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    [scores] = summary["benchmarks"]
    found = samples(finished)
    correct = np.zeros((PROBLEMS, 4), dtype=bool)
    for each in found:
        correct[each["problem"], each["sample"]] = each["traces"][0]["correct"]
    assert scores["pass_at_1"] == pytest.approx(correct.mean())
    assert scores["sem_over_samples"] == pytest.approx(correct.mean(axis=0).std(ddof=1) / 2)
    for k in (1, 2, 4):
        exact = np.mean([pass_at_k(4, int(count), k) for count in correct.sum(axis=1)])
        assert scores["pass_at"][str(k)] == pytest.approx(exact)
    assert scores["truncated"] == pytest.approx(np.mean([not each["ended"] for each in found]))
    assert scores["mean_tokens"] == pytest.approx(np.mean([each["tokens"] for each in found]))
    assert summary["settings"]["max_new_tokens"] == 7
    assert summary["versions"]["transformers"]


@pytest.mark.slow
def test_a_killed_evaluation_resumes_to_the_same_samples(
    finished: Path,
    world: Path,
    problems: Path,
    tmp_path: Path,
    command: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(*line(world, problems, out)), env=environment)
    deadline = time.monotonic() + 120
    while not (out / "samples.jsonl").exists() or len(samples(out)) < 8:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = (out / "samples.jsonl").read_bytes()
    assert len(made) < len((finished / "samples.jsonl").read_bytes())
    # the state after a kill in the middle of writing a batch
    whole = made[: made.rindex(b"\n") + 1]
    following = (finished / "samples.jsonl").read_bytes()[len(whole) :].split(b"\n")
    (out / "samples.jsonl").write_bytes(whole + following[0] + b"\n" + following[1][:30])
    capsys.readouterr()
    assert main(line(world, problems, out)) == 0
    assert "resuming after" in capsys.readouterr().err
    assert (out / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()


def test_a_finished_evaluation_shows_its_table_again_without_a_model(
    finished: Path,
    world: Path,
    problems: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    before = (finished / "samples.jsonl").read_bytes()
    summary = json.loads((finished / "summary.json").read_text())
    monkeypatch.setattr("redi.engine.generation.engines.load_weights", refuse)
    assert main(line(world, problems, finished, "--k", "3")) == 0
    shown = capsys.readouterr()
    assert "already finished" in shown.err
    assert "pass@3" in shown.out
    assert f"{100 * summary['benchmarks'][0]['pass_at_1']:.1f}" in shown.out
    assert (finished / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", "4"], "another seed (3, now 4)"),
        (["--temperature", "0.5"], "another temperature (0.6, now 0.5)"),
        (["--limit", "9"], "another limit (None, now 9)"),
        (["--answer_pattern", "^(.)"], "another answer_pattern"),
        (["--template", "none"], "another template (chat, now none)"),
    ],
)
def test_a_changed_setting_is_named_and_nothing_is_touched(
    change: list[str],
    said: str,
    finished: Path,
    world: Path,
    problems: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert main(line(world, problems, finished, *change)) == 2
    assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_changed_model_or_problem_is_named(
    finished: Path,
    world: Path,
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = line(world, problems, finished)
    argv[1] = str(world / "tied")
    assert main(argv) == 2
    assert "another model" in capsys.readouterr().err
    other = tmp_path / "test.jsonl"
    other.write_text(problems.read_text().replace('"answer": "1"', '"answer": "7"'))
    assert main(line(world, other, finished)) == 2
    assert "another data" in capsys.readouterr().err


def test_several_files_are_scored_each_and_together(
    world: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = problems.read_text().splitlines(keepends=True)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.csv"
    one.write_text("".join(lines[:10]))
    rows = [json.loads(text) for text in lines[10:30]]
    two.write_text("question,answer\n" + "".join(f"{r['prompt']},{r['answer']}\n" for r in rows))
    argv = line(world, one, tmp_path / "out", "--data", str(one), str(two), "--temperature", "1")
    assert main(argv) == 0
    scores = json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]
    assert [(s["name"], s["problems"]) for s in scores] == [
        (str(one), 10),
        (str(two), 20),
        ("all", 30),
    ]
    of_all = (10 * scores[0]["pass_at_1"] + 20 * scores[1]["pass_at_1"]) / 30
    assert scores[2]["pass_at_1"] == pytest.approx(of_all)
    assert "two.csv" in capsys.readouterr().out


def test_a_run_directory_is_evaluated_by_its_export(
    world: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text("")
    argv = ["evaluate", str(run), "--data", str(problems), "--temperature", "0", "--limit", "3"]
    assert main(argv) == 2
    assert "has no export yet" in capsys.readouterr().err
    shutil.copytree(world / "model", run / "export")
    assert main(argv) == 0
    assert len(samples(run / "evaluate-test")) == 3
    shutil.copytree(world / "tied", run / "export-step-4")
    argv[1] = str(run / "export-step-4")
    assert main(argv) == 0
    assert len(samples(run / "evaluate-step-4-test")) == 3


def test_max_new_tokens_defaults_to_the_context_less_the_longest_prompt(
    world: Path, problems: Path, tmp_path: Path
) -> None:
    argv = ["evaluate", str(world / "model"), "--data", str(problems), "--limit", "4"]
    assert main([*argv, "--temperature", "0", "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["max_new_tokens"] == 64 - 8


BAD_DATA = {
    "missing file": (None, "data.jsonl: no such file"),
    "empty file": ("", "data.jsonl: holds no rows"),
    "no answer column": ('{"prompt": "1="}\n', "data.jsonl:1: no answer"),
    "no prompt column": ('{"text": "1=", "answer": "2"}\n', "data.jsonl:1: no prompt"),
    "empty answer": ('{"prompt": "1=", "answer": " "}\n', "data.jsonl:1: column 'answer' is empty"),
    "unmarked solution": ('{"prompt": "1=", "solution": "2"}\n', "has no answer marked by"),
    "an object for an answer": ('{"prompt": "1=", "answer": {}}\n', "must be text, a number or a"),
    "an empty list for an answer": ('{"prompt": "1=", "answer": []}\n', "'answer' is empty"),
    "two answers": (
        '{"prompt": "1=", "answer": "2"}\n{"prompt": "1=", "answer": "3"}\n',
        "data.jsonl:2: the prompt is that of",
    ),
    "prompt too long": (
        json.dumps({"prompt": "1" * 64, "answer": "2"}) + "\n",
        "the prompt has 64 tokens, but the model's context is 64",
    ),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_problems_are_one_line_with_file_and_row(
    what: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = BAD_DATA[what]
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    argv = ["evaluate", str(world / "model"), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert said in err[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--samples", "2", "--k", "3"], "k must be between 1 and the number of samples, 2"),
        (["--samples", "2", "--temperature", "0"], "would give 2 equal completions"),
        (["--max_new_tokens", "60"], "which leaves 56, not 60"),
        (["--answer_pattern", "("], "not a regular expression"),
        (["--checker", "math", "--answer_pattern", "(.)"], 'needs the checker "exact"'),
        (["--sampels", "2"], "did you mean --samples?"),
        (["--samples", "two"], "samples: needs a whole number, got two"),
        (["--device", "nonsense"], "device 'nonsense'"),
        pytest.param(
            ["--device", "cuda"],
            "device 'cuda' is not available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_wrong_options_are_one_line(
    change: list[str],
    said: str,
    world: Path,
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["evaluate", str(world / "model"), "--data", str(problems), *change]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert said in err[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["nowhere", "."])
def test_a_wrong_model_is_named(
    model: str, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", model, "--data", str(problems)]) == 2
    assert f"MODEL: {model}" in capsys.readouterr().err


def test_a_directory_without_an_evaluation_is_not_touched(
    world: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(line(world, problems, tmp_path)) == 2
    assert "holds no evaluation" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_is_evaluated_with_the_system_prompt_and_variables_of_its_training(
    recipe: Callable[..., Path],
    world: Path,
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(world / "model", tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text(
        template.read_text() + "{% if add_generation_prompt %}{{ mark }}{% endif %}"
    )
    changes: dict[str, Any] = {"data.system_prompt": "12", "train.max_steps": 1}
    changes |= {"model.path": str(model), "data.template_variables": {"mark": "77"}}
    assert main(["train", str(recipe("run", changes))]) == 0
    run = tmp_path / "run"
    options = ["--samples", "1", "--max_new_tokens", "2", "--checker", "exact", "--limit", "2"]

    def prompts(model: Path, out: str, *more: str) -> list[str]:
        line = ["evaluate", str(model), "--data", str(problems), "--out", str(tmp_path / out)]
        assert main([*line, *options, *more]) == 0
        samples = (tmp_path / out / "samples.jsonl").read_text().splitlines()
        return [json.loads(sample)["rendered_prompt"] for sample in samples]

    capsys.readouterr()
    trained = prompts(run, "as-trained")
    assert trained == prompts(run / "export", "export")
    assert "not that of the run" not in capsys.readouterr().err
    other = prompts(run, "other", "--system_prompt", "34")
    assert "system_prompt '34' is not that of the run, '12'" in capsys.readouterr().err
    assert [prompt.replace("34", "12", 1) for prompt in other] == trained
    assert all("12" in prompt and prompt.endswith("=77") for prompt in trained)
    marked = prompts(run, "marked", "--template_variables", '{"mark": "8"}')
    assert [prompt.removesuffix("8") + "77" for prompt in marked] == trained


def test_the_math_checker_reads_other_spellings_of_a_number(
    world: Path, problems: Path, tmp_path: Path
) -> None:
    def evaluate(data: Path, out: Path) -> list[dict[str, Any]]:
        argv = ["evaluate", str(world / "model"), "--data", str(data), "--out", str(out)]
        options = ["--checker", "math", "--samples", "1", "--temperature", "0", "--limit", "8"]
        assert main([*argv, *options, "--max_new_tokens", "3"]) == 0
        return sorted(samples(out), key=lambda each: each["problem"])

    drawn = [each["traces"][0]["text"] for each in evaluate(problems, tmp_path / "drawn")]
    wide = {ord(digit): chr(ord(digit) + 0xFEE0) for digit in "0123456789"}
    answers = [text.translate(wide) + " \\text{ pears}" for text in drawn]
    answers[0] = "no number"  # words, never equal to digits
    rows = [json.loads(text) for text in problems.read_text().splitlines()][: len(drawn)]
    respelled = tmp_path / "respelled.jsonl"
    respelled.write_text(
        "".join(
            json.dumps({**row, "answer": answer}) + "\n"
            for row, answer in zip(rows, answers, strict=True)
        )
    )
    found = evaluate(respelled, tmp_path / "respelled")
    numbers = [text.isdigit() for text in drawn]
    assert sum(numbers) > 1
    doubts = json.loads((tmp_path / "respelled" / "summary.json").read_text())["doubts"]
    unmarked = [each for each in found if each["doubt"] == "no marked answer"]
    assert {doubt: one["count"] for doubt, one in doubts.items()} == {
        "no marked answer": len(unmarked)
    }
    assert len(doubts["no marked answer"]["first"]) == min(len(unmarked), 5) > 0
    assert [each["traces"][0]["correct"] for each in found] == [False, *numbers[1:]]
