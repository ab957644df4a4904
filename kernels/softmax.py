"""The softmax step of a chunk of logits: log-probs, and the gradient over the logits.

This is where backends differ. `chunked.py` makes the logits and multiplies the gradient; the kernel
between them is `softmax` here, in plain PyTorch, or its twin in `softmax_triton.py`. The formulas
are the same: read this one first.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from redi.kernels.topk_softmax import Teacher

# 1 - p counts as at least this: the unlikelihood of a certain token stays finite, and so does the
# product of its coefficient, weight / 2^-100, with the (underflowing) other columns.
MIN_ONE_MINUS_P = 2.0**-100

# A gradient in a half type is 0 where e_j is below this share of R, the row's sum without the
# target. Of a trained model's gradients two thirds are, and zeros cost a GPU less power, which
# limits its clock. (Not of the total: a nearly certain token's gradient has no other entries.)
# Errors stay those of rounding: at V = 151,936 at most 2^-8.8 of |u| R can be missing from a row
# of 2 |u| R, and on trained inputs far less is (bench/NOTES.md). Not so with an entropy's gradient,
# p (log p + H): where another token than the target is nearly certain, R is nearly 1, while all of
# that gradient comes from the others. There nothing counts as negligible.
NEGLIGIBLE = 2.0**-26

# |lse| is taken to be at most this where a float16 gradient is scaled, before it is known. A larger
# one overflows float16 to infinity, which a guard on gradients sees.
MOST_LSE = 1024.0

# exp(x) is 0 at and below this, in float64 too.
LOWEST_EXPONENT = -1024.0

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


@dataclass(frozen=True)
class Terms:
    """How logits are transformed, and what a loss has besides - sum_t w_t logp_t.

    The tensors are [T] in the accumulation dtype; where one is None, its term is absent. With
    s = hidden weight^T: z = softcap tanh(logit_scale s / softcap), so dz/ds is
    logit_scale (1 - (z / softcap)^2). Its first factor multiplies all weights (`scaled`) before a
    kernel sees them; the second is the kernel's.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    """eps: logp_t becomes (1 - eps) logp_t + eps (mean log-prob of the row's entries)."""
    entropy_weights: Tensor | None = None
    """e: adds - sum_t e_t H_t."""
    lse_weights: Tensor | None = None
    """l: adds sum_t l_t lse_t, lse the row's log-sum-exp."""
    z_weights: Tensor | None = None
    """q: adds sum_t q_t lse_t^2."""
    teacher: "Teacher | None" = None
    """Adds its divergences; computed by `topk_softmax`, which takes no other term."""

    @property
    def are_plain(self) -> bool:
        """Whether there is at most a scale, which `exp_gemm` computes too."""
        weights = self.entropy_weights, self.lse_weights, self.z_weights, self.teacher
        numbers = self.softcap, self.label_smoothing
        return numbers == (None, 0.0) and all(values is None for values in weights)

    def scaled(self, factor: float | Tensor) -> "Terms":
        """The terms with all weights multiplied."""

        def times(values: Tensor | None) -> Tensor | None:
            return None if values is None else values * factor

        return replace(
            self,
            entropy_weights=times(self.entropy_weights),
            lse_weights=times(self.lse_weights),
            z_weights=times(self.z_weights),
            teacher=None if self.teacher is None else self.teacher.scaled(factor),
        )

    def lse_gradients(self, tokens: Tensor, lses: Tensor) -> Tensor | None:
        """d loss / d lse of tokens [C], whose log-sum-exps are `lses` [C, 1]; [C, 1] or None."""
        gradients = None if self.lse_weights is None else self.lse_weights[tokens, None]
        if self.z_weights is not None:
            of_squares = 2 * self.z_weights[tokens, None] * lses
            gradients = of_squares if gradients is None else gradients + of_squares
        return gradients

    def gradient_bounds(self, weights: Tensor, vocab: int) -> Tensor:
        """[T]: no entry of a token's gradient by z is larger (in absolute value, and if |lse| is
        at most MOST_LSE); 0 only for a token without any gradient. `weights` are w.
        """
        bounds = weights
        # p_j |log p_j + H| is at most H + 1 / e.
        for values, factor in (
            (self.entropy_weights, math.log(vocab) + 1),
            (self.lse_weights, 1.0),
            (self.z_weights, 2 * MOST_LSE),
        ):
            if values is not None:
                bounds = bounds.abs() + factor * values.abs()
        if self.teacher is not None:
            bounds = bounds.abs() + self.teacher.gradient_bounds()
        return bounds


PLAIN = Terms()


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


def term_losses(
    terms: Terms,
    weights: Tensor,
    entropies: Tensor | None,
    lses: Tensor | None,
    mean_logps: Tensor | None,
) -> Tensor | None:
    """What the terms add to each token's `token_losses`, [T]; None where there are none.

    What a term needs is given: entropies H, log-sum-exps, mean log-probs of all entries. (For
    label smoothing `token_losses` has w (1 - eps).)
    """
    added: list[Tensor] = []
    if mean_logps is not None:
        losses = -terms.label_smoothing * weights * mean_logps
        added.append(losses.masked_fill(weights == 0, 0.0))
    if terms.z_weights is not None:
        assert lses is not None
        added.append(terms.z_weights * lses.square())
    if terms.entropy_weights is not None:
        assert entropies is not None
        added.append(-terms.entropy_weights * entropies)
    return sum(added[1:], added[0]) if added else None


