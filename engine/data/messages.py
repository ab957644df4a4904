"""Reads chat messages as users have them.

Messages have `role` and `content` (OpenAI) or `from` and `value` (ShareGPT). The content is text or
a list of text parts. An assistant message may have its thought in a key of its own, and tool calls.
"""

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

from redi.engine.data.row import Row, is_blank, read_json, read_text, row_error, type_name

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of the thought of an assistant message, in a message or in a row."""

THOUGHT_OPENED = "<think>\n"
"""What `with_thought` writes before a thought."""

# Names of roles in ShareGPT rows.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool"), "tool"),
    "function_call": "function_call",
}
DISTRIBUTION_COLUMNS = ("prompt_logprobs", "logprobs", "target_token_ids")
"""Columns with a teacher's distributions of an answer's tokens; see `redi.engine.distill.columns`.
"""
TOOL_KEYS = ("tool_call_id", "name")
"""Keys of a tool's message that templates read."""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: str
    content: str
    thought: str = ""
    """The thought of an assistant message, if it is not part of the content."""
    calls: str = ""
    """The tool calls of an assistant message, as the JSON text of a list."""
    extra: str = ""
    """Other keys that templates read, as the JSON text of an object."""
    thought_margins: tuple[int, int] = field(default=(0, 0), repr=False, compare=False)
    """Newlines that were removed before and after the thought."""
    spans: tuple[str, Any] | None = field(default=None, repr=False, compare=False)
    """Column and value of the answer's spans, unchecked; see `read_spans`. They are no part of a
    prompt, so messages that differ in them alone are equal."""
    distributions: tuple[str, dict[str, Any]] | None = field(
        default=None, repr=False, compare=False
    )
    """Prefix of the columns and the unchecked values of DISTRIBUTION_COLUMNS; likewise."""

    def __repr__(self) -> str:
        # Evaluations identify their problems by it: a plain message looks as it always has.
        values = ((one.name, getattr(self, one.name)) for one in fields(self) if one.repr)
        shown = [f"{name}={v!r}" for name, v in values if v or name in ("role", "content")]
        return f"Message({', '.join(shown)})"


def as_messages(prompt: tuple[Message, ...] | str) -> tuple[Message, ...]:
    """The prompt as messages: plain text is one user message."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def with_thought(thought: str, answer: str) -> str:
    """An answer after its thought, as most reasoning models write it."""
    return f"{THOUGHT_OPENED}{thought}\n</think>\n\n{answer}" if thought else answer


def read_prompt(row: Row, column: str) -> tuple[Message, ...] | str:
    """The prompt in a column: plain text, or messages that do not end with the assistant's.

    Raises:
        FaultyRow: it is not a prompt. Names row and column.
    """
    value = row.value[column]
    if isinstance(value, str):
        return read_text(row, column, value)
    if not isinstance(value, list):
        raise row_error(row, column, f"must be text or a list of messages, not {type_name(value)}")
    prompt = read_messages(row, column, value)
    check_prompt(row, column, prompt)
    return prompt


def check_prompt(row: Row, column: str, prompt: tuple[Message, ...]) -> None:
    """Raise FaultyRow unless the messages have one of the user and end before the assistant's."""
    if not any(message.role == "user" for message in prompt):
        raise row_error(row, column, "has an empty prompt: no user message before the completion")
    if prompt[-1].role == "assistant":
        raise row_error(row, column, "has a prompt that ends with an assistant message")


