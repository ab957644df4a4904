"""What the tests of the loss ops share: cases, the float64 oracle, the rule of what is exact.

A `Case` is a packed row with operands already rounded to its dtype, so that the oracle starts
from the same numbers. Logits come in kinds (`LOGITS`), from flat to a log-prob of -500.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from redi.kernels import reference
from redi.kernels.backends import TRITON_INSTALLED, TRITON_INTERPRETS

ALPHA = 0.8


class Target(NamedTuple):
    """A backend on a device: what a test is parametrised on."""

    backend: str
    device: str


TARGETS = [Target("torch", "cpu")]
# Those that differ from the others in bfloat16 alone: `kernels/test_exp_gemm.py`.
EXP_TARGETS: list[Target] = []
if torch.cuda.is_available():
    TARGETS += [Target("torch", "cuda"), Target("triton", "cuda")]
    EXP_TARGETS.append(Target("triton-exp", "cuda"))
elif TRITON_INTERPRETS and TRITON_INSTALLED:
    TARGETS.append(Target("triton", "cpu"))
    EXP_TARGETS.append(Target("triton-exp", "cpu"))


@dataclass(frozen=True)
class Case:
    """Arguments of `redi_loss`."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    signs: Tensor
    alpha: float = ALPHA
    num_pairs: float = 3.0

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The positional ones."""
        return self.hidden, self.weight, self.targets, self.cu_seqlens, self.signs

    @property
    def options(self) -> dict[str, float]:
        """The keyword ones."""
        return {"alpha": self.alpha, "num_pairs": self.num_pairs}

    @property
    def valid_index(self) -> Tensor:
        """[N] positions of unmasked targets."""
        return (self.targets != -100).nonzero()[:, 0]

    @property
    def token_weights(self) -> Tensor:
        """[T] float64, by a loop: what REDI gives each token; 0 where masked."""
        weights = torch.zeros(self.targets.shape, dtype=torch.float64, device=self.targets.device)
        bounds = self.cu_seqlens.tolist()
        for s, sign in enumerate(self.signs.tolist()):
            part = slice(bounds[s], bounds[s + 1])
            valid = self.targets[part] != -100
            factor = {1: 1.0, -1: -self.alpha, 0: 0.0}[sign]
            weights[part] = valid.double() * factor / (max(1, int(valid.sum())) * self.num_pairs)
        return weights

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another dtype."""
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


LENGTHS = (20, 1, 0, 9, 21, 5)  # one token, none, ragged
SIGNS = (1, -1, 1, -1, 1, -1)


