"""Rows in the shapes that users have: each gives the traces of the plain row that it means."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import CHATML, save_tokenizer, settings, shared_data, write_rows
from transformers import AutoTokenizer

from redi.engine.console import Console
from redi.engine.data.rows import read_rows, scan_source
from redi.engine.data.sources import find_sources
from redi.engine.data.tokens import TokenizedTraces, tokenize
from redi.engine.data.traces import Message, Trace, normalise
from redi.engine.errors import InputError

QUIET = Console(active=False)
THOUGHT = "<think>\ntwice three\n</think>\n\n"
USER = {"role": "user", "content": "2*3?"}
ANSWER = {"role": "assistant", "content": "6"}
WRONG = {"role": "assistant", "content": "7"}
QUESTION = (Message("user", "2*3?"),)


def traces_of(path: str, format: str = "auto") -> list[Trace]:
    return [trace for row in read_rows([path], format) for trace in normalise(row, row.format)]


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


SHAREGPT = said(("human", "2*3?"), ("gpt", "6"))
SYSTEM = (Message("system", "Think."), *QUESTION)
SHAPES: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    # name: the row, its prompt, the completions (the second one is incorrect)
    "sharegpt": ({"conversations": SHAREGPT}, QUESTION, ["6"]),
    "sharegpt with system": ({"system": "Think.", "conversations": SHAREGPT}, SYSTEM, ["6"]),
    "sharegpt in messages": ({"messages": SHAREGPT}, QUESTION, ["6"]),
    "OpenAI in conversations": ({"conversations": [USER, ANSWER]}, QUESTION, ["6"]),
    "messages as JSON text": ({"messages": json.dumps([USER, ANSWER])}, QUESTION, ["6"]),
    "sharegpt as JSON text": ({"conversations": json.dumps(SHAREGPT)}, QUESTION, ["6"]),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2*"}, {"text": "3?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "6"}]},
            ]
        },
        QUESTION,
        ["6"],
    ),
    "alpaca": ({"instruction": "2*3?", "input": "", "output": "6"}, "2*3?", ["6"]),
    "alpaca with input": (
        {"instruction": "double", "input": "3", "output": "6"},
        "double\n3",
        ["6"],
    ),
    "alpaca with turns before": (
        {"instruction": "2*3?", "output": "6", "history": [["1?", "1"]], "system": "Think."},
        (SYSTEM[0], Message("user", "1?"), Message("assistant", "1"), *QUESTION),
        ["6"],
    ),
    "answers as single messages": (
        {"prompt": [USER], "chosen": ANSWER, "rejected": WRONG},
        QUESTION,
        ["6", "7"],
    ),
    "pairs of LLaMA-Factory": (
        {
            "conversations": SHAREGPT[:1],
            "chosen": {"from": "gpt", "value": "6"},
            "rejected": {"from": "gpt", "value": "7"},
        },
        QUESTION,
        ["6", "7"],
    ),
    "pairs of alpaca": (
        {"instruction": "2*3?", "input": "", "chosen": "6", "rejected": "7"},
        "2*3?",
        ["6", "7"],
    ),
    "completion as a message": ({"prompt": "2*3?", "completion": ANSWER}, "2*3?", ["6"]),
    "thought in a message": (
        {"messages": [USER, {**ANSWER, "reasoning_content": "twice three\n"}]},
        QUESTION,
        [THOUGHT + "6"],
    ),
    "thought of a pair": (
        {"prompt": [USER], "chosen": [{**ANSWER, "thinking": "twice three"}], "rejected": [WRONG]},
        QUESTION,
        [THOUGHT + "6", "7"],
    ),
    "thought in a column": (
        {"prompt": "2*3?", "completion": "6", "reasoning": "twice three"},
        "2*3?",
        [THOUGHT + "6"],
    ),
    "thought in an entry": (
        {"prompt": "2*3?", "traces": [{"text": "6", "correct": 1, "reasoning": "twice three"}]},
        "2*3?",
        [THOUGHT + "6"],
    ),
    "a thought that the content repeats": (
        {"messages": [USER, {**ANSWER, "content": THOUGHT + "6", "reasoning": "twice three"}]},
        QUESTION,
        [THOUGHT + "6"],
    ),
    "no thought": ({"messages": [USER, {**ANSWER, "reasoning_content": ""}]}, QUESTION, ["6"]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_gives_the_traces_that_it_means(name: str, tmp_path: Path) -> None:
    row, prompt, completions = SHAPES[name]
    path = write_rows(tmp_path / "rows.jsonl", [row])
    traces = traces_of(path)
    assert [(t.prompt, t.completion, t.sign) for t in traces] == [
        (prompt, text, sign) for text, sign in zip(completions, (1, -1), strict=False)
    ]
    unread: set[str] = set()
    assert len(list(scan_source(find_sources([path])[0], "auto", unread))) == 1
    assert not unread
    # Parquet gives every message the keys of all others, as nulls.
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    again = traces_of(str(tmp_path / "rows.parquet"))
    assert [(t.prompt, t.completion, t.sign) for t in again] == [
        (t.prompt, t.completion, t.sign) for t in traces
    ]


WRONG_ROWS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dialogue as text": (
        {"chosen": "\n\nHuman: 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2?\n\nAssistant: 5"},
        ["'chosen'", "whole dialogue as text", "column prompt"],
    ),
    "label missing": (
        {"prompt": "2*3?", "completion": "6", "label": None},
        ["'label'", "not null"],
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
        ["messages[0].content[0]", "'image_url'; only text"],
    ),
    "not JSON": ({"messages": "[{'role': 'user'}]"}, ["'messages'", "not valid JSON"]),
    "two thoughts": (
        {"messages": [USER, {**ANSWER, "content": "<think>a</think>6", "thinking": "b"}]},
        ["messages[1].thinking", "differs from the thought in the content"],
    ),
    "two system messages": (
        {"system": "A", "messages": [{"role": "system", "content": "B"}, USER, ANSWER]},
        ["'system'", "differs"],
    ),
    "an unknown call": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        ["messages[1].tool_calls[0]", "name of a function"],
    ),
    "no instruction": (
        {"instruction": "", "input": " ", "output": "6"},
        ["'instruction'", "is empty, and so is input"],
    ),
    "half an id": ({"prompt": "2*3?", "completion": "6", "id": 1.5}, ["'id'", "not 1.5"]),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_row_that_cannot_be_read_is_one_line(name: str, tmp_path: Path) -> None:
    row, mentions = WRONG_ROWS[name]
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError) as caught:
        traces_of(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:1: ")
    assert "\n" not in message
    assert all(mention in message for mention in mentions), message


def test_whole_ids_that_pandas_wrote_as_floats_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"prompt": "2*3?", "completion": text} for text in "678"]
    pandas.DataFrame({"id": [1, None, 1], **pandas.DataFrame(rows)}).to_parquet(path)
    one, none, again = traces_of(str(path))
    (whole,) = traces_of(write_rows(tmp_path / "whole.jsonl", [{**rows[0], "id": 1}]))
    assert one.group == again.group == whole.group
    (unnamed,) = traces_of(write_rows(tmp_path / "none.jsonl", [rows[1]]))
    assert none.group == unnamed.group != one.group


PAIRS = [{"prompt": f"{n}?", "chosen": str(n), "rejected": str(n + 1)} for n in range(3)]
DOCUMENTS: dict[str, Any] = {
    "a list": PAIRS,
    "a list in an object": {"version": 1, "data": PAIRS},
    "one row": PAIRS[0],
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_json_document_is_read_as_a_whole(name: str, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(DOCUMENTS[name], indent=indent))
    expected = PAIRS[:1] if name == "one row" else PAIRS
    assert [row.value for row in read_rows([str(path)], "auto")] == expected


@pytest.mark.parametrize(
    ("document", "mention"),
    [
        (pandas.DataFrame(PAIRS).to_json(), 'orient="records", lines=True'),
        (json.dumps({"train": PAIRS, "test": PAIRS}), "several lists of rows (train, test)"),
    ],
)
def test_a_json_document_without_rows_is_refused_by_what_it_is(
    document: str, mention: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(document)
    with pytest.raises(InputError) as caught:
        list(read_rows([str(path)], "auto"))
    assert str(caught.value).startswith(f"{path}: ")
    assert mention in str(caught.value)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("a/b", ("a/b", "train")),
        ("a/b:test", ("a/b", "test")),
        ("a/b:main:test", ("a/b", "main", "test")),
        ("a/b:20231101.en:train[:10%]", ("a/b", "20231101.en", "train[:10%]")),
    ],
)
def test_a_hub_name_has_a_configuration_and_a_split(
    name: str, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_dataset(*args: str, split: str) -> datasets.Dataset:
        calls.append((*args, split))
        return datasets.Dataset.from_list(PAIRS)

    # The hub cannot be reached in a test: only the call to `datasets` is replaced.
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = find_sources([name])[0]
    assert source.kind == "hub"
    assert len(list(read_rows([name], "auto"))) == 3
    assert calls[0] == asked


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., TokenizedTraces]:
    """Tokenizes rows written to a file."""

    def run(rows: list[dict[str, Any]], tokenizer: str, **options: Any) -> TokenizedTraces:
        path = write_rows(tmp_path / "rows.jsonl", rows)
        wanted = settings(path, tokenizer, **options)
        return tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)

    return run


def prompt_and_trained(tokens: TokenizedTraces, tokenizer: str) -> list[tuple[str, str]]:
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    found = []
    for index in range(len(tokens)):
        ids, start = tokens.ids(index), tokens.prompt_lengths[index]
        found.append((decode(ids[:start]), decode(ids[start:])))
    return found


# Two templates with a place for the thought, as Qwen3's and as gpt-oss's, and one without.
OWN_PLACE = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}",
)
CHANNELS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}<|a|>{{ m.thinking }}<|e|>"
    "{% endif %}<|f|>{% endif %}{{ m.content }}",
)
OPENED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
END = "<|im_end|>\n<|end|>"


@pytest.mark.parametrize(
    ("template", "opened", "trained", "earlier"),
    [
        (OWN_PLACE, "", THOUGHT + "6" + END, "6"),
        (CHANNELS, "", "<|a|>twice three<|e|><|f|>6" + END, "<|f|>6"),
        (CHATML, "", THOUGHT + "6" + END, THOUGHT + "6"),
        (OPENED, "<think>\n", THOUGHT.removeprefix("<think>\n") + "6" + END, THOUGHT + "6"),
    ],
    ids=["place", "channels", "none", "opened"],
)
def test_a_thought_goes_where_the_template_has_a_place_for_it(
    make: Callable[..., TokenizedTraces],
    tmp_path: Path,
    template: str,
    opened: str,
    trained: str,
    earlier: str,
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=template)
    answer = {**ANSWER, "reasoning_content": "twice three"}
    tokens = make([{"messages": [USER, answer]}, {"messages": [USER, answer] * 2}], tokenizer)
    alone, second = prompt_and_trained(tokens, tokenizer)
    start = f"<|im_start|>user\n2*3?<|im_end|>\n<|im_start|>assistant\n{opened}"
    assert alone == (start, trained)
    before = start.removesuffix(opened) + f"{earlier}<|im_end|>\n" + start
    assert second == (before, trained)


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "5"}
WRITTEN = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_calls_are_rendered_by_the_template_and_a_last_call_is_trained(
    make: Callable[..., TokenizedTraces], as_text: bool
) -> None:
    qwen = str(shared_data() / "tokenizers" / "qwen2.5")
    tools = json.dumps([ADD]) if as_text else [ADD]
    rows = [
        {"tools": tools, "messages": [USER, CALL, RESULT, ANSWER]},
        {"tools": tools, "messages": [USER, CALL]},
        {"messages": said(("human", "2*3?"), ("function_call", json.dumps(
            {"name": "add", "arguments": {"a": 2, "b": 3}}))), "tools": tools},
    ]  # fmt: skip
    tokens = make(rows, qwen)
    (prompt, answer), (_, call), shared_gpt = prompt_and_trained(tokens, qwen)
    assert answer == "6<|im_end|>\n"
    assert call == f"{WRITTEN}<|im_end|>\n"
    assert shared_gpt[1] == call
    assert json.dumps(ADD) in prompt
    assert prompt.endswith(
        f"<|im_start|>user\n2*3?<|im_end|>\n<|im_start|>assistant\n{WRITTEN}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("row", "mention"),
    [
        ({"tools": [ADD], "messages": [USER, ANSWER]}, "no place for them"),
        ({"messages": [USER, CALL, RESULT, ANSWER]}, "no place for tool calls"),
        ({"messages": [USER, CALL]}, "no place for tool calls"),
    ],
)
def test_a_template_without_a_place_for_tools_is_refused_in_one_line(
    make: Callable[..., TokenizedTraces], tmp_path: Path, row: dict[str, Any], mention: str
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(InputError, match=rf"^.*rows\.jsonl:1: .*{mention}.*$"):
        make([row], tokenizer)


def test_rows_that_offer_other_tools_are_other_problems(tmp_path: Path) -> None:
    row = {"messages": [USER, ANSWER]}
    rows = [row, row, {**row, "tools": []}, {**row, "tools": [ADD]}]
    groups = [trace.group for trace in traces_of(write_rows(tmp_path / "rows.jsonl", rows))]
    assert groups[0] == groups[1] == groups[2] != groups[3]


@pytest.mark.parametrize("document", [None, "<|bos|> $A", "<|bos|> $A <|end|>"])
@pytest.mark.parametrize("template", ["chat", "none"])
@pytest.mark.parametrize("most", [3, 8, 100])
def test_a_text_is_cut_into_pieces_that_hold_each_token_once(
    make: Callable[..., TokenizedTraces],
    tmp_path: Path,
    document: str | None,
    template: str,
    most: int,
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", document=document)
    own = AutoTokenizer.from_pretrained(tokenizer)
    texts = ["It is 4.\n" * n + "x" * (n % 3) for n in range(1, 9)]
    whole = [own(text, add_special_tokens=False)["input_ids"] for text in texts]
    start = [own.bos_token_id] if document else []
    whole = [[*start, *ids, own.eos_token_id] for ids in whole]
    rows = [{"text": text, "source": "web"} for text in texts]
    tokens = make(rows, tokenizer, template=template).in_pieces(most)
    pieces = [tokens.ids(index).tolist() for index in range(len(tokens))]
    assert list(chain(*pieces)) == list(chain(*whole))
    assert tokens.lengths.tolist() == [len(piece) for piece in pieces]
    assert tokens.lengths.min() >= 2
    assert tokens.lengths.max() <= most
    assert set(tokens.prompt_lengths.tolist()) == {1}
    assert len(set(tokens.groups.tolist())) == len(set(tokens.digests.tolist())) == len(tokens)
    rows_of = Counter(int(tokens.where(index).rpartition(":")[2]) for index in range(len(tokens)))
    expected = {n: max(1, -(-len(ids) // most)) for n, ids in enumerate(whole, start=1)}
    assert rows_of == expected
    assert tokens.key != make(rows, tokenizer, template=template).in_pieces(most + 1).key


def test_a_piece_of_one_token_does_not_arise() -> None:
    from redi.engine.data.cache import _pieces

    lengths = np.arange(2, 40)
    for most in range(3, 12):
        whole, begins, sizes = _pieces(lengths, np.ones(len(lengths), bool), most)
        assert sizes.min() >= 2
        assert sizes.max() <= most
        for (a, b), (first, second) in zip(
            pairwise(whole), pairwise(zip(begins, sizes, strict=True)), strict=True
        ):
            assert second[0] == (0 if a != b else sum(first))
        assert np.bincount(whole, sizes).tolist() == lengths.tolist()


def test_pieces_are_the_same_in_another_process(
    make: Callable[..., TokenizedTraces], tmp_path: Path
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    rows = [{"text": "It is 4. " * n, "teacher": "ab"[n % 2]} for n in range(1, 6)]
    tokens = make(rows, tokenizer).in_pieces(7).of_teachers(["a"], {"a": 2.0})
    again = pickle.loads(pickle.dumps(tokens))
    assert again.key == tokens.key
    assert again.lengths.tolist() == tokens.lengths.tolist()
    assert [again.ids(n).tolist() for n in range(len(again))] == [
        tokens.ids(n).tolist() for n in range(len(tokens))
    ]
    assert {tokens.teacher(n) for n in range(len(tokens))} == {"a"}
    assert set(tokens.weights.tolist()) == {2.0}


# Files in the manner of public bug reports: their numbers of traces, or words of the error.
CASES: dict[str, int | str] = {
    "rows/sharegpt-conversations/sharegpt.jsonl": 4,
    "rows/sharegpt-conversations/alpaca.jsonl": 4,
    "rows/sharegpt-conversations/parts.jsonl": 4,
    "rows/sharegpt-conversations/messages_as_text.jsonl": 4,
    "rows/sharegpt-conversations/openai_under_conversations.jsonl": 4,
    "rows/sharegpt-conversations/chosen_is_a_message.jsonl": 2,
    "rows/sharegpt-conversations/hh_like.jsonl": "jsonl:1: column 'chosen' has the whole dialogue",
    "rows/sharegpt-conversations/kto_names.jsonl": "jsonl:2: column 'label'",
    "rows/reasoning_content/messages.jsonl": 2,
    "rows/reasoning_content/thinking_column.jsonl": 2,
    "rows/think-templates/pairs.jsonl": 8,
    "rows/tools-and-tool-calls/final_is_a_call.jsonl": 1,
    "rows/tools-and-tool-calls/hermes.jsonl": 2,
    "rows/tools-and-tool-calls/openai.jsonl": 2,
    "rows/jsonl-oddities/crlf.jsonl": 2,
    "rows/jsonl-oddities/u2028.jsonl": 2,
    "rows/jsonl-oddities/mixed_extra.jsonl": 10,
    "rows/jsonl-oddities/string_then_null.jsonl": 6,
    "rows/jsonl-oddities/views.parquet": 4,
    "rows/jsonl-oddities/float_ids.parquet": 4,
    "rows/jsonl-oddities/pretty.json": 4,
    "rows/jsonl-oddities/wrapped.json": 4,
    "rows/jsonl-oddities/columns.json": "columns.json: is a table written column by column",
    "rows/jsonl-oddities/surrogate.jsonl": "jsonl:1: column 'chosen' is not valid Unicode",
    "folders/saved": 16,
    "folders/saved_dict": 16,
    "folders/saved_dict:test": 4,
    "folders/snapshot": 16,
    "folders/snapshot_tests": 12,
}


@pytest.mark.parametrize("name", CASES)
def test_files_as_users_have_them_are_read_or_refused_in_one_line(name: str) -> None:
    folder = shared_data().parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"no such files in {folder}")
    expected = CASES[name]
    if isinstance(expected, int):
        assert len(traces_of(str(folder / name))) == expected
        return
    with pytest.raises(InputError) as caught:
        traces_of(str(folder / name))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
