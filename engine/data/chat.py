"""Renders prompts and answers with a tokenizer's chat template.

A template decides how a prompt looks; an answer is trained as it is, between the texts that the
template puts around it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from redi.engine.data.messages import (
    THOUGHT_KEYS,
    THOUGHT_OPENED,
    Message,
    as_messages,
    with_thought,
)
from redi.engine.data.spans import Placement, Span, place_spans
from redi.engine.data.traces import Trace
from redi.engine.errors import FaultyRow, InputError

_PROBE, _THOUGHT_PROBE = "redi probe message", "redi probe thought"
_PROBE_TOOL = "redi_probe_tool"
_OPENED_TAG = re.compile(r"<[^<>/|｜\s]+>\s*$")
_EMPTY_BLOCK = re.compile(r"<([^<>/|｜\s]+)>\s*</\1>\s*$")
_QUESTION = {"role": "user", "content": "What is 2 + 2?"}
_PROBE_TURNS = (
    {"role": "system", "content": "Be brief."},
    _QUESTION,
    {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
    {"role": "user", "content": "And 3 + 3?"},
)
# Set by what is rendered.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "tokenize", "conversation")
_NO_PLACE = "use a tokenizer whose chat template has one, or leave such rows out"


class Texts(NamedTuple):
    """A trace as it is tokenized."""

    prompt: str
    completion: str
    spans: tuple[Span, ...] = ()
    """Weights of parts of the completion, in its characters."""
    at: Placement | None = None
    """Where the completion has the trace; None if the template has rewritten it (tool calls)."""


class ChatTemplate:
    """The chat template of a tokenizer, with the system prompt and variables of a recipe."""

    def __init__(
        self, tokenizer: Any, system_prompt: str | None, variables: Mapping[str, Any]
    ) -> None:
        """Check the variables.

        Raises:
            InputError: the template does not read a variable.
        """
        source = json.dumps(tokenizer.chat_template)
        for name in variables:
            if name in _RESERVED:
                raise InputError(
                    f"[data] template_variables: {name!r} is set from the rows; remove it"
                )
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise InputError(
                    f"[data] template_variables: the chat template has no variable {name!r}"
                )
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._variables = dict(variables)

    def samples(self) -> tuple[str, str]:
        """A question alone and a conversation, rendered now; a refusal instead, if it refuses."""
        rendered = []
        for turns in ([_QUESTION], list(_PROBE_TURNS)):
            try:
                rendered.append(self._render(turns, "", add_generation_prompt=True))
            except FaultyRow as error:  # some templates refuse system messages
                rendered.append(str(error))
        return rendered[0], rendered[1]

    def question(self) -> str:
        """A question alone, rendered as a prompt.

        Raises:
            FaultyRow: the template refuses it.
        """
        return self._render([_QUESTION], "", add_generation_prompt=True)

    def prompt(self, prompt: tuple[Message, ...] | str, where: str, tools: str = "") -> str:
        """The input of generation: the prompt with the template's generation prompt.

        Args:
            prompt: messages or plain text.
            where: the row of the prompt, for messages.
            tools: JSON text of the tools that it offers; empty: none.

        Raises:
            FaultyRow: the row cannot be rendered.
        """
        return self._render(self._messages(prompt, where), where, tools, add_generation_prompt=True)

    def texts(self, traces: Sequence[Trace]) -> list[Texts]:
        """The prompt and completion of each trace, with the text that the template adds.

        Args:
            traces: traces of one row; a shared prompt is rendered once.

        Raises:
            FaultyRow: the row cannot be rendered.
        """
        prompts: dict[Any, str] = {}
        frames: dict[Any, tuple[str, str, str]] = {}
        found = []
        for trace in traces:
            key = trace.prompt, trace.tools
            if key not in prompts:
                prompts[key] = self.prompt(trace.prompt, trace.where, trace.tools)
            prompt = prompts[key]
            if trace.calls:
                found.append(Texts(prompt, self._called(prompt, trace)))
                continue
            frame = (*key, bool(trace.thought))
            if frame not in frames:
                frames[frame] = self._frame(prompt, trace)
            found.append(_framed(prompt, frames[frame], trace))
        return found

    def _frame(self, prompt: str, trace: Trace) -> tuple[str, str, str]:
        """The texts of the template: before an answer, after its thought, and after the answer.

        The text after the thought is "" if the trace has none of its own, or if the template has no
        place for it: then the thought is part of the answer. An opened or empty thought that the
        template puts before such an answer is removed, as it is not part of the trace.
        """
        messages = self._messages(trace.prompt, trace.where)
        if trace.thought and self._thought_key:
            answer = Message("assistant", _PROBE, _THOUGHT_PROBE)
            probe = self._render(
                [*messages, self._message(answer, trace.where)], trace.where, trace.tools
            )
            before, answered, end_of_turn = probe.rpartition(_PROBE)
            header, thought, between = before.rpartition(_THOUGHT_PROBE)
            if answered and thought and between and header.startswith(prompt):
                return header.removeprefix(prompt), between, end_of_turn
        plain = {"role": "assistant", "content": _PROBE}
        probe = self._render([*messages, plain], trace.where, trace.tools)
        before, found, end_of_turn = probe.rpartition(_PROBE)
        if not found:
            raise FaultyRow(
                f"{trace.where}: the chat template does not show the assistant's message"
            )
        # Some generation prompts contain text that the full conversation lacks.
        header = before.removeprefix(prompt) if before.startswith(prompt) else ""
        return _OPENED_TAG.sub("", _EMPTY_BLOCK.sub("", header)), "", end_of_turn

    def _called(self, prompt: str, trace: Trace) -> str:
        """The completion of a trace that ends with tool calls, as the template writes it."""
        self._check_calls(trace.where)
        answer = Message("assistant", trace.content, trace.thought, trace.calls)
        messages = [*self._messages(trace.prompt, trace.where), self._message(answer, trace.where)]
        whole = self._render(messages, trace.where, trace.tools)
        if not whole.startswith(prompt):
            raise FaultyRow(
                f"{trace.where}: the chat template does not continue its generation prompt with "
                f"the tool call; {_NO_PLACE}"
            )
        return whole.removeprefix(prompt)

    def _messages(self, prompt: tuple[Message, ...] | str, where: str) -> list[dict[str, Any]]:
        """The prompt as input of a template, with the system prompt unless it has one."""
        messages = as_messages(prompt)
        if self._system_prompt is not None and not any(m.role == "system" for m in messages):
            messages = (Message("system", self._system_prompt), *messages)
        return [self._message(message, where) for message in messages]

    def _message(self, message: Message, where: str) -> dict[str, Any]:
        found: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.extra:
            found |= json.loads(message.extra)
        if message.calls:
            self._check_calls(where)
            found["tool_calls"] = _calls(message.calls, as_text=self._calls_as_text is True)
        if message.thought and self._thought_key:
            found[self._thought_key] = message.thought
        elif message.thought:
            found["content"] = with_thought(message.thought, message.content)
        return found

    def _check_calls(self, where: str) -> None:
        if self._calls_as_text is None:
            raise FaultyRow(f"{where}: the chat template has no place for tool calls; {_NO_PLACE}")

    @cached_property
    def _thought_key(self) -> str | None:
        """The key of a message in which the template reads a thought; None if in none."""
        for key in THOUGHT_KEYS:
            message = {"role": "assistant", "content": _PROBE, key: _THOUGHT_PROBE}
            try:
                if _THOUGHT_PROBE in self._render([_QUESTION, message], ""):
                    return key
            except FaultyRow:
                continue
        return None

    @cached_property
    def _calls_as_text(self) -> bool | None:
        """Whether the template needs a call's arguments as JSON text; None: it shows no calls."""
        function = {"name": _PROBE_TOOL, "arguments": {"a": 1}}
        calls = json.dumps([{"type": "function", "id": "a1b2c3d4e", "function": function}])
        for as_text in (False, True):
            call = {"role": "assistant", "content": "", "tool_calls": _calls(calls, as_text)}
            try:
                return as_text if _PROBE_TOOL in self._render([_QUESTION, call], "") else None
            except FaultyRow:
                continue
        return None

    @cached_property
    def _shows_tools(self) -> bool:
        function = {
            "name": _PROBE_TOOL,
            "description": "a tool",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        }
        tools = [{"type": "function", "function": function}]
        try:
            return _PROBE_TOOL in self._rendered([_QUESTION], "", tools=tools)
        except FaultyRow:
            return False

    def _render(
        self, messages: list[dict[str, Any]], where: str, tools: str = "", **options: bool
    ) -> str:
        if not tools:
            return self._rendered(messages, where, **options)
        if not self._shows_tools:
            raise FaultyRow(
                f"{where}: column 'tools' has tools, but the chat template has no place for them; "
                f"{_NO_PLACE}"
            )
        return self._rendered(messages, where, tools=json.loads(tools), **options)

    def _rendered(self, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
        options |= self._variables
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template may raise any error
            problem = " ".join(str(error).split())
            raise FaultyRow(f"{where}: the chat template refuses the row: {problem}") from error


def _calls(calls: str, as_text: bool) -> list[dict[str, Any]]:
    """Tool calls as a template reads them."""
    found = json.loads(calls)
    if as_text:
        for call in found:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return found


def _framed(prompt: str, frame: tuple[str, str, str], trace: Trace) -> Texts:
    """The prompt, and the completion: the unchanged trace between the texts of the template.

    The trace must be learned exactly, so it is not rendered by the template: templates rewrite
    answers (remove reasoning, add an empty thought, strip white space).
    """
    header, after_thought, end_of_turn = frame
    if after_thought:
        completion = trace.thought + after_thought + trace.content
        thought, content = 0, len(trace.thought + after_thought)
    else:
        closed = _EMPTY_BLOCK.search(prompt)
        if closed and trace.completion.lstrip().startswith(f"<{closed[1]}>"):
            raise FaultyRow(
                f"{trace.where}: the trace begins with <{closed[1]}>, but the chat template's "
                f"generation prompt has already closed it ({closed[0].strip()!r}): use a template "
                "whose generation prompt has no thought, or remove the thought from the trace"
            )
        completion = _without_opened_tag(prompt, trace.completion)
        removed = len(trace.completion) - len(completion)
        thought = len(THOUGHT_OPENED) - removed
        content = len(with_thought(trace.thought, "")) - removed
    whole = header + completion + (end_of_turn if is_finished(trace) else "")
    at = Placement(len(header) + thought, len(header) + content)
    spans = place_spans(trace.spans, trace.thought, trace.content, at, len(whole))
    return Texts(prompt, whole, spans, at)


_THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>")


def is_finished(trace: Trace) -> bool:
    """True if the trace has an end to be trained.

    The column `finished` decides. Without it, a trace is unfinished if it begins with a thought
    that is never closed.
    """
    if trace.finished is not None:
        return trace.finished
    thought = _THOUGHT.match(trace.completion)
    return thought is None or f"</{thought[1]}>" in trace.completion


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
