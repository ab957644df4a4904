"""Methods of `redi.bench.loss`: the floor, this project's op, and plain PyTorch.

`peers.py` has the ops of other packages. A method is built on operands and returns a step to time.
Other ops have one of two forms, and REDI is computed from either:

- log-probs (or losses) per token, times the token weights: 4 matrix products, since the weights are
  applied after the forward pass;
- a mean over all tokens: 3 products, one call per sequence, scaled by +1/pairs or -alpha/pairs.
  For these, "plain" is the mean over the whole pack in one call. It is not REDI (no signs), but
  measures the op without the calls per sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from redi.bench.inputs import ALPHA, Operands
from redi.kernels import (
    FilteredRediLoss,
    RediLoss,
    filtered_redi_loss,
    redi_loss,
    signed_cross_entropy,
)
from redi.kernels.reference import Backend, accumulation_dtype

# Tokens of a chunk for torch's chunked op, about as many as in this project's. Its default for the
# default shapes is 4 tokens for a sequence of 512, which is 14 times slower.
TORCH_CHUNK_TOKENS = {"cpu": 256, "cuda": 8192}


class Absent(Exception):
    """A method is not available; the message names the package or device that it needs."""


class Result(NamedTuple):
    """What one step computes."""

    loss: Tensor
    dhidden: Tensor
    dweight: Tensor


@dataclass(frozen=True)
class Exact:
    """The results in float64."""

    result: Result
    token_logps: Tensor


@dataclass(frozen=True)
class Contender:
    """A method on given operands."""

    step: Callable[[], Result | None]
    """One forward and backward; None from the floor, which computes no loss."""
    token_logps: Callable[[], Tensor] | None = None
    """[T] log-probs of the targets as the step computes them; None if it returns none."""
    plain: bool = False
    """True if the loss is a plain mean over the pack and not REDI."""


@dataclass(frozen=True)
class LossMethod:
    """How to compute the loss."""

    note: str
    """Settings, in one line, for the record."""
    build: Callable[[Operands], Contender]
    """Raises Absent or ImportError if the method is not available."""
    ours: bool = False
    """True if its failure or wrong result fails the benchmark."""
    approximate: bool = False
    """True if its gradients are approximate by design."""


# (hidden [n, D], weight [V, D], targets [n]) -> [n], or a scalar
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]
MeanLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_token(operands: Operands, logps: TokenLogps) -> Contender:
    """REDI from log-probs per token."""
    token_weights = operands.token_weights.to(accumulation_dtype(operands.hidden.dtype))

    def token_logps() -> Tensor:
        return logps(operands.hidden, operands.weight, operands.targets)

    def step() -> Result:
        return _gradients(-(token_weights * token_logps()).sum(), operands)

    return Contender(step, token_logps)


def by_sequence(operands: Operands, mean_loss: MeanLoss) -> Contender:
    """REDI from means: one call for each sequence."""
    lengths = operands.cu_seqlens.diff().tolist()
    scales = [(1.0 if sign > 0 else -ALPHA) / operands.pairs for sign in operands.signs.tolist()]

    def step() -> Result:
        parts = zip(
            operands.hidden.split(lengths), operands.targets.split(lengths), scales, strict=True
        )
        terms = [scale * mean_loss(x, operands.weight, y) for x, y, scale in parts]
        return _gradients(torch.stack(terms).sum(), operands)

    return Contender(step)


def plain(operands: Operands, mean_loss: MeanLoss) -> Contender:
    """The mean over the whole pack in one call."""

    def step() -> Result:
        loss = mean_loss(operands.hidden, operands.weight, operands.targets)
        return _gradients(loss, operands)

    return Contender(step, plain=True)


def _gradients(loss: Tensor, operands: Operands) -> Result:
    return Result(loss.detach(), *torch.autograd.grad(loss, (operands.hidden, operands.weight)))


def floor(operands: Operands) -> Contender:
    """The three products alone, into memory allocated beforehand, on a real dZ."""
    hidden, weight = operands.hidden.detach(), operands.weight.detach()
    if not hidden.is_cuda:  # a CPU multiplies halves more slowly than float32
        hidden, weight = (t.to(accumulation_dtype(t.dtype)) for t in (hidden, weight))
    logits = hidden @ weight.T
    dlogits = torch.empty_like(logits)
    token_weights = operands.token_weights.to(accumulation_dtype(hidden.dtype))[:, None]
    for start in range(0, len(hidden), 1024):
        part = slice(start, start + 1024)
        probs = torch.softmax(logits[part], -1, dtype=token_weights.dtype)
        ones = torch.full_like(probs[:, :1], -1.0)
        probs.scatter_add_(1, operands.targets[part, None], ones)
        dlogits[part] = probs.mul_(token_weights[part])
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    # As ours, dW comes out in float32.
    widens = hidden.dtype in (torch.bfloat16, torch.float16)
    if widens:
        dweight = dweight.float()

    def step() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(dlogits, weight, out=dhidden)
        if widens:
            torch.mm(dlogits.T, hidden, out_dtype=torch.float32, out=dweight)
        else:
            torch.mm(dlogits.T, hidden, out=dweight)

    return Contender(step)


def redi(backend: Backend, epsilon: float | None = None) -> Callable[[Operands], Contender]:
    """This project's op on a backend, with epsilon the one that filters."""
    op: Callable[..., RediLoss | FilteredRediLoss] = redi_loss
    if epsilon is not None:
        op = partial(filtered_redi_loss, epsilon=epsilon)

    def build(operands: Operands) -> Contender:
        if backend.endswith("-exp") and operands.hidden.dtype != torch.bfloat16:
            raise Absent("for bfloat16 alone")
        try:  # on two tokens, to learn whether the backend is available
            with torch.no_grad():
                hidden, weight, targets = (tensor[:2] for tensor in operands[:3])
                ends, signs = operands.cu_seqlens[:2].clamp(max=2), operands.signs[:1]
                op(
                    hidden,
                    weight,
                    targets.clamp(max=1),
                    ends,
                    signs,
                    alpha=ALPHA,
                    num_pairs=1,
                    backend=backend,
                )
        except ValueError as error:
            raise Absent(str(error)) from None

        valid_index = torch.arange(len(operands.targets), device=operands.targets.device)

        def step() -> Result:
            loss = op(
                *operands,
                alpha=ALPHA,
                num_pairs=operands.pairs,
                valid_index=valid_index,  # as the engine's collator gives it
                backend=backend,
            ).loss
            return _gradients(loss, operands)

        def token_logps() -> Tensor:
            # The op that redi_loss is a case of: it returns the tokens' log-probs, not their sums.
            weights = operands.token_weights.to(accumulation_dtype(operands.hidden.dtype))
            return signed_cross_entropy(*operands[:3], weights, backend=backend)[1]

        return Contender(step, token_logps)

    return build


