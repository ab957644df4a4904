"""Sums over the sequences of a packed row, and REDI's weight of each token.

If a sum depended on a sequence's position in the row or on its neighbours, training would depend
on packing. So a sequence is cut into blocks of 1024 from its own start, and each block is added up
by one fixed tree of elementwise additions; then the blocks' sums likewise. No launch shape, thread
count or vector width can change a bit. (A tree is also more exact than a running sum: over 20,000
log-probs about 15 roundings instead of 20,000.)
"""

import torch
from torch import Tensor

from redi.kernels.reference import IGNORE_INDEX

BLOCK = 1024


def token_weights(
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    alpha: float,
    num_pairs: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """REDI's weights [T] in `dtype`, 0 where masked, and the sequences' lengths [S] int64.

    The length |y| is a sequence's number of unmasked targets. A token's weight is
    1 / (num_pairs |y|) for sign +1, -alpha / (num_pairs |y|) for -1, 0 for 0.
    """
    valid = targets != IGNORE_INDEX
    lengths = sequence_lengths(valid, cu_seqlens)
    signs = signs.to(dtype)
    wanted = torch.where(signs < 0, alpha * signs, signs) * (1 / num_pairs)
    weights = spread_segments(wanted / lengths.clamp(min=1), cu_seqlens, targets.shape[0])
    return weights.masked_fill(~valid, 0.0), lengths


def sequence_lengths(valid: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S] int64: the number of unmasked targets of each sequence; `valid` is bool [T]."""
    counts = torch.zeros(valid.shape[0] + 1, dtype=torch.int64, device=valid.device)
    torch.cumsum(valid, 0, out=counts[1:])
    return counts[cu_seqlens.long()].diff()


def sum_segments(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`segment_sum` without checks and autograd: values [T], cu_seqlens [S + 1]; returns [S]."""
    sequences = cu_seqlens.shape[0] - 1
    bounds = cu_seqlens.long()
    longest = values.shape[0]  # an upper bound: the host does not read the lengths
    if sequences == 0 or longest == 0:
        return values.new_zeros(sequences)
    while True:
        values, bounds = _sum_blocks(values, bounds)
        longest = -(-longest // BLOCK)
        if longest == 1:
            return values[:sequences]  # one block for each sequence


def spread_segments(sums: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[T]: each token's value is that of its sequence in `sums` [S], 0 after the last sequence.

    The gradient of `sum_segments`.
    """
    positions = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)
    return torch.cat([sums, sums.new_zeros(1)])[sequence]


def _sum_blocks(values: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Sum each block of each sequence; returns the sums and the bounds of the sequences in them.

    A sequence has at least one block. Their number stays on the device: the table has room for the
    largest possible one, and rows after the last block sum to 0.
    """
    tokens, sequences = values.shape[0], bounds.shape[0] - 1
    blocks = (bounds.diff() + BLOCK - 1).div(BLOCK, rounding_mode="floor").clamp(min=1)
    block_bounds = torch.zeros_like(bounds)
    torch.cumsum(blocks, 0, out=block_bounds[1:])

    block = torch.arange(tokens // BLOCK + sequences, device=values.device)
    owner = torch.searchsorted(block_bounds[1:].contiguous(), block, right=True)
    owner = owner.clamp(max=sequences - 1)
    start = bounds[owner] + (block - block_bounds[owner]) * BLOCK
    position = start[:, None] + torch.arange(BLOCK, device=values.device)
    table = values[position.clamp(0, tokens - 1)]
    table = table.masked_fill(position >= bounds[owner + 1][:, None], 0.0)
    while table.shape[1] > 1:
        half = table.shape[1] // 2
        table = table[:, :half] + table[:, half:]
    # + 0.0 makes -0.0 into 0.0, as any further level would.
    return table[:, 0] + 0.0, block_bounds
