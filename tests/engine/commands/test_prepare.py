"""`redi prepare`: the paper's sets from raw rows, in the paper's order; a recipe's cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from redi.engine.cli import main
from redi.engine.config import sections

THOUGHT = "I add.</think>So it is \\boxed{{{}}}."


def raw(number: int, verdicts: list[tuple[bool | None, bool | None]], **changes: Any) -> dict:
    """A problem with a generation for each (llama, math-verify)."""
    return {
        "uuid": f"u{number}",
        "problem": f"{number} + 1?",
        "source": "olympiads",
        "problem_is_valid": "Yes",
        "generations": [f"{number}: try {i}" for i in range(len(verdicts))],
        "correctness": {
            "llama_verification": [llama for llama, _ in verdicts],
            "math_verify_reparsed_answer": [math_verify for _, math_verify in verdicts],
        },
        **changes,
    }


GOOD, BAD, MIXED = (True, True), (False, False), (True, False)
ROWS = [
    raw(0, [BAD, GOOD, GOOD, BAD]),
    raw(1, [GOOD, GOOD]),
    raw(2, [BAD]),
    raw(3, [MIXED, (None, True), GOOD]),
    raw(4, [GOOD, BAD], problem_is_valid="No"),
    raw(5, [GOOD, BAD], problem_is_valid="YES"),
    raw(6, [GOOD, BAD], source="cn_k12"),
    raw(7, [GOOD, BAD], generations=["one"]),
    raw(8, [GOOD, BAD], problem="8" * 900),
    raw(9, [GOOD, BAD], generations=["9" * 50, "9" * 20_000]),
    raw(10, [GOOD, BAD], generations=["", "wrong"]),
    raw(11, []),
]


def shared(number: int) -> dict[str, Any]:
    """Columns of a row of ROWS that both sets keep."""
    row = ROWS[number]
    return {"id": row["uuid"], "prompt": row["problem"], "source": "olympiads"}


@pytest.fixture
def prepare(world: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the command on rows; returns both sets and the counts."""

    def run(rows: list[dict[str, Any]], *options: str, limits: bool = True) -> dict[str, Any]:
        path, out = tmp_path / "raw.jsonl", tmp_path / "out"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        no_limits = ("--max_prompt_tokens", "0", "--max_trace_tokens", "0")
        more = ("--tokenizer", str(world / "model")) if limits else no_limits
        assert main(["prepare", "openr1", str(path), "--out", str(out), *more, *options]) == 0
        found: dict[str, Any] = {"counts": json.loads((out / "report.json").read_text())["counts"]}
        for name in ("sft", "pref"):
            lines = (out / f"{name}.jsonl").read_text().splitlines()
            found[name] = [json.loads(line) for line in lines]
        return found

    return run


def test_the_defaults_are_the_papers_rules_order_and_seed(prepare: Callable[..., Any]) -> None:
    found = prepare(ROWS)
    shuffled = datasets.Dataset.from_list([{"n": n} for n in range(len(ROWS))]).shuffle(seed=42)
    first = {0: "0: try 1", 1: "1: try 0", 3: "3: try 2", 5: "5: try 0", 8: "8: try 0", 9: "9" * 50}
    assert found["sft"] == [
        {**shared(n), "completion": first[n]} for n in shuffled["n"] if n in first
    ]
    wrong = {0: "0: try 0", 3: "3: try 0", 5: "5: try 1"}
    assert found["pref"] == [
        {**shared(n), "chosen": first[n], "rejected": wrong[n]} for n in shuffled["n"] if n in wrong
    ]
    assert found["counts"] == {
        "rows read": 12,
        "rows: lists of different length": 1,
        "rows: no generation": 1,
        "rows: problem not valid": 1,
        "rows: source cn_k12": 1,
        "generations empty": 1,
        "generations unfinished, kept": 17,
        "problems with correct and incorrect generations": 5,
        "problems with correct generations alone": 1,
        "problems with incorrect generations alone": 2,
        "pairs before the limits": 5,
        "pairs: a trace over 19,000 tokens": 1,
        "pairs: prompt over 800 tokens": 1,
        "rows of sft.jsonl": 6,
        "rows of pref.jsonl": 3,
    }


