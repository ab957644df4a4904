"""The cards that a run is planned for: figures of data sheets, and what is assumed of them."""

from __future__ import annotations

from dataclasses import dataclass

from redi.engine.errors import InputError


@dataclass(frozen=True)
class Card:
    """What an estimate must know of a GPU."""

    peak_flops: float
    """bfloat16 flops a second, by NVIDIA's data sheets; dense, half of what they give with
    sparsity."""
    memory: int
    """Bytes that torch finds on it, as users' out-of-memory messages tell them."""
    processors: int
    """Streaming multiprocessors."""
    architecture: str
    """As `redi.kernels.experimental.launches.architecture_of` names it."""


CARDS = {
    "a100": Card(312e12, int(79.15 * 2**30), 108, "sm_80"),
    "h100": Card(989e12, int(79.1 * 2**30), 132, "sm_90"),
    "h200": Card(989e12, int(139.8 * 2**30), 132, "sm_90"),
    "b200": Card(2250e12, int(178.35 * 2**30), 148, "sm_100"),
}
"""SXM versions; the A100 with 80 GB."""

MFU = 0.35
"""Share of the peak that is assumed where nobody says another. torchtitan's docs/performance.md has
33-39 % for Llama 3.1 8B under FSDP2 on H100s, 52-58 % for Llama 3 on A100s, whose peak is lower."""


@dataclass(frozen=True)
class Cluster:
    """What the run is planned for."""

    ranks: int
    card: str
    """A key of `CARDS`."""
    mfu: float
    """Share of the card's peak, of all flops that are run."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise InputError(f"ranks must be >= 1, got {self.ranks}")
        if self.card not in CARDS:
            raise InputError(f"card: {self.card} is not known; there are {', '.join(CARDS)}")
        if not 0 < self.mfu <= 1:
            raise InputError(f"mfu, a share of the peak, must lie in (0, 1], got {self.mfu:g}")

    @property
    def figures(self) -> Card:
        """Peak and memory of a card."""
        return CARDS[self.card]
