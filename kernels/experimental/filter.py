"""An approximate gradient: tiles of the vocabulary that hold very little probability are left out.

A trained model gives most of its vocabulary almost no probability, so most of dZ = u (p - onehot)
is almost 0, and two of the three products are sums over it. Here a tile of dZ, [rows, columns],
takes part in dX and dW only where for some row its columns hold more than epsilon of the row's
probability; the target's tile always does. Loss and log-probs stay exact.

With d the probability of a token that was left out, summed over the tiles, and x its hidden state,
at most this is missing:

    of its row of dX        |u| d max_j |W_j|, W_j the rows of the lm_head
    of dW (Frobenius)       |u| d |x|

The rule compares a tile's sum and not its largest probability: the sums are there already, and at
equal error of dX it keeps as few tiles (bench/NOTES.md).

Likely words are spread over all tiles. So the vocabulary is sorted first, by the mean probability
of its entries at a sample of the tokens that will be computed. An order from elsewhere, other
traces or counts of words, keeps far more tiles; and this one needs no state, so that the result is
a function of the arguments.

Plain PyTorch here; with `exp_gemm` the tiles are those of the logits product, and the products are
those of `filter_triton.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from redi.kernels.backends import Kernels
from redi.kernels.chunk_sizes import chunk_buffer, default_chunk_tokens
from redi.kernels.chunked import (
    Chunk,
    Outputs,
    TokenSchedule,
    matmul,
    order_tokens,
    product_operand,
    run_chunks,
)
from redi.kernels.reference import IGNORE_INDEX
from redi.kernels.softmax import GradientRows

# A tile in this file; `exp_gemm` has its own.
TILE_ROWS, TILE_COLUMNS = 16, 128

# One token of so many is in the sample, but at least so many. In a trial on 18,816 tokens of
# SmolLM2's, epsilon 2^-10, 4 % fewer tiles were kept with one of 16, and 18 % fewer with all; of
# 4,096 of them 256 kept 0.27 of the tiles, 128 kept 0.34.
SAMPLE_STEP = 32
SAMPLE_LEAST = 256
# Rows of logits in memory at a time while the order is computed.
SAMPLE_ROWS = 512


@dataclass(frozen=True)
class TileSums:
    """How the probability of a chunk's rows is spread over tiles."""

    sums: Tensor
    """[C, tiles] float32: of each row in each tile of columns."""
    totals: Tensor
    """[C] float32: what corresponds to a probability of 1."""
    rows: int
    """Of a tile."""
    columns: int


@dataclass(frozen=True)
class TiledRows(GradientRows):
    """What `exp_gemm` returns."""

    tiles: TileSums | None = None
    """Where a filter asked. Tiles that hold too little for it may not have been written."""


@dataclass(frozen=True)
class KeptTiles:
    """Which tiles of a chunk's matrix take part in the products."""

    kept: Tensor
    """[blocks of rows, tiles of columns] bool."""
    rows: int
    """Of a tile."""
    columns: int


def filtered_cross_entropy_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    out: Outputs,
    schedule: TokenSchedule,
    kernels: Kernels,
    coefficient: str,
    epsilon: float,
) -> None:
    """`chunked.cross_entropy_chunks` with a filter, for bfloat16 and the coefficient "weight".

    epsilon is the largest share of a token's probability that may be left out with a tile.
    """
    assert coefficient == "weight"
    if out.dhidden is None and out.dweight is None:
        token_weights = None
    logps, dropped = out.logps, out.dropped
    assert logps is not None
    assert dropped is not None
    order = order_tokens(targets, token_weights, schedule)
    buffer_dtype = torch.float32 if kernels.exp_gemm is None else hidden.dtype
    most = schedule.chunk_tokens or default_chunk_tokens(len(order.index), weight, buffer_dtype)
    ranges = order.ranges(most)
    for values in (logps, dropped, out.dhidden, out.dweight):
        if values is not None:
            values.zero_()

    columns = torch.arange(len(weight), device=weight.device)
    if order.with_grad:
        columns = vocabulary_order(hidden, order.index[: order.with_grad], weight)
        weight = weight[columns]
        masked = targets == IGNORE_INDEX
        targets = torch.where(masked, targets, columns.argsort()[targets.clamp(min=0)])
    operand = product_operand(weight)
    buffer = chunk_buffer(ranges, weight, buffer_dtype)
    multiply_columns, add_rows = multiply_kept_columns, add_kept_rows
    if kernels.exp_gemm is not None:
        from redi.kernels.experimental import filter_triton

        multiply_columns = filter_triton.multiply_kept_columns
        add_rows = filter_triton.add_kept_rows

    def make(chunk: Chunk) -> GradientRows | None:
        weights = token_weights if chunk.has_grad else None
        made = buffer[: len(chunk.tokens)]
        where = chunk.tokens, targets, weights
        options = {"coefficient": coefficient, "logps": logps}
        if kernels.exp_gemm is not None:
            return kernels.exp_gemm(
                chunk.hidden, weight, *where, out=made, epsilon=epsilon, **options
            )
        logits = matmul(chunk.hidden, operand.T, made)
        # Not rounded, as the tiles' sums are taken from it.
        dz = kernels.softmax(logits, *where, dtype=torch.float32, **options)
        return None if dz is None else GradientRows(dz)

    def use(gradient: GradientRows, chunk: Chunk) -> None:
        assert token_weights is not None
        x, target, u = chunk.hidden, targets[chunk.tokens], token_weights[chunk.tokens]
        factors, residues, matrix = gradient.factors, gradient.residues, gradient.matrix
        tile_sums = gradient.tiles if isinstance(gradient, TiledRows) else sum_tiles(matrix, u)
        assert tile_sums is not None
        tiles, dropped[chunk.tokens] = kept_tiles(tile_sums, target, u != 0, epsilon)
        if out.dhidden is not None:
            dx = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            multiply_columns(matrix, weight, tiles, dx)
            if residues is not None:
                dx.addcmul_(residues[:, None], weight[target].to(dx.dtype))
            out.dhidden[chunk.tokens] = dx if factors is None else dx.mul_(factors[:, None])
            del dx
        if out.dweight is not None:
            x = x if factors is None else (x * factors[:, None]).to(x.dtype)
            add_rows(matrix, x, tiles, columns, out.dweight)

    run_chunks(hidden, order, ranges, make, use)


