"""Traces to token ids: what is trained, how the end looks, and a cache that cannot be half."""

import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable
from datetime import date
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import xxhash
from data_cases import CHATML, save_tokenizer, settings, shared_data, write_rows
from hypothesis import strategies as st
from transformers import AutoTokenizer, tokenization_utils_base
from transformers.utils import chat_template_utils

from redi.engine.console import Console
from redi.engine.data import fingerprints
from redi.engine.data import tokens as tokens_module
from redi.engine.data.cache import open_cache
from redi.engine.data.packing import IGNORE, build_batch
from redi.engine.data.rows import read_rows
from redi.engine.data.sources import Source
from redi.engine.data.tokens import TokenizedTraces, TokenSettings, tokenize
from redi.engine.errors import InputError

PROMPT, POSITIVE, NEGATIVE = "What is 2 + 2?", "It is 4.\nSo: 4", "It is 5 "
PAIR = {"prompt": PROMPT, "chosen": POSITIVE, "rejected": NEGATIVE}
SYSTEM = "Please reason step by step."
QUIET = Console(active=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with ChatML whose EOS is not the end-of-turn token."""
    return save_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def qwen() -> str:
    return str(shared_data() / "tokenizers" / "qwen2.5")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., TokenizedTraces]:
    """Tokenizes rows written to a file."""

    def run(rows: list[dict[str, Any]], tokenizer: str, **options: Any) -> TokenizedTraces:
        path = write_rows(tmp_path / "rows.jsonl", rows)
        wanted = settings(path, tokenizer, **options)
        return tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)

    return run


@cache
def loaded(tokenizer: str) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer)


def prompt_and_trained(tokens: TokenizedTraces, index: int, tokenizer: str) -> tuple[str, str]:
    """Text of the prompt, and of exactly the tokens that a training batch's targets hold."""
    decode = loaded(tokenizer).decode
    batch = build_batch(tokens, np.array([index]), tokens.lengths[[index]])
    trained = batch.targets[batch.targets != IGNORE]
    assert len(trained) == int(batch.num_targets)
    # Whatever is trained is the end of the sequence, each token predicted from the one before.
    np.testing.assert_array_equal(trained, tokens.ids(index)[tokens.prompt_lengths[index] :])
    assert int(batch.valid_index[0]) == tokens.prompt_lengths[index] - 1
    prompt = decode(tokens.ids(index)[: tokens.prompt_lengths[index]])
    return prompt, decode(trained)


def test_a_maximum_length_that_is_no_number_is_one_line(make, tmp_path: Path) -> None:
    folder = Path(save_tokenizer(tmp_path / "tokenizer"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": []}))
    with pytest.raises(InputError, match=r"tokenizer_config.json: model_max_length must be a num"):
        make([PAIR], str(folder))


def test_a_tokenizer_without_a_vocabulary_is_one_line(make, tmp_path: Path) -> None:
    folder = Path(save_tokenizer(tmp_path / "tokenizer"))
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text())
    whole["model"].update(vocab={}, merges=[])
    file.write_text(json.dumps(whole))
    with pytest.raises(InputError, match=r"tokenizer: tokenizer.json has no vocabulary, only sp"):
        make([PAIR] * 30, str(folder))


def test_chat_trains_exactly_completion_and_end_on_qwen(make, qwen):
    tokens = make([PAIR], qwen, system_prompt=SYSTEM)
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n"
    for index, text in enumerate([POSITIVE, NEGATIVE]):
        prompt, trained = prompt_and_trained(tokens, index, qwen)
        assert prompt == head + "<|im_start|>assistant\n"
        # Qwen's EOS is the end-of-turn token: it is there already, before the newline.
        assert trained == text + "<|im_end|>\n"


def test_chat_trains_exactly_completion_and_end_with_an_eos_of_its_own(make, tiny):
    tokens = make([PAIR], tiny)
    for index, text in enumerate([POSITIVE, NEGATIVE]):
        prompt, trained = prompt_and_trained(tokens, index, tiny)
        assert prompt == f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
        assert trained == text + "<|im_end|>\n<|end|>"


@pytest.mark.parametrize("name", ["tiny", "qwen"])
def test_without_template_the_completion_and_eos_are_trained(make, name, request):
    tokenizer = request.getfixturevalue(name)
    eos = loaded(tokenizer).eos_token
    tokens = make([PAIR], tokenizer, template="none")
    for index, text in enumerate([POSITIVE, NEGATIVE]):
        assert prompt_and_trained(tokens, index, tokenizer) == (PROMPT, text + eos)


@pytest.mark.parametrize("template", ["chat", "none"])
@pytest.mark.parametrize("name", ["tiny", "qwen"])
def test_eos_is_there_exactly_once(make, name, template, request):
    tokenizer = request.getfixturevalue(name)
    own = loaded(tokenizer)
    # A trace may already end with EOS and white space: no second one is added.
    rows = [PAIR, {**PAIR, "chosen": POSITIVE + own.eos_token + " \n"}]
    tokens = make(rows if template == "none" else rows[:1], tokenizer, template=template)
    for index in range(len(tokens)):
        completion = tokens.ids(index)[tokens.prompt_lengths[index] :]
        assert (completion == own.eos_token_id).sum() == 1


def test_prompt_and_completion_are_tokenized_apart(make, qwen):
    tokens = make([{"prompt": "hel", "completion": "lo"}], qwen, template="none")
    encode = loaded(qwen).encode
    assert tokens.ids(0).tolist()[:-1] == encode("hel") + encode("lo") != encode("hello")


def test_every_shape_of_row_gives_the_same_tokens(make, tiny):
    user = {"role": "user", "content": PROMPT}
    good = {"role": "assistant", "content": POSITIVE}
    bad = {"role": "assistant", "content": NEGATIVE}
    labelled = [(POSITIVE, True), (NEGATIVE, False)]
    verdicts = [True, False]
    shapes: list[list[dict[str, Any]]] = [
        [PAIR],
        [{"prompt": [user], "chosen": [good], "rejected": [bad]}],
        [{"chosen": [user, good], "rejected": [user, bad]}],
        [{"prompt": PROMPT, "completion": text, "label": label} for text, label in labelled],
        [{"messages": [user, good], "label": 1}, {"messages": [user, bad], "label": 0}],
        [{"prompt": PROMPT, "traces": [{"text": t, "correct": c} for t, c in labelled]}],
        [
            {
                "problem": PROMPT,
                "generations": [POSITIVE, NEGATIVE],
                "problem_is_valid": "yes",
                "source": "s",
                "correctness": {
                    "llama_verification": verdicts,
                    "math_verify_reparsed_answer": verdicts,
                },
            }
        ],
    ]
    results = []
    for rows in shapes:
        tokens = make(rows, tiny)
        ids = [tokens.ids(index).tolist() for index in range(len(tokens))]
        per_trace = (tokens.prompt_lengths, tokens.signs, tokens.groups, tokens.weights)
        results.append((ids, *(column.tolist() for column in per_trace)))
    assert all(result == results[0] for result in results)
    assert results[0][2:] == ([1, -1], [0, 0], [1.0, 1.0])


def test_system_prompt_goes_before_messages_that_have_none(make, tiny):
    own = {"role": "system", "content": "My own."}
    user = {"role": "user", "content": PROMPT}
    answer = {"role": "assistant", "content": POSITIVE}
    rows = [{"messages": [user, answer]}, {"messages": [own, user, answer]}]
    tokens = make(rows, tiny, system_prompt=SYSTEM)
    for index, system in enumerate([SYSTEM, "My own."]):
        prompt, _ = prompt_and_trained(tokens, index, tiny)
        assert prompt.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")


# Templates of reasoning models. The first cuts reasoning out of every answer; the second opens
# the reasoning itself, in the generation prompt alone; the third trims; the fourth adds.
CUTTING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
OPENING = CHATML.replace("assistant\n", "assistant\n<think>\n")
TRIMMING = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
ADDING = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
# A header of the answer that the generation prompt leaves to the model: structure, no thought.
CHANNEL = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}<|im_start|>final\n{% endif %}{{ m.content }}",
)
CLOSED = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
END = "<|im_end|>\n<|end|>"


