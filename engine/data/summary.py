"""Summary of the training data, shown before training starts.

It is computed from the lengths, signs and hashes in the token cache, without reading a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from redi.engine.console import Console
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.distributions import Distributions, StoreMeta
from redi.engine.data.messages import DISTRIBUTION_COLUMNS
from redi.engine.data.packing import Cost, pack, shared_by_pairs
from redi.engine.data.schedule import Examples, Schedule
from redi.engine.data.weight_counts import WeightCounts, count_weights

PERCENTILES = (5, 50, 95, 99)
MIN_LIKELY = 0.5
"""Share of a teacher's distributions that have the trace's own token among their entries; below it
there is a warning."""
PACKED_STEPS = 20
"""Number of first steps whose packing is measured."""


@dataclass(frozen=True)
class LengthStats:
    """Statistics of the lengths of one kind of sequence, in tokens."""

    count: int
    total: int
    percentiles: tuple[int, ...]
    """The percentiles of PERCENTILES."""
    longest: int


@dataclass(frozen=True)
class PathDraws:
    """Units of one entry of `[data] path` and the draws from it per epoch."""

    path: str
    weight: float
    units: int
    """Pairs, or single sequences, of this path."""
    draws: int
    """Draws of these units per epoch."""


@dataclass(frozen=True)
class HeldOutOverlap:
    """The part of the `[eval]` data that is also trained on."""

    traces: int
    """Held-out traces that are scored."""
    trained_traces: int
    """Those of `traces` that equal a trained trace, prompt and completion, token for token."""
    problems: int
    """Problems of these traces."""
    trained_problems: int
    """Those of `problems` whose prompt equals that of a trained trace, token for token."""


@dataclass(frozen=True)
class Summary:
    """The training data that results from `[data]`, `[objective]` and `[train]`."""

    traces: int
    """Traces read and tokenized, used or not."""
    problems: int
    """Problems of the traces read."""
    only_positives: int
    """Problems without a negative and thus without a pair."""
    only_negatives: int
    left_out: dict[str, int]
    """Number of rows and traces that are not trained, by reason."""
    units: int
    """Pairs, or single sequences in SFT."""
    draws: int
    """Units per epoch; a unit that is drawn twice counts twice."""
    mixture: list[PathDraws]
    """By path, if `[data] mixing_weights` are given; else empty: each unit is drawn once."""
    paired: bool
    lengths: dict[str, LengthStats]
    """For "prompt", "positive" and "negative" (completions with their end)."""
    duplicates: int
    """Used traces whose prompt and completion repeat another used one, token for token."""
    contradictions: int
    """Distinct token sequences that are used as a positive and as a negative."""
    identical_pairs: int
    """Pairs whose positive and negative have the same tokens."""
    identical_first: str | None
    """The row of the first identical pair."""
    truncated: int
    """Used traces that were truncated at a limit: their end is not trained."""
    unknown_tokens: int
    """Used traces with text that is unknown to the tokenizer."""
    control_tokens: int
    """Used traces whose text contains a control token of the tokenizer."""
    control_names: tuple[str, ...]
    """The control tokens in the text of the data."""
    token_weights: WeightCounts
    """What spans mask and weight."""
    teachers: list[StoreMeta]
    """Figures of each teacher's distributions, if the loss needs any."""
    undistilled: int
    """Used traces without a distribution, if the loss needs them."""
    unread: dict[str, tuple[str, ...]]
    """Columns with meaningful content that are not read, by file, including held-out files."""
    unfinished: int
    """Traces read that were already cut off in the data: their end is not trained."""
    document_start: str
    """The tokens at the start of each document that are not from the row; "" if there are none."""
    held_out: HeldOutOverlap | None
    """None without `[eval]`."""
    steps: int
    batch: int
    epochs: float
    """Length of training in epochs."""
    left_over: int
    """Draws of each epoch's last, incomplete batch, which are not trained."""
    micro_steps: float
    """Micro-steps per step, of the rank that has most; mean over the measured steps."""
    rank_efficiency: float
    """See `Packing`; mean over the measured steps."""
    rank_efficiency_bound: float
    """Upper bound for any packing, by each step's longest sequence; mean over the same steps."""
    world_size: int
    context: int = 1
    """Ranks that share a pack."""


