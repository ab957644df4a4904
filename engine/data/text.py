"""Converts a trace to token ids: chat template, end of sequence, tokenizer.

Prompt and completion are tokenized separately. Tokenized together, the last characters of the
prompt could merge with the first of the completion, which never happens in generation.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from redi.engine.data.chat import ChatTemplate, Texts, is_finished
from redi.engine.data.messages import Message, as_messages
from redi.engine.data.row import MAX_ROW_MB
from redi.engine.data.spans import place_spans, placed_by_tags, places_in_trace, token_weights
from redi.engine.data.traces import Trace
from redi.engine.errors import FaultyRow, InputError
from redi.engine.hub import NO_HUB_NAME, is_hub_name, quiet_hub_client

TEMPLATES = ("chat", "none")
# Text that a byte-level vocabulary represents, but one of a few characters or words does not.
_ANY_TEXT = "aZ09 +-=*/(){}<>\\$%é≠中☃\U0001f600"
# Templates with a date or random words render differently from one call to the next.
_VOLATILE = re.compile(r"\b(?:strftime_now|random|lipsum)\b")
_VOLATILE_MARK = "-volatile"


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
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking."""
    train_on: str = "last"
    """The assistant turns of a conversation that become traces: "last" or "all"."""
    where: str | None = None
    """Expression that selects traces; see `Where`."""
    control_tokens: str = "allow"
    """"error": refuse traces whose text contains a control token of the tokenizer. Does not change
    the ids."""
    faulty: str = "error"
    """"skip": leave faulty rows out. Does not change the ids of the others."""
    max_row_mb: int = MAX_ROW_MB
    """Longest text of a row; a longer row is faulty."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one trace."""

    ids: np.ndarray
    """int32 [length]: the prompt, then the completion with its end."""
    prompt_length: int
    """0: a document, which has no prompt."""
    unknown: int
    """Number of unknown tokens, and of characters that the tokenizer drops."""
    weights: np.ndarray | None = None
    """float32 [length - prompt_length]: weights of the completion's tokens; None: all are 1."""
    split: tuple[str, ...] = ()
    """The text of each token that the edge of a span splits."""


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
        self._chat = None
        if settings.template == "chat":
            self._chat = ChatTemplate(
                self.tokenizer, settings.system_prompt, settings.template_variables
            )
        self._document_start = _document_start(self.tokenizer)
        self._start = [] if self._chat else self._document_start

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
        return "\n".join(self._chat.samples()) if self._chat else ""

    def document_start(self, texts_alone: bool = False) -> str:
        """The tokens at the start of each document that are not from the row, as text; "" if none.

        Without a template these are the tokens that the tokenizer puts before any text. A chat
        template adds its own.

        Args:
            texts_alone: whether all rows are texts without a prompt, which need no template.
        """
        if self._chat is None or texts_alone:
            return "".join(self.tokenizer.convert_ids_to_tokens(self._document_start))
        start = self._document_start
        try:
            first = self._chat.question()
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
        return tuple(_started(self._start, ids))

    def encode(self, traces: Sequence[Trace], texts: Sequence[Texts]) -> list[Encoded]:
        """Token ids of each trace, and their weights.

        Args:
            traces: the traces; used for their end and for messages.
            texts: what `texts` returns for them.

        Raises:
            FaultyRow: one line for each trace whose prompt or completion has no token in this
                vocabulary.
        """
        # Traces of one problem share the prompt, which is tokenized once.
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(one.prompt for one in texts))}
        prompt_ids = self._ids(list(prompts))
        completions = self._tokenized([one.completion for one in texts])
        encoded = []
        faults = []
        for index, (trace, text) in enumerate(zip(traces, texts, strict=True)):
            prompt, completion, spans, _ = text
            start = prompt_ids[prompts[prompt]]
            end = completions["input_ids"][index]
            if not end or not (start or trace.document):
                what = "completion" if start else "prompt"
                faults.append(f"{trace.where}: the {what} has no token in this vocabulary")
                continue
            weights: np.ndarray | None = None
            split: list[str] = []
            if spans:
                offsets = completions.encodings[index].offsets
                weights, split = token_weights(completion, spans, offsets)
            if self._adds_end(trace, completion):
                end = [*end, self._eos_id]
                if weights is not None:
                    weights = np.append(weights, weights[-1])
            unknown = 0 if self._unknown_id is None else [*start, *end].count(self._unknown_id)
            if not self._spells_all:
                unknown += self._lost(prompt + completion, [*start, *end])
            whole: tuple[int, ...] = ()
            if trace.document:
                started = _started(self._document_start, end)
                if weights is not None:
                    added = np.ones(len(started) - len(end), np.float32)
                    weights = np.concatenate([added, weights])
                end = started
            else:
                whole = self.with_start(start)
            ids = np.array([*whole, *end], dtype=np.int32)
            if weights is not None and np.all(weights == 1):
                weights = None
            encoded.append(Encoded(ids, len(whole), unknown, weights, tuple(split)))
        if faults:
            raise FaultyRow("\n".join(dict.fromkeys(faults)))
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

    def texts(self, traces: Sequence[Trace]) -> list[Texts]:
        """The prompt and completion of each trace, with the text that the template adds.

        Args:
            traces: traces of one row; a shared prompt is rendered once.

        Raises:
            FaultyRow: the row cannot be rendered.
        """
        if any(trace.document for trace in traces):
            return [_without_template("", trace) for trace in traces]
        if self._chat is not None:
            return self._chat.texts(traces)
        for trace in traces:
            if trace.tools or trace.calls:
                what = "tools and tool calls need a chat template"
                raise FaultyRow(f'{trace.where}: {what}: choose template "chat"')
        return [_without_template(_plain_prompt(t.prompt, t.where), t) for t in traces]

    def prompt_text(self, prompt: tuple[Message, ...] | str, where: str) -> str:
        """The input of generation: the prompt with the template's generation prompt.

        Args:
            prompt: messages or plain text.
            where: the row of the prompt, for messages.
        """
        if self._chat is None:
            return _plain_prompt(prompt, where)
        return self._chat.prompt(prompt, where)

    def offsets(self, traces: Sequence[Trace], texts: Sequence[Texts]) -> list[np.ndarray | None]:
        """Where each token of a completion is in its trace.

        Args:
            traces: traces with a prompt.
            texts: what `texts` returns for them.

        Returns:
            For each trace int32 [2, tokens]: where a token starts and ends, in characters of the
            separate thought, if there is one, followed by the content. Tokens of the template are
            empty. None for a trace whose text the template has rewritten.
        """
        completions = self._tokenized([one.completion for one in texts])
        found: list[np.ndarray | None] = []
        for index, (trace, text) in enumerate(zip(traces, texts, strict=True)):
            if text.at is None:
                found.append(None)
                continue
            offsets = list(completions.encodings[index].offsets)
            if self._adds_end(trace, text.completion):
                offsets.append((len(text.completion), len(text.completion)))
            places = np.array(offsets, dtype=np.int64).T
            found.append(places_in_trace(places, trace.thought, trace.content, text.at))
        return found

    def _adds_end(self, trace: Trace, completion: str) -> bool:
        """Whether `encode` adds an end to a completion."""
        return is_finished(trace) and not completion.rstrip().endswith(self._eos)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenized(texts)["input_ids"]

    def _tokenized(self, texts: list[str]) -> Any:
        """The tokenizer's own result: `input_ids` of each text, and its `encodings`."""
        if not texts:  # transformers cannot tokenize an empty batch
            return {"input_ids": []}
        # verbose=False: no warning about sequences beyond the tokenizer's nominal maximum.
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )


