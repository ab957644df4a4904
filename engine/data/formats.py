"""The row shapes that the engine reads, and how a shape is told from a row's columns."""

from collections.abc import Collection
from dataclasses import dataclass

from redi.engine.errors import InputError


@dataclass(frozen=True, slots=True)
class Format:
    """Columns of one row shape; a row may hold any others, which are ignored."""

    required: tuple[str, ...]
    """Those that tell the shape; a shape without any is never told from the columns."""
    optional: tuple[str, ...]


_COMMON = ("id", "teacher", "weight", "source", "finished")

# Of a problem to evaluate on, for which benchmarks have several names: the first found counts.
PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "solution")
ID_COLUMNS = ("id", "unique_id", "uuid")

# In the order of detection: the more telling columns first (a preference set often carries a
# `messages` column as well).
FORMATS: dict[str, Format] = {
    "preference": Format(("chosen", "rejected"), ("prompt", *_COMMON)),
    "traces": Format(("prompt", "traces"), _COMMON),
    "openr1": Format(
        ("problem", "generations", "correctness", "problem_is_valid", "source"),
        ("uuid", *_COMMON),
    ),
    "prompt-completion": Format(("prompt", "completion"), ("label", *_COMMON)),
    "messages": Format(("messages",), ("label", *_COMMON)),
    "problem": Format((), (*PROMPT_COLUMNS, *ANSWER_COLUMNS, *ID_COLUMNS)),
}

VERDICT_COLUMNS = ("correct", "is_correct", "correctness", "verdict", "passed", "is_passed")
"""Names under which other programs write a row's verdict; here it is `label`."""
SCORE_COLUMNS = ("score", "reward", "accuracy", "acc", "success", "grade")
"""Names of a grade, which is a verdict where it is a truth value, or 0 and 1 in a whole file."""

# They shape what a model would learn from a row, and no shape reads them yet.
UNREAD_COLUMNS = frozenset(
    {
        *("tools", "functions", "tool_calls", "documents", "images", "image", "videos", "audio"),
        *("system", "system_prompt", "chat_template", "chat_template_kwargs"),
        *("reasoning", "reasoning_content", "thinking", "thoughts"),
        *("mask", "loss_mask", "completion_mask", "assistant_masks", "token_weights"),
        *("loss_weights", "sample_weight", "weights", "label", "labels", "margin"),
        *("step_rewards", "step_labels", "step_scores", "process_rewards", "rewards", "scores"),
        *("target_logprobs", "teacher_logprobs", "logprobs", "token_logprobs"),
        *("ref_chosen_logps", "ref_rejected_logps", "score_chosen", "score_rejected"),
        *("chosen", "rejected", "completions", "traces"),
        *VERDICT_COLUMNS,
        *SCORE_COLUMNS,
    }
)
UNREAD_MESSAGE_KEYS = frozenset(
    {
        *("weight", "mask", "loss", "loss_mask", "train", "trainable", "token_weights"),
        *("logprobs", "name", "tool_call_id", "tools", "refusal", "images", "audio", "prefix"),
    }
)

COLUMNS = frozenset(name for shape in FORMATS.values() for name in shape.required + shape.optional)
"""Every column that some shape reads."""


def resolve_format(format: str, columns: Collection[str], where: str) -> str:
    """The concrete format of a row: `format` itself, or for "auto" the one its columns tell.

    Raises InputError for an unknown format name, and for columns that fit no known shape.
    """
    if format in FORMATS:
        return format
    told = {name: shape for name, shape in FORMATS.items() if shape.required}
    if format != "auto":
        raise InputError(f"[data] format {format!r} is unknown; known: auto, {', '.join(told)}")
    for name, shape in told.items():
        if all(column in columns for column in shape.required):
            return name
    small = {column.lower() for column in columns}
    found = ", ".join(columns) or "none"
    for shape in told.values():
        if all(column in small for column in shape.required):
            raise InputError(
                f"{where}: the columns ({found}) must be written in small letters: "
                f"{', '.join(shape.required)}"
            )
    known = "; ".join(f"{name} ({', '.join(_usual(shape))})" for name, shape in told.items())
    raise InputError(f"{where}: the columns ({found}) fit no known row shape. Known: {known}")


def _usual(shape: Format) -> list[str]:
    """Columns that most rows of a shape have: a conversation alone may do without `prompt`."""
    return ["prompt"] * ("prompt" in shape.optional) + list(shape.required)
