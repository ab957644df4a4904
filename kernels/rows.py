"""What becomes of one chunk of logits: log-probs, and the gradient in the logits' own storage.

This is the seam between backends. `chunked.py` makes the logits and uses the gradient; between
them stands a `RowKernel`: `softmax_rows` here, in plain PyTorch, or its twin in
`softmax_triton.py`. Read this one first: the formulas are the same.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Below this, 1 - p counts as this: the unlikelihood of a token that is certain stays finite, and
# so does the product of its coefficient, weight / 2^-100, with the (underflowing) other columns.
MIN_ONE_MINUS_P = 2.0**-100

# Rows of logits that go through all the steps of `softmax_rows` before the next ones do, on a
# CPU: they stay in its second-level cache meanwhile.
CPU_BLOCK_BYTES = 2 << 20


@dataclass(frozen=True)
class SequenceWeights:
    """Token weights that depend on a token's sequence s alone, REDI's among them.

    w = factor / |y_s| for sign +1, -alpha factor / |y_s| for sign -1, 0 for sign 0. A backend may
    work them out where it needs them: no [T] tensor has to exist.
    """

    cu_seqlens: Tensor
    """[S + 1] int32 or int64."""
    signs: Tensor
    """[S] any integer dtype."""
    lengths: Tensor
    """[S] int64: |y_s|, the unmasked targets of each sequence."""
    alpha: float
    factor: float
    """1 / num_pairs, times what else multiplies the gradient."""

    def of_sequences(self, dtype: torch.dtype) -> Tensor:
        """[S]; 0 for a sequence without unmasked targets."""
        signs = self.signs.to(dtype)
        wanted = torch.where(signs < 0, self.alpha * signs, signs) * self.factor
        return (wanted / self.lengths.clamp(min=1)).masked_fill(self.lengths == 0, 0.0)

    def of_tokens(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[C]: the weights of the tokens at the positions `tokens` [C]."""
        ends = self.cu_seqlens[1:].long().contiguous()
        sequences = torch.searchsorted(ends, tokens, right=True)
        weights = self.of_sequences(dtype)
        return torch.cat([weights, weights.new_zeros(1)])[sequences]  # 0 behind the last sequence


TokenWeights = Tensor | SequenceWeights
"""[T] in the accumulation dtype, or a rule for them."""


def weights_at(weights: TokenWeights, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """[C]: the weights of the tokens at the positions `tokens` [C]."""
    return weights[tokens] if isinstance(weights, Tensor) else weights.of_tokens(tokens, dtype)


@dataclass(frozen=True)
class TileSums:
    """How the exponentials E of a chunk are spread over the tiles in which they were made."""

    sums: Tensor
    """[C, tiles] float32: of each row's exponentials in each tile of columns."""
    totals: Tensor
    """[C] float32: of each row's exponentials."""
    rows: int
    """Of a tile."""
    columns: int


@dataclass(frozen=True)
class GradientRows:
    """A chunk's dZ = factors (matrix + residues onehot), in the parts that the products take.

    dX = factors (matrix W + residues W_y) and dW = matrix^T (factors X), W_y the target's row.
    """

    matrix: Tensor
    """[C, V], the operand of both products."""
    factors: Tensor | None = None
    """[C] float32; None stands for 1."""
    residues: Tensor | None = None
    """[C] float32: what the target's entry lost when it was rounded to the matrix's dtype. In dW
    it is one rounding among many; in dX it would weigh against a sum that nearly cancels."""
    tiles: TileSums | None = None
    """Where a filter asked. Tiles that hold too little for it may not have been written."""


class RowKernel(Protocol):
    """Signature of `softmax_rows`, which see."""

    def __call__(
        self,
        logits: Tensor,
        tokens: Tensor,
        targets: Tensor,
        weights: TokenWeights | None,
        *,
        coefficient: str,
        dtype: torch.dtype,
        logps: Tensor,
        entropies: Tensor | None = None,
        scale: Tensor | None = None,
        dlogits: Tensor | None = None,
    ) -> Tensor | None: ...


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


def effective_weights(
    weights: Tensor, logps: Tensor, odds_against: Tensor, coefficient: str
) -> Tensor:
    """-d token_losses / d logps: the weight u that makes the gradient of the logits u (p - onehot).

    For dft u = w p. For unlikelihood of w < 0, u = w p / (1 - p), w over the odds against.
    """
    if coefficient == "dft":
        return weights * logps.exp()
    if coefficient == "unlikelihood":
        return torch.where(weights < 0, weights / odds_against.clamp(min=MIN_ONE_MINUS_P), weights)
    return weights


def softmax_rows(
    logits: Tensor,
    tokens: Tensor,
    targets: Tensor,
    weights: TokenWeights | None,
    *,
    coefficient: str,
    dtype: torch.dtype,
    logps: Tensor,
    entropies: Tensor | None = None,
    scale: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> Tensor | None:
    """Log-probs of the targets and, given weights, the gradient of the loss by the logits.

    Args:
        logits: [C, V] float32 or float64, contiguous rows; destroyed.
        tokens: [C] int64: which token of the packed row each row of the logits belongs to.
        targets: [T] int64; in [0, V) at `tokens`.
        weights: w of the tokens, or None for log-probs alone.
        coefficient: "weight", "dft" or "unlikelihood"; see `effective_weights`.
        dtype: what the gradient is rounded to, once.
        logps: [T] in the logits' dtype, written at `tokens`; never above 0.
        entropies: [T] likewise, - sum_j p_j log p_j, where wanted.
        scale: a scalar on the device that multiplies the weights.
        dlogits: [C, V] of `dtype`, where to put the gradient; None leaves it to the kernel.

    Returns:
        dlogits [C, V] = u (p - onehot), or None without weights. Not given a place they have
        `dtype` where the device multiplies halves into float32 (`multiplies_halves`), else they
        hold the rounded values in the logits' dtype and storage.

    With e_j = exp(z_j - max z), the sum R over j != target and the total S = R + e_target:
    logp = z_target - max z - log S, with log S = log1p(R) where the target is the largest, and
    the target's gradient is u (p_target - 1) = -u R / S. R is summed without the target, so that
    neither cancels when p_target is close to 1; a row's gradient sums to 0 up to rounding.
    The entropy is log S - (sum_j e_j (z_j - max z)) / S, both terms of one sign.
    """
    targets = targets[tokens]
    if weights is not None:
        weights = weights_at(weights, tokens, logits.dtype)
        weights = weights if scale is None else weights * scale
        if dlogits is None:
            separate = dtype != logits.dtype and multiplies_halves(logits.device)
            dlogits = torch.empty_like(logits, dtype=dtype) if separate else logits

    for rows in _blocks(logits):
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
    """Whether `mm(half, half, out_dtype=float32)` exists there; elsewhere the operands are cast.

    That is on NVIDIA's GPUs from compute capability 8.0: bfloat16 needs it.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _blocks(logits: Tensor) -> list[slice]:
    rows, columns = logits.shape
    if logits.device.type != "cpu":
        return [slice(0, rows)]
    step = max(1, CPU_BLOCK_BYTES // (columns * logits.element_size()))
    return [slice(start, start + step) for start in range(0, rows, step)]
