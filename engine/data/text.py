"""Converts a trace to token ids: chat template, end of sequence, tokenizer.

Prompt and completion are tokenized separately. Tokenized together, the last characters of the
prompt could merge with the first of the completion, which never happens in generation.
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
# Text that a byte-level vocabulary represents, but one of a few characters or words does not.
_ANY_TEXT = "aZ09 +-=*/(){}<>\\$%é≠中☃\U0001f600"
_OPENED_TAG = re.compile(r"<[^<>/|｜\s]+>\s*$")
_EMPTY_BLOCK = re.compile(r"<([^<>/|｜\s]+)>\s*</\1>\s*$")
_THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>")
# Templates with a date or random words render differently from one call to the next.
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
    """Everything that determines the token ids; a change of any part makes another cache."""

    paths: tuple[str, ...]
    """Files, folders and hub names."""
    format: str
    """A row format of `redi.engine.data.rows`, or "auto"."""
    template: str
    """"chat": the tokenizer's chat template. "none": prompt and completion without a template."""
    system_prompt: str | None
    """Added to messages that have no system message; needs the chat template."""
    tokenizer_path: str
    """Folder or hub name of a tokenizer."""
    control_tokens: str = "allow"
    """"error": refuse traces whose text contains a control token of the tokenizer. Does not change
    the ids."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one trace."""

    ids: np.ndarray
    """int32 [length]: the prompt, then the completion with its end."""
    prompt_length: int
    unknown: int
    """Number of unknown tokens, and of characters that the tokenizer drops."""


