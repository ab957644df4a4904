"""Slices of a pack: one for each rank of a context group."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redi.engine.data.distributions import PADDING as NO_ENTRY
from redi.engine.data.packing import IGNORE, PackedBatch

PADDING = {
    "input_ids": 0,
    "targets": IGNORE,
    "token_weights": 0.0,
    "teacher_ids": NO_ENTRY,
    "teacher_logps": -np.inf,
}
"""Fields with a value for each token, but for positions, and the value of padding."""


def slice_pack(batch: PackedBatch, index: int, count: int) -> PackedBatch:
    """The `index`-th of `count` equal slices of a pack.

    The pack is padded to a multiple of `count`, and to 2 tokens a slice, by a document that is not
    trained. A slice has all sequences of the pack, in their order: those outside have no tokens in
    it (`cu_seqlens`), while `num_targets` and all that belongs to whole sequences stays. So sums
    over a sequence's tokens are shares of the sums over the slices.
    """
    if count == 1:
        return batch
    assert batch.attended is None, "ranks that share a pack do not share prompts"
    total = len(batch.input_ids)
    first, end = _bounds(total, index, count)
    size = end - first
    padding = count * size - total
    documents = batch.cu_seqlens
    if padding:
        documents = torch.cat([documents, documents.new_tensor([count * size])])
    bounds = batch.cu_seqlens.clamp(first, end) - first
    bounds[-1] = size  # the padding counts to the last sequence, without a target
    valid = batch.valid_index
    inside = (valid >= first) & (valid < end)

    def cut(values: Tensor, fill: Tensor) -> Tensor:
        return torch.cat([values, fill])[first:end].clone()

    of_tokens: dict[str, Any] = {
        name: cut(values, values.new_full((padding, *values.shape[1:]), fill))
        for name, fill in PADDING.items()
        if (values := getattr(batch, name)) is not None
    }
    return replace(
        batch,
        **of_tokens,
        position_ids=cut(batch.position_ids, torch.arange(padding)),
        cu_seqlens=bounds,
        valid_index=valid[inside] - first,
        num_positive_targets=int(inside[: batch.num_positive_targets].sum()),
        target_counts=_counts_inside(batch, inside),
        max_seqlen=max(batch.max_seqlen, padding),
        row_cu_seqlens=documents,
        padding=min(size, max(0, end - total)),
    )


def targets_in_slice(batch: PackedBatch, index: int, count: int) -> np.ndarray:
    """bool [N]: whether the slice has each target of a whole pack, in the order of its tokens."""
    first, end = _bounds(len(batch.input_ids), index, count)
    places = batch.valid_index.sort().values.numpy()
    return (places >= first) & (places < end)


def slice_tokens(tokens: int, count: int) -> int:
    """Tokens of each slice of a pack of `tokens`."""
    return tokens if count == 1 else max(2, -(-tokens // count))


def _bounds(tokens: int, index: int, count: int) -> tuple[int, int]:
    size = slice_tokens(tokens, count)
    return index * size, (index + 1) * size


def _counts_inside(batch: PackedBatch, inside: Tensor) -> tuple[int, ...]:
    """`target_counts` of the entries of `valid_index` that are `inside`."""
    parts = inside.split(list(batch.target_counts))
    return tuple(int(part.sum()) for part in parts)
