"""Document boundaries for attention in blocks that do not pass their keyword arguments on.

The blocks of Nemotron and StableLM are given the boundaries and drop them. Hooks take them from a
block's arguments and add them to those of its attention. Recomputation in backward calls the block
with the same arguments, so its attention gets the boundaries of the same pack.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from redi.engine.model.attention import DOCUMENT_KWARGS


def pass_boundaries(model: PreTrainedModel) -> None:
    """Add the hooks to a model's blocks, before they are checkpointed or sharded."""
    for block in model.base_model.layers:
        held: dict[str, Any] = {}
        block.register_forward_pre_hook(partial(_take, held), with_kwargs=True)
        block.self_attn.register_forward_pre_hook(partial(_add, held), with_kwargs=True)


def _take(held: dict[str, Any], _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    held.clear()
    held.update({name: kwargs[name] for name in DOCUMENT_KWARGS if name in kwargs})


def _add(
    held: dict[str, Any], _: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | held