def summarize(
    tokens: TokenizedTraces,
    examples: Examples,
    schedule: Schedule,
    held_out: tuple[TokenizedTraces, Examples] | None = None,
    *,
    row_tokens: int,
    world_size: int,
    cost: Cost,
    gather: str = "micro_step",
    context: int = 1,
    teacher: Distributions | None = None,
    share_prompts: bool = False,
) -> Summary:
    """Summarize the data set, its units and their packing.

    Args:
        tokens, examples, schedule: the data set, its units and their order.
        held_out: the traces of `[eval]` and the units that are scored, if any.
        row_tokens, cost, gather: as for `pack`.
        world_size, context: number of ranks, and of those that share a pack.
        teacher: distributions of the traces, if the loss needs them.
        share_prompts: whether traces share prompts in a pack.
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
        drawn = examples.units[schedule.units(step)]
        packings.append(
            pack(
                examples.lengths[drawn.reshape(-1)],
                row_tokens=row_tokens,
                world_size=max(1, world_size // context),
                cost=cost,
                keep_pairs_together=examples.keep_pairs_together,
                gather=gather,
                shared=shared_by_pairs(tokens, drawn) if share_prompts else None,
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
            "prompt": length_stats(prompts[one_per_problem]),
            "positive": length_stats(completions[signs > 0]),
            "negative": length_stats(completions[signs < 0]),
        },
        duplicates=len(used) - sum(map(len, distinct.values())),
        contradictions=len(np.intersect1d(distinct[1], distinct[-1], assume_unique=True)),
        identical_pairs=len(identical),
        identical_first=tokens.where(int(identical[0])) if len(identical) else None,
        truncated=int(np.sum(examples.truncated[used])),
        unknown_tokens=int(np.sum(tokens.unknown[used] > 0)),
        control_tokens=int(np.sum(tokens.control[used] > 0)),
        control_names=tuple(tokens.control_tokens),
        token_weights=count_weights(tokens, examples),
        teachers=[store.meta for store in teacher.stores] if teacher else [],
        undistilled=sum(not teacher.has(trace) for trace in used.tolist()) if teacher else 0,
        unread=_unread(tokens, teacher) | (held_out[0].unread if held_out else {}),
        unfinished=tokens.unfinished,
        document_start=tokens.document_start,
        held_out=None if held_out is None else _in_both(*held_out, tokens, used),
        steps=schedule.total_steps,
        batch=schedule.batch,
        epochs=schedule.total_steps / schedule.steps_per_epoch,
        left_over=schedule.dropped_per_epoch,
        micro_steps=float(np.mean([len(packing.packs) for packing in packings])),
        rank_efficiency=float(np.mean([packing.rank_efficiency for packing in packings])),
        rank_efficiency_bound=float(np.mean([packing.bound for packing in packings])),
        world_size=world_size,
        context=context,
    )


def _in_both(
    held_out: TokenizedTraces, examples: Examples, tokens: TokenizedTraces, used: np.ndarray
) -> HeldOutOverlap:
    """Count what is in both sets; `used` are the indices of the trained traces."""
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


def _unread(tokens: TokenizedTraces, teacher: Distributions | None) -> dict[str, tuple[str, ...]]:
    """The columns that nothing reads, by file; a teacher's are read from the files it names."""
    read_from = {store.meta.source for store in teacher.stores} if teacher else set()
    found = {
        name: tuple(
            column
            for column in columns
            if not (
                ", ".join(tokens.sources) in read_from
                and column.rpartition(".")[2] in DISTRIBUTION_COLUMNS
            )
        )
        for name, columns in tokens.unread.items()
    }
    return {name: columns for name, columns in found.items() if columns}


