"""Print a plan as tables."""

from __future__ import annotations

from redi.engine.console import Console
from redi.engine.plan.cards import RESERVE
from redi.engine.plan.memory_tracker import PARTS
from redi.engine.plan.types import Fastest, Plan

LOW_EFFICIENCY = 0.8
"""Below this rank efficiency, a warning explains why ranks wait."""
SHORT_ROWS = 0.97
"""The same, if rows have no room for more than the longest trace."""


def show_plan(plan: Plan, title: str, console: Console) -> None:
    """Print packing, memory and time, and whether the run fits."""
    name = f"{plan.cluster.ranks} x {plan.cluster.card}"
    console.table(f"{title}: packing and time on {name}", ("", ""), _run_rows(plan))
    unit, size = ("GiB", 2**30) if plan.memory.total >= 2**30 else ("MiB", 2**20)
    console.table(
        f"{title}: peak memory per GPU, reached in the {plan.memory.phase} phase",
        ("", unit),
        [(what, f"{count / size:,.2f}") for what, count in _memory_rows(plan)],
    )
    _warn_of_waiting(plan, title, console)
    if plan.fits:
        console.say(f"{title}: fits {name}")
    else:
        console.warn(f"{title}: does not fit {name}")
    what = "settings that fit"
    if plan.generating is not None and plan.generating > plan.card_memory:
        what = "settings whose training steps fit"
        console.warn(
            f"{title}: generation for eval.checker does not fit, whatever the settings; lower "
            "eval.batch_size, or leave eval.checker out and run `redi evaluate` on exports"
        )
    if plan.fastest is None:
        console.warn(
            f"{title}: no setting of train.row_tokens and [shard] fits; use more ranks, a GPU with "
            "more memory, or shorter traces"
        )
        return
    best = plan.fastest
    console.say(
        f"{title}: the fastest {what}, at {best.seconds:,.3g} s per step (mean of a sample), rank "
        f"efficiency {best.rank_efficiency:.3f} and {best.peak / size:,.1f} {unit} with a full "
        f"row:\n\n{recipe_lines(best)}"
    )


def recipe_lines(best: Fastest) -> str:
    """The settings as lines of a recipe."""
    import tomli_w

    content = {"train": {"row_tokens": best.row_tokens}, "shard": best.shard}
    return tomli_w.dumps(content)


def _warn_of_waiting(plan: Plan, title: str, console: Console) -> None:
    """Say why ranks wait, if they do."""
    efficiency, ranks = plan.packing.rank_efficiency, plan.cluster.ranks
    if plan.rows_are_short and ranks > 1 and efficiency < SHORT_ROWS:
        console.warn(
            f"{title}: train.row_tokens = {plan.row_tokens:,} is no longer than the longest trace, "
            f"so ranks wait for it ({1 - efficiency:.1%} of the time); longer rows balance better"
        )
    elif efficiency < LOW_EFFICIENCY:
        console.warn(
            f"{title}: ranks compute {efficiency:.0%} of the time and otherwise wait for the "
            "longest traces; use fewer ranks or a larger train.batch"
        )


def _run_rows(plan: Plan) -> list[tuple[str, str]]:
    packing, worst = plan.packing, plan.packing.worst
    rows = [
        ("steps", f"{packing.steps:,}"),
        ("tokens", f"{packing.tokens:,}"),
        ("tokens of the fullest pack", f"{packing.fullest_pack:,}"),
        ("micro-steps per step", f"{packing.micro_steps:.2f}"),
        ("- maximum", f"{packing.most_micro_steps}"),
        ("rank efficiency", f"{packing.rank_efficiency:.3f}"),
        (f"- lowest, in step {worst.step}", f"{worst.rank_efficiency:.3f}"),
        ("- its bound from the longest trace", f"{worst.bound:.3f}"),
        ("PFLOP per step, including recomputation", f"{packing.flops / 1e15:,.3g}"),
        ("fraction of peak (assumed, not measured: --mfu)", f"{plan.cluster.mfu:g}"),
        ("seconds per step", f"{plan.packing.seconds:,.3g}"),
        ("tokens/s", f"{plan.tokens_per_s:,.0f}"),
        ("time, without evaluation and checkpoints", _duration(plan.seconds)),
        ("GPU hours", f"{plan.seconds / 3600 * plan.cluster.ranks:,.3g}"),
    ]
    if packing.packed_steps < packing.steps:
        rows.insert(3, ("steps packed for this plan, evenly spaced", f"{packing.packed_steps:,}"))
    return rows


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _memory_rows(plan: Plan) -> list[tuple[str, int]]:
    parts = plan.memory.parts.items()
    rows = [
        *((PARTS[name], size) for name, size in parts if size > plan.memory.total / 1000),
        ("total", plan.memory.total),
    ]
    if plan.memory.host:
        rows.append(("host memory per GPU of offloaded inputs", plan.memory.host))
    if plan.generating is not None:
        rows.append(("during generation for eval.checker", plan.generating))
    card = f"available per GPU, less {RESERVE:.0%} for CUDA, NCCL and gaps (assumed)"
    return [*rows, (card, plan.card_memory)]