@pytest.mark.parametrize(
    ("template", "completion", "opened", "trained"),
    [
        (CUTTING, "why</think>4", "", "why</think>4<|im_end|>\n<|end|>"),
        (CUTTING + "{# #}", "4", "", "4<|im_end|>\n<|end|>"),
        (OPENING, "<think>\nwhy</think>4", "<think>\n", "why</think>4<|im_end|>\n<|end|>"),
        (OPENING, "<think>why</think>4", "<think>\n", "why</think>4<|im_end|>\n<|end|>"),
        (OPENING, "why</think>4", "<think>\n", "why</think>4<|im_end|>\n<|end|>"),
        (OPENING, "\n<think>\nnever ends", "<think>\n", "never ends"),
        (TRIMMING, "\n4 ", "", "\n4 <|im_end|>\n<|end|>"),
        (ADDING, "4", "", "4<|im_end|>\n<|end|>"),
        (ADDING, "<think>\nnever ends", "", "<think>\nnever ends"),
        (ADDING, "<think>\nwhy\n</think>\n\n4", "", "<think>\nwhy\n</think>\n\n4" + END),
        (CHANNEL, "4", "", "<|im_start|>final\n4" + END),
        (CHATML.replace("<|im_end|>\n{% endfor", "<|end|>\n{% endfor"), "4", "", "4<|end|>\n"),
    ],
)
def test_a_trace_is_trained_whole_whatever_the_template_does(
    make, tmp_path, template, completion, opened, trained
):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=template)
    tokens = make([{"prompt": PROMPT, "completion": completion}], tokenizer)
    prompt, text = prompt_and_trained(tokens, 0, tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n" + opened)
    assert text == trained


def test_a_thought_after_one_that_the_template_has_closed_is_refused(make, tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=CLOSED)
    row = {"prompt": PROMPT, "completion": "<think>\nwhy\n</think>\n4"}
    with pytest.raises(InputError, match=r"rows.jsonl:1: the trace begins with <think>, but"):
        make([row], tokenizer)
    tokens = make([{**row, "completion": "4"}], tokenizer)
    prompt, trained = prompt_and_trained(tokens, 0, tokenizer)
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    assert trained == "4" + END


@pytest.mark.parametrize("template", ["chat", "none"])
def test_the_end_of_an_unfinished_trace_is_not_trained(make, tiny, template):
    end = END if template == "chat" else "<|end|>"
    rows = [
        {"prompt": PROMPT, "traces": [{"text": "It is", "correct": True, "finished": False}]},
        {"prompt": PROMPT, "traces": [{"text": "It is", "correct": True}], "finished": 0},
        {"prompt": PROMPT, "traces": [{"text": "<think>It", "correct": True}]},
        {"prompt": PROMPT, "traces": [{"text": "<think>It", "correct": True, "finished": True}]},
        {"prompt": PROMPT, "traces": [{"text": "It <think>", "correct": True, "finished": None}]},
    ]
    tokens = make(rows, tiny, template=template)
    trained = [prompt_and_trained(tokens, index, tiny)[1] for index in range(len(rows))]
    assert trained == ["It is", "It is", "<think>It", "<think>It" + end, "It <think>" + end]
    assert tokens.unfinished == 3
    with pytest.raises(InputError, match=r"rows.jsonl:1: column 'finished' must be true or false"):
        make([{**PAIR, "finished": "no end"}], tiny)


WITH_BOS = "{{ bos_token }}" + CHATML


@pytest.mark.parametrize("document", ["<|bos|> $A", "<|bos|> $A <|end|>"])
def test_without_template_a_document_begins_as_the_tokenizer_begins_it(make, tmp_path, document):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", document=document)
    own = loaded(tokenizer)
    rows = [PAIR, {**PAIR, "prompt": "<|bos|>" + PROMPT}]
    tokens = make(rows, tokenizer, template="none")
    for index, text in enumerate([POSITIVE, NEGATIVE] * 2):
        expected = "<|bos|>" + PROMPT, text + "<|end|>"
        assert prompt_and_trained(tokens, index, tokenizer) == expected
        start = tokens.ids(index)[: tokens.prompt_lengths[index]].tolist()
        end = [own.eos_token_id] if document.endswith("<|end|>") else []
        assert start + end == own(PROMPT)["input_ids"]
    assert tokens.document_start == "<|bos|>"


@pytest.mark.parametrize(
    ("template", "start", "reported"),
    [
        (WITH_BOS, "<|bos|>", "<|bos|>"),
        (CHATML, "", "no <|bos|>: the chat template writes none"),
    ],
)
def test_with_a_chat_template_the_template_alone_decides_on_bos(
    make, tmp_path, template, start, reported
):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template=template, document="<|bos|> $A")
    tokens = make([PAIR], tokenizer)
    head = f"{start}<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_and_trained(tokens, 0, tokenizer)[0] == head
    assert tokens.document_start == reported


