"""The loss of sequences' mean log-probs, linear and exponential, in three matrix products."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    LOGITS,
    Case,
    Gradients,
    Target,
    baseline,
    gradients,
    leaves,
    make_case,
    relative_error,
    violations,
)
from torch import Tensor
from torch.library import opcheck

from redi.kernels import (
    RediLoss,
    chunked,
    linear_logprobs,
    redi_loss,
    reference,
    segment_sum,
    sequence_loss,
)
from redi.kernels.sequence_loss import sequence_groups

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS, SIGNS = (20, 1, 0, 9, 21, 40), (1, -1, 1, -1, 1, -1)
TEMPERATURE = 1.5
# The other kinds of logits reach the same kernel through other losses in the quick suite.
SWEPT = [
    kind if kind in ("random", "confident", "logp -80") else pytest.param(kind, marks=slow)
    for kind in LOGITS
]


@dataclass(frozen=True)
class SequenceCase(Case):
    """Positives by their mean log-prob, negatives by exp of it."""

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """linear and exponential ones, [S]."""
        positive = (self.signs > 0).float() / self.num_pairs
        negative = -self.alpha * (self.signs < 0).float() / self.num_pairs
        return positive, negative

    @property
    def token_weights(self) -> Tensor:
        """[T] float64: what the loss gives each token."""
        operands = self.hidden.detach().double(), self.weight.detach().double()
        logps = reference.linear_logprobs(*operands, self.targets)
        weights = torch.zeros_like(logps)
        bounds = self.cu_seqlens.tolist()
        linear, exponential = (values.double() for values in self.weights)
        for s, (start, end) in enumerate(pairwise(bounds)):
            valid = (self.targets[start:end] != -100).double()
            mean = logps[start:end].sum() / valid.sum().clamp(min=1)
            factor = linear[s] + exponential[s] * (mean / TEMPERATURE).exp()
            weights[start:end] = valid * factor / valid.sum().clamp(min=1)
        return weights


def sequence_case(dtype: torch.dtype = torch.float32, **options: Any) -> SequenceCase:
    case = make_case(dtype, **({"lengths": LENGTHS, "signs": SIGNS} | options))
    return SequenceCase(**vars(case))


def run(op: Any, case: SequenceCase, scale: float = 1.0, **options: Any) -> tuple:
    case = leaves(case)
    options = {"temperature": TEMPERATURE} | options
    out = op(*case.arguments[:4], *case.weights, **options)
    got = gradients(out.loss * scale, case.hidden, case.weight)
    return out, got if scale == 1 else Gradients(*(g.double() / scale for g in got))


def oracle(case: SequenceCase) -> tuple[RediLoss, Gradients]:
    return run(reference.sequence_loss, case.to(torch.float64))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=slow)],
    ids=str,
)
@pytest.mark.parametrize("logits", SWEPT)
@pytest.mark.parametrize("chunk_tokens", [None, pytest.param(16, marks=slow)])
def test_it_is_exact_for_every_kind_of_logits(
    target: Target, logits: str, dtype: torch.dtype, chunk_tokens: int | None
) -> None:
    case = sequence_case(dtype, logits=logits, device=target.device)
    exact_out, exact = oracle(case)
    scale = 1.0
    if dtype == torch.float16:  # a loss scale, as in training
        largest = max(float(g.abs().max()) for g in exact)
        scale = 2.0 ** (11 - math.frexp(largest)[1])
    out, got = run(sequence_loss, case, scale, backend=target.backend, chunk_tokens=chunk_tokens)
    logits_size = float((case.hidden.double() @ case.weight.double().T).abs().max())
    size = max(1.0, logits_size / 50)
    lengths = out.sequence_lengths.clamp(min=1)
    assert ((out.sequence_logps - exact_out.sequence_logps) / lengths).abs().max() <= 2e-4 * size
    assert abs(out.loss - exact_out.loss) <= 2e-4 * size
    assert torch.equal(out.sequence_lengths, exact_out.sequence_lengths)
    plain = baseline(case) if dtype == torch.bfloat16 else None
    assert not violations(got, case, exact, plain)
    # The same rule rejects wrong gradients.
    wrong = {
        "zero": Gradients(*(torch.zeros_like(g) for g in got)),
        "flipped": Gradients(*(-g for g in got)),
        "scaled": Gradients(*((1.01 * g.double()).to(g.dtype) for g in got)),
    }
    for name, mutant in wrong.items():
        assert len(violations(mutant, case, exact, plain)) >= 2, name


def test_a_forgotten_factor_would_be_seen(target: Target) -> None:
    """Of negatives that are already unlikely REDI's gradient is far larger."""
    case = sequence_case(logits="peaked", device=target.device)
    _, redi = run(lambda *a, **o: redi_loss(*a[:4], case.signs, **case.options), case)
    assert len(violations(redi, case, oracle(case)[1])) == 2


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 25, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_chunk_size_does_not_matter(dtype: torch.dtype, chunk_tokens: int) -> None:
    """Chunks of whole sequences, and sequences cut into chunks."""
    case = sequence_case(dtype)
    out, got = run(sequence_loss, case, backend="torch", chunk_tokens=chunk_tokens)
    exact_out, exact = oracle(case)
    torch.testing.assert_close(out.loss.double(), exact_out.loss, rtol=1e-6, atol=1e-7)
    assert not violations(got, case, exact)


