"""Which rows are trained: expressions, a minimum length, faulty rows, variables of the template."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import CHATML, save_tokenizer, settings, write_rows
from transformers import AutoTokenizer

from redi.engine.cli import main
from redi.engine.config.sections import DataConfig
from redi.engine.console import Console
from redi.engine.data.schedule import select
from redi.engine.data.tokens import TokenizedTraces, tokenize
from redi.engine.data.where import Where
from redi.engine.errors import FaultyRow, InputError

QUIET = Console(active=False)
ROWS: list[dict[str, Any]] = [
    {"source": "math", "level": 3, "share": 0.5, "meta": {"year": 2024}, "tokens": 10},
    {"source": "geometry", "level": None, "share": 0.25, "meta": {"year": 2025}, "tokens": 4000},
    {"source": None, "level": 5, "share": 1.0, "meta": None, "tokens": 20},
    {"level": 1, "share": -0.5, "meta": {"year": 2024}, "tokens": 5},
]
# Expressions, with the same selection as pandas' `query` or mask.
EXPRESSIONS: dict[str, Callable[[pandas.DataFrame], Any]] = {
    "source == 'math' and tokens < 4000": lambda t: (t.source == "math") & (t.tokens < 4000),
    "source != 'math'": lambda t: (t.source != "math") & t.source.notna(),
    "not source == 'math'": lambda t: (t.source != "math") & t.source.notna(),
    "source in ['math', 'code']": lambda t: t.source.isin(["math", "code"]),
    "source not in ('math', 'code')": lambda t: t.source.notna() & ~t.source.isin(["math"]),
    "'metr' in source": lambda t: t.source.str.contains("metr", na=False),
    "source is None": lambda t: t.source.isna(),
    "source is not None or level > 4": lambda t: t.source.notna() | (t.level > 4),
    "level / 2 > 1 or share * 2 >= 2": lambda t: (t.level / 2 > 1) | (t.share * 2 >= 2),
    "share > -0.5": lambda t: t.share > -0.5,
    "3 <= level <= 5": lambda t: t.level.between(3, 5),
    "meta.year == 2024": lambda t: t.meta.map(lambda one: bool(one) and one["year"] == 2024),
    "level in [1, 5]": lambda t: t.level.isin([1, 5]),
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_selects_the_rows_that_pandas_selects(text: str) -> None:
    rows = [{**row, "prompt_tokens": 1, "completion_tokens": 1} for row in ROWS]
    kept = Where(text).keep(rows, ["x:1"] * len(rows))
    assert kept == EXPRESSIONS[text](pandas.DataFrame(ROWS)).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('x')",
        "source.startswith('m')",
        "[x for x in source]",
        "(lambda: 1)()",
        "source == 'math' if level else 1",
        "source in other",
        "level ** 9",
        "tokens",
        "'text'",
        "source = 'math'",
        "source == 'math' AND level > 1",
        "",
        "(" * 10_000,
    ],
)
def test_what_is_no_such_expression_is_refused_with_the_recipe(text: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.where: ") as caught:
        DataConfig(path="x", where=text)
    assert "\n" not in str(caught.value)


def test_a_row_to_which_an_expression_does_not_apply_is_named() -> None:
    rows = [{"level": 3}, {"level": "hard"}, {"level": "5"}, {"level": ""}]
    kept = Where("level > 4").keep(rows, [f"rows.jsonl:{n}" for n in range(1, 5)])
    assert (kept[0], kept[2], kept[3]) == (False, True, False)
    assert isinstance(kept[1], FaultyRow)
    assert str(kept[1]) == (
        "rows.jsonl:2: [data] where = 'level > 4' does not apply to this row, whose level is 'hard'"
    )
    (kept_text,) = Where("meta.level > 4").keep([{"meta": "{}"}], ["rows.jsonl:1"])
    assert str(kept_text).endswith("does not apply to this row, whose meta is '{}'")


@pytest.mark.parametrize(
    "text",
    [
        "source in ['math']",
        "source not in ['code']",
        "'ma' in source",
        "'co' not in source",
        "meta.level > 2",
        "meta.level in [3, 4]",
        "level * 2 > 5",
        "level in [3.0]",
        "verified",
        "not hidden",
        "verified and source == 'math'",
        "source == meta.source",
    ],
)
def test_which_rows_are_selected_does_not_depend_on_those_read_with_them(text: str) -> None:
    full = {
        "source": "math",
        "level": 3,
        "verified": True,
        "hidden": False,
        "meta": {"level": 3, "source": "math"},
    }
    rows = [full, {}, dict.fromkeys(full), {"meta": {"other": 1}}]
    together = Where(text).keep(rows, "abcd")
    assert together == [True, False, False, False]
    assert together == [Where(text).keep([row], "a")[0] for row in rows]


def test_a_number_that_is_text_as_in_csv_is_a_number_in_each_operation() -> None:
    rows = [{"level": "3"}, {"level": ""}, {"level": "1"}]
    for text in ("level * 2 > 5", "-level < -2", "level in [3]", "level / 3 == 1", "2 < level < 4"):
        assert Where(text).keep(rows, "abc") == [True, False, False]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., TokenizedTraces]:
    """Tokenizes a file of the test's folder."""

    def run(path: str, tokenizer: str, *, console: Console = QUIET, **options: Any) -> Any:
        wanted = settings(path, tokenizer, **options)
        return tokenize(wanted, tmp_path / "cache", processes=1, console=console)

    return run


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{n}=", "chosen": "1" * (n + 1), "rejected": "2", "kind": "ab"[n % 2]}
        for n in range(count)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "saved"])
