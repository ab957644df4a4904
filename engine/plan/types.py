"""Data types of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redi.engine.plan.cards import Cluster


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of a rank in a training step."""

    parts: dict[str, int]
    """Bytes at the peak by key of `PARTS`."""
    phase: str
    """Phase of the peak: "forward", "loss", "backward" or "update"."""
    host: int = 0
    """Bytes of host memory for the inputs of blocks that are offloaded."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class WorstStep:
    """The step with the lowest rank efficiency."""

    step: int
    rank_efficiency: float
    bound: float
    """Upper bound for any packing, from the step's longest sequence."""


@dataclass(frozen=True)
class PackedRun:
    """Packing of a run's steps."""

    steps: int
    tokens: int
    """Tokens of all steps, as the sum of `tokens` in metrics.jsonl."""
    packed_steps: int
    """Number of steps that the figures below are computed from."""
    micro_steps: float
    """Per step; mean."""
    most_micro_steps: int
    rank_efficiency: float
    """Mean; see `Packing`."""
    worst: WorstStep
    fullest_pack: int
    """Tokens of the fullest pack, which determines the memory."""
    flops: float
    """Per step, over all ranks, recomputed ones included; mean."""
    slowest_flops: float
    """Per step, of the slowest rank of each micro-step, or of the slowest rank; mean."""
    seconds: float
    """Per step (`step_seconds`); mean."""


@dataclass(frozen=True)
class Fastest:
    """The fastest settings that fit, of those that were searched."""

    row_tokens: int
    shard: dict[str, Any]
    """Values of `[shard]` by key."""
    peak: int
    """Bytes of a rank with a full row."""
    seconds: float
    """Per step (`step_seconds`); mean over the sampled steps."""
    rank_efficiency: float
    """Mean over the sampled steps."""
    micro_steps: int
    """Maximum per step."""


@dataclass(frozen=True)
class Plan:
    """Estimates for a recipe on a cluster."""

    cluster: Cluster
    packing: PackedRun
    memory: StepMemory
    generating: int | None
    """Bytes while completions are generated for `[eval] checker`: weights (the shard in float32,
    all in the compute dtype), moments, keys and values; None without a checker."""
    card_memory: int
    """Bytes per GPU available to training: all except a reserve."""
    fits: bool
    """Whether a step, and generation, fit a GPU."""
    fastest: Fastest | None
    """The fastest settings whose training step fits; None if none do. Generation takes the same
    memory with all of them (`generating`)."""
    row_tokens: int
    """Of the recipe."""
    rows_are_short: bool
    """Whether the longest trace (or pair, if pairs share a pack) leaves no room in a pack, so that
    ranks wait for each other in each micro-step."""
    seconds: float
    """For all steps, without start-up, evaluation and checkpoints."""
    tokens_per_s: float
