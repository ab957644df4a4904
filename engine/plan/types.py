"""The figures of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from redi.engine.plan.cards import Cluster


@dataclass(frozen=True)
class StepMemory:
    """The most that a rank holds at one time in a training step."""

    parts: dict[str, int]
    """Bytes by key of `PARTS`, at that time."""
    phase: str
    """When it is: "forward", "loss", "backward" or "update"."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class WorstStep:
    """The step that keeps ranks waiting most."""

    step: int
    rank_efficiency: float
    bound: float
    """What its longest sequence allows, by any packing."""


@dataclass(frozen=True)
class PackedRun:
    """How the steps of a run pack."""

    steps: int
    tokens: int
    """All tokens of all steps, as `tokens` in metrics.jsonl."""
    packed_steps: int
    """How many steps the figures below are of."""
    micro_steps: float
    """Mean."""
    most_micro_steps: int
    rank_efficiency: float
    """Mean; see `Packing`."""
    worst: WorstStep
    fullest_row: int
    """Tokens of the fullest row, which decides the memory."""
    flops: float
    """Of a step, over all ranks, recomputed ones included; mean."""
    slowest_flops: float
    """Of a step, the slowest rank of each micro-step; mean."""


@dataclass(frozen=True)
class Alternative:
    """A change that may make a run fit."""

    change: str
    peak: int
    """Bytes."""
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to on a cluster."""

    cluster: Cluster
    packing: PackedRun
    memory: StepMemory
    generating: int | None
    """Bytes while completions are generated for `[eval] checker`: weights, moments, keys and
    values; None without one."""
    card_memory: int
    """Bytes of a card that training can have: all but a reserve."""
    fits: bool
    """Whether a card holds a step, and what generating takes."""
    alternatives: list[Alternative]
    """Where it does not fit: changes that take less, each on top of those before it, up to the
    first that fits; no more ranks than a step has sequences."""
    step_seconds: float
    seconds: float
    """Of all steps: no evaluation, no checkpoints, no start."""
    tokens_per_s: float
