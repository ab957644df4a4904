"""What a loss may have besides - sum w logp: transformed logits, further terms, further results.

Each against the float64 reference, and against formulas written with torch's own functions.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    reference,
    signed_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TRANSFORMS: dict[str, dict[str, Any]] = {
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 5.0},  # most logits far beyond it
    "both": {"logit_scale": 1.7, "softcap": 30.0},
}
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def small_case(dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    return make_case(
        dtype, **({"vocab": 67, "hidden": 24, "lengths": (7, 4)} | options), signs=(1, -1)
    )


def token_weights(case: Case, seed: int) -> Tensor:
    """[T] from -1 to 1, two of them 0."""
    torch.manual_seed(seed)
    weights = torch.rand(case.targets.shape) * 2 - 1
    weights[[0, -1]] = 0.0
    return weights.to(case.targets.device)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [pytest.param("scale", marks=pytest.mark.slow), "softcap", "both"])
def test_redi_loss_of_transformed_logits_is_exact(
    target: Target, name: str, dtype: torch.dtype
) -> None:
    options = TRANSFORMS[name]
    for kind in ("random", "confident", "beyond 80"):
        case = small_case(dtype, logits=kind, device=target.device)
        exact_out, exact = run(reference.redi_loss, case.to(torch.float64), **options)
        value, dhidden, dweight = redi_value_and_grad(
            *case.arguments, **case.options, backend=target.backend, **options
        )
        torch.testing.assert_close(value.loss, exact_out.loss.float(), rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(
            value.sequence_logps, exact_out.sequence_logps.float(), rtol=2e-5, atol=1e-4
        )
        limit = LIMITS[dtype] * (2 if kind == "beyond 80" else 1)  # the logits' own rounding
        assert relative_error(dweight, exact.dweight) < limit
        plain = run(reference.redi_loss, case.to(torch.float64))[1]
        for wrong, true in zip(plain, exact, strict=True):
            assert relative_error(wrong, true) > 10 * limit
        if dtype == torch.float16:  # without a loss scale these gradients underflow
            continue
        assert relative_error(dhidden, exact.dhidden) < limit
        out, got = run(redi_loss, case, backend=target.backend, **options)
        assert torch.equal(out.loss, value.loss)
        assert relative_error(got.dhidden, exact.dhidden) < limit
        assert relative_error(got.dweight, exact.dweight) < limit


@pytest.mark.parametrize("kind", ["flat", "random", "beyond 80"])
def test_a_softcap_is_exact_to_a_few_units_of_the_last_place(target: Target, kind: str) -> None:
    """The log-sum-exp shows each logit: at 2^-24 of the cap, and of the logit before it."""
    case = small_case(logits=kind, masked=0.0, device=target.device)
    arguments = case.hidden, case.weight, case.targets
    options = {"softcap": 30.0, "log_sum_exp": True}
    _, lses = linear_logprobs(*arguments, backend=target.backend, **options)
    _, exact = reference.linear_logprobs(
        *(t.double() for t in arguments[:2]), arguments[2], **options
    )
    assert (lses - exact).abs().max() <= 8 * 30 * 2.0**-24


TERMS: dict[str, dict[str, Any]] = {
    "smoothing": {"label_smoothing": 0.1},
    "smoothing alone": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.02},
    "z-loss, dft": {"z_loss": 0.02, "coefficient": "dft"},
    "entropy, unlikelihood": {"entropy": True, "coefficient": "unlikelihood"},
    "all": {
        "label_smoothing": 0.2, "z_loss": 0.3, "entropy": True, "logit_scale": 1.3, "softcap": 9.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["random", "confident"])
@pytest.mark.parametrize("name", TERMS)
def test_terms_of_a_loss_are_exact(target: Target, name: str, kind: str) -> None:
    options = dict(TERMS[name])
    case = leaves(small_case(logits=kind, device=target.device))
    if options.get("entropy"):
        options["entropy_weights"] = token_weights(case, 2)
    options["log_sum_exp"] = True
    weights = token_weights(case, 1)
    loss, *results = signed_cross_entropy(
        case.hidden, case.weight, case.targets, weights, backend=target.backend, **options
    )
    got = gradients(loss, case.hidden, case.weight)
    exact_case = leaves(case.to(torch.float64))
    exact_loss, *exact_results = reference.signed_cross_entropy(
        exact_case.hidden, exact_case.weight, case.targets, weights, **options
    )
    exact = gradients(exact_loss, exact_case.hidden, exact_case.weight)
    torch.testing.assert_close(loss, exact_loss.float(), rtol=2e-5, atol=1e-5)
    assert len(results) == 2 + bool(options.get("entropy"))
    for values, true in zip(results, exact_results, strict=True):
        assert not values.requires_grad
        assert not values[case.targets == -100].any()
        torch.testing.assert_close(values, true.float(), rtol=2e-5, atol=2.0**-20)
    assert relative_error(got.dhidden, exact.dhidden) < 3e-5
    assert relative_error(got.dweight, exact.dweight) < 3e-5
    # The terms show: without them the gradient is another.
    plain_loss, _ = reference.signed_cross_entropy(
        exact_case.hidden, exact_case.weight, case.targets, weights,
        coefficient=options.get("coefficient", "weight"),
    )  # fmt: skip
    plain = gradients(plain_loss, exact_case.hidden, exact_case.weight)
    assert relative_error(plain.dhidden, exact.dhidden) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_hold_the_gradients_of_all_terms(target: Target, dtype: torch.dtype) -> None:
    """float16: also where the entropies' weights are 2^14 times the others, or these are 0."""
    case = leaves(small_case(dtype, device=target.device))
    weights = 1e-6 * token_weights(case, 1)
    for factor in (1.0, 2.0**14):
        options = {
            "z_loss": 0.5,
            "label_smoothing": 0.1,
            "entropy_weights": factor * 1e-6 * token_weights(case, 2).roll(3),
            "logit_scale": 4.0,
            "softcap": 10.0,
        }
        loss, _ = signed_cross_entropy(
            case.hidden, case.weight, case.targets, weights, backend=target.backend, **options
        )
        got = gradients(loss * 2.0**14, case.hidden, case.weight)
        exact_case = leaves(case.to(torch.float64))
        exact_loss, _ = reference.signed_cross_entropy(
            exact_case.hidden, exact_case.weight, case.targets, weights, **options
        )
        exact = gradients(exact_loss * 2.0**14, exact_case.hidden, exact_case.weight)
        assert relative_error(got.dhidden, exact.dhidden) < LIMITS[dtype]
        assert relative_error(got.dweight, exact.dweight) < LIMITS[dtype]


