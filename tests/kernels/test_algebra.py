"""What must hold of the loss ops whatever the numbers are: symmetries, sums, invariances."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    Case,
    Gradients,
    Target,
    gradients,
    leaves,
    make_case,
    relative_error,
    run,
)
from torch import Tensor

from redi.kernels import (
    linear_logprobs,
    redi_loss,
    redi_value_and_grad,
    signed_cross_entropy,
)
from redi.kernels.backends import kernels_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_same(got: tuple, expected: tuple, tolerance: float = 1e-6) -> None:
    """Two (RediLoss, Gradients), the second's as the measure."""
    torch.testing.assert_close(got[0].loss, expected[0].loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        got[0].sequence_logps, expected[0].sequence_logps, rtol=tolerance, atol=1e-4
    )
    for value, true in zip(got[1], expected[1], strict=True):
        assert relative_error(value, true) < tolerance


def sequence(case: Case, s: int) -> Case:
    """One sequence of a case as a row of its own."""
    start, end = case.cu_seqlens[s : s + 2].tolist()
    return replace(
        case,
        hidden=case.hidden[start:end],
        targets=case.targets[start:end],
        cu_seqlens=torch.tensor([0, end - start], device=case.targets.device),
        signs=case.signs[s : s + 1],
    )


def concatenate(cases: list[Case]) -> Case:
    """Rows of one lm_head behind one another."""
    lengths = torch.cat([case.cu_seqlens.diff() for case in cases]).long()
    return replace(
        cases[0],
        hidden=torch.cat([case.hidden for case in cases]),
        targets=torch.cat([case.targets for case in cases]),
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        signs=torch.cat([case.signs for case in cases]),
    )


def gradient_of_logits(target: Target, case: Case, coefficient: str, dtype: torch.dtype) -> Tensor:
    """What the softmax kernel alone makes of all tokens' logits, with weights from -1 to 1."""
    z = case.hidden @ case.weight.T
    dlogits = kernels_of(target.backend).softmax(
        z,
        torch.arange(len(z), device=target.device),
        case.targets,
        torch.linspace(-1, 1, len(z), device=target.device),
        coefficient=coefficient,
        dtype=dtype,
        logps=torch.empty(len(z), device=target.device),
    )
    assert dlogits is not None
    return dlogits


@pytest.mark.parametrize("coefficient", ["weight", "dft", "unlikelihood"])
@pytest.mark.parametrize("logits", ["random", "confident", "logp -80"])
def test_each_token_s_gradient_by_the_logits_sums_to_zero(
    target: Target, logits: str, coefficient: str
) -> None:
    """In the softmax kernel itself, with and without cancellation near p = 1."""
    case = make_case(logits=logits, masked=0.0, device=target.device)
    dlogits = gradient_of_logits(target, case, coefficient, torch.float32)
    scale = dlogits.abs().sum(-1).clamp(min=1e-30)
    assert (dlogits.sum(-1).abs() / scale).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_by_the_logits_is_rounded_once_on_every_device(
    target: Target, dtype: torch.dtype
) -> None:
    """So that a CPU shows the numerics of a GPU, which multiplies halves."""
    case = make_case(masked=0.0, device=target.device)
    exact = gradient_of_logits(target, case, "weight", torch.float32)
    rounded = gradient_of_logits(target, case, "weight", dtype)
    assert torch.equal(rounded.to(dtype), exact.to(dtype))
    assert torch.equal(rounded.float(), exact.to(dtype).float())


def test_opposite_signs_give_opposite_gradients_bit_for_bit(target: Target) -> None:
    case = replace(make_case(device=target.device), alpha=1.0)
    out, got = run(redi_loss, case, backend=target.backend)
    mirrored, opposite = run(redi_loss, replace(case, signs=-case.signs), backend=target.backend)
    assert torch.equal(mirrored.loss, -out.loss)
    assert torch.equal(mirrored.sequence_logps, out.sequence_logps)
    assert torch.equal(opposite.dhidden, -got.dhidden)
    assert torch.equal(opposite.dweight, -got.dweight)


