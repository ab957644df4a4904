"""An approximate gradient: tiles of the vocabulary that hold next to no probability are left out.

Opt-in (`filtered_redi_loss`), and no part of the exact ops. A trained model gives most of its
vocabulary next to no probability, so most of dZ = u (p - onehot) is next to nothing, and two of the
three products are sums over it. Here a tile of E, [rows, columns] as the logits product makes it
(`exponentials.py`), takes part in dX and dW only where for some row its columns hold more than
epsilon of the row's probability; the target's tile always does. Loss and log-probs stay exact.

With d the probability of a token that was left out, summed over the tiles, and x its hidden state,
no more than this is missing:

    of its row of dX        |u| d max_j |W_j|, W_j the rows of the lm_head
    of dW (Frobenius)       |u| d |x|

The rule takes a tile's sum and not its largest probability, as the sums are at hand already, and at
equal error of dX it keeps as few tiles (bench/NOTES.md).

Words that are likely here and there are spread over all tiles. So the vocabulary is put in order
first, by the mean probability of its entries at a sample of the very tokens that are to be
computed. An order from elsewhere, other traces or counts of words, keeps far more tiles; and
this one needs no state, so that the result is a function of the arguments.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from redi.kernels.chunked import (
    TokenOrder,
    chunk_buffer,
    default_chunk_tokens,
    order_tokens,
    split,
)
from redi.kernels.exponentials import ExponentialsKernel
from redi.kernels.reference import IGNORE_INDEX
from redi.kernels.rows import TileSums, TokenWeights

# One token of so many tells the order, but at least so many. In a trial on 18,816 tokens of
# SmolLM2's, epsilon 2^-10, 4 % fewer tiles were live with one of 16, and 18 % fewer with all; of
# 4,096 of them 256 kept 0.27 of the tiles, 128 kept 0.34.
SAMPLE_STEP = 32
SAMPLE_LEAST = 256
# Rows of logits at hand while the order is found.
SAMPLE_ROWS = 512


@dataclass(frozen=True)
class LiveTiles:
    """Which tiles of a chunk's matrix take part in the products."""

    live: Tensor
    """[blocks of rows, tiles of columns] bool."""
    rows: int
    """Of a tile."""
    columns: int


@dataclass(frozen=True)
class LiveProducts:
    """The two products over live tiles alone; each backend has its own."""

    dhidden: Callable[[Tensor, Tensor, LiveTiles, Tensor], None]
    """See `multiply_live_columns`."""
    dweight: Callable[[Tensor, Tensor, LiveTiles, Tensor, Tensor], None]
    """See `add_live_rows`."""


