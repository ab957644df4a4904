"""Activation checkpointing of the blocks: what a block keeps for backward, and what it recomputes.

- none: keeps all that backward needs.
- selective: keeps the results of matrix products and attention; recomputes norms, activations,
  rotary embeddings.
- attention: keeps its input, and attention's result with its log-sum-exp; recomputes the rest, also
  the queries, keys and values that attention's backward reads.
- full: keeps its input; recomputes all, also attention.

The gradient is bit-equal in all modes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch._ops import OpOverload
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from redi.engine.model.offload import Offload, OffloadedBlock

# Attention's forwards. Their results include the log-sum-exp that their backward needs. By name,
# because those of flash-attn exist only after its import.
ATTENTION_OPS = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",  # of releases in which the former is no op
}

PRODUCTS = {"aten::mm", "aten::addmm"}

# Products with the stacked weights of a mixture's experts.
GROUPED = {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}

# Ops whose results are kept. Recomputing all others costs little time.
KEPT_OPS = {"attention": ATTENTION_OPS, "selective": ATTENTION_OPS | PRODUCTS | GROUPED}

# Kinds of attention that are no registered op, so that their results cannot be kept.
NOT_KEPT = {"flash-4"}


def checkpoint_blocks(model: PreTrainedModel, how: str, offload: Offload | None = None) -> None:
    """Wrap the blocks of a model in place.

    Args:
        model: the model.
        how: a value of `[shard] checkpointing`.
        offload: makes the copies if the inputs of blocks are offloaded.
    """
    if how == "none":
        return
    options: dict[str, Any] = {}
    if how in KEPT_OPS:
        policy = partial(_policy, _kept_ops(model, how))
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    blocks = model.base_model.layers
    for index, block in enumerate(blocks):
        if offload is None:
            blocks[index] = checkpoint_wrapper(block, **options)
        else:
            blocks[index] = OffloadedBlock(block, index, offload, **options)


def _kept_ops(model: PreTrainedModel, how: str) -> set[str]:
    # transformers adds the bias of experts (gpt-oss) to their product in place: it cannot be kept.
    biased = any(getattr(module, "has_bias", False) for module in model.modules())
    return KEPT_OPS[how] - GROUPED if biased else KEPT_OPS[how]


def _policy(kept: set[str], _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = isinstance(op, OpOverload) and op.name() in kept
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