@pytest.mark.parametrize(
    "chunk_tokens",
    [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(64, marks=pytest.mark.slow), 10**6],
)
def test_the_chunk_size_does_not_matter(target: Target, chunk_tokens: int) -> None:
    case = make_case(device=target.device)
    expected = run(redi_loss, case, backend=target.backend)
    got = run(redi_loss, case, backend=target.backend, chunk_tokens=chunk_tokens)
    assert_same(got, expected)
    for keep in (True, False):
        moved = leaves(case)
        logps = linear_logprobs(
            *moved.arguments[:3], keep=keep, chunk_tokens=chunk_tokens, backend=target.backend
        )
        loss = -(case.token_weights * logps).sum()
        for value, true in zip(
            gradients(loss, moved.hidden, moved.weight), expected[1], strict=True
        ):
            assert relative_error(value, true) < 1e-6


def test_packed_is_one_by_one(target: Target) -> None:
    case = make_case(device=target.device)
    packed, got = run(redi_loss, case, backend=target.backend)
    alone = [
        run(redi_loss, sequence(case, s), backend=target.backend) for s in range(len(case.signs))
    ]
    assert abs(sum(out.loss for out, _ in alone) - packed.loss) <= 1e-6 * packed.loss.abs() + 1e-6
    torch.testing.assert_close(
        torch.cat([out.sequence_logps for out, _ in alone]), packed.sequence_logps
    )
    assert relative_error(torch.cat([g.dhidden for _, g in alone]), got.dhidden) < 1e-6
    assert relative_error(sum(g.dweight for _, g in alone), got.dweight) < 1e-6


def test_the_order_of_sequences_in_a_row_does_not_matter(target: Target) -> None:
    case = make_case(device=target.device)
    order = [4, 1, 5, 0, 3, 2]
    got = run(redi_loss, concatenate([sequence(case, s) for s in order]), backend=target.backend)
    out, expected = run(redi_loss, case, backend=target.backend)
    torch.testing.assert_close(got[0].loss, out.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[0].sequence_logps, out.sequence_logps[order])
    assert relative_error(got[1].dweight, expected.dweight) < 1e-6
    starts = case.cu_seqlens.tolist()
    moved = torch.cat([expected.dhidden[starts[s] : starts[s + 1]] for s in order])
    assert relative_error(got[1].dhidden, moved) < 1e-6


def test_micro_batches_add_up_to_the_batch(target: Target) -> None:
    """Into one float32 gradient, as a trainer with its own main gradients does it."""
    case = make_case(device=target.device)
    out, expected = run(redi_loss, case, backend=target.backend)
    dweight = torch.zeros_like(case.weight)
    loss = torch.zeros((), device=target.device)
    for members in ([0, 1], [2, 3], [4], [5]):
        part = concatenate([sequence(case, s) for s in members])
        value, _, _ = redi_value_and_grad(
            *part.arguments, **part.options, dweight=dweight, backend=target.backend
        )
        loss += value.loss
    torch.testing.assert_close(loss, out.loss, rtol=1e-6, atol=1e-6)
    assert relative_error(dweight, expected.dweight) < 1e-6


@pytest.mark.slow
def test_valid_index_changes_nothing_in_any_order(target: Target) -> None:
    case = make_case(device=target.device)
    expected = run(redi_loss, case, backend=target.backend)
    shuffled = case.valid_index[torch.randperm(len(case.valid_index), device=target.device)]
    for index in (case.valid_index, case.valid_index.int(), shuffled):
        assert_same(run(redi_loss, case, backend=target.backend, valid_index=index), expected)
        for keep in (True, False):
            moved = leaves(case)
            logps = linear_logprobs(
                *moved.arguments[:3], keep=keep, valid_index=index, backend=target.backend
            )
            loss = -(case.token_weights * logps).sum()
            got = gradients(loss, moved.hidden, moved.weight)
            assert relative_error(got.dhidden, expected[1].dhidden) < 1e-6
            assert relative_error(got.dweight, expected[1].dweight) < 1e-6


