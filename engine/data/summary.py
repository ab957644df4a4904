"""What is about to be trained, in figures: the last look before hours of training.

Everything is told from lengths, signs and digests, which lie in the token cache: no token is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from redi.engine.console import Console
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.packing import Cost, pack
from redi.engine.data.schedule import Examples, Schedule

PERCENTILES = (5, 50, 95, 99)
PACKED_STEPS = 20
"""Steps at the start of training whose packing is looked at."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of one kind of sequence."""

    count: int
    total: int
    percentiles: tuple[int, ...]
    """At PERCENTILES."""
    longest: int


@dataclass(frozen=True)
class PathDraws:
    """What an epoch takes of one entry of `[data] path`."""

    path: str
    weight: float
    units: int
    """Pairs, or single sequences, that come from here."""
    draws: int
    """Of them in an epoch."""


@dataclass(frozen=True)
class HeldOutOverlap:
    """What of `[eval]` is trained on as well."""

    traces: int
    """Held-out traces that are scored."""
    trained_traces: int
    """Of them, those that equal a used trace, prompt and completion, token for token."""
    problems: int
    """Their problems."""
    trained_problems: int
    """Of them, those whose prompt is that of a used trace, token for token."""


@dataclass(frozen=True)
class Summary:
    """What `[data]`, `[objective]` and `[train]` come to."""

    traces: int
    """Traces read and tokenized, used or not."""
    problems: int
    """Of the traces read."""
    only_positives: int
    """Problems without a negative, and so without a pair."""
    only_negatives: int
    left_out: dict[str, int]
    """Rows and traces that are not trained, by reason."""
    units: int
    """Pairs, or single sequences in SFT."""
    draws: int
    """Units of an epoch, one that it draws twice counted twice."""
    mixture: list[PathDraws]
    """By path, if `[data] mixing_weights` are given; else an epoch draws every unit once."""
    paired: bool
    lengths: dict[str, Lengths]
    """Of "prompt", "positive" and "negative" (completions with their end)."""
    duplicates: int
    """Used traces that repeat another used one, prompt and completion, token for token."""
    contradictions: int
    """Distinct token sequences that are used both as a positive and as a negative."""
    identical_pairs: int
    """Pairs whose positive and negative are the same tokens."""
    identical_first: str | None
    """The row of the first of them."""
    truncated: int
    """Used traces that were cut off at a limit: their end is not trained."""
    unknown_tokens: int
    """Used traces with text that the tokenizer does not know."""
    control_tokens: int
    """Used traces whose text spells a control token of the tokenizer."""
    control_names: tuple[str, ...]
    """Which control tokens the data spells."""
    unread: dict[str, tuple[str, ...]]
    """Columns that mean something but are not read, by file, held-out ones too."""
    unfinished: int
    """Traces read that were cut off before the data was made: their end is not trained."""
    document_start: str
    """The tokens that begin each document and are no text of the row; "" if there are none."""
    held_out: HeldOutOverlap | None
    """None without `[eval]`."""
    steps: int
    batch: int
    epochs: float
    """That the steps come to."""
    left_over: int
    """Draws of each epoch's last, partial batch."""
    micro_steps: float
    """A step's micro-steps, mean over the steps looked at."""
    rank_efficiency: float
    """See `Packing`; mean over the steps looked at."""
    rank_efficiency_bound: float
    """What each step's longest sequence allows, by any packing; mean over the same steps."""
    world_size: int