def test_the_date_that_a_template_prints_is_part_of_the_key(tmp_path, monkeypatch):
    dated = save_tokenizer(tmp_path / "dated", template="{{ strftime_now('%d %b') }}" + CHATML)
    wanted = settings(write_rows(tmp_path / "rows.jsonl", [PAIR]), dated)
    plain = settings(wanted.paths, dated, template="none")
    render = chat_template_utils.render_jinja_template

    def made_on(day: str, wanted: TokenSettings) -> TokenizedTraces:
        def rendered(*args: Any, **options: Any) -> Any:
            texts, spans = render(*args, **options)
            return [text.replace(date.today().strftime("%d %b"), day) for text in texts], spans

        monkeypatch.setattr(tokenization_utils_base, "render_jinja_template", rendered)
        return tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)

    first, again, later = (made_on(day, wanted) for day in ("1 Feb", "1 Feb", "2 Feb"))
    assert first.key == again.key != later.key
    for tokens, day in ((first, "1 Feb"), (later, "2 Feb")):
        assert prompt_and_trained(tokens, 0, dated)[0].startswith(day)
    assert made_on("1 Feb", plain).key == made_on("2 Feb", plain).key


def test_what_cannot_be_tokenized_is_the_users_error(make, tmp_path, tiny):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(InputError, match=r"rows.jsonl:1: a prompt of several messages"):
        make([{"messages": turns}], tiny, template="none")
    with pytest.raises(InputError, match="system_prompt needs template"):
        make([PAIR], tiny, template="none", system_prompt=SYSTEM)
    with pytest.raises(InputError, match="template 'chatml' is unknown"):
        make([PAIR], tiny, template="chatml")
    with pytest.raises(InputError, match="no such folder with a tokenizer"):
        make([PAIR], str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        make([PAIR], str(tmp_path / "empty"))
    bare = save_tokenizer(tmp_path / "bare", template=None)
    with pytest.raises(InputError, match="has no chat template"):
        make([PAIR], bare)
    refusing = save_tokenizer(tmp_path / "refusing", template="{{ raise_exception('not this') }}")
    with pytest.raises(InputError, match=r"rows.jsonl:1: the chat template refuses .*not this"):
        make([PAIR], refusing)
    silent = save_tokenizer(tmp_path / "silent", template="always the same")
    with pytest.raises(InputError, match="does not show the assistant's message"):
        make([PAIR], silent)


def test_nothing_left_by_the_filter_is_an_error_with_counts(make, tiny, tmp_path):
    row = {"problem": "p", "source": "s", "problem_is_valid": "No", "generations": []}
    with pytest.raises(InputError, match="no trace is left; dropped: 2 problem not valid"):
        make([{**row, "correctness": {}}] * 2, tiny)
    assert not list(tmp_path.rglob("traces.arrow*"))


def numbered(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": i // 2,
            "prompt": f"What is {i // 2}?",
            "completion": f"It is {i}. " * (i % 7 + 1),
            "label": i % 2,
            "weight": 1 + i,
            "teacher": f"teacher {i % 3}" if i % 5 else None,
        }
        for i in range(count)
    ]


