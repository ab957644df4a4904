"""The chunk loop and the three matrix products, for every device and backend.

With u_t the weight of token t and dZ [N, V] = u (p - onehot) the gradient by the logits, forward
and backward are three products: Z = X W^T, dX = dZ W, dW = dZ^T X. The weights are known before
the forward pass, so all three are computed while a chunk of C rows of Z is in memory, and dZ
overwrites it: no [N, V] tensor ever exists, and nothing is computed twice.

A kernel does the step between the first product and the other two: `softmax.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from redi.kernels.backends import Kernels
from redi.kernels.chunk_sizes import chunk_buffer, default_chunk_tokens, split
from redi.kernels.reference import IGNORE_INDEX, accumulation_dtype
from redi.kernels.softmax import PLAIN, GradientRows, Terms, multiplies_halves

# float16: dZ is multiplied by a power of two that brings the largest weight to 2^14 .. 2^15, as
# the weights themselves (1e-7 at 32 pairs of 20,000 tokens) would underflow.
HALF_EXPONENT = 15


class TokenSchedule(NamedTuple):
    """What the caller may fix beforehand; None: found or chosen in the op."""

    valid_index: Tensor | None
    """[N] positions of unmasked targets; without it a GPU must synchronise once."""
    num_with_grad: int | None
    """How many of `valid_index`, from the first, may have a weight other than 0."""
    chunk_tokens: int | None
    """Rows of a chunk at most."""


@dataclass(frozen=True)
class Outputs:
    """Tensors to fill in, in the accumulation dtype; one that is None is not computed."""

    logps: Tensor | None = None
    """[T], 0 where masked."""
    entropies: Tensor | None = None
    """[T] likewise; only along with logps."""
    lses: Tensor | None = None
    """[T] likewise: log-sum-exps."""
    mean_logps: Tensor | None = None
    """[T] likewise: means over the vocabulary of its log-probs."""
    divergences: Tensor | None = None
    """[T] likewise, of a teacher: along with `Terms.teacher`."""
    dropped: Tensor | None = None
    """[T], a filter's: the share of each token's probability that was left out."""
    dhidden: Tensor | None = None
    """[T, D] contiguous, 0 where masked."""
    dweight: Tensor | None = None
    """[V, D] contiguous."""
    accumulate: bool = False
    """Add to `dweight` instead of overwriting it."""
    kept: GradientRows | None = None
    """p - onehot of the unmasked tokens for `kept_gradient_chunks`, in place of dhidden and
    dweight. At least N rows, those after N are set to 0. The matrix is in hidden's dtype (float16:
    times 2^15, see HALF_EXPONENT); only `exp_gemm` writes factors and residues."""


@dataclass(frozen=True)
class TokenOrder:
    """Which tokens to compute, those with a gradient first."""

    index: Tensor
    """[N] int64: positions in the row."""
    with_grad: int
    """How many of them, from the first, have a gradient."""

    def ranges(self, most: int) -> list[tuple[int, int]]:
        """Chunks of at most `most`: of the tokens with a gradient, then of the others."""
        middle = self.with_grad
        return [*split(0, middle, most), *split(middle, len(self.index), most)]


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a `TokenOrder`, all with a gradient or all without."""

    rows: slice
    """Their places in the order."""
    tokens: Tensor
    """[C] int64: their positions in the row."""
    hidden: Tensor
    """[C, D]"""
    has_grad: bool


