"""The softmax step of a chunk of logits: log-probs, and the gradient over the logits.

This is where backends differ. `chunked.py` makes the logits and multiplies the gradient; the kernel
between them is `softmax` here, in plain PyTorch, or its twin in `softmax_triton.py`. The formulas
are the same: read this one first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# 1 - p counts as at least this: the unlikelihood of a certain token stays finite, and so does the
# product of its coefficient, weight / 2^-100, with the (underflowing) other columns.
MIN_ONE_MINUS_P = 2.0**-100

# A gradient in a half type is 0 where e_j is below this share of R, the row's sum without the
# target. Of a trained model's gradients two thirds are, and zeros cost a GPU less power, which
# limits its clock. (Not of the total: a nearly certain token's gradient has no other entries.)
# Errors stay those of rounding: at V = 151,936 at most 2^-8.8 of |u| R can be missing from a row
# of 2 |u| R, and on trained inputs far less is (bench/NOTES.md).
NEGLIGIBLE = 2.0**-26

# On a CPU a block of rows goes through all steps at once, so that it stays in the second-level
# cache.
CPU_BLOCK_BYTES = 2 << 20


@dataclass(frozen=True)
class GradientRows:
    """A chunk's gradient by the logits, dZ = factors (matrix + residues onehot).

    dX = factors (matrix W + residues W_y) and dW = matrix^T (factors X), W_y the target's row.
    """

    matrix: Tensor
    """[C, V], the operand of both products."""
    factors: Tensor | None = None
    """[C] float32; None: 1."""
    residues: Tensor | None = None
    """[C] float32: what rounding took from the target's entry; None: 0. dW is a sum over tokens
    and needs no such correction; in dX the rounding would show where the row nearly cancels."""


def token_losses(logps: Tensor, weights: Tensor, coefficient: str) -> Tensor:
    """Each token's term of the loss; arguments and result have one shape and dtype.

    A token of weight 0 contributes 0 whatever its log-prob, -inf included.
    """
    losses = -weights * logps
    if coefficient == "dft":
        losses = losses * logps.exp()
    elif coefficient == "unlikelihood":
        one_minus_p = (-logps.expm1()).clamp(min=MIN_ONE_MINUS_P)
        losses = torch.where(weights < 0, weights * one_minus_p.log(), losses)
    return losses.masked_fill(weights == 0, 0.0)


def effective_weights(
    weights: Tensor, logps: Tensor, odds_against: Tensor, coefficient: str
) -> Tensor:
    """-d token_losses / d logps: the u that makes the gradient by the logits u (p - onehot).

    dft: u = w p. unlikelihood, w < 0: u = w p / (1 - p), that is w over the odds against.
    """
    if coefficient == "dft":
        return weights * logps.exp()
    if coefficient == "unlikelihood":
        return torch.where(weights < 0, weights / odds_against.clamp(min=MIN_ONE_MINUS_P), weights)
    return weights


def softmax(
    logits: Tensor,
    tokens: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *,
    coefficient: str,
    dtype: torch.dtype,
    logps: Tensor,
    entropies: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> Tensor | None:
    """Log-probs of the targets and, given weights, the gradient of the loss by the logits.

    Args:
        logits: [C, V] float32 or float64, contiguous rows; overwritten.
        tokens: [C] int64: the position in the packed row of each row of the logits.
        targets: [T] int64; in [0, V) at `tokens`.
        weights: [T] in the logits' dtype, or None for log-probs alone.
        coefficient: "weight", "dft" or "unlikelihood"; see `effective_weights`.
        dtype: what the gradient is rounded to, once.
        logps: [T] in the logits' dtype, written at `tokens`; never above 0.
        entropies: [T] likewise, - sum_j p_j log p_j; None: not computed.
        dlogits: [C, V] of `dtype`, where to write the gradient; None: the kernel chooses.

    Returns:
        dlogits [C, V] = u (p - onehot), or None without weights; in a half type 0 where p is
        `NEGLIGIBLE`. If the kernel chooses, they have `dtype` where the device multiplies halves
        into float32 (`multiplies_halves`), else they hold the rounded values in the logits' dtype
        and storage.

    With e_j = exp(z_j - max z), the sum R over j != target and the total S = R + e_target:
    logp = z_target - max z - log S, with log S = log1p(R) where the target is the largest, and
    the target's gradient is u (p_target - 1) = -u R / S. R is summed without the target, so that
    neither cancels when p_target is close to 1; a row's gradient sums to 0 up to rounding.
    The entropy is log S - (sum_j e_j (z_j - max z)) / S, both terms of one sign.
    """
    targets = targets[tokens]
    if weights is not None:
        weights = weights[tokens]
        if dlogits is None:
            separate = dtype != logits.dtype and multiplies_halves(logits.device)
            dlogits = torch.empty_like(logits, dtype=dtype) if separate else logits

    for rows in blocks(logits):
        e = logits[rows]
        target = targets[rows, None]
        largest = e.amax(-1, keepdim=True)
        z_target = e.gather(1, target) - largest
        e.sub_(largest)
        moment = (e.exp() * e).nan_to_num_(0.0).sum(-1) if entropies is not None else None
        e.exp_()
        e_target = e.gather(1, target)
        rest = e.scatter_(1, target, 0.0).sum(-1, keepdim=True)
        total = rest + e_target
        log_total = torch.where(z_target == 0, rest.log1p(), total.log())
        logp = z_target - log_total
        logps[tokens[rows]] = logp[:, 0]
        if entropies is not None:
            assert moment is not None
            entropies[tokens[rows]] = log_total[:, 0] - moment / total[:, 0]
        if weights is None:
            continue
        assert dlogits is not None
        if dtype.itemsize == 2:
            e.masked_fill_(e < NEGLIGIBLE * rest, 0.0)
        u = effective_weights(weights[rows, None], logp, rest / e_target, coefficient) / total
        if coefficient == "unlikelihood":  # the same floor as in the weights: -w p at certainty
            rest = rest.clamp(min=MIN_ONE_MINUS_P)
        e.mul_(u).scatter_(1, target, -u * rest)
        if dlogits is not logits:
            dlogits[rows] = e
        elif dtype != logits.dtype:
            e.copy_(e.to(dtype))
    return dlogits


def multiplies_halves(device: torch.device) -> bool:
    """Whether `mm(half, half, out_dtype=float32)` exists there; elsewhere operands are cast.

    NVIDIA GPUs from compute capability 8.0 on have it: bfloat16 needs that.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def blocks(logits: Tensor) -> list[slice]:
    """The rows of [C, V] that go through all steps at once."""
    rows, columns = logits.shape
    if logits.device.type != "cpu":
        return [slice(0, rows)]
    step = max(1, CPU_BLOCK_BYTES // (columns * logits.element_size()))
    return [slice(start, start + step) for start in range(0, rows, step)]