def columns_of(tokens: TokenizedTraces) -> list[Any]:
    n = range(len(tokens))
    arrays = (tokens.lengths, tokens.prompt_lengths, tokens.signs, tokens.groups, tokens.weights)
    per_trace = [(tokens.ids(i).tolist(), tokens.where(i), tokens.teacher(i)) for i in n]
    return [tokens.dropped, *(array.tolist() for array in arrays), per_trace]


def test_columns_are_those_of_the_rows(make, tiny):
    count = 2 * tokens_module._CHUNK_ROWS + 3
    tokens = make(numbered(count), tiny)
    assert len(tokens) == count
    dtypes = {"lengths": "int64", "prompt_lengths": "int64", "signs": "int8", "groups": "int64"}
    for name, dtype in {**dtypes, "weights": "float32"}.items():
        assert getattr(tokens, name).dtype == dtype
        assert getattr(tokens, name).shape == (count,)
    assert tokens.signs.tolist() == [1 if i % 2 else -1 for i in range(count)]
    assert tokens.groups.tolist() == [i // 2 for i in range(count)]
    assert tokens.weights.tolist() == [1 + i for i in range(count)]
    for i in (0, 1, 5, count - 1):
        assert tokens.ids(i).dtype == np.int32
        assert len(tokens.ids(i)) == tokens.lengths[i]
        assert tokens.where(i).endswith(f"rows.jsonl:{i + 1}")
        assert tokens.teacher(i) == (f"teacher {i % 3}" if i % 5 else None)
    for outside in (-1, count):
        with pytest.raises(IndexError):
            tokens.ids(outside)


def test_a_cache_survives_pickling_and_opening(make, tiny):
    tokens = make(numbered(20), tiny)
    reopened = open_cache(tokens.folder)
    assert reopened is not None
    assert columns_of(reopened) == columns_of(pickle.loads(pickle.dumps(tokens)))
    assert columns_of(reopened) == columns_of(tokens)


def test_tokens_are_read_from_the_cache_and_named_by_todays_path(tmp_path, tiny, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", numbered(10))
    cache = tmp_path / "cache"
    made = tokenize(settings(path, tiny), cache, processes=1, console=QUIET)
    moved = shutil.move(path, tmp_path / "moved.jsonl")
    monkeypatch.setattr(tokens_module, "write_cache", None)  # would fail if called
    found = tokenize(settings(str(moved), tiny), cache, processes=1, console=Console())
    assert found.key == made.key
    assert found.where(3) == f"{moved}:4"


def test_a_large_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path, cache = tmp_path / "large.jsonl", tmp_path / "cache"
    with path.open("wb") as file:
        file.truncate(fingerprints.MIN_CACHED_BYTES)
    hashed = []
    really = fingerprints._hashed
    monkeypatch.setattr(fingerprints, "_hashed", lambda *a: hashed.append(a) or really(*a))

    def digest() -> str:
        return fingerprints.source_fingerprint(Source(str(path), "jsonl"), cache)

    first = digest()
    assert digest() == first
    assert len(hashed) == 1
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a change that hides itself
    second = digest()
    assert second != first
    assert digest() == second
    assert len(hashed) == 2
    shutil.copy2(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)  # another file in its place, with the same bytes and times
    assert digest() == second
    assert len(hashed) == 3
    (cache / "fingerprints.json").write_text("[")  # cut off
    assert digest() == second
    ahead = time.time() + 600
    os.utime(path, (ahead, ahead))  # as from a file server whose clock is ten minutes ahead
    assert digest() == second
    assert len(hashed) == 5
    assert digest() == second
    assert len(hashed) == 5


def test_a_change_in_the_same_tick_of_the_file_systems_clock_is_noticed(tmp_path, monkeypatch):
    """A file system with times of two seconds; a file changes right after they were read."""
    path, cache, tick = tmp_path / "data.jsonl", tmp_path / "cache", 2
    monkeypatch.setattr(fingerprints, "MIN_CACHED_BYTES", 1)
    really_stamps, really_sleep, written = fingerprints._stamps, time.sleep, []

    def coarse_stamps(files):
        unit = tick * 10**9
        return [
            [*rest, changed // unit * unit, status // unit * unit]
            for *rest, changed, status in really_stamps(files)
        ]

    def write_and_sleep(seconds):
        assert seconds >= tick
        if not written:
            path.write_bytes(b"new")
            written.append(coarse_stamps([path]))
        really_sleep(seconds)

    monkeypatch.setattr(fingerprints, "_stamps", coarse_stamps)
    monkeypatch.setattr(fingerprints.time, "sleep", write_and_sleep)
    while time.time() % tick > tick / 4:
        really_sleep(0.05)  # both writes are in one tick
    path.write_bytes(b"old")
    before = coarse_stamps([path])
    source = Source(str(path), "jsonl")
    digests = [fingerprints.source_fingerprint(source, cache) for _ in range(2)]
    assert written == [before], "the change was to leave the times as they were"
    assert digests == [fingerprints._hashed([path], "jsonl")] * 2


def test_weights_are_hashed_once_and_again_when_one_file_changes(tmp_path, monkeypatch):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    folder.mkdir()
    assert fingerprints.model_fingerprint(str(folder), cache) is None
    monkeypatch.setattr(fingerprints, "MIN_CACHED_BYTES", 6)
    (folder / "model-2.safetensors").write_bytes(b"cd")
    (folder / "model-1.safetensors").write_bytes(b"ab")
    small = fingerprints.model_fingerprint(str(folder), cache)
    assert small == xxhash.xxh3_128_hexdigest(b"abcd")
    assert not cache.exists()
    (folder / "model-3.safetensors").write_bytes(b"ef")
    large = fingerprints.model_fingerprint(str(folder), cache)
    assert large == xxhash.xxh3_128_hexdigest(b"abcdef")
    really = fingerprints._hashed
    monkeypatch.setattr(fingerprints, "_hashed", None)  # would fail if called
    assert fingerprints.model_fingerprint(str(folder), cache) == large
    monkeypatch.setattr(fingerprints, "_hashed", really)
    (folder / "model-2.safetensors").write_bytes(b"CD")
    assert fingerprints.model_fingerprint(str(folder), cache) == xxhash.xxh3_128_hexdigest(
        b"abCDef"
    )


def test_a_set_found_again_loads_no_tokenizer_whose_files_are_as_they_were(tmp_path, monkeypatch):
    encoder, loads = tokens_module.Encoder, []
    monkeypatch.setattr(tokens_module, "Encoder", lambda *a: loads.append(a) or encoder(*a))
    path = write_rows(tmp_path / "rows.jsonl", [PAIR])
    folder = tmp_path / "tokenizer"

    def key(**options: Any) -> str:
        wanted = settings(path, str(folder), **options)
        return tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET).key

    save_tokenizer(folder)
    first = key()
    assert key() == first
    assert len(loads) == 1
    assert key(template="none") != first  # to tokenize
    assert len(loads) == 2
    template = folder / "chat_template.jinja"
    times = template.stat()
    template.write_text(CHATML.replace("user", "USER").replace("assistant", "ASSISTANT"))
    os.utime(template, ns=(times.st_atime_ns, times.st_mtime_ns))  # a change that hides itself
    second = key()
    assert second != first
    assert len(loads) == 3
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    assert key() not in (first, second)
    assert len(loads) == 4
    shutil.rmtree(folder)
    save_tokenizer(folder)  # other files with the content of the first
    assert key() == first
    monkeypatch.setattr(fingerprints, "version", lambda name: "another")
    assert key() == first
    assert len(loads) == 6


def test_whatever_shapes_the_tokens_changes_the_key(tmp_path, tiny, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", [PAIR])
    messages = write_rows(tmp_path / "other.jsonl", [{**PAIR, "prompt": PROMPT + " "}])
    other_eos = save_tokenizer(tmp_path / "eos", eos="<|im_end|>")
    other_template = save_tokenizer(tmp_path / "template", template=CHATML + " ")

    def key(paths: str | tuple[str, ...], tokenizer: str, **options: Any) -> str:
        wanted = settings(paths, tokenizer, **options)
        return tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET).key

    keys = [
        key(path, tiny),
        key(messages, tiny),
        key((path, messages), tiny),
        key((messages, path), tiny),
        key(path, tiny, format="preference"),
        key(path, tiny, template="none"),
        key(path, tiny, system_prompt=""),
        key(path, tiny, system_prompt=SYSTEM),
        key(path, other_eos),
        key(path, other_template),
    ]
    monkeypatch.setattr(tokens_module, "CACHE_VERSION", tokens_module.CACHE_VERSION + 1)
    keys.append(key(path, tiny))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", ["traces.arrow", "meta.json"])
def test_a_cut_off_cache_is_made_again_wherever_it_was_cut(tmp_path, tiny, name):
    wanted = settings(write_rows(tmp_path / "rows.jsonl", numbered(6)), tiny)
    made = tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)
    expected = columns_of(made)
    file = made.folder / name
    whole = file.read_bytes()
    cuts = sorted({*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1})
    for cut in cuts:
        # A new file in its place: the one that is mapped must not change under `made`.
        file.unlink()
        file.write_bytes(whole[:cut])
        assert open_cache(made.folder) is None
        assert (
            columns_of(tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)) == expected
        )
        assert file.read_bytes() == whole
    assert sorted(path.name for path in made.folder.iterdir()) == ["meta.json", "traces.arrow"]


