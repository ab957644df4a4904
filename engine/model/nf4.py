"""Frozen weights of 4 bits a value for an adapter (QLoRA, arXiv 2305.14314), by bitsandbytes.

A weight is kept as NF4 codes, two in a byte, with a float32 scale for each block of 64 values of a
row. Both are parameters of bytes: FSDP2 shards them by rows and gathers them as they are, without a
cast, and codes do not depend on the number of ranks. A product gathers and keeps the bytes alone,
and computes the weight from them in forward and again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from redi.engine.errors import InputError

BLOCK = 64
SCALES = "scales"
"""Name of a layer's second parameter."""


class Nf4Linear(nn.Linear):
    """A linear layer whose frozen weight has 4 bits a value.

    Args:
        layer: has shape, dtype of the bias, and device; its weight has no values yet.

    Attributes:
        weight: codes, uint8 [outputs, inputs / 2].
        scales: bytes of the scales, uint8 [outputs, 4 * inputs / 64].
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        for name, size in (("weight", self.in_features // 2), (SCALES, self.in_features // 16)):
            content = layer.weight.new_empty(self.out_features, size, dtype=torch.uint8)
            self.register_parameter(name, nn.Parameter(content, requires_grad=False))
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        product = _Product.apply(input, self.weight, self.scales)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(input, dequantized(codes, scales, input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (codes, scales) = gradients, ctx.saved_tensors
        return gradient @ dequantized(codes, scales, gradient.dtype), None, None


def quantize_blocks(model: PreTrainedModel) -> str:
    """Replace the linear layers of blocks in place, but for those of an adapter.

    Args:
        model: on the meta device.

    Returns:
        How many, for the log.

    Raises:
        InputError: bitsandbytes is not installed, or no layer can be quantized.
    """
    try:
        import bitsandbytes  # noqa: F401, registers its operations
    except ImportError:
        raise InputError(
            "adapter.base: bitsandbytes is not installed: pip install 'redi-engine[bitsandbytes]'"
        ) from None
    linear = list(_linear_layers(model.base_model.layers))
    for parent, name, layer in linear:
        if layer.in_features % BLOCK == 0:
            setattr(parent, name, Nf4Linear(layer))
    count = sum(isinstance(getattr(parent, name), Nf4Linear) for parent, name, _ in linear)
    if not count:
        raise InputError(
            f"adapter.base: no linear layer of a block has a multiple of {BLOCK} inputs, the size "
            "of a block of NF4; remove it"
        )
    return f"{count} of {len(linear)} linear layers"


def _linear_layers(blocks: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Plain linear layers with their parents and names, without those of an adapter."""
    for path, parent in blocks.named_modules():
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and ".lora_" not in path:
                yield parent, name, layer


def stand_in(codes: Tensor, scales: Tensor) -> Tensor:
    """A tensor without memory in place of a weight that `fill` quantizes.

    Args:
        codes, scales: the parameters of an `Nf4Linear`, sharded or not.
    """
    weight = torch.empty(codes.shape[0], 2 * codes.shape[1], device="meta")
    weight.nf4 = codes, scales  # type: ignore[attr-defined]
    return weight


def fill(codes: Tensor, scales: Tensor, rows: Tensor) -> None:
    """Quantize rows of a weight into this rank's shard of the parameters."""
    rows = rows.to(codes.device, torch.float32)
    packed, maxima = torch.ops.bitsandbytes.quantize_4bit(rows, BLOCK, "nf4", torch.uint8)
    codes.copy_(packed.view(codes.shape))
    scales.copy_(maxima.view(torch.uint8).view(scales.shape))


def dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [outputs, inputs] from the parameters of an `Nf4Linear`."""
    shape = [codes.shape[0], 2 * codes.shape[1]]
    maxima = scales.view(torch.float32).view(-1)
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes.view(-1, 1), maxima, BLOCK, "nf4", shape, dtype
    )
