"""A plan as tables."""

from __future__ import annotations

from redi.engine.console import Console
from redi.engine.plan.memory import RESERVE
from redi.engine.plan.memory_tracker import PARTS
from redi.engine.plan.types import Plan

LOW_EFFICIENCY = 0.8
"""Below this rank efficiency a word on why ranks wait is due."""


def show_plan(plan: Plan, title: str, console: Console) -> None:
    """Packing, memory and time as tables, and whether it fits."""
    name = f"{plan.cluster.ranks} x {plan.cluster.card}"
    console.table(f"{title}: packing and time on {name}", ("", ""), _run_rows(plan))
    unit, size = ("GiB", 2**30) if plan.memory.total >= 2**30 else ("MiB", 2**20)
    console.table(
        f"{title}: memory of each card at its peak, in the {plan.memory.phase}",
        ("", unit),
        [(what, f"{count / size:,.2f}") for what, count in _memory_rows(plan)],
    )
    if plan.packing.rank_efficiency < LOW_EFFICIENCY:
        console.warn(
            f"{title}: ranks compute {plan.packing.rank_efficiency:.0%} of the time and wait for "
            "the longest traces in the rest: take fewer ranks or a larger train.batch"
        )
    if plan.fits:
        console.say(f"{title}: fits {name}")
        return
    console.warn(f"{title}: does not fit {name}")
    if plan.generating is not None and plan.generating > plan.card_memory:
        console.warn(f"{title}: generating for eval.checker: lower eval.batch_size")
    if plan.memory.total <= plan.card_memory:
        return
    console.table(
        "changes, each with those above it",
        ("", unit, ""),
        [
            (found.change, f"{found.peak / size:,.2f}", "fits" if found.fits else "does not fit")
            for found in plan.alternatives
        ],
    )
    if not any(found.fits for found in plan.alternatives):
        console.warn(
            f"{title}: none of these is enough: take a larger card, shorter traces, or more ranks "
            "with a larger train.batch to keep them busy"
        )


def _run_rows(plan: Plan) -> list[tuple[str, str]]:
    packing, worst = plan.packing, plan.packing.worst
    rows = [
        ("steps", f"{packing.steps:,}"),
        ("tokens", f"{packing.tokens:,}"),
        ("tokens of the fullest row", f"{packing.fullest_row:,}"),
        ("micro-steps in a step", f"{packing.micro_steps:.2f}"),
        ("- at most", f"{packing.most_micro_steps}"),
        ("rank efficiency", f"{packing.rank_efficiency:.3f}"),
        (f"- of step {worst.step}, the worst", f"{worst.rank_efficiency:.3f}"),
        ("- its longest trace allows", f"{worst.bound:.3f}"),
        ("PFLOP in a step, with recomputed ones", f"{packing.flops / 1e15:,.3g}"),
        ("share of the peak (assumed, not measured: --mfu)", f"{plan.cluster.mfu:g}"),
        ("seconds a step", f"{plan.step_seconds:,.3g}"),
        ("tokens/s", f"{plan.tokens_per_s:,.0f}"),
        ("time, without evaluation and checkpoints", _duration(plan.seconds)),
        ("card hours", f"{plan.seconds / 3600 * plan.cluster.ranks:,.3g}"),
    ]
    if packing.packed_steps < packing.steps:
        rows.insert(3, ("steps packed here, evenly spread", f"{packing.packed_steps:,}"))
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
        ("in all", plan.memory.total),
    ]
    if plan.generating is not None:
        rows.append(("while generating for eval.checker", plan.generating))
    card = f"of a card, less {RESERVE:.0%} for CUDA, NCCL and gaps (assumed)"
    return [*rows, (card, plan.card_memory)]
