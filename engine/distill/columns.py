"""Reads the distributions of a trace from columns of its row, as other programs write them.

logprobs, target_token_ids      [T][K] each (axolotl)
logprobs                        [T][K] objects {"token": "token_id:17", "logprob"} (axolotl)
prompt_logprobs, logprobs       for each token an object: id -> log-prob or {"logprob"} (vLLM)
logprobs                        {"content": [{"token", "top_logprobs"}]} (OpenAI)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from redi.engine.data.row import Row, read_json, row_error
from redi.engine.distill.given import Given, given_of

_TOKEN_ID = re.compile(r"token_id:(\d+)")
Spelled = Callable[[str, list[int] | None], int]
"""The id of a token by its text, or by its bytes if they are given; ValueError if there is not
exactly one."""


def read_columns(row: Row, place: str, columns: Mapping[str, Any], spelled: Spelled) -> Given:
    """The distributions in a row.

    Args:
        row: the row, for messages.
        place: prefix of a column in messages, such as "traces[1].".
        columns: those of DISTRIBUTION_COLUMNS that the row has.
        spelled: finds the tokens that are given as text.

    Raises:
        FaultyRow: they are no distributions. Names row and column.
    """
    name = next(name for name in ("prompt_logprobs", "logprobs") if columns.get(name) is not None)
    value = read_json(row, place + name, columns[name])
    ids = read_json(row, place + "target_token_ids", columns.get("target_token_ids"))
    try:
        if name == "logprobs" and ids is not None:
            return _lists(ids, value)
        if isinstance(value, dict):
            return _openai(value, spelled)
        return _vllm(value)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        problem = "another layout" if not isinstance(error, ValueError) else str(error)
        raise row_error(
            row,
            place + name,
            f"has no teacher's distributions ({problem}); docs/distillation.md shows the layouts",
        ) from None


def _lists(ids: Any, logps: Any) -> Given:
    if len(ids) != len(logps):
        raise ValueError(f"{len(logps)} tokens, but target_token_ids has {len(ids)}")
    # A first token without a distribution is null or empty.
    return given_of([one or () for one in ids], [one or () for one in logps])


def _vllm(value: Any) -> Given:
    if not isinstance(value, list) or not value:
        raise ValueError("not a list")
    ids, logps = [], []
    has_own = True
    for entry in value:
        if isinstance(entry, list):  # axolotl: "token_id:17"
            has_own = False
            entry = {_TOKEN_ID.fullmatch(one["token"])[1]: one for one in entry}  # type: ignore[index]
        # Parquet gives each object the keys of all others.
        entry = {key: one for key, one in (entry or {}).items() if one is not None}
        ids.append([int(key) for key in entry])
        logps.append([_logp(one) for one in entry.values()])
    if not ids[0]:
        del ids[0], logps[0]
    return given_of(ids, logps, has_own=has_own)


def _logp(value: Any) -> float:
    return float(value["logprob"] if isinstance(value, dict) else value)


def _openai(value: dict[str, Any], spelled: Spelled) -> Given:
    own, ids, logps = [], [], []
    for entry in value["content"]:
        own.append(_id(entry, spelled))
        likely = {_id(one, spelled): _logp(one) for one in entry["top_logprobs"]}
        if len(likely) < len(entry["top_logprobs"]):
            raise ValueError(f"two entries of token {len(own) - 1} are one token")
        likely.setdefault(own[-1], _logp(entry))
        ids.append(list(likely))
        logps.append(list(likely.values()))
    return given_of(ids, logps, own=np.array(own, np.int32))


def _id(entry: dict[str, Any], spelled: Spelled) -> int:
    if named := _TOKEN_ID.fullmatch(entry["token"]):
        return int(named[1])
    return spelled(entry["token"], entry.get("bytes"))