def test_forward_and_backward_are_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the unmasked tokens, whether a sequence fits a chunk or not."""
    case = sequence_case()
    tokens, seen = len(case.valid_index), []
    multiply = chunked.matmul

    def count(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        seen.append(a.shape[0] * a.shape[1] * b.shape[1])
        return multiply(a, b, out, accumulate)

    monkeypatch.setattr(chunked, "matmul", count)
    for chunk_tokens in (None, 7, 16):
        seen.clear()
        run(sequence_loss, case, chunk_tokens=chunk_tokens)
        assert sum(seen) == 3 * tokens * case.weight.numel()
    seen.clear()
    frozen = replace(case, weight=case.weight.detach())
    loss = sequence_loss(*leaves(frozen).arguments[:4], *case.weights).loss
    with torch.no_grad():
        seen.clear()
        sequence_loss(*case.arguments[:4], *case.weights)
        assert sum(seen) == tokens * case.weight.numel()
    assert loss.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_operand_costs_no_product(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = leaves(sequence_case())
    expected = run(sequence_loss, case)[1]
    getattr(case, frozen).requires_grad_(False)
    seen = []
    multiply = chunked.matmul
    monkeypatch.setattr(
        chunked, "matmul", lambda *a, **o: seen.append(a[0].numel()) or multiply(*a, **o)
    )
    out = sequence_loss(*case.arguments[:4], *case.weights, temperature=TEMPERATURE, chunk_tokens=7)
    monkeypatch.undo()
    operand = case.weight if frozen == "hidden" else case.hidden
    (got,) = torch.autograd.grad(out.loss, operand)
    expected_of = expected.dweight if frozen == "hidden" else expected.dhidden
    torch.testing.assert_close(got, expected_of, rtol=1e-5, atol=1e-7)
    chunks = sum(-(-n // 7) for n in out.sequence_lengths.tolist() if n)
    assert len(seen) <= 2 * chunks


def test_it_is_simper_and_at_a_high_temperature_redi() -> None:
    """Against autograd through the log-probs, and through `redi_loss`."""
    case = leaves(sequence_case(torch.float32))
    signs = case.signs.float()
    out = sequence_loss(*case.arguments[:4], torch.zeros_like(signs), signs)
    logps = linear_logprobs(*case.arguments[:3])
    sums = segment_sum(logps, case.cu_seqlens)
    simper = -(signs * (sums / out.sequence_lengths.clamp(min=1)).exp()).sum()
    torch.testing.assert_close(out.loss, simper)
    for one, other in zip(
        gradients(out.loss, case.hidden, case.weight),
        gradients(simper, case.hidden, case.weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    hot = run(sequence_loss, case, temperature=1e6)[1]
    redi = redi_loss(*case.arguments, **case.options)
    for one, other in zip(hot, gradients(redi.loss, case.hidden, case.weight), strict=True):
        assert relative_error(one, other) < 2e-5


def ordered(case: SequenceCase) -> tuple[Tensor, list[int]]:
    """(valid_index, exponential_lengths) as a collator makes them: positives come first."""
    bounds = case.cu_seqlens.tolist()
    places: dict[int, list[Tensor]] = {1: [], -1: []}
    for (start, end), sign in zip(pairwise(bounds), case.signs.tolist(), strict=True):
        places[sign].append((case.targets[start:end] != -100).nonzero()[:, 0] + start)
    lengths = [len(part) for part in places[-1]]
    return torch.cat([*places[1], *places[-1]]).to(case.targets.device), lengths


@pytest.mark.parametrize("chunk_tokens", [pytest.param(None, marks=slow), 7])
def test_an_order_that_is_given_changes_no_bit(target: Target, chunk_tokens: int | None) -> None:
    case = sequence_case(device=target.device)
    options = {"backend": target.backend, "chunk_tokens": chunk_tokens}
    out, got = run(sequence_loss, case, **options)
    index, lengths = ordered(case)
    given_out, given_got = run(
        sequence_loss, case, valid_index=index, exponential_lengths=lengths, **options
    )
    assert torch.equal(given_out.loss, out.loss)
    assert all(torch.equal(a, b) for a, b in zip(given_got, got, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda index, lengths: (index, [*lengths[:-1], lengths[-1] - 1]),
        lambda index, lengths: (index, [lengths[0] + 1, *lengths[1:]]),
        lambda index, lengths: (index.flip(0), lengths),
        lambda index, lengths: (index, []),
        lambda index, lengths: (index, [sum(lengths)]),
    ],
)
def test_a_wrong_order_is_an_error(change: Any) -> None:
    case = sequence_case()
    index, lengths = change(*ordered(case))
    with pytest.raises(ValueError, match="valid_index must end in the tokens of the sequences"):
        sequence_loss(
            *case.arguments[:4], *case.weights, valid_index=index, exponential_lengths=lengths
        )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0"),
        ({"temperature": "1"}, TypeError, "temperature must be a number"),
        ({"denominators": torch.zeros(6)}, ValueError, "denominators must be > 0"),
        ({"denominators": torch.ones(5)}, ValueError, "denominators must have one entry"),
        ({"exponential_lengths": [3]}, ValueError, "pass valid_index as well"),
        (
            {"exponential_lengths": [1000], "valid_index": torch.arange(3)},
            ValueError,
            "at most N = 3",
        ),
        (
            {"exponential_lengths": [1.5], "valid_index": torch.arange(3)},
            TypeError,
            "exponential_lengths must be ints",
        ),
        ({"exponential_weights": torch.full((6,), torch.nan)}, ValueError, "must be finite"),
    ],
)
def test_wrong_arguments_are_named(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    case = sequence_case()
    names = ("linear_weights", "exponential_weights")
    weights = dict(zip(names, case.weights, strict=True))
    with pytest.raises(error, match=words):
        sequence_loss(*case.arguments[:4], **(weights | options))


def test_backward_honours_any_upstream_gradient_and_runs_again(target: Target) -> None:
    case = leaves(sequence_case(device=target.device))
    out = sequence_loss(*case.arguments[:4], *case.weights, backend=target.backend)
    once = gradients(out.loss, case.hidden, case.weight, retain_graph=True)
    tripled = gradients(-3 * out.loss, case.hidden, case.weight)
    for one, other in zip(once, tripled, strict=True):
        torch.testing.assert_close(-3 * one, other, rtol=1e-6, atol=0)


def test_the_softcap_and_the_scale_of_logits_are_in_the_gradient() -> None:
    case = sequence_case()
    options: dict[str, Any] = {"logit_scale": 0.7, "softcap": 5.0}
    out, got = run(sequence_loss, case, chunk_tokens=16, **options)
    exact_out, exact = run(reference.sequence_loss, case.to(torch.float64), **options)
    torch.testing.assert_close(out.loss.double(), exact_out.loss, rtol=1e-5, atol=1e-6)
    assert not violations(got, case, exact)


def test_denominators_need_not_be_the_number_of_targets() -> None:
    case = sequence_case(torch.float64)
    options: dict[str, Any] = {"denominators": torch.arange(1.0, 7.0)}
    out, got = run(sequence_loss, case, chunk_tokens=16, **options)
    exact_out, exact = run(reference.sequence_loss, case, **options)
    torch.testing.assert_close(out.loss, exact_out.loss, rtol=1e-12, atol=0)
    assert not violations(got, case, exact)


def test_a_term_of_a_hopeless_sequence_is_zero_and_finite(target: Target) -> None:
    """exp of a log-prob of -500 underflows: no gradient, and nothing else is disturbed."""
    case = sequence_case(logits="logp -500", masked=0.0, device=target.device)
    _, got = run(sequence_loss, case, temperature=1.0, backend=target.backend)
    assert got.dhidden.isfinite().all()
    assert got.dweight.isfinite().all()
    negative = case.cu_seqlens.tolist()[5]
    assert not got.dhidden[negative:].any()
    assert got.dhidden[:20].any()


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 20), st.integers(0, 5))
@settings(max_examples=200)
def test_ranges_end_where_a_sequence_ends(lengths: list[int], most: int, first: int) -> None:
    ranges = sequence_groups(first, lengths, most)
    ends = {first + sum(lengths[: i + 1]) for i in range(len(lengths))}
    assert [i for a, b in ranges for i in range(a, b)] == list(range(first, first + sum(lengths)))
    assert all(end in ends for _, end in ranges)
    for start, end in ranges:
        if end - start > most:  # one sequence
            assert not any(start < e < end for e in ends)


def test_the_op_keeps_its_contract_and_compiles_without_a_graph_break(target: Target) -> None:
    case = leaves(
        sequence_case(
            vocab=23, hidden=6, lengths=(5, 0, 7), signs=(1, -1, -1), device=target.device
        )
    )
    index, lengths = ordered(case)
    arguments = (*case.arguments[:4], *case.weights)
    opcheck(
        torch.ops.redi.sequence_loss.default,
        (
            *arguments, None, 1.0, index, lengths, 4, target.backend, (True, True), 1.0, None,
        ),
    )  # fmt: skip

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return sequence_loss(
            hidden,
            weight,
            *arguments[2:],
            valid_index=index,
            exponential_lengths=lengths,
            backend=target.backend,
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(case.hidden, case.weight), loss(case.hidden, case.weight), rtol=0, atol=0
    )


@pytest.mark.parametrize("sequences", [0, 2])
def test_a_row_without_tokens_is_legal(target: Target, sequences: int) -> None:
    hidden = torch.zeros(0, 8, device=target.device, requires_grad=True)
    weight = torch.randn(11, 8, device=target.device, requires_grad=True)
    zeros = torch.zeros(sequences, device=target.device)
    out = sequence_loss(
        hidden,
        weight,
        torch.zeros(0, dtype=torch.int64, device=target.device),
        torch.zeros(sequences + 1, dtype=torch.int64, device=target.device),
        zeros,
        zeros,
        backend=target.backend,
    )
    got = gradients(out.loss, hidden, weight)
    assert out.loss == 0
    assert not got.dweight.any()
