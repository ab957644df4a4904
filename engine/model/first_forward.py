"""Record of a student's first forward: which attention and loss kernels ran, counted.

A model can ignore its attention function without an error. transformers then builds a dense [T, T]
mask, which shows only in time and memory. So the first forward of each process counts the calls.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from redi.engine.errors import InputError
from redi.engine.model.adapter import counting_adapters
from redi.engine.model.attention import recording_calls
from redi.engine.model.mixers import has_attention, mixer_of, split_calls

Out = TypeVar("Out")


@dataclass(frozen=True)
class ForwardRecord:
    """What a process ran in its first forward."""

    attention: str
    """Kind of the packed attention, a name returned by `choose_attention`."""
    attention_calls: int
    """Number of its calls: one per layer."""
    context_ranks: int
    """Ranks that shared the heads of attention, and the tokens of the pack."""
    windows: dict[str, int]
    """Number of calls by sliding window, in tokens; without those that have none."""
    mixers: int
    """Number of linear attentions, state spaces and convolutions, run document by document."""
    loss: dict[str, list[str]]
    """Names of backends, by loss op."""
    liger: dict[str, int]
    """Number of modules with liger-kernel's forward, by class; "rope" if its RoPE is used."""
    adapter: dict[str, int]
    """Number of layers that ran with an adapter, by name; empty without one."""
    linear: dict[str, int]
    """Number of linear layers that ran in float8 or with NF4 weights, by class."""
    shared_prompts: bool = False
    """True if traces of its pack shared a prompt."""
    routers: int = 0
    """Number of routers whose load-balancing loss is trained."""

    def text(self) -> str:
        """One line for the log."""
        windows = "".join(
            f" ({count} with a window of {tokens})" for tokens, count in self.windows.items()
        )
        mixers = f", {self.mixers} mixers document by document" if self.mixers else ""
        loss = ", ".join(f"{op} ({', '.join(names)})" for op, names in self.loss.items())
        liger = ", ".join(f"{count} {name}" for name, count in self.liger.items())
        adapter = ", ".join(f"{count} {name}" for name, count in self.adapter.items())
        shared = f", shared by {self.context_ranks} ranks" if self.context_ranks > 1 else ""
        prompts = " with shared prompts" if self.shared_prompts else ""
        linear = "".join(f"; {count} {name}" for name, count in self.linear.items())
        return (
            f"attention {self.attention} in {self.attention_calls} layers{prompts}{windows}{shared}"
            f"{mixers}; "
            f"loss {loss}; liger-kernel {liger or 'off'}"
            + (f"; adapter on {adapter}" if adapter else "")
            + (f"; loss of {self.routers} routers" if self.routers else "")
            + linear
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


def record_forward(model: PreTrainedModel, forward: Callable[[], Out]) -> tuple[Out, ForwardRecord]:
    """Call a student's `forward` and count what it runs.

    Compiled blocks run uncompiled meanwhile, because calls inside a graph cannot be counted.

    Raises:
        InputError: a layer did not run packed attention.
    """
    ops = _LossOps()
    with (
        recording_calls() as found,
        counting_adapters(model) as adapted,
        _counting(model, ("Float8Linear", "Nf4Linear")) as linear,
        torch.compiler.set_stance("force_eager"),
        ops,
    ):
        out = forward()
    layers = model.base_model.layers
    calls, by_document = split_calls(found)
    kinds = {call.kind for call in calls}
    attending = sum(map(has_attention, layers))
    mixers = sum(mixer_of(layer) is not None for layer in layers)
    if len(by_document) != mixers:
        raise InputError(
            f"model.path: {type(model).__name__}: {len(by_document)} of {mixers} mixers ran "
            "document by document; it cannot be trained on packs"
        )
    if len(calls) != attending or len(kinds) != 1:
        others = Counter(_attention_name(layer) for layer in layers if has_attention(layer))
        listed = ", ".join(f"{count} of {name}" for name, count in others.items())
        raise InputError(
            f"model.path: {type(model).__name__}: packed attention ran in {len(calls)} of "
            f"{attending} layers (configured: {listed}); it cannot be trained on packs"
        )
    # The plain reference backend is not an op.
    loss = ops.backends or {"plain PyTorch": ["reference"]}
    windows = Counter(str(call.pattern.window) for call in calls if call.pattern.window is not None)
    return out, ForwardRecord(
        attention=kinds.pop(),
        attention_calls=len(calls),
        context_ranks=min(call.context_ranks for call in calls),
        windows=dict(windows),
        mixers=mixers,
        loss=loss,
        liger=liger_layers(model),
        adapter=dict(adapted),
        linear=dict(linear),
        shared_prompts=any(call.shares_prompts for call in calls),
    )


@contextmanager
def _counting(model: PreTrainedModel, classes: Collection[str]) -> Iterator[Counter[str]]:
    """Counts the modules that run within the block, by class."""
    found: Counter[str] = Counter()

    def count(module: torch.nn.Module, *_: Any) -> None:
        found[type(module).__name__] += 1

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if type(module).__name__ in classes
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def liger_layers(model: PreTrainedModel) -> dict[str, int]:
    """Number of modules with liger-kernel's forward, by class; "rope": 1 if its RoPE is used."""
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
    return str(getattr(config, "_attn_implementation", "attention without configuration"))
