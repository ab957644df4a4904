"""Reading traces from files: every row format, every kind of file, and their faults."""

import csv
import gzip
import io
import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import shared_data, write_rows

from redi.engine.data.row import Row
from redi.engine.data.rows import read_rows, scan_source
from redi.engine.data.sources import Source
from redi.engine.data.traces import Message, Trace, normalise
from redi.engine.errors import FaultyRow, InputError
from redi.engine.hub import quiet_hub_client

USER = {"role": "user", "content": "2 + 2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
CHOSEN_ONLY: dict[str, Any] = {"chosen": [GOOD], "rejected": [BAD]}
WHOLE: dict[str, Any] = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
OPENR1: dict[str, Any] = {
    "uuid": "u1",
    "problem": "2 + 2?",
    "source": "olympiads",
    "problem_is_valid": "Yes",
    "generations": ["4", "5", "6"],
    "correctness": {
        "llama_verification": [True, True, False],
        "math_verify_reparsed_answer": [True, False, False],
    },
}


def traces_of(path: str, format: str = "auto") -> list[Trace]:
    return [trace for row in read_rows([path], format) for trace in normalise(row, row.format)]


def content(traces: list[Trace]) -> list[tuple[object, str, int]]:
    return [(trace.prompt, trace.completion, trace.sign) for trace in traces]


def error_of(path: str, format: str = "auto") -> str:
    with pytest.raises(InputError) as caught:
        traces_of(path, format)
    message = str(caught.value)
    assert "\n" not in message
    return message


ROWS = [
    {"prompt": f'What is {i}, said\n"Zoë"?', "chosen": f"{i},\n", "rejected": f"not {i}"}
    for i in range(5)
]


def as_jsonl(path: Path) -> bytes:
    return "\n\n".join(json.dumps(row) for row in ROWS).encode()


def as_json(path: Path) -> bytes:
    return json.dumps(ROWS, indent=1).encode()


def as_csv(path: Path) -> bytes:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path.read_bytes()


def as_parquet(path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist([{**row, "extra": 1} for row in ROWS]), path)
    return path.read_bytes()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", [as_jsonl, as_json, as_csv, as_parquet])
def test_every_kind_of_file_gives_the_same_traces(tmp_path, kind, zipped):
    suffix = kind.__name__.removeprefix("as_")
    data = kind(tmp_path / "plain")
    path = tmp_path / f"data.{suffix}{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(data, mtime=0) if zipped else data)
    expected = []
    for row in ROWS:
        expected += [(row["prompt"], row["chosen"], 1), (row["prompt"], row["rejected"], -1)]
    assert content(traces_of(str(path))) == expected


def test_json_lines_may_be_called_json_and_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + as_jsonl(path))
    assert len(traces_of(str(path))) == 10


def test_csv_cells_hold_json_where_lists_are_needed(tmp_path):
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages", "label", "weight", "id"])
        writer.writerow([json.dumps([USER, GOOD]), "true", "", ""])
        writer.writerow([json.dumps([USER, BAD]), "0", "2.5", "a"])
    first, second = traces_of(str(path))
    assert (first.sign, first.weight, second.sign, second.weight) == (1, 1.0, -1, 2.5)
    assert second.where == f"{path}:3"


def test_a_folder_gives_its_data_files_in_order_of_name(tmp_path):
    write_rows(tmp_path / "b.jsonl", [{**PAIR, "chosen": "second"}])
    write_rows(tmp_path / "a.jsonl.gz", [{**PAIR, "chosen": "first"}])
    (tmp_path / "README.md").write_text("not data")
    assert [t.completion for t in traces_of(str(tmp_path)) if t.sign > 0] == ["first", "second"]


def test_a_folder_gives_those_of_its_sub_folders_too_but_nothing_hidden(tmp_path):
    hidden = [".hidden/x.jsonl", "b/__old/1/x.jsonl", "b/__old/x.jsonl", "._a.json"]
    for name in ["b/2.jsonl", "b/1/x.jsonl", "b/1/__y.jsonl", "a.jsonl", *hidden]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / name, [{**PAIR, "chosen": name}])
    (tmp_path / "b" / "around").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "b")
    found = [t.completion for t in traces_of(str(tmp_path)) if t.sign > 0]
    assert found == ["a.jsonl", "b/1/__y.jsonl", "b/1/x.jsonl", "b/2.jsonl"]