def test_every_kind_of_file_gives_the_columns_that_an_expression_reads(
    kind: str, make: Callable[..., TokenizedTraces], tmp_path: Path
) -> None:
    path = str(tmp_path / f"rows.{kind}")
    if kind == "jsonl":
        write_rows(Path(path), pairs(6))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(pairs(6)), path)
    elif kind == "csv":
        pandas.DataFrame(pairs(6)).to_csv(path, index=False)
    else:
        datasets.Dataset.from_list(pairs(6)).save_to_disk(path)
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=None)
    tokens = make(path, tokenizer, template="none", where="kind == 'a' and completion_tokens > 2")
    # Of rows 1, 3 and 5 the answers of 1, 3 and 5 digits, each with its end; no rejected "2".
    assert [tokens.where(index) for index in range(len(tokens))] == [
        f"{path}:{n + (kind == 'csv')}" for n in (3, 5)
    ]
    assert tokens.signs.tolist() == [1, 1]
    assert tokens.dropped == {"not selected by where": 10}
    other = make(path, tokenizer, template="none", where="kind == 'a'")
    assert len(other) == 6
    assert other.key != tokens.key
    with pytest.raises(InputError, match=r"^\[data\] where = .*: no row of .* has a column 'kin'"):
        make(path, tokenizer, template="none", where="kin == 'a'")


def test_shorter_traces_are_left_out_and_counted(
    make: Callable[..., TokenizedTraces], tmp_path: Path
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=None)
    tokens = make(write_rows(tmp_path / "rows.jsonl", pairs(6)), tokenizer, template="none")
    options: dict[str, Any] = {"max_tokens": 100, "overlong": "error", "row_tokens": None}
    for least in (1, 5, 7):
        found = select(tokens, objective_needs="positives", min_tokens=least, **options)
        expected = (tokens.signs > 0) & (tokens.lengths >= least)
        assert found.units[:, 0].tolist() == expected.nonzero()[0].tolist()
        short = int((tokens.signs > 0).sum() - expected.sum())
        assert found.left_out.get("shorter than min_tokens", 0) == short


FAULTS = [
    '{"prompt": "1=", "chosen": "2 \\ud83d", "rejected": "1"}',
    "not JSON",
    '{"prompt": "2="}',
]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_faulty_rows_are_left_out_counted_and_named_from_the_cache_too(
    processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=None)
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(row) for row in pairs(3000 if processes > 1 else 30)]
    lines = [good[0], *FAULTS, *good[1:], *FAULTS[:1] * 30]
    path.write_text("\n".join(lines))
    wanted = settings(str(path), tokenizer, template="none", faulty="skip")
    for _ in range(2):  # made, then from the cache
        tokens = tokenize(wanted, tmp_path / "cache", processes=processes, console=Console())
        err = capsys.readouterr().err.splitlines()
        start = err.index("warning: 33 faulty rows are left out:")
        assert [line.split(": ")[0] for line in err[start + 1 : start + 4]] == [
            f"{path}:{n}" for n in (2, 3, 4)
        ]
        assert err[start + 21] == "... and 13 more"
        assert len(tokens) == 2 * len(good)
        assert tokens.dropped == {"faulty rows": 33}
    with pytest.raises(InputError, match=r"rows\.jsonl:2: column 'chosen' is not valid Unicode"):
        tokenize(
            settings(str(path), tokenizer, template="none"),
            tmp_path / "cache",
            processes=1,
            console=QUIET,
        )