def make_case(
    dtype: torch.dtype = torch.float32,
    *,
    vocab: int = 331,
    hidden: int = 77,
    lengths: Sequence[int] = LENGTHS,
    signs: Sequence[int] = SIGNS,
    logits: str = "random",
    masked: float = 0.2,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """A row whose fourth sequence, if there is one, is masked in full; others by chance."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    if tokens:
        targets[-1] = vocab - 1  # the last column
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64) / hidden**0.5
    noise = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    x = LOGITS[logits](noise, weight, targets)
    mask = torch.rand(tokens, generator=generator) < masked
    if len(lengths) > 3 and masked:
        mask[bounds[3] : bounds[4]] = True
    if tokens:
        mask[-1] = False
    return Case(
        hidden=x.to(device, dtype),
        weight=weight.to(device, dtype),
        targets=targets.masked_fill(mask, -100).to(device),
        cu_seqlens=bounds.to(device, torch.int32),
        signs=torch.tensor(signs, dtype=torch.int8, device=device),
    )


def _towards(scale: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Target's logit near `scale`, the others' spread scale / sqrt(D) around 0."""
    return lambda noise, weight, targets: scale * F.normalize(weight[targets]) + 0.02 * noise


def _away(scale: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Another token's logit near `scale`, the target's near -scale."""

    def hidden(noise: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        other = (targets + 1) % len(weight)
        return scale * (F.normalize(weight[other]) - F.normalize(weight[targets])) + 0.02 * noise

    return hidden


LOGITS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flat": lambda noise, weight, targets: 1e-3 * noise,
    "random": lambda noise, weight, targets: 2 * noise,
    "peaked": lambda noise, weight, targets: 8 * noise,
    "confident": _towards(28.0),  # 1 - p from 1e-9 to 1e-7
    "beyond 80": lambda noise, weight, targets: 35 * noise,
    "logp -80": _away(40.0),
    "logp -500": _away(260.0),
}


class Gradients(NamedTuple):
    """By hidden [T, D] and by weight [V, D]."""

    dhidden: Tensor
    dweight: Tensor


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor, **options: bool) -> Gradients:
    """Of a scalar."""
    return Gradients(*torch.autograd.grad(loss, (hidden, weight), **options))


def leaves(case: Case) -> Case:
    """The case with operands that require gradients."""
    return replace(
        case,
        hidden=case.hidden.detach().clone().requires_grad_(),
        weight=case.weight.detach().clone().requires_grad_(),
    )


def run(op: Callable[..., reference.RediLoss], case: Case, **options: object) -> tuple:
    """(RediLoss, Gradients) of `redi_loss` or its reference.

    float16 gets a loss scale, as in training: it cannot hold gradients of 1e-8. It is divided out
    of the gradients again, in float64.
    """
    case = leaves(case)
    out = op(*case.arguments, **(case.options | options))
    scale = 2.0 ** loss_scale_exponent(case) if case.hidden.dtype == torch.float16 else 1.0
    got = gradients(out.loss * scale, case.hidden, case.weight)
    assert got.dhidden.dtype == got.dweight.dtype == case.hidden.dtype
    return out, got if scale == 1.0 else Gradients(*(g.double() / scale for g in got))


def loss_scale_exponent(case: Case) -> int:
    """What brings the largest entry of the gradients to between 2^10 and 2^11."""
    largest = max(float(g.abs().max()) for g in oracle(case)[1])
    return 11 - math.frexp(largest)[1] if largest else 0


def oracle(case: Case) -> tuple:
    """(RediLoss, Gradients) by the reference in float64 from the same, rounded, operands."""
    return run(reference.redi_loss, case.to(torch.float64))


def baseline(case: Case) -> Gradients:
    """What plain training in this dtype does: rounded logits, float32 softmax, rounded dlogits."""
    valid = case.valid_index
    x, w = case.hidden[valid], case.weight
    p = torch.softmax((x @ w.T).float(), -1)
    p.scatter_add_(1, case.targets[valid, None], torch.full_like(p[:, :1], -1.0))
    dlogits = (p * case.token_weights[valid, None].float()).to(x.dtype)
    dhidden = torch.zeros_like(case.hidden)
    dhidden[valid] = dlogits @ w
    return Gradients(dhidden, dlogits.T @ x)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of `exact`; NaN counts as infinite."""
    error = (value.detach().double() - exact.double()).norm() / exact.double().norm().clamp(
        min=1e-300
    )
    return float(error.nan_to_num(torch.inf))


def worst_row(value: Tensor, exact: Tensor) -> float:
    """The largest relative error of a row whose norm is over 1e-3 of the largest row's."""
    exact = exact.double()
    norms = exact.norm(dim=1)
    rows = norms > 1e-3 * norms.max()
    errors = (value.detach().double() - exact)[rows].norm(dim=1) / norms[rows]
    return float(errors.nan_to_num(torch.inf).max())


def violations(
    got: Gradients, case: Case, exact: Gradients, plain: Gradients | None = None
) -> list[str]:
    """Where gradients break the rule of exactness for their dtype; empty if they keep it.

    float32: relative error at most 2e-5. bfloat16: at most 1.5 times the plain baseline's and at
    most 4e-3, and the worst row at most 1.5 times the baseline's worst or 1.5e-2, whichever is
    larger. float16 has three bits more and no usable baseline (it underflows): 1e-3.
    `plain` is the baseline, where it is at hand already.
    """
    dtype = case.hidden.dtype
    if plain is None and dtype == torch.bfloat16:
        plain = baseline(case)
    found = []
    for name in Gradients._fields:
        value, true = getattr(got, name), getattr(exact, name)
        error = relative_error(value, true)
        limit = {torch.float32: 2e-5, torch.float16: 1e-3, torch.float64: 1e-12}.get(dtype)
        if plain is not None:
            limit = min(4e-3, 1.5 * relative_error(getattr(plain, name), true))
            row, row_plain = worst_row(value, true), worst_row(getattr(plain, name), true)
            if row > max(1.5e-2, 1.5 * row_plain):
                found.append(f"{name}: worst row {row:.1e}, baseline {row_plain:.1e}")
        assert limit is not None
        if error > limit:
            found.append(f"{name}: error {error:.1e} over {limit:.1e}")
    return found


def mutants(got: Gradients, case: Case) -> dict[str, Gradients]:
    """Wrong gradients that the rule must reject: a rule that lets them pass shows nothing."""
    forgotten = run(reference.redi_loss, replace(case, alpha=1.0).to(torch.float64))[1]
    return {
        "zero": Gradients(*(torch.zeros_like(g) for g in got)),
        "sign flipped": Gradients(*(-g for g in got)),
        "alpha forgotten": forgotten,
        "scaled by 1.01": Gradients(*((1.01 * g.double()).to(g.dtype) for g in got)),
    }


def assert_exact(got: Gradients, case: Case, exact: Gradients) -> None:
    """The gradients keep the rule, and the same rule rejects each mutant in both gradients."""
    assert not violations(got, case, exact)
    for name, wrong in mutants(got, case).items():
        broken = {text.split(":")[0] for text in violations(wrong, case, exact)}
        assert broken == set(Gradients._fields), f"the rule lets pass: {name}"
