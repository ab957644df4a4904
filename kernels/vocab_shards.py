"""The chunk loop where each rank of a process group holds some rows of the lm_head.

Rank i has W_i [V_i, D], which gives V_i columns of each token's logits: Z_i = X W_i^T. A row's
softmax needs sums over all columns. For a chunk of C tokens a rank computes the maximum m_i of its
columns, the sum R_i of exp(z_j - m_i) over them without the target, and the target's logit where
the target is one of them. These [3, C] numbers are gathered, and `combine` adds them up in the
order of the ranks, on each rank. So log-probs and losses are bit-equal on all ranks, and a chunk
needs one small collective, where all-reducing the maximum and then the sums would need two.

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
    MIN_ONE_MINUS_P,
    GradientRows,
    blocks,
    effective_weights,
    multiplies_halves,
)
from redi.kernels.validate import FLOATS, check_target_values, may_read

COEFFICIENTS = ("weight", "dft", "unlikelihood")


@dataclass(frozen=True)
class Agreement:
    """What the ranks have told each other before the first chunk."""

    start: int
    """The first row of the lm_head that this rank holds."""
    vocab: int
    """V: rows of all ranks."""
    chunk_tokens: int
    """Rows of a chunk at most, the same on all ranks: the least that one of them would take."""


class Softmax(NamedTuple):
    """Over the whole vocabulary, each [C]; the names are those of `softmax.softmax`."""

    largest: Tensor
    rest: Tensor
    e_target: Tensor
    logp: Tensor
    entropy: Tensor | None


def vocab_parallel_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    out: Outputs,
    schedule: TokenSchedule,
    group: dist.ProcessGroup,
    backend: str,
    coefficient: str = "weight",
) -> None:
    """`chunked.cross_entropy_chunks` over a divided vocabulary: fill in the outputs.

    Args:
        hidden, targets, token_weights, schedule: the same on all ranks.
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
    if out.dhidden is None and out.dweight is None:
        token_weights = None
    order = order_tokens(targets, token_weights, schedule)
    if out.logps is None:
        order = TokenOrder(order.index[: order.with_grad], order.with_grad)
    most = schedule.chunk_tokens or default_chunk_tokens(len(order.index), weight)
    agreed = _agree(hidden, weight, targets, token_weights, out, order, most, coefficient, group)
    check_target_values(targets, agreed.vocab, schedule.valid_index)
    ranges = order.ranges(agreed.chunk_tokens)
    operand = product_operand(weight)
    buffer = chunk_buffer(ranges, weight, dtype)
    with_entropy = out.entropies is not None

    scale = None
    if hidden.dtype == torch.float16 and order.with_grad:
        assert token_weights is not None
        scale = power_of_two(token_weights[order.index[: order.with_grad]], HALF_EXPONENT)
        token_weights = token_weights * scale
    for values in (out.logps, out.entropies):
        if values is not None:
            values.zero_()

    def make(chunk: Chunk) -> GradientRows | None:
        logits = matmul(chunk.hidden, operand.T, buffer[: len(chunk.tokens)])
        columns = targets[chunk.tokens] - agreed.start
        columns.masked_fill_((columns < 0) | (columns >= len(weight)), -1)
        sums = sums_of(logits, columns, with_entropy)
        softmax = combine(_gather(sums, group))
        if out.logps is not None:
            out.logps[chunk.tokens] = softmax.logp
        if out.entropies is not None and softmax.entropy is not None:
            out.entropies[chunk.tokens] = softmax.entropy
        if not chunk.has_grad or token_weights is None:
            return None
        _, rest, e_target, logp, _ = softmax
        w = token_weights[chunk.tokens]
        u = effective_weights(w, logp, rest / e_target, coefficient) / (rest + e_target)
        if coefficient == "unlikelihood":  # the same floor as in the weights: -w p at certainty
            rest = rest.clamp(min=MIN_ONE_MINUS_P)
        # u exp(z - m) = u exp(m_i - m) exp(z - m_i)
        factors = u * (sums[0] - softmax.largest).exp()
        return GradientRows(gradient_of(logits, columns, sums[0], factors, -u * rest, hidden.dtype))

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


