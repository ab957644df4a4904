"""The chunk schedule and the three matrix products: one place for every device and backend.

With u_t the weight of token t and dZ [N, V] = u (p - onehot) the gradient by the logits, forward
and backward are three products: Z = X W^T, dX = dZ W, dW = dZ^T X. The weights are known before
the forward pass, so all three are done while a chunk of C rows of Z is at hand, and dZ is written
over it: no [N, V] tensor ever exists, and nothing is computed twice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from redi.kernels.reference import IGNORE_INDEX, accumulation_dtype
from redi.kernels.rows import RowKernel, SequenceWeights, TokenWeights, multiplies_halves

# Rows of a chunk on a CPU. A chunk reads the lm_head twice and rewrites dW once; beyond 256 rows
# that no longer shows in the time (384 and 512 measure the same), only in the memory.
CPU_CHUNK_TOKENS = 256

# On a GPU a chunk of float32 logits may take this share of the card's memory (80 GiB: 5 GiB).
GPU_CHUNK_SHARE = 16
# Output tile of the usual cuBLAS kernel, for counting waves.
TILE_ROWS, TILE_COLUMNS = 128, 256

# Rows that a GPU's buffer of logits is rounded up to. The number of tokens differs from row to row;
# a caching allocator hands several GiB out again only to one who asks for no more than before.
GPU_BUFFER_ROWS = 512

# A row of the logits begins at a multiple of this many of them.
ROW_PADDING = 32

# float16: dZ is multiplied by a power of two that brings the largest weight to 2^14 .. 2^15, as
# the weights themselves (1e-7 at 32 pairs of 20,000 tokens) would be lost to underflow.
HALF_EXPONENT = 15


@dataclass(frozen=True)
class TokenOrder:
    """Which tokens to compute, those with a gradient first."""

    index: Tensor
    """[N] int64: positions in the row."""
    weighted: int
    """How many of them, from the first, have a gradient."""


def cross_entropy_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: TokenWeights | None,
    *,
    coefficient: str,
    row_kernel: RowKernel,
    valid_index: Tensor | None = None,
    num_weighted: int | None = None,
    chunk_tokens: int | None = None,
    token_logps: Tensor | None = None,
    token_entropies: Tensor | None = None,
    dhidden: Tensor | None = None,
    dweight: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """Fill in what is asked for: each of the last tensors is an output, None is not computed.

    Args:
        hidden: [T, D], any strides.
        weight: [V, D], any strides.
        targets: [T] int64, -100 masks.
        token_weights: see `rows.TokenWeights`; None where no gradient is wanted.
        coefficient: see `rows.effective_weights`.
        row_kernel: what makes log-probs and dZ of a chunk of logits.
        valid_index: [N] positions of unmasked targets; without it a GPU must synchronise once.
        num_weighted: how many of `valid_index`, from the first, may have a weight other than 0.
        chunk_tokens: rows of a chunk at most; None chooses (`default_chunk_tokens`).
        token_logps: [T] accumulation dtype; 0 where masked.
        token_entropies: [T] likewise; only along with token_logps.
        dhidden: [T, D] accumulation dtype, contiguous; 0 where masked.
        dweight: [V, D] accumulation dtype, contiguous.
        accumulate: add to `dweight` instead of overwriting it.

    Tokens of weight 0 cost the logits product alone, masked tokens nothing. (A GPU that is given
    `valid_index` without `num_weighted` does not know them and treats all tokens alike.)
    """
    if dhidden is None and dweight is None:
        token_weights = None
    order = order_tokens(targets, token_weights, valid_index, num_weighted)
    dtype = accumulation_dtype(hidden.dtype)
    logps = hidden.new_empty(targets.shape, dtype=dtype) if token_logps is None else token_logps
    if token_logps is None:
        order = TokenOrder(order.index[: order.weighted], order.weighted)
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(len(order.index), weight)
    chunks = [
        *split(0, order.weighted, chunk_tokens),
        *split(order.weighted, len(order.index), chunk_tokens),
    ]
    operand = product_operand(weight)
    logits = _logits_buffer(chunks, operand, dtype)

    scale = None
    if token_weights is not None and hidden.dtype == torch.float16 and order.weighted:
        scale = _half_scale(token_weights, order.index[: order.weighted])
    for output in (token_logps, token_entropies, dhidden):
        if output is not None:
            output.zero_()
    if dweight is not None and not accumulate and not order.weighted:
        dweight.zero_()
    elif dweight is not None and accumulate and scale is not None:
        dweight.mul_(scale)

    for start, end in chunks:
        tokens = order.index[start:end]
        x = hidden[tokens]
        z = matmul(x, operand.T, logits[: end - start])
        dz = row_kernel(
            z,
            tokens,
            targets,
            token_weights if start < order.weighted else None,
            coefficient=coefficient,
            dtype=hidden.dtype,
            logps=logps,
            entropies=token_entropies,
            scale=scale,
        )
        if dhidden is not None and dz is not None:
            dx = matmul(dz, operand, torch.empty(x.shape, dtype=dtype, device=x.device))
            dhidden[tokens] = dx if scale is None else dx.div_(scale)
            del dx
        if dweight is not None and dz is not None:
            matmul(dz.T, x, dweight, accumulate=accumulate or start > 0)
        del x, z, dz  # before the next chunk's are made

    if dweight is not None and scale is not None:
        dweight.div_(scale)


def keep_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_kernel: RowKernel,
    valid_index: Tensor | None,
    chunk_tokens: int | None,
    token_logps: Tensor,
    kept: Tensor,
) -> None:
    """Log-probs [T] and, for `kept_gradient_chunks`, p - onehot of the unmasked tokens.

    `kept` has room for at least N rows of V in hidden's dtype (float16: times 2^15, see
    HALF_EXPONENT); rows beyond N are set to 0, as an op must not return whatever lay in memory.
    """
    index = order_tokens(targets, None, valid_index).index
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(len(index), weight)
    dtype = accumulation_dtype(hidden.dtype)
    operand = product_operand(weight)
    chunks = split(0, len(index), chunk_tokens)
    in_place = kept.dtype == dtype
    logits = _logits_buffer([] if in_place else chunks, operand, dtype)
    ones = torch.full_like(token_logps, _kept_scale(hidden.dtype))
    token_logps.zero_()
    kept[len(index) :].zero_()
    for start, end in chunks:
        rows, tokens = kept[start:end], index[start:end]
        z = matmul(hidden[tokens], operand.T, rows if in_place else logits[: end - start])
        row_kernel(
            z,
            tokens,
            targets,
            ones,
            coefficient="weight",
            dtype=hidden.dtype,
            logps=token_logps,
            dlogits=rows,
        )


def kept_gradient_chunks(
    kept: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    valid_index: Tensor | None,
    chunk_tokens: int | None,
    dhidden: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """The gradients of - sum_t w_t logp_t from what `keep_chunks` kept, with P = p - onehot.

    dX = w (P W) and dW = P^T (w X): the weights go to the small factors, so `kept` is only read
    and backward may run again. Outputs as in `cross_entropy_chunks`.
    """
    index = order_tokens(targets, None, valid_index).index
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(len(index), weight)
    operand = product_operand(weight)
    kept_scale = _kept_scale(hidden.dtype)
    scale = None
    if hidden.dtype == torch.float16 and len(index):
        scale = _power_of_two(token_weights[index], 0)  # w X no larger than X, no smaller than w
    if dhidden is not None:
        dhidden.zero_()
    chunks = split(0, len(index), chunk_tokens)
    for start, end in chunks:
        p, tokens = kept[start:end], index[start:end]
        w = token_weights[tokens, None]
        if dhidden is not None:
            dx = torch.empty(p.shape[0], weight.shape[1], dtype=dhidden.dtype, device=p.device)
            dhidden[tokens] = matmul(p, operand, dx).mul_(w / kept_scale)
            del dx
        if dweight is not None:
            x = hidden[tokens] * (w if scale is None else w * scale)
            matmul(p.T, x.to(hidden.dtype), dweight, accumulate=start > 0)
            del x
    if dweight is not None:
        if not chunks:
            dweight.zero_()
        elif scale is not None:
            dweight.div_(scale * kept_scale)


def order_tokens(
    targets: Tensor,
    token_weights: TokenWeights | None,
    valid_index: Tensor | None,
    num_weighted: int | None = None,
) -> TokenOrder:
    """The unmasked tokens, those of non-zero weight first and otherwise in order.

    With `valid_index` on a GPU nothing is read back; else the two counts are, at once.
    """
    if valid_index is not None and (num_weighted is not None or targets.device.type != "cpu"):
        weighted = len(valid_index) if num_weighted is None else num_weighted
        return TokenOrder(valid_index.long(), 0 if token_weights is None else weighted)
    valid = targets != IGNORE_INDEX
    has_weight = torch.zeros_like(valid)
    if isinstance(token_weights, SequenceWeights):
        positions = torch.arange(len(targets), device=targets.device)
        token_weights = token_weights.of_tokens(positions, torch.float32)
    if token_weights is not None:
        has_weight = valid & (token_weights != 0)
    rank = torch.where(valid, torch.where(has_weight, 0, 1), 2)
    count, with_grad = torch.stack([valid.sum(), has_weight.sum()]).tolist()
    return TokenOrder(torch.argsort(rank, stable=True)[:count], with_grad)


def split(start: int, end: int, most: int) -> list[tuple[int, int]]:
    """Cut [start, end) into the fewest ranges of at most `most`, as equal in size as can be.

    Equal sizes let a caching allocator hand the same memory out again.
    """
    if start == end:
        return []
    parts = -(-(end - start) // most)
    size = -(-(end - start) // parts)
    return [(i, min(i + size, end)) for i in range(start, end, size)]


def default_chunk_tokens(tokens: int, weight: Tensor) -> int:
    """Rows of a chunk: what a CPU's caches like, or what fills a GPU's processors."""
    if weight.device.type != "cuda":
        return CPU_CHUNK_TOKENS
    vocab, hidden_size = weight.shape
    card = torch.cuda.get_device_properties(weight.device)
    most = max(TILE_ROWS, card.total_memory // GPU_CHUNK_SHARE // (4 * vocab))
    return fill_waves(tokens, hidden_size, card.multi_processor_count, most)


def fill_waves(tokens: int, hidden_size: int, processors: int, most: int) -> int:
    """The chunk size, `most` at most, for which dX = dZ W takes the fewest waves of tiles.

    dX has few tiles, ceil(C / 128) ceil(D / 256), and a last wave that is not full leaves
    processors idle: at D = 1536 on 132 of them, 5,632 or 8,448 rows fill every wave and 512 rows
    18 % of one. (Z has V / D times as many, and dW's number does not depend on C.) Of equals
    the larger wins, as every chunk reads and writes dW once.
    """
    columns = -(-hidden_size // TILE_COLUMNS)

    def waves(rows: int) -> int:
        return -(-(-(-rows // TILE_ROWS) * columns) // processors)

    fewest = max(1, -(-tokens // most))
    parts = min(
        range(fewest, 4 * fewest + 1), key=lambda parts: (parts * waves(-(-tokens // parts)), parts)
    )
    return max(1, -(-tokens // parts))


def matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a b, or out += a b, added up in out's dtype whatever the operands' dtype."""
    if a.dtype != out.dtype and multiplies_halves(out.device):
        if accumulate:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    a, b = a.to(out.dtype), b.to(out.dtype)
    return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)