@pytest.mark.parametrize("again", ["one.jsonl", "./one.jsonl", "."])
def test_a_file_named_twice_is_an_error(tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    Path("one.jsonl").write_text('{"prompt": "1+1=", "completion": "2", "label": true}\n')
    with pytest.raises(InputError, match=r"one\.jsonl: is named twice"):
        list(read_rows(["one.jsonl", again], "auto"))


def test_files_of_different_shapes_can_be_mixed(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", [PAIR])
    second = write_rows(tmp_path / "b.jsonl", [{"messages": [USER, GOOD]}])
    rows = list(read_rows([first, second], "auto"))
    assert [row.format for row in rows] == ["preference", "messages"]


def test_a_hub_name_goes_through_datasets(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([{**PAIR, "other": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows(["someone/some-data", "someone/some-data:validation"], "auto"))
    assert asked == [("someone/some-data", "train"), ("someone/some-data", "validation")]
    assert rows[1].where == "someone/some-data:validation:1"
    assert rows[0].value == PAIR  # columns that the shape does not know are not even decoded


def test_a_hub_name_that_cannot_be_loaded_is_the_users_error(monkeypatch):
    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "nobody/nothing:train" in error_of("nobody/nothing")


def test_the_hub_is_asked_without_its_clients_warnings():
    client = logging.getLogger("huggingface_hub.utils._http")
    with quiet_hub_client():
        assert not client.isEnabledFor(logging.WARNING)
    assert client.isEnabledFor(logging.WARNING)


def test_a_missing_file_is_named(tmp_path):
    assert "nowhere.jsonl: no such file" in error_of(str(tmp_path / "nowhere.jsonl"))
    assert "no such file" in error_of("data/nowhere.jsonl")  # not taken for a hub name
    with pytest.raises(InputError, match="path is empty"):
        list(read_rows([], "auto"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.json", b""),
        ("a.json", b"[]"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_an_empty_file_is_an_error(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    assert f"{path}: holds no rows" in error_of(str(path))


@pytest.mark.parametrize("data", ["prompt,chosen,rejected\n", "prompt,chosen,rejected\n,,\n"])
def test_a_csv_of_a_header_alone_holds_no_rows(tmp_path, data):
    path = tmp_path / "a.csv"
    path.write_text(data)
    assert f"{path}: holds no rows below its header line" in error_of(str(path))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_csv_differs_from_one_with_a_header_alone(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    assert error_of(str(path)) == f"{path}: holds neither rows nor a header line"


def test_an_empty_parquet_file_and_an_empty_folder_are_errors(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in PAIR}), path)
    assert f"{path}: holds no rows" in error_of(str(path))
    (tmp_path / "folder").mkdir()
    assert "no data file in this folder (.jsonl, .json," in error_of(str(tmp_path / "folder"))


def test_an_unknown_kind_of_file_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hello")
    assert "not a supported kind of file" in error_of(str(path))


@pytest.mark.parametrize(
    ("name", "data", "line", "problem"),
    [
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"', 3, "not valid JSON"),
        ("a.jsonl", b'{"prompt": "a"\n', 1, "not valid JSON: Expecting ',' delimiter (column 15)"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n', 2, "UTF-8"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n[1, 2]\n', 2, "a JSON object, not list"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\nnull\n', 2, "a JSON object, not null"),
        (
            "a.json",
            b'[{"prompt": "a",\n "completion": "b"},\n {"prompt" "a"}]',
            3,
            "not valid JSON",
        ),
        ("a.json", b'[{"prompt": "a", "completion": "b"},\n "text"]', 2, "a JSON object, not str"),
        ("a.jsonl", b"[" * 100_000, 1, "nested too deeply"),
        ("a.csv", b"prompt,completion\na,b\nc\n", 3, "1 cells, but the header has 2"),
        ("a.csv", b"prompt,completion\na,\xff\n", 2, "UTF-8"),
        ("a.csv", b"messages\nhello\n", 2, "not valid JSON"),
        ("a.csv", b'prompt,completion\n"a,b\nc,d\n', 2, "a quotation mark not closed"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), 1, "looks like UTF-16"),
        ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), 1, "looks like UTF-16"),
        ("a.csv", b"7?,2,1\n8?,4,3\n", 1, "line (is it missing?): the columns (7?, 2, 1) match no"),
        ("a.csv", b"prompt,answer\na,b\n", 1, "header line: the columns (prompt, answer) match no"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b"}', 1, "preference (prompt, chosen, rejected)"),
        ("a.csv", b"prompt,completion\ra,b\r", 1, "lines end in CR alone"),
        ("a.jsonl", b'{"prompt": "a"}\r{"prompt": "b"}\r', 1, "lines end in CR alone"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16-le"), 1, "looks like UTF-16"),
        ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16-be"), 1, "looks like UTF-16"),
        ("a.csv", b"Prompt,Completion\na,b\n", 1, "in lower case: prompt, completion"),
        ("a.jsonl", b'{"prompt": "a", "chosen": null, "rejected": "b"}\n', 1, "not null"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b", "id": "\\ud800"}', 1, "'id' is not valid"),
    ],
)
def test_a_broken_row_is_named_with_its_line(tmp_path, name, data, line, problem):
    path = tmp_path / name
    path.write_bytes(data)
    message = error_of(str(path))
    assert message.startswith(f"{path}:{line}: ")
    assert problem in message


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_may_be_separated_as_spreadsheets_do(tmp_path, separator):
    path = tmp_path / "a.csv"
    rows = [["prompt", "completion"], ["1, 2; 3\t4", 'He said "5, 6; 7"\nand left']]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    (row,) = read_rows([str(path)], "auto")
    assert row.value == dict(zip(*rows, strict=True))


def test_what_spreadsheets_add_to_a_csv_is_read_over(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfsep=;\r\nprompt ; completion\r\na;b\r\n;\r\n;\r\n")
    (row,) = read_rows([str(path)], "auto")
    assert row.value == {"prompt": "a", "completion": "b"}
    assert row.where == f"{path}:3"


def test_a_verdict_that_pandas_wrote_as_a_float_to_a_csv_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\na,b,1.0\na,c,0.0\na,d,TRUE\n")
    assert [trace.sign for trace in traces_of(str(path))] == [1, -1, 1]


def test_a_conversation_without_a_known_assistant_is_refused_with_its_roles(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"from": "human", "value": "2*3?"}, {"from": "narrator", "value": "6"}]
    write_rows(path, [{"conversations": turns}])
    assert error_of(str(path)) == (
        f"{path}:1: column 'conversations' has no assistant message, and so no completion; its "
        "roles are: user, narrator"
    )


def test_columns_of_a_csv_without_a_header_are_not_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,,\na,b,,\nc,d,a note,\n")
    rows = list(read_rows([str(path)], "auto"))
    assert [(row.value["prompt"], row.value["completion"]) for row in rows] == [
        ("a", "b"), ("c", "d"),
    ]  # fmt: skip


def test_a_list_of_rows_in_a_jsonl_file_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[{"prompt": "a", "completion": "b"}]\n')
    assert error_of(str(path)) == (
        f"{path}:1: a row must be a JSON object, not list; a file that is one list of rows must be "
        "named .json"
    )


def test_a_column_that_is_there_twice_is_an_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,completion\na,b,c\n")
    assert error_of(str(path)) == f"{path}:1: column 'completion' occurs 2 times"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.csv.gz", "a.json.gz"])
def test_a_file_cut_off_is_an_error_that_names_it(tmp_path, name):
    maker = {"jsonl": as_jsonl, "parquet": as_parquet, "csv": as_csv, "json": as_json}
    data = maker[name.split(".")[1]](tmp_path / "plain")
    if name.endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    path = tmp_path / name
    for length in range(1, len(data), max(1, len(data) // 25)):
        path.write_bytes(data[:length])
        assert str(path) in error_of(str(path))


CONVERSATION = (Message("user", "2 + 2?"),)


@pytest.mark.parametrize(
    ("row", "format", "prompt", "signs"),
    [
        (PAIR, "preference", "2 + 2?", [1, -1]),
        ({"prompt": [USER], **CHOSEN_ONLY}, "preference", CONVERSATION, [1, -1]),
        ({"prompt": "2 + 2?", **CHOSEN_ONLY}, "preference", "2 + 2?", [1, -1]),
        (WHOLE, "preference", CONVERSATION, [1, -1]),
        ({**PAIR, **WHOLE}, "preference", CONVERSATION, [1, -1]),
        ({"prompt": "2 + 2?", "completion": "4"}, "prompt-completion", "2 + 2?", [1]),
        ({"prompt": [USER], "completion": [GOOD]}, "prompt-completion", CONVERSATION, [1]),
        ({"prompt": "p", "completion": "5", "label": False}, "prompt-completion", "p", [-1]),
        ({"messages": [USER, GOOD]}, "messages", CONVERSATION, [1]),
        ({"messages": [USER, BAD], "label": 0}, "messages", CONVERSATION, [-1]),
        ({"messages": [USER, GOOD, USER]}, "messages", CONVERSATION, [1]),
        (
            {"id": 7, "prompt": "2 + 2?", "answer": "4", "traces": [
                {"teacher": "t1", "text": "4", "correct": True},
                {"teacher": "t2", "text": "5", "correct": False},
            ]},
            "traces", "2 + 2?", [1, -1],
        ),
        (OPENR1, "openr1", "2 + 2?", [1, -1, -1]),
    ],
)  # fmt: skip
def test_every_format_is_detected_from_its_columns(tmp_path, row, format, prompt, signs):
    path = write_rows(tmp_path / "rows.jsonl", [row])
    traces = traces_of(path)
    texts = {1: "4", -1: "5"}
    assert [t.sign for t in traces] == signs
    assert [t.completion for t in traces][:2] == [texts[sign] for sign in signs][:2]
    assert {t.prompt for t in traces} == {prompt}
    assert {t.where for t in traces} == {f"{path}:1"}
    assert traces == traces_of(path, format)


def test_the_last_assistant_message_is_the_completion(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [USER, BAD, USER, GOOD]}])
    (trace,) = traces_of(path)
    assert trace.completion == "4"
    assert trace.prompt == (Message("user", "2 + 2?"), Message("assistant", "5"), *CONVERSATION)


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", "1"])
@pytest.mark.parametrize("positive", [True, False])
def test_labels_in_every_spelling(tmp_path, value, positive):
    if not positive:
        value = {"true": "false", "True": "False", "1": "0"}.get(value, type(value)(0))
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "label": value}])
    assert traces_of(path)[0].sign == (1 if positive else -1)


def test_groups_join_traces_of_one_problem_and_no_others(tmp_path):
    def groups(rows: list[dict[str, Any]]) -> list[str]:
        return [t.group for t in traces_of(write_rows(tmp_path / "g.jsonl", rows))]

    one, two = (
        {"prompt": "p", "completion": "c"},
        {"prompt": [{**USER, "content": "p"}], "completion": "d"},
    )
    other = {"prompt": "q", "completion": "c"}
    a, b, c = groups([one, two, other])
    assert a == b != c  # no id: the prompt, however it is written
    a, b = groups([{**one, "id": 1}, {**two, "id": "1"}])
    assert a == b
    a, b = groups([{**one, "id": 1}, {**one, "id": 2}])
    assert a != b
    a, b = groups([{**one, "id": 0}, {**other, "id": 0}])
    assert a != b  # ids that two files count from 0 join nothing
    a, b, c, d = groups([PAIR, PAIR])
    assert a == b != c == d  # a pair row without id is its own problem
    a, b, c, d = groups([{**PAIR, "id": 1}, {**PAIR, "id": 1}])
    assert a == b == c == d


def test_weight_and_teacher_are_the_traces_own_or_the_rows(tmp_path):
    entries = [
        {"text": "4", "correct": True},
        {"text": "5", "correct": 0, "weight": 3, "teacher": "x"},
    ]
    row = {"prompt": "p", "traces": entries, "weight": 2, "teacher": "y"}
    traces = traces_of(write_rows(tmp_path / "a.jsonl", [row]))
    assert [(t.weight, t.teacher) for t in traces] == [(2.0, "y"), (3.0, "x")]
    nulls = {**PAIR, "weight": None, "teacher": None, "id": None}
    traces = traces_of(write_rows(tmp_path / "a.jsonl", [nulls]))
    assert [(t.weight, t.teacher) for t in traces] == [(1.0, None)] * 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"problem_is_valid": "No"}, "problem not valid"),
        ({"problem_is_valid": None}, "problem not valid"),
        ({"source": "cn_k12"}, "source cn_k12"),
        ({"generations": ["4"]}, "lists of different length"),
        ({"correctness": {"llama_verification": [True] * 3}}, "lists of different length"),
        (
            {"correctness": {**OPENR1["correctness"], "llama_verification": None}},
            "lists of different length",
        ),
    ],
)  # fmt: skip
def test_the_papers_filter_drops_rows_and_counts_them(tmp_path, change, reason):
    path = write_rows(tmp_path / "a.jsonl", [{**OPENR1, **change}])
    dropped: Counter[str] = Counter()
    for row in read_rows([path], "auto"):
        assert normalise(row, row.format, dropped) == []
    assert dropped == {reason: 1}


def test_a_generation_is_correct_when_both_verifiers_say_true(tmp_path):
    verdicts = {
        "llama_verification": [True, True, False, None, True, True],
        "math_verify_reparsed_answer": [True, False, True, True, None, True],
    }
    row = {**OPENR1, "problem_is_valid": "yEs", "correctness": verdicts}
    row["generations"] = ["a", "b", "c", "d", "e", " "]
    path = write_rows(tmp_path / "a.jsonl", [row])
    dropped: Counter[str] = Counter()
    (raw,) = read_rows([path], "auto")
    assert [t.sign for t in normalise(raw, "openr1", dropped)] == [1, -1, -1, -1, -1]
    assert dropped == {"empty generation": 1}


@pytest.mark.parametrize(
    ("row", "mentions"),
    [
        ({**PAIR, "chosen": " \n"}, ["'chosen'", "empty"]),
        ({**PAIR, "rejected": None}, ["'rejected'"]),
        ({**PAIR, "chosen": 4, "rejected": 5}, ["'chosen'"]),
        ({**PAIR, "prompt": ""}, ["'prompt'", "empty"]),
        ({**PAIR, "prompt": 3}, ["'prompt'"]),
        ({**PAIR, "prompt": []}, ["'prompt'"]),
        ({"chosen": "4", "rejected": "5"}, ["'prompt'", "missing"]),
        (CHOSEN_ONLY, ["'prompt'", "missing"]),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, ["'rejected'", "assistant"]),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, ["'rejected'", "last"]),
        ({**PAIR, "prompt": "other", **WHOLE}, ["'prompt'"]),
        ({**PAIR, "weight": 0}, ["'weight'", "positive"]),
        ({**PAIR, "weight": float("nan")}, ["'weight'"]),
        ({**PAIR, "weight": "much"}, ["'weight'", "'much'"]),
        ({**PAIR, "weight": True}, ["'weight'"]),
        ({**PAIR, "teacher": 5}, ["'teacher'"]),
        ({**PAIR, "id": [1]}, ["'id'"]),
        ({**PAIR, "chosen": "\ud800"}, ["'chosen'", "Unicode"]),
        ({"prompt": "p", "completion": ""}, ["'completion'", "empty"]),
        ({"prompt": "p", "completion": None}, ["'completion'", "null"]),
        ({"prompt": "p", "completion": [USER]}, ["'completion'", "assistant"]),
        ({"prompt": "p", "completion": "c", "label": None}, ["'label'", "null"]),
        ({"prompt": "p", "completion": "c", "label": -1}, ["'label'", "-1"]),
        ({"prompt": "p", "completion": "c", "label": "yes"}, ["'label'", "'yes'"]),
        ({"messages": [USER]}, ["'messages'", "no completion"]),
        ({"messages": [GOOD]}, ["'messages'", "empty prompt"]),
        ({"messages": []}, ["'messages'"]),
        ({"messages": "hello"}, ["'messages'"]),
        ({"messages": [USER, {"role": "assistant"}]}, ["messages[1]", "content"]),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, ["messages[1].content"]),
        ({"messages": [USER, {**GOOD, "tool_calls": [{}]}]}, ["messages[1].tool_calls"]),
        ({"messages": [USER, GOOD, BAD]}, ["'messages'", "ends with an assistant"]),
        ({"prompt": "p", "traces": []}, ["'traces'", "at least one"]),
        ({"prompt": "p", "traces": [{"text": "4"}]}, ["traces[0]", "correct"]),
        ({"prompt": "p", "traces": [{"text": "", "correct": True}]}, ["traces[0].text", "empty"]),
        ({"prompt": "p", "traces": [{"text": "4", "correct": 2}]}, ["traces[0].correct"]),
        ({**OPENR1, "generations": "4"}, ["'generations'"]),
        ({**OPENR1, "correctness": None}, ["'correctness'"]),
        ({**OPENR1, "problem_is_valid": 1}, ["'problem_is_valid'"]),
        ({**OPENR1, "generations": ["4", 5, "6"]}, ["generations[1]"]),
        ({"question": "q", "reply": "r"}, ["question, reply", "preference (prompt, chosen,"]),
        ({}, ["(none)", "messages (messages)"]),
    ],
)  # fmt: skip
def test_a_wrong_row_is_an_error_that_names_file_row_and_column(tmp_path, row, mentions):
    path = write_rows(tmp_path / "rows.jsonl", [row])
    message = error_of(path)
    assert f"{path}:1" in message
    for mention in mentions:
        assert mention in message


