"""Packed attention in a context group: whole documents, with a share of the heads on each rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from redi.engine.context import ContextGroup, key_value_copies
from redi.engine.errors import InputError

Attention = Callable[..., tuple[torch.Tensor, None]]
"""A function as transformers calls it."""


def share_heads(attend: Attention, context: ContextGroup) -> Attention:
    """Wrap an attention function for the slices of a context group.

    The wrapped function is called with query [1, H, T / size, d], keys and values likewise, and the
    boundaries of the whole pack. Windows, soft caps and sinks are those of each head.
    """
    if context.size == 1:
        return attend

    def run(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        s_aux: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        heads = query.shape[1]
        check_heads(heads, context.size)
        copies = key_value_copies(heads, key.shape[1], context.size)
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        query, key, value = map(context.tokens_to_heads, (query, key, value))
        if s_aux is not None:
            options["s_aux"] = s_aux.view(context.size, -1)[context.index]
        options["context_ranks"] = context.size
        out, _ = attend(module, query, key, value, attention_mask, **options)
        return context.heads_to_tokens(out), None

    return run


def check_heads(heads: int, ranks: int) -> None:
    """Raise InputError unless `ranks` divides the query heads."""
    if heads % ranks:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise InputError(
            f"shard.context = {ranks} does not divide the model's {heads} query heads; use one of "
            f"{divisors}"
        )