def test_backward_honours_any_upstream_gradient_and_runs_again(target: Target) -> None:
    case = leaves(make_case(torch.bfloat16, device=target.device))

    def loss() -> Tensor:
        return redi_loss(*case.arguments, **case.options, backend=target.backend).loss

    once = loss()
    first = gradients(once, case.hidden, case.weight, retain_graph=True)
    again = gradients(once, case.hidden, case.weight, retain_graph=True)
    scaled = gradients(-4 * once, case.hidden, case.weight, retain_graph=True)
    last = gradients(once, case.hidden, case.weight)
    for a, b, c, d in zip(first, again, scaled, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, d)
        assert torch.equal(-4 * a, c)  # a power of two: exact
    third = gradients(loss() / 3, case.hidden, case.weight)
    for a, b in zip(first, third, strict=True):
        assert relative_error(b, a.double() / 3) < 4e-3
    with pytest.raises(RuntimeError, match="second time"):
        gradients(once, case.hidden, case.weight)


@pytest.mark.parametrize("keep", [True, False])
def test_backward_of_logprobs_runs_again(target: Target, keep: bool) -> None:
    case = leaves(make_case(device=target.device))
    logps = linear_logprobs(
        case.hidden, case.weight, case.targets, keep=keep, backend=target.backend
    )
    first = gradients(logps.sum(), case.hidden, case.weight, retain_graph=True)
    doubled = gradients(2 * logps.sum(), case.hidden, case.weight, retain_graph=True)
    for a, b in zip(first, doubled, strict=True):
        assert torch.equal(2 * a, b)


def test_repeated_calls_agree_bit_for_bit(target: Target) -> None:
    case = make_case(torch.bfloat16, lengths=(50, 30), signs=(1, -1), device=target.device)
    runs = [run(redi_loss, case, backend=target.backend, chunk_tokens=32) for _ in range(2)]
    assert torch.equal(runs[0][0].loss, runs[1][0].loss)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(a, b)


def test_gradients_are_finite_differences() -> None:
    case = leaves(
        make_case(torch.float64, vocab=11, hidden=5, lengths=(4, 0, 1, 3), signs=(1, 1, -1, -1))
    )
    weights = torch.linspace(-1, 1, 8, dtype=torch.float64)

    def redi(hidden: Tensor, weight: Tensor) -> Tensor:
        moved = replace(case, hidden=hidden, weight=weight)
        return redi_loss(*moved.arguments, **moved.options, chunk_tokens=3).loss

    def signed(coefficient: str):  # type: ignore[no-untyped-def]
        return lambda hidden, weight: signed_cross_entropy(
            hidden, weight, case.targets, weights, coefficient=coefficient, chunk_tokens=3
        )[0]

    def logps(keep: bool):  # type: ignore[no-untyped-def]
        return lambda hidden, weight: linear_logprobs(
            hidden, weight, case.targets, keep=keep, chunk_tokens=3
        )

    # (DFT's gradient is none of its loss's: the coefficient is held constant.)
    for function in (redi, signed("weight"), signed("unlikelihood"), logps(True), logps(False)):
        assert torch.autograd.gradcheck(function, (case.hidden, case.weight))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-3, 300.0),
    vocab=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_log_prob_is_never_above_zero_and_nothing_is_nan(
    seed: int, scale: float, vocab: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(9, 3, generator=generator)).to(dtype).requires_grad_()
    # Few distinct numbers: ties between the target and others are common.
    weight = torch.randint(-2, 3, (vocab, 3), generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (9,), generator=generator)
    signs = torch.randint(-1, 2, (9,), generator=generator).float()
    for coefficient in ("weight", "dft", "unlikelihood"):
        loss, logps = signed_cross_entropy(hidden, weight, targets, signs, coefficient=coefficient)
        assert (logps <= 0).all()
        assert loss.isfinite()
        got = Gradients(*torch.autograd.grad(loss, (hidden, weight)))
        assert got.dhidden.isfinite().all()
        assert got.dweight.isfinite().all()
