"""liger-kernel's fused RMSNorm, RoPE and SwiGLU in place of transformers' own, on CUDA."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel


def liger_problem(device: torch.device) -> str | None:
    """Why no model can have liger-kernel's layers on this device, None if some can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def apply_liger(model: PreTrainedModel, wanted: str, device: torch.device) -> str:
    """Swap the layers of `model` in place where that is possible.

    Args:
        wanted: "auto" or "off".

    Returns:
        What was done and why, for the log.
    """
    if wanted == "off":
        return "off: asked for"
    if problem := liger_problem(device):
        return f"off: {problem}"
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"off: liger-kernel does not know {model.config.model_type}"
    # The loss is ours; for some models liger-kernel would replace torch's for the whole process.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return "on: RMSNorm, RoPE, SwiGLU"