def test_the_row_named_is_the_wrong_one(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [PAIR, PAIR, {**PAIR, "rejected": ""}, PAIR])
    assert f"{path}:3" in error_of(path)


def test_a_column_missing_from_a_later_row_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [PAIR, {"prompt": "p", "chosen": "c"}])
    message = error_of(path)
    assert f"{path}:2: column 'rejected' is missing; the row has: prompt, chosen" in message
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "p"}])
    assert "'completion' is missing" in error_of(path, "prompt-completion")


def test_a_forgotten_label_does_not_pass_for_a_positive(tmp_path):
    labelled = {"prompt": "p", "completion": "c", "label": False}
    path = write_rows(tmp_path / "rows.jsonl", [labelled, {"prompt": "p", "completion": "c"}])
    assert f"{path}:2: column 'label' must be in every row" in error_of(path)


def test_an_unknown_format_is_an_error(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [PAIR])
    assert "'prefs' is unknown; available: auto, preference" in error_of(path, "prefs")


def test_openr1_columns_give_the_traces_of_the_file_they_were_made_from():
    folder = shared_data()
    plain = traces_of(str(folder / "long_cot_gsm8k.jsonl.gz"))
    openr1 = traces_of(str(folder / "openr1_math_raw_like.jsonl.gz"))
    assert content(plain) == content(openr1)
    assert sum(t.sign > 0 for t in plain) == 2222
    assert sum(t.sign < 0 for t in plain) == 106
    assert len({t.group for t in plain}) == len({t.group for t in openr1}) == 582


