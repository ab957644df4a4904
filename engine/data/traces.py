"""Converts a raw row of any format to traces: prompt, completion and sign.

`FORMATS` is the table of row formats: the columns of each, and the function that reads it.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from redi.engine.data.messages import (
    THOUGHT_KEYS,
    Message,
    add_keys,
    add_spans,
    as_messages,
    check_prompt,
    read_messages,
    read_prompt,
    read_tools,
    with_thought,
)
from redi.engine.data.openr1_rows import read_openr1
from redi.engine.data.row import (
    Row,
    is_blank,
    read_id,
    read_sign,
    read_text,
    read_weight,
    row_error,
    type_name,
)
from redi.engine.data.spans import Span, read_spans
from redi.engine.data.verdicts import read_label
from redi.engine.errors import InputError, one_line


@dataclass(frozen=True, slots=True)
class Trace:
    """A teacher's answer to a problem, with its verdict."""

    prompt: tuple[Message, ...] | str
    """The messages before the answer, or plain text."""
    completion: str
    """The answer; a thought that the row has separately is written before it (`with_thought`)."""
    sign: int
    """+1 for a correct (chosen) trace, -1 for an incorrect (rejected) one."""
    group: str
    """The problem of the trace. Pairs are formed only within a group."""
    weight: float
    teacher: str | None
    origin: str | None
    """The row's column source, if it is text: the collection that the problem comes from."""
    where: str
    """The place of the row, for messages: "file.jsonl:12"."""
    finished: bool | None = None
    """False: the trace was cut off, so its end is not trained. None: not specified."""
    thought: str = ""
    """The thought with which the completion begins, if the row has it separately."""
    calls: str = ""
    """Tool calls that follow the completion, as the JSON text of a list."""
    tools: str = ""
    """The tools that the prompt offers, as the JSON text of a list."""
    document: bool = False
    """A text without a prompt: all of it is trained, in pieces."""
    spans: tuple[Span, ...] = ()
    """Weights of its parts, in characters of the separate thought followed by the rest."""
    distributions: tuple[str, dict[str, Any]] | None = field(
        default=None, repr=False, compare=False
    )
    """A teacher's distributions of its tokens, as the row has them; see `Message`."""

    @property
    def content(self) -> str:
        """The completion without the thought that the row has separately."""
        return self.completion.removeprefix(with_thought(self.thought, ""))


_Reader = Callable[[Row, Counter[str], str], list[Trace]]


@dataclass(frozen=True, slots=True)
class Format:
    """The columns of one row format, and how it is read. A row may have others: ignored."""

    required: tuple[str, ...]
    """The columns by which the format is detected; empty: it is never detected."""
    optional: tuple[str, ...]
    read: _Reader
    """Reads a row: (row, counter of what is left out, `[data] train_on`) -> its traces."""


def resolve_format(format: str, columns: Collection[str], where: str) -> str:
    """The format of a row: `format` itself, or with "auto" the one detected from its columns.

    Args:
        format: a key of `FORMATS`, or "auto".
        columns: the columns of the row.
        where: the row's place, for messages.

    Raises:
        InputError: the name of the format is unknown, or the columns match no format.
    """
    if format in FORMATS:
        return format
    detected = {name: shape for name, shape in FORMATS.items() if shape.required}
    if format != "auto":
        available = ", ".join(detected)
        raise InputError(f"[data] format {format!r} is unknown; available: auto, {available}")
    for name, shape in detected.items():
        if all(column in columns for column in shape.required):
            return name
    small = {column.lower() for column in columns}
    found = one_line(", ".join(columns)) or "none"
    for shape in detected.values():
        if all(column in small for column in shape.required):
            raise InputError(
                f"{where}: the columns ({found}) must be written in lower case: "
                f"{', '.join(shape.required)}"
            )
    known = "; ".join(f"{name} ({', '.join(_usual(shape))})" for name, shape in detected.items())
    raise InputError(f"{where}: the columns ({found}) match no row format; available: {known}")


def _usual(shape: Format) -> list[str]:
    """Columns that most rows of a format have. `prompt` is optional for conversations."""
    return ["prompt"] * ("prompt" in shape.optional) + list(shape.required)


def normalise(
    row: Row,
    format: str = "auto",
    dropped: Counter[str] | None = None,
    train_on: str = "last",
) -> list[Trace]:
    """The traces of one row, in the row's order.

    Args:
        row: a raw row.
        format: a key of `FORMATS`, or "auto": detected from this row's columns.
        dropped: updated with the number of rows and generations that are left out (mostly by the
            paper's filter of OpenR1 rows), by reason.
        train_on: "last" or "all": the assistant turns of a conversation that become traces.

    Raises:
        InputError: a column is missing or has a wrong type, or a prompt or completion is empty.
            Names row and column.
    """
    format = resolve_format(format, row.value.keys(), row.where)
    row = replace(row, format=format)
    for column in FORMATS[format].required:
        if column not in row.value:
            found = ", ".join(row.value) or "none"
            raise row_error(row, column, f"is missing; the row has: {found}")
    return FORMATS[format].read(row, Counter() if dropped is None else dropped, train_on)


