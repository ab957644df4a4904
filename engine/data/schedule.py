"""Forms the units of training (`select`) and draws those of each step (`Schedule`)."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from redi.engine.config.objectives import UnitKind
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.mixing import MixedPath, epoch_draws, permutation
from redi.engine.errors import InputError

Pairing = Literal["zip", "first", "all"]
Duplicates = Literal["keep", "drop"]
Overlong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True, slots=True)
class Examples:
    """The units of training: single traces, or pairs of a positive and a negative."""

    units: np.ndarray
    """int64 [n, 1] or [n, 2] (positive, negative): indices of traces."""
    lengths: np.ndarray
    """int64 [traces]: length after truncation of every trace, used or not."""
    truncated: np.ndarray
    """bool [traces]: True if the trace was truncated at a limit."""
    left_out: dict[str, int]
    """Number of traces that are in no unit, by reason."""
    keep_pairs_together: int = 1
    """Number of sequences that must share a pack: 2 if the objective needs a pair's margin."""


def select(
    tokens: TokenizedTraces,
    *,
    objective_needs: UnitKind,
    pairing: Pairing = "zip",
    duplicates: Duplicates = "keep",
    max_tokens: int,
    min_tokens: int = 1,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    overlong: Overlong,
    row_tokens: int | None,
    untrained_end: int | None = None,
) -> Examples:
    """Form the units of training from a data set.

    Args:
        tokens: the data set.
        objective_needs: see `UnitKind`; "positives" leaves negatives out, "traces" takes all.
        pairing: within each problem, "zip" pairs the first positive with the first negative, the
            second with the second, ...; "first" takes only the first of each; "all" takes every
            combination. For positives, "first" takes one per problem, the others take all; for
            traces, "first" takes one of each sign. "first" is applied before the limits on length,
            as in the paper: a problem whose first pair is too long gives none.
        duplicates: "drop" leaves out repetitions, token for token: traces of one problem and sign
            (before pairing), and units of all problems.
        max_tokens: longest sequence, prompt and completion with its end.
        min_tokens: shortest sequence; shorter ones are left out before pairing.
        max_prompt_tokens, max_completion_tokens: limits on its parts; None: no further limit.
        overlong: what happens to a longer sequence. "error" raises; "drop" leaves it out (before
            pairing); "truncate" cuts its end off, or leaves it out if its prompt is too long or no
            completion token would remain.
        row_tokens: most tokens in a pack. A longer sequence that is kept is an error, independent
            of `overlong`. None: no limit.
        untrained_end: the end-of-sequence token, if it must not be trained; None: it is trained.
            It is removed, as nothing follows it, except from a completion of this token alone.

    Raises:
        InputError: a sequence is too long (names its row), or no unit can be formed.
    """
    lengths = tokens.lengths
    if untrained_end is not None:
        lengths = lengths - closed_by(tokens, untrained_end)
    usable = np.ones(len(tokens), dtype=bool)
    if objective_needs == "positives":
        usable = tokens.signs > 0
    left_out: Counter[str] = Counter()
    if duplicates == "drop":
        again = usable & repeats(tokens.groups, tokens.signs, tokens.digests)
        left_out["duplicates dropped"] = int(again.sum())
        usable = usable & ~again
    others = np.zeros(len(tokens), dtype=bool)
    if pairing == "first":
        candidates = np.flatnonzero(usable)
        again = repeats(tokens.groups[candidates], tokens.signs[candidates])
        others[candidates[again]] = True
        usable = usable & ~others
    prompts = tokens.prompt_lengths
    limits = np.full(len(tokens), max_tokens)
    if max_completion_tokens is not None:
        limits = np.minimum(limits, prompts + max_completion_tokens)
    short = usable & (lengths < min_tokens)
    left_out["shorter than min_tokens"] = int(short.sum())
    usable = usable & ~short
    over = lengths > limits
    if overlong != "error":
        # A prompt is never cut: without its end it would be a different problem.
        emptied = overlong == "truncate" and prompts >= max_tokens
        long_prompt = prompts > (max_prompt_tokens or np.inf)
        left_out["prompt too long, dropped"] = int(np.sum(usable & (long_prompt | emptied)))
        usable = usable & ~(long_prompt | emptied)
    if overlong == "drop":
        left_out["overlong dropped"] = int(np.sum(usable & over))
        usable = usable & ~over
    elif overlong == "truncate":
        lengths = np.minimum(lengths, limits)

    positives = _by_problem(tokens, usable, 1)
    if objective_needs in ("positives", "traces"):
        sides = [positives]
        if objective_needs == "traces":
            sides.append(_by_problem(tokens, usable, -1))
        units = _singles(sides, pairing).reshape(-1, 1)
    else:
        units = _pairs(positives, _by_problem(tokens, usable, -1), pairing)
    if duplicates == "drop":
        formed = units
        units = formed[~repeats(*tokens.digests[formed].T, tokens.signs[formed[:, 0]])]
        gone = np.setdiff1d(formed, units)
        left_out["duplicates dropped"] += len(gone)
        usable[gone] = False
    used = np.zeros(len(tokens), dtype=bool)
    used[units] = True
    usable = usable | others
    if objective_needs == "positives":
        left_out["negatives unused"] = int(np.sum(tokens.signs < 0))
        left_out["positives unused"] = int(np.sum(usable & ~used))
    elif objective_needs == "traces":
        left_out["traces unused"] = int(np.sum(usable & ~used))
    else:
        left_out["positives unpaired"] = int(np.sum(usable & ~used & (tokens.signs > 0)))
        left_out["negatives unpaired"] = int(np.sum(usable & ~used & (tokens.signs < 0)))
    _check_units(tokens, units, objective_needs, left_out)
    raise_or_set = 'raise it, or set [data] overlong = "drop" or "truncate"'
    for counts, limit, key, advice in (
        (prompts, max_prompt_tokens, "[data] max_prompt_tokens", raise_or_set),
        (lengths - prompts, max_completion_tokens, "[data] max_completion_tokens", raise_or_set),
        (lengths, max_tokens, "[data] max_tokens", raise_or_set),
        (
            lengths,
            row_tokens,
            "[train] row_tokens",
            "raise it, or lower [data] max_tokens with overlong set",
        ),
    ):
        if limit is not None:
            _check_lengths(tokens, np.flatnonzero(used), counts, limit, key, advice)
    keep_pairs_together = 2 if objective_needs == "margins" else 1
    if keep_pairs_together == 2 and row_tokens is not None:
        _check_pairs_fit(tokens, units, lengths, row_tokens)
    kept = {reason: count for reason, count in left_out.items() if count}
    return Examples(units, lengths, over & (overlong == "truncate"), kept, keep_pairs_together)