def product_operand(weight: Tensor) -> Tensor:
    """The lm_head as `matmul` likes it: cast once where it would be cast for each chunk."""
    if not multiplies_halves(weight.device):
        weight = weight.to(accumulation_dtype(weight.dtype))
    return weight if 1 in weight.stride() else weight.contiguous()


def _logits_buffer(chunks: list[tuple[int, int]], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the logits of the largest chunk, [C, V].

    Rows begin at multiples of 128 bytes whatever V is: cuBLAS and the row kernel then move 16
    bytes at a time, both over the logits and over the halves that take their place.
    """
    rows = buffer_rows(max((end - start for start, end in chunks), default=0), weight.device)
    vocab = weight.shape[0]
    return torch.empty(rows, padded(vocab), dtype=dtype, device=weight.device)[:, :vocab]


def buffer_rows(rows: int, device: torch.device) -> int:
    """Rows that are allocated for a chunk of so many."""
    step = GPU_BUFFER_ROWS if device.type == "cuda" else 1
    return -(-rows // step) * step


def padded(columns: int) -> int:
    """The next multiple of ROW_PADDING."""
    return -(-columns // ROW_PADDING) * ROW_PADDING


def _kept_scale(dtype: torch.dtype) -> float:
    return 2.0**HALF_EXPONENT if dtype == torch.float16 else 1.0


def _half_scale(weights: TokenWeights, tokens: Tensor) -> Tensor:
    """What brings the largest weight to 2^14 .. 2^15, a power of two; a scalar on the device."""
    if isinstance(weights, SequenceWeights):
        return _power_of_two(weights.of_sequences(torch.float32), HALF_EXPONENT)
    return _power_of_two(weights[tokens], HALF_EXPONENT)


def _power_of_two(weights: Tensor, exponent: int) -> Tensor:
    """2^exponent over the largest |weight|, rounded to a power of two; a scalar on the device.

    At most 2^60: what is scaled with it must not overflow float32.
    """
    _, largest = torch.frexp(weights.abs().amax())
    return torch.ldexp(torch.ones_like(weights[0]), (exponent - largest).clamp(max=60))
