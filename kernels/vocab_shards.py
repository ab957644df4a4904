"""The chunk loop where each rank of a process group holds some rows of the lm_head.

Rank i has W_i [V_i, D], which gives V_i columns of each token's logits: Z_i = X W_i^T. A row's
softmax needs sums over all columns. For a chunk of C tokens a rank computes the maximum m_i of its
columns, the sum R_i of exp(z_j - m_i) over them without the target, and the target's logit where
the target is one of them. These [3, C] numbers (entropies need a fourth, label smoothing one more)
are gathered, and `combine` adds them up in the order of the ranks, on each rank. So log-probs and
losses are bit-equal on all ranks, and a chunk needs one small collective, where all-reducing the
maximum and then the sums would need two.

Then dZ_i and dW_i = dZ_i^T X are local, and dX = sum_i dZ_i W_i is a sum over ranks. A chunk's rows
of dX are all-reduced in the accumulation dtype while the rank computes the chunk's dW_i. (One
all-reduce after the loop would overlap with nothing, and would move masked rows too.)

The kernels between the products are `shard_sums` and `shard_gradient` here, or their twins in
`vocab_shards_triton.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from redi.kernels.chunk_sizes import chunk_buffer, default_chunk_tokens
from redi.kernels.chunked import (
    HALF_EXPONENT,
    Chunk,
    Outputs,
    Products,
    TokenOrder,
    TokenSchedule,
    matmul,
    order_tokens,
    power_of_two,
    product_operand,
    run_chunks,
)
from redi.kernels.reference import accumulation_dtype
from redi.kernels.softmax import (
    LOWEST_EXPONENT,
    MIN_ONE_MINUS_P,
    NEGLIGIBLE,
    PLAIN,
    GradientRows,
    Terms,
    blocks,
    effective_weights,
    multiplies_halves,
    transform_,
)
from redi.kernels.validate import FLOATS, check_target_values, may_read

COEFFICIENTS = ("weight", "dft", "unlikelihood")


@dataclass(frozen=True)
class Agreement:
    """What the ranks exchange before the first chunk."""

    start: int
    """The first row of the lm_head that this rank holds."""
    vocab: int
    """V: rows of all ranks."""
    chunk_tokens: int
    """Rows of a chunk at most, the same on all ranks: the least that one of them would take."""


class Softmax(NamedTuple):
    """Over the whole vocabulary, each [C]; the names are those of `softmax.softmax`."""

    largest: Tensor
    z_target: Tensor
    """The target's logit minus the largest."""
    rest: Tensor
    e_target: Tensor
    log_total: Tensor
    moment: Tensor | None
    """sum_j e_j (z_j - largest), the target's included."""
    logits: Tensor | None
    """sum_j z_j."""


class RowGradients(NamedTuple):
    """What each of C rows of a rank's gradient is made of, each [C].

    With d_j = z_j - m_i, m_i the largest of the rank's columns: the gradient by z_j is
    exp(d_j) (factors + tilts d_j) - shifts, but `at_target` at the target.
    """

    factors: Tensor
    tilts: Tensor | None
    shifts: Tensor | None
    at_target: Tensor
    negligible: Tensor
    """In a half type exp(d_j) counts as 0 below this: see `softmax.NEGLIGIBLE`."""


