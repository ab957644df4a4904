"""Converts a raw row of any format to traces: prompt, completion and sign."""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import xxhash

from redi.engine.data.rows import FORMATS, SCORE_COLUMNS, VERDICT_COLUMNS, Row, resolve_format
from redi.engine.errors import InputError

# Keys of a chat message whose meaning would be lost by reading only role and content.
_UNREAD_MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

# Weights are float32: outside these bounds a weight would lose digits, or become 0 or infinite.
_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 2.0**-126, 3.4e38


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Trace:
    """A teacher's answer to a problem, with its verdict."""

    prompt: tuple[Message, ...] | str
    """The messages before the answer, or plain text."""
    completion: str
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


def normalise(row: Row, format: str = "auto", dropped: Counter[str] | None = None) -> list[Trace]:
    """The traces of one row, in the row's order.

    Args:
        row: a raw row.
        format: a key of `FORMATS`, or "auto": detected from this row's columns.
        dropped: updated with the number of rows and generations that are left out (mostly by the
            paper's filter of OpenR1 rows), by reason.

    Raises:
        InputError: a column is missing or has a wrong type, or a prompt or completion is empty.
            Names row and column.
    """
    format = resolve_format(format, row.value.keys(), row.where)
    for column in FORMATS[format].required:
        if column not in row.value:
            found = ", ".join(row.value) or "none"
            raise _error(row, column, f"is missing; the row has: {found}")
    return _READERS[format](row, Counter() if dropped is None else dropped)


def as_messages(prompt: tuple[Message, ...] | str) -> tuple[Message, ...]:
    """The prompt as messages: plain text is one user message."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _preference(row: Row, _: Counter[str]) -> list[Trace]:
    chosen, rejected = row.value["chosen"], row.value["rejected"]
    for column in ("chosen", "rejected"):
        if not isinstance(row.value[column], str | list):
            kind = _type_name(row.value[column])
            raise _error(row, column, f"must be text or a list of messages, not {kind}")
    if type(chosen) is not type(rejected):
        raise _error(row, "rejected", "must have the type of chosen: text, or a list of messages")
    if isinstance(chosen, str):
        if "prompt" not in row.value:
            raise _error(row, "prompt", "is missing; plain chosen and rejected need it")
        prompt = read_prompt(row, "prompt")
        completions = (read_text(row, "chosen", chosen), read_text(row, "rejected", rejected))
    else:
        prompt, completions = _conversational_pair(row)
    # Without an id each row is a problem, so that its pair stays as the user made it.
    group = _group(row, "id", prompt, default=row.where)
    return [
        _trace(row, prompt, text, sign, group)
        for text, sign in zip(completions, (1, -1), strict=True)
    ]


def _conversational_pair(row: Row) -> tuple[tuple[Message, ...] | str, tuple[str, str]]:
    """The prompt and the two answers of a row whose chosen and rejected are messages.

    Both contain only the answer (the prompt is in a separate column) or the whole conversation.
    """
    pair = []
    for column in ("chosen", "rejected"):
        messages = _messages(row, column, row.value[column])
        if messages[-1].role != "assistant":
            raise _error(row, column, "must end with an assistant message")
        pair.append(messages)
    chosen, rejected = pair
    if chosen[:-1] != rejected[:-1]:
        raise _error(row, "rejected", "must differ from chosen in the last message only")
    prompt: tuple[Message, ...] | str = chosen[:-1]
    own_prompt = read_prompt(row, "prompt") if row.value.get("prompt") is not None else None
    if not prompt:
        if own_prompt is None:
            raise _error(row, "prompt", "is missing, and chosen contains only the answer")
        prompt = own_prompt
    elif own_prompt is not None and not _repeats(own_prompt, chosen[:-1]):
        raise _error(row, "prompt", "differs from the prompt that chosen and rejected begin with")
    else:
        _check_prompt(row, "chosen", chosen[:-1])
    return prompt, (chosen[-1].content, rejected[-1].content)


def _repeats(prompt: tuple[Message, ...] | str, messages: tuple[Message, ...]) -> bool:
    """True if the prompt column repeats the start of the conversation."""
    if isinstance(prompt, str):
        return any(message.content == prompt for message in messages)
    return prompt == messages


def _prompt_completion(row: Row, _: Counter[str]) -> list[Trace]:
    prompt = read_prompt(row, "prompt")
    completion = row.value["completion"]
    if isinstance(completion, list):
        messages = _messages(row, "completion", completion)
        if len(messages) != 1 or messages[0].role != "assistant":
            raise _error(row, "completion", "must be text or a list of one assistant message")
        completion = messages[0].content
    text = read_text(row, "completion", completion)
    return [_trace(row, prompt, text, _label(row), _group(row, "id", prompt))]


def _conversation(row: Row, _: Counter[str]) -> list[Trace]:
    """The last assistant message is the completion; messages after it are ignored."""
    messages = _messages(row, "messages", row.value["messages"])
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise _error(row, "messages", "has no assistant message: the row has no completion")
    prompt = messages[: answers[-1]]
    _check_prompt(row, "messages", prompt)
    text = messages[answers[-1]].content
    return [_trace(row, prompt, text, _label(row), _group(row, "id", prompt))]


def _graded_traces(row: Row, dropped: Counter[str]) -> list[Trace]:
    prompt = read_prompt(row, "prompt")
    group = _group(row, "id", prompt)
    entries = row.value["traces"]
    if not isinstance(entries, list) or not entries:
        raise _error(row, "traces", "must be a list of at least one trace")
    traces = []
    for index, entry in enumerate(entries):
        column = f"traces[{index}]"
        if not isinstance(entry, dict) or not {"text", "correct"} <= entry.keys():
            raise _error(row, column, "must be an object with text and correct")
        sign = _sign(row, f"{column}.correct", entry["correct"])
        # A model that stops at once has answered incorrectly and leaves nothing to train.
        if sign < 0 and isinstance(entry["text"], str) and _is_blank(entry["text"]):
            dropped["empty incorrect trace"] += 1
            continue
        text = read_text(row, f"{column}.text", entry["text"])
        traces.append(_trace(row, prompt, text, sign, group, entry))
    return traces


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of an OpenR1-Math-Raw row, with the verdicts of the two verifiers."""

    text: str
    llama: bool
    math_verify: bool


