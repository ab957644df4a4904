"""Which assistant turns of a conversation are trained, and with which prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_cases import CHATML, save_tokenizer, settings, write_rows
from transformers import AutoTokenizer

from redi.engine.console import Console
from redi.engine.data.tokens import TokenizedTraces, tokenize
from redi.engine.errors import InputError

QUIET = Console(active=False)
# Templates that rewrite earlier turns: the first cuts the thoughts of all but the last message, the
# second shows them in the last alone, from a key of their own.
CUTTING = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}",
)
OWN_PLACE = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}",
)


def turns(*answers: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        found.append({"role": "user", "content": f"What is {number}?"})
        found.append({"role": "assistant", **answer})
    return found


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[TokenizedTraces, list[tuple[str, str]]]]:
    """Tokenizes rows; returns the tokens, and the prompt and the trained text of each trace."""

    def run(rows: list[dict[str, Any]], tokenizer: str, **options: Any) -> Any:
        wanted = settings(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, **options)
        tokens = tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)
        decode = AutoTokenizer.from_pretrained(tokenizer).decode
        starts = tokens.prompt_lengths.tolist()
        ids = [tokens.ids(index) for index in range(len(tokens))]
        texts = [(decode(i[:s]), decode(i[s:])) for i, s in zip(ids, starts, strict=True)]
        return tokens, texts

    return run


@pytest.mark.parametrize("template", [CHATML, CUTTING, OWN_PLACE])
@pytest.mark.parametrize("separate", [False, True])
def test_every_turn_is_trained_with_the_prompt_of_its_time(
    make: Callable[..., Any], tmp_path: Path, template: str, separate: bool
) -> None:
    if separate:
        answers = [{"content": f"It is {n}.", "reasoning_content": f"{n}!"} for n in range(3)]
    else:
        answers = [{"content": f"<think>{n}!</think>It is {n}."} for n in range(3)]
    messages = turns(*answers)
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=template)
    tokens, texts = make([{"messages": messages}], tokenizer, train_on="all")
    written = messages
    if separate and template != OWN_PLACE:
        written = [
            {
                "role": m["role"],
                "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"
                if m["role"] == "assistant"
                else m["content"],
            }
            for m in messages
        ]
    render = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template
    assert len(tokens) == 3
    for turn, (prompt, trained) in enumerate(texts):
        before = written[: 2 * turn + 1]
        assert prompt == render(before, tokenize=False, add_generation_prompt=True)
        # What follows the prompt is what the template writes for this turn at its time.
        whole = render(written[: 2 * turn + 2], tokenize=False)
        assert prompt + trained == whole + "<|end|>"
        assert f"{turn}!" in trained
    assert set(tokens.signs.tolist()) == {1}
    last, texts_of_last = make([{"messages": messages}], tokenizer)
    assert len(last) == 1
    assert texts_of_last == texts[2:]
    assert last.key != tokens.key


def test_of_an_incorrect_conversation_only_the_last_turn_is_trained(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    answers = [{"content": "It is 0."}, {"content": "It is 1."}]
    rows = [
        {"messages": turns(*answers), "label": True},
        {"messages": turns(*answers[:1], {"content": "It is 2."}), "label": False},
    ]
    tokens, texts = make(rows, tokenizer, train_on="all")
    assert tokens.signs.tolist() == [1, 1, -1]
    assert [trained.partition("<")[0] for _, trained in texts] == [
        "It is 0.",
        "It is 1.",
        "It is 2.",
    ]


def test_turns_of_every_shape_and_what_is_no_answer(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    said = [("gpt", "Hello"), ("human", "0?"), ("gpt", "A"), ("human", "1?"), ("gpt", "B")]
    rows = [
        {"conversations": [{"from": who, "value": text} for who, text in said], "finished": False},
    ]
    tokens, texts = make(rows, tokenizer, train_on="all")
    # The end of an unfinished conversation is not trained; those of its earlier turns are.
    assert [trained for _, trained in texts] == ["A<|im_end|>\n<|end|>", "B"]
    assert tokens.dropped == {"assistant turn before any user message": 1}
    rows = [{"instruction": "2?", "output": "C", "history": [["0?", "A"], ["1?", "B"]]}]
    for train_on, expected in (("all", "ABC"), ("last", "C")):
        _, texts = make(rows, tokenizer, train_on=train_on)
        assert [trained.partition("<")[0] for _, trained in texts] == list(expected)
    twice = [{"messages": [*turns({"content": "A"}, {"content": "B"})[:3]]}]
    twice[0]["messages"][2]["role"] = "assistant"
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .* ends with an assistant message"):
        make(twice, tokenizer, train_on="all")