def summarize(
    tokens: TokenizedTraces,
    examples: Examples,
    schedule: Schedule,
    held_out: tuple[TokenizedTraces, Examples] | None = None,
    *,
    row_tokens: int,
    world_size: int,
    cost: Cost,
) -> Summary:
    """Sum up the data set, its units and their packing.

    Args:
        tokens, examples, schedule: what is trained, and when.
        held_out: the traces of `[eval]` and which of them are scored, if there are any.
        row_tokens, world_size, cost: as `pack` takes them.
    """
    in_use = np.zeros(len(tokens), dtype=bool)
    in_use[examples.units] = True
    used = np.flatnonzero(in_use)
    signs, digests = tokens.signs[used], tokens.digests[used]
    kept = examples.lengths[used]
    prompts = tokens.prompt_lengths[used]
    completions = kept - prompts
    distinct = {sign: _distinct(digests[signs == sign]) for sign in (1, -1)}
    paired = examples.units.shape[1] == 2
    identical = np.zeros(0, dtype=np.int64)
    if paired:
        first, second = tokens.digests[examples.units].T
        identical = examples.units[first == second, 0]
    packings = []
    for step in range(1, min(schedule.total_steps, PACKED_STEPS) + 1):
        lengths = examples.lengths[examples.units[schedule.units(step)].reshape(-1)]
        packings.append(
            pack(
                lengths,
                row_tokens=row_tokens,
                world_size=world_size,
                cost=cost,
                keep_pairs_together=examples.keep_pairs_together,
            )
        )
    numbers = int(tokens.groups.max()) + 1
    correct, incorrect = (
        np.bincount(tokens.groups[tokens.signs == sign], minlength=numbers) > 0 for sign in (1, -1)
    )
    _, one_per_problem = np.unique(tokens.groups[used], return_index=True)
    return Summary(
        traces=len(tokens),
        problems=int(np.sum(correct | incorrect)),
        only_positives=int(np.sum(correct & ~incorrect)),
        only_negatives=int(np.sum(incorrect & ~correct)),
        left_out=tokens.dropped | examples.left_out,
        units=len(examples.units),
        draws=schedule.draws_per_epoch,
        mixture=[
            PathDraws(mixed.path, mixed.weight, len(mixed.units), mixed.draws)
            for mixed in schedule.mixture
        ],
        paired=paired,
        lengths={
            "prompt": sum_up(prompts[one_per_problem]),
            "positive": sum_up(completions[signs > 0]),
            "negative": sum_up(completions[signs < 0]),
        },
        duplicates=len(used) - sum(map(len, distinct.values())),
        contradictions=len(np.intersect1d(distinct[1], distinct[-1], assume_unique=True)),
        identical_pairs=len(identical),
        identical_first=tokens.where(int(identical[0])) if len(identical) else None,
        truncated=int(np.sum(examples.truncated[used])),
        unknown_tokens=int(np.sum(tokens.unknown[used] > 0)),
        control_tokens=int(np.sum(tokens.control[used] > 0)),
        control_names=tuple(tokens.control_tokens),
        unread=tokens.unread | (held_out[0].unread if held_out else {}),
        unfinished=tokens.unfinished,
        document_start=tokens.document_start,
        held_out=None if held_out is None else _in_both(*held_out, tokens, used),
        steps=schedule.total_steps,
        batch=schedule.batch,
        epochs=schedule.total_steps / schedule.steps_per_epoch,
        left_over=schedule.dropped_per_epoch,
        micro_steps=float(np.mean([len(packing.rows) for packing in packings])),
        rank_efficiency=float(np.mean([packing.rank_efficiency for packing in packings])),
        rank_efficiency_bound=float(np.mean([packing.bound for packing in packings])),
        world_size=world_size,
    )


def _in_both(
    held_out: TokenizedTraces, examples: Examples, tokens: TokenizedTraces, used: np.ndarray
) -> HeldOutOverlap:
    """What is in both sets; `used` are the indices of the traces that are trained."""
    scored = np.unique(examples.units)
    _, one_per_problem = np.unique(held_out.groups[scored], return_index=True)
    prompts = held_out.prompt_digests[scored[one_per_problem]]
    trained_prompts = _distinct(tokens.prompt_digests[used])
    return HeldOutOverlap(
        traces=len(scored),
        trained_traces=int(np.isin(held_out.digests[scored], tokens.digests[used]).sum()),
        problems=len(prompts),
        trained_problems=int(np.isin(prompts, trained_prompts).sum()),
    )


def _distinct(values: np.ndarray) -> np.ndarray:
    # np.unique takes five times as long on ten million.
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]]


def sum_up(lengths: np.ndarray) -> Lengths:
    """Number, sum, percentiles and maximum of int64 [n] lengths; all 0 if there are none."""
    if not len(lengths):
        return Lengths(0, 0, (0,) * len(PERCENTILES), 0)
    percentiles = np.percentile(lengths, PERCENTILES, method="nearest")
    return Lengths(
        len(lengths), int(lengths.sum()), tuple(map(int, percentiles)), int(lengths.max())
    )


LENGTH_COLUMNS = ("tokens of a", "number", *(f"p{p}" for p in PERCENTILES), "longest", "all")


def length_rows(overview: Summary) -> list[tuple[str, ...]]:
    """The table of lengths, under LENGTH_COLUMNS."""
    return [
        (name, *(f"{n:,}" for n in (found.count, *found.percentiles, found.longest, found.total)))
        for name, found in overview.lengths.items()
        if found.count
    ]


MIXTURE_COLUMNS = ("path", "weight", "units", "drawn an epoch", "share")


def mixture_rows(overview: Summary) -> list[tuple[str, ...]]:
    """The table of what an epoch takes of each path, under MIXTURE_COLUMNS."""
    return [
        (
            one.path,
            f"{one.weight:g}",
            f"{one.units:,}",
            f"{one.draws:,}",
            f"{one.draws / overview.draws:.1%}",
        )
        for one in overview.mixture
    ]


