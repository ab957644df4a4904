"""Bad rows: the first 20 are named with file and row, and how many more there are."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_cases import CHATML, save_tokenizer, settings, write_rows

from redi.engine.console import Console
from redi.engine.data import tokens as tokens_module
from redi.engine.data.schedule import select
from redi.engine.data.tokens import TokenizedTraces, tokenize
from redi.engine.errors import InputError

GOOD = {"prompt": "2 + 2?", "completion": "4", "label": True, "weight": 1.0}


def changed(**changes: Any) -> str:
    return json.dumps(GOOD | changes)


WEIGHT = "column 'weight' must be a positive number within float32's range (2^-126 to 3.4e38), "

# Lines of a file, and the messages about them.
FAULTS = {
    changed(weight=float("nan")): WEIGHT,
    changed(weight=float("inf")): WEIGHT,
    changed(weight=1e300): WEIGHT,
    changed(weight=1e-300): WEIGHT,
    changed(weight=10**400): WEIGHT,
    changed(id=0).replace("0}", "9" * 5000 + "}"): "not valid JSON: Exceeds the limit",
    '{"prompt": "a", "prompt": "b", "completion": "c"}': "not valid JSON: key 'prompt' occurs 2",
    changed(weight=-1): WEIGHT,
    changed(label=2): "column 'label' must be true or false",
    changed(label="maybe"): "column 'label' must be true or false",
    changed(completion="\ud800"): "column 'completion' is not valid Unicode text",
    changed(completion=" \n\u00a0\u200b\ufeff"): "column 'completion' is empty",
    changed(prompt=7): "column 'prompt' must be text or a list of messages, not int",
    changed(teacher="\ud800"): "column 'teacher' is not valid Unicode text",
    changed(source="\ud800"): "column 'source' is not valid Unicode text",
    changed(prompt=None): "column 'prompt' must be text or a list of messages, not null",
    '{"prompt": "a", "comp': "not valid JSON",
    "[1, 2]": "a row must be a JSON object, not list",
    '{"prompt": "p", "completion": "c"}': "column 'label' must be in every row",
    '{"prompt": "p", "label": 1}': "column 'completion' is missing",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tokenized(path: Path, tokenizer: str, processes: int = 1) -> TokenizedTraces:
    wanted = settings(str(path), tokenizer)
    cache, quiet = path.parent / "cache", Console(active=False)
    return tokenize(wanted, cache, processes=processes, console=quiet)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_first_faults_are_named_in_order_and_the_others_counted(
    tmp_path, tokenizer, monkeypatch, processes
):
    monkeypatch.setattr(tokens_module, "_CHUNK_ROWS", 5)
    monkeypatch.setattr(tokens_module, "_CHUNKS_WORTH_WORKERS", 2)
    path = tmp_path / "rows.jsonl"
    lines, expected = [json.dumps(GOOD)] * 7, []
    for fault, problem in [*FAULTS.items(), *FAULTS.items()]:
        lines += [fault, *[json.dumps(GOOD)] * 4]
        expected.append(f"{path}:{len(lines) - 4}: {problem}")
    path.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        tokenized(path, tokenizer, processes)
    *found, rest = str(caught.value).splitlines()
    assert rest == f"... and {len(expected) - 20} more"
    assert len(found) == 20
    for line, start in zip(found, expected[:20], strict=True):
        assert line.startswith(start)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_rows_that_the_template_refuses_are_named_with_the_others(tmp_path):
    strict = "{% if 'bad' in messages[0].content %}{{ raise_exception('bad') }}{% endif %}" + CHATML
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=strict)
    rows = [GOOD | {"prompt": f"bad {n}"} for n in range(15)] + [GOOD | {"weight": 0}] * 15
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError) as caught:
        tokenized(tmp_path / "rows.jsonl", tokenizer)
    *found, rest = str(caught.value).splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in found] == [
        str(n) for n in range(1, 21)
    ]
    assert "the chat template refuses the row: bad" in found[14]
    assert "column 'weight'" in found[15]
    assert rest == "... and 10 more"


def test_faults_of_a_broken_csv_and_of_the_next_file_are_named_together(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc\nd,e\nf\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completion": ""}\n')
    with pytest.raises(InputError) as caught:
        tokenized(tmp_path, tokenizer)
    places = [line.split(": ")[0].rpartition("/")[2] for line in str(caught.value).splitlines()]
    assert places == ["a.csv:3", "a.csv:5", "b.jsonl:1"]


def test_a_file_that_breaks_off_ends_the_list(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text("[1, 2")
    (tmp_path / "b.jsonl").write_text("null\n")
    with pytest.raises(InputError) as caught:
        tokenized(tmp_path, tokenizer)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "a row must be a JSON object, not int",
        "not valid JSON",
        "a row must be a JSON object, not null",
    ]


@pytest.mark.slow
def test_a_trace_of_10_megabytes_is_read_and_falls_to_the_limit(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    long = json.dumps(GOOD | {"prompt": "q", "completion": "So the sum is 4. " * 600_000})
    path.write_text(f"{json.dumps(GOOD)}\n{long}\n")
    tokens = tokenized(path, tokenizer)
    assert tokens.lengths[1] > 1_000_000
    limits: dict[str, Any] = {"max_tokens": 19_800, "row_tokens": 32_768}
    with pytest.raises(InputError, match=r"rows.jsonl:2: \d{7} tokens are more than"):
        select(tokens, objective_needs="positives", overlong="error", **limits)
    kept = select(tokens, objective_needs="positives", overlong="drop", **limits)
    assert kept.left_out == {"overlong dropped": 1}
    assert kept.units.tolist() == [[0]]