def transform_(logits: Tensor, terms: Terms, with_slope: bool) -> Tensor | None:
    """Scale and cap logits s in place; the slope 1 - (z / softcap)^2 where wanted and not 1.

    The slope is 1 / cosh^2, since 1 - tanh^2 would cancel at a capped logit.
    """
    if terms.logit_scale != 1:
        logits.mul_(terms.logit_scale)
    if terms.softcap is None:
        return None
    logits.div_(terms.softcap)
    slope = logits.cosh().square_().reciprocal_() if with_slope else None
    logits.tanh_().mul_(terms.softcap)
    return slope


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
    terms: Terms = PLAIN,
    entropies: Tensor | None = None,
    lses: Tensor | None = None,
    mean_logps: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> Tensor | None:
    """Log-probs of the targets and, given weights, the gradient of the loss by the logits.

    Args:
        logits: [C, V] float32 or float64, contiguous rows; overwritten. They are hidden weight^T:
            scale and softcap are applied here.
        tokens: [C] int64: the position in the packed row of each row of the logits.
        targets: [T] int64; in [0, V) at `tokens`.
        weights: [T] in the logits' dtype, or None for log-probs alone.
        coefficient: "weight", "dft" or "unlikelihood"; see `effective_weights`.
        dtype: what the gradient is rounded to, once.
        logps: [T] in the logits' dtype, written at `tokens`; never above 0.
        terms: of the loss; label smoothing is for the coefficient "weight".
        entropies: [T] likewise, - sum_j p_j log p_j; None: not computed.
        lses: [T] likewise, log sum_j exp(z_j).
        mean_logps: [T] likewise, the mean over the vocabulary of log p_j.
        dlogits: [C, V] of `dtype`, where to write the gradient; None: the kernel chooses.

    Returns:
        dlogits [C, V] = u (p - onehot), or None without weights; in a half type 0 where p is
        `NEGLIGIBLE`, unless there are weights of entropies. If the kernel chooses, they
        have `dtype` where the device multiplies halves into float32 (`multiplies_halves`), else
        they hold the rounded values in the logits' dtype and storage.

    With e_j = exp(z_j - max z), the sum R over j != target and the total S = R + e_target:
    logp = z_target - max z - log S, with log S = log1p(R) where the target is the largest, and
    the target's gradient is u (p_target - 1) = -u R / S. R is summed without the target, so that
    neither cancels when p_target is close to 1; a row's gradient sums to 0 up to rounding.
    The entropy is log S - M, M = (sum_j e_j (z_j - max z)) / S, both terms of one sign.

    With all terms, the gradient by z_j is

        p_j (u + l + 2 q lse + e (z_j - max z - M)) - w eps / V - (u - w eps) [j = target],

    as log p_j + H = z_j - max z - M, and the gradient by s_j is that times 1 - (z_j / softcap)^2.
    """
    targets = targets[tokens]
    if weights is not None:
        weights = weights[tokens]
        if dlogits is None:
            separate = dtype != logits.dtype and multiplies_halves(logits.device)
            dlogits = torch.empty_like(logits, dtype=dtype) if separate else logits
    tilts = None if terms.entropy_weights is None else terms.entropy_weights[tokens, None]

    for rows in blocks(logits):
        e = logits[rows]
        target = targets[rows, None]
        slope = transform_(e, terms, weights is not None)
        largest = e.amax(-1, keepdim=True)
        z_target = e.gather(1, target) - largest
        e.sub_(largest)
        mean = e.mean(-1) if mean_logps is not None else None
        drops = e.clone() if tilts is not None or entropies is not None else None
        e.exp_()
        moment = (e * drops).nan_to_num_(0.0).sum(-1, keepdim=True) if drops is not None else None
        e_target = e.gather(1, target)
        rest = e.scatter_(1, target, 0.0).sum(-1, keepdim=True)
        total = rest + e_target
        log_total = torch.where(z_target == 0, rest.log1p(), total.log())
        logp = z_target - log_total
        logps[tokens[rows]] = logp[:, 0]
        if entropies is not None:
            assert moment is not None
            entropies[tokens[rows]] = (log_total - moment / total)[:, 0]
        if lses is not None:
            lses[tokens[rows]] = (largest + log_total)[:, 0]
        if mean_logps is not None:
            assert mean is not None
            mean_logps[tokens[rows]] = mean - log_total[:, 0]
        if weights is None:
            continue
        assert dlogits is not None
        if dtype.itemsize == 2 and tilts is None:
            e.masked_fill_(e < NEGLIGIBLE * rest, 0.0)
        u = effective_weights(weights[rows, None], logp, rest / e_target, coefficient) / total
        if coefficient == "unlikelihood":  # the same floor as in the weights: -w p at certainty
            rest = rest.clamp(min=MIN_ONE_MINUS_P)
        at_target = -u * rest
        if (pull := terms.lse_gradients(tokens[rows], largest + log_total)) is not None:
            pull = pull / total
            u, at_target = u + pull, at_target + e_target * pull
        if tilts is not None:
            assert drops is not None
            assert moment is not None
            tilt, mean_drop = tilts[rows] / total, moment / total
            at_target = at_target + e_target * tilt * (z_target - mean_drop)
            # No 0 times infinity where e is 0.
            u = u + tilt * (drops.clamp_(min=LOWEST_EXPONENT) - mean_drop)
        e.mul_(u)
        if terms.label_smoothing:
            smoothing = terms.label_smoothing * weights[rows, None]
            e.sub_(smoothing / e.shape[1])
            at_target = at_target + smoothing - smoothing / e.shape[1]
        e.scatter_(1, target, at_target)
        if slope is not None:
            e.mul_(slope)
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
