"""The backend that takes the exponentials inside the logits product: what naive ones get wrong.

Each test runs with the Triton kernels and with the same in plain PyTorch. The other tests of the
loss ops run for this backend too, among the slow ones.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

import exp_gemm_plain
import numpy as np
import torch
import torch.nn.functional as F
from kernel_cases import (
    EXP_TARGETS,
    LOGITS,
    Case,
    Gradients,
    Target,
    assert_exact,
    gradients,
    leaves,
    make_case,
    oracle,
    relative_error,
    run,
    violations,
)
from torch import Tensor

from redi.kernels import (
    backends,
    linear_logprobs,
    loss_ops,
    redi_loss,
    reference,
    signed_cross_entropy,
)
from redi.kernels.experimental import exp_gemm_triton
from redi.kernels.experimental.launches import launch_for

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not EXP_TARGETS, reason="Triton has neither a card nor its interpreter"),
]

BF16 = torch.bfloat16


def some_slow(quick: Sequence[object], slow: Sequence[object]) -> list[object]:
    """Values of a parameter: the interpreter takes half a second for each."""
    return [*quick, *(pytest.param(value, marks=pytest.mark.slow) for value in slow)]


CANCELLING = {"hidden": 128, "lengths": (20, 20), "signs": (1, -1)}
SHARP = ("random", "confident", "logp -80")
OTHERS = [kind for kind in LOGITS if kind not in SHARP]


@pytest.fixture(params=["triton", "plain"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Hides the fixture of all backends."""
    if request.param == "plain":
        monkeypatch.setattr(exp_gemm_triton, "exp_gemm", exp_gemm_plain.exp_gemm)
    return EXP_TARGETS[0]


def of_tokens(case: Case, backend: str, **options: object) -> tuple[Tensor, Gradients]:
    """Log-probs [T] and gradients, with REDI's own weights."""
    case = leaves(case)
    arguments = case.hidden, case.weight, case.targets, case.token_weights
    loss, logps = signed_cross_entropy(*arguments, backend=backend, **options)
    return logps, gradients(loss, case.hidden, case.weight)


def exact_logps(case: Case) -> Tensor:
    return reference.linear_logprobs(case.hidden.double(), case.weight.double(), case.targets)


def moved(case: Case, device: str) -> Case:
    """The case on another device."""
    return replace(
        case,
        hidden=case.hidden.to(device),
        weight=case.weight.to(device),
        targets=case.targets.to(device),
        cu_seqlens=case.cu_seqlens.to(device),
        signs=case.signs.to(device),
    )


