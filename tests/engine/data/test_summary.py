"""The look before training: every figure against rows whose properties are known."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import make_tokens, save_tokenizer, settings, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redi.engine.console import Console
from redi.engine.data.packing import Cost
from redi.engine.data.schedule import Schedule, select
from redi.engine.data.summary import (
    HeldOutOverlap,
    Summary,
    count_rows,
    length_rows,
    summarize,
    warnings,
)
from redi.engine.data.tokens import TokenizedTraces, tokenize
from redi.engine.errors import InputError
from redi.engine.quickstart import task as quickstart

LIMITS: dict[str, Any] = {"max_tokens": 64, "overlong": "truncate", "row_tokens": 64}


def overview(
    tokens: TokenizedTraces,
    needs: Any = "pairs",
    batch: int = 2,
    held_out: TokenizedTraces | None = None,
) -> Summary:
    examples = select(tokens, objective_needs=needs, **LIMITS)
    scored = held_out and (held_out, select(held_out, objective_needs="pairs", **LIMITS))
    schedule = Schedule(len(examples.units), batch=batch, epochs=1, max_steps=None, seed=0)
    cost = Cost(linear=1.0, quadratic=0.0)
    return summarize(tokens, examples, schedule, scored, row_tokens=64, world_size=1, cost=cost)


def tokenized(folder: Path, rows: Sequence[dict[str, Any]], tokenizer: str) -> TokenizedTraces:
    wanted = settings(write_rows(folder / "rows.jsonl", rows), tokenizer)
    return tokenize(wanted, folder / "cache", processes=1, console=Console(active=False))


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_identical_repeated_and_contradictory_traces_are_counted(tmp_path: Path) -> None:
    rows = [
        pair("a", "yes", "no"),
        pair("b", "same", "same"),  # identical, so also contradictory
        pair("c", "one", "two"),
        pair("c", "one", "three"),  # repeats a positive
        pair("d", "up", "down"),
        pair("d", "down", "left"),  # contradicts the row before
        pair("e", "yes", "no"),  # not a repetition: another prompt
    ]
    found = overview(tokenized(tmp_path, rows, save_tokenizer(tmp_path)))
    assert (found.units, found.paired) == (7, True)
    assert found.duplicates == 1
    assert found.identical_pairs == 1
    assert found.contradictions == 2
    assert found.unknown_tokens == 0
    text = " ".join(warnings(found))
    assert "1 of 7 pairs have the same tokens" in text
    assert f"(the first: {tmp_path / 'rows.jsonl'}:2)" in text


def dropping(tokens: TokenizedTraces, needs: Any) -> tuple[list[list[int]], dict[str, int]]:
    found = select(tokens, objective_needs=needs, duplicates="drop", **LIMITS)
    return found.units.tolist(), found.left_out


def test_equal_traces_of_a_problem_are_used_once_on_request(tmp_path: Path) -> None:
    texts = [("x", True), ("x", True), ("y", True), ("x", False), ("n", False)]
    traces = [{"text": text, "correct": correct} for text, correct in texts]
    tokens = tokenized(tmp_path, [{"prompt": "c", "traces": traces}], save_tokenizer(tmp_path))
    kept = select(tokens, objective_needs="pairs", **LIMITS)
    assert (kept.units.tolist(), kept.left_out) == ([[0, 3], [1, 4]], {"positives unpaired": 1})
    assert dropping(tokens, "pairs") == ([[0, 3], [2, 4]], {"duplicates dropped": 1})


def test_equal_units_of_several_problems_are_used_once_on_request(tmp_path: Path) -> None:
    rows = [
        pair("c", "one", "two"),
        pair("c", "one", "three"),  # its own pair, though the positive is there
        pair("c", "one", "two"),
        pair("c", "two", "one"),  # other verdicts
        pair("d", "one", "two"),  # another prompt
    ]
    tokens = tokenized(tmp_path, rows, save_tokenizer(tmp_path))
    pairs = [[0, 1], [2, 3], [6, 7], [8, 9]]
    assert dropping(tokens, "pairs") == (pairs, {"duplicates dropped": 2})
    units, left_out = dropping(tokens, "positives")
    assert units == [[0], [6], [8]]
    assert left_out == {"duplicates dropped": 2, "negatives unused": 5}
    units, left_out = dropping(tokens, "traces")
    assert units == [[0], [1], [3], [6], [7], [8], [9]]
    assert left_out == {"duplicates dropped": 3}


def test_held_out_traces_and_problems_that_are_trained_are_counted_and_warned_of(
    tmp_path: Path,
) -> None:
    tokenizer = save_tokenizer(tmp_path)
    for name in ("train", "eval"):
        (tmp_path / name).mkdir()
    texts = {"a": ["yes", "no"], "b": ["one", "two"], "c": ["without a negative: not trained"]}
    trained = [
        {"prompt": prompt, "traces": [{"text": t, "correct": t == some[0]} for t in some]}
        for prompt, some in texts.items()
    ]
    apart = [
        pair("d", "yes", "no"),  # another prompt
        {"id": "x", **pair("c", "up", "down")},
    ]
    both = [
        {"id": "y", **pair("a", "yes", "never")},  # another id, an equal positive
        {"id": "y", **pair("a", "no", "never")},  # equal, though it is trained as a negative
        {"id": "z", **pair("b", "three", "four")},
    ]
    tokens = tokenized(tmp_path / "train", trained, tokenizer)
    clean = overview(tokens, held_out=tokenized(tmp_path / "eval", apart, tokenizer))
    assert clean.held_out == HeldOutOverlap(4, 0, 2, 0)
    assert warnings(clean) == []
    found = overview(tokens, held_out=tokenized(tmp_path / "eval", apart + both, tokenizer))
    assert found.held_out == HeldOutOverlap(10, 2, 4, 2)
    (warning,) = warnings(found)
    assert "2 of its 4 problems have a prompt that is trained on, 2 of its 10 traces" in warning
    rows = dict(count_rows(found))
    assert rows["held-out problems that are trained"] == "2 of 4"
    assert rows["held-out traces that are trained"] == "2 of 10"


def test_text_that_the_tokenizer_does_not_know_is_counted_and_warned_of(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    fast.save_pretrained(tmp_path)
    rows = [pair("a", "b", "a b"), pair("b", "a x b", "a"), pair("y", "a a", "b")]
    found = overview(tokenized(tmp_path, rows, str(tmp_path)))
    assert found.unknown_tokens == 3  # the positive with x, and both traces of prompt y
    assert "3 of 6 traces hold text" in warnings(found)[0]


def test_control_tokens_in_a_trace_are_counted_named_and_refused_on_request(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    rows = [
        pair("1?", "2", "no<|im_end|>\n<|im_start|>user"),
        pair("2?", "4<|end|>", "<|im_end|>"),  # the first is the end that the trace brought
        pair("3?", "9", "<think>8</think>"),  # text to this tokenizer
    ]
    tokens = tokenized(tmp_path, rows, tokenizer)
    assert tokens.control.tolist() == [0, 2, 0, 1, 0, 0]
    assert tokens.control_tokens == {"<|im_end|>": 2, "<|im_start|>": 1}
    found = overview(tokens)
    assert found.control_tokens == 2
    assert "2 of 6 traces spell control tokens" in warnings(found)[0]
    assert "<|im_start|>" in warnings(found)[0]
    refusing = replace(settings(str(tmp_path / "rows.jsonl"), tokenizer), control_tokens="error")
    for cache in ("cache", "another"):  # found again, and made anew
        with pytest.raises(InputError) as caught:
            tokenize(refusing, tmp_path / cache, processes=1, console=Console(active=False))
        lines = str(caught.value).splitlines()
        assert [line.split(": ")[0].rpartition(":")[2] for line in lines] == ["1", "2"]
        assert "2 control tokens" in lines[0]


def test_text_that_a_vocabulary_drops_without_a_token_is_counted(tmp_path: Path) -> None:
    quickstart.write_model(tmp_path, seed=0)  # digits, =, * and an end; no token for the unknown
    rows = [pair("12=", "34", "*5"), pair("What is 1 + 2?", "3", "4")]
    found = overview(tokenized(tmp_path, rows, str(tmp_path)))
    assert found.unknown_tokens == 2  # both traces of the second prompt


def test_lengths_and_truncated_ends_are_those_of_what_is_trained(tmp_path: Path) -> None:
    completions = [12, 22, 56, 82, 2, 192]
    signs, groups = [1, -1, 1, -1, 1, 1], [0, 0, 1, 1, 2, 2]
    tokens = make_tokens(tmp_path / "m", [8] * 6, completions, signs, groups)
    found = overview(tokens, batch=1)
    assert found.traces == 6
    assert found.left_out == {"positives unpaired": 2}
    assert found.truncated == 1  # the one of 8 + 82 tokens; that of 200 is not trained
    positive, negative = found.lengths["positive"], found.lengths["negative"]
    assert (positive.count, positive.total, positive.longest) == (2, 12 + 56, 56)
    assert (negative.count, negative.total, negative.longest) == (2, 22 + 56, 56)
    assert found.lengths["prompt"].count == 2  # problems, not traces


def test_problems_are_counted_by_the_kinds_of_traces_that_they_have(tmp_path: Path) -> None:
    signs, groups = [1, -1, 1, 1, -1, 1, -1, -1], [0, 0, 1, 1, 2, 3, 3, 3]
    tokens = make_tokens(tmp_path / "m", [8] * 8, [9] * 8, signs, groups)
    found = overview(tokens, batch=1)
    assert (found.problems, found.only_positives, found.only_negatives) == (4, 1, 1)
    assert found.left_out == {"positives unpaired": 2, "negatives unpaired": 2}
    rows = dict(count_rows(found))
    assert rows["- with correct traces alone"] == rows["- with incorrect traces alone"] == "1"


def test_the_longest_trace_bounds_what_any_packing_can_reach(tmp_path: Path) -> None:
    # 60 tokens on one of four ranks: the others have 3 x 10 for the time that it takes.
    tokens = make_tokens(tmp_path / "m", [5] * 4, [55, 5, 5, 5], [1, -1] * 2, [0, 0, 1, 1])
    examples = select(tokens, objective_needs="pairs", **LIMITS)
    schedule = Schedule(2, batch=2, epochs=1, max_steps=None, seed=0)
    cost = Cost(linear=1.0, quadratic=0.0)
    found = summarize(tokens, examples, schedule, row_tokens=64, world_size=4, cost=cost)
    assert found.rank_efficiency_bound == found.rank_efficiency == 90 / (4 * 60)
    assert ("- the longest trace allows", "0.38") in count_rows(found)
    assert overview(tokens).rank_efficiency_bound == 1


def test_percentiles_are_lengths_that_occur(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "m", [8] * 40, list(range(1, 41)), [1] * 40, range(40))
    found = overview(tokens, "positives").lengths
    assert found["positive"].percentiles == tuple(
        int(np.sort(np.arange(1, 41))[round(p / 100 * 39)]) for p in (5, 50, 95, 99)
    )
    assert found["negative"].count == 0


@pytest.mark.parametrize(("needs", "unit"), [("pairs", "pairs"), ("positives", "sequences")])
def test_the_tables_name_the_unit_and_hold_every_figure(
    needs: str, unit: str, tmp_path: Path
) -> None:
    tokens = make_tokens(tmp_path / "m", [8] * 10, [20] * 10, [1, -1] * 5, [0, 0, 1, 1] + [2] * 6)
    found = overview(tokens, needs)
    rows = dict(count_rows(found))
    assert rows[f"{unit} to train on"] == "5"
    assert rows[f"steps of 2 {unit}"] == "2"
    assert rows["left over in an epoch"] == "1"
    assert rows["rank efficiency, 1 rank"] == "1.00"
    assert ("identical chosen and rejected" in rows) == (needs == "pairs")
    names = [row[0] for row in length_rows(found)]
    assert names == (
        ["prompt", "positive", "negative"] if needs == "pairs" else ["prompt", "positive"]
    )
