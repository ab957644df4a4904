"""Spans of a row as weights of its tokens: every shape, every template, and what is refused."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import CHATML, save_tokenizer, settings, shared_data, write_rows
from transformers import AutoTokenizer

from redi.engine.console import Console
from redi.engine.data.packing import build_batch
from redi.engine.data.spans import token_weights
from redi.engine.data.tokens import TokenizedTraces, tokenize
from redi.engine.errors import InputError

QUIET = Console(active=False)
OWN_PLACE = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n{% endif %}"
    "{{ m.content }}",
)
OPENED = CHATML.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%")
Make = Callable[..., tuple[TokenizedTraces, list[list[tuple[str, float]]]]]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tokenizers of many characters a token, by the name of their template."""
    folder = tmp_path_factory.mktemp("tokenizers")
    templates = {"chat": CHATML, "own place": OWN_PLACE, "opened": OPENED, "none": None}
    return {
        name: save_tokenizer(folder / name.replace(" ", "-"), template=template)
        for name, template in templates.items()
    }


@pytest.fixture
def make(tmp_path: Path, tokenizers: dict[str, str]) -> Make:
    """Tokenizes rows; returns the set, and of each trace its parts of equal weight."""

    def run(rows: Any, template: str = "chat", **options: Any) -> Any:
        path = rows if isinstance(rows, str) else write_rows(tmp_path / "rows.jsonl", rows)
        kind = "none" if template == "none" else "chat"
        wanted = settings(path, tokenizers[template], template=kind, **options)
        tokens = tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)
        decode = AutoTokenizer.from_pretrained(tokenizers[template]).decode
        found = []
        for index in range(len(tokens)):
            ids = tokens.ids(index)[tokens.prompt_lengths[index] :]
            weights = tokens.token_weights(index)
            weights = np.ones(len(ids)) if weights is None else weights
            cuts = [0, *np.flatnonzero(np.diff(weights)) + 1, len(ids)]
            found.append(
                [(decode(ids[start:end]), float(weights[start])) for start, end in pairwise(cuts)]
            )
        return tokens, found

    return run


