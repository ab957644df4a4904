"""The two products over kept tiles alone, in Triton: masked products in `filter.py`.

Both are persistent: as many programs as processors go through the tiles of the result, each a loop
over a list of kept tiles of E. The lists are made on the device by sorting (kept ones first), so
the host never waits. Operands are loaded by tensor descriptors (TMA).

The tiles of a result differ in work. Those of dW come in the vocabulary's order, that is with the
busiest first, and those of dX are sorted so; dealt out in turn, no program gets much more than
another. Beyond the first columns a tile of dW has no kept tile at all and is not touched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from redi.kernels.experimental.filter import KeptTiles
from redi.kernels.experimental.launches import launch_for
from redi.kernels.triton_common import FUSED, aligned, descriptor, dot, processors

# Rows of a tile of a result; its width is the launch table's.
ROWS = 128
# One step takes so many of the dimension that is summed over.
DEPTH = 64
# What a step loads depends on an index that is itself loaded, and Triton spreads the stages over
# both: of 7 the operands get 4, on Hopper 4 x 48 KiB.
WARPS, STAGES = 8, 7


def multiply_kept_columns(matrix: Tensor, weight: Tensor, tiles: KeptTiles, out: Tensor) -> None:
    """`filter.multiply_kept_columns`; `matrix` is an `out` of `exp_gemm`."""
    found, counts = _kept_first(tiles.kept)
    rows = min(ROWS, tiles.rows)
    width = launch_for(weight).kept_width
    with torch.cuda.device_of(matrix):
        multiply_kept_columns_kernel[(processors(matrix.device),)](
            descriptor(matrix, rows, DEPTH),
            descriptor(aligned(weight), DEPTH, width),
            out,
            out.stride(0),
            counts.argsort(descending=True, stable=True),
            found,
            found.stride(0),
            counts,
            *out.shape,
            BLOCK_ROWS=tiles.rows,
            BLOCK_COLUMNS=tiles.columns,
            DEPTH=DEPTH,
            ROWS=rows,
            WIDTH=width,
            num_warps=WARPS,
            num_stages=STAGES,
            **FUSED,
        )


def add_kept_rows(matrix: Tensor, x: Tensor, tiles: KeptTiles, order: Tensor, out: Tensor) -> None:
    """`filter.add_kept_rows`; `matrix` is an `out` of `exp_gemm`."""
    found, counts = _kept_first(tiles.kept.T)
    rows = min(ROWS, tiles.columns)
    depth = min(DEPTH, tiles.rows)
    width = launch_for(x).kept_width
    with torch.cuda.device_of(matrix):
        add_kept_rows_kernel[(processors(matrix.device),)](
            descriptor(matrix, depth, rows),
            descriptor(aligned(x), depth, width),
            out,
            out.stride(0),
            order,
            found,
            found.stride(0),
            counts,
            *out.shape,
            BLOCK_ROWS=tiles.rows,
            BLOCK_COLUMNS=tiles.columns,
            DEPTH=depth,
            ROWS=rows,
            WIDTH=width,
            num_warps=WARPS,
            num_stages=STAGES,
            **FUSED,
        )


def _kept_first(kept: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the indices [n, m], those of kept tiles first and in order; their number [n]."""
    kept = kept.int().contiguous()
    found = kept.argsort(dim=1, descending=True, stable=True).int()
    return found, kept.sum(1, dtype=torch.int32)


