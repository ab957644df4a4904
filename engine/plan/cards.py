"""GPUs that a run can be planned for: data sheet figures, and the assumed utilization."""

from __future__ import annotations

from dataclasses import dataclass

from redi.engine.errors import InputError

RESERVE = 0.1
"""Fraction of GPU memory reserved for CUDA, NCCL, cuBLAS and the allocator's gaps (assumed)."""


@dataclass(frozen=True)
class Card:
    """Properties of a GPU that the estimate needs."""

    peak_flops: float
    """Dense bfloat16 flops per second by NVIDIA's data sheets (half the figure with sparsity)."""
    memory: int
    """Bytes available to torch, taken from out-of-memory messages that users posted."""
    processors: int
    """Number of streaming multiprocessors."""
    architecture: str
    """Name as returned by `redi.kernels.experimental.launches.architecture_of`."""
    names: tuple[str, ...]
    """Names as returned by `torch.cuda.get_device_name`. Whole names, because variants (PCIe, NVL,
    40 GB, a MIG slice) have other figures."""

    @property
    def usable_memory(self) -> int:
        """Bytes available to training: all except `RESERVE`."""
        return int((1 - RESERVE) * self.memory)


CARDS = {
    "a100": Card(
        312e12, int(79.15 * 2**30), 108, "sm_80", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB")
    ),
    "h100": Card(989e12, int(79.1 * 2**30), 132, "sm_90", ("NVIDIA H100 80GB HBM3",)),
    "h200": Card(989e12, int(139.8 * 2**30), 132, "sm_90", ("NVIDIA H200",)),
    "b200": Card(2250e12, int(178.35 * 2**30), 148, "sm_100", ("NVIDIA B200",)),
}
"""SXM versions; the A100 has 80 GB."""


def card_of(device_name: str) -> str | None:
    """The key in `CARDS` of a device by its name, or None if its figures are not known."""
    return next((key for key, card in CARDS.items() if device_name in card.names), None)


MFU = 0.35
"""Default fraction of the peak. torchtitan's docs/performance.md has 33-39 % for Llama 3.1 8B under
FSDP2 on H100s, and 52-58 % for Llama 3 on A100s, whose peak is lower."""


@dataclass(frozen=True)
class Cluster:
    """GPUs that the run is planned for."""

    ranks: int
    card: str
    """A key of `CARDS`."""
    mfu: float
    """Assumed fraction of the peak, counting all flops, recomputed ones included."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise InputError(f"ranks must be >= 1, got {self.ranks}")
        if self.card not in CARDS:
            raise InputError(f"card: {self.card} is not known; available: {', '.join(CARDS)}")
        if not 0 < self.mfu <= 1:
            raise InputError(f"mfu, a fraction of the peak, must be in (0, 1], got {self.mfu:g}")

    @property
    def figures(self) -> Card:
        """Properties of the GPU."""
        return CARDS[self.card]

    @property
    def flops_per_second(self) -> float:
        """Assumed speed of a GPU, recomputed flops included."""
        return self.mfu * self.figures.peak_flops