@pytest.mark.parametrize(
    ("name", "positives", "negatives"),
    [("gsm8k_model_solutions", 1994, 3274), ("gsm8k_open_teachers", 6311, 1446)],
)
def test_real_files_are_read_whole(name, positives, negatives):
    traces = traces_of(str(shared_data() / f"{name}.jsonl.gz"))
    assert sum(t.sign > 0 for t in traces) == positives
    assert sum(t.sign < 0 for t in traces) == negatives
    assert len({t.group for t in traces}) == 1319


def scanned(path: Path, kind: str, **options: Any) -> list[Row | InputError]:
    return list(scan_source(Source(str(path), kind), "auto", **options))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_row_that_is_not_utf8_is_named_and_the_others_are_read(kind: str, tmp_path: Path) -> None:
    texts = pa.array([b"ok", b"1=\xff", *[b"2="] * 70, b"\xfe"])
    texts = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())
    table = pa.table({"prompt": texts, "completion": ["1"] * len(texts)})
    path = tmp_path / "rows"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        datasets.Dataset(table).save_to_disk(path)
    found = scanned(path, kind)
    faults = {number: one for number, one in enumerate(found, 1) if isinstance(one, FaultyRow)}
    assert [str(one) for one in faults.values()] == [
        f"{path}:{number}: not valid UTF-8: invalid start byte; save it as UTF-8"
        for number in (2, 73)
    ]
    assert len(found) == len(texts)
    rest = [one.number for one in found if isinstance(one, Row)]
    assert rest == [number for number in range(1, 74) if number not in faults]


