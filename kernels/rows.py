"""What becomes of one chunk of logits: log-probs, and the gradient in the logits' own storage.

This is the seam between backends. `chunked.py` makes the logits and uses the gradient; whatever
stands in for `softmax_rows` (a Triton kernel, say) has the signature of `RowKernel`. The two
formulas that depend on `coefficient` are functions of (weight, log-prob) alone and stand here
once for every backend that computes in PyTorch.
"""

from typing import Protocol

import torch
from torch import Tensor

# Below this, 1 - p counts as this: the unlikelihood of a token that is certain stays finite, and
# so does the product of its coefficient, weight / 2^-100, with the (underflowing) other columns.
MIN_ONE_MINUS_P = 2.0**-100

# Rows of logits that go through all the steps of `softmax_rows` before the next ones do, on a
# CPU: they stay in its second-level cache meanwhile.
CPU_BLOCK_BYTES = 2 << 20


class RowKernel(Protocol):
    """Signature of `softmax_rows`, which see."""

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        coefficient: str,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]: ...


def token_losses(logps: Tensor, weights: Tensor, coefficient: str) -> Tensor:
    """Each token's term of the loss; both arguments and the result share one shape and dtype.

    A token of weight 0 contributes 0 whatever its log-prob, -inf included.
    """
    losses = -weights * logps
    if coefficient == "dft":
        losses = losses * logps.exp()
    elif coefficient == "unlikelihood":
        one_minus_p = (-logps.expm1()).clamp(min=MIN_ONE_MINUS_P)
        losses = torch.where(weights < 0, weights * one_minus_p.log(), losses)
    return losses.masked_fill(weights == 0, 0.0)


def effective_weights(logps: Tensor, weights: Tensor, coefficient: str) -> Tensor:
    """-d token_losses / d logps: the weight u that makes the gradient of the logits u (p - onehot).

    For dft u = w p. For unlikelihood of w < 0, u = w p / (1 - p) = w / (exp(-logp) - 1).
    """
    if coefficient == "dft":
        return weights * logps.exp()
    if coefficient == "unlikelihood":
        odds_against = (-logps).expm1().clamp(min=MIN_ONE_MINUS_P)
        return torch.where(weights < 0, weights / odds_against, weights)
    return weights


def softmax_rows(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    coefficient: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets and, given weights, the gradient of the loss by the logits.

    Args:
        logits: [C, V] float32 or float64; destroyed.
        targets: [C] int64, in [0, V).
        weights: [C] of the logits' dtype, or None for log-probs alone.
        coefficient: "weight", "dft" or "unlikelihood"; see `effective_weights`.
        dtype: what the gradient is rounded to, once.

    Returns:
        logps [C] in the logits' dtype, never above 0, and dlogits [C, V] = u (p - onehot) or
        None. dlogits have `dtype` where the device multiplies halves into float32
        (`multiplies_halves`), else they hold the rounded values in the logits' dtype and storage.

    With e_j = exp(z_j - max z), the sum R over j != target and the total S = R + e_target:
    logp = z_target - max z - log S, with log S = log1p(R) where the target is the largest, and
    the target's gradient is u (p_target - 1) = -u R / S. R is summed without the target, so that
    neither cancels when p_target is close to 1; a row's gradient sums to 0 up to rounding.
    """
    logps = torch.empty(logits.shape[0], dtype=logits.dtype, device=logits.device)
    dlogits = None
    if weights is not None:
        separate = dtype != logits.dtype and multiplies_halves(logits.device)
        dlogits = torch.empty_like(logits, dtype=dtype) if separate else logits

    for rows in _blocks(logits):
        e = logits[rows]
        target = targets[rows, None]
        largest = e.amax(-1, keepdim=True)
        z_target = e.gather(1, target) - largest
        e.sub_(largest).exp_()
        e_target = e.gather(1, target)
        rest = e.scatter_(1, target, 0.0).sum(-1, keepdim=True)
        total = rest + e_target
        logp = z_target - torch.where(z_target == 0, rest.log1p(), total.log())
        logps[rows] = logp[:, 0]
        if weights is None:
            continue
        scale = effective_weights(logp, weights[rows, None], coefficient) / total
        if coefficient == "unlikelihood":  # the same floor as in the weights: -w p at certainty
            rest = rest.clamp(min=MIN_ONE_MINUS_P)
        e.mul_(scale).scatter_(1, target, -scale * rest)
        if dlogits is not logits:
            dlogits[rows] = e  # type: ignore[index]
        elif dtype != logits.dtype:
            e.copy_(e.to(dtype))
    return logps, dlogits


def multiplies_halves(device: torch.device) -> bool:
    """Whether `mm(half, half, out_dtype=float32)` exists there; elsewhere the operands are cast."""
    return device.type == "cuda" and torch.version.hip is None


def _blocks(logits: Tensor) -> list[slice]:
    rows, columns = logits.shape
    if logits.device.type != "cpu":
        return [slice(0, rows)]
    step = max(1, CPU_BLOCK_BYTES // (columns * logits.element_size()))
    return [slice(start, start + step) for start in range(0, rows, step)]
