"""Training in float8 by torchao: products of the blocks' linear layers with 8-bit inputs.

Each row of inputs, weights and output gradients has its own scale, and the gradient of a weight is
computed in the compute dtype (torchao's recipe "rowwise_with_gw_hp"). So a token's result does not
depend on the tokens it is packed with, and gradients of packs add up. lm_head, embeddings, stacked
experts and all weights between steps stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from redi.engine.config.sections import Recipe
from redi.engine.errors import InputError
from redi.engine.extras import check_installed

MULTIPLE = 16
"""Of both sizes of a layer's weight: GPUs have no other products in float8."""
CAPABILITY = (9, 0)
"""Of the first GPUs with scales for rows (H100)."""


def check_fp8(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError if the recipe wants float8 and it is not available, before data is read."""
    if not recipe.train.fp8:
        return
    if recipe.adapter.wanted:
        raise InputError(
            "train.fp8 is for training all weights, and [adapter] freezes them; remove one of them"
        )
    check_installed("torchao", "train.fp8")
    if device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise InputError(f"train.fp8 needs an H100 or a newer GPU, got {name}; remove it")
    if dtype != torch.bfloat16:
        raise InputError('train.fp8 needs train.dtype = "bfloat16"')


def use_fp8(model: PreTrainedModel, device: torch.device) -> str:
    """Replace the linear layers of blocks in place. They keep their parameters.

    Args:
        model: on any device, not sharded.
        device: on which it will compute; without float8 products (a CPU) they are emulated.

    Returns:
        Which layers, for the log.

    Raises:
        InputError: there is none to replace.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    blocks = model.base_model.layers
    linear = [m for m in blocks.modules() if isinstance(m, nn.Linear)]
    emulated = device.type != "cuda"
    config = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    convert_to_float8_training(
        blocks,
        module_filter_fn=lambda module, _: _fits(module),
        config=replace(config, emulate=emulated),
    )
    count = sum(map(_fits, linear))
    if not count:
        raise InputError(
            "train.fp8: no linear layer of a block has sizes that are multiples of "
            f"{MULTIPLE}; remove it"
        )
    return f"{count} of {len(linear)} linear layers" + (" (emulated)" if emulated else "")


def _fits(module: nn.Linear) -> bool:
    return not any(size % MULTIPLE for size in module.weight.shape)