@pytest.mark.parametrize("logits", some_slow(SHARP, OTHERS))
def test_log_probs_and_gradients_are_exact_for_every_kind_of_logits(
    target: Target, logits: str
) -> None:
    case = make_case(BF16, logits=logits, device=target.device)
    logps, got = of_tokens(case, target.backend)
    assert_exact(got, case, oracle(case)[1])
    exact = exact_logps(case)
    size = float((case.hidden.double() @ case.weight.double().T).abs().max())
    assert (logps - exact).abs().max() <= 2e-4 * max(1.0, size / 50)
    assert (logps <= 0).all()
    if logits == "confident":  # 1 - p near 1e-8: the roundings of E, and none of e_y
        valid = case.valid_index
        torch.testing.assert_close(logps[valid].double(), exact[valid], rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("scale", some_slow([2.5], [0.4]))
def test_a_logit_scale_is_exact_and_needs_no_pass_over_logits(target: Target, scale: float) -> None:
    """Also in rows whose sums are out of bounds, and in what log-probs keep."""
    for logits in ("random", "logp -80"):
        case = make_case(BF16, lengths=(3, 2), signs=(1, -1), logits=logits, device=target.device)
        out, got = run(redi_loss, case, backend=target.backend, logit_scale=scale)
        exact_out, exact = run(reference.redi_loss, case.to(torch.float64), logit_scale=scale)
        size = scale * float((case.hidden.double() @ case.weight.double().T).abs().max())
        errors = (out.sequence_logps - exact_out.sequence_logps) / out.sequence_lengths
        assert errors.abs().max() <= 2e-4 * max(1.0, size / 50)
        moved = leaves(case)
        logps = linear_logprobs(
            *moved.arguments[:3], keep=True, logit_scale=scale, backend=target.backend
        )
        loss = -(case.token_weights * logps).sum()
        kept = gradients(loss, moved.hidden, moved.weight)
        for made in (got, kept):
            assert relative_error(made.dhidden, exact.dhidden) < 4e-3
            assert relative_error(made.dweight, exact.dweight) < 4e-3
        by_logits = run(redi_loss, case, backend="triton", logit_scale=scale)[1]
        assert not torch.equal(got.dweight, by_logits.dweight)


@pytest.mark.parametrize("vocab", some_slow([129, 256], [1, 5, 128, 300, 512]))
@pytest.mark.parametrize("column", some_slow(["last"], ["first"]))
def test_the_target_may_lie_in_any_tile_and_tiles_need_not_divide_the_vocabulary(
    target: Target, vocab: int, column: str
) -> None:
    case = make_case(BF16, vocab=vocab, hidden=40, lengths=(6, 5), signs=(1, -1), masked=0.0)
    place = 0 if column == "first" else vocab - 1
    case = replace(case, targets=torch.full_like(case.targets, place))
    case = moved(case, target.device)
    logps, got = of_tokens(case, target.backend)
    assert (logps - exact_logps(case)).abs().max() <= 2e-4
    if vocab == 1:
        assert not got.dhidden.any()
        assert not got.dweight.any()
    else:
        assert not violations(got, case, oracle(case)[1])


def test_a_competitor_in_the_target_s_tile_does_not_blur_the_log_prob(target: Target) -> None:
    """Its exponential is stored in bfloat16; 2^-9 of it is ten times what a log-prob may err."""
    case = make_case(
        BF16,
        vocab=100,
        lengths=(40,),
        signs=(1,),
        logits="peaked",
        masked=0.0,
        device=target.device,
    )
    logps, _ = of_tokens(case, target.backend)
    assert (logps - exact_logps(case)).abs().max() <= 2e-5


@pytest.mark.parametrize("gap", some_slow([62, 66], [40, 60, 64, 70, 80, 90, 130]))
def test_gradients_survive_a_target_far_below_the_other_logits(target: Target, gap: int) -> None:
    """Across the largest sum that needs no repair (e^64), at the weight of a long trace's token."""
    case = make_case(BF16, lengths=(40,), signs=(1,), masked=0.0)
    rows = F.normalize(case.weight.double())
    hidden = (gap / 2) * (rows[(case.targets + 1) % len(rows)] - rows[case.targets])
    case = replace(case, hidden=hidden.to(BF16), num_pairs=32.0 * 20_000)
    case = moved(case, target.device)
    logps, got = of_tokens(case, target.backend)
    exact = exact_logps(case)
    assert (exact.mean() + gap).abs() < 6
    assert (logps - exact).abs().max() <= 2e-4
    assert not violations(got, case, oracle(case)[1])


def test_repairing_a_row_leaves_its_neighbours_bit_for_bit_as_they_are(target: Target) -> None:
    case = make_case(BF16, lengths=(40,), signs=(1,), masked=0.0, device=target.device)
    logps, got = of_tokens(case, target.backend)
    hard = make_case(BF16, lengths=(40,), signs=(1,), masked=0.0, logits="logp -80")
    hidden = case.hidden.clone()
    hidden[3] = hard.hidden[3].to(target.device)
    hard_logps, hard_got = of_tokens(replace(case, hidden=hidden), target.backend)
    assert hard_logps[3] < -64
    others = torch.arange(40, device=target.device) != 3
    assert torch.equal(hard_logps[others], logps[others])
    assert torch.equal(hard_got.dhidden[others], got.dhidden[others])


@pytest.mark.parametrize("logits", some_slow(["logp -80"], ["confident", "logp -500"]))
def test_traces_that_nearly_cancel_are_as_exact_as_from_logits(target: Target, logits: str) -> None:
    """Of one sign each, with hidden states that are alike where their targets are."""
    case = make_case(BF16, **CANCELLING, logits=logits, device=target.device)
    _, got = run(redi_loss, case, backend=target.backend)
    assert not violations(got, case, oracle(case)[1])


def truncated(a: np.ndarray, b: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """sums + a b as by a model of a tensor core: each 16 products are added, then truncated."""
    for start in range(0, a.shape[1], 16):
        part = slice(start, start + 16)
        exact = sums.astype(np.float64) + a[:, part].astype(np.float64) @ b[part]
        nearest = exact.astype(np.float32)
        sums = np.where(
            np.abs(nearest) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest
        )
    return sums


@pytest.fixture
def truncating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter adds up products as a tensor core does; a card does it itself."""
    if not backends.TRITON_INTERPRETS:
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_dot(_: object, a: Any, b: Any, d: Any, *__: object) -> object:
        return interpreter.TensorHandle(truncated(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def with_logits_near(size: float) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [64, D], weight [32, D], targets: D 3584, all logits near `size`, p near 1 / 32."""
    torch.manual_seed(0)
    shared = torch.randn(3584)
    hidden = shared + 0.05 * torch.randn(64, 3584)
    weight = shared * size / 3584 + 0.005 * torch.randn(32, 3584)
    return hidden.to(BF16), weight.to(BF16), torch.arange(64) % 32


def exp_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Computed where the kernels run, returned on the CPU."""
    operands = (one.to(EXP_TARGETS[0].device) for one in (hidden, weight, targets))
    return linear_logprobs(*operands, backend="triton-exp").cpu()


@pytest.mark.usefixtures("truncating")
def test_sums_that_a_tensor_core_truncates_do_not_bias_log_probs() -> None:
    hidden, weight, targets = with_logits_near(38.0)
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets)
    zero = np.zeros((64, 32), np.float32)
    z = torch.from_numpy(truncated(hidden.float().numpy(), weight.float().T.numpy(), zero))
    z_exact = (hidden.double() * weight[targets].double()).sum(1)
    assert (z_exact.mean() - 38).abs() < 4

    z_target = z[torch.arange(64), targets].double()
    assert (z_exact - z_target).mean() > 1.2e-4  # truncation matters
    others = z.double().scatter(1, targets[:, None], -torch.inf)
    mixed = z_exact - torch.logaddexp(z_exact, others.logsumexp(1))
    assert (mixed - exact).mean() > 1.2e-4  # the target's logit from elsewhere: a bias

    got = exp_logprobs(hidden, weight, targets)
    assert (got - exact).mean().abs() < 1e-5
    assert (got - exact).abs().max() < 5e-5


@pytest.mark.usefixtures("truncating")
def test_a_copy_of_the_targets_row_is_exactly_as_likely() -> None:
    hidden, weight, _ = with_logits_near(38.0)
    weight = torch.cat([weight[:1], weight[:1], torch.zeros_like(weight)])
    targets = torch.arange(64) % 2
    got = exp_logprobs(hidden, weight, targets)
    torch.testing.assert_close(got, torch.full_like(got, -math.log(2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "form", [{"stores": 2}, {"programs": 2}, {"l2_share": 0.0}, {"l2_share": 1e3}], ids=str
)
def test_the_form_of_a_launch_changes_no_bit(form: dict[str, Any]) -> None:
    case = make_case(BF16, vocab=300, lengths=(40, 20), signs=(1, -1))
    case = moved(case, EXP_TARGETS[0].device)
    valid = case.valid_index

    def made(**changes: Any) -> list[Tensor]:
        out = torch.full((len(valid), 320), 7.0, dtype=BF16, device=valid.device)[:, :300]
        logps = torch.zeros(case.targets.shape, device=valid.device)
        rows = exp_gemm_triton.exp_gemm(
            case.hidden[valid],
            case.weight,
            valid,
            case.targets,
            case.token_weights.float(),
            coefficient="weight",
            logps=logps,
            out=out,
            launch=replace(launch_for(case.weight), **changes),
        )
        assert rows is not None
        assert rows.factors is not None
        assert rows.residues is not None
        return [logps, rows.matrix, rows.factors, rows.residues]

    for got, expected in zip(made(**form), made(), strict=True):
        assert torch.equal(got, expected)


def test_log_probs_alone_write_the_targets_tiles_only() -> None:
    case = make_case(BF16, vocab=600, lengths=(9,), signs=(1,), masked=0.0)
    case = moved(case, EXP_TARGETS[0].device)
    columns = launch_for(case.weight).columns
    valid = case.valid_index
    targets = torch.where(case.targets < 0, -100, case.targets % columns)  # all in the first tile
    case = replace(case, targets=targets)
    out = torch.full((len(valid), 640), 7.0, dtype=BF16, device=targets.device)[:, :600]
    logps = torch.zeros(targets.shape, device=targets.device)
    hidden = case.hidden[valid]
    exp_gemm_triton.exp_gemm(
        hidden, case.weight, valid, targets, None, coefficient="weight", logps=logps, out=out
    )
    assert (logps - exact_logps(case)).abs().max() <= 2e-4
    assert (out[:, columns:] == 7).all()
    assert not (out[:, :columns] == 7).all()


def test_a_target_out_of_range_that_nobody_checked_makes_the_gradient_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_ops, "check_target_values", lambda *_: None)
    case = moved(make_case(BF16, vocab=300, lengths=(9,), signs=(1,)), EXP_TARGETS[0].device)
    at = int(case.valid_index[3])
    case.targets[at] = 300
    moved_case = leaves(case)
    loss, _ = signed_cross_entropy(
        *moved_case.arguments[:3], case.token_weights.float(), backend="triton-exp"
    )
    got = gradients(loss, moved_case.hidden, moved_case.weight)
    assert loss.isnan()
    assert got.dhidden.isnan().all(1).nonzero().flatten().tolist() == [at]
    assert got.dweight.isnan().any()


@pytest.mark.parametrize("coefficient", ["dft", "unlikelihood"])
@pytest.mark.parametrize("logits", some_slow(["confident"], ["random", "logp -80"]))
def test_every_coefficient_is_exact(target: Target, coefficient: str, logits: str) -> None:
    case = leaves(make_case(BF16, logits=logits, device=target.device))
    options = {"coefficient": coefficient}
    weights = torch.linspace(-1, 1, len(case.targets), device=target.device)
    loss, _ = signed_cross_entropy(*case.arguments[:3], weights, backend=target.backend, **options)
    got = gradients(loss, case.hidden, case.weight)
    exact = leaves(case.to(torch.float64))
    exact_loss, _ = reference.signed_cross_entropy(*exact.arguments[:3], weights, **options)
    torch.testing.assert_close(loss, exact_loss.float(), rtol=1e-3, atol=1e-5)
    for value, true in zip(got, gradients(exact_loss, exact.hidden, exact.weight), strict=True):
        assert relative_error(value, true) < 4e-3


@pytest.mark.parametrize("alpha", some_slow([0.0], [0.8]))
def test_masked_tokens_and_tokens_of_weight_zero_get_log_probs_and_no_gradient(
    target: Target, alpha: float
) -> None:
    case = replace(make_case(BF16, device=target.device), alpha=alpha)
    exact_out, exact = oracle(case)
    index = case.valid_index
    weighted = case.token_weights[index] != 0
    ordered = torch.cat([index[weighted], index[~weighted]])
    for options in (
        {},
        {"valid_index": index},
        {"valid_index": ordered, "num_with_grad": int(weighted.sum()), "chunk_tokens": 9},
    ):
        out, got = run(redi_loss, case, backend=target.backend, **options)
        assert not violations(got, case, exact)
        assert not got.dhidden[case.token_weights == 0].any()
        assert (out.sequence_logps - exact_out.sequence_logps).abs().max() < 1e-3


@pytest.mark.parametrize("keep", some_slow([True], [False]))
@pytest.mark.parametrize("logits", some_slow(["confident"], ["random", "logp -80"]))
def test_kept_exponentials_serve_any_upstream_gradient_again_and_again(
    target: Target, logits: str, keep: bool
) -> None:
    case = leaves(make_case(BF16, logits=logits, device=target.device))
    logps = linear_logprobs(*case.arguments[:3], keep=keep, backend=target.backend)
    loss = -(case.token_weights * logps).sum()
    first = gradients(loss, case.hidden, case.weight, retain_graph=True)
    assert_exact(first, case, oracle(case)[1])
    again = gradients(-2 * loss, case.hidden, case.weight)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(-2 * a, b)


def test_entropies_and_other_dtypes_are_computed_from_logits(target: Target) -> None:
    case = make_case(BF16, device=target.device)
    plain = target.backend.removesuffix("-exp")
    arguments = *case.arguments[:3], case.token_weights
    for got, expected in zip(
        signed_cross_entropy(*arguments, entropy=True, backend=target.backend),
        signed_cross_entropy(*arguments, entropy=True, backend=plain),
        strict=True,
    ):
        assert torch.equal(got, expected)
    case = case.to(torch.float32)
    for got, expected in zip(
        run(redi_loss, case, backend=target.backend)[1],
        run(redi_loss, case, backend=plain)[1],
        strict=True,
    ):
        assert torch.equal(got, expected)


def naive(case: Case, upper_bound: bool = False) -> Gradients:
    """With a shift that is an upper bound, or the target's column corrected outside in float32."""
    valid = case.valid_index
    x, weight = case.hidden[valid].float(), case.weight.float()
    y, u = case.targets[valid], case.token_weights[valid, None].float()
    z = x @ weight.T
    shift = z.gather(1, y[:, None])
    if upper_bound:  # Cauchy-Schwarz
        shift = x.norm(dim=1, keepdim=True) * weight.norm(dim=1).max()
    e = (z - shift).exp()
    v = u / e.sum(1, keepdim=True)
    e = e.to(BF16).float()
    dhidden = v * (e @ weight) - u * weight[y]
    dweight = e.T @ (v * x).to(BF16).float()
    dweight.index_add_(0, y, -u * x)
    whole = torch.zeros_like(case.hidden)
    whole[valid] = dhidden.to(BF16)
    return Gradients(whole, dweight.to(BF16))


def test_the_rule_rejects_naive_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def rejected(got: Gradients, case: Case) -> bool:
        return "dweight" in {text.split(":")[0] for text in violations(got, case, oracle(case)[1])}

    monkeypatch.setattr(exp_gemm_triton, "exp_gemm", exp_gemm_plain.exp_gemm)
    device = EXP_TARGETS[0].device

    def plain(case: Case) -> Gradients:
        return run(redi_loss, case, backend="triton-exp")[1]

    cases = {logits: make_case(BF16, logits=logits, device=device) for logits in LOGITS}
    for case in cases.values():
        assert not rejected(plain(case), case)
    assert not rejected(naive(cases["random"]), cases["random"])  # right: nothing is extreme
    assert rejected(naive(cases["confident"]), cases["confident"])
    assert rejected(naive(cases["beyond 80"], upper_bound=True), cases["beyond 80"])

    def is_needed(name: str, instead: object, *cases: Case) -> None:
        for case in cases:
            assert not rejected(plain(case), case)
            with monkeypatch.context() as patch:
                patch.setattr(exp_gemm_plain, name, instead)
                assert rejected(plain(case), case), name

    far = "beyond 80", "logp -80", "logp -500"
    is_needed("LARGEST_SUM", torch.inf, *(cases[kind] for kind in far))
    is_needed("SMALL_SHARE", -1.0, cases["confident"])  # R as the tile's sum less e_y
    alike = [
        make_case(BF16, **CANCELLING, logits=k, device=device)
        for k in ("confident", "logp -80", "logp -500")
    ]
    is_needed("_mantissa", torch.ones_like, *alike)
