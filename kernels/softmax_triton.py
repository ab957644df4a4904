"""The softmax kernel in Triton: one program a row of logits, two passes over it.

The formulas are those of `softmax.softmax`. Pass 1 reads a row and computes its log-sum-exp;
pass 2 reads it again and writes u (p - onehot) over it, rounded once. A row of V = 151,936 takes
594 KiB, too much for an SM's shared memory, so pass 2 reads from L2 what is still there: pass 1
goes from the row's end to its start, and pass 2 starts where L2 is still warm.

The gradient in bfloat16 or float16 overwrites the float32 row: column j takes bytes 2 j and
2 j + 1 of the row, its logit bytes 4 j to 4 j + 3. `write_gradient` says why no logit is
overwritten before it is read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from redi.kernels.softmax import LOWEST_EXPONENT, NEGLIGIBLE, PLAIN, Terms
from redi.kernels.triton_common import FUSED, apply_coefficient, exp, load_target, log1p, round_to

ROUNDED = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# A kernel may use a module's constants only if they are constexpr.
_NEGLIGIBLE = tl.constexpr(NEGLIGIBLE)
_LOWEST_EXPONENT = tl.constexpr(LOWEST_EXPONENT)

# Columns that a thread loads at once: four loads of 16 bytes. To keep memory busy, an SM needs
# 4.3 TB/s / 132 x 1 us = 33 KB in flight; 1024 threads have 64 KiB, two such programs twice that.
COLUMNS_PER_THREAD = 16
MAX_THREADS = 1024

# Registers a thread with which an SM runs two programs of 1024 threads, for the forms that need no
# more. Most versions of Triton get there unasked; the assembler, given the code of 3.8, takes 38.
FOR_TWO_PROGRAMS = {"maxnreg": 32}

# Loads are 16 bytes wide where the number of columns is a multiple of this.
ALIGNMENT = 16


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
    """`softmax.softmax` in one launch; the arguments are the same, with these differences.

    Args:
        logits: [C, V] float32, unit stride along V. Columns up to the next multiple of 16 may be
            read and written where the row stride leaves room for them.

    Returns:
        dlogits [C, V], or None without weights. If not given, they overwrite the logits: in
        `dtype`, each row at the start of its own storage (a half type's row stride is twice that
        of the logits), or on AMD GPUs as rounded float32 values (see `write_gradient`).
    """
    rows, vocab = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    if weights is not None and dlogits is None:
        as_halves = dtype != logits.dtype and not torch.version.hip
        dlogits = logits.view(dtype)[:, :vocab] if as_halves else logits
    weighted = weights is not None
    halves_in_place = (
        dlogits is not None
        and dlogits.dtype != logits.dtype
        and dlogits.data_ptr() == logits.data_ptr()
    )
    bare = terms.are_plain and entropies is None and lses is None and mean_logps is None
    block, warps = launch_shape(vocab, 64 if torch.version.hip else 32)
    if terms.softcap is not None:
        block //= 4  # else it spills on some GPUs; so two programs share an SM
    with torch.cuda.device_of(logits):
        softmax_kernel[(rows,)](
            logits,
            logits.stride(0),
            vocab,
            usable_columns(logits),
            tokens.contiguous(),
            targets.contiguous(),
            logps,
            entropies,
            lses,
            mean_logps,
            dlogits,
            None if dlogits is None else dlogits.stride(0),
            None if dlogits is None else min(usable_columns(logits), usable_columns(dlogits)),
            None if weights is None else weights.contiguous(),
            *(
                values.contiguous() if weighted and values is not None else None
                for values in (terms.entropy_weights, terms.lse_weights, terms.z_weights)
            ),
            terms.logit_scale if terms.logit_scale != 1 else None,
            terms.softcap,
            terms.label_smoothing if weighted and terms.label_smoothing else None,
            ROUNDED=ROUNDED[dtype],
            COEFFICIENT=coefficient,
            HALVES_IN_PLACE=halves_in_place,
            ALIGNED_VOCAB=bool(torch.version.hip) and vocab % ALIGNMENT == 0,
            BLOCK=block,
            num_warps=warps,
            **(FOR_TWO_PROGRAMS if bare and halves_in_place and warps == 32 else {}),
            **FUSED,
        )
    return dlogits


def launch_shape(vocab: int, warp_size: int) -> tuple[int, int]:
    """Columns of a block, and warps of a program.

    A real vocabulary gets 1024 threads: the fewer rows an SM works on, the more of each is still
    in L2 for pass 2. (At 32 registers a thread an SM runs two such programs: 264 rows of 594 KiB
    on an H100, whose L2 holds 50 MB, a third of them.) A small vocabulary gets as many threads as
    one block of it needs.
    """
    block = min(COLUMNS_PER_THREAD * MAX_THREADS, max(128, triton.next_power_of_2(vocab)))
    return block, max(1, block // COLUMNS_PER_THREAD // warp_size)


def usable_columns(matrix: Tensor) -> int:
    """Columns of a row that may be touched: V and its padding, as far as loads are aligned."""
    columns = matrix.shape[1]
    return min(triton.cdiv(columns, ALIGNMENT) * ALIGNMENT, max(matrix.stride(0), columns))


# The kernel reads single entries of these, so their alignment does not matter: without this Triton
# would compile again in the middle of training, at the first chunk with an odd start. V is not
# specialised: known to be a multiple of 16, it makes Triton vectorise the masks. On NVIDIA GPUs
# that takes 8 more registers than let two programs share an SM; on AMD GPUs it saves scalar
# registers, which would else spill, so there ALIGNED_VOCAB says it.
@triton.jit(
    do_not_specialize=["vocab"],
    do_not_specialize_on_alignment=[
        *("tokens", "targets", "logps", "entropies", "lses", "mean_logps"),
        *("weights", "entropy_weights", "lse_weights", "z_weights"),
    ],
)
def softmax_kernel(
    logits,  # [C, V] float32
    logits_stride,
    vocab,  # V
    room,  # columns of a row of logits that may be read
    tokens,  # [C] int64
    targets,  # [T] int64
    logps,  # [T] float32, out
    entropies,  # [T] float32, out, or None
    lses,  # likewise
    mean_logps,  # likewise
    dlogits,  # [C, V], out, perhaps over the logits; None for log-probs alone
    dlogits_stride,
    dlogits_room,  # columns of a row of dlogits that may be written
    weights,  # [T] float32; along with dlogits
    entropy_weights,  # [T] float32, or None, as the following: see `softmax.Terms`
    lse_weights,
    z_weights,
    logit_scale,
    softcap,
    label_smoothing,
    ROUNDED: tl.constexpr,  # the dtype that the gradient is rounded to
    COEFFICIENT: tl.constexpr,
    HALVES_IN_PLACE: tl.constexpr,
    ALIGNED_VOCAB: tl.constexpr,  # V is a multiple of 16, and it helps to know it
    BLOCK: tl.constexpr,
):
    if ALIGNED_VOCAB:
        vocab = vocab // 16 * 16  # unchanged, and now seen to be a multiple
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 at 14,134 rows of V = 151,936
    token = tl.load(tokens + row)
    target, inside = load_target(targets + token, vocab)
    z = logits + row * logits_stride
    z_target = tl.where(inside, tl.load(z + target), float("nan"))
    z_target, _ = transformed(z_target, logit_scale, softcap)

    MOMENT: tl.constexpr = entropies is not None or entropy_weights is not None
    largest, rest, moment, others = sum_exponentials(
        z,
        z_target,
        target,
        vocab,
        room,
        logit_scale,
        softcap,
        MOMENT,
        mean_logps is not None,
        BLOCK,
    )
    # 0 where they are equal (NaN of infinities). The compiler would fuse a plain difference with
    # the target's product with a scale or softcap, then not rounded: a log-prob could exceed 0.
    is_largest = z_target == largest
    drop_target = tl.where(is_largest, largest - largest, z_target - largest)
    e_target = exp(drop_target)
    total = rest + e_target
    log_total = tl.where(is_largest, log1p(rest), tl.log(total))
    logp = drop_target - log_total
    tl.store(logps + token, logp)
    if MOMENT:
        moment += tl.where(e_target > 0, e_target * drop_target, 0.0)
    if entropies is not None:
        tl.store(entropies + token, log_total - moment / total)
    if lses is not None:
        tl.store(lses + token, largest + log_total)
    if mean_logps is not None:
        tl.store(mean_logps + token, (others + z_target) / vocab - largest - log_total)

    if dlogits is not None:
        negligible = rest * _NEGLIGIBLE
        if entropy_weights is not None:  # see `softmax.NEGLIGIBLE`
            negligible = 0.0
        weight = tl.load(weights + token)
        u, rest = apply_coefficient(weight, logp, rest, e_target, COEFFICIENT)
        u /= total
        at_target = -u * rest
        tilt = 0.0
        shift = 0.0
        if lse_weights is not None:
            pull = tl.load(lse_weights + token) / total
            u += pull
            at_target += e_target * pull
        if z_weights is not None:
            pull = 2 * tl.load(z_weights + token) * (largest + log_total) / total
            u += pull
            at_target += e_target * pull
        if entropy_weights is not None:
            tilt = tl.load(entropy_weights + token) / total
            mean_drop = moment / total
            at_target += e_target * tilt * (drop_target - mean_drop)
            u -= tilt * mean_drop
        if label_smoothing is not None:
            shift = label_smoothing * weight / vocab
            at_target += label_smoothing * weight - shift
        write_gradient(
            z,
            dlogits + row * dlogits_stride,
            target,
            largest,
            u,
            tilt,
            shift,
            at_target,
            negligible,
            vocab,
            room,
            dlogits_room,
            logit_scale,
            softcap,
            entropy_weights is not None,
            label_smoothing is not None,
            ROUNDED,
            HALVES_IN_PLACE,
            BLOCK,
        )


@triton.jit
def transformed(values, logit_scale, softcap, APART: tl.constexpr = False):
    """`softmax.transform_`: (z, slope) of logits; None in place of a number: 1, no softcap.

    With APART -inf marks a column that takes no part, and stays -inf under a softcap.

    By q = exp(-2 |x|): tanh |x| = (1 - q) / (1 + q), and a polynomial where 1 - q would cancel;
    the slope 1 - tanh^2 is 4 q / (1 + q)^2, which cancels nowhere.
    """
    slope = 1.0
    if logit_scale is not None:
        values = values * logit_scale
    if softcap is not None:
        x = values * (1.0 / softcap)
        size = tl.abs(x)
        q = exp(-2.0 * size)
        inverse = 1.0 / (1.0 + q)
        square = x * x
        # Fitted on |x| <= 1/2: 1.3 units of the last place there.
        series = -0.05304221 + 0.01723548 * square
        series = 0.13325822 + series * square
        series = -0.33333141 + series * square
        near = size + size * (square * series)
        tanh = tl.where(size < 0.5, near, (1.0 - q) * inverse)
        capped = tl.where(x < 0, -tanh, tanh) * softcap
        if APART:
            capped = tl.where(values == float("-inf"), values, capped)
        values = capped
        slope = 4.0 * q * inverse * inverse
    return values, slope


@triton.jit
def sum_exponentials(
    z,
    z_target,
    target,
    vocab,
    room,
    logit_scale,
    softcap,
    MOMENT: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    APART: tl.constexpr = False,
):
    """Pass 1, without the target: (max z, R = sum e, sum e (z - max), sum z), e = exp(z - max).

    The maximum is over all columns, the sums are over those other than the target. The third is
    0 unless MOMENT, the fourth unless MEAN.

    Each lane of four neighbouring columns keeps its own maximum and sums (online softmax, arXiv
    1805.02867): no thread waits for another before the row's end, and a lane computes one
    exponential for rescaling to four for columns.
    """
    LANES: tl.constexpr = BLOCK // 4
    lane_columns = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    peaks = tl.full([LANES], float("-inf"), tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    moments = tl.zeros([LANES], tl.float32)
    totals = tl.zeros([LANES], tl.float32)
    blocks = tl.cdiv(vocab, BLOCK)
    for i in range(blocks):
        columns = (blocks - 1 - i) * BLOCK + lane_columns
        # The load goes by `room`, a multiple of 16, as V would make it one of single words.
        values = tl.load(z + columns, mask=columns < room, other=float("-inf"))
        values, _ = transformed(values, logit_scale, softcap, APART)
        inside = columns < vocab
        if MEAN:
            totals += tl.sum(tl.where(inside & (columns != target), values, 0.0), 1)
        values = tl.where(inside, values, float("-inf"))
        # Apart from the bound: with both in one, Triton 3.8 needs more registers.
        values = tl.where(columns == target, float("-inf"), values)
        higher = tl.maximum(peaks, tl.max(values, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        differences = values - base[:, None]
        e = exp(differences)
        shrink = exp(peaks - base)
        if MOMENT:
            drop = tl.where(sums > 0, peaks - base, 0.0)
            moments = shrink * (moments + drop * sums)
            moments += tl.sum(tl.where(e > 0, e * differences, 0.0), 1)
        sums = sums * shrink + tl.sum(e, 1)
        peaks = higher
    largest = tl.maximum(tl.max(peaks, 0), z_target)
    shrink = exp(peaks - largest)
    moment = 0.0
    if MOMENT:
        drop = tl.where(sums > 0, peaks - largest, 0.0)
        moment = tl.sum(shrink * (moments + drop * sums), 0)
    total = 0.0
    if MEAN:
        total = tl.sum(totals, 0)
    return largest, tl.sum(sums * shrink, 0), moment, total


@triton.jit
def write_gradient(
    z,
    out,
    target,
    largest,
    u,
    tilt,
    shift,
    at_target,
    negligible,
    vocab,
    room,
    out_room,
    logit_scale,
    softcap,
    TILT: tl.constexpr,
    SHIFT: tl.constexpr,
    ROUNDED: tl.constexpr,
    HALVES_IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    APART: tl.constexpr = False,
    plain_u=0.0,
    power=None,
):
    """Pass 2: out = u e, but `at_target` at the target; out may overwrite z.

    With TILT e is multiplied by u + tilt (z - max) instead, with SHIFT `shift` is subtracted, with
    a power plain_u e^power is added. By s it is times the slope. In a half type e counts as 0 where
    it is below `negligible`; see `softmax.NEGLIGIBLE`.

    The hazard: halves of block b overwrite the words of z's block b // 2, which a slower warp of
    this program may not have loaded yet. Blocks ascend, so b // 2 <= b, and a barrier between the
    loads of block b and its stores guarantees all blocks up to b are loaded, enough for the stores
    up to block 2 b + 1. So barriers at b = 0, 2, 6, 14, ... suffice, and between them warps run
    freely: one loads while another computes. Other programs have other rows.

    PTX's bar.sync waits for outstanding loads. s_barrier of AMD GPUs does not, so there the
    gradient is stored as float32, each thread over its own word.
    """
    block_columns = tl.arange(0, BLOCK)
    fence = 0
    for i in range(tl.cdiv(vocab, BLOCK)):
        columns = i * BLOCK + block_columns
        values = tl.load(z + columns, mask=columns < room, other=float("-inf"))
        values, slope = transformed(values, logit_scale, softcap, APART)
        drops = values - largest
        e = exp(drops)
        gradient = e * u
        if TILT:  # no 0 times infinity where e is 0
            gradient = e * (u + tilt * tl.maximum(drops, _LOWEST_EXPONENT))
        if tl.float32 != ROUNDED:
            gradient = tl.where(e < negligible, 0.0, gradient)  # NaN is not
        if power is not None:
            gradient += plain_u * exp(drops * power)
        if SHIFT:
            gradient -= shift
        gradient = tl.where(columns == target, at_target, gradient)
        if softcap is not None:
            gradient *= slope
        if HALVES_IN_PLACE:  # known when compiling  # noqa: SIM102
            if i == fence:
                tl.debug_barrier()
                fence = 2 * fence + 2
        gradient = round_to(gradient, ROUNDED).to(out.dtype.element_ty)
        tl.store(out + columns, gradient, mask=columns < out_room)