def filtered_cross_entropy_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: TokenWeights,
    *,
    epsilon: float,
    exponentials: ExponentialsKernel,
    products: LiveProducts,
    valid_index: Tensor | None,
    num_weighted: int | None,
    chunk_tokens: int | None,
    token_logps: Tensor,
    token_dropped: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """`chunked.cross_entropy_chunks` with a filter, for bfloat16; each of the last is an output.

    Args:
        epsilon: the largest share of a token's probability that may be left out with a tile.
        token_dropped: [T] float32: the share of each token's probability that was left out; 0
            where there is no gradient.
        The others are those of `cross_entropy_chunks`.
    """
    order = order_tokens(targets, token_weights, valid_index, num_weighted)
    if dhidden is None and dweight is None:
        order = TokenOrder(order.index, 0)
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(len(order.index), weight, hidden.dtype)
    for output in (token_logps, token_dropped, dhidden, dweight):
        if output is not None:
            output.zero_()

    columns = None
    if order.weighted:
        columns = vocabulary_order(hidden, order.index[: order.weighted], weight)
        weight = weight[columns]
        masked = targets == IGNORE_INDEX
        targets = torch.where(masked, targets, columns.argsort()[targets.clamp(min=0)])

    chunks = [
        *split(0, order.weighted, chunk_tokens),
        *split(order.weighted, len(order.index), chunk_tokens),
    ]
    buffer = chunk_buffer(chunks, weight, hidden.dtype)
    for start, end in chunks:
        tokens = order.index[start:end]
        x = hidden[tokens]
        gradient = exponentials(
            x,
            weight,
            tokens,
            targets,
            token_weights if start < order.weighted else None,
            coefficient="weight",
            logps=token_logps,
            out=buffer[: end - start],
            epsilon=epsilon,
        )
        if gradient is None or columns is None:
            continue
        factors, residues, matrix = gradient.factors, gradient.residues, gradient.matrix
        assert factors is not None
        assert residues is not None
        assert gradient.tiles is not None
        target = targets[tokens]
        tiles, token_dropped[tokens] = live_tiles(gradient.tiles, target, factors != 0, epsilon)
        if dhidden is not None:
            dx = torch.empty(x.shape, dtype=dhidden.dtype, device=x.device)
            products.dhidden(matrix, weight, tiles, dx)
            dx.addcmul_(residues[:, None], weight[target].to(dx.dtype))
            dhidden[tokens] = dx.mul_(factors[:, None])
            del dx
        if dweight is not None:
            x = (x * factors[:, None]).to(x.dtype)
            products.dweight(matrix, x, tiles, columns, dweight)
        del x, gradient  # before the next chunk's are made


def vocabulary_order(hidden: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
    """[V] int64: columns of the logits, by the mean probability they have here, largest first.

    Args:
        hidden: [T, D].
        tokens: [N] int64: the tokens to be computed; some of them are looked at.
        weight: [V, D].
    """
    mean = torch.zeros(len(weight), device=weight.device)
    step = max(1, min(SAMPLE_STEP, len(tokens) // SAMPLE_LEAST))
    for sample in tokens[::step].split(SAMPLE_ROWS):
        mean += (hidden[sample] @ weight.T).softmax(1, dtype=torch.float32).sum(0)
    return mean.argsort(descending=True, stable=True)


def live_tiles(
    tiles: TileSums, targets: Tensor, wanted: Tensor, epsilon: float
) -> tuple[LiveTiles, Tensor]:
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
    live = padded.view(blocks, tiles.rows, columns).any(1)
    left_out = ~live.repeat_interleave(tiles.rows, 0)[:rows] & wanted[:, None]
    dropped = torch.where(left_out, tiles.sums, 0.0).sum(1) / tiles.totals
    return LiveTiles(live, tiles.rows, tiles.columns), dropped


def multiply_live_columns(matrix: Tensor, weight: Tensor, tiles: LiveTiles, out: Tensor) -> None:
    """out = matrix weight, over the live tiles of `matrix`.

    Args:
        matrix: [C, V] bfloat16. Other tiles are not read: there may be anything in them.
        weight: [V, D] bfloat16.
        tiles: of `matrix`.
        out: [C, D] float32.
    """
    torch.mm(_live_part(matrix, tiles), weight.float(), out=out)


def add_live_rows(matrix: Tensor, x: Tensor, tiles: LiveTiles, order: Tensor, out: Tensor) -> None:
    """out[order] += matrix^T x, over the live tiles of `matrix`.

    Args:
        matrix: [C, V] bfloat16. Other tiles are not read: there may be anything in them.
        x: [C, D] bfloat16.
        tiles: of `matrix`.
        order: [V] int64: a permutation.
        out: [V, D] float32.
    """
    out.index_add_(0, order, _live_part(matrix, tiles).T @ x.float())


def _live_part(matrix: Tensor, tiles: LiveTiles) -> Tensor:
    """[C, V] float32, 0 outside the live tiles."""
    rows, columns = matrix.shape
    live = tiles.live.repeat_interleave(tiles.rows, 0)[:rows]
    live = live.repeat_interleave(tiles.columns, 1)[:, :columns]
    return torch.where(live, matrix.float(), 0.0)
