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


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """Everything that shapes token ids; a change of a part makes another cache."""

    paths: tuple[str, ...]
    """Files, folders and hub names."""
    format: str
    """A row shape of `redi.engine.data.formats`, or "auto"."""
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

    def digest(self) -> str:
        """Hash of the tokenizer and its template."""
        parts = (
            self.tokenizer.backend_tokenizer.to_str(),
            self.tokenizer.chat_template,
            self._eos,
        )
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

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
            if not completion.rstrip().endswith(self._eos):
                end = [*end, self._eos_id]
            ids = np.array([*start, *end], dtype=np.int32)
            unknown = 0 if self._unknown_id is None else int(np.sum(ids == self._unknown_id))
            if not self._spells_all:
                unknown += self._lost(prompt + completion, ids)
            encoded.append(Encoded(ids, len(start), unknown))
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
        return [self._chat_texts(rendered[trace.prompt], trace) for trace in traces]

    def prompt_text(self, prompt: tuple[Message, ...] | str, where: str) -> str:
        """What a model sees before it answers: the prompt, and the template's opened answer.

        Args:
            where: the prompt's row, for messages.
        """
        if self._template == "none":
            return _plain_prompt(prompt, where)
        return self._render(self._messages(prompt), where, add_generation_prompt=True)

    def _chat_texts(self, prompt: str, trace: Trace) -> tuple[str, str]:
        """Prompt with the generation prompt; then what the full conversation adds to it.

        Some templates rewrite the answer (they cut reasoning out, up to `</think>`), or have a
        generation prompt that the full conversation lacks. The trace is what is to be learned:
        it then goes in as it is, with the end of turn that the template gives any message.
        """
        where = trace.where
        messages = self._messages(trace.prompt)
        completion = _without_opened_tag(prompt, trace.completion)
        full = self._render(_answered(messages, trace.completion), where)
        added = full.removeprefix(prompt) if full.startswith(prompt) else ""
        # Stripped: many templates trim the white space around a message.
        if completion.strip() in added:
            return prompt, added
        probe = self._render(_answered(messages, _PROBE), where)
        _, found, end_of_turn = probe.rpartition(_PROBE)
        if not found:
            raise InputError(f"{where}: the chat template does not show the assistant's message")
        return prompt, completion + end_of_turn

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
    if not opened:
        return completion
    if completion.startswith(opened.group()):
        return completion.removeprefix(opened.group())
    return completion.removeprefix(opened.group().rstrip())


def _plain_prompt(prompt: tuple[Message, ...] | str, where: str) -> str:
    messages = as_messages(prompt)
    if len(messages) != 1 or messages[0].role != "user":
        raise InputError(
            f'{where}: a prompt of several messages needs a chat template: choose template "chat"'
        )
    return messages[0].content
