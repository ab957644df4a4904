"""How a model computes its logits from lm_head's product: a scale (Granite, Cohere, MiniCPM), a
soft cap (Gemma 2), or neither.

It is read from the ops that the model's own forward runs after its trunk, not from keys of its
configuration: `logits_scaling` divides the logits of Granite and multiplies those of HyperCLOVA X.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from redi.engine.errors import InputError
from redi.engine.loss.packed_loss import Logits

# Ops of lm_head's product itself, with or without a cast to float32.
HEAD_OPS = {
    "_to_copy",
    "_unsafe_view",
    "alias",
    "clone",
    "detach",
    "expand",
    "mm",
    "bmm",
    "slice",
    "t",
    "transpose",
    "view",
}


def logits_of(model: PreTrainedModel) -> Logits:
    """The transform of a model's logits, from a forward whose trunk is replaced.

    Args:
        model: on any device, also the meta device; before sharding.

    Raises:
        InputError: the logits are not z = softcap tanh(logit_scale hidden weight^T / softcap).
    """
    name = type(model).__name__
    weight = model.get_output_embeddings().weight
    hidden = weight.new_zeros(1, 2, weight.shape[1])
    ids = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
    ops = _ScalarOps()
    try:
        with _without_trunk(model, hidden), torch.no_grad(), ops:
            logits = model(input_ids=ids).logits
    except Exception as error:
        # Of any type: the code of the model.
        raise InputError(f"{name}: its logits cannot be computed from lm_head ({error})") from None
    if ops.unknown or logits.shape[-1] != weight.shape[0]:
        how = f" ({ops.unknown})" if ops.unknown else ""
        raise InputError(
            f"{name}: its logits are not lm_head's alone{how}, which the fused loss needs"
        )
    scale = ops.scale * (1 if ops.cap is None else ops.cap)
    if scale <= 0 or (ops.cap is not None and ops.cap <= 0):
        raise InputError(f"{name}: the scale of its logits is not positive")
    return Logits(float(scale), None if ops.cap is None else float(ops.cap))


class _Output(MoeModelOutputWithPast):
    """A trunk's output; what else a model reads from it is None."""

    def __getattr__(self, _: str) -> None:
        return None


@contextmanager
def _without_trunk(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Within the context the trunk returns `hidden`."""
    trunk: Any = model.base_model
    own = trunk.__dict__.get("forward")
    trunk.forward = lambda *_, **__: _Output(last_hidden_state=hidden)
    try:
        yield
    finally:
        del trunk.forward
        if own is not None:
            trunk.forward = own


class _ScalarOps(TorchDispatchMode):
    """Reads a forward after the trunk as cap * tanh(scale * product), or scale * product.

    As fractions, so that a division by the cap and the multiplication after it give 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = Fraction(1)
        self.cap: Fraction | None = None
        self.unknown: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        number = args[1] if len(args) > 1 else None
        if name in ("mul", "div") and isinstance(number, int | float):
            factor = Fraction(number) if name == "mul" else 1 / Fraction(number)
            if self.cap is None:
                self.scale *= factor
            else:
                self.cap *= factor
        elif name == "tanh" and self.cap is None:
            self.cap = Fraction(1)
        elif name not in HEAD_OPS:
            self.unknown = self.unknown or name
        return func(*args, **(kwargs or {}))