class Products:
    """Adds up dX and dW over chunks."""

    def __init__(
        self, weight: Tensor, targets: Tensor, out: Outputs, scale: Tensor | None = None
    ) -> None:
        """`weight` is a `product_operand`; what is added is `scale` (on the device) times dZ."""
        self.weight, self.targets, self.scale = weight, targets, scale
        self.dhidden, self.dweight, self.accumulate = out.dhidden, out.dweight, out.accumulate
        if self.dhidden is not None:
            self.dhidden.zero_()
        if self.dweight is not None and self.accumulate and scale is not None:
            self.dweight.mul_(scale)

    def add(self, gradient: GradientRows, chunk: Chunk) -> None:
        """dX and dW of a chunk."""
        self.set_dhidden(gradient, chunk)
        if self.dweight is None:
            return
        x = chunk.hidden
        if gradient.factors is not None:
            x = (x * gradient.factors[:, None]).to(x.dtype)
        matmul(gradient.matrix.T, x, self.dweight, accumulate=self.accumulate)
        self.accumulate = True

    def set_dhidden(self, gradient: GradientRows, chunk: Chunk) -> None:
        """dX of a chunk, which is divided by the scale at once; dW is in `finish`."""
        if self.dhidden is None:
            return
        x = chunk.hidden
        dx = torch.empty(x.shape, dtype=self.dhidden.dtype, device=x.device)
        matmul(gradient.matrix, self.weight, dx)
        if gradient.residues is not None:
            # A target out of range has NaN for a factor: see `triton_common.load_target`.
            last = len(self.weight) - 1
            target_rows = self.weight[self.targets[chunk.tokens].clamp(0, last)]
            dx.addcmul_(gradient.residues[:, None], target_rows.to(dx.dtype))
        if gradient.factors is not None:
            dx.mul_(gradient.factors[:, None])
        if self.scale is not None:
            dx.div_(self.scale)
        self.dhidden[chunk.tokens] = dx

    def add_dweight(self, dweight: Tensor, factor: Tensor) -> None:
        """Add `factor` (one entry, on the device) times a dW that was added up apart."""
        assert self.dweight is not None
        if self.accumulate:
            self.dweight.addcmul_(dweight, factor)
        else:
            torch.mul(dweight, factor, out=self.dweight)
        self.accumulate = True

    def finish(self) -> None:
        """Divide dW by the scale; without any chunk it is 0."""
        if self.dweight is None:
            return
        if not self.accumulate:
            self.dweight.zero_()
        elif self.scale is not None:
            self.dweight.div_(self.scale)


def run_chunks(
    hidden: Tensor,
    order: TokenOrder,
    ranges: list[tuple[int, int]],
    make: Callable[[Chunk], GradientRows | None],
    use: Callable[[GradientRows, Chunk], None],
) -> None:
    """The loop over chunks: `make` a chunk's gradient by the logits, `use` it if there is one.

    `hidden` is [T, D], `ranges` are of the order.
    """
    for start, end in ranges:
        tokens = order.index[start:end]
        chunk = Chunk(slice(start, end), tokens, hidden[tokens], start < order.with_grad)
        gradient = make(chunk)
        if gradient is not None:
            use(gradient, chunk)
        del chunk, gradient  # before those of the next chunk are allocated


def gradient_rows(
    chunk: Chunk,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    kernels: Kernels,
    *,
    coefficient: str = "weight",
    terms: Terms,
    logps: Tensor,
    statistics: Outputs | None = None,
    room: Tensor,
    dlogits: Tensor | None = None,
) -> GradientRows | None:
    """The first product of a chunk and the kernel after it: log-probs, and dZ given weights.

    Args:
        weight: [V, D], for the softmax kernel a `product_operand`.
        token_weights: [T], or None for log-probs alone.
        logps: [T], written at the chunk's tokens.
        statistics: of which all but log-probs are filled in.
        room: [C, V], overwritten: logits, or the exponentials in their place.
        dlogits: [C, V], where the softmax kernel writes the gradient; None: it chooses.
    """
    where = chunk.tokens, targets, token_weights
    if kernels.exp_gemm is not None:
        return kernels.exp_gemm(
            chunk.hidden,
            weight,
            *where,
            coefficient=coefficient,
            logps=logps,
            out=room,
            logit_scale=terms.logit_scale,
        )
    out = Outputs() if statistics is None else statistics
    logits, dtype = matmul(chunk.hidden, weight.T, room), chunk.hidden.dtype
    if terms.teacher is not None:
        gradient = kernels.topk_softmax(
            logits, *where, dtype=dtype, logps=logps, divergences=out.divergences, terms=terms
        )
        return None if gradient is None else GradientRows(gradient)
    gradient = kernels.softmax(
        logits,
        *where,
        coefficient=coefficient,
        dtype=dtype,
        logps=logps,
        terms=terms,
        entropies=out.entropies,
        lses=out.lses,
        mean_logps=out.mean_logps,
        dlogits=dlogits,
    )
    return None if gradient is None else GradientRows(gradient)


