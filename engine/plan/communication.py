"""Bytes that a step moves between GPUs, and the assumed speed of their links.

FSDP2 gathers the weights of each block before its forward and again before its backward, and
reduces float32 gradients. In a ring each GPU receives (n - 1) / n of a gathered tensor from n - 1
others, and sends as much of a reduced one.
"""

from __future__ import annotations

from dataclasses import dataclass

from redi.engine.config.sections import ShardConfig

NVLINK = 450e9
"""Bytes a second that an H100 sends to the GPUs of its machine: NVIDIA's data sheet has 900 GB/s
for both directions together."""
NETWORK = 50e9
"""Bytes a second that a GPU sends to other machines: one adapter of 400 Gb/s a GPU, as in NVIDIA's
DGX H100 (user guide, ConnectX-7)."""
ACHIEVED = 0.8
"""Assumed share of these figures."""
GPUS_PER_MACHINE = 8
REDUCED_BYTES = 4
"""Bytes of a reduced gradient: float32 (`MixedPrecisionPolicy` in `engine.model.sharding`)."""


@dataclass(frozen=True)
class Traffic:
    """What each rank receives over its links; equal on all ranks."""

    micro_step: float
    """In each micro-step, while it computes."""
    step: float
    """Once a step."""


def step_bytes(
    parameters: int, ranks: int, shard: ShardConfig, weight_bytes: int = 2
) -> tuple[Traffic, Traffic]:
    """Bytes within a group of shards, and between the replicas of a shard.

    Args:
        parameters: of the whole model.
        ranks: of the run; `shard.replicate` divides them.
        shard: its gather, reduce and replicate count.
        weight_bytes: bytes of a gathered weight.
    """
    group = ranks // shard.replicate
    others = (group - 1) / group
    gathered = weight_bytes * parameters * others
    reduced = REDUCED_BYTES * parameters * others
    in_micro_step = in_step = 0.0
    if getattr(shard, "gather", "micro_step") == "step":
        in_step += gathered
    else:
        in_micro_step += 2 * gathered  # before forward, and before backward
    if shard.reduce == "step":
        in_step += reduced
    else:
        in_micro_step += reduced
    copies = shard.replicate
    # An all-reduce is a reduce-scatter and a gather.
    replicas = 2 * REDUCED_BYTES * parameters / group * (copies - 1) / copies
    return Traffic(in_micro_step, in_step), Traffic(0.0, replicas)


def step_traffic(parameters: int, ranks: int, shard: ShardConfig, weight_bytes: int = 2) -> Traffic:
    """Seconds that the bytes of `step_bytes` take.

    Within a group of several machines each GPU's adapter carries a ring of its own, so a machine
    receives a tensor through all of them at once and passes it on over NVLink. Between replicas
    each GPU reduces a shard of its own, through its own adapter.
    """
    within, between = step_bytes(parameters, ranks, shard, weight_bytes)
    alone = ranks <= GPUS_PER_MACHINE
    inside = ranks // shard.replicate <= GPUS_PER_MACHINE
    group = NVLINK if inside else min(NVLINK, GPUS_PER_MACHINE * NETWORK)
    replicas = NVLINK if alone else NETWORK
    return Traffic(
        within.micro_step / (ACHIEVED * group),
        within.step / (ACHIEVED * group) + between.step / (ACHIEVED * replicas),
    )