def _log_softmax_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logps = F.log_softmax(logits, -1, dtype=accumulation_dtype(hidden.dtype))
    return logps.gather(1, targets[:, None])[:, 0]


def eager(operands: Operands) -> Contender:
    """Whole logits in the operands' dtype, autograd."""
    return by_token(operands, _log_softmax_logps)


def eager_float32(operands: Operands) -> Contender:
    """Whole logits from operands cast to float32, autograd."""
    if operands.hidden.dtype not in (torch.bfloat16, torch.float16):
        raise Absent("the operands are no halves: the same as eager")
    return by_token(operands, lambda x, w, y: _log_softmax_logps(x.float(), w.float(), y))


def compiled(operands: Operands) -> Contender:
    """`eager` through torch.compile."""
    if not operands.hidden.is_cuda:
        raise Absent("measured on a GPU only")
    return by_token(operands, torch.compile(_log_softmax_logps))


def _torch_loss(operands: Operands, reduction: str) -> MeanLoss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy: needs 2.13")
    chunk = TORCH_CHUNK_TOKENS[operands.hidden.device.type]
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return lambda x, w, y: F.linear_cross_entropy(x, w, y, reduction=reduction, options=options)


def _minus(losses: TokenLogps) -> TokenLogps:
    return lambda x, w, y: -losses(x, w, y)


_TORCH = f"batch_chunk_size {TORCH_CHUNK_TOKENS['cpu']} on a CPU, {TORCH_CHUNK_TOKENS['cuda']}"
_OURS = "valid_index given, backend"

METHODS: dict[str, LossMethod] = {
    "floor": LossMethod("the three products alone, dW in float32 on a GPU", floor),
    "redi-triton": LossMethod(f"redi_loss, {_OURS} triton", redi("triton"), ours=True),
    "redi-triton-exp": LossMethod(f"redi_loss, {_OURS} triton-exp", redi("triton-exp"), ours=True),
    "redi-filter": LossMethod(
        f"filtered_redi_loss, epsilon 2^-10, approximate; {_OURS} triton-exp",
        redi("triton-exp", 2.0**-10),
        ours=True,
        approximate=True,
    ),
    "redi-torch": LossMethod(f"redi_loss, {_OURS} torch", redi("torch"), ours=True),
    "eager": LossMethod("whole logits in the operands' dtype, float32 log-softmax", eager),
    "eager-float32": LossMethod("whole logits, operands cast to float32", eager_float32),
    "compiled": LossMethod("eager under torch.compile, default mode", compiled),
    "torch-by-sequence": LossMethod(
        f"F.linear_cross_entropy, mean; {_TORCH} on a GPU",
        lambda operands: by_sequence(operands, _torch_loss(operands, "mean")),
    ),
    "torch-plain": LossMethod(
        f"F.linear_cross_entropy, mean over the pack, not REDI; {_TORCH} on a GPU",
        lambda operands: plain(operands, _torch_loss(operands, "mean")),
    ),
    "torch-by-token": LossMethod(
        f'F.linear_cross_entropy, "none"; {_TORCH} on a GPU',
        lambda operands: by_token(operands, _minus(_torch_loss(operands, "none"))),
    ),
}