def cross_entropy_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    out: Outputs,
    schedule: TokenSchedule,
    kernels: Kernels,
    coefficient: str = "weight",
    terms: Terms = PLAIN,
) -> None:
    """Fill in the outputs.

    Args:
        hidden: [T, D], any strides.
        weight: [V, D], any strides.
        targets: [T] int64, -100 masks.
        token_weights: [T] accumulation dtype; None if neither dhidden nor dweight is wanted.
        kernels: of the backend. Entropies are always computed from logits, as are all `terms` but
            a scale.
        coefficient: see `softmax.effective_weights`.
        terms: what else the loss has, and the logits' scale and softcap. `kept` is without
            the factor logit_scale.

    Tokens of weight 0 cost the logits product alone, masked tokens nothing. (A GPU that is given
    `valid_index` without `num_with_grad` does not know them and treats all tokens alike.)
    """
    kept, dtype = out.kept, accumulation_dtype(hidden.dtype)
    statistics = out.entropies, out.lses, out.mean_logps, out.divergences
    if not terms.are_plain or any(values is not None for values in statistics):
        kernels = replace(kernels, exp_gemm=None)
    if kept is not None:
        order = _all_with_grad(targets, schedule)
        token_weights = torch.full_like(targets, kept_scale(hidden.dtype), dtype=dtype)
    else:
        if out.dhidden is None and out.dweight is None:
            token_weights = None
        elif token_weights is not None and terms.logit_scale != 1:
            token_weights = token_weights * terms.logit_scale
            terms = terms.scaled(terms.logit_scale)
        bounds = token_weights
        if token_weights is not None:
            bounds = terms.gradient_bounds(token_weights, len(weight))
        order = order_tokens(targets, bounds, schedule)
    if out.logps is None:
        order = TokenOrder(order.index[: order.with_grad], order.with_grad)
    buffer_dtype = dtype if kernels.exp_gemm is None else hidden.dtype
    most = schedule.chunk_tokens or default_chunk_tokens(len(order.index), weight, buffer_dtype)
    ranges = order.ranges(most)
    operand = product_operand(weight)
    in_place = kept is not None and kept.matrix.dtype == buffer_dtype
    buffer = chunk_buffer([] if in_place else ranges, weight, buffer_dtype)

    scale = None
    if hidden.dtype == torch.float16 and order.with_grad and kept is None:
        assert token_weights is not None
        assert bounds is not None
        scale = power_of_two(bounds[order.index[: order.with_grad]], HALF_EXPONENT)
        token_weights, terms = token_weights * scale, terms.scaled(scale)
    for values in (out.logps, *statistics):
        if values is not None:
            values.zero_()
    if kept is not None:
        for part in (kept.matrix, kept.factors, kept.residues):
            if part is not None:
                part[len(order.index) :].zero_()
    logps = hidden.new_empty(targets.shape, dtype=dtype) if out.logps is None else out.logps

    def make(chunk: Chunk) -> GradientRows | None:
        kept_rows = None if kept is None else kept.matrix[chunk.rows]
        room = buffer[: len(chunk.tokens)]
        if in_place and kept_rows is not None:
            room = kept_rows
        return gradient_rows(
            chunk,
            operand if kernels.exp_gemm is None else weight,
            targets,
            token_weights if chunk.has_grad else None,
            kernels,
            coefficient=coefficient,
            terms=terms,
            logps=logps,
            statistics=out,
            room=room,
            dlogits=kept_rows,
        )

    def keep(made: GradientRows, chunk: Chunk) -> None:
        """The matrix was written in its place."""
        assert kept is not None
        for part, values in ((kept.factors, made.factors), (kept.residues, made.residues)):
            if part is not None and values is not None:
                part[chunk.rows] = values

    products = Products(operand, targets, out, scale)
    run_chunks(hidden, order, ranges, make, products.add if kept is None else keep)
    products.finish()


