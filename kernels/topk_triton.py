"""The row kernel of `topk_softmax.py` in Triton: each of its two passes over a row is a kernel.

Between them `topk_softmax.entries` computes on [C, K + 1] numbers what the columns that are apart
need. These are -inf while the kernels run, so no kernel compares its columns with K ids, and get
their gradient afterwards, by a scatter.

A temperature divides scale and softcap: softcap tanh(scale s / softcap) / temperature is the same
function of (scale / temperature) and (softcap / temperature).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from redi.kernels.softmax import NEGLIGIBLE, Terms, transform_
from redi.kernels.softmax_triton import ROUNDED, sum_exponentials, usable_columns, write_gradient
from redi.kernels.topk_softmax import LOWEST_PEAK, columns_of, entries
from redi.kernels.triton_common import FUSED
from redi.kernels.vocab_shards_triton import aligned_vocab, launch_shape

_LOWEST_PEAK = tl.constexpr(LOWEST_PEAK)


def topk_softmax(
    logits: Tensor,
    tokens: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *,
    dtype: torch.dtype,
    logps: Tensor,
    divergences: Tensor,
    terms: Terms,
) -> Tensor | None:
    """`topk_softmax.topk_softmax`; logits and result are those of `softmax_triton.softmax`.

    An id or a target out of range, which a GPU does not check, makes its row NaN.
    """
    teacher = terms.teacher
    assert teacher is not None
    heat, vocab = teacher.temperature, logits.shape[1]
    columns = columns_of(teacher, tokens, targets[tokens], vocab, logits.dtype)
    outside = (columns.index < 0) | (columns.index >= vocab)
    index = columns.index.masked_fill(outside, 0)
    z = logits.gather(1, index)
    slope = transform_(z, terms, weights is not None)
    z.masked_fill_(outside, torch.nan)
    logits.scatter_(1, index, -torch.inf)

    plain = sum_rest(logits, terms, 1.0)
    heated = plain if heat == 1 else sum_rest(logits, terms, heat)
    of_row = None
    if weights is not None:
        of_row = teacher.weights[tokens, None], weights[tokens, None]
    peak, rest, plain_rest = plain[0, :, None], heated[1, :, None], plain[1, :, None]
    made = entries(teacher, columns, z, peak, rest, plain_rest, of_row)
    logps[tokens] = made.logps[:, 0]
    divergences[tokens] = made.divergences[:, 0]
    if made.gradient is None:
        return None
    assert made.factor is not None
    dlogits = write_rest(logits, terms, heat, heated, made.factor, made.plain_factor, dtype)
    gradient = made.gradient if slope is None else made.gradient * slope
    return dlogits.scatter_(1, index, gradient.to(dtype).to(dlogits.dtype))


def sum_rest(logits: Tensor, terms: Terms, temperature: float) -> Tensor:
    """[2, C] of the columns that are not -inf: the largest logit divided by the temperature, or
    `LOWEST_PEAK`, and the sum of exp(that of each - the largest)."""
    rows, vocab = logits.shape
    sums = logits.new_empty(2, rows)
    block, warps = launch_shape(vocab)
    with torch.cuda.device_of(logits):
        sum_rest_kernel[(rows,)](
            logits,
            logits.stride(0),
            vocab,
            usable_columns(logits),
            sums,
            *_transform(terms, temperature),
            ALIGNED_VOCAB=aligned_vocab(vocab),
            BLOCK=block,
            num_warps=warps,
            **FUSED,
        )
    return sums


def write_rest(
    logits: Tensor,
    terms: Terms,
    temperature: float,
    sums: Tensor,
    factors: Tensor,
    plain_factors: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the columns that are not -inf, over the logits; 0 elsewhere.

    With d the difference whose exponential `sum_rest` added up: factors exp(d), and where it is
    given plain_factors exp(temperature d); both are [C, 1].
    """
    rows, vocab = logits.shape
    halves = dtype != logits.dtype and not torch.version.hip
    dlogits = logits.view(dtype)[:, :vocab] if halves else logits
    block, warps = launch_shape(vocab)
    with torch.cuda.device_of(logits):
        write_rest_kernel[(rows,)](
            logits,
            logits.stride(0),
            vocab,
            usable_columns(logits),
            sums,
            factors,
            plain_factors,
            None if plain_factors is None else temperature,
            dlogits,
            dlogits.stride(0),
            min(usable_columns(logits), usable_columns(dlogits)),
            *_transform(terms, temperature),
            NEGLIGIBLE_SHARE=NEGLIGIBLE,
            ROUNDED=ROUNDED[dtype],
            HALVES_IN_PLACE=halves,
            ALIGNED_VOCAB=aligned_vocab(vocab),
            BLOCK=block,
            num_warps=warps,
            **FUSED,
        )
    return dlogits