def vocab_parallel_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    out: Outputs,
    schedule: TokenSchedule,
    group: "dist.ProcessGroup",
    backend: str,
    coefficient: str = "weight",
    terms: Terms = PLAIN,
) -> None:
    """`chunked.cross_entropy_chunks` over a divided vocabulary: fill in the outputs.

    Args:
        hidden, targets, token_weights, schedule, terms: the same on all ranks.
        weight: [V_i, D] this rank's rows of the lm_head, perhaps none.
        out: dweight is [V_i, D], the other outputs are the same on all ranks. `kept` is for
            `cross_entropy_chunks` alone.
        group: the lm_head's rows are those of its ranks, in their order.
        backend: "torch" or "triton".
        coefficient: see `softmax.effective_weights`.

    Raises:
        ValueError: on all ranks, where they differ in what must be the same.
    """
    assert out.kept is None
    dtype = accumulation_dtype(hidden.dtype)
    bounds = None
    if out.dhidden is None and out.dweight is None:
        token_weights = None
    elif token_weights is not None:
        if terms.logit_scale != 1:
            token_weights = token_weights * terms.logit_scale
            terms = terms.scaled(terms.logit_scale)
        bounds = terms.gradient_bounds(token_weights, vocab=1)  # which are 0 depends on no V
    order = order_tokens(targets, bounds, schedule)
    if out.logps is None:
        order = TokenOrder(order.index[: order.with_grad], order.with_grad)
    most = schedule.chunk_tokens or default_chunk_tokens(len(order.index), weight)
    options = coefficient, terms
    agreed = _agree(hidden, weight, targets, token_weights, out, order, most, *options, group)
    check_target_values(targets, agreed.vocab, schedule.valid_index)
    ranges = order.ranges(agreed.chunk_tokens)
    operand = product_operand(weight)
    buffer = chunk_buffer(ranges, weight, dtype)
    with_moment = out.entropies is not None or terms.entropy_weights is not None
    with_mean = out.mean_logps is not None

    scale = None
    if hidden.dtype == torch.float16 and order.with_grad:
        assert token_weights is not None
        bounds = terms.gradient_bounds(token_weights, agreed.vocab)
        scale = power_of_two(bounds[order.index[: order.with_grad]], HALF_EXPONENT)
        token_weights, terms = token_weights * scale, terms.scaled(scale)
    for values in (out.logps, out.entropies, out.lses, out.mean_logps):
        if values is not None:
            values.zero_()

    def make(chunk: Chunk) -> GradientRows | None:
        tokens = chunk.tokens
        logits = matmul(chunk.hidden, operand.T, buffer[: len(tokens)])
        target = targets[tokens]
        columns = target - agreed.start
        columns.masked_fill_((columns < 0) | (columns >= len(weight)), -1)
        sums = sums_of(logits, columns, terms, with_moment, with_mean)
        # Of no rank: a GPU does not check targets beforehand, see `triton_common.load_target`.
        sums[2].masked_fill_((target < 0) | (target >= agreed.vocab), torch.nan)
        softmax = combine(_gather(sums, group), with_moment, with_mean)
        _write_statistics(softmax, tokens, out, agreed.vocab)
        if not chunk.has_grad or token_weights is None:
            return None
        rows = row_gradients(
            softmax, sums[0], tokens, token_weights[tokens], coefficient, terms, agreed.vocab
        )
        return GradientRows(gradient_of(logits, columns, sums[0], rows, terms, hidden.dtype))

    def use(made: GradientRows, chunk: Chunk) -> None:
        if out.dhidden is None:
            to_weight.add(made, chunk)
            return
        to_hidden.add(made, chunk)
        rows = out.dhidden[chunk.tokens]
        work = dist.all_reduce(rows, group=group, async_op=True)
        to_weight.add(made, chunk)
        work.wait()
        out.dhidden[chunk.tokens] = rows

    sums_of, gradient_of = _kernels(backend)
    to_hidden = Products(operand, targets, replace(out, dweight=None), scale)
    to_weight = Products(operand, targets, replace(out, dhidden=None), scale)
    run_chunks(hidden, order, ranges, make, use)
    to_weight.finish()


def _write_statistics(softmax: Softmax, tokens: Tensor, out: Outputs, vocab: int) -> None:
    """Fill in the chunk's entries of the outputs that are [T]."""
    lse = softmax.largest + softmax.log_total
    if out.logps is not None:
        out.logps[tokens] = softmax.z_target - softmax.log_total
    if out.entropies is not None:
        assert softmax.moment is not None
        total = softmax.rest + softmax.e_target
        out.entropies[tokens] = softmax.log_total - softmax.moment / total
    if out.lses is not None:
        out.lses[tokens] = lse
    if out.mean_logps is not None:
        assert softmax.logits is not None
        out.mean_logps[tokens] = softmax.logits / vocab - lse


def row_gradients(
    softmax: Softmax,
    highest: Tensor,
    tokens: Tensor,
    weights: Tensor,
    coefficient: str,
    terms: Terms,
    vocab: int,
) -> RowGradients:
    """The gradient of `softmax.softmax` for a rank whose columns' maxima are `highest` [C].

    Args:
        tokens: [C] positions in the packed row.
        weights: [C] of the tokens.
        vocab: V of all ranks.
    """
    largest, z_target, rest, e_target, log_total, moment, _ = softmax
    total = rest + e_target
    logp = z_target - log_total
    u = effective_weights(weights, logp, rest / e_target, coefficient) / total
    lower = highest - largest
    shrink = lower.exp()  # exp(z - m) = exp(m_i - m) exp(z - m_i)
    negligible = NEGLIGIBLE * rest / shrink
    if coefficient == "unlikelihood":  # the same floor as in the weights: -w p at certainty
        rest = rest.clamp(min=MIN_ONE_MINUS_P)
    at_target = -u * rest
    lses = (largest + log_total)[:, None]
    if (pull := terms.lse_gradients(tokens, lses)) is not None:
        pull = pull[:, 0] / total
        u, at_target = u + pull, at_target + e_target * pull
    tilts = None
    if terms.entropy_weights is not None:
        assert moment is not None
        negligible = torch.zeros_like(negligible)  # nothing is, see `softmax.NEGLIGIBLE`
        tilt, mean_drop = terms.entropy_weights[tokens] / total, moment / total
        at_target = at_target + e_target * tilt * (z_target - mean_drop)
        u = u + tilt * (lower.clamp(min=LOWEST_EXPONENT) - mean_drop)
        tilts = shrink * tilt
    shifts = None
    if terms.label_smoothing:
        smoothing = terms.label_smoothing * weights
        shifts = smoothing / vocab
        at_target = at_target + smoothing - shifts
    return RowGradients(shrink * u, tilts, shifts, at_target, negligible)


