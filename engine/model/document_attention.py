"""Causal attention within one document, in plain PyTorch: any device, any dtype.

torch's scaled_dot_product_attention computes it where it can. It has no soft cap and no sinks:
those are computed from explicit scores, a block of queries at a time.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WINDOW_ROWS = 512
"""Least queries of a block in attention with a window; more if the window is longer."""
EXPLICIT_ROWS = 256
"""Queries of a block whose scores are explicit."""


class Pattern(NamedTuple):
    """What a layer's attention has besides causality."""

    window: int | None = None
    """A token attends to itself and to the `window - 1` tokens before it; None: to all."""
    softcap: float | None = None
    """c: scores s become c tanh(s / c)."""
    sinks: Tensor | None = None
    """[heads]: a further score of each head's softmax, whose value is 0."""


PLAIN = Pattern()


def attend_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Attention of a document. query, key and value [1, heads, n, d]; returns [1, heads, n, d].

    Args:
        scale: of the scores; None: d ** -0.5.
        dropout: probability, of the attention probabilities.
    """
    length = query.shape[2]
    window = pattern.window if pattern.window is not None and pattern.window < length else None
    explicit = pattern.softcap is not None or pattern.sinks is not None
    if window is None and not explicit:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, dropout_p=dropout
        )
    # Longer blocks share more of the keys; the scores of a block are at most twice those needed.
    rows = EXPLICIT_ROWS if explicit else max(WINDOW_ROWS, window or 0)
    blocks = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        first = 0 if window is None else max(0, start - window + 1)
        q, k, v = query[:, :, start:end], key[:, :, first:end], value[:, :, first:end]
        mask = visible(start, end, first, window, query.device)
        if explicit:
            block = partial(_explicit, pattern=pattern, scale=scale, dropout=dropout)
            # A block's scores are computed again in backward, so that memory is linear in length.
            blocks.append(checkpoint(block, q, k, v, mask, use_reentrant=False))
        else:
            blocks.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout
                )
            )
    return torch.cat(blocks, dim=2)


def visible(
    start: int, end: int, first: int, window: int | None, device: torch.device | None = None
) -> Tensor:
    """bool [end - start, end - first]: whether query i may attend to key j.

    Args:
        start, end: the queries.
        first: the first key; the last one is `end - 1`.
        window: as in `Pattern`.
    """
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(first, end, device=device)
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    pattern: Pattern,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Softmax attention written out, in float32 or better."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.to(dtype) @ key.to(dtype).mT * scale
    if pattern.softcap is not None:
        scores = pattern.softcap * torch.tanh(scores / pattern.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if pattern.sinks is not None:
        sinks = pattern.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    shares = scores.softmax(-1)[..., : key.shape[2]]
    return F.dropout(shares, dropout).to(value.dtype) @ value