def test_a_z_loss_of_large_logits_does_not_overflow_a_float16_gradient(target: Target) -> None:
    """At a log-sum-exp of 500 it is 500 times the gradient of the token's log-prob."""
    logits = torch.tensor([[500.0, 3, 1, 0, -2, 4, 2, 1]], device=target.device)
    eye = torch.eye(8, device=target.device)
    targets = torch.tensor([1], device=target.device)
    weights = torch.tensor([1e-3], device=target.device)

    def found(dtype: torch.dtype, loss: Any, **options: Any) -> Gradients:
        hidden, lm_head = logits.to(dtype).requires_grad_(), eye.to(dtype).requires_grad_()
        value, _ = loss(hidden, lm_head, targets, weights, z_loss=0.5, **options)
        return gradients(value, hidden, lm_head)

    got = found(torch.float16, signed_cross_entropy, backend=target.backend)
    exact = found(torch.float64, reference.signed_cross_entropy)
    assert relative_error(got.dhidden, exact.dhidden) < LIMITS[torch.float16]
    assert relative_error(got.dweight, exact.dweight) < LIMITS[torch.float16]


def test_terms_are_those_of_torch_s_own_functions(target: Target) -> None:
    """Label smoothing by cross_entropy, z-loss by logsumexp, entropy by Categorical."""
    case = leaves(small_case(device=target.device))
    weights = token_weights(case, 1)
    bonus = token_weights(case, 2)
    valid = case.targets != -100
    logits = case.hidden[valid] @ case.weight.T
    smooth = F.cross_entropy(logits, case.targets[valid], label_smoothing=0.1, reduction="none")
    squares = 0.01 * weights[valid].abs() * logits.logsumexp(-1) ** 2
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    expected = (weights[valid] * smooth + squares - bonus[valid] * entropies).sum()
    loss, _ = signed_cross_entropy(
        case.hidden, case.weight, case.targets, weights, label_smoothing=0.1, z_loss=0.01,
        entropy_weights=bonus, backend=target.backend,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    true = gradients(expected, case.hidden, case.weight)
    got = gradients(loss, case.hidden, case.weight)
    assert relative_error(got.dhidden, true.dhidden) < 2e-5
    assert relative_error(got.dweight, true.dweight) < 2e-5


def test_an_entropy_bonus_reaches_tokens_of_weight_zero(target: Target) -> None:
    """Alone it is maximised where the logits are equal; tokens without either get nothing."""
    case = leaves(small_case(masked=0.0, device=target.device))
    bonus = torch.zeros(case.targets.shape, device=target.device)
    bonus[3] = 2.0
    loss, _, entropies = signed_cross_entropy(
        case.hidden, case.weight, case.targets, torch.zeros_like(bonus), entropy_weights=bonus,
        entropy=True, backend=target.backend,
    )  # fmt: skip
    torch.testing.assert_close(loss, -2.0 * entropies[3])
    (dhidden,) = torch.autograd.grad(loss, case.hidden)
    assert dhidden[3].any()
    assert not dhidden[torch.arange(len(bonus)) != 3].any()


def test_an_entropy_s_gradient_is_exact_where_another_token_is_nearly_certain(
    target: Target,
) -> None:
    """It comes from the improbable ones, some below the share that else counts as nothing."""
    logits = torch.tensor([[0.0, -18, -19, -20, -19, -18.5, -18, -19]], device=target.device)
    hidden = logits.bfloat16().requires_grad_()
    lm_head = torch.eye(8, dtype=torch.bfloat16, device=target.device)
    targets, zero = torch.tensor([1], device=target.device), torch.zeros(1, device=target.device)
    exact_hidden = logits.double().requires_grad_()
    _, exact = reference.linear_logprobs(exact_hidden, lm_head.double(), targets, entropy=True)
    (true,) = torch.autograd.grad(exact, exact_hidden)
    loss, _ = signed_cross_entropy(
        hidden, lm_head, targets, zero, entropy_weights=zero - 1, backend=target.backend
    )
    _, entropies = linear_logprobs(hidden, lm_head, targets, entropy=True, backend=target.backend)
    for made in (loss, entropies):
        (dhidden,) = torch.autograd.grad(made, hidden)
        assert relative_error(dhidden, true) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize(("entropy", "log_sum_exp"), [(True, True), (True, False), (False, True)])
def test_entropies_and_log_sum_exps_are_differentiable_for_any_upstream_gradient(
    target: Target, entropy: bool, log_sum_exp: bool
) -> None:
    case = leaves(small_case(device=target.device))
    exact_case = leaves(case.to(torch.float64))
    options = {"entropy": entropy, "log_sum_exp": log_sum_exp, **TRANSFORMS["both"]}

    def objective(results: tuple[Tensor, ...]) -> Tensor:
        weights = [token_weights(case, seed).to(results[0].dtype) for seed in range(len(results))]
        return sum((w * values.square()).sum() for w, values in zip(weights, results, strict=True))

    results = linear_logprobs(
        case.hidden, case.weight, case.targets, backend=target.backend, **options
    )
    exact_results = reference.linear_logprobs(
        exact_case.hidden, exact_case.weight, case.targets, **options
    )
    assert len(results) == 1 + entropy + log_sum_exp
    for values, true in zip(results, exact_results, strict=True):
        torch.testing.assert_close(values, true.float(), rtol=2e-5, atol=2.0**-20)
    got = gradients(objective(results), case.hidden, case.weight, retain_graph=True)
    exact = gradients(
        objective(exact_results), exact_case.hidden, exact_case.weight, retain_graph=True
    )
    assert relative_error(got.dhidden, exact.dhidden) < 2e-5
    assert relative_error(got.dweight, exact.dweight) < 2e-5
    # Only the last one has an upstream gradient: the others' are absent, not 0.
    got = gradients(results[-1].sum(), case.hidden, case.weight)
    exact = gradients(exact_results[-1].sum(), exact_case.hidden, exact_case.weight)
    assert relative_error(got.dhidden, exact.dhidden) < 2e-5
    assert relative_error(got.dweight, exact.dweight) < 2e-5


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logprobs_of_transformed_logits_are_exact(
    target: Target, dtype: torch.dtype, keep: bool
) -> None:
    for name, options in [*TRANSFORMS.items()][1:]:  # with a softcap
        case = leaves(small_case(dtype, device=target.device))
        weights = token_weights(case, 1)
        logps = linear_logprobs(*case.arguments[:3], keep=keep, backend=target.backend, **options)
        exact_case = leaves(case.to(torch.float64))
        exact_logps = reference.linear_logprobs(*exact_case.arguments[:3], **options)
        torch.testing.assert_close(logps, exact_logps.float(), rtol=2e-5, atol=2.0**-18)
        got = gradients((logps * weights).sum(), case.hidden, case.weight)
        exact = gradients((exact_logps * weights).sum(), exact_case.hidden, exact_case.weight)
        assert relative_error(got.dhidden, exact.dhidden) < LIMITS[dtype], name
        assert relative_error(got.dweight, exact.dweight) < LIMITS[dtype], name


def test_gradients_of_all_terms_are_finite_differences() -> None:
    case = leaves(make_case(torch.float64, vocab=7, hidden=3, lengths=(4, 1), signs=(1, -1)))
    weights, bonus = token_weights(case, 1).double(), token_weights(case, 2).double().roll(1)
    transform = {"logit_scale": 0.7, "softcap": 2.0}

    def signed(hidden: Tensor, weight: Tensor) -> Tensor:
        return signed_cross_entropy(
            hidden, weight, case.targets, weights, label_smoothing=0.1, z_loss=0.2,
            entropy_weights=bonus, chunk_tokens=2, **transform,
        )[0]  # fmt: skip

    def statistics(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return linear_logprobs(
            hidden, weight, case.targets, entropy=True, log_sum_exp=True, **transform
        )

    for function in (signed, statistics):
        assert torch.autograd.gradcheck(function, (case.hidden, case.weight))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-3, 300.0),
    vocab=st.integers(1, 40),
    softcap=st.one_of(st.none(), st.floats(0.5, 100.0)),
    logit_scale=st.floats(1e-2, 10.0),
    coefficient=st.sampled_from(["weight", "dft", "unlikelihood"]),
)
def test_nothing_is_nan_and_no_log_prob_above_zero_whatever_the_options(
    seed: int,
    scale: float,
    vocab: int,
    softcap: float | None,
    logit_scale: float,
    coefficient: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(9, 3, generator=generator)).requires_grad_()
    weight = torch.randint(-2, 3, (vocab, 3), generator=generator).float().requires_grad_()
    targets = torch.randint(vocab, (9,), generator=generator)
    signs = torch.randint(-1, 2, (9,), generator=generator).float()
    loss, logps, entropies, lses = signed_cross_entropy(
        hidden, weight, targets, signs, coefficient=coefficient, z_loss=0.1,
        label_smoothing=0.1 if coefficient == "weight" else 0.0, entropy_weights=signs.roll(1),
        entropy=True, log_sum_exp=True, logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip
    assert (logps <= 0).all()
    assert (entropies >= -1e-6).all()
    if softcap is not None:
        assert (lses <= softcap * (1 + 1e-6) + torch.tensor(float(vocab)).log() + 1e-5).all()
    assert loss.isfinite()
    got = Gradients(*torch.autograd.grad(loss, (hidden, weight)))
    assert got.dhidden.isfinite().all()
    assert got.dweight.isfinite().all()


def test_leading_dimensions_and_an_ignored_index_are_only_another_notation(target: Target) -> None:
    case = leaves(small_case(lengths=(2, 2), masked=0.0, device=target.device))
    case.targets[1] = -100
    weights = token_weights(case, 1)
    options = {"backend": target.backend}

    def batch(values: Tensor) -> Tensor:
        return values.unflatten(0, (2, 1, 2))

    operands = (
        batch(case.hidden),
        case.weight,
        batch(case.targets.masked_fill(case.targets == -100, -7)),
    )
    assert (operands[2] == -7).any()
    wide = {**options, "ignore_index": -7}
    pairs = [
        (
            signed_cross_entropy(*operands, batch(weights), entropy=True, **wide),
            signed_cross_entropy(*case.arguments[:3], weights, entropy=True, **options),
        ),
        (
            linear_logprobs(*operands, entropy=True, **wide),
            linear_logprobs(*case.arguments[:3], entropy=True, **options),
        ),
        ((linear_logprobs(*operands, **wide),), (linear_logprobs(*case.arguments[:3], **options),)),
        (
            redi_loss(*operands, *case.arguments[3:], **case.options, **wide),
            redi_loss(*case.arguments, **case.options, **options),
        ),
    ]
    for got, expected in pairs:
        for value, true in zip(got, expected, strict=True):
            tokens = true.shape == case.targets.shape
            assert value.shape == (batch(true).shape if tokens else true.shape)
            assert torch.equal(value.flatten(), true.flatten())
            if true.requires_grad:
                gradient, exact = (
                    gradients(v.sum(), case.hidden, case.weight, retain_graph=True)
                    for v in (value, true)
                )
                assert torch.equal(gradient.dhidden, exact.dhidden)
                assert torch.equal(gradient.dweight, exact.dweight)
    values = [
        redi_value_and_grad(*operands, *case.arguments[3:], **case.options, **wide),
        redi_value_and_grad(*case.arguments, **case.options, **options),
    ]
    assert values[0][1].shape == operands[0].shape
    assert torch.equal(values[0][1].flatten(0, -2), values[1][1])
    assert torch.equal(values[0][2], values[1][2])
    reference_logps = reference.linear_logprobs(*operands, ignore_index=-7)
    torch.testing.assert_close(pairs[2][0][0], reference_logps)


def test_a_dtensor_is_refused_with_what_to_pass_instead() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    case = small_case()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(case.weight, mesh, [Shard(0)])
        with pytest.raises(
            TypeError, match=r"weight .* got a DTensor: pass weight.full_tensor\(\)"
        ):
            linear_logprobs(case.hidden, weight, case.targets)
        whole = linear_logprobs(case.hidden, weight.full_tensor(), case.targets)
        assert torch.equal(whole, linear_logprobs(*case.arguments[:3]))
    finally:
        dist.destroy_process_group()


WRONG = [
    ({"logit_scale": 0.0}, "logit_scale must be finite and > 0, got 0.0"),
    ({"softcap": -1.0}, "softcap must be finite and > 0 or None, got -1.0"),
    ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
    (
        {"label_smoothing": 0.1, "coefficient": "dft"},
        'label_smoothing has no meaning for coefficient="dft"',
    ),
    ({"label_smoothing": "0.1"}, "label_smoothing must be a number, got '0.1'"),
    ({"z_loss": None}, "z_loss must be a number, got None"),
    ({"entropy": "yes"}, "entropy must be one of True, False, got 'yes'"),
    ({"z_loss": -0.1}, "z_loss must be finite and >= 0, got -0.1"),
    ({"entropy_weights": torch.ones(3)}, r"entropy_weights .* shape \(11,\), got \(3,\)"),
    (
        {"entropy_weights": torch.ones(11, requires_grad=True)},
        "entropy_weights gets no gradient",
    ),
    (
        {"entropy_weights": torch.full((11,), torch.nan)},
        "entropy_weights must be finite, got nan at position",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    case = small_case()
    with pytest.raises((TypeError, ValueError), match=message):
        signed_cross_entropy(*case.arguments[:3], torch.ones(11), **options)


def test_entropy_weights_count_as_weights_of_a_schedule() -> None:
    case = replace(small_case(), targets=torch.zeros(11, dtype=torch.int64))
    weights, bonus = torch.zeros(11), torch.zeros(11)
    weights[0] = bonus[5] = 1.0
    with pytest.raises(ValueError, match="num_with_grad = 1, 1 have a weight in entropy_weights"):
        signed_cross_entropy(
            *case.arguments[:3], weights, entropy_weights=bonus,
            valid_index=torch.arange(11), num_with_grad=1,
        )  # fmt: skip


def test_keeping_and_entropies_exclude_each_other() -> None:
    with pytest.raises(
        ValueError, match=r"keep=True .* use keep=False with entropy or log_sum_exp"
    ):
        linear_logprobs(*small_case().arguments[:3], keep=True, entropy=True)
