"""The chunk schedule and the three matrix products: one place for every device and backend.

With u_t the weight of token t and dZ [N, V] = u (p - onehot) the gradient by the logits, forward
and backward are three products: Z = X W^T, dX = dZ W, dW = dZ^T X. The weights are known before
the forward pass, so all three are done while a chunk of C rows of Z is at hand, and dZ is written
over it: no [N, V] tensor ever exists, and nothing is computed twice.

What lies between the first product and the other two is a kernel's affair: a `RowKernel` makes dZ
of the logits (`rows.py`), an `ExponentialsKernel` makes both at once (`exponentials.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from redi.kernels.exponentials import ExponentialsKernel
from redi.kernels.reference import IGNORE_INDEX, accumulation_dtype
from redi.kernels.rows import (
    GradientRows,
    RowKernel,
    SequenceWeights,
    TokenWeights,
    multiplies_halves,
)

# Rows of a chunk on a CPU. A chunk reads the lm_head twice and rewrites dW once; beyond 256 rows
# that no longer shows in the time (384 and 512 measure the same), only in the memory.
CPU_CHUNK_TOKENS = 256

# On a GPU a chunk of [C, V] may take this share of the card's memory (80 GiB: 5 GiB).
GPU_CHUNK_SHARE = 16
# Output tile of the usual cuBLAS kernel, for counting waves.
TILE_ROWS, TILE_COLUMNS = 128, 256

# Rows that a GPU's buffer of logits is rounded up to. The number of tokens differs from row to row;
# a caching allocator hands several GiB out again only to one who asks for no more than before.
GPU_BUFFER_ROWS = 512

# A row of the logits, or of what takes their place, begins at a multiple of this many of them.
ROW_PADDING = 64

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
    exponentials: ExponentialsKernel | None = None,
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
        exponentials: what makes them of a chunk of hidden states in bfloat16; takes row_kernel's
            place, unless entropies are wanted.
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
    if token_entropies is not None:
        exponentials = None
    buffer_dtype = dtype if exponentials is None else hidden.dtype
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(len(order.index), weight, buffer_dtype)
    chunks = [
        *split(0, order.weighted, chunk_tokens),
        *split(order.weighted, len(order.index), chunk_tokens),
    ]
    operand = product_operand(weight)
    buffer = chunk_buffer(chunks, weight, buffer_dtype)

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
        x, out = hidden[tokens], buffer[: end - start]
        weights = token_weights if start < order.weighted else None
        if exponentials is not None:
            gradient = exponentials(
                x, weight, tokens, targets, weights, coefficient=coefficient, logps=logps, out=out
            )
        else:
            dz = row_kernel(
                matmul(x, operand.T, out),
                tokens,
                targets,
                weights,
                coefficient=coefficient,
                dtype=hidden.dtype,
                logps=logps,
                entropies=token_entropies,
                scale=scale,
            )
            gradient = None if dz is None else GradientRows(dz)
        if gradient is not None:
            _add_products(
                gradient,
                x,
                operand,
                tokens,
                targets,
                dhidden=dhidden,
                dweight=dweight,
                accumulate=accumulate or start > 0,
                scale=scale,
            )
        del x, gradient  # before the next chunk's are made

    if dweight is not None and scale is not None:
        dweight.div_(scale)


def keep_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_kernel: RowKernel,
    exponentials: ExponentialsKernel | None,
    valid_index: Tensor | None,
    chunk_tokens: int | None,
    token_logps: Tensor,
    kept: GradientRows,
) -> None:
    """Log-probs [T] and, for `kept_gradient_chunks`, p - onehot of the unmasked tokens.

    `kept` has room for at least N rows. Its matrix is in hidden's dtype (float16: times 2^15, see
    HALF_EXPONENT); factors and residues are filled in with `exponentials`, without them all of
    p - onehot is in the matrix. Rows beyond N are set to 0, as an op must not return whatever lay
    in memory.
    """
    index = order_tokens(targets, None, valid_index).index
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(len(index), weight, accumulation_dtype(hidden.dtype))
    dtype = accumulation_dtype(hidden.dtype)
    operand = product_operand(weight)
    chunks = split(0, len(index), chunk_tokens)
    in_place = kept.matrix.dtype == dtype or exponentials is not None
    buffer = chunk_buffer([] if in_place else chunks, weight, dtype)
    ones = torch.full_like(token_logps, _kept_scale(hidden.dtype))
    token_logps.zero_()
    for part in (kept.matrix, kept.factors, kept.residues):
        if part is not None:
            part[len(index) :].zero_()
    for start, end in chunks:
        rows, tokens = kept.matrix[start:end], index[start:end]
        x = hidden[tokens]
        if exponentials is not None:
            made = exponentials(
                x, weight, tokens, targets, ones, coefficient="weight", logps=token_logps, out=rows
            )
            assert made is not None
            for part, values in ((kept.factors, made.factors), (kept.residues, made.residues)):
                assert part is not None
                assert values is not None
                part[start:end] = values
            continue
        row_kernel(
            matmul(x, operand.T, rows if in_place else buffer[: end - start]),
            tokens,
            targets,
            ones,
            coefficient="weight",
            dtype=hidden.dtype,
            logps=token_logps,
            dlogits=rows,
        )


def kept_gradient_chunks(
    kept: GradientRows,
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
    """The gradients of - sum_t w_t logp_t from what `keep_chunks` kept.

    The weights go to the factors, that is to the small operands of the products, so `kept` is only
    read and backward may run again. Outputs as in `cross_entropy_chunks`.
    """
    index = order_tokens(targets, None, valid_index).index
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(len(index), weight, accumulation_dtype(hidden.dtype))
    operand = product_operand(weight)
    factors = token_weights[index]
    scale = None
    if hidden.dtype == torch.float16 and len(index):
        scale = _power_of_two(factors, 0)  # w X no larger than X, no smaller than w
        factors = factors * scale
        scale = scale * _kept_scale(hidden.dtype)
    if kept.factors is not None:
        factors = factors * kept.factors[: len(index)]
    if dhidden is not None:
        dhidden.zero_()
    chunks = split(0, len(index), chunk_tokens)
    for start, end in chunks:
        residues = None if kept.residues is None else kept.residues[start:end]
        _add_products(
            GradientRows(kept.matrix[start:end], factors[start:end], residues),
            hidden[index[start:end]],
            operand,
            index[start:end],
            targets,
            dhidden=dhidden,
            dweight=dweight,
            accumulate=start > 0,
            scale=scale,
        )
    if dweight is not None:
        if not chunks:
            dweight.zero_()
        elif scale is not None:
            dweight.div_(scale)


def _add_products(
    gradient: GradientRows,
    x: Tensor,
    weight: Tensor,
    tokens: Tensor,
    targets: Tensor,
    *,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    accumulate: bool,
    scale: Tensor | None,
) -> None:
    """dX and dW of a chunk, whose hidden states are `x` [C, D]; see `GradientRows`.

    dX is divided by `scale` at once, dW (to which the next chunk adds) at the end by the caller.
    """
    factors, residues = gradient.factors, gradient.residues
    if dhidden is not None:
        dx = torch.empty(x.shape, dtype=dhidden.dtype, device=x.device)
        matmul(gradient.matrix, weight, dx)
        if residues is not None:
            dx.addcmul_(residues[:, None], weight[targets[tokens]].to(dx.dtype))
        if factors is not None:
            dx.mul_(factors[:, None])
        if scale is not None:
            dx.div_(scale)
        dhidden[tokens] = dx
        del dx  # D = 3584: 190 MB
    if dweight is not None:
        if factors is not None:
            x = (x * factors[:, None]).to(x.dtype)
        matmul(gradient.matrix.T, x, dweight, accumulate=accumulate)


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


def default_chunk_tokens(tokens: int, weight: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Rows of a chunk: what a CPU's caches like, or what fills a GPU's processors.

    `dtype` is that of the chunk's [C, V].
    """
    if weight.device.type != "cuda":
        return CPU_CHUNK_TOKENS
    vocab, hidden_size = weight.shape
    card = torch.cuda.get_device_properties(weight.device)
    return gpu_chunk_tokens(
        tokens, vocab, hidden_size, dtype, card.total_memory, card.multi_processor_count
    )