def read_openr1(
    row: Row, dropped: Counter[str], excluded_sources: Collection[str] = ("cn_k12",)
) -> list[Generation]:
    """The generations of an OpenR1-Math-Raw row that the paper's filter keeps.

    The rules (arXiv 2505.24850, appendix on data): the problem is valid, its source is not cn_k12,
    and each verifier has a verdict on each generation. What they leave out, and empty generations,
    are counted in `dropped` by reason.

    Raises:
        InputError: a column has a wrong type. Names row and column.
    """
    valid, source = row.value["problem_is_valid"], row.value["source"]
    for column, value in (("problem_is_valid", valid), ("source", source)):
        if value is not None and not isinstance(value, str):
            raise _error(row, column, f"must be text, not {type(value).__name__}")
    texts, correctness = row.value["generations"], row.value["correctness"]
    if not isinstance(texts, list):
        raise _error(row, "generations", "must be a list of texts")
    if not isinstance(correctness, dict):
        raise _error(row, "correctness", "must be an object with the two verifiers' lists")
    verdicts = [
        correctness.get(key) or [] for key in ("llama_verification", "math_verify_reparsed_answer")
    ]
    if not all(isinstance(verdict, list) for verdict in verdicts):
        raise _error(row, "correctness", "must have a list for each verifier")
    if (valid or "").lower() != "yes":
        dropped["problem not valid"] += 1
        return []
    if source in excluded_sources:
        dropped[f"source {source}"] += 1
        return []
    if any(len(verdict) != len(texts) for verdict in verdicts):
        dropped["lists of different length"] += 1
        return []
    generations = []
    for index, (text, llama, math_verify) in enumerate(zip(texts, *verdicts, strict=True)):
        if text is None or (isinstance(text, str) and _is_blank(text)):
            dropped["empty generation"] += 1
            continue
        text = read_text(row, f"generations[{index}]", text)
        generations.append(Generation(text, llama is True, math_verify is True))
    return generations


def _openr1(row: Row, dropped: Counter[str]) -> list[Trace]:
    """A generation is correct if both verifiers accept it."""
    generations = read_openr1(row, dropped)
    if not generations:
        return []
    prompt = read_prompt(row, "problem")
    group = _group(row, "uuid" if row.value.get("uuid") is not None else "id", prompt)
    return [
        _trace(row, prompt, one.text, 1 if one.llama and one.math_verify else -1, group)
        for one in generations
    ]


_READERS: dict[str, Callable[[Row, Counter[str]], list[Trace]]] = {
    "preference": _preference,
    "prompt-completion": _prompt_completion,
    "messages": _conversation,
    "traces": _graded_traces,
    "openr1": _openr1,
}


def _trace(
    row: Row,
    prompt: tuple[Message, ...] | str,
    completion: str,
    sign: int,
    group: str,
    entry: dict[str, Any] | None = None,
) -> Trace:
    """Build a trace; teacher, weight and finished of `entry` override those of the row."""
    entry = entry or {}
    teacher = entry.get("teacher", row.value.get("teacher"))
    if teacher is not None:
        teacher = read_text(row, "teacher", teacher, empty=True)
    weight = _weight(row, entry.get("weight", row.value.get("weight")))
    origin = row.value.get("source")
    # In other data sets this column may have any type.
    origin = read_text(row, "source", origin, empty=True) if isinstance(origin, str) else None
    finished = entry.get("finished", row.value.get("finished"))
    if finished is not None:
        finished = _sign(row, "finished", finished) > 0
    return Trace(prompt, completion, sign, group, weight, teacher, origin, row.where, finished)