def _distinct(values: np.ndarray) -> np.ndarray:
    # np.unique takes five times as long for ten million values.
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]]


def length_stats(lengths: np.ndarray) -> LengthStats:
    """Number, sum, percentiles and maximum of int64 [n] lengths; all 0 if n is 0."""
    if not len(lengths):
        return LengthStats(0, 0, (0,) * len(PERCENTILES), 0)
    percentiles = np.percentile(lengths, PERCENTILES, method="nearest")
    return LengthStats(
        len(lengths), int(lengths.sum()), tuple(map(int, percentiles)), int(lengths.max())
    )


LENGTH_COLUMNS = ("tokens of a", "number", *(f"p{p}" for p in PERCENTILES), "longest", "all")


def length_rows(summary: Summary) -> list[tuple[str, ...]]:
    """The rows of the table of lengths; its columns are LENGTH_COLUMNS."""
    return [
        (name, *(f"{n:,}" for n in (found.count, *found.percentiles, found.longest, found.total)))
        for name, found in summary.lengths.items()
        if found.count
    ]


MIXTURE_COLUMNS = ("path", "weight", "units", "drawn per epoch", "share")


def mixture_rows(summary: Summary) -> list[tuple[str, ...]]:
    """The rows of the table of draws by path; its columns are MIXTURE_COLUMNS."""
    return [
        (
            one.path,
            f"{one.weight:g}",
            f"{one.units:,}",
            f"{one.draws:,}",
            f"{one.draws / summary.draws:.1%}",
        )
        for one in summary.mixture
    ]


def count_rows(summary: Summary) -> list[tuple[str, str]]:
    """The rows of the table of counts: label, number."""
    unit = "pairs" if summary.paired else "sequences"
    rows = [("problems", f"{summary.problems:,}")]
    for what, count in (
        ("correct", summary.only_positives),
        ("incorrect", summary.only_negatives),
    ):
        if count:
            rows.append((f"- with {what} traces alone", f"{count:,}"))
    rows.append(("traces read", f"{summary.traces:,}"))
    rows += [(f"- {reason}", f"{count:,}") for reason, count in summary.left_out.items()]
    if summary.unfinished:
        rows.append(("- unfinished, trained without an end", f"{summary.unfinished:,}"))
    if summary.document_start:
        rows.append(("each document begins with", summary.document_start))
    rows += [
        (f"{unit} to train on", f"{summary.units:,}"),
        *([("- drawn in an epoch", f"{summary.draws:,}")] if summary.mixture else []),
        ("duplicates among their traces", f"{summary.duplicates:,}"),
        ("cut off, without their end", f"{summary.truncated:,}"),
        ("with text unknown to the tokenizer", f"{summary.unknown_tokens:,}"),
        ("with control tokens", f"{summary.control_tokens:,}"),
    ]
    weights = summary.token_weights
    for what, count in (
        ("masked by spans", weights.masked - weights.filtered),
        ("weighted by spans", weights.weighted),
        ("left out by the token filter", weights.filtered),
    ):
        if count:
            rows.append((f"tokens {what}", f"{count:,} ({count / weights.tokens:.1%})"))
    for number, one in enumerate(summary.teachers, start=1):
        name = f"teacher {number}" if len(summary.teachers) > 1 else "the teacher"
        per_token = 1 / max(one.tokens, 1)
        rows += [
            (f"tokens with a distribution of {name}", f"{one.tokens:,}"),
            ("- entries of a token (K)", f"{one.kept:,}"),
            ("- probability that they have", f"{one.mass * per_token:.1%}"),
            ("- own tokens of the traces among them", f"{one.likely * per_token:.1%}"),
            ("- cached MB", f"{one.bytes / 1e6:,.1f}"),
        ]
    if summary.paired:
        rows += [
            ("identical chosen and rejected", f"{summary.identical_pairs:,}"),
            ("both correct and incorrect", f"{summary.contradictions:,}"),
        ]
    if both := summary.held_out:
        rows += [
            (
                "held-out problems that are trained",
                f"{both.trained_problems:,} of {both.problems:,}",
            ),
            ("held-out traces that are trained", f"{both.trained_traces:,} of {both.traces:,}"),
        ]
    ranks = f"{summary.world_size} rank{'s' if summary.world_size > 1 else ''}"
    if summary.context > 1:
        ranks += f", {summary.context} a pack"
    rows += [
        (f"steps of {summary.batch} {unit}", f"{summary.steps:,}"),
        ("epochs", f"{summary.epochs:.2f}"),
        ("left over in an epoch", f"{summary.left_over:,}"),
        ("micro-steps in a step", f"{summary.micro_steps:.1f}"),
        (f"rank efficiency, {ranks}", f"{summary.rank_efficiency:.2f}"),
    ]
    if summary.rank_efficiency_bound < 0.995:
        rows.append(("- the longest trace allows", f"{summary.rank_efficiency_bound:.2f}"))
    return rows


