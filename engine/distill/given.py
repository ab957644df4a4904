"""Distributions of the tokens of a text, as a file gives them, and their place in a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from redi.engine.data.distributions import PADDING

IMPOSSIBLE = -1000.0
"""Log-probs below it stand for tokens without probability, such as -9999 or -1e9."""
MOST_MASS = 1.05
"""Largest sum of a position's probabilities: files round, some to bfloat16."""


class Misaligned(ValueError):
    """The distributions are not those of a trace's tokens."""


@dataclass(frozen=True)
class Given:
    """Distributions of n tokens in a row, the last of which is the last of a text or its end."""

    ids: np.ndarray
    """int32 [n, K]: the most likely tokens at each place, or PADDING."""
    logps: np.ndarray
    """float32 [n, K]: their log-probs."""
    own: np.ndarray | None = None
    """int32 [n]: the text's own token at each place, PADDING where it is unknown; None: the file
    has none."""
    has_own: bool = False
    """True if the entries at each place have the text's own token."""


def given_of(
    ids: Sequence[Sequence[int]], logps: Sequence[Sequence[float]], **more: object
) -> Given:
    """Distributions with any number of entries at each place.

    Raises:
        ValueError: a place has another number of ids than of log-probs, or they are no
            distributions; see `check`.
    """
    kept = max(map(len, ids), default=0)
    all_ids = np.full((len(ids), kept), PADDING, np.int32)
    all_logps = np.full((len(ids), kept), -np.inf, np.float32)
    for place, (some, values) in enumerate(zip(ids, logps, strict=True)):
        if len(some) != len(values):
            raise ValueError(f"token {place}: {len(some)} ids, but {len(values)} log-probs")
        all_ids[place, : len(some)] = some
        all_logps[place, : len(some)] = values
    found = Given(all_ids, all_logps, **more)  # type: ignore[arg-type]
    return check(found)


def check(given: Given) -> Given:
    """The same with probabilities that sum to at most 1, and without entries of no probability.

    Raises:
        ValueError: a log-prob is above 0 or no number, probabilities sum to more than 1, an id is
            negative, or occurs twice at a place.
    """
    used = (given.ids != PADDING) & ~(given.logps < IMPOSSIBLE)
    if np.any(given.ids < PADDING):
        raise ValueError(f"token {_first(given.ids < PADDING)}: a negative id")
    logps = np.where(used, given.logps, -np.inf)
    if np.any(bad := np.isnan(logps) | (logps > 0.01)):
        raise ValueError(f"token {_first(bad)}: {logps[bad][0]} is no log-prob")
    mass = np.exp(logps, dtype=np.float64).sum(axis=1)
    if np.any(mass > MOST_MASS):
        place = int(np.argmax(mass > MOST_MASS))
        raise ValueError(
            f"token {place}: the probabilities sum to {mass[place]:.3g}; they must be log-probs "
            "of one distribution"
        )
    ids = np.where(used, given.ids, PADDING)
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING)
    if np.any(twice):
        place = _first(twice)
        raise ValueError(f"token {place}: id {ordered[:, 1:][twice][0]} occurs twice")
    over = np.log(np.maximum(mass, 1)).astype(np.float32)
    return Given(ids, np.minimum(logps - over[:, None], 0), given.own, given.has_own)


def _first(found: np.ndarray) -> int:
    return int(np.flatnonzero(found.any(axis=-1))[0])


def align(given: Given, ids: np.ndarray, prompt_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The distributions of a completion's tokens.

    Files have those of the completion or of prompt and completion, with or without the first token,
    and some have none of the end that closes the trace.

    Args:
        ids: int32 [tokens], the trace: its prompt, its completion and its end.
        prompt_length: tokens of the prompt.

    Returns:
        int32 and float32 [completion, K]; PADDING and -inf at an end without a distribution.

    Raises:
        Misaligned: the trace has other tokens, or another number of them.
    """
    total, count = len(ids), len(given.ids)
    completion = total - prompt_length
    problem = ""
    for missing in (0, 1):  # tokens at the end without a distribution
        wanted = completion - missing
        start = count - wanted
        known = given.own is not None or given.has_own
        whole = (0,) if missing else (0, prompt_length - 1, prompt_length)
        if wanted < 1 or start < 0 or start > prompt_length or not (known or start in whole):
            continue
        rows, own = slice(start, count), ids[prompt_length : total - missing]
        found = _difference(given, rows, own)
        if not found:
            return tuple(  # type: ignore[return-value]
                np.concatenate([part[rows], np.full((missing, part.shape[1]), fill, part.dtype)])
                for part, fill in ((given.ids, PADDING), (given.logps, -np.inf))
            )
        problem = problem or found
    raise Misaligned(
        problem
        or f"it has distributions of {count} tokens, but the completion has {completion} (and the "
        f"prompt {prompt_length})"
    )


def _difference(given: Given, rows: slice, own: np.ndarray) -> str:
    """How the tokens of a file differ from those of the completion; "" if they do not."""
    if given.own is not None:
        theirs = given.own[rows]
        wrong = (theirs != own) & (theirs != PADDING)
        if np.any(wrong):
            place = int(np.argmax(wrong))
            return f"token {place} of the completion is {own[place]}, but {theirs[place]} there"
    if given.has_own:
        wrong = ~(given.ids[rows] == own[:, None]).any(axis=1)
        if np.any(wrong):
            place = int(np.argmax(wrong))
            return f"token {place} of the completion is {own[place]}, which it has no entry for"
    return ""