def _kernels(backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(shard_sums, shard_gradient) of a backend."""
    if backend == "torch":
        return shard_sums, shard_gradient
    assert backend == "triton"
    # Imported late: a machine without a GPU, or with macOS, may have no Triton.
    from redi.kernels import vocab_shards_triton

    return vocab_shards_triton.shard_sums, vocab_shards_triton.shard_gradient


def shard_sums(logits: Tensor, columns: Tensor, with_entropy: bool) -> Tensor:
    """What other ranks need of a rank's columns, for each of C tokens.

    Args:
        logits: [C, V_i] float32 or float64, contiguous rows. They become what `shard_gradient` of
            the same backend takes.
        columns: [C] int64, the target's column, -1 where another rank holds it.
        with_entropy: whether to compute the fourth row of the result.

    Returns:
        [3, C], with entropy [4, C], in the logits' dtype: the maximum m_i; the sum of
        exp(z_j - m_i) over columns other than the target; the target's logit, -inf where another
        rank holds it; the sum of exp(z_j - m_i) (z_j - m_i) over columns other than the target.
        Without columns (V_i = 0): -inf, 0, -inf, 0.
    """
    rows, vocab = logits.shape
    sums = logits.new_empty(4 if with_entropy else 3, rows)
    if not vocab:
        return sums_of_no_columns(sums)
    for part in blocks(logits):
        e, column = logits[part], columns[part, None]
        elsewhere, index = column < 0, column.clamp(min=0)
        largest = e.amax(-1, keepdim=True)
        sums[0, part] = largest[:, 0]
        sums[2, part] = e.gather(1, index).masked_fill_(elsewhere, -torch.inf)[:, 0]
        # The target's exponential counts as 0 from here on: `shard_gradient` replaces it anyway.
        others = e.sub_(largest).scatter_(1, index, e.gather(1, index).where(elsewhere, -torch.inf))
        if with_entropy:
            sums[3, part] = (others.exp() * others).nan_to_num_(0.0).sum(-1)
        sums[1, part] = others.exp_().sum(-1)
    return sums


def sums_of_no_columns(sums: Tensor) -> Tensor:
    """Fill in the `shard_sums` of an empty shard."""
    sums.zero_()
    sums[0::2] = -torch.inf
    return sums


def shard_gradient(
    logits: Tensor,
    columns: Tensor,
    largest: Tensor,
    factors: Tensor,
    at_target: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """A rank's columns of the gradient by the logits, over the logits.

    Args:
        logits: [C, V_i] as `shard_sums` left them.
        columns: [C] int64 as there.
        largest: [C] this rank's maximum.
        factors: [C] what multiplies exp(z_j - largest).
        at_target: [C] the target's entry.
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
        index = column.clamp(min=0)
        e.mul_(factors[part, None])
        e.scatter_(1, index, torch.where(column < 0, e.gather(1, index), at_target[part, None]))
        if separate:
            dlogits[part] = e
        elif dtype != logits.dtype:
            e.copy_(e.to(dtype))
    return dlogits


def combine(sums: Tensor) -> Softmax:
    """The softmax over all columns from the `shard_sums` of n ranks, [n, 3, C] or [n, 4, C].

    With m the maximum of all and R = sum_i R_i exp(m_i - m), the formulas are those of
    `softmax.softmax`: R does not contain the target, so nothing cancels where p is close to 1.
    """
    highest, rests, z_targets = sums[:, 0], sums[:, 1], sums[:, 2]
    largest = highest.amax(0)
    lower = highest - largest
    shrink = lower.exp()
    rest = (rests * shrink).sum(0)
    z_target = z_targets.amax(0) - largest
    e_target = z_target.exp()
    log_total = torch.where(z_target == 0, rest.log1p(), (rest + e_target).log())
    entropy = None
    if sums.shape[1] == 4:
        # sum_j e_j (z_j - m), with z_j - m = (z_j - m_i) + (m_i - m), and 0 (-inf) = 0
        moments = shrink * (sums[:, 3] + (lower * rests).nan_to_num(0.0))
        moment = moments.sum(0) + (e_target * z_target).nan_to_num(0.0)
        entropy = log_total - moment / (rest + e_target)
    return Softmax(largest, rest, e_target, z_target - log_total, entropy)


def _gather(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
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
    group: dist.ProcessGroup,
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
        "entropy": int(out.entropies is not None),
        "whether hidden needs a gradient": int(out.dhidden is not None),
        "targets": _checksum(targets) if checked else 0,
        "token_weights": _checksum(token_weights) if checked and token_weights is not None else 0,
    }
    numbers = torch.tensor([weight.shape[0], chunk_tokens, *same.values()])
    # With a CPU backend no GPU has to wait. ("cpu:gloo,cuda:nccl" is what torch uses by default.)
    if "cpu:" not in dist.get_backend_config(group):
        numbers = numbers.to(hidden.device)
    sizes, chunks, *columns = zip(*_gather(numbers, group).tolist(), strict=True)
    for what, values in zip(same, columns, strict=True):
        odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            got = "" if what in _SHOWN_WITHOUT_VALUES else f", got {values[0]} and {values[odd]}"
            raise ValueError(
                f"{what} must be the same on all ranks of the group, but ranks 0 and {odd} of it "
                f"differ{got}"
            )
    rank, vocab = group.rank(), sum(sizes)
    if not vocab:
        raise ValueError("weight must have V >= 1 rows over all ranks of the group, got none")
    return Agreement(sum(sizes[:rank]), vocab, min(chunks))


_SHOWN_WITHOUT_VALUES = ("the operands' dtype", "coefficient", "targets", "token_weights")


def _checksum(values: Tensor) -> int:
    """Of a [T] tensor's values and their order."""
    if values.is_floating_point():
        values = values.double().view(torch.int64)
    places = torch.arange(1, len(values) + 1, device=values.device)
    return int((values * places).sum())
