"""The loss ops give the loss, log-probs and gradients that the float64 reference gives."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    ALPHA,
    LOGITS,
    Case,
    Gradients,
    Target,
    assert_exact,
    gradients,
    leaves,
    loss_scale_exponent,
    make_case,
    oracle,
    relative_error,
    run,
    violations,
)

from redi.kernels import (
    linear_logprobs,
    loss_ops,
    redi_loss,
    redi_value_and_grad,
    reference,
    segment_sum,
    signed_cross_entropy,
)
from redi.kernels.backends import kernels_of
from redi.kernels.softmax import NEGLIGIBLE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


def logits_size(case: Case) -> float:
    return float((case.hidden.double() @ case.weight.double().T).detach().abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
def test_redi_loss_is_exact_for_every_kind_of_logits(
    target: Target, logits: str, dtype: torch.dtype
) -> None:
    case = make_case(dtype, logits=logits, device=target.device)
    out, got = run(redi_loss, case, backend=target.backend)
    exact_out, exact = oracle(case)

    size = max(1.0, logits_size(case) / 50)
    lengths = out.sequence_lengths.clamp(min=1)
    mean_error = ((out.sequence_logps - exact_out.sequence_logps) / lengths).abs().max()
    assert mean_error <= 2e-4 * size
    assert abs(out.loss - exact_out.loss) <= 2e-4 * size
    assert out.loss.dtype == out.sequence_logps.dtype == torch.float32
    assert torch.equal(out.sequence_lengths, exact_out.sequence_lengths)
    assert_exact(got, case, exact)


def test_the_kinds_of_logits_are_what_they_are_called() -> None:
    def logps(kind: str) -> torch.Tensor:
        case = make_case(torch.float64, logits=kind, masked=0.0)
        return reference.linear_logprobs(case.hidden, case.weight, case.targets)

    assert (-logps("confident").expm1()).median() < 1e-7
    assert (-logps("confident").expm1()).min() > 1e-12
    assert logps("flat").std() < 1e-2
    assert logits_size(make_case(logits="beyond 80")) > 80
    assert -100 < logps("logp -80").median() < -70
    assert -560 < logps("logp -500").median() < -450


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_negligible_probability_is_zero_in_a_half_type_alone(
    target: Target, dtype: torch.dtype
) -> None:
    """Negligible against the sum without the target, which may itself be next to nothing."""
    torch.manual_seed(0)
    logits = 5 * torch.randn(6, 600, device=target.device)
    targets = torch.arange(6, device=target.device)
    logits[:3].scatter_(1, targets[:3, None], 40.0)  # 1 - p near 1e-11
    others = logits.double().scatter(1, targets[:, None], -torch.inf).softmax(1)
    weights = torch.full((6,), 2.0**14, device=target.device)
    dlogits = kernels_of(target.backend).softmax(
        logits,
        targets,
        targets,
        weights,
        coefficient="weight",
        dtype=dtype,
        logps=logits.new_empty(6),
    )
    assert dlogits is not None
    zero = (dlogits == 0).scatter(1, targets[:, None], False)
    if dtype == torch.float32:
        assert not zero.any()
        return
    share = others / NEGLIGIBLE
    assert zero[(share < 0.999).scatter(1, targets[:, None], False)].all()
    if dtype == torch.bfloat16:  # float16 cannot hold all others
        assert not zero[share > 1.001].any()
        assert 0.1 < zero.double().mean() < 0.6


@pytest.mark.parametrize("vocab", [151936, pytest.param(152064, marks=pytest.mark.slow)])
def test_redi_loss_is_exact_for_a_real_vocabulary(target: Target, vocab: int) -> None:
    case = make_case(
        torch.bfloat16, vocab=vocab, hidden=24, lengths=(6, 5), signs=(1, -1), device=target.device
    )
    _, got = run(redi_loss, case, backend=target.backend)
    assert_exact(got, case, oracle(case)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "signs"),
    [
        ((1,), (1,)),
        ((0, 0, 3), (1, -1, -1)),
        ((50, 31), (1, -1)),
        ((5, 4, 3), (0, 1, -1)),
    ],
)
def test_redi_loss_is_exact_for_ragged_rows(
    target: Target, lengths: tuple[int, ...], signs: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = make_case(
        dtype, hidden=61, vocab=129, lengths=lengths, signs=signs, masked=0.1, device=target.device
    )
    _, got = run(redi_loss, case, backend=target.backend, chunk_tokens=32)
    assert not violations(got, case, oracle(case)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_redi_loss_is_exact_for_operands_of_any_strides(target: Target, dtype: torch.dtype) -> None:
    case = make_case(dtype, device=target.device)
    plain, expected = run(redi_loss, case, backend=target.backend)
    tokens, size = case.hidden.shape
    wide = torch.full((len(case.weight) + 5, 2 * size), torch.nan, dtype=dtype)
    wide[: len(case.weight), ::2] = case.weight.cpu()
    for hidden, weight in [
        (case.hidden.T.contiguous().T, case.weight.T.contiguous().T),
        (case.hidden, wide.to(target.device)[: len(case.weight), ::2]),
        (case.hidden.repeat(1, 2)[:, :size], F.pad(case.weight, (0, 3))[:, :size]),
    ]:
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        assert not (hidden.is_contiguous() and weight.is_contiguous())
        moved = replace(case, hidden=hidden, weight=weight)
        out = redi_loss(*moved.arguments, **moved.options, backend=target.backend)
        got = gradients(out.loss, hidden, weight)
        torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-5)
        assert relative_error(got.dhidden, expected.dhidden) < 3e-3
        assert relative_error(got.dweight, expected.dweight) < 3e-3
    assert tokens


def test_the_other_arguments_may_have_any_strides_too(target: Target) -> None:
    case = make_case(device=target.device)

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.stack([tensor, torch.full_like(tensor, 99)], 1)[:, 0]
        assert not wide.is_contiguous()
        return wide

    moved = replace(
        case,
        targets=strided(case.targets),
        cu_seqlens=strided(case.cu_seqlens),
        signs=strided(case.signs),
    )
    options = {"backend": target.backend}
    out, got = run(redi_loss, moved, valid_index=strided(case.valid_index), **options)
    expected, expected_gradients = run(redi_loss, case, **options)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(got.dhidden, expected_gradients.dhidden)
    assert torch.equal(got.dweight, expected_gradients.dweight)
    weights = torch.linspace(-1, 1, len(case.targets), device=target.device)
    operands = case.hidden, case.weight
    loss, logps = signed_cross_entropy(*operands, moved.targets, strided(weights), **options)
    assert torch.equal(loss, signed_cross_entropy(*operands, case.targets, weights, **options)[0])
    sums = segment_sum(strided(logps), moved.cu_seqlens, **options)
    assert torch.equal(sums, segment_sum(logps, case.cu_seqlens, **options))


def test_redi_loss_is_the_formula_of_the_paper_on_whole_logits(target: Target) -> None:
    """Written out a second time, sequence by sequence, with cross_entropy alone."""
    case = leaves(make_case(torch.float32, device=target.device))
    total = torch.zeros((), device=target.device)
    bounds = case.cu_seqlens.tolist()
    for start, end, sign in zip(bounds, bounds[1:], case.signs.tolist(), strict=False):
        targets = case.targets[start:end]
        if (targets != -100).any():
            logits = case.hidden[start:end] @ case.weight.T
            mean_nll = F.cross_entropy(logits, targets, ignore_index=-100)
            total = total + (mean_nll if sign > 0 else -ALPHA * mean_nll) / case.num_pairs
    expected = gradients(total, case.hidden, case.weight)
    out, got = run(redi_loss, case, backend=target.backend)
    torch.testing.assert_close(out.loss, total)
    assert relative_error(got.dhidden, expected.dhidden) < 2e-5
    assert relative_error(got.dweight, expected.dweight) < 2e-5


def test_alpha_zero_is_sequence_mean_sft_on_the_positives(target: Target) -> None:
    case = replace(make_case(torch.float32, device=target.device), alpha=0.0)
    out, got = run(redi_loss, case, backend=target.backend)
    positives = replace(case, signs=case.signs.clamp(min=0))
    sft, expected = run(reference.redi_loss, positives)
    torch.testing.assert_close(out.loss, sft.loss)
    assert relative_error(got.dhidden, expected.dhidden) < 2e-5
    assert relative_error(got.dweight, expected.dweight) < 2e-5
    # The negatives are measured all the same.
    torch.testing.assert_close(out.sequence_logps, oracle(case)[0].sequence_logps.float())
    negative = case.cu_seqlens[1], case.cu_seqlens[2]
    assert not got.dhidden[negative[0] : negative[1]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_value_and_grad_is_redi_loss_and_its_gradients(
    target: Target, dtype: torch.dtype, given: bool
) -> None:
    case = make_case(dtype, device=target.device)
    out, expected = run(redi_loss, case, backend=target.backend)
    before = torch.randn(case.weight.shape, device=target.device) * 1e-2
    dweight = before.clone() if given else None
    value, dhidden, total = redi_value_and_grad(
        *case.arguments, **case.options, grad_scale=4.0, dweight=dweight, backend=target.backend
    )
    assert torch.equal(value.loss, out.loss)
    assert torch.equal(value.sequence_logps, out.sequence_logps)
    assert dhidden.dtype == dtype
    assert total.dtype == torch.float32
    assert (total is dweight) == given
    added = total - before if given else total
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    assert relative_error(dhidden / 4, expected.dhidden) < tolerance
    assert relative_error(added / 4, expected.dweight) < tolerance
    # float32 all the way: nearer to the oracle than the rounded gradient is.
    exact = oracle(case)[1].dweight
    rounded = relative_error(expected.dweight, exact)
    assert relative_error(added / 4, exact) < (2e-5 if dtype == torch.float32 else rounded)


@pytest.mark.parametrize("kind", ["random", "confident", "logp -80"])
@pytest.mark.parametrize("coefficient", ["weight", "dft", "unlikelihood"])
def test_signed_cross_entropy_is_exact_for_every_coefficient(
    target: Target, coefficient: str, kind: str
) -> None:
    case = leaves(make_case(torch.float32, logits=kind, device=target.device))
    torch.manual_seed(1)
    weights = torch.randn(case.targets.shape, device=target.device)
    arguments = case.hidden, case.weight, case.targets, weights
    loss, logps = signed_cross_entropy(*arguments, coefficient=coefficient, backend=target.backend)
    got = gradients(loss, case.hidden, case.weight)
    exact_case = leaves(case.to(torch.float64))
    exact_loss, exact_logps = reference.signed_cross_entropy(
        exact_case.hidden, exact_case.weight, case.targets, weights, coefficient=coefficient
    )
    exact = gradients(exact_loss, exact_case.hidden, exact_case.weight)
    torch.testing.assert_close(loss, exact_loss.float(), rtol=2e-5, atol=1e-5)
    # float64 itself subtracts numbers of up to 64 here, and errs by 2^-53 of them.
    torch.testing.assert_close(logps, exact_logps.float(), rtol=2e-5, atol=2.0**-47)
    # Where p is tiny or nearly 1 the logits' own rounding (1e-7 |z|) is all the error there is.
    limit = 2e-5 * max(1.0, logits_size(case) / 20)
    assert relative_error(got.dhidden, exact.dhidden) < limit
    assert relative_error(got.dweight, exact.dweight) < limit


@pytest.mark.parametrize("logits", LOGITS)
def test_entropies_are_exact_and_of_the_same_pass(target: Target, logits: str) -> None:
    case = make_case(torch.float32, logits=logits, device=target.device)
    arguments = case.hidden, case.weight, case.targets, case.token_weights
    loss, logps, entropies = signed_cross_entropy(*arguments, entropy=True, backend=target.backend)
    exact = reference.signed_cross_entropy(
        *(t.double() if t.is_floating_point() else t for t in arguments), entropy=True
    )[2]
    # Where the target is nearly certain the entropy is relatively exact, however small; where
    # another token is, 1 + the rest is rounded in float32.
    atol = 2.0**-47 if logits == "confident" else 2.0**-22
    size = max(1.0, logits_size(case) / 20)
    torch.testing.assert_close(entropies, exact.float(), rtol=2e-5 * size, atol=atol)
    assert (entropies >= 0).all()
    assert not entropies[case.targets == -100].any()
    without = signed_cross_entropy(*arguments, backend=target.backend)
    assert torch.equal(loss, without[0])
    assert torch.equal(logps, without[1])


def test_unlikelihood_of_a_certain_token_is_finite_and_pushes_it_down(target: Target) -> None:
    weight = torch.eye(4, device=target.device)
    hidden = torch.tensor([[300.0, 0, 0, 0]], device=target.device, requires_grad=True)
    loss, logps = signed_cross_entropy(
        hidden,
        weight,
        torch.tensor([0], device=target.device),
        torch.tensor([-0.5], device=target.device),
        coefficient="unlikelihood",
        backend=target.backend,
    )
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert logps.item() == 0.0
    assert 30 < loss.item() < 40  # 0.5 * 100 ln 2
    torch.testing.assert_close(dhidden[0, 0].item(), 0.5)
    assert dhidden.isfinite().all()


def test_a_positive_weight_means_likelihood_under_unlikelihood_too(target: Target) -> None:
    case = make_case(device=target.device)
    weights = torch.rand(case.targets.shape, device=target.device)
    losses = [
        signed_cross_entropy(
            case.hidden,
            case.weight,
            case.targets,
            weights,
            coefficient=coefficient,
            backend=target.backend,
        )[0]
        for coefficient in ("weight", "unlikelihood")
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "confident", "logp -500"])
def test_logprobs_are_exact_for_any_upstream_gradient(
    target: Target, kind: str, dtype: torch.dtype, keep: bool
) -> None:
    """With REDI's own weights from above, so that the rule and the mutants apply."""
    case = leaves(make_case(dtype, logits=kind, device=target.device))
    logps = linear_logprobs(
        case.hidden, case.weight, case.targets, keep=keep, backend=target.backend
    )
    exact = reference.linear_logprobs(case.hidden.double(), case.weight.double(), case.targets)
    assert (logps - exact).abs().max() <= 2e-4 * max(1.0, logits_size(case) / 50)
    assert (logps <= 0).all()
    scale = 2.0 ** loss_scale_exponent(case)
    loss = -(case.token_weights * logps).sum() * scale
    got = gradients(loss, case.hidden, case.weight)
    assert_exact(Gradients(*(g.double() / scale for g in got)), case, oracle(case)[1])


