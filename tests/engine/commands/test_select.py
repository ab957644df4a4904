"""`redi select`: what is kept is what a selection by other means keeps."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import shared_data, write_rows

from redi.engine.cli import main
from redi.engine.data.content_hash import trace_hash
from redi.engine.data.diversity import farthest_first
from redi.engine.data.rows import read_rows
from redi.engine.data.traces import normalise

PROBLEMS = 300


def select(data: Path, out: Path, *options: object) -> list[dict[str, Any]]:
    """Run the command; returns the rows that it writes."""
    assert main(["select", str(data), "--out", str(out), *map(str, options)]) == 0
    if out.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
        return rows
    return [row.value for row in read_rows([str(out)], "traces")]


def texts(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[trace["text"] for trace in row["traces"]] for row in rows]


def write_scores(data: Path, path: Path) -> pandas.DataFrame:
    """Write a table as that of `redi logprobs`, with drawn scores for every trace but a few."""
    traces = [trace for row in read_rows([str(data)], "auto") for trace in normalise(row)]
    rng = np.random.default_rng(0)
    table = pandas.DataFrame(
        {
            "hash": [trace_hash(trace) for trace in traces],
            "tokens": 1,  # those that are scored
            "completion_tokens": rng.integers(20, 400, len(traces)),
            "prompt_tokens": rng.integers(10, 90, len(traces)),
            # Of equal scores the first trace counts.
            "logp_mean": rng.integers(-40, 0, len(traces)) / 20,
            "correct": [trace.sign > 0 for trace in traces],
        }
    )
    # Equal traces have equal scores, as under a model.
    table = table.groupby("hash", sort=False).transform("first").assign(hash=table["hash"])
    table[rng.random(len(table)) < 0.98].to_parquet(path)
    return table


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the traces of six teachers and their scores."""
    folder = tmp_path_factory.mktemp("real")
    with gzip.open(shared_data() / "gsm8k_open_teachers.jsonl.gz", "rt") as file:
        lines = [next(file) for _ in range(PROBLEMS)]
    (folder / "traces.jsonl").write_text("".join(lines))
    write_scores(folder / "traces.jsonl", folder / "scores.parquet")
    return folder