@pytest.mark.parametrize(
    ("rule", "correct"),
    [
        ("both", ["a"]),
        ("agree", ["a"]),
        ("either", ["a", "c", "d"]),
        ("llama", ["a", "c"]),
        ("math", ["a", "d"]),
    ],
)
def test_which_verifier_decides_that_a_generation_is_correct(
    rule: str, correct: list[str], prepare: Callable[..., Any]
) -> None:
    row = raw(0, [GOOD, BAD, MIXED, (False, True)], generations=list("abcd"))
    found = prepare([row], "--verifiers", rule, "--take", "all", limits=False)
    assert [line["completion"] for line in found["sft"]] == correct
    wrong = ["b"] if rule == "agree" else [text for text in "abcd" if text not in correct]
    pairs = [(line["chosen"], line["rejected"]) for line in found["pref"]]
    assert pairs == [(a, b) for a in correct for b in wrong]


@pytest.mark.parametrize(
    ("take", "pair"), [("first", ("bb", "ffff")), ("shortest", ("a", "ee")), ("longest", None)]
)
def test_which_generations_of_a_problem_are_taken(
    take: str, pair: tuple[str, str] | None, prepare: Callable[..., Any]
) -> None:
    texts = ["bb", "ffff", "a", "ee", "ccc"]
    row = raw(0, [GOOD, BAD, GOOD, BAD, GOOD], generations=texts)
    (line,) = prepare([row], "--take", take, limits=False)["pref"]
    assert (line["chosen"], line["rejected"]) == (pair or ("ccc", "ffff"))


def test_unfinished_generations_are_left_out_and_thoughts_opened(
    prepare: Callable[..., Any],
) -> None:
    texts = [
        THOUGHT.format(1),
        "<think>\n" + THOUGHT.format(2),
        "I think \\boxed{3}",
        "I add.</think>So it is 4.",
        "never ending \\boxed{5} </think>",
        "think\nanswer\n7\nI add.\nanswer\n\\boxed{6}",
    ]
    row = raw(0, [GOOD] * 6, generations=texts)
    options = ("--take", "all", "--finished", "true", "--open_think", "true")
    found = prepare([row], *options, limits=False)
    assert [line["completion"] for line in found["sft"]] == [
        f"<think>\n{texts[0]}",
        texts[1],
        "<think>\nanswer\n7\nI add.\n</think>\n\n\\boxed{6}",
    ]
    assert found["counts"]["generations unfinished"] == 3
    assert found["counts"]["generations given think tags"] == 4


def test_columns_that_training_reads_are_kept(prepare: Callable[..., Any]) -> None:
    found = prepare([raw(0, [GOOD, BAD], teacher="r1", weight=2.5, other=1)], limits=False)
    shared = {"id": "u0", "prompt": "0 + 1?", "source": "olympiads", "teacher": "r1", "weight": 2.5}
    assert found["sft"] == [{**shared, "completion": "0: try 0"}]
    assert found["pref"] == [{**shared, "chosen": "0: try 0", "rejected": "0: try 1"}]