TEXT = "It is 4, so 2 + 2 = 5."
SPANS = [[0, 8, 0.5], [9, 22, -1]]
WEIGHTED = [("It is 4,", 0.5), (" so 2 + 2 = 5.<|im_end|>\n<|end|>", -1.0)]
ASK = [{"role": "user", "content": "2 + 2?"}]
SAID = {"role": "assistant", "content": TEXT}
SHAPES: dict[str, dict[str, Any]] = {
    "traces": {"prompt": "2 + 2?", "traces": [{"text": TEXT, "correct": True, "spans": SPANS}]},
    "prompt-completion": {"prompt": "2 + 2?", "completion": TEXT, "spans": SPANS},
    "text as JSON": {"prompt": "2 + 2?", "completion": TEXT, "spans": str(SPANS)},
    "falling order": {"prompt": "2 + 2?", "completion": TEXT, "spans": SPANS[::-1]},
    "messages": {"messages": [*ASK, SAID], "spans": SPANS},
    "a message": {"messages": [*ASK, {**SAID, "spans": SPANS}]},
    "content parts": {
        "messages": [*ASK, {**SAID, "content": [TEXT[:7], {"type": "text", "text": TEXT[7:]}]}],
        "spans": SPANS,
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": TEXT}],
        "spans": SPANS,
    },
    "alpaca": {"instruction": "2 + 2?", "output": TEXT, "spans": SPANS},
    "chosen": {"prompt": "2 + 2?", "chosen": TEXT, "rejected": "5", "chosen_spans": SPANS},
    "chosen message": {
        "prompt": ASK,
        "chosen": [{**SAID, "spans": SPANS}],
        "rejected": [{"role": "assistant", "content": "5"}],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_spans(make: Make, shape: str) -> None:
    tokens, found = make([SHAPES[shape]])
    assert found[0] == WEIGHTED
    assert tokens.unread == {}
    assert tokens.weighted.tolist() == [True, False][: len(tokens)]


def test_rejected_and_parquet_have_spans_too(make: Make, tmp_path: Path) -> None:
    row = {"prompt": "2 + 2?", "chosen": "4", "rejected": TEXT, "rejected_spans": SPANS}
    rows = [row, {**row, "rejected_spans": None}]
    pq.write_table(pa.Table.from_pylist(rows[1:] + rows), tmp_path / "rows.parquet")
    tokens, found = make(str(tmp_path / "rows.parquet"))
    assert tokens.weighted.tolist() == [False, False, False, True, False, False]
    assert found[3] == WEIGHTED


THOUGHT = "2 + 2 is 4. No, 5."
ANSWER = "It is 5."


@pytest.mark.parametrize("margins", ["", "\n\n"])
@pytest.mark.parametrize(
    ("template", "between"),
    [("chat", "\n</think>\n\n"), ("own place", "</think>\n"), ("none", "\n</think>\n\n")],
)
def test_spans_count_the_thought_and_then_the_answer(
    make: Make, template: str, between: str, margins: str
) -> None:
    """The template's text has the weight of the character before it, so that zeros mask all."""
    shift, end_of_thought = len(margins), len(THOUGHT) + 2 * len(margins)
    row = {
        "prompt": "2 + 2?",
        "traces": [
            {
                "text": ANSWER,
                "correct": True,
                "reasoning_content": margins + THOUGHT + margins,
                "spans": [
                    [0, 11 + shift, 2.0],
                    [11 + shift, end_of_thought, 0.0],
                    [end_of_thought + 6, end_of_thought + len(ANSWER), 0.5],
                ],
            }
        ],
    }
    _, (found,) = make([row], template)
    opened = "<think>" if template == "own place" else "<think>\n"
    end = "<|end|>" if template == "none" else "<|im_end|>\n<|end|>"
    assert found == [
        (f"{opened}2 + 2 is 4.", 2.0),
        (f" No, 5.{between}", 0.0),
        ("It is ", 1.0),
        (f"5.{end}", 0.5),
    ]


def test_a_tag_that_the_generation_prompt_has_opened_shifts_the_spans(make: Make) -> None:
    text = "<think>\nso 4</think>It is 4."
    row = {"prompt": "2 + 2?", "completion": text, "spans": [[8, 12, 0], [20, 28, 3]]}
    _, (found,) = make([row], "opened")
    assert found == [("so 4", 0.0), ("</think>", 1.0), ("It is 4.<|im_end|>\n<|end|>", 3.0)]


def test_each_turn_has_its_own_spans(make: Make) -> None:
    first = {**SAID, "spans": SPANS}
    last = {"role": "assistant", "content": "It is 6."}
    messages = [*ASK, first, {"role": "user", "content": "3 + 3?"}, last]
    rows = [{"messages": messages, "spans": [[0, 8, 0]]}]
    tokens, found = make(rows, train_on="all")
    assert found == [WEIGHTED, [("It is 6.<|im_end|>\n<|end|>", 0.0)]]
    # Spans of a turn are no part of the prompt of later ones.
    plain, _ = make([{"messages": [*ASK, SAID, *messages[2:]]}], train_on="all")
    assert plain.digests.tolist() == tokens.digests.tolist()
    assert plain.groups.tolist() == tokens.groups.tolist()


def test_a_text_is_cut_with_its_weights(make: Make) -> None:
    text = "It is 4, so it is 4. " * 4
    tokens, _ = make([{"text": text, "spans": [[0, 40, 0.5], [40, 84, 0]]}], "none")
    whole = tokens.token_weights(0)
    assert whole is not None
    assert 0 < np.sum(whole == 0.5) < len(whole)
    pieces = tokens.in_pieces(7)
    assert len(pieces) > 3
    start = 0
    for index in range(len(pieces)):
        # The first token of a piece is not trained.
        weights = pieces.token_weights(index)
        end = start + int(pieces.lengths[index])
        assert weights is not None
        assert weights.tolist() == whole[start + 1 : end].tolist()
        start = end
    assert start == len(whole)


def test_a_truncated_trace_keeps_the_weights_of_its_beginning(make: Make) -> None:
    row = {"prompt": "2 + 2?", "completion": TEXT, "spans": [[0, 8, 0], [9, 22, 2]]}
    tokens, _ = make([row])
    weights = tokens.token_weights(0)
    assert weights is not None
    kept = int(tokens.prompt_lengths[0]) + int(np.sum(weights == 0)) + 2
    batch = build_batch(tokens, np.array([0]), np.array([kept]))
    assert batch.num_targets.tolist() == [2]
    assert batch.full_targets.tolist() == [np.sum(weights != 0)]
    assert batch.token_weights is not None
    assert batch.token_weights[batch.valid_index].tolist() == [2.0, 2.0]
    assert tokens.num_targets(np.array([0]), np.array([kept])).tolist() == [2]


def test_all_ones_are_as_no_spans(make: Make) -> None:
    row = {"prompt": "2 + 2?", "completion": TEXT}
    tokens, _ = make([{**row, "spans": [[0, 8, 1], [9, 22, 1.0]]}, {**row, "spans": []}, row])
    assert not tokens.weighted.any()
    assert build_batch(tokens, np.array([0]), tokens.lengths[:1]).token_weights is None


FAULTS: dict[str, tuple[Any, str]] = {
    "no list": (3, "'spans' must be a list of [start, end, weight]"),
    "no JSON": ("[1", "'spans' is text, but not valid JSON"),
    "two numbers": ([[0, 3]], "'spans[0]' must be [start, end, weight], three numbers"),
    "a truth": ([[0, 3, True]], "'spans[0]' must be [start, end, weight], three numbers"),
    "not finite": ([[0, 3, float("nan")]], "'spans[0]' must be [start, end, weight], three"),
    "no float": ([[0, 3, 10**400]], "'spans[0]' must be [start, end, weight], three"),
    "too large": ([[0, 3, 1e39]], "'spans[0]' must have a weight within float32's range"),
    "too small": ([[0, 3, 1e-60]], "'spans[0]' must have a weight within float32's range"),
    "half a character": ([[0, 2.5, 1]], "'spans[0]' must start and end at whole numbers"),
    "falling": ([[0, 1, 1], [5, 3, 1]], "'spans[1]' must have 0 <= start < end <= 22"),
    "empty": ([[5, 5, 1]], "0 <= start < end <= 22, the characters of the trace, not 5 and 5"),
    "out of range": ([[5, 23, 1]], "0 <= start < end <= 22, the characters of the trace"),
    "below 0": ([[-1, 3, 1]], "0 <= start < end <= 22, the characters of the trace"),
    "overlapping": ([[9, 12, 1], [0, 10, 2]], "has two spans that overlap at character 9"),
}


def test_faulty_spans_are_faulty_rows(make: Make) -> None:
    rows = [
        {"prompt": "2 + 2?", "completion": TEXT, "spans": spans} for spans, _ in FAULTS.values()
    ]
    with pytest.raises(InputError) as found:
        make([SHAPES["prompt-completion"], *rows])
    lines = str(found.value).splitlines()
    for number, (line, (_, problem)) in enumerate(
        zip(lines, FAULTS.values(), strict=True), start=2
    ):
        assert f"rows.jsonl:{number}: column '" in line
        assert problem in line
    kept, weights = make([SHAPES["prompt-completion"], *rows], faulty="skip")
    assert (len(kept), kept.faulty, weights) == (1, len(FAULTS), [WEIGHTED])


def test_spans_where_they_have_no_meaning_are_told(make: Make) -> None:
    asked = [{**ASK[0], "spans": SPANS}, SAID]
    with pytest.raises(InputError, match=r"'messages\[0\]\.spans' is for answers, not .* user"):
        make([{"messages": asked}])
    both = [*ASK, {**SAID, "spans": SPANS}]
    with pytest.raises(InputError, match=r"'spans' and 'messages\[1\]\.spans' are of one answer"):
        make([{"messages": both, "spans": SPANS}])
    call = {"role": "assistant", "content": "4", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(InputError, match=r"'spans' is for the text of an answer, .* tool calls"):
        make([{"messages": [*ASK, call], "spans": [[0, 1, 0]]}])
    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "spans": [[0, 1, 0]]}
    tokens, _ = make([pair])
    assert list(tokens.unread.values()) == [("spans",)]


def test_a_split_token_is_counted_and_named_each_time(
    make: Make, capfd: pytest.CaptureFixture[str], tmp_path: Path, tokenizers: dict[str, str]
) -> None:
    """One token is " answer": an edge in it splits it, one before or after its space does not."""
    text = "so the answer"
    rows = [{"prompt": "2?", "completion": text, "spans": [[0, edge, 0]]} for edge in (6, 7, 9, 10)]
    path = write_rows(tmp_path / "split.jsonl", rows)
    wanted = settings(path, tokenizers["chat"])
    for _ in range(2):  # tokenized, and from the cache
        tokens = tokenize(wanted, tmp_path / "cache", processes=1, console=Console())
        assert tokens.split_tokens == 2
        message = capfd.readouterr().err.splitlines()
        assert message == [
            "warning: 2 tokens are split by the edge of a span and weighted by their first "
            f"character: {path}:3: ' answer', {path}:4: ' answer'"
        ]
    for index, masked in enumerate((2, 2, 3, 3)):
        weights = tokens.token_weights(index)
        assert weights is not None
        assert np.flatnonzero(weights == 0).tolist() == list(range(masked))


def test_white_space_around_a_token_has_no_say() -> None:
    text = "a b\n\nc"
    offsets = [(0, 1), (1, 5), (5, 5), (5, 6)]  # " b\n\n" is one token, another one is empty
    weights, split = token_weights(text, [(2, 3, 0.0), (5, 6, 2.0)], offsets)
    assert (weights.tolist(), split) == ([1.0, 0.0, 2.0, 2.0], [])
    weights, split = token_weights(text, [(0, 4, 0.5)], [(0, 3), (3, 5), (5, 6)])
    assert (weights.tolist(), split) == ([0.5, 0.5, 1.0], [])
    weights, split = token_weights(text, [(0, 1, 0.5)], [(0, 3), (3, 6)])
    assert (weights.tolist(), split) == ([0.5, 1.0], ["a b"])


def test_the_characters_of_the_real_tokenizer_have_the_weights_of_their_spans(
    tmp_path: Path,
) -> None:
    """Each line of a real trace has its own weight, also with symbols of several bytes."""
    tokenizer = str(shared_data() / "tokenizers" / "qwen2.5")
    lines = ["We have √2 ≈ 1.41421 ∈ ℝ,\n", "also 中文 \U0001f600 é.\n\n", "So \\boxed{\\sqrt{2}}"]
    spans = []
    for number, line in enumerate(lines):
        start = sum(map(len, lines[:number]))
        spans.append([start, start + len(line), number + 2.0])
    row = {"prompt": "2?", "completion": "".join(lines), "spans": spans}
    wanted = settings(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)
    tokens = tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)
    weights = tokens.token_weights(0)
    assert weights is not None
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    ids = tokens.ids(0)[tokens.prompt_lengths[0] :]
    for number, line in enumerate(lines):
        assert decode(ids[weights == number + 2]).startswith(line.rstrip("\n"))
    assert tokens.split_tokens == 0
    assert not np.any(weights == 1)  # the end has the weight of the last line
