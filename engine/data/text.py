"""Chat template, end of sequence and tokenizer: from a trace to token ids.

The prompt and the completion are tokenized apart: tokenized together, the last characters of
the one could merge with the first of the other, and the model is never prompted like that.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from redi.engine.data.traces import Message, Trace, as_messages
from redi.engine.errors import InputError
from redi.engine.hub import NO_HUB_NAME, asking_the_hub, is_hub_name

TEMPLATES = ("chat", "none")
_PROBE = "redi probe message"
# What a vocabulary of bytes spells, and one of a few characters or words does not.
_ANY_TEXT = "aZ09 +-=*/(){}<>\\$%é≠中☃\U0001f600"
_OPENED_TAG = re.compile(r"<[^<>/|｜\s]+>\s*$")
_EMPTY_BLOCK = re.compile(r"<([^<>/|｜\s]+)>\s*</\1>\s*$")
_THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>")
# Templates that show a date or draw words render otherwise from one call to the next.
_VOLATILE = re.compile(r"\b(?:strftime_now|random|lipsum)\b")
_VOLATILE_MARK = "-volatile"
_PROBE_TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
    {"role": "user", "content": "And 3 + 3?"},
)


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """Everything that shapes token ids; a change of a part makes another cache."""

    paths: tuple[str, ...]
    """Files, folders and hub names."""
    format: str
    """A row shape of `redi.engine.data.rows`, or "auto"."""
    template: str
    """"chat": the tokenizer's chat template. "none": prompt and completion as they are."""
    system_prompt: str | None
    """Put before messages that have no system message; needs the chat template."""
    tokenizer_path: str
    """Folder or hub name of a tokenizer."""
    control_tokens: str = "allow"
    """"error": traces that spell a control token of the tokenizer are refused; of no account for
    the ids."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one trace."""

    ids: np.ndarray
    """int32 [length]: prompt, then completion with its end."""
    prompt_length: int
    unknown: int
    """Tokens that the tokenizer does not know, and characters that it drops."""


