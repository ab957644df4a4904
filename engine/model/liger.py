"""liger-kernel's fused RMSNorm, RoPE and SwiGLU in place of transformers' own, on CUDA."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel


def liger_problem(device: torch.device) -> str | None:
    """Why liger-kernel cannot be used on this device, or None if it can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def apply_liger(model: PreTrainedModel, wanted: str, device: torch.device) -> str:
    """Replace layers of `model` in place, if possible.

    Args:
        wanted: "auto" or "off".

    Returns:
        Result and reason, for the log.
    """
    if wanted == "off":
        return "off: requested"
    if problem := liger_problem(device):
        return f"off: {problem}"
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"off: liger-kernel does not support {model.config.model_type}"
    # The loss is not replaced: for some models liger-kernel replaces torch's in the whole process.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return "on: RMSNorm, RoPE, SwiGLU"