def _kernels(backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(shard_sums, shard_gradient) of a backend."""
    if backend == "torch":
        return shard_sums, shard_gradient
    assert backend == "triton"
    # Imported late: a machine without a GPU, or with macOS, may have no Triton.
    from redi.kernels import vocab_shards_triton

    return vocab_shards_triton.shard_sums, vocab_shards_triton.shard_gradient


def shard_sums(
    logits: Tensor, columns: Tensor, terms: Terms, with_moment: bool, with_mean: bool
) -> Tensor:
    """What other ranks need of a rank's columns, for each of C tokens.

    Args:
        logits: [C, V_i] float32 or float64, contiguous rows; they stay as they are. Scale and
            softcap are applied here.
        columns: [C] int64, the target's column, -1 where another rank holds it.
        terms: of the loss.
        with_moment, with_mean: whether to compute the fourth number and the last.

    Returns:
        [3 to 5, C] in the logits' dtype: the maximum m_i; the sum of exp(z_j - m_i) over columns
        other than the target; the target's logit, -inf where another rank holds it; the sum of
        exp(z_j - m_i) (z_j - m_i) and that of z_j over columns other than the target. Without
        columns (V_i = 0) the maximum is -inf and the sums are 0.
    """
    sums = new_sums(logits, with_moment, with_mean)
    if not logits.shape[1]:
        return sums
    for part in blocks(logits):
        z, column = logits[part].clone(), columns[part, None]
        transform_(z, terms, with_slope=False)
        elsewhere, index = column < 0, column.clamp(min=0)
        z_target = z.gather(1, index)
        largest = z.amax(-1, keepdim=True)
        sums[0, part] = largest[:, 0]
        sums[2, part] = z_target.masked_fill(elsewhere, -torch.inf)[:, 0]
        if with_mean:
            sums[-1, part] = z.sum(-1) - z_target.masked_fill(elsewhere, 0.0)[:, 0]
        # The target counts as nothing from here on.
        others = z.scatter_(1, index, z_target.where(elsewhere, -torch.inf)).sub_(largest)
        if with_moment:
            sums[3, part] = (others.exp() * others).nan_to_num_(0.0).sum(-1)
        sums[1, part] = others.exp_().sum(-1)
    return sums


def new_sums(logits: Tensor, with_moment: bool, with_mean: bool) -> Tensor:
    """Where `shard_sums` writes: as of an empty shard."""
    sums = logits.new_zeros(3 + with_moment + with_mean, logits.shape[0])
    sums[0], sums[2] = -torch.inf, -torch.inf
    return sums


def shard_gradient(
    logits: Tensor,
    columns: Tensor,
    largest: Tensor,
    rows: RowGradients,
    terms: Terms,
    dtype: torch.dtype,
) -> Tensor:
    """A rank's columns of the gradient by the logits, over the logits.

    Args:
        logits, columns: as for `shard_sums`.
        largest: [C] this rank's maxima.
        rows: of this rank.
        dtype: what the gradient is rounded to, once.

    Returns:
        [C, V_i], see `softmax.softmax`.
    """
    separate = dtype != logits.dtype and multiplies_halves(logits.device)
    dlogits = torch.empty_like(logits, dtype=dtype) if separate else logits
    if not logits.shape[1]:
        return dlogits
    for part in blocks(logits):
        e, column = logits[part], columns[part, None]
        factor = rows.factors[part, None]
        slope = transform_(e, terms, with_slope=True)
        e.sub_(largest[part, None])
        if rows.tilts is not None:  # no 0 times infinity where e is 0
            factor = factor + rows.tilts[part, None] * e.clamp(min=LOWEST_EXPONENT)
        e.exp_()
        if dtype.itemsize == 2:
            e.masked_fill_(e < rows.negligible[part, None], 0.0)
        e.mul_(factor)
        if rows.shifts is not None:
            e.sub_(rows.shifts[part, None])
        index = column.clamp(min=0)
        at_target = rows.at_target[part, None]
        e.scatter_(1, index, torch.where(column < 0, e.gather(1, index), at_target))
        if slope is not None:
            e.mul_(slope)
        if separate:
            dlogits[part] = e
        elif dtype != logits.dtype:
            e.copy_(e.to(dtype))
    return dlogits


def combine(sums: Tensor, with_moment: bool, with_mean: bool) -> Softmax:
    """The softmax over all columns from the `shard_sums` of n ranks, [n, 3 to 5, C].

    With m the maximum of all and R = sum_i R_i exp(m_i - m), the formulas are those of
    `softmax.softmax`: R does not contain the target, so nothing cancels where p is close to 1.
    """
    highest, rests, z_targets = sums[:, 0], sums[:, 1], sums[:, 2]
    largest = highest.amax(0)
    lower = highest - largest
    shrink = lower.exp()
    rest = (rests * shrink).sum(0)
    highest_target = z_targets.amax(0)
    z_target = highest_target - largest
    e_target = z_target.exp()
    log_total = torch.where(z_target == 0, rest.log1p(), (rest + e_target).log())
    moment = logits = None
    if with_moment:
        # sum_j e_j (z_j - m), with z_j - m = (z_j - m_i) + (m_i - m), and 0 (-inf) = 0
        moments = shrink * (sums[:, 3] + (lower * rests).nan_to_num(0.0))
        moment = moments.sum(0) + (e_target * z_target).nan_to_num(0.0)
    if with_mean:
        logits = sums[:, -1].sum(0) + highest_target
    return Softmax(largest, z_target, rest, e_target, log_total, moment, logits)


def _gather(sums: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """[n, ...] from each rank's contiguous tensor of one shape."""
    gathered = sums.new_empty(group.size(), *sums.shape)
    dist.all_gather(list(gathered), sums, group=group)
    return gathered


def _agree(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    out: Outputs,
    order: TokenOrder,
    chunk_tokens: int,
    coefficient: str,
    terms: Terms,
    group: "dist.ProcessGroup",
) -> Agreement:
    """Exchange the sizes of shards, and check what must be equal: else collectives would hang.

    A GPU waits for this where the group has no backend for CPU tensors.
    """
    checked = may_read(targets)
    same = {
        "the number of tokens T": hidden.shape[0],
        "the hidden size D": hidden.shape[1],
        "the operands' dtype": FLOATS.index(hidden.dtype),
        "the number of unmasked targets": len(order.index),
        "the number of tokens with a weight": order.with_grad,
        "coefficient": COEFFICIENTS.index(coefficient),
        "logit_scale": _bits(terms.logit_scale),
        "softcap": _bits(terms.softcap),
        "label_smoothing": _bits(terms.label_smoothing),
        "z_loss": _checksum(terms.z_weights if checked else None),
        "entropy_weights": _checksum(terms.entropy_weights if checked else None),
        "entropy": int(out.entropies is not None),
        "whether hidden needs a gradient": int(out.dhidden is not None),
        "targets": _checksum(targets if checked else None),
        "token_weights": _checksum(token_weights if checked else None),
        "the order of tokens by valid_index": _checksum(order.index if checked else None),
    }
    numbers = torch.tensor([weight.shape[0], chunk_tokens, *same.values()])
    # With a CPU backend no GPU has to wait. ("cpu:gloo,cuda:nccl" is what torch uses by default.)
    if "cpu:" not in dist.get_backend_config(group):
        numbers = numbers.to(hidden.device)
    sizes, chunks, *columns = zip(*_gather(numbers, group).tolist(), strict=True)
    for what, values in zip(same, columns, strict=True):
        odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            got = f", got {values[0]} and {values[odd]}" if what in _COUNTS else ""
            raise ValueError(
                f"{what} must be the same on all ranks of the group, but ranks 0 and {odd} of it "
                f"differ{got}"
            )
    rank, vocab = group.rank(), sum(sizes)
    if not vocab:
        raise ValueError("weight must have V >= 1 rows over all ranks of the group, got none")
    return Agreement(sum(sizes[:rank]), vocab, min(chunks))


_COUNTS = ("the number of tokens T", "the hidden size D", "the number of unmasked targets")


def _bits(number: float | None) -> int:
    return int(
        torch.tensor(-1.0 if number is None else number, dtype=torch.float64).view(torch.int64)
    )


def _checksum(values: Tensor | None) -> int:
    """Of a [T] tensor's values and their order; 0 for None."""
    if values is None:
        return 0
    if values.is_floating_point():
        values = values.double().view(torch.int64)
    places = torch.arange(1, len(values) + 1, device=values.device)
    return int((values * places).sum())
