"""FSDP2 over the student: bf16 compute and fp32 reduction over fp32 masters, sums not means."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._ops import OpOverload
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from redi.engine.config.sections import ShardConfig
from redi.engine.model.student import Student

# Results that selective checkpointing keeps: products and attention cost far more to recompute
# than to hold; all that lies between is recomputed.
KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
# CUDA's own ways, named once their packages are imported. flash-attn 4 is no op that torch knows
# of, and is recomputed.
KEPT_NAMES = {
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve `[train] dtype`: "auto" is bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def shard(
    student: Student, section: ShardConfig, dtype: torch.dtype, device: torch.device
) -> Student:
    """Recompute, compile and shard in place, in this order; on the meta device too.

    Each block is a group, so is an untied lm_head: its gradient, ready first, is reduced while the
    trunk runs backward. The root's group holds the rest: embeddings, with a tied lm_head, and the
    final norm. FSDP2 gathers the next group while one computes: in backward by itself, in forward
    because nothing there waits for the device, so the host is ahead; nothing is prefetched by hand.

    Args:
        section: its `replicate` divides the number of ranks (`check_replicas`).
    """
    world = dist.get_world_size()
    checkpoint_blocks(student.model, section.checkpointing)
    if section.compile:
        for block in student.blocks:
            block.compile()
    options: dict[str, Any] = {
        "mesh": _mesh(device, section.replicate, world),
        # Inputs stay as they are: the batch's float32 weights are no activations.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    *blocks, last = student.blocks
    for block in blocks:
        fully_shard(block, **options)
    # What backward begins with stays gathered: to free it would only be to gather it again.
    fully_shard(last, **options, reshard_after_forward=False)
    if student.head.weight is not student.model.get_input_embeddings().weight:
        fully_shard(student.head, **options, reshard_after_forward=False)
    fully_shard(student, **options)
    for module in _groups(student):
        # Denominators are global counts, so ranks are summed. gloo knows no other way.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    for name, parameter in student.named_parameters():
        # At a learning rate of 1e-6 a bf16 master would never move.
        assert parameter.dtype == torch.float32, f"master weight {name} is {parameter.dtype}"
    return student


def reshard(student: Student) -> None:
    """Free what a forward without a backward has left gathered."""
    for module in _groups(student):
        module.reshard()


def _groups(student: Student) -> list[FSDPModule]:
    return [module for module in student.modules() if isinstance(module, FSDPModule)]


def _mesh(device: torch.device, replicate: int, world: int) -> DeviceMesh:
    if replicate == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    shape = (replicate, world // replicate)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def checkpoint_blocks(model: PreTrainedModel, how: str) -> None:
    """Recompute activations of the transformer blocks in backward: "none", "selective", "full"."""
    if how == "none":
        return
    options: dict[str, Any] = {}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    block_type = type(model.base_model.layers[0])
    apply_activation_checkpointing(
        model.base_model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, **options),
        check_fn=lambda module: isinstance(module, block_type),
    )


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in KEPT_OPS or (isinstance(op, OpOverload) and op.name() in KEPT_NAMES)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