def _preference(row: Row, *_: object) -> list[Trace]:
    chosen, rejected = row.value["chosen"], row.value["rejected"]
    for column in ("chosen", "rejected"):
        if not isinstance(row.value[column], str | list | dict):
            kind = type_name(row.value[column])
            raise row_error(row, column, f"must be text or a list of messages, not {kind}")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise row_error(row, "rejected", "must have the type of chosen: text, or messages")
    if isinstance(chosen, str):
        prompt = _prompt_of_pair(row)
        if prompt is None:
            if "\n\nHuman:" in chosen and "\n\nAssistant:" in chosen:
                raise row_error(
                    row,
                    "chosen",
                    "has the whole dialogue as text: cut it and rejected at the last "
                    '"\\n\\nAssistant:" and put the part before into a column prompt',
                )
            raise row_error(row, "prompt", "is missing; plain chosen and rejected need it")
        answers = [
            Message("assistant", read_text(row, column, row.value[column]))
            for column in ("chosen", "rejected")
        ]
    else:
        prompt, answers = _conversational_pair(row)
    prompt = with_system(row, prompt)
    answers = [
        add_spans(row, answer, {"spans": row.value.get(f"{column}_spans")}, f"{column}_")
        for column, answer in zip(("chosen", "rejected"), answers, strict=True)
    ]
    # Without an id each row is a problem, so that its pair stays as the user made it.
    group = _group(row, "id", prompt, default=row.where)
    return [
        _trace(row, prompt, answer, sign, group)
        for answer, sign in zip(answers, (1, -1), strict=True)
    ]


def _prompt_of_pair(row: Row) -> tuple[Message, ...] | str | None:
    """The prompt of a preference row in its own column, which has one of several names."""
    if row.value.get("prompt") is not None:
        return read_prompt(row, "prompt")
    if row.value.get("conversations") is not None:
        prompt = read_messages(row, "conversations", row.value["conversations"])
        check_prompt(row, "conversations", prompt)
        return prompt
    return None if row.value.get("instruction") is None else _instruction(row)


def _conversational_pair(row: Row) -> tuple[tuple[Message, ...] | str, list[Message]]:
    """The prompt and the two answers of a row whose chosen and rejected are messages.

    Both contain only the answer (the prompt is in a separate column) or the whole conversation.
    """
    pair = []
    for column in ("chosen", "rejected"):
        messages = read_messages(row, column, row.value[column])
        if messages[-1].role != "assistant":
            raise row_error(row, column, "must end with an assistant message")
        pair.append(messages)
    chosen, rejected = pair
    if chosen[:-1] != rejected[:-1]:
        raise row_error(row, "rejected", "must differ from chosen in the last message only")
    if len(chosen) == 1:
        prompt = _prompt_of_pair(row)
        if prompt is None:
            raise row_error(row, "prompt", "is missing, and chosen contains only the answer")
        return prompt, [chosen[-1], rejected[-1]]
    own_prompt = read_prompt(row, "prompt") if row.value.get("prompt") is not None else None
    if own_prompt is not None and not _repeats(own_prompt, chosen[:-1]):
        differs = "differs from the prompt that chosen and rejected begin with"
        raise row_error(row, "prompt", differs)
    check_prompt(row, "chosen", chosen[:-1])
    return chosen[:-1], [chosen[-1], rejected[-1]]


def _repeats(prompt: tuple[Message, ...] | str, messages: tuple[Message, ...]) -> bool:
    """True if the prompt column repeats the start of the conversation."""
    if isinstance(prompt, str):
        return any(message.content == prompt for message in messages)
    return prompt == messages


def _prompt_completion(row: Row, *_: object) -> list[Trace]:
    prompt = with_system(row, read_prompt(row, "prompt"))
    completion = row.value["completion"]
    if isinstance(completion, list | dict):
        messages = read_messages(row, "completion", completion)
        if len(messages) != 1 or messages[0].role != "assistant":
            raise row_error(row, "completion", "must be text or a list of one assistant message")
        answer = messages[0]
    else:
        answer = Message("assistant", read_text(row, "completion", completion))
    answer = add_keys(row, answer, row.value)
    return [_trace(row, prompt, answer, read_label(row), _group(row, "id", prompt))]