def kept_gradient_chunks(
    kept: GradientRows,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    out: Outputs,
    schedule: TokenSchedule,
    logit_scale: float = 1.0,
) -> None:
    """The gradients of - sum_t w_t logp_t from what `cross_entropy_chunks` kept.

    The weights multiply the small operands of the products, as factors: `kept` is only read, and
    backward may run again.
    """
    order = _all_with_grad(targets, schedule)
    most = schedule.chunk_tokens or default_chunk_tokens(
        len(order.index), weight, accumulation_dtype(hidden.dtype)
    )
    factors = token_weights[order.index] * logit_scale
    scale = None
    if hidden.dtype == torch.float16 and len(factors):
        scale = power_of_two(factors, 0)  # w X no larger than X, no smaller than w
        factors = factors * scale
        scale = scale * kept_scale(hidden.dtype)
    if kept.factors is not None:
        factors = factors * kept.factors[: len(factors)]

    def make(chunk: Chunk) -> GradientRows:
        residues = None if kept.residues is None else kept.residues[chunk.rows]
        return GradientRows(kept.matrix[chunk.rows], factors[chunk.rows], residues)

    products = Products(product_operand(weight), targets, out, scale)
    run_chunks(hidden, order, order.ranges(most), make, products.add)
    products.finish()


def order_tokens(
    targets: Tensor, token_weights: Tensor | None, schedule: TokenSchedule
) -> TokenOrder:
    """The unmasked tokens, those of non-zero weight first and otherwise in order.

    With `valid_index` on a GPU nothing is read back; otherwise the two counts are, at once.
    """
    index, with_grad, _ = schedule
    if index is not None and (with_grad is not None or targets.device.type != "cpu"):
        with_grad = len(index) if with_grad is None else with_grad
        return TokenOrder(index.long(), 0 if token_weights is None else with_grad)
    valid = targets != IGNORE_INDEX
    has_weight = torch.zeros_like(valid)
    if token_weights is not None:
        has_weight = valid & (token_weights != 0)
    rank = torch.where(valid, torch.where(has_weight, 0, 1), 2)
    count, with_grad = torch.stack([valid.sum(), has_weight.sum()]).tolist()
    return TokenOrder(torch.argsort(rank, stable=True)[:count], with_grad)


def _all_with_grad(targets: Tensor, schedule: TokenSchedule) -> TokenOrder:
    index = order_tokens(targets, None, schedule).index
    return TokenOrder(index, len(index))


def matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a b, or out += a b, added up in out's dtype whatever the operands' dtype."""
    if a.dtype != out.dtype and multiplies_halves(out.device):
        if accumulate:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    a, b = a.to(out.dtype), b.to(out.dtype)
    return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)


def product_operand(weight: Tensor) -> Tensor:
    """The lm_head for `matmul`: cast here where it would else be cast for each chunk."""
    if not multiplies_halves(weight.device):
        weight = weight.to(accumulation_dtype(weight.dtype))
    return weight if 1 in weight.stride() else weight.contiguous()


def kept_scale(dtype: torch.dtype) -> float:
    return 2.0**HALF_EXPONENT if dtype == torch.float16 else 1.0


def power_of_two(weights: Tensor, exponent: int) -> Tensor:
    """2^exponent over the largest |weight|, rounded to a power of two; a scalar on the device.

    At most 2^60: what is scaled with it must not overflow float32.
    """
    _, largest = torch.frexp(weights.abs().amax())
    return torch.ldexp(torch.ones_like(weights[0]), (exponent - largest).clamp(max=60))