def read_prompt(row: Row, column: str) -> tuple[Message, ...] | str:
    """The prompt in a column: plain text, or messages that do not end with the assistant's.

    Raises:
        InputError: it is not a prompt. Names row and column.
    """
    value = row.value[column]
    if isinstance(value, str):
        return read_text(row, column, value)
    if not isinstance(value, list):
        raise _error(row, column, f"must be text or a list of messages, not {_type_name(value)}")
    prompt = _messages(row, column, value)
    _check_prompt(row, column, prompt)
    return prompt


def _check_prompt(row: Row, column: str, prompt: tuple[Message, ...]) -> None:
    if not any(message.role == "user" for message in prompt):
        raise _error(row, column, "has an empty prompt: no user message before the completion")
    if prompt[-1].role == "assistant":
        raise _error(row, column, "has a prompt that ends with an assistant message")


def _messages(row: Row, column: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _error(row, column, "must be a list of at least one message")
    messages = []
    for index, message in enumerate(value):
        name = f"{column}[{index}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise _error(row, name, "must be an object with role and content")
        for key in _UNREAD_MESSAGE_KEYS:
            if message.get(key):
                raise _error(row, f"{name}.{key}", "is not read: put its text into content")
        role = read_text(row, f"{name}.role", message["role"])
        # An empty system message is allowed: it turns off a template's default one.
        content = read_text(row, f"{name}.content", message["content"], empty=role == "system")
        messages.append(Message(role, content))
    return tuple(messages)


def read_text(row: Row, column: str, value: object, *, empty: bool = False) -> str:
    """The text in a column. It must be valid Unicode, and not blank unless `empty`.

    Raises:
        InputError: it is not such a text. Names row and column.
    """
    if not isinstance(value, str):
        raise _error(row, column, f"must be text, not {_type_name(value)}")
    if not empty and _is_blank(value):
        raise _error(row, column, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _error(row, column, f"is not valid Unicode text: {error.reason}") from error
    return value


def _is_blank(text: str) -> bool:
    """True if it has only white space, control and zero-width characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def _label(row: Row) -> int:
    """The row's verdict, +1 or -1; a row without a verdict is correct."""
    label = _sign(row, "label", row.value["label"]) if "label" in row.value else None
    for column in (*VERDICT_COLUMNS, *SCORE_COLUMNS):
        value = row.value.get(column)
        verdict = _WORDS.get(str(value).strip().lower())
        if value is None or value == "" or (column in SCORE_COLUMNS and _is_number(value)):
            continue
        if label is not None:
            if verdict is not None and verdict != label:
                raise _error(row, column, f"is {value!r} and contradicts label: remove one of them")
        elif column in VERDICT_COLUMNS or verdict is not None:
            raise _error(
                row,
                column,
                "has a verdict, but verdicts are read from 'label': rename it to label "
                "(true: correct), or remove it",
            )
    return 1 if label is None else label


_WORDS = {
    **dict.fromkeys(("true", "correct", "yes", "right", "pass", "passed", "1", "1.0"), 1),
    **dict.fromkeys(("false", "incorrect", "no", "wrong", "fail", "failed", "0", "0.0"), -1),
}


def _is_number(value: object) -> bool:
    """True if it may be a score; `scan_source` detects verdicts written as numbers."""
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def _sign(row: Row, column: str, value: object) -> int:
    if isinstance(value, str) and value.lower() in ("true", "1", "false", "0"):
        return 1 if value.lower() in ("true", "1") else -1
    if isinstance(value, bool | int | float) and value in (0, 1):
        return 1 if value else -1
    raise _error(row, column, f"must be true or false (or 1 or 0), not {value!r}")


def _weight(row: Row, value: object) -> float:
    if value is None:
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not _SMALLEST_WEIGHT <= weight <= _LARGEST_WEIGHT:
        raise _error(
            row,
            "weight",
            "must be a positive number within float32's range (2^-126 to 3.4e38), "
            f"not {repr(value)[:40]}",
        )
    return weight


def _group(
    row: Row, column: str, prompt: tuple[Message, ...] | str, default: str | None = None
) -> str:
    """The problem of the row: its id if it has one, else `default` or the hash of the prompt.

    An id is combined with the hash of the prompt, as two files may both number problems from 0.
    """
    value = row.value.get(column)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise _error(row, column, f"must be text or a whole number, not {_type_name(value)}")
    if isinstance(value, str):
        read_text(row, column, value, empty=True)
    if value is None and default is not None:
        return default
    digest = xxhash.xxh3_128_hexdigest(repr(as_messages(prompt)).encode())
    return digest if value is None else f"{value}|{digest}"


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _error(row: Row, column: str, problem: str) -> InputError:
    return InputError(f"{row.where}: column {column!r} {problem}")