def count_rows(overview: Summary) -> list[tuple[str, str]]:
    """The table of counts: what, how many."""
    unit = "pairs" if overview.paired else "sequences"
    rows = [("problems", f"{overview.problems:,}")]
    for what, count in (
        ("correct", overview.only_positives),
        ("incorrect", overview.only_negatives),
    ):
        if count:
            rows.append((f"- with {what} traces alone", f"{count:,}"))
    rows.append(("traces read", f"{overview.traces:,}"))
    rows += [(f"- {reason}", f"{count:,}") for reason, count in overview.left_out.items()]
    if overview.unfinished:
        rows.append(("- unfinished, trained without an end", f"{overview.unfinished:,}"))
    if overview.document_start:
        rows.append(("each document begins with", overview.document_start))
    rows += [
        (f"{unit} to train on", f"{overview.units:,}"),
        *([("- drawn in an epoch", f"{overview.draws:,}")] if overview.mixture else []),
        ("duplicates among their traces", f"{overview.duplicates:,}"),
        ("cut off, without their end", f"{overview.truncated:,}"),
        ("with text unknown to the tokenizer", f"{overview.unknown_tokens:,}"),
        ("with control tokens", f"{overview.control_tokens:,}"),
    ]
    if overview.paired:
        rows += [
            ("identical chosen and rejected", f"{overview.identical_pairs:,}"),
            ("both correct and incorrect", f"{overview.contradictions:,}"),
        ]
    if both := overview.held_out:
        rows += [
            (
                "held-out problems that are trained",
                f"{both.trained_problems:,} of {both.problems:,}",
            ),
            ("held-out traces that are trained", f"{both.trained_traces:,} of {both.traces:,}"),
        ]
    ranks = f"{overview.world_size} rank{'s' if overview.world_size > 1 else ''}"
    rows += [
        (f"steps of {overview.batch} {unit}", f"{overview.steps:,}"),
        ("epochs", f"{overview.epochs:.2f}"),
        ("left over in an epoch", f"{overview.left_over:,}"),
        ("micro-steps in a step", f"{overview.micro_steps:.1f}"),
        (f"rank efficiency, {ranks}", f"{overview.rank_efficiency:.2f}"),
    ]
    if overview.rank_efficiency_bound < 0.995:
        rows.append(("- the longest trace allows", f"{overview.rank_efficiency_bound:.2f}"))
    return rows


def show(overview: Summary, title: str, console: Console) -> None:
    """The tables: `title` says whose they are."""
    console.table(f"{title}: what is trained", LENGTH_COLUMNS, length_rows(overview))
    console.table("", ("", ""), count_rows(overview))
    if overview.mixture:
        console.table("what an epoch draws", MIXTURE_COLUMNS, mixture_rows(overview))


def unread_warnings(unread: dict[str, tuple[str, ...]]) -> list[str]:
    """One line for each file with columns that mean something but are not read."""
    return [
        f"{name}: {', '.join(columns)} {'is' if len(columns) == 1 else 'are'} not read, and the "
        "traces are used without; see docs/data.md for the columns that are read"
        for name, columns in unread.items()
    ]


def warnings(overview: Summary) -> list[str]:
    """What in the data is likely to be a mistake, one line each."""
    found = unread_warnings(overview.unread)
    if overview.identical_pairs:
        found.append(
            f"{overview.identical_pairs:,} of {overview.units:,} pairs have the same tokens as "
            f"chosen and rejected (the first: {overview.identical_first}): their two traces pull "
            "against each other"
        )
    elif overview.contradictions:
        found.append(
            f"{overview.contradictions:,} traces are used as correct and as incorrect: check the "
            "verdicts"
        )
    trained = sum(overview.lengths[name].count for name in ("positive", "negative"))
    if overview.unknown_tokens:
        found.append(
            f"{overview.unknown_tokens:,} of {trained:,} traces hold text that the tokenizer does "
            "not know: is it the tokenizer of this model?"
        )
    if overview.control_tokens:
        found.append(
            f"{overview.control_tokens:,} of {trained:,} traces spell control tokens of the "
            f"tokenizer ({', '.join(overview.control_names)}), which train as structure, not as "
            'text: [data] control_tokens = "error" refuses them'
        )
    both = overview.held_out
    if both and (both.trained_traces or both.trained_problems):
        found.append(
            f"eval.path is not all held out: {both.trained_problems:,} of its {both.problems:,} "
            f"problems have a prompt that is trained on, {both.trained_traces:,} of its "
            f"{both.traces:,} traces are themselves trained on, token for token"
        )
    if overview.duplicates * 10 > trained:
        found.append(
            f"{overview.duplicates:,} of {trained:,} traces repeat another one; [data] duplicates "
            f'= "drop" uses equal {"pairs" if overview.paired else "sequences"} once'
        )
    return found
