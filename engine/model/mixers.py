"""Layers that mix tokens by a recurrence or a convolution, run document by document.

A linear attention, a state space or a short convolution has no mask: over a pack its state would
pass from one document to the next. Some kernels take boundaries, transformers' own code in PyTorch
does not. So each of these layers is called once for each document, which is exact on any device.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from redi.engine.errors import InputError
from redi.engine.model.attention import DOCUMENT_KWARGS, AttentionCall, record_call
from redi.engine.model.document_attention import PLAIN

KIND = "mixer"
NAMES = ("linear_attn", "conv", "mamba")
"""Names of mixers in the blocks of transformers."""


def mixer_of(block: nn.Module) -> nn.Module | None:
    """The block's mixer, or None."""
    for name in NAMES:
        if isinstance(mixer := getattr(block, name, None), nn.Module):
            return mixer
    # Kimi Linear has a linear attention under the name of the full one.
    linear = getattr(block, "block_type", None) == "linear_attention"
    return getattr(block, "self_attn", None) if linear else None


def has_attention(block: nn.Module) -> bool:
    """True if the block calls the attention function; it may have a mixer too."""
    attention = getattr(block, "self_attn", None)
    return attention is not None and attention is not mixer_of(block)


def split_calls(
    calls: Iterable[AttentionCall],
) -> tuple[list[AttentionCall], list[AttentionCall]]:
    """The recorded calls of attention, and those of mixers."""
    calls = list(calls)
    return [one for one in calls if one.kind != KIND], [one for one in calls if one.kind == KIND]


def separate_documents(model: PreTrainedModel) -> None:
    """Make the mixers of a model run document by document, in place."""
    for block in model.base_model.layers:
        if (mixer := mixer_of(block)) is not None:
            mixer.forward = partial(_by_document, mixer.forward)


@torch.compiler.disable  # reads the documents' lengths
def _by_document(
    forward: Any,
    hidden_states: torch.Tensor,
    *args: Any,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """A mixer's `forward` for each document of a pack [1, T, D]."""
    if cu_seq_lens_q is None:  # generation: a batch, not a pack
        return forward(hidden_states, *args, **kwargs)
    if kwargs.get("attention_mask") is not None:
        raise InputError("the model passes its own mask to its attention")
    record_call(AttentionCall(KIND, PLAIN, len(cu_seq_lens_q) - 1))
    options = {name: value for name, value in kwargs.items() if name not in DOCUMENT_KWARGS}
    if isinstance(hidden_states, FakeTensor):  # planned: memory depends on the tokens alone
        lengths = [hidden_states.shape[1]]
    else:
        lengths = cu_seq_lens_q.diff().tolist()
    parts = [forward(one, *args, **options) for one in hidden_states.split(lengths, dim=1)]
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise InputError("the model has a mixer that returns more than its result")
    return torch.cat(parts, dim=1)
