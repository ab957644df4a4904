"""Sums over the sequences of a packed row, and which sequence a token belongs to.

A sum that depended on where in a row a sequence lies, or on its neighbours, would make training
depend on packing. So a sequence is cut into blocks of 1024 from its own start, and each block is
added up by one fixed tree of elementwise additions; then the blocks' sums likewise. No launch
shape, thread count or vector width can change a bit. (A tree also errs less than a running sum:
over 20,000 log-probs about 15 roundings instead of 20,000.)
"""

import torch
from torch import Tensor

from redi.kernels.reference import IGNORE_INDEX

BLOCK = 1024


def sum_segments(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`segment_sum` without checks and autograd: values [T], cu_seqlens [S + 1]; returns [S]."""
    sequences = cu_seqlens.shape[0] - 1
    bounds = cu_seqlens.long()
    longest = values.shape[0]  # of any sequence, as far as the host knows
    if sequences == 0 or longest == 0:
        return values.new_zeros(sequences)
    while True:
        values, bounds = _sum_blocks(values, bounds)
        longest = -(-longest // BLOCK)
        if longest == 1:
            return values[:sequences]  # one block for each sequence


def spread_segments(sums: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[T]: for each token the value [S] of its sequence, 0 behind the last: the sum's gradient."""
    return torch.cat([sums, sums.new_zeros(1)])[sequence_ids(cu_seqlens, tokens)]


def sequence_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[T] int64: the sequence each token lies in; S for a token beyond the last one's end."""
    positions = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)


def sequence_lengths(targets: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S] int64: the number of unmasked targets of each sequence."""
    counts = torch.zeros(targets.shape[0] + 1, dtype=torch.int64, device=targets.device)
    torch.cumsum(targets != IGNORE_INDEX, 0, out=counts[1:])
    return counts[cu_seqlens.long()].diff()


def _sum_blocks(values: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Sum each block of each sequence; returns the sums and the bounds of the sequences in them.

    A sequence has at least one block. How many there are is only known on the device: the table
    has room for the most there can be, and rows past the last block sum to 0.
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
