"""Methods of `redi.bench.loss` from other packages, each with its best comparable settings.

A package is imported when its method is built. If it is not installed, its methods are listed as
absent, with the reason; that is not an error.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from redi.bench.baselines import (
    Absent,
    Contender,
    LossMethod,
    MeanLoss,
    TokenLogps,
    by_sequence,
    by_token,
    plain,
)
from redi.bench.inputs import Operands

# Vocabulary entries of a tile, as trl's trainers set it.
TRL_VOCABULARY_CHUNK = 32768
QUACK_CHUNK_TOKENS = 4096


def _check_device(operands: Operands) -> None:
    """Raise without a GPU; Triton's interpreter is accepted, to check results."""
    if not operands.hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise Absent("needs a GPU")


def _liger(operands: Operands, budget: int, reduction: str) -> MeanLoss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    _check_device(operands)
    return partial(
        liger_fused_linear_cross_entropy,
        reduction=reduction,
        accum_dtype=torch.float32,
        chunk_mem_const=budget,
    )


def _cut_cross_entropy(operands: Operands, filter_eps: str | None) -> TokenLogps:
    from cut_cross_entropy import linear_cross_entropy

    _check_device(operands)

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = linear_cross_entropy(
            hidden, weight, targets, reduction="none", filter_eps=filter_eps
        )
        return -losses.float()

    return logps


def _quack(operands: Operands) -> MeanLoss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _check_device(operands)
    return partial(chunked_linear_cross_entropy, chunk_size=QUACK_CHUNK_TOKENS)


def _trl(operands: Operands) -> TokenLogps:
    import trl.trainer.utils  # noqa: F401  (backward imports it late: fail here instead)
    from trl.kernels import ChunkedLogProbFunction

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        outputs: tuple[Tensor, ...] = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ()
        )
        return outputs[0]

    return logps


def _verl(operands: Operands) -> TokenLogps:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    if not operands.hidden.is_cuda:
        raise Absent("needs a GPU")

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        outputs: tuple[Tensor, Tensor] = linear_cross_entropy(hidden, weight, targets, 1.0, "none")
        return outputs[0]

    return logps


def _liger_methods(budget: int) -> dict[str, LossMethod]:
    settings = f"liger FLCE (Triton), accum_dtype float32, chunk_mem_const {budget}"

    def losses(operands: Operands, reduction: str) -> MeanLoss:
        return _liger(operands, budget, reduction)

    def token_logps(operands: Operands) -> Contender:
        values = losses(operands, "none")
        return by_token(operands, lambda x, w, y: -values(x, w, y))

    return {
        f"liger-{budget}-by-sequence": LossMethod(
            f"{settings}, mean", lambda operands: by_sequence(operands, losses(operands, "mean"))
        ),
        f"liger-{budget}-plain": LossMethod(
            f"{settings}, mean over the pack, not REDI",
            lambda operands: plain(operands, losses(operands, "mean")),
        ),
        f"liger-{budget}-by-token": LossMethod(f'{settings}, "none"', token_logps),
    }


def _token_method(note: str, logps: Callable[[Operands], TokenLogps]) -> LossMethod:
    return LossMethod(note, lambda operands: by_token(operands, logps(operands)))


# Since 0.6 it takes its exponential form by itself on sm_90, where V is a multiple of 128.
_QUACK = f"quack chunked_linear_cross_entropy, chunk_size {QUACK_CHUNK_TOKENS}, tuned"

METHODS: dict[str, LossMethod] = {
    **_liger_methods(budget=1),
    **_liger_methods(budget=16),
    "quack-by-sequence": LossMethod(
        f"{_QUACK}, mean", lambda operands: by_sequence(operands, _quack(operands))
    ),
    "quack-plain": LossMethod(
        f"{_QUACK}, mean over the pack, not REDI",
        lambda operands: plain(operands, _quack(operands)),
    ),
    "cce": _token_method(
        'cut-cross-entropy, "none", gradient filter on (its default)',
        lambda operands: _cut_cross_entropy(operands, "high"),
    ),
    "cce-exact": _token_method(
        'cut-cross-entropy, "none", no gradient filter',
        lambda operands: _cut_cross_entropy(operands, None),
    ),
    "trl": _token_method(
        f"trl ChunkedLogProbFunction, tiles of {TRL_VOCABULARY_CHUNK} of the vocabulary", _trl
    ),
    "verl": _token_method('verl linear_cross_entropy, "none", temperature 1', _verl),
}