@triton.jit(do_not_specialize=["found_stride", "num_rows"])
def multiply_kept_columns_kernel(
    matrix,  # descriptor of [C, V], blocks [ROWS, DEPTH]
    weight,  # descriptor of [V, D], blocks [DEPTH, WIDTH]
    out,  # [C, D] float32, out
    out_stride,
    block_order,  # [blocks] int64: blocks of rows, those with most kept tiles first
    found,  # [blocks, tiles] int32: each block's tiles, the kept ones first
    found_stride,
    counts,  # [blocks] int32: how many are kept
    num_rows,  # C
    width,  # D
    BLOCK_ROWS: tl.constexpr,  # of a tile of the matrix
    BLOCK_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile of the result
    WIDTH: tl.constexpr,
):
    """out = matrix weight. Programs that run at the same time share a block of the matrix."""
    STEPS: tl.constexpr = BLOCK_COLUMNS // DEPTH
    PARTS: tl.constexpr = BLOCK_ROWS // ROWS
    widths = tl.cdiv(width, WIDTH)
    parts = tl.cdiv(num_rows, BLOCK_ROWS) * PARTS
    for work in range(tl.program_id(0), parts * widths, tl.num_programs(0)):
        part = work // widths
        block = tl.load(block_order + part // PARTS).to(tl.int32)
        first_row = block * BLOCK_ROWS + part % PARTS * ROWS
        first_column = work % widths * WIDTH
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        for step in range(tl.load(counts + block) * STEPS):
            tile = tl.load(found + block * found_stride + step // STEPS)
            word = tile * BLOCK_COLUMNS + step % STEPS * DEPTH
            sums = dot(matrix.load([first_row, word]), weight.load([word, first_column]), sums)
        row = first_row + tl.arange(0, ROWS)
        column = first_column + tl.arange(0, WIDTH)
        place = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(place, sums, mask=(row < num_rows)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["found_stride", "vocab"])
def add_kept_rows_kernel(
    matrix,  # descriptor of [C, V], blocks [DEPTH, ROWS]
    x,  # descriptor of [C, D], blocks [DEPTH, WIDTH]
    out,  # [V, D] float32, added to
    out_stride,
    order,  # [V] int64: which row of `out` a column of the matrix belongs to
    found,  # [tiles, blocks] int32: blocks of rows of each tile of columns, the kept ones first
    found_stride,
    counts,  # [tiles] int32: how many are kept
    vocab,  # V
    width,  # D
    BLOCK_ROWS: tl.constexpr,  # of a tile of the matrix
    BLOCK_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile of the result
    WIDTH: tl.constexpr,
):
    """out[order] += matrix^T x."""
    STEPS: tl.constexpr = BLOCK_ROWS // DEPTH
    PARTS: tl.constexpr = BLOCK_COLUMNS // ROWS
    widths = tl.cdiv(width, WIDTH)
    parts = tl.cdiv(vocab, ROWS)
    for work in range(tl.program_id(0), parts * widths, tl.num_programs(0)):
        part = work // widths
        tile = part // PARTS
        first_column = work % widths * WIDTH
        steps = tl.load(counts + tile) * STEPS
        if steps > 0:
            sums = tl.zeros([ROWS, WIDTH], tl.float32)
            for step in range(steps):
                block = tl.load(found + tile * found_stride + step // STEPS)
                first_row = block * BLOCK_ROWS + step % STEPS * DEPTH
                e = matrix.load([first_row, part * ROWS])
                sums = dot(e.T, x.load([first_row, first_column]), sums)
            word = part * ROWS + tl.arange(0, ROWS)
            inside = word < vocab
            row = tl.load(order + word, mask=inside, other=0)
            # By quarters: the registers do not hold all places and old values next to the sums.
            a, b = sums.reshape(ROWS, 2, WIDTH // 2).permute(0, 2, 1).split()
            aa, ab = a.reshape(ROWS, 2, WIDTH // 4).permute(0, 2, 1).split()
            ba, bb = b.reshape(ROWS, 2, WIDTH // 4).permute(0, 2, 1).split()
            quarters = (aa, ab, ba, bb)
            for n in tl.static_range(4):
                column = first_column + n * (WIDTH // 4) + tl.arange(0, WIDTH // 4)
                place = out + row[:, None] * out_stride + column[None, :]
                mask = inside[:, None] & (column < width)[None, :]
                tl.store(place, tl.load(place, mask=mask, other=0.0) + quarters[n], mask=mask)