@pytest.mark.parametrize("keep", [True, False])
def test_logprobs_serve_an_objective_of_sequence_margins(target: Target, keep: bool) -> None:
    """DPO's form: weights that depend on the log-probs themselves."""

    def margin_loss(module: object, case: Case, **options: object) -> torch.Tensor:
        logps = module.linear_logprobs(case.hidden, case.weight, case.targets, **options)
        sums = module.segment_sum(logps, case.cu_seqlens)
        return -F.logsigmoid(0.1 * (sums[::2] - sums[1::2])).sum()

    import redi.kernels

    case = leaves(make_case(torch.float32, device=target.device))
    exact_case = leaves(case.to(torch.float64))
    loss = margin_loss(redi.kernels, case, keep=keep, backend=target.backend)
    exact_loss = margin_loss(reference, exact_case)
    torch.testing.assert_close(loss, exact_loss.float())
    got = gradients(loss, case.hidden, case.weight)
    exact = gradients(exact_loss, exact_case.hidden, exact_case.weight)
    assert relative_error(got.dhidden, exact.dhidden) < 2e-5
    assert relative_error(got.dweight, exact.dweight) < 2e-5


def test_float16_gradients_survive_the_smallest_weights(target: Target) -> None:
    """32 pairs of 19,000 tokens: a weight of 1.6e-6 and p below 1e-3 are nothing in float16."""
    case = replace(make_case(torch.float16, device=target.device), num_pairs=32.0 * 19_000)
    exact = oracle(case)[1]
    _, _, dweight = redi_value_and_grad(*case.arguments, **case.options, backend=target.backend)
    assert relative_error(dweight, exact.dweight) < 1e-3
    # With a loss scale from above the float16 gradients themselves are as exact.
    assert not violations(run(redi_loss, case, backend=target.backend)[1], case, exact)