def vocabulary_order(hidden: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
    """[V] int64: columns of the logits, by their mean probability at these tokens, largest first.

    Args:
        hidden: [T, D].
        tokens: [N] int64: the tokens to be computed; a sample of them is used.
        weight: [V, D].
    """
    mean = torch.zeros(len(weight), device=weight.device)
    step = max(1, min(SAMPLE_STEP, len(tokens) // SAMPLE_LEAST))
    for sample in tokens[::step].split(SAMPLE_ROWS):
        mean += (hidden[sample] @ weight.T).softmax(1, dtype=torch.float32).sum(0)
    return mean.argsort(descending=True, stable=True)


def sum_tiles(dlogits: Tensor, weights: Tensor) -> TileSums:
    """Of dlogits [C, V] = u (p - onehot), u the weights [C]: |u| p outside the target's tile."""
    padded = torch.nn.functional.pad(dlogits.abs(), (0, -dlogits.shape[1] % TILE_COLUMNS))
    sums = padded.view(len(dlogits), -1, TILE_COLUMNS).sum(2)
    return TileSums(sums, weights.abs().masked_fill(weights == 0, 1.0), TILE_ROWS, TILE_COLUMNS)


def kept_tiles(
    tiles: TileSums, targets: Tensor, wanted: Tensor, epsilon: float
) -> tuple[KeptTiles, Tensor]:
    """Which tiles take part, and what of each row's probability does not.

    Args:
        tiles: of a chunk of C rows.
        targets: [C] int64: the targets' columns.
        wanted: [C] bool; a row that is not wanted needs no tile, and nothing of it is left out.
        epsilon: the largest share of a row's probability that may be left out with a tile.

    Returns:
        The tiles, and [C] float32 in [0, 1].
    """
    needed = ~(tiles.sums <= epsilon * tiles.totals[:, None])  # NaN too
    needed.scatter_(1, (targets // tiles.columns)[:, None], True)
    needed &= wanted[:, None]
    rows, columns = needed.shape
    blocks = -(-rows // tiles.rows)
    padded = needed.new_zeros(blocks * tiles.rows, columns)
    padded[:rows] = needed
    kept = padded.view(blocks, tiles.rows, columns).any(1)
    left_out = ~kept.repeat_interleave(tiles.rows, 0)[:rows] & wanted[:, None]
    dropped = torch.where(left_out, tiles.sums, 0.0).sum(1) / tiles.totals
    return KeptTiles(kept, tiles.rows, tiles.columns), dropped


def multiply_kept_columns(matrix: Tensor, weight: Tensor, tiles: KeptTiles, out: Tensor) -> None:
    """out = matrix weight, over the kept tiles of `matrix`.

    Args:
        matrix: [C, V]. Other tiles are not read: they may hold anything.
        weight: [V, D] bfloat16.
        tiles: of `matrix`.
        out: [C, D] float32.
    """
    torch.mm(_kept_part(matrix, tiles), weight.float(), out=out)


def add_kept_rows(matrix: Tensor, x: Tensor, tiles: KeptTiles, order: Tensor, out: Tensor) -> None:
    """out[order] += matrix^T x, over the kept tiles of `matrix`.

    Args:
        matrix: [C, V]. Other tiles are not read: they may hold anything.
        x: [C, D] bfloat16.
        tiles: of `matrix`.
        order: [V] int64: a permutation.
        out: [V, D] float32.
    """
    out.index_add_(0, order, _kept_part(matrix, tiles).T @ x.float())


def _kept_part(matrix: Tensor, tiles: KeptTiles) -> Tensor:
    """[C, V] float32, 0 outside the kept tiles."""
    rows, columns = matrix.shape
    kept = tiles.kept.repeat_interleave(tiles.rows, 0)[:rows]
    kept = kept.repeat_interleave(tiles.columns, 1)[:, :columns]
    return torch.where(kept, matrix.float(), 0.0)
