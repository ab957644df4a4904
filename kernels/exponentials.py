"""One chunk without a pass over its logits: the logits product itself leaves the exponentials.

The softmax of a row needs its maximum and its sum before an entry can be final, hence the passes
of `rows.softmax_rows` over fp32 logits. Here the product's epilogue stores E = bf16(m exp(z - c))
with a shift c and a factor m that are known beforehand, and sums of each tile; the division by the
row's sum S goes to the small operands of the other two products:

    dZ = v (E - S onehot),   v = u / S
    dX = v (E' W + residue W_y),   dW = E'^T (v X),   E' = E with -R rounded at the target,

where R = S - e_y is the sum over the other columns, and `residue` what rounding took from -R. u is
the token's weight (`rows.effective_weights`), W_y the target's row of the lm_head. This is the
plain PyTorch statement, in bfloat16 alone; its twin is in `exponentials_triton.py`.

Four things make it exact, and versions without them fail the tests:

- The shift is the target's logit z_y, so c <= L, the row's log-sum-exp, and S >= 1. An upper
  bound of L, as Cauchy-Schwarz gives, exceeds it by hundreds on real states: all of E would be 0.
  Where c lies so far below L that S exceeds `LARGEST_SUM`, the row is done again with its maximum.
- m in [1, 2) is the mantissa of the token's weight. Where one token of the vocabulary has nearly
  all the probability S is then nearly m and v a power of two, so v X is not rounded. (A
  plain loss has this for nothing, as p - onehot is nearly 1 or -1 there. It shows where hidden
  states are alike and the gradients of positive and negative traces cancel.)
- R is summed without the target, as e_y >= 1 would hide it where the target is nearly certain.
- The target's entry is rounded *inside* both products. To leave e_y in E and subtract S there in
  float32 afterwards looks more exact, and leaves the rounding of v X, 2^-9 u X, in dW, which for a
  nearly certain token is far more than its gradient.
"""

from typing import Protocol

import torch
from torch import Tensor

from redi.kernels.rows import (
    MIN_ONE_MINUS_P,
    GradientRows,
    TileSums,
    TokenWeights,
    effective_weights,
    weights_at,
)

# A row whose sum is larger is done again. Its v = u / S times a hidden state's entry must stay
# above bfloat16's smallest number, 2^-126: 34 powers of two are left to u x. (Beyond, all values
# stay finite while the gradient silently vanishes.)
LARGEST_SUM = 2.0**92

# R's share that lies in the target's tile is taken from E, rounded, where it is below this, and
# else as the tile's float32 sum less e_y. Each is too coarse for the other's part: roundings of E
# are 2^-9 of the share, which a log-prob would show; the difference has e_y's own error, 1e-5.
SMALL_SHARE = 2.0**-6

# Where R is a smaller part of S than this the log-prob is - log1p(R / e_y).
CONFIDENT = 2.0**-8

# A tile in this file; the Triton kernel has its own.
TILE_ROWS, TILE_COLUMNS = 16, 128


class ExponentialsKernel(Protocol):
    """Signature of `exponentials`, which see."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        targets: Tensor,
        weights: TokenWeights | None,
        *,
        coefficient: str,
        logps: Tensor,
        out: Tensor,
        epsilon: float | None = None,
    ) -> GradientRows | None: ...


def exponentials(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    targets: Tensor,
    weights: TokenWeights | None,
    *,
    coefficient: str,
    logps: Tensor,
    out: Tensor,
    epsilon: float | None = None,
) -> GradientRows | None:
    """Log-probs of the targets and, given weights, the gradient of the loss by the logits.

    Args:
        hidden: [C, D] bfloat16, the chunk's hidden states.
        weight: [V, D] bfloat16, the lm_head.
        tokens: [C] int64: which token of the packed row each row belongs to.
        targets: [T] int64; in [0, V) at `tokens`.
        weights: w of the tokens, or None for log-probs alone.
        coefficient: "weight", "dft" or "unlikelihood"; see `rows.effective_weights`.
        logps: [T] float32, written at `tokens`; never above 0.
        out: [C, V] bfloat16, unit stride along V, overwritten: the gradient's matrix.
        epsilon: of a filter (`filter.py`): the gradient comes with its `tiles`, and a tile that is
            certain to be left out need not be written. None: every tile is.

    Returns:
        The gradient in parts, its matrix `out`; None without weights.
    """
    target = targets[tokens, None]
    z = hidden.float() @ weight.float().T
    z_target = (hidden.float() * weight[target[:, 0]].float()).sum(-1, keepdim=True)

    w = None if weights is None else weights_at(weights, tokens, torch.float32)[:, None]
    m = torch.ones_like(z_target) if w is None else _mantissa(w)

    shift = z_target
    rest, sums = _sum_of_others(z, z_target, shift, m, target, out)
    outside = ~(rest <= LARGEST_SUM)  # NaN too
    if outside.any():
        shift = torch.where(outside, z.amax(-1, keepdim=True), shift)
        rest, sums = _sum_of_others(z, z_target, shift, m, target, out)

    e_target = m * (z_target - shift).exp()
    total = rest + e_target
    logp = torch.where(
        rest < CONFIDENT * total, -(rest / e_target).log1p(), z_target - shift - (total / m).log()
    )
    logps[tokens] = logp[:, 0]
    if w is None:
        return None
    u = effective_weights(w, logp, rest / e_target, coefficient)
    if coefficient == "unlikelihood":  # the same floor as in the weights: -w p at certainty
        rest = rest.clamp(min=MIN_ONE_MINUS_P)
    at_target = (-rest).to(out.dtype)
    out.scatter_(1, target, at_target)
    tiles = None if epsilon is None else TileSums(sums, total[:, 0], TILE_ROWS, TILE_COLUMNS)
    return GradientRows(out, (u / total)[:, 0], (-rest - at_target.float())[:, 0], tiles)


def _mantissa(weights: Tensor) -> Tensor:
    """m of |w| = m 2^k, m in [1, 2); 1 where w is 0."""
    mantissa, _ = torch.frexp(weights.abs())  # in [1/2, 1)
    return torch.where(weights == 0, 1.0, 2 * mantissa)


def _sum_of_others(
    z: Tensor, z_target: Tensor, shift: Tensor, m: Tensor, target: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Leaves m exp(z - shift) in `out`, rounded.

    Returns its sum without the target, [C, 1], and those of whole tiles, [C, tiles]. The former
    from what the product's epilogue has: float32 sums of whole tiles, and what it stored.
    """
    e = m * (z - shift).exp()
    out.copy_(e)
    columns = torch.arange(z.shape[1], device=z.device)
    tile = columns // TILE_COLUMNS
    sums = e.new_zeros(len(e), int(tile[-1]) + 1).index_add_(1, tile, e)

    target_tile = target // TILE_COLUMNS
    beside = (tile == target_tile) & (columns != target)
    share = out.float().masked_fill_(~beside, 0.0).sum(-1, keepdim=True)
    difference = sums.gather(1, target_tile) - m * (z_target - shift).exp()
    share = torch.where(share < SMALL_SHARE, share, difference)
    return sums.scatter(1, target_tile, 0.0).sum(-1, keepdim=True) + share, sums