class Encoder:
    """A tokenizer with its template, as the settings want them applied.

    Attributes:
        tokenizer: the fast tokenizer.
    """

    def __init__(self, settings: TokenSettings) -> None:
        """Loads the tokenizer; InputError if it cannot be had or lacks what is needed."""
        if settings.template not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise InputError(f"[data] template {settings.template!r} is unknown; known: {known}")
        if settings.template == "none" and settings.system_prompt is not None:
            raise InputError('system_prompt has no place without a template: choose "chat"')
        self.tokenizer = load_tokenizer(settings.tokenizer_path)
        if settings.template == "chat" and not self.tokenizer.chat_template:
            raise InputError(
                f"{settings.tokenizer_path}: the tokenizer has no chat template: choose template "
                '"none", or give a tokenizer with one'
            )
        self._eos: str = self.tokenizer.eos_token
        self._eos_id: int = self.tokenizer.eos_token_id
        # Some tokenizers have no token of its own for the unknown.
        unknown = self.tokenizer.unk_token_id
        self._unknown_id = None if unknown == self._eos_id else unknown
        self._spells_all = not self._lost(_ANY_TEXT, self._ids([_ANY_TEXT])[0])
        control = "|".join(map(re.escape, _control_tokens(self.tokenizer)))
        self._control = re.compile(control or "(?!)")  # without any: matches nowhere
        self._template = settings.template
        self._system_prompt = settings.system_prompt
        self._start = [] if settings.template == "chat" else _document_start(self.tokenizer)

    def digest(self) -> str:
        """Hash of the tokenizer and its template; see `is_volatile` for what it may end with."""
        parts = (
            self.tokenizer.backend_tokenizer.to_str(),
            self.tokenizer.chat_template,
            self._eos,
        )
        digest = xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
        volatile = _VOLATILE.search(json.dumps(self.tokenizer.chat_template or ""))
        return f"{digest}{_VOLATILE_MARK}" if volatile else digest

    def rendering(self) -> str:
        """What the chat template makes of two fixed conversations now; "" without a template.

        It holds what the template's text does not show: the date that it prints, or what another
        version of the renderer makes of it.
        """
        if self._template == "none":
            return ""
        rendered = []
        for turns in (_PROBE_TURNS[1:2], _PROBE_TURNS):
            try:
                rendered.append(self._render(list(turns), "", add_generation_prompt=True))
            except InputError as error:  # some templates refuse system messages
                rendered.append(str(error))
        return "\n".join(rendered)

    def document_start(self) -> str:
        """The tokens that begin each document and are no text of the row, as text; "" if none.

        Without a template these are what the tokenizer puts before any text; a chat template
        writes its own.
        """
        if self._template == "none":
            return "".join(self.tokenizer.convert_ids_to_tokens(self._start))
        start = _document_start(self.tokenizer)
        try:
            first = self._render(list(_PROBE_TURNS[1:2]), "", add_generation_prompt=True)
        except InputError:  # the rows will show whether it refuses them too
            return ""
        bos = self.tokenizer.bos_token_id
        if bos is not None and self._ids([first])[0][:1] == [bos]:
            return self.tokenizer.bos_token
        if not start:
            return ""
        missing = "".join(self.tokenizer.convert_ids_to_tokens(start))
        return f"no {missing}: the chat template writes none"

    def with_start(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids of a prompt after those that the tokenizer begins a document with, given once.

        With a chat template they are as they were: the template writes the start itself.
        """
        if tuple(ids[: len(self._start)]) == tuple(self._start):
            return tuple(ids)
        return (*self._start, *ids)

    def encode(self, traces: Sequence[Trace], texts: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Token ids of each trace.

        Args:
            traces: for messages.
            texts: of each, as `texts` gives them.

        Raises InputError with a line for each trace without a token in this vocabulary.
        """
        # Traces of one problem share the prompt: it is tokenized once.
        prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(p for p, _ in texts))}
        prompt_ids = self._ids(list(prompts))
        completion_ids = self._ids([completion for _, completion in texts])
        encoded = []
        faults = []
        for trace, (prompt, completion), end in zip(traces, texts, completion_ids, strict=True):
            start = prompt_ids[prompts[prompt]]
            if not start or not end:
                what = "completion" if start else "prompt"
                faults.append(f"{trace.where}: the {what} has no token in this vocabulary")
                continue
            if is_finished(trace) and not completion.rstrip().endswith(self._eos):
                end = [*end, self._eos_id]
            unknown = 0 if self._unknown_id is None else [*start, *end].count(self._unknown_id)
            if not self._spells_all:
                unknown += self._lost(prompt + completion, [*start, *end])
            whole = self.with_start(start)
            ids = np.array([*whole, *end], dtype=np.int32)
            encoded.append(Encoded(ids, len(whole), unknown))
        if faults:
            raise InputError("\n".join(dict.fromkeys(faults)))
        return encoded

    def _lost(self, text: str, ids: Sequence[int] | np.ndarray) -> int:
        """Characters, white space apart, that the tokens do not spell.

        A vocabulary that lacks a character and has no token for the unknown drops it.
        """
        spelled = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return max(0, len("".join(text.split())) - len("".join(spelled.split())))

    def control_tokens(self, trace: Trace) -> Counter[str]:
        """Control tokens that the trace's own text spells, the end that it may bring excepted.

        They are trained as structure (an end of turn, say), not as the text that they were meant
        to be.
        """
        return Counter(self._control.findall(trace.completion.rstrip().removesuffix(self._eos)))

    def texts(self, traces: Sequence[Trace]) -> list[tuple[str, str]]:
        """Each trace's prompt and completion, with whatever the template puts around them.

        Args:
            traces: of one row; their prompt is rendered once.

        Raises InputError naming the row if it cannot be rendered.
        """
        prompts = {trace.prompt: trace.where for trace in traces}
        rendered = {prompt: self.prompt_text(prompt, where) for prompt, where in prompts.items()}
        if self._template == "none":
            return [(rendered[trace.prompt], trace.completion) for trace in traces]
        frames = {
            prompt: self._frame(prompt, rendered[prompt], where)
            for prompt, where in prompts.items()
        }
        return [
            self._chat_texts(rendered[trace.prompt], frames[trace.prompt], trace)
            for trace in traces
        ]

    def prompt_text(self, prompt: tuple[Message, ...] | str, where: str) -> str:
        """What a model sees before it answers: the prompt, and the template's opened answer.

        Args:
            where: the prompt's row, for messages.
        """
        if self._template == "none":
            return _plain_prompt(prompt, where)
        return self._render(self._messages(prompt), where, add_generation_prompt=True)

    def _frame(
        self, prompt: tuple[Message, ...] | str, rendered: str, where: str
    ) -> tuple[str, str]:
        """What the template writes around any answer: after the generation prompt, and at the end.

        An opened or empty thought that the template puts before the answer is left out: it is not
        in the trace.
        """
        probe = self._render(_answered(self._messages(prompt), _PROBE), where)
        before, found, end_of_turn = probe.rpartition(_PROBE)
        if not found:
            raise InputError(f"{where}: the chat template does not show the assistant's message")
        # Some generation prompts have what the full conversation lacks.
        header = before.removeprefix(rendered) if before.startswith(rendered) else ""
        return _OPENED_TAG.sub("", _EMPTY_BLOCK.sub("", header)), end_of_turn

    def _chat_texts(self, prompt: str, frame: tuple[str, str], trace: Trace) -> tuple[str, str]:
        """The generation prompt; then the trace as it is, between what `_frame` gives.

        Templates rewrite answers: they cut reasoning out, add an empty thought, trim. The trace is
        what is to be learned, so it never passes through the template.
        """
        header, end_of_turn = frame
        closed = _EMPTY_BLOCK.search(prompt)
        if closed and trace.completion.lstrip().startswith(f"<{closed[1]}>"):
            raise InputError(
                f"{trace.where}: the trace begins with <{closed[1]}>, but the chat template's "
                f"generation prompt has already closed it ({closed[0].strip()!r}): use a template "
                "that leaves the thought to the answer, or remove the thought from the trace"
            )
        completion = _without_opened_tag(prompt, trace.completion)
        return prompt, header + completion + (end_of_turn if is_finished(trace) else "")

    def _render(self, messages: list[dict[str, str]], where: str, **options: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template may raise anything, of its own or of Jinja's
            problem = " ".join(str(error).split())
            raise InputError(f"{where}: the chat template refuses the row: {problem}") from error

    def _messages(self, prompt: tuple[Message, ...] | str) -> list[dict[str, str]]:
        """The prompt as templates take it, with the system prompt if it has none of its own."""
        messages = as_messages(prompt)
        if self._system_prompt is not None and not any(m.role == "system" for m in messages):
            messages = (Message("system", self._system_prompt), *messages)
        return [{"role": m.role, "content": m.content} for m in messages]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # transformers cannot tokenize an empty batch
            return []
        # verbose: else it warns of sequences longer than the tokenizer's nominal maximum.
        batch = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return batch["input_ids"]


def load_tokenizer(path: str) -> Any:
    """The fast tokenizer in a folder or on the hub; InputError if there is none with an EOS."""
    from transformers import AutoTokenizer  # imported late: a cache can be read without it

    if not (Path(path).is_dir() or is_hub_name(path)):
        raise InputError(f"{path}: no such folder with a tokenizer, {NO_HUB_NAME}")
    try:
        with asking_the_hub():
            tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise a great many types
        problem = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: no tokenizer can be loaded from here: {problem}") from error
    if not tokenizer.is_fast:
        raise InputError(f"{path}: a fast tokenizer is needed (a folder with tokenizer.json)")
    if tokenizer.eos_token is None:
        raise InputError(f"{path}: the tokenizer has no eos_token: the end could not be trained")
    return tokenizer


def is_volatile(digest: str) -> bool:
    """True if the chat template of the tokenizer with this `Encoder.digest` may render the same
    conversation differently from one day to the next."""
    return digest.endswith(_VOLATILE_MARK)


def is_finished(trace: Trace) -> bool:
    """True if the trace has an end that is to be learned.

    False where its row says so, and where it begins with a thought that it never closes, unless
    its row says `finished: true`.
    """
    if trace.finished is not None:
        return trace.finished
    thought = _THOUGHT.match(trace.completion)
    return thought is None or f"</{thought[1]}>" in trace.completion


def _document_start(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before any text, BOS for most that have one."""
    # Text of every kind: a vocabulary of digits alone has no token for words.
    bare = tokenizer(_ANY_TEXT, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_ANY_TEXT, add_special_tokens=True)["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return list(whole[:place])
    return []


def _control_tokens(tokenizer: Any) -> list[str]:
    """The tokenizer's special tokens, longest first; reasoning tags are text to most."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted((token.content for token in added if token.special), key=len, reverse=True)


def _answered(messages: list[dict[str, str]], answer: str) -> list[dict[str, str]]:
    return [*messages, {"role": "assistant", "content": answer}]


def _without_opened_tag(prompt: str, completion: str) -> str:
    """Drops the completion's opening tag if the generation prompt has already opened it.

    Reasoning models' templates end with "<think>" and a newline; teachers' traces begin so.
    """
    opened = _OPENED_TAG.search(prompt)
    tag = opened.group() if opened else ""
    written = completion.lstrip()
    if not opened or not written.startswith(tag.rstrip()):
        return completion
    return written.removeprefix(tag if written.startswith(tag) else tag.rstrip())


def _plain_prompt(prompt: tuple[Message, ...] | str, where: str) -> str:
    messages = as_messages(prompt)
    if len(messages) != 1 or messages[0].role != "user":
        raise InputError(
            f'{where}: a prompt of several messages needs a chat template: choose template "chat"'
        )
    return messages[0].content