def read_messages(row: Row, column: str, value: object) -> tuple[Message, ...]:
    """The messages in a column: a list, one message, or the JSON text of either.

    Raises:
        FaultyRow: a message is invalid. Names row, column and message.
    """
    value = read_json(row, column, value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise row_error(row, column, "must be a list of at least one message")
    return tuple(_message(row, f"{column}[{n}]", message) for n, message in enumerate(value))


def _message(row: Row, name: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise row_error(row, name, "must be an object with role and content")
    keys = ("role", "content") if message.get("role") is not None else ("from", "value")
    if keys[0] == "from" and message.get("from") is None:
        raise row_error(row, name, "must be an object with role and content (or from and value)")
    role = read_text(row, f"{name}.{keys[0]}", message[keys[0]])
    if keys[0] == "from":
        role = _ROLES.get(role.lower(), role.lower())
    calls = message.get("tool_calls") or ()
    if message.get("function_call"):  # OpenAI's older form
        calls = [message["function_call"]]
    if role == "function_call":
        role, calls, content = "assistant", [message[keys[1]]], ""
    else:
        if keys[1] not in message and not calls:
            raise row_error(row, name, f"has no {keys[1]}")
        # An empty system message turns off a template's default one; a tool may return nothing.
        empty = bool(calls) or role in ("system", "tool")
        content = _content(row, f"{name}.{keys[1]}", message.get(keys[1]), empty)
    named = TOOL_KEYS if role == "tool" else ()
    extra = {key: message[key] for key in named if message.get(key)}
    found = Message(
        role,
        content,
        calls=_calls(row, f"{name}.tool_calls", calls) if calls else "",
        extra=json.dumps(extra) if extra else "",
    )
    return add_keys(row, found, message, f"{name}.")


def add_keys(row: Row, message: Message, keys: dict[str, Any], place: str = "") -> Message:
    """The message with what further keys have of it: its thought, spans and distributions.

    Args:
        row: the row, for messages.
        message: an assistant message. Its content may begin with the same thought.
        keys: the message as it was read, its entry of `traces`, or its row.
        place: prefix of a key, for messages, such as "messages[1].".

    Raises:
        FaultyRow: the thought is no text, there are two different ones, the message has spans
            already, or its role has neither.
    """
    found = {name: keys[name] for name in DISTRIBUTION_COLUMNS if keys.get(name) is not None}
    if found and found.keys() != {"target_token_ids"}:
        message = replace(message, distributions=(place, found))
    return _add_thought(row, add_spans(row, message, keys, place), keys, place)


def add_spans(row: Row, message: Message, keys: dict[str, Any], place: str = "") -> Message:
    """`add_keys` for spans alone."""
    value, name = keys.get("spans"), f"{place}spans"
    if value is None or value in ("", []):
        return message
    if message.role != "assistant":
        raise row_error(row, name, f"is for answers, not for a message of the role {message.role}")
    if message.spans is not None:
        raise row_error(row, name, f"and {message.spans[0]!r} are of one answer; remove one")
    return replace(message, spans=(name, value))


def _add_thought(row: Row, message: Message, keys: dict[str, Any], place: str) -> Message:
    """Add the thought that is under one of THOUGHT_KEYS, unless the message has one."""
    found = {key: keys[key] for key in THOUGHT_KEYS if keys.get(key) not in (None, "")}
    if message.thought or not found:
        return message
    texts = [read_text(row, f"{place}{key}", value, empty=True) for key, value in found.items()]
    name = f"{place}{next(iter(found))}"
    if len(set(texts)) > 1:
        raise row_error(row, name, f"differs from {list(found)[1]}; remove one of them")
    thought = "" if is_blank(texts[0]) else texts[0].strip("\n")
    if thought and message.role != "assistant":
        raise row_error(row, name, f"is the thought of a message of the role {message.role}")
    if thought and message.content.lstrip().startswith("<think>"):
        if thought.strip() not in message.content:
            raise row_error(row, name, "differs from the thought in the content: remove one")
        return message
    before = len(texts[0]) - len(texts[0].lstrip("\n"))
    margins = (before, len(texts[0]) - before - len(thought)) if thought else (0, 0)
    return replace(message, thought=thought, thought_margins=margins)


def _content(row: Row, name: str, value: object, empty: bool) -> str:
    """The text of a message; a list of text parts is joined."""
    if empty and value is None:
        return ""
    if not isinstance(value, list):
        return read_text(row, name, value, empty=empty)
    texts = []
    for number, part in enumerate(value):
        place = f"{name}[{number}]"
        if isinstance(part, dict) and (part.get("type") or "text") != "text":
            raise row_error(row, place, f"is of type {part['type']!r}; only text is read")
        text = part.get("text") if isinstance(part, dict) else part
        texts.append(read_text(row, place, text, empty=True))
    return read_text(row, name, "".join(texts), empty=empty)


def _calls(row: Row, name: str, value: object) -> str:
    """Tool calls in the form of chat templates, whose arguments are objects, not JSON text."""
    calls = read_json(row, name, value)
    if not isinstance(calls, list | tuple):
        raise row_error(row, name, "must be a list of calls")
    found = []
    for number, call in enumerate(calls):
        place = f"{name}[{number}]"
        call = without_nulls(read_json(row, place, call))
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise row_error(row, place, "must be an object with the name of a function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and arguments.strip():
            arguments = read_json(row, f"{place}.arguments", arguments)
        rest = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": function["name"], "arguments": arguments or {}}
        found.append({"type": "function", **rest, "function": function})
    return json.dumps(found)


def read_tools(row: Row) -> str:
    """The column `tools` as the JSON text of a list; empty if the row has none."""
    tools = read_json(row, "tools", row.value.get("tools") or None)
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise row_error(row, "tools", "must be a list of tools, each an object, or its JSON text")
    return json.dumps([without_nulls(tool) for tool in tools])


def without_nulls(value: Any) -> Any:
    """The value without keys that are null: Parquet gives each object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value
