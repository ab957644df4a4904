"""What ran in a student's first forward: counted, not inferred from what was chosen.

A model can drop its attention function without an error (transformers then builds a dense [T, T]
mask), and only the time and the memory show it. So the first forward of each process counts.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from redi.engine.errors import InputError
from redi.engine.model.attention import recording_calls

Out = TypeVar("Out")


@dataclass(frozen=True)
class Ran:
    """What a process ran in its first forward."""

    attention: str
    """Kind of the packed attention, as `choose_attention` names it."""
    attention_calls: int
    """How often it was called: once a layer."""
    loss: dict[str, list[str]]
    """Backends by loss op."""
    liger: dict[str, int]
    """Modules that run liger-kernel's forward, by class; "rope" where its RoPE is used."""

    def text(self) -> str:
        """For the log."""
        loss = ", ".join(f"{op} ({', '.join(names)})" for op, names in self.loss.items())
        liger = ", ".join(f"{count} {name}" for name, count in self.liger.items())
        return (
            f"attention {self.attention} in {self.attention_calls} layers; loss {loss}; "
            f"liger-kernel {liger or 'off'}"
        )


class _LossOps(TorchDispatchMode):
    """Records the backend that each op of `redi.kernels` is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.backends: dict[str, list[str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "redi":
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | kwargs
            if "backend" in given:
                found = self.backends.setdefault(func._schema.name.removeprefix("redi::"), [])
                if given["backend"] not in found:
                    found.append(given["backend"])
        return func(*args, **kwargs)


def watch(model: PreTrainedModel, forward: Callable[[], Out]) -> tuple[Out, Ran]:
    """Call a student's `forward`, and count what it runs.

    Compiled blocks run uncompiled meanwhile: a graph would not show its calls.

    Raises:
        InputError: a layer ran another attention than the packed one.
    """
    ops = _LossOps()
    with recording_calls() as calls, torch.compiler.set_stance("force_eager"), ops:
        out = forward()
    layers = model.base_model.layers
    if len(calls) != len(layers) or len(set(calls)) != 1:
        others = Counter(_attention_name(layer) for layer in layers)
        listed = ", ".join(f"{count} of {name}" for name, count in others.items())
        raise InputError(
            f"model.path: {type(model).__name__}: packed attention ran in {len(calls)} of "
            f"{len(layers)} layers (configured: {listed}); it cannot be trained on packed rows"
        )
    # The plain reference is no op.
    loss = ops.backends or {"plain PyTorch": ["reference"]}
    return out, Ran(calls[0], len(calls), loss, liger_layers(model))


def liger_layers(model: PreTrainedModel) -> dict[str, int]:
    """Modules whose forward is liger-kernel's, counted by class; and whether RoPE is."""
    found = Counter(
        type(module).__name__ for module in model.modules() if _is_liger(module.forward)
    )
    code = sys.modules[type(model).__module__]
    if _is_liger(getattr(code, "apply_rotary_pos_emb", None)):
        found["rope"] = 1
    return dict(found)


def _is_liger(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("liger_kernel")


def _attention_name(layer: Any) -> str:
    config = getattr(layer.self_attn, "config", None)
    return str(getattr(config, "_attn_implementation", "an attention without configuration"))