def test_a_row_without_tokens_or_without_targets_is_zero(target: Target) -> None:
    for lengths in ((), (0, 0), (3, 2)):
        case = make_case(
            hidden=9, lengths=lengths, signs=[1, -1][: len(lengths)], device=target.device
        )
        case = replace(case, targets=torch.full_like(case.targets, -100))
        out, got = run(redi_loss, case, backend=target.backend)
        assert out.loss.item() == 0.0
        assert out.sequence_logps.tolist() == [0.0] * len(lengths)
        assert out.sequence_lengths.tolist() == [0] * len(lengths)
        assert not got.dhidden.any()
        assert not got.dweight.any()
        kept = linear_logprobs(*case.arguments[:3], keep=True, backend=target.backend)
        assert kept.tolist() == [0.0] * sum(lengths)
        assert segment_sum(kept, case.cu_seqlens).tolist() == [0.0] * len(lengths)
        before = torch.ones_like(case.weight)
        redi_value_and_grad(*case.arguments, **case.options, dweight=before, backend=target.backend)
        assert (before == 1).all()


def test_masked_rows_of_hidden_are_never_read(target: Target) -> None:
    case = make_case(device=target.device)
    out, got = run(redi_loss, case, backend=target.backend)
    masked = case.targets == -100
    dirty = replace(case, hidden=case.hidden.masked_fill(masked[:, None], torch.nan))
    dirty_out, dirty_got = run(redi_loss, dirty, backend=target.backend)
    assert torch.equal(out.loss, dirty_out.loss)
    assert torch.equal(got.dhidden, dirty_got.dhidden)
    assert torch.equal(got.dweight, dirty_got.dweight)
    assert not got.dhidden[masked].any()