def _conversation(row: Row, dropped: Counter[str], train_on: str) -> list[Trace]:
    """Messages after the last one of the assistant are ignored."""
    column = FORMATS[row.format].required[0]
    messages = read_messages(row, column, row.value[column])
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        roles = ", ".join(dict.fromkeys(message.role for message in messages))
        raise row_error(
            row, column, f"has no assistant message, and so no completion; its roles are: {roles}"
        )
    return _turns(row, column, messages[: answers[-1] + 1], dropped, train_on)


def _alpaca(row: Row, dropped: Counter[str], train_on: str) -> list[Trace]:
    output = Message("assistant", read_text(row, "output", row.value["output"]))
    prompt = _instruction(row)
    if isinstance(prompt, str) or train_on == "last":
        prompt = with_system(row, prompt)
        answer = add_keys(row, output, row.value)
        return [_trace(row, prompt, answer, read_label(row), _group(row, "id", prompt))]
    return _turns(row, "history", (*prompt, output), dropped, train_on)


def _turns(
    row: Row,
    column: str,
    messages: tuple[Message, ...],
    dropped: Counter[str],
    train_on: str,
) -> list[Trace]:
    """The traces of a conversation that ends with an assistant message.

    With `train_on` "all" each turn of a correct conversation is a trace, whose prompt is what comes
    before it; of an incorrect one only the last, as the verdict is not about earlier ones.
    """
    sign = read_label(row)
    last = len(messages) - 1
    answers = [last]
    if train_on == "all" and sign > 0:
        answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        asked = next((n for n, message in enumerate(messages) if message.role == "user"), 0)
        if greetings := sum(n < asked for n in answers):
            dropped["assistant turn before any user message"] += greetings
        answers = [n for n in answers if n > asked or n == last]
    traces = []
    for index in answers:
        check_prompt(row, column, messages[:index])
        prompt = with_system(row, messages[:index])
        # The columns thought, spans and finished are those of the last answer.
        answer = add_keys(row, messages[index], row.value if index == last else {})
        entry = {} if index == last else {"finished": None}
        traces.append(_trace(row, prompt, answer, sign, _group(row, "id", prompt), entry))
    return traces


def _instruction(row: Row) -> tuple[Message, ...] | str:
    """The prompt of an Alpaca row: instruction and input, after the turns of `history`."""
    given = row.value.get("input")
    texts = [
        read_text(row, "instruction", row.value["instruction"], empty=not is_empty(given)),
        "" if given is None else read_text(row, "input", given, empty=True),
    ]
    prompt = "\n".join(text for text in texts if not is_blank(text))
    if not prompt:
        raise row_error(row, "instruction", "is empty, and so is input")
    history = row.value.get("history")
    if is_empty(history):
        return prompt
    turns = []
    for number, turn in enumerate(history if isinstance(history, list) else [None]):
        if not isinstance(turn, list) or len(turn) != 2:
            raise row_error(row, "history", "must be a list of pairs: a question and its answer")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            turns.append(Message(role, read_text(row, f"history[{number}]", text)))
    return (*turns, Message("user", prompt))


def _document(row: Row, *_: object) -> list[Trace]:
    """A text to continue pre-training on."""
    text = Message("assistant", read_text(row, "text", row.value["text"]))
    text = add_spans(row, text, row.value)
    return [_trace(row, "", text, 1, row.where, document=True)]


def _graded_traces(row: Row, dropped: Counter[str], _: str) -> list[Trace]:
    prompt = with_system(row, read_prompt(row, "prompt"))
    group = _group(row, "id", prompt)
    entries = row.value["traces"]
    if not isinstance(entries, list) or not entries:
        raise row_error(row, "traces", "must be a list of at least one trace")
    traces = []
    for index, entry in enumerate(entries):
        column = f"traces[{index}]"
        if not isinstance(entry, dict) or not {"text", "correct"} <= entry.keys():
            raise row_error(row, column, "must be an object with text and correct")
        sign = read_sign(row, f"{column}.correct", entry["correct"])
        # A model that stops at once has answered incorrectly and leaves nothing to train.
        if sign < 0 and isinstance(entry["text"], str) and is_blank(entry["text"]):
            dropped["empty incorrect trace"] += 1
            continue
        answer = Message("assistant", read_text(row, f"{column}.text", entry["text"]))
        answer = add_keys(row, answer, entry, f"{column}.")
        traces.append(_trace(row, prompt, answer, sign, group, entry))
    return traces


def _openr1(row: Row, dropped: Counter[str], _: str) -> list[Trace]:
    """A generation is correct if both verifiers accept it."""
    generations = read_openr1(row, dropped)
    if not generations:
        return []
    prompt = read_prompt(row, "problem")
    group = _group(row, "uuid" if row.value.get("uuid") is not None else "id", prompt)
    return [
        _trace(
            row,
            prompt,
            Message("assistant", one.text),
            1 if one.llama and one.math_verify else -1,
            group,
        )
        for one in generations
    ]