def show(summary: Summary, title: str, console: Console) -> None:
    """Print the tables; `title` names the run or recipe."""
    console.table(f"{title}: what is trained", LENGTH_COLUMNS, length_rows(summary))
    console.table("", ("", ""), count_rows(summary))
    if summary.mixture:
        console.table("what an epoch draws", MIXTURE_COLUMNS, mixture_rows(summary))


def unread_warnings(unread: dict[str, tuple[str, ...]]) -> list[str]:
    """One line for each file with meaningful columns that are not read."""
    return [
        f"{name}: {', '.join(columns)} {'is' if len(columns) == 1 else 'are'} not read, and the "
        "traces are used without them; see docs/data.md for the columns that are read"
        for name, columns in unread.items()
    ]


def warnings(summary: Summary) -> list[str]:
    """Probable mistakes in the data, one line each."""
    found = unread_warnings(summary.unread)
    if summary.identical_pairs:
        found.append(
            f"{summary.identical_pairs:,} of {summary.units:,} pairs have the same tokens as "
            f"chosen and rejected (the first: {summary.identical_first}): the loss "
            "terms of the two traces oppose each other"
        )
    elif summary.contradictions:
        found.append(
            f"{summary.contradictions:,} traces are used as correct and as incorrect: check the "
            "verdicts"
        )
    trained = sum(summary.lengths[name].count for name in ("positive", "negative"))
    if summary.unknown_tokens:
        found.append(
            f"{summary.unknown_tokens:,} of {trained:,} traces contain text that is unknown to "
            "the tokenizer: is it the tokenizer of this model?"
        )
    if summary.control_tokens:
        found.append(
            f"{summary.control_tokens:,} of {trained:,} traces contain control tokens of the "
            f"tokenizer ({', '.join(summary.control_names)}), which are trained as structure, not "
            'as text: [data] control_tokens = "error" refuses them'
        )
    both = summary.held_out
    if both and (both.trained_traces or both.trained_problems):
        found.append(
            f"eval.path is not fully held out: {both.trained_problems:,} of its {both.problems:,} "
            f"problems have a prompt that is trained on, {both.trained_traces:,} of its "
            f"{both.traces:,} traces are themselves trained on, token for token"
        )
    if summary.undistilled:
        found.append(
            f"{summary.undistilled:,} of {trained:,} traces have no distribution of a teacher: "
            "their divergence counts as 0"
        )
    for one in summary.teachers:
        if one.likely < MIN_LIKELY * one.tokens:
            found.append(
                f"{one.source}: only {one.likely / one.tokens:.1%} of the traces' own tokens are "
                "among the entries of their distributions: is it the student's tokenizer, and is "
                "each distribution that of its token?"
            )
    if summary.duplicates * 10 > trained:
        found.append(
            f"{summary.duplicates:,} of {trained:,} traces repeat another one; [data] duplicates "
            f'= "drop" uses equal {"pairs" if summary.paired else "sequences"} once'
        )
    return found