def repeats(*columns: np.ndarray) -> np.ndarray:
    """Find entries that equal an earlier one in every column, bool [n].

    Args:
        columns: arrays of shape [n].
    """
    order = np.lexsort(columns)
    ordered = [column[order] for column in columns]
    again = np.zeros(len(order), dtype=bool)
    again[order[1:]] = np.logical_and.reduce([some[1:] == some[:-1] for some in ordered])
    return again


def closed_by(tokens: TokenizedTraces, end: int) -> np.ndarray:
    """Find traces whose completion ends with this token and has others, bool [traces]."""
    last = np.array([tokens.ids(index)[-1] for index in range(len(tokens))])
    return (last == end) & (tokens.lengths - tokens.prompt_lengths > 1)


@dataclass(frozen=True, slots=True)
class _OneSign:
    """The usable traces of one sign, problem by problem in the order of the data."""

    traces: np.ndarray
    """int64 [n]: indices of traces."""
    problems: np.ndarray
    """int64 [n], ascending: the same number for traces of one problem, for both signs."""
    ranks: np.ndarray
    """int64 [n]: 0 for a problem's first, 1 for its second, ..."""


def _by_problem(tokens: TokenizedTraces, usable: np.ndarray, sign: int) -> _OneSign:
    indices = np.flatnonzero(usable)
    # A problem is identified by its first usable trace, which is assigned last.
    first = np.zeros(int(tokens.groups.max()) + 1, dtype=np.int64)
    first[tokens.groups[indices[::-1]]] = indices[::-1]
    indices = indices[tokens.signs[indices] == sign]
    problems = first[tokens.groups[indices]]
    order = np.argsort(problems, kind="stable")
    problems = problems[order]
    ranks = np.arange(len(order)) - np.searchsorted(problems, problems)
    return _OneSign(indices[order], problems, ranks)


def _singles(sides: list[_OneSign], pairing: Pairing) -> np.ndarray:
    """Single traces, int64 [n], problem by problem, positives first."""
    taken = [side.ranks == 0 if pairing == "first" else slice(None) for side in sides]
    problems = np.concatenate([s.problems[part] for s, part in zip(sides, taken, strict=True)])
    traces = np.concatenate([s.traces[part] for s, part in zip(sides, taken, strict=True)])
    return traces[np.argsort(problems, kind="stable")]