COMMON_COLUMNS = ("id", "teacher", "weight", "source", "finished")
"""Columns that every format for training may have."""
_CHAT = ("system", "tools", *COMMON_COLUMNS)
_ANSWER = (*THOUGHT_KEYS, "spans")

# Columns of a problem to evaluate on. Benchmarks use several names; the first one found counts.
PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "final_answer", "solution")
ID_COLUMNS = ("id", "unique_id", "uuid")


def _unread(*_: object) -> list[Trace]:
    raise AssertionError("read by `read_problems`")


# In the order of detection, the more specific columns first: a preference set often has a
# `messages` column as well.
FORMATS: dict[str, Format] = {
    "preference": Format(
        ("chosen", "rejected"),
        (
            *("prompt", "conversations", "instruction", "input", "history"),
            *("chosen_spans", "rejected_spans", *_CHAT),
        ),
        _preference,
    ),
    "traces": Format(("prompt", "traces"), _CHAT, _graded_traces),
    "openr1": Format(
        ("problem", "generations", "correctness", "problem_is_valid", "source"),
        ("uuid", *COMMON_COLUMNS),
        _openr1,
    ),
    "prompt-completion": Format(
        ("prompt", "completion"), ("label", *_ANSWER, *_CHAT), _prompt_completion
    ),
    "messages": Format(("messages",), ("label", *_ANSWER, *_CHAT), _conversation),
    "sharegpt": Format(("conversations",), ("label", *_ANSWER, *_CHAT), _conversation),
    "alpaca": Format(
        ("instruction", "output"),
        ("input", "history", "label", *_ANSWER, *_CHAT),
        _alpaca,
    ),
    "text": Format(("text",), ("spans", *COMMON_COLUMNS), _document),
    "problem": Format((), ("system", *PROMPT_COLUMNS, *ANSWER_COLUMNS, *ID_COLUMNS), _unread),
}

COLUMNS = frozenset(name for shape in FORMATS.values() for name in shape.required + shape.optional)
"""Every column that some format reads."""


def _trace(
    row: Row,
    prompt: tuple[Message, ...] | str,
    answer: Message,
    sign: int,
    group: str,
    entry: dict[str, Any] | None = None,
    *,
    document: bool = False,
) -> Trace:
    """Build a trace.

    Args:
        row: the row.
        prompt: see `Trace`.
        answer: the assistant's message.
        sign: +1 or -1.
        group: see `Trace`.
        entry: its teacher, weight and finished override those of the row.
        document: see `Trace`.
    """
    entry = entry or {}
    teacher = entry.get("teacher", row.value.get("teacher"))
    if teacher is not None:
        teacher = read_text(row, "teacher", teacher, empty=True)
    weight = read_weight(row, entry.get("weight", row.value.get("weight")))
    origin = row.value.get("source")
    # In other data sets this column may have any type.
    origin = read_text(row, "source", origin, empty=True) if isinstance(origin, str) else None
    finished = entry.get("finished", row.value.get("finished"))
    if finished is not None:
        finished = read_sign(row, "finished", finished) > 0
    return Trace(
        prompt,
        with_thought(answer.thought, answer.content),
        sign,
        group,
        weight,
        teacher,
        origin,
        row.where,
        finished,
        thought=answer.thought,
        calls=answer.calls,
        tools=read_tools(row) if "tools" in FORMATS[row.format].optional else "",
        document=document,
        spans=read_spans(row, answer),
        distributions=answer.distributions,
    )


def with_system(row: Row, prompt: tuple[Message, ...] | str) -> tuple[Message, ...] | str:
    """The prompt after the system message that the row has in a column.

    Raises:
        FaultyRow: it is no text, or the prompt has another one.
    """
    system = row.value.get("system")
    if is_empty(system):
        return prompt
    text = read_text(row, "system", system)
    messages = as_messages(prompt)
    own = [message.content for message in messages if message.role == "system"]
    if own and own != [text]:
        raise row_error(row, "system", "differs from the system message of the conversation")
    return messages if own else (Message("system", text), *messages)


def is_empty(value: object) -> bool:
    """True for a missing or empty value."""
    return value is None or value in ("", [], {})


def _group(
    row: Row, column: str, prompt: tuple[Message, ...] | str, default: str | None = None
) -> str:
    """The problem of the row: its id if it has one, else `default` or the hash of the prompt.

    An id is combined with the hash of the prompt, as two files may both number problems from 0. The
    tools that a row offers are part of its prompt.
    """
    value = read_id(row, column)
    if value is None and default is not None:
        return default
    tools = row.value.get("tools")
    asked = repr(as_messages(prompt)) + ("" if is_empty(tools) else repr(tools))
    digest = xxhash.xxh3_128_hexdigest(asked.encode())
    return digest if value is None else f"{value}|{digest}"