def load_tokenizer(path: str) -> Any:
    """Load the fast tokenizer in a folder or on the hub.

    Raises:
        InputError: there is none, its maximum length is no number, or it has no end-of-sequence
            token or no others.
    """
    from transformers import AutoTokenizer  # imported late: reading a cache does not need it

    if not (Path(path).is_dir() or is_hub_name(path)):
        raise InputError(f"{path}: no such folder with a tokenizer, {NO_HUB_NAME}")
    try:
        with quiet_hub_client():
            tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise many types
        problem = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: no tokenizer can be loaded: {problem}") from error
    if not tokenizer.is_fast:
        raise InputError(f"{path}: a fast tokenizer is needed (a folder with tokenizer.json)")
    # transformers compares it with the length of each text
    if not isinstance(tokenizer.model_max_length, int | float):
        raise InputError(f"{path}: tokenizer_config.json: model_max_length must be a number")
    if tokenizer.eos_token is None:
        raise InputError(f"{path}: the tokenizer has no eos_token: the end could not be trained")
    if tokenizer.get_vocab().keys() <= set(_control_tokens(tokenizer)):
        raise InputError(f"{path}: tokenizer.json has no vocabulary, only special tokens")
    return tokenizer


def is_volatile(fingerprint: str) -> bool:
    """True if the chat template of this `Encoder.fingerprint` may render the same conversation
    differently from one day to the next."""
    return fingerprint.endswith(_VOLATILE_MARK)


def _started(start: list[int], ids: Sequence[int]) -> list[int]:
    return list(ids) if list(ids[: len(start)]) == start else [*start, *ids]


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


def _without_template(prompt: str, trace: Trace) -> Texts:
    length = len(trace.completion)
    at = placed_by_tags(trace.thought)
    spans = place_spans(trace.spans, trace.thought, trace.content, at, length)
    return Texts(prompt, trace.completion, spans, at)


def _plain_prompt(prompt: tuple[Message, ...] | str, where: str) -> str:
    messages = as_messages(prompt)
    if len(messages) != 1 or messages[0].role != "user":
        raise FaultyRow(
            f'{where}: a prompt of several messages needs a chat template: choose template "chat"'
        )
    return messages[0].content
