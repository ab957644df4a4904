"""Time of a step: its compute, the bytes it moves between GPUs, and the assumed speed of links.

FSDP2 gathers the weights of each block before its forward and again before its backward, and
reduces float32 gradients. In a ring each GPU receives (n - 1) / n of a gathered tensor from n - 1
others, and sends as much of a reduced one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from redi.engine.config.sections import ShardConfig
from redi.engine.context import key_value_copies
from redi.engine.data.packing import Cost
from redi.engine.model.flops import ModelSize

NVLINK = 450e9
"""Bytes a second that an H100 sends to the GPUs of its machine: NVIDIA's data sheet has 900 GB/s
for both directions together."""
NETWORK = 50e9
"""Bytes a second that a GPU sends to other machines: one adapter of 400 Gb/s a GPU, as in NVIDIA's
DGX H100 (user guide, ConnectX-7)."""
ACHIEVED = 0.8
"""Assumed share of these figures."""
RING_START, NVLINK_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 14e-6
"""Seconds until a ring starts, and of each of its hops: NCCL's tuning model (src/graph/tuning.cc,
ring, protocol Simple)."""
GPUS_PER_MACHINE = 8
LAUNCH_SECONDS = 650e-6
"""Shortest time of a layer's forward and backward: about 130 kernels at an assumed 5 microseconds
each. It keeps a search from rows so short that the GPU waits for the host."""
RECOMPUTED_POINTWISE = 0.02
"""Assumed share of compute that "selective" adds. The norms and activations that it recomputes are
bound by memory, not flops: some hundredths of a block."""
HOST_COPIES = 0.01
"""Assumed share of compute that offload adds: copies share memory's bandwidth with compute."""
EXCHANGED_BYTES = 2
"""Bytes of an element that context ranks exchange: bfloat16."""
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
    parameters: int,
    ranks: int,
    shard: ShardConfig,
    weight_bytes: int = 2,
    trained: int | None = None,
) -> tuple[Traffic, Traffic]:
    """Bytes within a group of shards, and between the replicas of a shard.

    Args:
        parameters: of the whole model.
        ranks: of the run; `shard.replicate` divides them.
        shard: its gather, reduce and replicate count.
        weight_bytes: bytes of a gathered weight.
        trained: parameters with a gradient; None: all.
    """
    group = ranks // shard.replicate
    others = (group - 1) / group
    gathered = weight_bytes * parameters * others
    reduced = REDUCED_BYTES * (trained or parameters) * others
    in_micro_step = in_step = 0.0
    if shard.gather == "step":
        in_step += gathered
    else:
        in_micro_step += 2 * gathered  # before forward, and before backward
    if shard.reduce == "step":
        in_step += reduced
    else:
        in_micro_step += reduced
    copies = shard.replicate
    # An all-reduce is a reduce-scatter and a gather.
    replicas = 2 * REDUCED_BYTES * (trained or parameters) / group * (copies - 1) / copies
    return Traffic(in_micro_step, in_step), Traffic(0.0, replicas)


def step_traffic(size: ModelSize, ranks: int, shard: ShardConfig) -> Traffic:
    """Seconds that the transfers of a step take.

    Within a group of several machines each GPU's adapter carries a separate ring, so a machine
    receives a tensor through all of them at once and passes it on over NVLink. Between replicas
    each GPU reduces a different shard, through its adapter.
    """
    group = ranks // shard.replicate
    within, between = step_bytes(size.parameters + size.adapter, ranks, shard, trained=size.trained)
    one_machine = group <= GPUS_PER_MACHINE
    speed = ACHIEVED * (NVLINK if one_machine else min(NVLINK, GPUS_PER_MACHINE * NETWORK))
    replica_speed = ACHIEVED * (NVLINK if ranks <= GPUS_PER_MACHINE else NETWORK)
    # A ring starts once for each block, for lm_head and for the rest.
    start = (size.layers + 2) * _ring_latency(group)
    gathers_once = shard.gather == "step"
    starts = Traffic(
        start * (2 * (not gathers_once) + (shard.reduce == "micro_step")),
        start * (gathers_once + (shard.reduce == "step"))
        + 2 * (size.layers + 2) * _ring_latency(shard.replicate),
    )
    return Traffic(
        within.micro_step / speed + starts.micro_step,
        within.step / speed + between.step / replica_speed + starts.step,
    )


def _ring_latency(ranks: int) -> float:
    """Seconds until the first byte has gone round a ring."""
    if ranks == 1:
        return 0.0
    machines = -(-ranks // GPUS_PER_MACHINE)
    between = machines if machines > 1 else 0
    return RING_START + between * NETWORK_HOP + (ranks - between) * NVLINK_HOP


def pack_seconds(
    size: ModelSize,
    shard: ShardConfig,
    flops_per_second: float,
    counts_experts: bool = False,
    only_scored: bool = False,
) -> Cost:
    """Seconds that a sequence takes: the flops of its share of a rank, and attention's exchanges.

    Compute waits for the exchanges: attention needs their results.

    Args:
        flops_per_second: of a rank.
        counts_experts: as in `ModelSize.run_cost`.
        only_scored: True if only a forward runs.
    """
    runs = size.run_cost(shard.checkpointing, counts_experts)
    passes = 2 if shard.checkpointing == "none" else 3
    if only_scored:
        runs, passes = size.scoring_cost(), 1
    speed = flops_per_second * shard.context
    return Cost(
        runs.linear / speed + exchange_seconds(size, shard, passes),
        runs.quadratic / speed,
        tuple((window, cost / speed) for window, cost in runs.windows),
        runs.trained / speed,
    )


def exchange_seconds(size: ModelSize, shard: ShardConfig, passes: int) -> float:
    """Seconds per token of a pack that the ranks of a context group exchange (`[shard] context`).

    Queries, keys, values and results go from slices to heads or back in each of the passes, which
    are forward, backward and recomputation. A rank sends all of its slice but its own share.
    """
    ranks = shard.context
    if ranks == 1:
        return 0.0
    copies = key_value_copies(size.heads, size.key_value_heads, ranks)
    query_and_result = size.attention + sum(dims for _, dims in size.windows)
    elements = query_and_result * (1 + copies * size.key_value_heads / size.heads)
    speed = ACHIEVED * (NVLINK if ranks <= GPUS_PER_MACHINE else NETWORK)
    return passes * EXCHANGED_BYTES * elements * (ranks - 1) / ranks**2 / speed


def step_seconds(compute: np.ndarray, size: ModelSize, ranks: int, shard: ShardConfig) -> float:
    """Time of a step: in each micro-step compute hides the transfers, or waits for them.

    Args:
        compute: float64 [packs], seconds of the packs that the step waits for (`pack_seconds`), one
            after the other (`slowest`).
        size: of the model.
        ranks: of the run.
        shard: what is gathered, reduced and recomputed, and when.
    """
    moved = step_traffic(size, ranks, shard)
    more = 1.0
    if shard.checkpointing == "selective":
        more += RECOMPUTED_POINTWISE
    if shard.offload:
        more += HOST_COPIES
    compute = np.maximum(more * compute, LAUNCH_SECONDS * size.layers)
    each = np.maximum(compute, moved.micro_step)
    # What moves once a step hides as far as the last micro-step has room: reductions in its
    # backward, and gathers in the forward of the first one, which is at least as long.
    room = max(0.0, compute[-1] - moved.micro_step)
    return float(each.sum() + max(0.0, moved.step - room))