LONG = "x" * 5_000_000
SHORT = {"prompt": "1", "completion": "2"}


def write_bomb(path: Path) -> None:
    """A file with a long row, the second of three; a file of kilobytes if it is compressed."""
    rows = [SHORT, SHORT | {"prompt": LONG}, SHORT]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
        return
    text = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        ".json": json.dumps(rows),
        ".csv": "".join(",".join(row) + "\n" for row in [list(SHORT), *(r.values() for r in rows)]),
    }[Path(path.stem).suffix]
    path.write_bytes(gzip.compress(text.encode()))


@pytest.mark.parametrize("max_row_mb", [1, 3])  # far beyond what its text may take, and near it
@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.json.gz", "b.csv.gz", "b.parquet"])
def test_a_row_that_unfolds_to_megabytes_is_refused_unless_allowed(
    name: str, max_row_mb: int, tmp_path: Path
) -> None:
    path = tmp_path / name
    write_bomb(path)
    kind = name.removesuffix(".gz").partition(".")[2]
    assert path.stat().st_size < 20_000
    found = scanned(path, kind, max_row_mb=max_row_mb)
    (fault,) = [str(one) for one in found if isinstance(one, InputError)]
    number = 3 if kind == "csv" else 2  # its header is a line
    assert fault == (
        f"{path}:{number}: the row has more than {max_row_mb} MB of text (data.max_row_mb)"
    )
    allowed = [one for one in scanned(path, kind, max_row_mb=6) if isinstance(one, Row)]
    assert [len(one.value["prompt"]) for one in allowed] == [1, len(LONG), 1]


