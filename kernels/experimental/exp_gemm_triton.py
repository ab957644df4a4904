"""The logits product with the exponential in its epilogue, in Triton: no pass over logits.

The softmax of a row needs its maximum and its sum before an entry can be final, hence the passes
of `softmax.softmax` over fp32 logits. Here the product's epilogue stores E = bf16(m exp(z - c))
with a shift c and a factor m known beforehand, and sums of each tile; the division by the row's
sum S moves to the small operands of the other two products:

    dZ = v (E - S onehot),   v = u / S
    dX = v (E' W + residue W_y),   dW = E'^T (v X),   E' = E with -R rounded at the target,

where R = S - e_y is the sum over the other columns, and `residue` what rounding took from -R. u is
the token's weight (`softmax.effective_weights`), W_y the target's row of the lm_head.

Four things make it exact, and versions without them fail the tests (`tests/exp_gemm_plain.py` is
the same in plain PyTorch):

- The shift is the target's logit z_y, so c <= L, the row's log-sum-exp, and S >= 1. An upper
  bound of L, as Cauchy-Schwarz gives, exceeds it by hundreds on real states: all of E would be 0.
  Where c is so far below L that S exceeds `LARGEST_SUM`, the row is computed again with its
  maximum as the shift.
- m in [1, 2) is the mantissa of the token's weight. Where one token of the vocabulary has nearly
  all the probability, S is nearly m and v a power of two, so v X is not rounded. (A plain loss
  needs none of this, as p - onehot is nearly 1 or -1 there. It shows where hidden states are alike
  and the gradients of positive and negative traces cancel.)
- R is summed without the target, as e_y >= 1 would hide it where the target is nearly certain.
- The target's entry is rounded *inside* both products. To leave e_y in E and subtract S there in
  float32 afterwards looks more exact, and leaves the rounding of v X, 2^-9 u X, in dW, which for a
  nearly certain token is far more than its gradient.

The steps of a chunk, all on one stream; the host never waits:

1. `target_logits_kernel`: the shift z_y, by the products' own instruction, and log2 m.
2. `exp_gemm_kernel`: persistent programs, as many as run at once, go through the tiles of X W^T;
   operands and E move by tensor descriptors (TMA). The epilogue does only exp2, row sums, the
   store, and a mask that only the last tile of columns needs: more (picking out the target, a
   maximum) takes all registers that 128 x 256 sums leave. For a filter (`filter.py`) it computes
   the first tiles, the likeliest ones, and then the others, of which it does not write those that
   hold too little compared with the first ones alone.
3. `finalise_kernel`, one program a row: log-prob, factor, the target's entry.
4. Repair: 2 and 3 again on the blocks of rows in which a row's sum was out of bounds, first for
   the rows' maxima, then with these as shifts. The list of such blocks and its length stay on the
   device; where there are none, the programs of step 2 find no tiles and those of 3 return.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from redi.kernels.experimental.filter import TiledRows, TileSums
from redi.kernels.experimental.launches import (
    Launch,
    l2_cache_bytes,
    launch_for,
    most_in_group,
)
from redi.kernels.triton_common import (
    FUSED,
    LOG2_E,
    aligned,
    apply_coefficient,
    descriptor,
    dot,
    load_target,
    log1p,
    processors,
    round_to,
)

# A row whose sum is larger is computed again. Its v = u / S times a hidden state's entry must stay
# above bfloat16's smallest number, 2^-126, which leaves 34 powers of two to u x. (Beyond, all
# values stay finite while the gradient silently vanishes.)
LARGEST_SUM = 2.0**92

# R's share in the target's tile is taken from E, rounded, where it is below this, and otherwise as
# the tile's float32 sum less e_y. Roundings of E are 2^-9 of the share, which a large share would
# show in the log-prob; the difference has e_y's own error, 1e-5, too much for a small one.
SMALL_SHARE = 2.0**-6

# Where R is a smaller part of S than this the log-prob is - log1p(R / e_y).
CONFIDENT = 2.0**-8

# A kernel may use a module's constants only if they are constexpr.
_LARGEST_SUM = tl.constexpr(LARGEST_SUM)
_SMALL_SHARE = tl.constexpr(SMALL_SHARE)
_CONFIDENT = tl.constexpr(CONFIDENT)

# Rows whose targets' logits one program computes: the fewest of Hopper's products.
TARGET_ROWS = 64

# A filter bounds a row's total from below by so many tiles of columns: in a trial on SmolLM2's
# states they spared 91 % of the stores that could be spared, the target alone 4 %.
FIRST_TILES = 4


def exp_gemm(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *,
    coefficient: str,
    logps: Tensor,
    out: Tensor,
    logit_scale: float = 1.0,
    epsilon: float | None = None,
    launch: Launch | None = None,
) -> TiledRows | None:
    """Log-probs of the targets and, given weights, the gradient of the loss by the logits.

    Args:
        hidden: [C, D] bfloat16, the chunk's hidden states.
        weight: [V, D] bfloat16, the lm_head. If its rows do not begin at multiples of 16 bytes, or
            without unit stride along D, it is copied first.
        tokens: [C] int64: the position in the packed row of each row.
        targets: [T] int64; in [0, V) at `tokens`.
        weights: [T] float32, or None for log-probs alone.
        coefficient: "weight", "dft" or "unlikelihood"; see `softmax.effective_weights`.
        logps: [T] float32, written at `tokens`; never above 0.
        out: [C, V] bfloat16, unit stride along V, rows at multiples of 16 bytes, overwritten: the
            gradient's matrix.
        logit_scale: multiplies the logits. The gradient is by the scaled ones.
        epsilon: of a filter: the gradient comes with its `tiles`, and a tile that is certain to be
            left out need not be written. None: every tile is.
        launch: None takes that of the table.

    Returns:
        The gradient in parts, its matrix `out`; None without weights.
    """
    launch = launch or launch_for(weight)
    hidden, weight = aligned(hidden), aligned(weight)
    rows, vocab = out.shape
    tiles = triton.cdiv(vocab, launch.columns)
    new = partial(torch.empty, dtype=torch.float32, device=hidden.device)
    z_target, log2_scale, factors, residues = (new(rows) for _ in range(4))
    # A row's stride that is a multiple of 16 is one thing less to compile for.
    sums = new(rows, triton.cdiv(tiles, 16) * 16)[:, :tiles]
    outside = torch.empty(rows, dtype=torch.int32, device=hidden.device)
    totals = None if epsilon is None or weights is None else new(rows)
    multiply = partial(_multiply, hidden, weight, out, log2_scale, logit_scale, sums, launch)

    where = tokens.contiguous(), targets.contiguous()
    target_tiles = (targets[tokens] // launch.columns).int()
    weights = None if weights is None else weights.contiguous()

    def finalise(shifts: Tensor, redone: Tensor | None) -> None:
        finalise_kernel[(rows,)](
            out,
            out.stride(0),
            vocab,
            sums,
            sums.stride(0),
            tiles,
            *where,
            z_target,
            shifts,
            log2_scale,
            logit_scale,
            logps,
            outside if redone is None else None,
            redone,
            None if weights is None else factors,
            None if weights is None else residues,
            totals,
            weights,
            COEFFICIENT=coefficient,
            BLOCK_ROWS=launch.rows,
            BLOCK_COLUMNS=launch.columns,
            BLOCK_TILES=triton.next_power_of_2(tiles),
            num_warps=4,
            **FUSED,
        )

    with torch.cuda.device_of(hidden):
        target_logits_kernel[(triton.cdiv(rows, TARGET_ROWS),)](
            hidden,
            hidden.stride(0),
            weight,
            weight.stride(0),
            rows,
            vocab,
            hidden.shape[1],
            *where,
            z_target,
            log2_scale,
            weights,
            BLOCK_ROWS=TARGET_ROWS,
            BLOCK_DEPTH=launch.depth,
            num_warps=4,
            **FUSED,
        )
        if weights is None:
            # Only the target's tile of a row is read again.
            never = torch.full_like(z_target, float("inf")), target_tiles
            multiply(z_target, skipping=never)
        elif epsilon is None:
            multiply(z_target)
        else:
            multiply(z_target, last_tile=FIRST_TILES)
            # A row's total is at least its target's exponential, m, and the sum of the first tiles.
            # A tenth less, so that every kept tile is certain to be written: the total is summed in
            # another order.
            at_least = torch.maximum(log2_scale.exp2(), sums[:, :FIRST_TILES].sum(1))
            skipping = 0.9 * epsilon * at_least, target_tiles
            multiply(z_target, first_tile=FIRST_TILES, skipping=skipping)
        finalise(z_target, None)

        blocks = triton.cdiv(rows, launch.rows)
        padded = torch.nn.functional.pad(outside, (0, blocks * launch.rows - rows))
        redone = padded.view(blocks, launch.rows).amax(1)
        repair = torch.argsort(redone, descending=True, stable=True), redone.sum()
        multiply(z_target, repair=repair, maxima=True)
        # Rows that were right keep their shift, and so every bit.
        shifts = torch.where(outside > 0, sums.amax(1), z_target)
        multiply(shifts, repair=repair)
        finalise(shifts, redone)
    if weights is None:
        return None
    tiles_held = None if totals is None else TileSums(sums, totals, launch.rows, launch.columns)
    return TiledRows(out, factors, residues, tiles_held)


def _multiply(
    hidden: Tensor,
    weight: Tensor,
    out: Tensor,
    log2_scale: Tensor,
    logit_scale: float,
    sums: Tensor,
    launch: Launch,
    shifts: Tensor,
    *,
    first_tile: int = 0,
    last_tile: int | None = None,
    skipping: tuple[Tensor, Tensor] | None = None,
    repair: tuple[Tensor, Tensor] | None = None,
    maxima: bool = False,
) -> None:
    """Launch `exp_gemm_kernel`: as many programs as run at once."""
    exp_gemm_kernel[(launch.programs * processors(hidden.device),)](
        descriptor(hidden, launch.rows, launch.depth),
        descriptor(weight, launch.columns, launch.depth),
        descriptor(out, launch.rows, launch.columns // launch.stores),
        shifts,
        log2_scale,
        logit_scale * LOG2_E.value,
        sums,
        sums.stride(0),
        *(skipping or (None, None)),
        *(repair or (None, None)),
        *out.shape,
        hidden.shape[1],
        most_in_group(launch, hidden.shape[1], l2_cache_bytes(hidden.device)),
        first_tile,
        sums.shape[1] if last_tile is None else min(last_tile, sums.shape[1]),
        MAXIMA=maxima,
        BLOCK_ROWS=launch.rows,
        BLOCK_COLUMNS=launch.columns,
        BLOCK_DEPTH=launch.depth,
        STORES=launch.stores,
        # A repair has nothing to hide: it seldom has a tile. A filter's would spill.
        FLATTEN=launch.flatten and repair is None and skipping is None,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **FUSED,
    )


# Single entries are read of these: see `softmax_triton.softmax_kernel`.
@triton.jit(
    do_not_specialize=["rows"], do_not_specialize_on_alignment=["tokens", "targets", "weights"]
)
def target_logits_kernel(
    hidden,  # [C, D]
    hidden_stride,
    weight,  # [V, D]
    weight_stride,
    rows,  # C
    vocab,  # V
    depth,  # D
    tokens,  # [C] int64
    targets,  # [T] int64
    z_target,  # [C] float32, out; NaN where the target is not in [0, V)
    log2_scale,  # [C] float32, out: log2 of the weight's mantissa
    weights,  # [T] float32, or None
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """The target's logit of each row, and what its exponentials are multiplied with.

    The logits are the diagonal of a product of hidden states with the targets' rows of the lm_head,
    by the instruction that computes all other logits, in the same order. Tensor cores truncate sums
    where other units round, so that a logit summed otherwise is larger than its twin in the
    product, and log-probs would be too large in the mean.
    """
    place = tl.arange(0, BLOCK_ROWS)
    row = tl.program_id(0) * BLOCK_ROWS + place
    row = tl.minimum(row, rows - 1).to(tl.int64)  # the last one again, instead of masks
    token = tl.load(tokens + row)
    target, inside = load_target(targets + token, vocab)
    x_row = hidden + row[:, None] * hidden_stride
    w_row = weight + target.to(tl.int64)[:, None] * weight_stride
    z = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        column = start + tl.arange(0, BLOCK_DEPTH)[None, :]
        x = tl.load(x_row + column, mask=column < depth, other=0.0)
        w = tl.load(w_row + column, mask=column < depth, other=0.0)
        z = dot(x, w.T, z)
    diagonal = tl.sum(tl.where(place[:, None] == place[None, :], z, 0.0), 1)
    tl.store(z_target + row, tl.where(inside, diagonal, float("nan")))
    log2_m = tl.zeros([BLOCK_ROWS], tl.float32)
    if weights is not None:
        bits = tl.load(weights + token).to(tl.uint32, bitcast=True)
        mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # in [1, 2)
        log2_m = tl.log2(mantissa)
    tl.store(log2_scale + row, log2_m)


@triton.jit(do_not_specialize=["rows", "most_in_group", "first_tile", "last_tile"])
def exp_gemm_kernel(
    hidden,  # descriptor of [C, D], blocks [BLOCK_ROWS, BLOCK_DEPTH]
    weight,  # descriptor of [V, D], blocks [BLOCK_COLUMNS, BLOCK_DEPTH]
    e,  # descriptor of [C, V], blocks [BLOCK_ROWS, BLOCK_COLUMNS // STORES], out
    shifts,  # [C] float32
    log2_scale,  # [C] float32, log2 m
    steepness,  # logit_scale log2 e
    sums,  # [C, tiles] float32, out: of E, or the largest logit of each tile
    sums_stride,
    skip_below,  # [C] float32: a tile whose rows hold no more is not written; or None
    target_tiles,  # [C] int32: these always are
    row_blocks,  # which blocks of rows to do, or None for all:
    num_row_blocks,  # one integer, how many of them
    rows,  # C
    vocab,  # V
    depth,  # D
    most_in_group,  # blocks of rows, at most, that share a walk over the columns
    first_tile,  # of the tiles of columns those from here
    last_tile,  # to before this one
    MAXIMA: tl.constexpr,  # the tiles' largest logits, and nothing else
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    STORES: tl.constexpr,  # in how many parts, 1 or 2, a tile is stored
    FLATTEN: tl.constexpr,  # loads of the next tile under way during the epilogue
):
    """E = m exp(logit_scale (hidden weight^T - shift)), rounded, and sums of its tiles' rows.

    Programs that run at the same time work on neighbouring tiles: rows of a group first, so that
    each block of the lm_head is fetched from memory once a group and the group's hidden states
    stay in L2.
    """
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    if row_blocks is not None:
        blocks = tl.load(num_row_blocks).to(tl.int32)
    tiles = last_tile - first_tile
    steps = tl.cdiv(depth, BLOCK_DEPTH)
    # Equal, or the last may hold one block. A repair may have no block at all.
    groups = tl.maximum(tl.cdiv(blocks, most_in_group), 1)
    group_size = tl.cdiv(blocks, groups)
    for work in tl.range(tl.program_id(0), blocks * tiles, tl.num_programs(0), flatten=FLATTEN):
        group = work // (group_size * tiles)
        size = tl.minimum(blocks - group * group_size, group_size)
        inside = work - group * group_size * tiles
        block = group * group_size + inside % size
        tile = first_tile + inside // size
        if row_blocks is not None:
            block = tl.load(row_blocks + block).to(tl.int32)
        first_row = block * BLOCK_ROWS
        first_column = tile * BLOCK_COLUMNS

        z = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for step in range(steps):
            x = hidden.load([first_row, step * BLOCK_DEPTH])
            w = weight.load([first_column, step * BLOCK_DEPTH])
            z = dot(x, w.T, z)

        row = first_row + tl.arange(0, BLOCK_ROWS)
        place = sums + row * sums_stride + tile
        column = first_column + tl.arange(0, BLOCK_COLUMNS)
        if MAXIMA:
            z = tl.where(column[None, :] < vocab, z, float("-inf"))
            tl.store(place, tl.max(z, 1), mask=row < rows)
        else:
            shift = tl.load(shifts + row, mask=row < rows, other=0.0)
            log2_m = tl.load(log2_scale + row, mask=row < rows, other=0.0)
            # First the difference, which is exact where z is near the shift: equal probabilities
            # are then rounded alike in all rows of one weight.
            values = tl.exp2((z - shift[:, None]) * steepness + log2_m[:, None])
            # Beyond V logits are 0, and exp(0 - shift) may be anything.
            if first_column + BLOCK_COLUMNS > vocab:
                values = tl.where(column[None, :] < vocab, values, 0.0)
            tile_sums = tl.sum(values, 1)
            tl.store(place, tile_sums, mask=row < rows)
            if skip_below is not None:
                target_tile = tl.load(target_tiles + row, mask=row < rows, other=-1)
                too_little = tile_sums <= tl.load(skip_below + row, mask=row < rows, other=0.0)
                written = (row < rows) & ((target_tile == tile) | ~too_little)  # NaN too
                if tl.max(written.to(tl.int32), 0) > 0:
                    _store_tile(e, first_row, first_column, values, STORES)
            else:
                _store_tile(e, first_row, first_column, values, STORES)


@triton.jit
def _store_tile(e, first_row, first_column, values, STORES: tl.constexpr):
    """Round a tile and store it, as a whole or by halves: shared memory holds a part at a time."""
    rounded = round_to(values, tl.bfloat16)
    if STORES == 1:
        e.store([first_row, first_column], rounded)
    else:
        ROWS: tl.constexpr = values.shape[0]
        HALF: tl.constexpr = values.shape[1] // 2
        left, right = rounded.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        e.store([first_row, first_column], left)
        e.store([first_row, first_column + HALF], right)


@triton.jit(do_not_specialize_on_alignment=["tokens", "targets", "logps", "weights"])
def finalise_kernel(
    e,  # [C, V] bfloat16; with `factors` the target's entry is replaced
    e_stride,
    vocab,  # V
    sums,  # [C, tiles] float32
    sums_stride,
    tiles,
    tokens,  # [C] int64
    targets,  # [T] int64
    z_target,  # [C] float32
    shifts,  # [C] float32
    log2_scale,  # [C] float32
    logit_scale,
    logps,  # [T] float32, out
    outside,  # [C] int32, out: whether the row's sum is out of bounds; or None
    redone,  # [blocks of rows]: not 0 where to do anything at all; or None for everywhere
    factors,  # [C] float32, out, or None for log-probs alone
    residues,  # [C] float32, out
    totals,  # [C] float32, out: S; or None
    weights,  # [T] float32; along with factors
    COEFFICIENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """From a row's sums and stored exponentials: log-prob, factor, and the target's entry."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    if redone is not None:  # known when compiling  # noqa: SIM102
        if tl.load(redone + row // BLOCK_ROWS) == 0:
            return
    token = tl.load(tokens + row)
    target, _ = load_target(targets + token, vocab)
    e_row = e + row * e_stride
    z_y = tl.load(z_target + row)
    from_shift = (z_y - tl.load(shifts + row)) * logit_scale
    log2_m = tl.load(log2_scale + row)
    e_target = tl.exp2(from_shift * LOG2_E + log2_m)

    tile = tl.arange(0, BLOCK_TILES)
    target_tile = target // BLOCK_COLUMNS
    tile_sums = tl.load(sums + row * sums_stride + tile, mask=tile < tiles, other=0.0)
    others = tl.sum(tl.where(tile == target_tile, 0.0, tile_sums), 0)
    difference = tl.sum(tl.where(tile == target_tile, tile_sums, 0.0), 0) - e_target
    column = target_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    others_in_tile = (column < vocab) & (column != target)
    share = tl.sum(tl.load(e_row + column, mask=others_in_tile, other=0.0).to(tl.float32), 0)
    rest = others + tl.where(share < _SMALL_SHARE, share, difference)

    total = rest + e_target
    logp = tl.where(
        rest < _CONFIDENT * total,
        -log1p(rest / e_target),
        from_shift - tl.log(total / tl.exp2(log2_m)),
    )
    tl.store(logps + token, logp)
    if outside is not None:
        tl.store(outside + row, tl.where(rest <= _LARGEST_SUM, 0, 1))  # NaN too is out of bounds
    if factors is not None:
        u, rest = apply_coefficient(tl.load(weights + token), logp, rest, e_target, COEFFICIENT)
        at_target = round_to(-rest, tl.bfloat16)
        tl.store(e_row + target, at_target)
        tl.store(factors + row, u / total)
        tl.store(residues + row, -rest - at_target.to(tl.float32))
        if totals is not None:
            tl.store(totals + row, total)