@pytest.mark.parametrize("content", ['{"a": 1}\n', ""])
def test_a_file_that_cannot_be_read_is_an_error_although_rows_are_skipped(
    content: str, make: Callable[..., TokenizedTraces], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=None)
    with pytest.raises(InputError, match=r"rows\.jsonl"):
        make(str(tmp_path / "rows.jsonl"), tokenizer, template="none", faulty="skip")


def test_faulty_rows_are_named_where_no_other_is_left(
    make: Callable[..., TokenizedTraces], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1=", "chosen": null, "rejected": "3"}\n' * 21)
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=None)
    with pytest.raises(InputError) as caught:
        make(str(path), tokenizer, template="none", faulty="skip")
    first, *faults, rest = str(caught.value).splitlines()
    assert first == f"{path}: no trace is left; dropped: 21 faulty rows"
    assert faults[0] == f"{path}:1: column 'chosen' must be text or a list of messages, not null"
    assert (len(faults), rest) == (20, "... and 1 more")


def test_variables_are_given_to_the_chat_template(
    make: Callable[..., TokenizedTraces], tmp_path: Path
) -> None:
    thinking = CHATML + (
        "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}"
    )
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=thinking)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "What is 2?", "completion": "4"}])
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    ends = {}
    for value in (True, False):
        tokens = make(path, tokenizer, template_variables={"enable_thinking": value})
        ids, start = tokens.ids(0), tokens.prompt_lengths[0]
        assert decode(ids[start:]) == "4<|im_end|>\n<|end|>"
        ends[value] = decode(ids[:start]).partition("assistant\n")[2]
    assert ends == {True: "", False: "<think>\n\n</think>\n\n"}
    with pytest.raises(InputError, match=r"template_variables: .* no variable 'enable_thought'"):
        make(path, tokenizer, template_variables={"enable_thought": True})
    with pytest.raises(InputError, match="'messages' is set from the rows; remove it"):
        make(path, tokenizer, template_variables={"messages": "x"})


@pytest.mark.slow
def test_a_run_trains_what_its_recipe_selects(
    recipe: Callable[..., Path],
    redi: Callable[..., subprocess.CompletedProcess[str]],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join([json.dumps(row) for row in pairs(16)] + FAULTS))
    roles = ("user", "assistant") * 3
    turns = {"kind": "b", "messages": [{"role": role, "content": "12"} for role in roles]}
    changes = {
        "data.path": [str(data), write_rows(tmp_path / "turns.jsonl", [turns])],
        "data.train_on": "all",
        "data.cache": str(tmp_path / "cache"),
        "data.where": "kind == 'b' and tokens < 14",
        "data.min_tokens": 7,
        "data.faulty": "skip",
        "objective.name": "sft",
        "train.batch": 5,
        "train.epochs": 1,
    }
    path = recipe("r", changes)
    done = redi("train", path)
    assert done.returncode == 0, done.stderr
    assert "warning: 3 faulty rows are left out:\n" in done.stderr
    assert f"{data}:17: column 'chosen' is not valid Unicode text" in done.stderr
    # "n=" and n + 1 digits with an end, for n = 3, 5, 7, 9: 7, 9, 11, 13 tokens; 5 for n = 1. The
    # three turns have 5, 10 and 15 tokens: a question 2, an answer 3, after all before it.
    (step,) = steps(tmp_path / "r")
    shown = " ".join(done.stderr.split())
    assert "sequences to train on 5 " in shown
    assert "- shorter than min_tokens 2 " in shown
    assert "- faulty rows 3 " in shown
    assert step["tokens"] == 7 + 9 + 11 + 13 + 10
    assert main(["prepare", str(path), "--data.template_variables.enable_thinking", "false"]) == 2
    expected = "[data] template_variables: the chat template has no variable 'enable_thinking'"
    assert expected in capsys.readouterr().err
