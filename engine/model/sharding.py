"""FSDP2 of the student: fp32 masters, bf16 computation, fp32 gradient sums (not means)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from redi.engine.config.sections import ShardConfig
from redi.engine.data.context_slice import slice_tokens
from redi.engine.model.checkpointing import checkpoint_blocks
from redi.engine.model.offload import Offload
from redi.engine.model.student import Student


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve `[train] dtype`: "auto" is bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def shard(
    student: Student,
    section: ShardConfig,
    dtype: torch.dtype,
    device: torch.device,
    row_tokens: int,
) -> Student:
    """Apply checkpointing, compilation and sharding in place, in this order. Works on meta tensors.

    Each block is a group. An untied lm_head is a group too, so that its gradient, which is ready
    first, is reduced during the trunk's backward. The root's group has the rest: embeddings (with a
    tied lm_head) and the final norm. FSDP2 gathers the next group while one computes: explicitly in
    backward, and in forward because the host, which never waits for the device, runs ahead. So no
    prefetching is configured.

    Args:
        student: on any device.
        section: its `replicate` divides the number of ranks (`check_replicas`).
        dtype: of computation.
        device: its type selects the mesh.
        row_tokens: most tokens of a pack.
    """
    world = dist.get_world_size()
    if section.offload:
        tokens = slice_tokens(row_tokens, section.context)
        student.offload = Offload(len(student.blocks), device, tokens)
    checkpoint_blocks(student.model, section.checkpointing, student.offload)
    if section.compile:
        for block in student.blocks:
            block.compile()
    options: dict[str, Any] = {
        "mesh": _mesh(device, section.replicate, world),
        # Inputs are not cast: the batch's float32 weights are not activations.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    *blocks, last = student.blocks
    for block in blocks:
        fully_shard(block, **options)
    # Backward needs the last block and lm_head first, so they stay gathered after forward.
    fully_shard(last, **options, reshard_after_forward=False)
    if student.head.weight is not student.model.get_input_embeddings().weight:
        fully_shard(student.head, **options, reshard_after_forward=False)
    fully_shard(student, **options)
    register_fsdp_forward_method(student, "expert_counts")
    for module in _groups(student):
        # Sum over ranks, because denominators are global counts. gloo supports only sums.
        module.set_force_sum_reduction_for_comms(True)
        if world > 1:  # one rank would divide all gradients by the factor, into a copy
            module.set_gradient_divide_factor(1.0)
    for name, parameter in student.named_parameters():
        # A bf16 master would round away updates at a learning rate of 1e-6.
        is_master = parameter.dtype == torch.float32 or not parameter.requires_grad
        assert is_master, f"master weight {name} is {parameter.dtype}"
    return student


def reduce_in_place(student: Student) -> None:
    """Give a single rank's reductions one buffer. Only on a CPU: on CUDA two streams use it.

    Not part of `shard`, since a plan for one GPU shards on the CPU too.
    """
    for module in _groups(student):
        module.set_custom_reduce_scatter(_InPlace())  # type: ignore[arg-type]


class _InPlace:
    """The reduction of a single rank: its output is its input, so FSDP2's copy does nothing.

    FSDP2 allocates the input first.
    """

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None

    def allocate(
        self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The input, then the output."""
        if self._input is None:
            self._input = torch.empty(size, dtype=dtype, device=device)
            return self._input
        output, self._input = self._input, None
        return output


def reshard(student: Student) -> None:
    """Free weights that are still gathered after a forward without a backward."""
    for module in _groups(student):
        module.reshard()


@contextmanager
def gather_once(student: Student) -> Iterator[None]:
    """Keep each group gathered from its first use in this block until the block ends.

    Every rank must run a forward inside. All gathers then take place in a rank's first one, in the
    same order on all ranks, so that the number of further ones may differ. Gradients must be
    reduced in the last backward alone (`set_requires_gradient_sync`).
    """
    _set_reshard(student, False)
    try:
        yield
    finally:
        _set_reshard(student, True)
        reshard(student)


def _set_reshard(student: Student, value: bool) -> None:
    """Whether blocks are resharded after forward, and all groups after backward.

    The groups of the last block, an untied head and the root always stay gathered after forward.
    """
    for module in _groups(student):
        module.set_reshard_after_backward(value, recurse=False)
    for block in student.blocks[:-1]:
        assert isinstance(block, FSDPModule)
        block.set_reshard_after_forward(value, recurse=False)


def _groups(student: Student) -> list[FSDPModule]:
    return [module for module in student.modules() if isinstance(module, FSDPModule)]


def _mesh(device: torch.device, replicate: int, world: int) -> DeviceMesh:
    if replicate == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    shape = (replicate, world // replicate)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