def test_faulty_rows_are_named_and_no_set_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "raw.jsonl", tmp_path / "out"
    wrong = raw(1, [GOOD], problem=None), raw(2, [GOOD], generations="text"), {"a": 1}
    rows = [ROWS[0], *wrong, raw(4, [GOOD], problem="\ud800"), raw(5, [GOOD], uuid="\ud800")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--max_prompt_tokens", "0", "--max_trace_tokens", "0"]
    assert main(["prepare", "openr1", str(path), "--out", str(out), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    places = [line.removeprefix("redi: ").removeprefix(str(path)).split(": ")[0] for line in lines]
    assert places == [":2", ":3", ":4", ":5", ":6"]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "tokenizer is missing"),
        (["--tokenizer", "t", "--seed", "-1"], "seed must be >= 0"),
        (["--tokenizer", "t", "--taek", "all"], "did you mean --take?"),
        (["--tokenizer", "t", "--verifiers", "none"], "verifiers"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "openr1", "x.jsonl", "--out", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_recipes_cache_is_filled_without_weights_and_found_by_training(
    world: Path, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe("r", {"data.cache": str(tmp_path / "cache"), "train.max_steps": 1})
    bare, report = tmp_path / "bare", tmp_path / "report"
    shutil.copytree(world / "model", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    options = ["--model.path", str(bare), "--ranks", "2", "--report", str(report)]
    assert main(["prepare", str(path), *options]) == 0
    assert json.loads((report / "report.json").read_text())["overview"]["world_size"] == 2
    assert (report / "lengths.png").stat().st_size > 1000
    shown = capsys.readouterr().err
    assert f"{world / 'traces.jsonl'}: what is trained" in shown
    assert "pairs to train on" in shown
    assert "rank efficiency, 2 ranks" in shown
    (arrow,) = (tmp_path / "cache").glob("*/traces.arrow")
    made = arrow.stat().st_mtime_ns
    assert not (tmp_path / "r").exists()
    assert main(["train", str(path), "--quiet"]) == 0
    assert arrow.stat().st_mtime_ns == made


def test_a_set_given_twice_is_as_given_once_when_duplicates_are_dropped(
    world: Path, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again.jsonl"
    shutil.copy(world / "traces.jsonl", again)
    found = []
    for name, paths in (("once", []), ("twice", [str(again)])):
        changes = {"data.path": [str(world / "traces.jsonl"), *paths], "data.duplicates": "drop"}
        out = tmp_path / name
        assert main(["prepare", str(recipe(name, changes)), "--report", str(out)]) == 0
        found.append(json.loads((out / "report.json").read_text())["overview"])
    once, twice = found
    assert twice["traces"] == 2 * once["traces"]
    assert (twice["units"], twice["lengths"]) == (once["units"], once["lengths"])
    assert twice["duplicates"] == 0
    dropped = twice["left_out"]["duplicates dropped"]
    assert dropped == once["traces"] + once["left_out"].get("duplicates dropped", 0)
    assert f"- duplicates dropped {dropped}" in " ".join(capsys.readouterr().err.split())


def test_a_recipe_that_trains_anothers_export_is_prepared_with_its_model(
    recipe: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sft = recipe("sft", {"objective.name": "sft"})
    redi = recipe("redi", {"model.path": str(tmp_path / "sft" / "export")})
    assert main(["prepare", str(sft), str(redi)]) == 0
    assert "pairs to train on" in capfd.readouterr().err
    assert main(["prepare", str(redi)]) == 2
    assert "no such directory" in capfd.readouterr().err


def test_recipes_and_prepare_take_the_same_pairs(
    world: Path, tmp_path: Path, prepare: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(sections.__file__).parents[1] / "recipes" / "paper-redi.toml"
    overrides = {
        "model.path": world / "model",
        "data.cache": tmp_path / "cache",
        "data.processes": 1,
        "data.system_prompt": "7" * 30,
        "data.max_prompt_tokens": 80,
        "data.max_completion_tokens": 190,
        "train.batch": 1,
    }

    def pairs(name: str, *more: str) -> dict[str, Any]:
        options = [f"--{key}={value}" for key, value in overrides.items()]
        line = ["prepare", str(recipe), f"--data.path={tmp_path / name}", *options]
        assert main([*line, "--report", str(tmp_path / "report"), *more]) == 0
        return json.loads((tmp_path / "report" / "report.json").read_text())["overview"]

    # Without the system prompt these prompts would fit.
    near = [raw(n, [GOOD, BAD], problem=f"{n:060}") for n in range(20, 28)]
    long_first = [
        raw(n, [GOOD, BAD, BAD], generations=["1", "2" * 190, "3"]) for n in range(30, 38)
    ]
    fits = [raw(n, [GOOD, BAD], generations=["1", "2" * 189]) for n in range(40, 43)]
    limits = ("--max_prompt_tokens", "80", "--max_trace_tokens", "190")
    options = (*limits, "--system_prompt", "7" * 30)
    found = prepare([*ROWS[:8], *near, *long_first, *fits], *options)
    assert found["counts"]["pairs: prompt over 80 tokens"] == len(near)
    assert found["counts"]["pairs: a trace over 190 tokens"] == len(long_first)
    from_raw, from_pref = pairs("raw.jsonl"), pairs("out/pref.jsonl")
    assert from_raw["units"] == from_pref["units"] == len(found["pref"]) == 3 + len(fits)
    assert from_raw["lengths"] == from_pref["lengths"]
    assert from_pref["left_out"] == {}
    # Eight problems whose first incorrect trace is too long, and whose second is not: no pair.
    assert prepare(long_first, *options)["pref"] == []
    line = [f"--{key}={value}" for key, value in overrides.items()]
    assert main(["prepare", str(recipe), f"--data.path={tmp_path / 'raw.jsonl'}", *line]) == 2
    assert "overlong dropped" in capsys.readouterr().err
