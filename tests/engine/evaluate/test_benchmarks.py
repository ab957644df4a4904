"""Named benchmarks and the paper's preset, on rows of ours in the shape of the hub's data sets."""

import json
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redi.engine.cli import main
from redi.engine.data.problems import read_benchmark
from redi.engine.evaluate.benchmarks import BENCHMARKS, PRESETS, benchmark_paths
from redi.engine.evaluate.options import parse_evaluate
from redi.engine.generation.scoring import macro_average
from redi.engine.quickstart.task import write_model

# One row of each data set with its columns and types, and the answer that must be read from it.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "math500": (
        {
            "problem": "What is $1+1$?",
            "solution": "It is $\\boxed{2}$.",
            "answer": "2",
            "subject": "Algebra",
            "level": 3,
            "unique_id": "test/algebra/1.json",
        },
        "2",
    ),
    "aime24": (
        {
            "id": 60,
            "problem": "Find $m+n$.",
            "solution": "So $\\boxed{204}$.",
            "answer": "025",
            "url": "https://example.org",
            "year": "2024",
        },
        "025",
    ),
    "aime25": ({"problem": "Find $k$.", "answer": "70", "id": "0"}, "70"),
    "amc23": (
        {"id": 0, "question": "How long?", "answer": "27.0", "url": "https://example.org"},
        "27.0",
    ),
    "minerva": ({"question": "What power, in erg/s?", "answer": "4.5e33"}, "4.5e33"),
    "olympiad": (
        {
            "id": 1606,
            "question": "Find all $x$.",
            "solution": ["First $x=1$.", "Then $x=-1$."],
            "final_answer": ["$1$", "$-1$"],
            "context": None,
            "is_multiple_answer": True,
            "unit": None,
            "answer_type": "Numerical",
        },
        "1, -1",
    ),
    "gsm8k": (
        {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24\n#### 1,072"},
        "1,072",
    ),
    "math_level5": (
        {
            "problem": "Hard?",
            "level": "Level 5",
            "type": "Algebra",
            "solution": "Thus $\\boxed{\\frac{1}{2}}$.",
        },
        "\\frac{1}{2}",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each benchmark as a file or folder: the same problem twice, and two others."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for number, (name, (row, _)) in enumerate(ROWS.items()):
        column = BENCHMARKS[name].prompt
        rows = [row, row, *({**row, column: f"{row[column]} {n}"} for n in range(2))]
        if name == "math_level5":
            rows.insert(1, {**row, "level": "Level 4"})
        if number % 2:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        elif name == "olympiad" or name == "math500":  # as `hf download` saves it
            (folder / name / "sub").mkdir(parents=True)
            write(folder / name / "sub" / f"{'test' if name == 'math500' else 'OE'}.jsonl", rows)
        else:
            write(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of printable characters, whose context has room for the prompt."""
    model = tmp_path_factory.mktemp("models") / "model"
    write_model(model, seed=0, characters=string.printable, hidden_size=16, layers=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    return model


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def samples(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_row_of_each_benchmark_is_read(name: str, folder: Path) -> None:
    row, answer = ROWS[name]
    one = BENCHMARKS[name]
    path = benchmark_paths([name], str(folder))[name]
    problems = read_benchmark(name, path, one.prompt, one.answer, one.where)
    prompt = row[one.prompt]
    assert [problem.prompt for problem in problems] == [
        prompt,
        prompt,
        f"{prompt} 0",
        f"{prompt} 1",
    ]
    assert {problem.answer for problem in problems} == {answer}
    assert {problem.source for problem in problems} == {name}
    if "id" in row or "unique_id" in row:
        assert problems[0].id == str(row.get("id", row.get("unique_id")))


def test_hub_names_have_repository_configuration_and_split() -> None:
    for one in BENCHMARKS.values():
        assert re.fullmatch(r"[\w-]+/[\w.-]+(:\w+)?:(train|test)", one.hub_name)
    assert benchmark_paths(["gsm8k"], None) == {"gsm8k": "openai/gsm8k:main:test"}


def test_options_override_the_preset() -> None:
    paper = parse_evaluate(["m", "--preset", "paper"])
    assert {name: getattr(paper, name) for name in PRESETS["paper"]} == PRESETS["paper"]
    assert paper.max_new_tokens is None
    other = parse_evaluate(
        ["m", "--preset", "paper", "--samples", "2", "--benchmarks", "aime25", "gsm8k"]
    )
    assert (other.samples, other.benchmarks) == (2, ["aime25", "gsm8k"])
    assert (other.temperature, other.assistant_prefix) == (0.6, "<think>")
    file = parse_evaluate(["m", "--preset", "paper", "--data", "f.jsonl"])
    assert (file.data, file.benchmarks, file.samples) == (["f.jsonl"], [], 16)


def test_the_preset_evaluates_each_benchmark_and_averages_them(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["evaluate", str(model), "--preset", "paper", "--benchmark_dir", str(folder)]
    assert main([*argv, "--samples", "3", "--max_new_tokens", "4", "--out", str(out)]) == 0
    names = PRESETS["paper"]["benchmarks"]
    system = PRESETS["paper"]["system_prompt"]
    found = samples(out)
    assert len(found) == 5 * 4 * 3
    for each in found:
        assert each["rendered_prompt"] == f"{system}{each['prompt']}<think>"
        assert each["traces"][0]["text"].startswith("<think>")
        assert each["tokens"] <= 4
        # Four tokens do not close a thought, so nothing in it counts as an answer.
        assert each["extracted"] is None
    summary = json.loads((out / "summary.json").read_text())
    assert [one["name"] for one in summary["benchmarks"]] == names
    assert {(one["problems"], one["samples"]) for one in summary["benchmarks"]} == {(4, 3)}
    assert (summary["settings"]["temperature"], summary["settings"]["top_p"]) == (0.6, 0.95)
    shown = capsys.readouterr().out
    header = re.search(r"^ *model .*", shown, re.MULTILINE)
    assert header is not None
    titles = ["MATH-500", "AIME24", "AMC23", "Minerva", "Olympiad", "average"]
    assert header[0].split() == ["model", *titles]
    table = (out / "table.md").read_text().splitlines()
    assert table[2] == f"| model | {' | '.join(titles)} |"
    assert re.fullmatch(r"\| .+ \|( 0\.0 ± 0\.0 \|){6}", table[4])


def test_the_table_compares_evaluations_with_their_standard_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    correct = {name: rng.random((size, 16)) < 0.4 for name, size in (("aime24", 30), ("mine", 9))}
    by_sample = [np.mean([c[:, n].mean() for c in correct.values()]) for n in range(16)]
    average = macro_average(list(correct.values()))
    assert average.pass_at_1 == pytest.approx(np.mean([c.mean() for c in correct.values()]))
    # PAPER: the standard deviation of the 16 whole-benchmark scores / 4
    assert average.sem_over_samples == pytest.approx(np.std(by_sample, ddof=1) / 4)
    errors = [c.mean(axis=1).std(ddof=1) / np.sqrt(len(c)) for c in correct.values()]
    assert average.sem_over_problems == pytest.approx(np.hypot(*errors) / 2)
    for name, benchmarks in (("one", ["aime24", "mine"]), ("two", ["aime24"])):
        (tmp_path / name).mkdir()
        rows = [{"name": b, "pass_at_1": 0.25, "sem_over_samples": 0.012} for b in benchmarks]
        summary = {"model": f"models/{name}", "benchmarks": rows, "average": rows[0]}
        summary["settings"] = {"data": name, "samples": 16, "temperature": len(rows)}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    out = tmp_path / "table.md"
    assert main(["table", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "25.0 ± 1.2" in shown.out
    assert "it has other problems, temperature is 1, not 2" in shown.err
    assert out.read_text().splitlines()[2:] == [
        "| model | AIME24 | mine | average |",
        "| --- | ---: | ---: | ---: |",
        "| models/one | 25.0 ± 1.2 | 25.0 ± 1.2 | 25.0 ± 1.2 |",
        "| models/two | 25.0 ± 1.2 | - | - |",
    ]
    assert main(["table", str(tmp_path)]) == 2
    assert "no finished evaluation" in capsys.readouterr().err


def test_a_prefix_is_not_repeated_and_a_thought_of_the_template_is_a_thought(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    template = model / "chat_template.jinja"
    before = template.read_text()
    options = ["--benchmarks", "aime25", "--benchmark_dir", str(folder), "--max_new_tokens", "4"]
    options += ["--assistant_prefix", "<think>\n", "--temperature", "2"]
    try:
        for number, opening in enumerate(("<think>", "<think>\n")):
            template.write_text(before + "{% if add_generation_prompt %}" + opening + "{% endif %}")
            out = tmp_path / str(number)
            assert main(["evaluate", str(model), *options, "--out", str(out)]) == 0
            for each in samples(out):
                assert each["rendered_prompt"] == each["prompt"] + opening
                assert not each["traces"][0]["text"].startswith("<think>")
                assert each["extracted"] is None
    finally:
        template.write_text(before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "missing: --data FILE, --benchmarks NAME or --preset paper"),
        ("--benchmarks aime23", "unknown benchmark 'aime23'; available: math500, aime24"),
        ("--benchmarks aime24 aime24", "named twice"),
        ("--data d.jsonl --benchmark_dir .", "benchmark_dir is not used without benchmarks"),
        ("--benchmarks gsm8k --benchmark_dir .", "no file gsm8k.jsonl"),
        ("--preset papers", "needs one of ['paper'], got papers"),
    ],
)
def test_wrong_benchmark_options_are_one_line(
    options: str,
    said: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(model), *options.split()]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