def test_a_selection_is_that_of_pandas(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = select(
        real / "traces.jsonl",
        tmp_path / "chosen.jsonl",
        *("--scores", real / "scores.parquet", "--pass_rate", "0.3:0.9"),
        *("--where", "teacher != 'Qwen2-7B-Instruct' and tokens < 380 and logp_mean > -1.9"),
        *("--by", "logp_mean", "--top", 2),
    )

    given = [json.loads(line) for line in (real / "traces.jsonl").open()]
    frame = pandas.DataFrame(
        {"problem": n, "prompt": row["prompt"], **trace}
        for n, row in enumerate(given)
        for trace in row["traces"]
    )
    frame["pass_rate"] = frame.groupby("problem")["correct"].transform("mean")
    everything = [
        trace for row in read_rows([str(real / "traces.jsonl")], "auto") for trace in normalise(row)
    ]
    frame["hash"] = [trace_hash(trace) for trace in everything]
    scores = pandas.read_parquet(real / "scores.parquet").drop_duplicates("hash")
    frame = frame.merge(scores.drop(columns="correct"), on="hash", how="left")
    read = len(frame)
    frame = frame.drop_duplicates(["problem", "correct", "hash"])
    repeated = read - len(frame)
    mask = (frame.teacher != "Qwen2-7B-Instruct") & (
        frame.completion_tokens + frame.prompt_tokens < 380
    )
    frame = frame[mask & (frame.logp_mean > -1.9)]
    frame = frame[frame.pass_rate.between(0.3, 0.9)]
    frame = frame.sort_values(
        ["problem", "correct", "logp_mean"], ascending=[True, False, False], kind="stable"
    )
    top = frame.groupby(["problem", "correct"], sort=False).head(2)
    expected = top.groupby("problem")["text"].apply(list).tolist()

    assert 100 < len(expected) < PROBLEMS - 20
    assert texts(rows) == expected
    assert {row["id"] for row in rows} == {given[n]["id"] for n in top.problem}
    assert all(row["answer"] for row in rows)
    line = re.search(r"^ all +(.*)$", capsys.readouterr().err, re.M)
    assert line is not None
    figures = [int(figure.replace(",", "")) for figure in line[1].split()]
    assert figures[:2] == [read, repeated]
    assert figures[0] == sum(figures[1:-2])  # each trace is dropped by one rule, or kept
    assert figures[-3:] == [len(top), int(top.correct.sum()), int((~top.correct).sum())]


def distance(one: str, two: str) -> float:
    """Insertions and deletions between two texts over their lengths, by the textbook's table."""
    row = list(range(len(two) + 1))
    for number, a in enumerate(one, start=1):
        before, row[0] = row[0], number
        for place, b in enumerate(two, start=1):
            before, row[place] = (
                row[place],
                before if a == b else 1 + min(row[place], row[place - 1]),
            )
    return row[-1] / max(1, len(one) + len(two))


def test_each_next_diverse_trace_is_the_farthest_from_those_chosen() -> None:
    rng = random.Random(0)
    for _ in range(30):
        drawn = [
            "".join(rng.choices("ab c", k=rng.randint(1, 12))) for _ in range(rng.randint(1, 9))
        ]
        count = rng.randint(1, 5)
        chosen = farthest_first(drawn, count)
        assert len(chosen) == len(set(chosen)) == min(count, len(drawn))
        if len(drawn) <= count:
            continue
        assert chosen[0] == 0
        for place in range(1, len(chosen)):
            rest = [n for n in range(len(drawn)) if n not in chosen[:place]]
            nearest = {n: min(distance(drawn[n], drawn[c]) for c in chosen[:place]) for n in rest}
            assert nearest[chosen[place]] == pytest.approx(max(nearest.values()))


ROWS = [
    {
        "prompt": "2*3?",
        "level": 4,
        "answer": 6,
        "traces": [
            {"text": "two times three is 6", "correct": True, "teacher": "a"},
            {"text": "two times three is  6", "correct": True, "teacher": "b", "weight": 0.5},
            {"text": "6", "correct": True, "reasoning_content": "3 + 3"},
            {"text": "7", "correct": False, "teacher": "a", "finished": False},
            {"text": "8", "correct": False, "spans": [[0, 1, 0.0]], "teacher": "b"},
        ],
    },
    {"prompt": "1+1?", "level": 2, "traces": [{"text": "2", "correct": True, "teacher": "a"}]},
]


def test_diverse_traces_of_each_verdict_are_kept(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    options = ["--diverse", "--max_per_problem", 2]
    rows = select(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", *options)
    a, _, thought, *wrong = ROWS[0]["traces"]  # type: ignore[misc]
    assert rows[0]["traces"] == [a, {**thought, "teacher": None}, *wrong]
    plain = select(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", "--max_per_problem", 2)
    assert plain[0]["traces"] == [*ROWS[0]["traces"][:2], *wrong]  # type: ignore[index]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_pass_rates_are_those_of_samples_of_the_same_prompts_in_any_shape(
    suffix: str, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    # An empty answer is a sample too. One prompt is a list of messages here.
    samples = [
        {
            "prompt": [{"role": "user", "content": "2*3?"}],
            "traces": [{"text": text, "correct": False}],
        }
        for text in ("8", "", "9")
    ]
    samples[0]["traces"] = [{"text": "6", "correct": True}]
    write_rows(tmp_path / "samples.jsonl", [*samples, {**samples[0], "prompt": "1+1?"}])
    given = ["--samples", tmp_path / "samples.jsonl"]
    out = tmp_path / f"out.{suffix}"
    rows = select(tmp_path / "rows.jsonl", out, *given, "--pass_rate", "0.3:0.34")
    assert [row["prompt"] for row in rows] == ["2*3?"]
    assert rows[0]["answer"] == "6"
    rows = select(tmp_path / "rows.jsonl", out, *given, "--where", "pass_rate == 1 and level < 3")
    assert [row["prompt"] for row in rows] == ["1+1?"]


def test_pairs_become_problems_and_smallest_comes_first(tmp_path: Path) -> None:
    pairs = [
        {"prompt": "1+1?", "chosen": str(n), "rejected": "x", "length": 9 - n, "source": "s"}
        for n in range(3)
    ]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    rows = select(tmp_path / "pairs.jsonl", tmp_path / "out.jsonl", "--where", "length < 9")
    assert texts(rows) == [["1", "x"], ["2", "x"]]
    assert len({row["id"] for row in rows}) == 2
    assert rows[0]["source"] == "s"
    completions = [{**one, "completion": one["chosen"]} for one in pairs]
    for one in completions:
        del one["chosen"], one["rejected"]
    write_rows(tmp_path / "rows.jsonl", completions)
    options = ["--by", "length", "--top", 1]
    rows = select(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", *options)
    assert texts(rows) == [["0"]]
    rows = select(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", *options, "--smallest")
    assert texts(rows) == [["2"]]


BAD: dict[str, tuple[list[object], str]] = {
    "top without order": (["--top", 2], "top needs --by, such as --by logp_mean"),
    "diverse without a number": (["--diverse"], "diverse needs --max_per_problem"),
    "order without a number": (["--by", "level"], "by needs --top or --max_per_problem"),
    "range": (["--pass_rate", "0.9:0.1"], "pass_rate must be LOW:HIGH with 0 <= LOW"),
    "expression": (["--where", "level = 2"], "where: 'level = 2' is not an expression"),
    "a name that no row has": (
        ["--where", "levl < 2"],
        "where: no row has a column 'levl'; columns",
    ),
    "an order that no row has": (["--by", "logp", "--top", 1], "by: no row has a column 'logp'"),
    "text to order by": (
        ["--by", "prompt", "--top", 1],
        "rows.jsonl:1: prompt is '2*3?', no number",
    ),
    "tokens without scores": (
        ["--where", "tokens < 9"],
        "where: tokens are counted by `redi logprobs`",
    ),
    "samples that are not used": (["--samples", "rows.jsonl"], "samples is used by --pass_rate"),
    "nothing left": (["--where", "level > 9"], "not written, as no trace is left; relax the rules"),
    "no scores": (
        ["--scores", "none.parquet", "--by", "a", "--top", 1],
        "none.parquet cannot be read",
    ),
    "scores without hash": (
        ["--scores", "plain.parquet", "--by", "a", "--top", 1],
        "scores: plain.parquet has no column hash; write it with this version of",
    ),
    "scores of other traces": (
        ["--scores", "other.parquet", "--by", "a", "--top", 1],
        "scores: other.parquet has none of the 6 traces of rows.jsonl; score these with",
    ),
    "where that does not apply": (
        ["--where", "'a' in level"],
        "where = \"'a' in level\" does not apply to this row, whose level is 4",
    ),
    "order beyond any float": (
        ["long.jsonl", "--by", "level", "--top", 1],
        "by: long.jsonl:1: level is 1000",
    ),
    "where beyond any float": (
        ["long.jsonl", "--where", "level > 2"],
        "long.jsonl:1: where = 'level > 2' does not apply to this row",
    ),
    "the data replaced": (
        ["out.jsonl"],
        "out: out.jsonl is read as data, and would be replaced; name another file",
    ),
    "the samples replaced": (
        ["--samples", "out.jsonl", "--pass_rate", "0:1"],
        "out: out.jsonl is read as data, and would be replaced; name another file",
    ),
    "a document": (["text.jsonl"], "text.jsonl:1: column 'text' is a document, not the trace"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_selected_is_one_line(
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), ROWS)
    write_rows(Path("text.jsonl"), [{"text": "a story"}])
    write_rows(Path("long.jsonl"), [{**ROWS[0], "prompt": "9?", "level": 10**400}])
    pq.write_table(pa.table({"a": [1.0]}), "plain.parquet")
    pq.write_table(pa.table({"a": [1.0], "hash": ["0"]}), "other.parquet")
    Path("out.jsonl").write_text("old")
    options, fault = BAD[what]
    assert main(["select", "rows.jsonl", *map(str, options), "--out", "out.jsonl"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert fault in printed[-1]
    assert printed[-1].startswith("redi: ")
    assert Path("out.jsonl").read_text() == "old"
    assert {path.suffix for path in Path().iterdir()} == {".jsonl", ".parquet"}