class Encoder:
    """A tokenizer with its template, applied according to the settings.

    Attributes:
        tokenizer: the fast tokenizer.
    """

    def __init__(self, settings: TokenSettings) -> None:
        """Load the tokenizer.

        Raises:
            InputError: it is not available, or lacks an end-of-sequence token or a chat template.
        """
        if settings.template not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise InputError(
                f"[data] template {settings.template!r} is unknown; available: {known}"
            )
        if settings.template == "none" and settings.system_prompt is not None:
            raise InputError('system_prompt needs template "chat", got "none"')
        self.tokenizer = load_tokenizer(settings.tokenizer_path)
        if settings.template == "chat" and not self.tokenizer.chat_template:
            raise InputError(
                f"{settings.tokenizer_path}: the tokenizer has no chat template: choose template "
                '"none", or give a tokenizer with one'
            )
        self._eos: str = self.tokenizer.eos_token
        self._eos_id: int = self.tokenizer.eos_token_id
        # Some tokenizers have no separate token for unknown text.
        unknown = self.tokenizer.unk_token_id
        self._unknown_id = None if unknown == self._eos_id else unknown
        self._spells_all = not self._lost(_ANY_TEXT, self._ids([_ANY_TEXT])[0])
        control = "|".join(map(re.escape, _control_tokens(self.tokenizer)))
        self._control = re.compile(control or "(?!)")  # without control tokens: matches nothing
        self._template = settings.template
        self._system_prompt = settings.system_prompt
        self._start = [] if settings.template == "chat" else _document_start(self.tokenizer)

    def fingerprint(self) -> str:
        """Hash of the tokenizer and its template; `is_volatile` reads a mark at its end."""
        parts = (
            self.tokenizer.backend_tokenizer.to_str(),
            self.tokenizer.chat_template,
            self._eos,
        )
        whole = xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
        volatile = _VOLATILE.search(json.dumps(self.tokenizer.chat_template or ""))
        return f"{whole}{_VOLATILE_MARK}" if volatile else whole

    def rendering(self) -> str:
        """Two fixed conversations, rendered with the chat template now; "" without a template.

        This depends on more than the text of the template: on the date that it prints, and on the
        version of the renderer.
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
        """The tokens at the start of each document that are not from the row, as text; "" if none.

        Without a template these are the tokens that the tokenizer puts before any text. A chat
        template adds its own.
        """
        if self._template == "none":
            return "".join(self.tokenizer.convert_ids_to_tokens(self._start))
        start = _document_start(self.tokenizer)
        try:
            first = self._render(list(_PROBE_TURNS[1:2]), "", add_generation_prompt=True)
        except InputError:  # if it refuses the rows too, their errors are reported
            return ""
        bos = self.tokenizer.bos_token_id
        if bos is not None and self._ids([first])[0][:1] == [bos]:
            return self.tokenizer.bos_token
        if not start:
            return ""
        missing = "".join(self.tokenizer.convert_ids_to_tokens(start))
        return f"no {missing}: the chat template writes none"

    def with_start(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Put the tokenizer's start-of-document ids before those of a prompt, unless present.

        With a chat template the ids are unchanged: the template contains the start itself.
        """
        if tuple(ids[: len(self._start)]) == tuple(self._start):
            return tuple(ids)
        return (*self._start, *ids)

    def encode(self, traces: Sequence[Trace], texts: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Token ids of each trace.

        Args:
            traces: the traces; used for their end and for messages.
            texts: their prompts and completions, as `texts` returns them.

        Raises:
            InputError: one line for each trace whose prompt or completion has no token in this
                vocabulary.
        """
        # Traces of one problem share the prompt, which is tokenized once.
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
        """Number of characters, without white space, that decoding the tokens does not return.

        A tokenizer without a token for unknown text drops characters outside its vocabulary.
        """
        spelled = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return max(0, len("".join(text.split())) - len("".join(spelled.split())))

    def control_tokens(self, trace: Trace) -> Counter[str]:
        """Control tokens in the text of a trace, except an end-of-sequence token at its end.

        They are trained as structure, such as an end of turn, not as the intended text.
        """
        return Counter(self._control.findall(trace.completion.rstrip().removesuffix(self._eos)))

    def texts(self, traces: Sequence[Trace]) -> list[tuple[str, str]]:
        """The prompt and completion of each trace, with the text that the template adds.

        Args:
            traces: traces of one row; a shared prompt is rendered once.

        Raises:
            InputError: the row cannot be rendered. Names the row.
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
        """The input of generation: the prompt with the template's generation prompt.

        Args:
            prompt: messages or plain text.
            where: the row of the prompt, for messages.
        """
        if self._template == "none":
            return _plain_prompt(prompt, where)
        return self._render(self._messages(prompt), where, add_generation_prompt=True)

    def _frame(
        self, prompt: tuple[Message, ...] | str, rendered: str, where: str
    ) -> tuple[str, str]:
        """The text that the template puts around an answer: after the generation prompt, and last.

        An opened or empty thought that the template puts before the answer is removed, as it is not
        part of the trace.
        """
        probe = self._render(_answered(self._messages(prompt), _PROBE), where)
        before, found, end_of_turn = probe.rpartition(_PROBE)
        if not found:
            raise InputError(f"{where}: the chat template does not show the assistant's message")
        # Some generation prompts contain text that the full conversation lacks.
        header = before.removeprefix(rendered) if before.startswith(rendered) else ""
        return _OPENED_TAG.sub("", _EMPTY_BLOCK.sub("", header)), end_of_turn

    def _chat_texts(self, prompt: str, frame: tuple[str, str], trace: Trace) -> tuple[str, str]:
        """The generation prompt, and the unchanged trace between the two texts of `_frame`.

        The trace must be learned exactly, so it is not rendered by the template: templates rewrite
        answers (remove reasoning, add an empty thought, strip white space).
        """
        header, end_of_turn = frame
        closed = _EMPTY_BLOCK.search(prompt)
        if closed and trace.completion.lstrip().startswith(f"<{closed[1]}>"):
            raise InputError(
                f"{trace.where}: the trace begins with <{closed[1]}>, but the chat template's "
                f"generation prompt has already closed it ({closed[0].strip()!r}): use a template "
                "whose generation prompt has no thought, or remove the thought from the trace"
            )
        completion = _without_opened_tag(prompt, trace.completion)
        return prompt, header + completion + (end_of_turn if is_finished(trace) else "")

    def _render(self, messages: list[dict[str, str]], where: str, **options: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template may raise any error
            problem = " ".join(str(error).split())
            raise InputError(f"{where}: the chat template refuses the row: {problem}") from error

    def _messages(self, prompt: tuple[Message, ...] | str) -> list[dict[str, str]]:
        """The prompt as input of a template, with the system prompt unless it has one."""
        messages = as_messages(prompt)
        if self._system_prompt is not None and not any(m.role == "system" for m in messages):
            messages = (Message("system", self._system_prompt), *messages)
        return [{"role": m.role, "content": m.content} for m in messages]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # transformers cannot tokenize an empty batch
            return []
        # verbose=False: no warning about sequences beyond the tokenizer's nominal maximum.
        batch = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return batch["input_ids"]


def load_tokenizer(path: str) -> Any:
    """Load the fast tokenizer in a folder or on the hub.

    Raises:
        InputError: there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer  # imported late: reading a cache does not need it

    if not (Path(path).is_dir() or is_hub_name(path)):
        raise InputError(f"{path}: no such folder with a tokenizer, {NO_HUB_NAME}")
    try:
        with asking_the_hub():
            tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise many types
        problem = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: no tokenizer can be loaded: {problem}") from error
    if not tokenizer.is_fast:
        raise InputError(f"{path}: a fast tokenizer is needed (a folder with tokenizer.json)")
    if tokenizer.eos_token is None:
        raise InputError(f"{path}: the tokenizer has no eos_token: the end could not be trained")
    return tokenizer


def is_volatile(fingerprint: str) -> bool:
    """True if the chat template of this `Encoder.fingerprint` may render the same conversation
    differently from one day to the next."""
    return fingerprint.endswith(_VOLATILE_MARK)


def is_finished(trace: Trace) -> bool:
    """True if the trace has an end to be trained.

    The column `finished` decides. Without it, a trace is unfinished if it begins with a thought
    that is never closed.
    """
    if trace.finished is not None:
        return trace.finished
    thought = _THOUGHT.match(trace.completion)
    return thought is None or f"</{thought[1]}>" in trace.completion


def _document_start(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before any text, usually BOS."""
    # Text of every kind: a vocabulary of digits only has no token for words.
    bare = tokenizer(_ANY_TEXT, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_ANY_TEXT, add_special_tokens=True)["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return list(whole[:place])
    return []


def _control_tokens(tokenizer: Any) -> list[str]:
    """The tokenizer's special tokens, longest first; in most, reasoning tags are not special."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted((token.content for token in added if token.special), key=len, reverse=True)


def _answered(messages: list[dict[str, str]], answer: str) -> list[dict[str, str]]:
    return [*messages, {"role": "assistant", "content": answer}]


def _without_opened_tag(prompt: str, completion: str) -> str:
    """Remove the completion's opening tag if the generation prompt already contains it.

    The generation prompts of reasoning models end with "<think>" and a newline, with which the
    traces of teachers begin.
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