def test_a_non_finite_hidden_state_reaches_the_loss(target: Target) -> None:
    """Guards look at the loss: the op must not clean up what is broken."""
    case = make_case(device=target.device)
    case.hidden[case.valid_index[0]] = torch.nan
    assert redi_loss(*case.arguments, **case.options, backend=target.backend).loss.isnan()


@pytest.mark.parametrize("wrong", [-1, 300, 10**6, 2**32 + 1])
def test_a_target_out_of_range_that_nobody_checked_is_nan(
    target: Target, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU does not read the targets to check them: the guard sees NaN, and memory is safe."""
    monkeypatch.setattr(loss_ops, "check_target_values", lambda *_: None)
    case = make_case(torch.bfloat16, vocab=300, masked=0.0, device=target.device)
    targets = case.targets.clone()
    at = int(case.valid_index[3])
    targets[at] = wrong
    arguments = case.hidden.detach(), case.weight.detach(), targets, case.token_weights
    if target.backend == "torch":  # PyTorch checks indices
        with pytest.raises((IndexError, RuntimeError)):
            signed_cross_entropy(*arguments, backend="torch")
        return
    loss, logps = signed_cross_entropy(*arguments, backend=target.backend)
    exact = reference.linear_logprobs(case.hidden.double(), case.weight.double(), case.targets)
    assert loss.isnan()
    assert logps[at].isnan()
    others = torch.arange(len(targets), device=target.device) != at
    assert (logps - exact)[others].abs().max() <= 2e-4


def test_an_impossible_token_of_weight_zero_leaves_the_loss_finite(target: Target) -> None:
    weight = torch.tensor([[1.0], [-torch.inf], [2.0]], device=target.device)
    hidden = torch.ones(2, 1, device=target.device)
    targets = torch.tensor([0, 1], device=target.device)  # the second one's logit is -inf
    out = redi_loss(
        hidden,
        weight,
        targets,
        torch.tensor([0, 1, 2], device=target.device),
        torch.tensor([1, 0], device=target.device),
        alpha=ALPHA,
        num_pairs=1,
        backend=target.backend,
    )
    assert out.sequence_logps[1] == -torch.inf
    assert out.loss.isfinite()
    loss, _ = signed_cross_entropy(
        hidden, weight, targets, targets.float() - 1, backend=target.backend
    )
    assert loss.isfinite()


def test_float64_is_exact_on_the_cpu() -> None:
    case = make_case(torch.float64)
    out, got = run(redi_loss, case)
    exact_out, exact = oracle(case)
    assert out.loss.dtype == out.sequence_logps.dtype == torch.float64
    torch.testing.assert_close(out.loss, exact_out.loss, rtol=1e-13, atol=1e-14)
    assert violations(got, case, exact) == []


def test_the_rule_notices_a_single_bad_row() -> None:
    case = make_case(torch.bfloat16, lengths=(300, 300), signs=(1, -1))
    _, got = run(redi_loss, case)
    exact = oracle(case)[1]
    dhidden = got.dhidden.clone()
    dhidden[case.valid_index[5]] *= 1.05
    assert violations(Gradients(dhidden, got.dweight), case, exact)