def test_a_cache_whose_parts_do_not_fit_is_not_read(tmp_path, tiny):
    wanted = settings(write_rows(tmp_path / "rows.jsonl", numbered(6)), tiny)
    made = tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)
    meta_path = made.folder / "meta.json"
    meta = json.loads(meta_path.read_text())
    changes: list[dict[str, Any]] = [
        *({"rows": 5}, {"bytes": meta["bytes"] + 8}, {"key": "x"}, {"more": 1}),
        *({"dropped": {"faulty rows": 1}}, {"faulty": 1}, {"parts": {}}, {"document_start": "x"}),
        *({"checksum": ""}, {"checksum": None}, {"rows": None}),
    ]
    for change in changes:
        meta_path.write_text(json.dumps({**meta, **change}))
        assert open_cache(made.folder) is None
    meta_path.write_text("[]")
    assert open_cache(made.folder) is None
    meta_path.unlink()
    assert open_cache(made.folder) is None
    data = made.folder / "traces.arrow"
    meta_path.write_text(json.dumps(meta))
    size = data.stat().st_size
    data.unlink()
    data.write_bytes(bytes(size))  # the right size, but not Arrow
    assert open_cache(made.folder) is None


BITS = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7))


def flip_bits(file: Path, bits: list[tuple[float, int]]) -> None:
    """Change the bits (place as a share of the file, number in its byte) in a new file."""
    content = bytearray(file.read_bytes())
    for place, bit in bits:
        content[int(place * len(content))] ^= 1 << bit
    file.unlink()
    file.write_bytes(content)


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(bits=st.lists(BITS, min_size=1, max_size=3, unique=True))
def test_a_cache_with_other_content_of_the_same_size_is_made_again(
    bits: list[tuple[float, int]], tiny: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    wanted = settings(write_rows(folder / "rows.jsonl", numbered(6)), tiny)
    made = tokenize(wanted, folder / "cache", processes=1, console=QUIET)
    expected = columns_of(made)
    data = made.folder / "traces.arrow"
    whole = data.read_bytes()
    flip_bits(data, bits)
    assert open_cache(made.folder) is None or data.read_bytes() == whole
    assert columns_of(tokenize(wanted, folder / "cache", processes=1, console=QUIET)) == expected
    assert data.read_bytes() == whole


def test_an_old_cache_without_a_checksum_is_made_again_under_its_key(tmp_path, tiny):
    wanted = settings(write_rows(tmp_path / "rows.jsonl", numbered(6)), tiny)
    made = tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)
    meta = json.loads((made.folder / "meta.json").read_text())
    del meta["checksum"]
    (made.folder / "meta.json").write_text(json.dumps(meta))
    assert open_cache(made.folder) is None
    again = tokenize(wanted, tmp_path / "cache", processes=1, console=QUIET)
    assert (again.key, columns_of(again)) == (made.key, columns_of(made))
    assert open_cache(made.folder) is not None