def test_the_rows_after_a_long_one_are_read_where_a_file_has_lines(tmp_path: Path) -> None:
    write_bomb(tmp_path / "b.jsonl.gz")
    found = scanned(tmp_path / "b.jsonl.gz", "jsonl", max_row_mb=1)
    assert [type(one) for one in found] == [Row, FaultyRow, Row]


def test_a_column_that_must_hold_a_long_row_is_not_unfolded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"prompt": [LONG], "completion": ["1"]}), tmp_path / "b.parquet")

    def read(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", read)
    (found,) = scanned(tmp_path / "b.parquet", "parquet", max_row_mb=0)
    assert "b.parquet:1: the row has more than 0 MB" in str(found)


def test_a_document_in_a_small_file_may_not_unfold_to_more(tmp_path: Path) -> None:
    path = tmp_path / "b.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"data": [SHORT, {"a": LONG}]}, indent=1).encode()))
    (found,) = scanned(path, "json", max_row_mb=1)
    assert str(found) == f"{path}: the row has more than 1 MB of text (data.max_row_mb)"
    plain = tmp_path / "b.json"
    plain.write_bytes(gzip.decompress(path.read_bytes()))  # its own size is no surprise
    assert len(scanned(plain, "json", max_row_mb=1)) == 2


def test_a_csv_header_of_many_columns_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"c{n}" for n in range(100_000)) + "\n1\n")
    (found,) = scanned(path, "csv")
    assert "wide.csv:2: 1 cells, but the header has 100000" in str(found)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"\xff", "not valid UTF-8: invalid start byte; save it as UTF-8"),
        (b"\0", "holds zero bytes; it looks like UTF-16; save it as UTF-8"),
    ],
)
@pytest.mark.parametrize("number", [2, 2500, 3001])  # the last is the end of the file
def test_a_csv_line_that_cannot_be_read_is_named_after_the_rows_before_it(
    number: int, bad: bytes, problem: str, tmp_path: Path
) -> None:
    lines = [b"prompt,completion\r\n", *[b"q,%a\r\n" % ("a" * 1000)] * 3000]  # of several blocks
    lines[number - 1] = b"q," + bad + b"\n"
    path = tmp_path / "a.csv"
    path.write_bytes(b"".join(lines))
    *rows, last = scanned(path, "csv")
    assert str(last) == f"{path}:{number}: {problem}"
    assert [row.number for row in rows if isinstance(row, Row)] == list(range(2, number))


def test_a_csv_cell_of_a_million_lines_is_read_as_fast_as_csv_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    cell = "a\n" * 1_000_000
    path.write_text(f'prompt,completion\nq,"{cell}"\n')
    start = time.process_time()
    with path.open(newline="") as file:
        text = io.StringIO(file.read(), newline="\n")
    csv.field_size_limit(4_000_000)
    *_, plain = csv.reader(text)
    between = time.process_time()
    (row,) = scanned(path, "csv")
    seconds = time.process_time() - between
    assert isinstance(row, Row)
    assert (
        row.value
        == {"prompt": "q", "completion": cell}
        == dict(zip(("prompt", "completion"), plain, strict=True))
    )
    assert seconds < 5 * (between - start)  # line by line it was 11 times