def gpu_chunk_tokens(
    tokens: int, vocab: int, hidden_size: int, dtype: torch.dtype, memory: int, processors: int
) -> int:
    """Rows of a chunk on a GPU of so many bytes of memory and so many processors."""
    most = max(TILE_ROWS, memory // GPU_CHUNK_SHARE // (dtype.itemsize * vocab))
    return fill_waves(tokens, hidden_size, processors, most)


def gpu_workspace(
    tokens: int,
    vocab: int,
    hidden_size: int,
    dtype: torch.dtype,
    buffer_dtype: torch.dtype,
    memory: int,
    processors: int,
) -> int:
    """Bytes that a loss takes on a GPU while it runs, beside its results.

    A chunk's [C, V] (`chunk_buffer`), its hidden states and their gradient.

    Args:
        tokens: N, unmasked ones.
        dtype: of the operands.
        buffer_dtype: of [C, V]: float32 logits, or `dtype` for exponentials.
        memory, processors: of the GPU.
    """
    most = gpu_chunk_tokens(tokens, vocab, hidden_size, buffer_dtype, memory, processors)
    rows = max((end - start for start, end in split(0, tokens, most)), default=0)
    in_buffer = buffer_rows(rows, torch.device("cuda")) * padded(vocab)
    states = rows * hidden_size
    return (
        in_buffer * buffer_dtype.itemsize
        + states * dtype.itemsize
        + states * accumulation_dtype(dtype).itemsize
    )


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


def chunk_buffer(chunks: list[tuple[int, int]], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for [C, V] of the largest chunk: logits, or the exponentials in their place.

    Rows begin at multiples of 128 bytes whatever V is: cuBLAS and the kernels then move 16 bytes
    at a time, both over the logits and over the halves that take their place.
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