def _transform(terms: Terms, temperature: float) -> tuple[float | None, float | None]:
    """Scale and softcap of logits divided by the temperature, None where there is none."""
    scale = terms.logit_scale / temperature
    softcap = None if terms.softcap is None else terms.softcap / temperature
    return None if scale == 1 else scale, softcap


# What is specialised, and why: see `softmax_triton.softmax_kernel`.
@triton.jit(do_not_specialize=["vocab"], do_not_specialize_on_alignment=["sums"])
def sum_rest_kernel(
    logits,  # [C, V] float32
    logits_stride,
    vocab,  # V
    room,  # columns of a row of logits that may be read
    sums,  # [2, C] float32, out
    logit_scale,  # or None
    softcap,  # or None
    ALIGNED_VOCAB: tl.constexpr,  # V is a multiple of 16, and it helps to know it
    BLOCK: tl.constexpr,
):
    if ALIGNED_VOCAB:
        vocab = vocab // 16 * 16  # unchanged, and now seen to be a multiple
    row = tl.program_id(0).to(tl.int64)
    peak, rest, _, _ = sum_exponentials(
        logits + row * logits_stride,
        _LOWEST_PEAK,
        -1,
        vocab,
        room,
        logit_scale,
        softcap,
        False,
        False,
        BLOCK,
        True,
    )
    tl.store(sums + row, peak)
    tl.store(sums + tl.num_programs(0) + row, rest)


@triton.jit(
    do_not_specialize=["vocab"],
    do_not_specialize_on_alignment=["sums", "factors", "plain_factors"],
)
def write_rest_kernel(
    logits,  # [C, V] float32
    logits_stride,
    vocab,  # V
    room,  # columns of a row of logits that may be read
    sums,  # [2, C] float32
    factors,  # [C] float32
    plain_factors,  # [C] float32, or None
    temperature,  # along with them
    dlogits,  # [C, V], out, over the logits
    dlogits_stride,
    dlogits_room,  # columns of a row of dlogits that may be written
    logit_scale,  # or None
    softcap,  # or None
    NEGLIGIBLE_SHARE: tl.constexpr,
    ROUNDED: tl.constexpr,  # the dtype that the gradient is rounded to
    HALVES_IN_PLACE: tl.constexpr,
    ALIGNED_VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if ALIGNED_VOCAB:
        vocab = vocab // 16 * 16
    row = tl.program_id(0).to(tl.int64)
    plain_factor = 0.0
    if plain_factors is not None:
        plain_factor = tl.load(plain_factors + row)
    write_gradient(
        logits + row * logits_stride,
        dlogits + row * dlogits_stride,
        -1,
        tl.load(sums + row),
        tl.load(factors + row),
        0.0,
        0.0,
        0.0,
        tl.load(sums + tl.num_programs(0) + row) * NEGLIGIBLE_SHARE,
        vocab,
        room,
        dlogits_room,
        logit_scale,
        softcap,
        False,
        False,
        ROUNDED,
        HALVES_IN_PLACE,
        BLOCK,
        True,
        plain_factor,
        temperature,
    )