def test_a_longer_limit_of_rows_is_another_cache(tmp_path, tiny):
    path = write_rows(tmp_path / "rows.jsonl", numbered(6))
    keys = {
        tokenize(settings(path, tiny, **one), tmp_path / "cache", processes=1, console=QUIET).key
        for one in ({}, {"max_row_mb": 17})
    }
    assert len(keys) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(content=JSON, entry=JSON)
def test_cached_fingerprints_may_be_anything(
    content: Any, entry: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    file = cache / "data.jsonl"
    file.write_text("a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprints, "MIN_CACHED_BYTES", 0)
        patch.setattr(fingerprints, "_FINE_TICK", 0)
        patch.setattr(fingerprints, "_COARSE_TICK", 0)
        right = fingerprints.data_checksum(file, cache)
        known = cache / "fingerprints.json"
        (name,) = json.loads(known.read_text())
        for damaged in (content, {name: entry}, {name: [entry, content]}):
            known.write_text(json.dumps(damaged))
            assert fingerprints.data_checksum(file, cache) == right


def test_an_error_in_the_data_leaves_no_cache_behind(tmp_path, tiny):
    path = write_rows(tmp_path / "rows.jsonl", [*numbered(300), {"prompt": "p", "completion": ""}])
    with pytest.raises(InputError, match=r"rows.jsonl:301"):
        tokenize(settings(path, tiny), tmp_path / "cache", processes=1, console=QUIET)
    left = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert left <= {"fingerprints.json"}


def _tokenize_and_report(wanted: TokenSettings, cache: Path, results: Any) -> None:
    results.put(columns_of(tokenize(wanted, cache, processes=1, console=QUIET)))


def test_two_processes_at_once_both_end_with_the_whole_cache(tmp_path, tiny):
    wanted = settings(write_rows(tmp_path / "rows.jsonl", numbered(2000)), tiny)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (wanted, tmp_path / "cache", results)
    workers = [context.Process(target=_tokenize_and_report, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for worker in workers:
        worker.join(timeout=60)
    assert first == second
    assert len(first[1]) == 2000


@pytest.mark.slow
def test_worker_processes_give_the_same_cache(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(tokens_module, "_CHUNK_ROWS", 8)
    monkeypatch.setattr(tokens_module, "_CHUNKS_WORTH_WORKERS", 2)
    path = write_rows(tmp_path / "rows.jsonl", numbered(60))
    alone = tokenize(settings(path, tiny), tmp_path / "one", processes=1, console=QUIET)
    pooled = tokenize(settings(path, tiny), tmp_path / "two", processes=2, console=QUIET)
    assert columns_of(alone) == columns_of(pooled)
    data = [(tokens.folder / "traces.arrow").read_bytes() for tokens in (alone, pooled)]
    assert data[0] == data[1]


@pytest.mark.slow
def test_an_error_in_a_worker_process_names_the_row(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(tokens_module, "_CHUNK_ROWS", 8)
    monkeypatch.setattr(tokens_module, "_CHUNKS_WORTH_WORKERS", 2)
    rows = [*numbered(40), {"prompt": "p", "completion": "", "label": 1}, *numbered(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=r"rows.jsonl:41: column 'completion' is empty"):
        tokenize(settings(path, tiny), tmp_path / "cache", processes=2, console=QUIET)


def test_real_long_traces_decode_back_to_their_text(tmp_path, qwen):
    rows = list(islice(read_rows([str(shared_data() / "long_cot_gsm8k.jsonl.gz")], "auto"), 60))
    path = write_rows(tmp_path / "rows.jsonl.gz", [row.value for row in rows])
    wanted = settings(path, qwen, system_prompt=SYSTEM)
    tokens = tokenize(wanted, tmp_path, processes=1, console=QUIET)
    decode = loaded(qwen).decode
    texts = [trace["text"] for row in rows for trace in row.value["traces"]]
    assert len(tokens) == len(texts) == 240
    for index, text in enumerate(texts):
        assert decode(tokens.ids(index)[tokens.prompt_lengths[index] :]) == text + "<|im_end|>\n"
