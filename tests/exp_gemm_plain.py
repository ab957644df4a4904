"""`exp_gemm_triton.exp_gemm` in plain PyTorch: its formulas, to check them without Triton.

See there for the reasons. The tests of `backend="triton-exp"` run once with each of the two.
"""

import torch
from torch import Tensor

from redi.kernels.experimental.exp_gemm_triton import CONFIDENT, LARGEST_SUM, SMALL_SHARE
from redi.kernels.softmax import MIN_ONE_MINUS_P, GradientRows, effective_weights

TILE_COLUMNS = 128


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
) -> GradientRows | None:
    """Arguments and result are those of the Triton version."""
    target = targets[tokens, None]
    z = logit_scale * (hidden.float() @ weight.float().T)
    z_target = (hidden.float() * weight[target[:, 0]].float()).sum(-1, keepdim=True) * logit_scale

    w = None if weights is None else weights[tokens, None]
    m = torch.ones_like(z_target) if w is None else _mantissa(w)

    shift = z_target
    rest = _sum_of_others(z, z_target, shift, m, target, out)
    outside = ~(rest <= LARGEST_SUM)  # NaN too
    if outside.any():
        shift = torch.where(outside, z.amax(-1, keepdim=True), shift)
        rest = _sum_of_others(z, z_target, shift, m, target, out)

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
    return GradientRows(out, (u / total)[:, 0], (-rest - at_target.float())[:, 0])


def _mantissa(weights: Tensor) -> Tensor:
    """m of |w| = m 2^k, m in [1, 2); 1 where w is 0."""
    mantissa, _ = torch.frexp(weights.abs())  # in [1/2, 1)
    return torch.where(weights == 0, 1.0, 2 * mantissa)


def _sum_of_others(
    z: Tensor, z_target: Tensor, shift: Tensor, m: Tensor, target: Tensor, out: Tensor
) -> Tensor:
    """Writes m exp(z - shift) to `out`, rounded; returns its sum without the target, [C, 1].

    The sum comes from what the product's epilogue has: float32 sums of whole tiles, and what it
    stored.
    """
    e = m * (z - shift).exp()
    out.copy_(e)
    columns = torch.arange(z.shape[1], device=z.device)
    tile = columns // TILE_COLUMNS
    sums = e.new_zeros(len(e), int(tile[-1]) + 1).index_add_(1, tile, e)

    target_tile = target // TILE_COLUMNS
    others = (tile == target_tile) & (columns != target)
    share = out.float().masked_fill_(~others, 0.0).sum(-1, keepdim=True)
    difference = sums.gather(1, target_tile) - m * (z_target - shift).exp()
    share = torch.where(share < SMALL_SHARE, share, difference)
    return sums.scatter(1, target_tile, 0.0).sum(-1, keepdim=True) + share