def _pairs(positives: _OneSign, negatives: _OneSign, pairing: Pairing) -> np.ndarray:
    """Pairs, int64 [n, 2]; see `select`."""
    start = np.searchsorted(negatives.problems, positives.problems)
    count = np.searchsorted(negatives.problems, positives.problems, side="right") - start
    if pairing == "all":
        repeated = np.repeat(positives.traces, count)
        place = np.arange(len(repeated)) - np.repeat(np.cumsum(count) - count, count)
        return np.stack([repeated, negatives.traces[np.repeat(start, count) + place]], axis=1)
    paired = positives.ranks < np.minimum(count, 1 if pairing == "first" else count)
    partner = negatives.traces[(start + positives.ranks)[paired]]
    return np.stack([positives.traces[paired], partner], axis=1)


def _check_units(
    tokens: TokenizedTraces, units: np.ndarray, needs: UnitKind, left_out: Counter[str]
) -> None:
    if len(units):
        return
    positives, negatives = int(np.sum(tokens.signs > 0)), int(np.sum(tokens.signs < 0))
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    sources = ", ".join(tokens.sources)
    if needs == "traces":
        problem = "no trace to train on"
    elif needs == "positives":
        problem = "no positive trace to train on"
    elif not negatives:
        problem = "only positive traces: pairs need negatives too (or use the sft objective)"
    elif not positives:
        problem = "only negative traces: pairs need positives too"
    else:
        problem = "no problem has both a positive and a negative trace: no pair can be formed"
    counts = f"{positives} positives, {negatives} negatives"
    raise InputError(f"{sources}: {problem} ({'; '.join(filter(None, [counts, reasons]))})")


def _check_lengths(
    tokens: TokenizedTraces,
    used: np.ndarray,
    counts: np.ndarray,
    limit: int,
    key: str,
    advice: str,
) -> None:
    over = used[counts[used] > limit]
    if len(over):
        first = int(over[0])
        raise InputError(
            f"{tokens.where(first)}: {counts[first]} tokens are more than {key} = {limit} "
            f"({len(over)} of {len(used)} traces are): {advice}"
        )


def _check_pairs_fit(
    tokens: TokenizedTraces, units: np.ndarray, lengths: np.ndarray, row_tokens: int
) -> None:
    both = lengths[units].sum(axis=1)
    over = np.flatnonzero(both > row_tokens)
    if len(over):
        first = int(over[0])
        raise InputError(
            f"{tokens.where(int(units[first, 0]))}: its pair has {both[first]} tokens, more than "
            f"[train] row_tokens = {row_tokens} ({len(over)} of {len(units)} pairs are longer), "
            "and this objective needs a pair in one pack: raise it, or lower [data] max_tokens"
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """Draws the units of each step, as a function of seed, epoch and step alone."""

    num_units: int
    batch: int
    """Units per step."""
    epochs: int | None
    max_steps: int | None
    seed: int
    mixture: tuple[MixedPath, ...] = ()
    """Draws per epoch of each path; empty: every unit is drawn once."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.draws_per_epoch < self.batch:
            weights = ", raise [data] mixing_weights" if self.mixture else ""
            raise InputError(
                f"the data gives {self.draws_per_epoch} units (pairs; in SFT sequences) per "
                f"epoch and a step takes {self.batch}: lower [train] batch{weights} or add data"
            )

    @property
    def draws_per_epoch(self) -> int:
        """Units per epoch; a unit that is drawn twice counts twice."""
        return sum(mixed.draws for mixed in self.mixture) if self.mixture else self.num_units

    @property
    def steps_per_epoch(self) -> int:
        """Complete batches per epoch."""
        return self.draws_per_epoch // self.batch

    @property
    def dropped_per_epoch(self) -> int:
        """Draws of the last, incomplete batch, which are not trained in that epoch."""
        return self.draws_per_epoch % self.batch

    @property
    def total_steps(self) -> int:
        """Steps until `epochs` or `max_steps`, whichever comes first; default: one epoch."""
        if self.epochs is None and self.max_steps is None:
            return self.steps_per_epoch
        by_epochs = None if self.epochs is None else self.epochs * self.steps_per_epoch
        return min(limit for limit in (by_epochs, self.max_steps) if limit is not None)

    def drawn(self) -> np.ndarray:
        """The units that are drawn in any step, int64, ascending."""
        steps = range(1, self.total_steps + 1)
        return np.unique(np.concatenate([self.units(step) for step in steps]))

    def units(self, step: int) -> np.ndarray:
        """The units of a step, int64 [batch]; steps count from 1."""
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        order = _epoch_order(self.draws_per_epoch, self.seed, epoch)
        draws = order[position * self.batch : (position + 1) * self.batch]
        return epoch_draws(self.mixture, self.seed, epoch)[draws] if self.mixture else draws


@lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    order = permutation(count, np.random.SeedSequence([seed, epoch]))
    order.flags.writeable = False
    return order
