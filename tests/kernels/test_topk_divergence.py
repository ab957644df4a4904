"""The divergence to a stored teacher: exact, for any direction, tail, skew and weights."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Gradients, Target, gradients, leaves, make_case, relative_error
from torch import Tensor
from torch.library import opcheck

from redi.kernels import reference, signed_cross_entropy, topk, topk_divergence

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FORMS: dict[str, dict[str, Any]] = {
    f"{direction}, {tail}" + (f", skew {skew}" if skew else ""): {
        "direction": direction,
        "tail": tail,
        "skew": skew,
    }
    for direction, skews in (("forward", (0.0, 0.1)), ("reverse", (0.0, 0.1)), ("jsd", (0.0,)))
    for tail in ("ignore", "bucket")
    for skew in skews
}


@dataclass(frozen=True)
class TeacherCase:
    """Arguments of `topk_divergence`."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    logps: Tensor
    weights: Tensor
    targets: Tensor
    target_weights: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The positional ones."""
        return self.hidden, self.weight, self.ids, self.logps, self.weights

    def to(self, dtype: torch.dtype) -> "TeacherCase":
        """The same numbers in another dtype, as leaves."""
        return replace(
            self,
            hidden=self.hidden.detach().to(dtype).requires_grad_(),
            weight=self.weight.detach().to(dtype).requires_grad_(),
        )

    def on(self, device: str) -> "TeacherCase":
        """The case on a device."""
        return TeacherCase(*(getattr(self, field.name).to(device) for field in fields(self)))

    @property
    def mixed(self) -> dict[str, Tensor]:
        """Options that add a cross-entropy; a sixth of the targets mask."""
        return {"targets": self.targets, "target_weights": self.target_weights}


def teacher_case(
    *,
    tokens: int = 13,
    vocab: int = 61,
    width: int = 19,
    entries: int = 5,
    ragged: bool = True,
    distance: float = 0.3,
    sharpness: float = 1.0,
    seed: int = 0,
) -> TeacherCase:
    """A teacher near the student: its hidden states differ by `distance`."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = noise(vocab, width)
    hidden = sharpness * noise(tokens, width)
    taught = hidden + distance * noise(tokens, width)
    logps, ids = (taught @ weight.T).log_softmax(-1).topk(entries)
    if ragged:  # from none to all of the entries, left out anywhere
        out = (
            torch.rand(tokens, entries, generator=generator) < torch.linspace(0, 1, tokens)[:, None]
        )
        ids, logps = ids.masked_fill(out, -1), logps.masked_fill(out, -torch.inf)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[::2] = ids[::2, 0].clamp(min=0)  # of half of the tokens among the K
    targets[torch.rand(tokens, generator=generator) < 1 / 6] = -100
    return TeacherCase(hidden, weight, ids, logps, noise(tokens), targets, noise(tokens)).to(
        torch.float64
    )


def value_and_gradients(case: TeacherCase, **options: Any) -> tuple[Any, Gradients]:
    """(TopkDivergence, Gradients)."""
    made = topk_divergence(*case.arguments, **options)
    return made, gradients(made.loss, case.hidden, case.weight)


def assert_equal(got: Gradients, expected: Gradients, tolerance: float = 1e-12) -> None:
    """Relative to the norms."""
    for value, true in zip(got, expected, strict=True):
        assert relative_error(value, true) < tolerance


def test_forward_without_a_tail_is_the_cross_entropy_of_each_id_weighted_by_q() -> None:
    """By an op that knows no teacher: each token as many times as it has ids."""
    case = teacher_case()
    made, got = value_and_gradients(case, backend="reference")
    present = case.ids >= 0
    q = case.logps.exp()[present]
    token = torch.arange(len(case.ids))[:, None].expand_as(case.ids)[present]
    loss, _ = signed_cross_entropy(
        case.hidden[token], case.weight, case.ids[present], q * case.weights[token],
        backend="reference",
    )  # fmt: skip
    teacher = (case.weights[token] * torch.xlogy(q, q)).sum()
    torch.testing.assert_close(made.loss, loss + teacher)
    assert_equal(got, gradients(loss, case.hidden, case.weight))


@pytest.mark.parametrize("tail", ["ignore", "bucket"])
def test_all_ids_are_the_full_divergence(tail: str) -> None:
    """As torch's own kl_div has it, in both directions."""
    case = teacher_case(entries=61, ragged=False)
    p = (case.hidden @ case.weight.T / 2).log_softmax(-1)
    q = torch.zeros_like(p).scatter(1, case.ids, case.logps)
    m = torch.logaddexp(p, q) - math.log(2)
    full = {
        "forward": F.kl_div(p, q, log_target=True, reduction="none").sum(-1),
        "reverse": F.kl_div(q, p, log_target=True, reduction="none").sum(-1),
        "jsd": sum(F.kl_div(m, x, log_target=True, reduction="none").sum(-1) for x in (p, q)) / 2,
    }
    for direction, divergences in full.items():
        expected = (case.weights * divergences).sum()
        exact = gradients(expected, case.hidden, case.weight, retain_graph=True)
        made, got = value_and_gradients(
            case, direction=direction, tail=tail, temperature=2.0, backend="reference"
        )
        torch.testing.assert_close(made.loss, expected)
        torch.testing.assert_close(made.token_divergences, divergences)
        assert_equal(got, exact)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_differences(form: str) -> None:
    case = teacher_case(tokens=3, vocab=5, width=2, entries=2)
    options = {**FORMS[form], **case.mixed, "temperature": 1.7, "softcap": 4.0}

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return topk_divergence(
            hidden, weight, *case.arguments[2:], backend="reference", **options
        ).loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight))


def limits(case: TeacherCase, true: Gradients, **options: Any) -> tuple[float, ...]:
    """Relative errors of the gradients; float32 logits of up to 30 are off by 2e-6 themselves.

    bfloat16: a tenth more than if an exact gradient by the logits were rounded, and the products.
    """
    dtype = case.hidden.dtype
    if dtype != torch.bfloat16:
        return ({torch.float64: 1e-12, torch.float16: 1e-3}.get(dtype, 2e-5),) * 2
    s = (case.hidden.double() @ case.weight.double().T).detach().requires_grad_()
    identity = torch.eye(s.shape[1], dtype=torch.float64, device=s.device)
    made = reference.topk_divergence(s, identity, *case.arguments[2:], **options)
    dlogits = torch.autograd.grad(made.loss, s)[0].to(dtype)
    rounded = dlogits @ case.weight, dlogits.T @ case.hidden
    return tuple(1.1 * relative_error(*pair) for pair in zip(rounded, true, strict=True))


LOGITS = {"logit_scale": 1.3, "softcap": 6.0}


def assert_exact(backend: str, case: TeacherCase, dtype: torch.dtype, **options: Any) -> None:
    """Loss, divergences, log-probs and gradients are those of the float64 reference."""
    case = case.to(dtype)
    made, got = value_and_gradients(case, backend=backend, chunk_tokens=4, **options)
    exact, true = value_and_gradients(case.to(torch.float64), backend="reference", **options)
    expected_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for value, expected in zip(made, exact, strict=True):
        if expected is None:
            assert value is None
            continue
        assert value.dtype == expected_dtype
        rtol, atol = (1e-11, 1e-12) if dtype == torch.float64 else (2e-5, 5e-6)
        torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=atol)
    for value, exact_value, limit in zip(got, true, limits(case, true, **options), strict=True):
        assert relative_error(value, exact_value) < limit


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=str,
)
def test_it_is_exact_in_every_form(form: str, dtype: torch.dtype) -> None:
    """With and without targets, at two temperatures, for a near and a far teacher."""
    for distance, sharpness, temperature in ((0.1, 1.0, 1.0), (1.0, 0.5, 1.7)):
        case = teacher_case(distance=distance, sharpness=sharpness)
        options = {**FORMS[form], "temperature": temperature}
        assert_exact("torch", case, dtype, **options)
        assert_exact("torch", case, dtype, **options, **case.mixed, **LOGITS)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param(form, dtype, marks=[] if quick else pytest.mark.slow)
        for form in FORMS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if (quick := form == "forward, bucket" and dtype != torch.float16) or True
    ],
    ids=str,
)
def test_every_backend_is_exact(target: Target, form: str, dtype: torch.dtype) -> None:
    """Backends differ in the passes over rows, and there in whether logits are transformed."""
    case = teacher_case(tokens=5).on(target.device)
    options = {**FORMS[form], **case.mixed}
    assert_exact(target.backend, case, dtype, **options)
    assert_exact(target.backend, case, dtype, **options, temperature=1.7, **LOGITS)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ids": [[0, 0], [1, 2]]}, "teacher_ids must name an entry once per token, got 0 at token 0"),
    ({"ids": [[0, 7], [1, 2]]}, r"teacher_ids must be in \[0, 7\) or -1, got 7 at token 0"),
    ({"ids": [[0, 1], [1, -2]]}, r"or -1, got -2 at token 1, entry 1"),
    ({"ids": [[0, 1], [1, -1]]}, "teacher_logps must be -inf where teacher_ids is -1, got -1.0"),
    ({"logps": [[-1.0, 0.1], [-1, -1]]}, "teacher_logps must be log-probs, at most 0, got 0.1"),
    ({"logps": [[-1.0, math.nan], [-1, -1]]}, "at most 0, got nan at token 0, entry 1"),
    ({"logps": [[-1.0, -1], [-0.1, -0.2]]}, "sum to at most 1 .* got 1.724 at token 1"),
    ({"weights": torch.ones(3)}, r"token_weights must have one entry for each row of hidden"),
    ({"logps": [[-1.0], [-1]]}, r"shape of teacher_ids \(2, 2\), got \(2, 1\)"),
    ({"ids": [0, 1]}, r"teacher_ids must have shape \[..., K\]|K entries for each"),
    ({"direction": "backward"}, "direction must be one of 'forward', 'reverse', 'jsd'"),
    ({"tail": "one bucket"}, "tail must be one of 'ignore', 'bucket', got 'one bucket'"),
    ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
    ({"skew": 1.0}, r"skew must be in \[0, 1\), got 1.0"),
    ({"skew": 0.1, "direction": "jsd"}, 'skew has no meaning for direction="jsd"'),
    ({"target_weights": torch.ones(2)}, "pass targets as well"),
    (
        {"logps": [[-1.0, -math.inf], [-1, -1]], "direction": "reverse"},
        'teacher_logps must be finite for direction="reverse" without skew, got -inf',
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_what_is_no_teacher_is_refused(wrong: dict[str, Any], message: str) -> None:
    options = dict(wrong)
    ids = torch.tensor(options.pop("ids", [[0, 1], [1, 2]]))
    logps = torch.tensor(options.pop("logps", [[-1.0, -1], [-1, -1]]))
    weights = options.pop("weights", torch.ones(2))
    with pytest.raises((TypeError, ValueError), match=message):
        topk_divergence(torch.zeros(2, 3), torch.zeros(7, 3), ids, logps, weights, **options)


CERTAINTIES = {
    "student": (14.0, 0.0),  # of nearly certain students 1 - p is near 1e-9
    "teacher": (0.0, 14.0),
    "both": (14.0, 14.0),
    "neither": (0.0, 0.0),
    "student of another token": (-60.0, 14.0),
}


@pytest.mark.parametrize("certain", CERTAINTIES)
@pytest.mark.parametrize("form", FORMS)
def test_probabilities_of_nearly_1_and_1e_30_cancel_nowhere(certain: str, form: str) -> None:
    """The sums of the others are added up, not subtracted from 1: float32 shows it.

    A bounded divergence far from its bound's gradient of 0 has the rounding of its logarithms left.
    """
    student, taught = CERTAINTIES[certain]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 40, generator=generator)
    z[:, 0] += student
    teacher = 2 * torch.randn(6, 40, generator=generator) + z
    teacher[:, 0] += taught - student
    logps, ids = teacher.double().log_softmax(-1).topk(4)
    case = TeacherCase(
        z, torch.eye(40), ids, logps, torch.tensor([1.0, -1, 2, -2, 1, 1]), ids[:, 0], torch.ones(6)
    )  # fmt: skip
    for options in (FORMS[form], FORMS[form] | {"temperature": 0.7} | case.mixed):
        with_grad = case.to(torch.float32)
        _, got = value_and_gradients(with_grad, backend="torch", **options)
        _, true = value_and_gradients(case.to(torch.float64), backend="reference", **options)
        errors = (got.dhidden - true.dhidden).norm(dim=1)
        saturated = 2e-7 if certain == "student of another token" else 0.0
        assert (errors <= 5e-5 * true.dhidden.norm(dim=1) + saturated).all()


@pytest.mark.parametrize("tail", ["ignore", "bucket"])
@pytest.mark.parametrize("log_mass", [-900.0, math.log(1e-30), math.log1p(-1e-9)])
def test_a_teacher_s_mass_may_be_tiny_below_float64_or_nearly_1(tail: str, log_mass: float) -> None:
    case = teacher_case(ragged=False)
    logps = case.logps - case.logps.logsumexp(-1, keepdim=True) + log_mass
    for direction in ("forward", "reverse", "jsd"):
        for dtype in (torch.float64, torch.float32):
            moved = replace(case, logps=logps)
            assert_exact("torch", moved, dtype, direction=direction, tail=tail)
    made = topk_divergence(
        case.hidden, case.weight, case.ids, logps, case.weights, direction="reverse", tail=tail
    )
    assert (made.token_divergences > 0).all()


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_a_softened_teacher_is_its_own_student_unless_it_has_lost_its_tail(direction: str) -> None:
    """Entries that were normalised over the K have none: D is then the larger, the less of it."""
    z = 2.5 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    softened, ids = (z / 2).log_softmax(-1).topk(5)
    one = torch.ones(1, dtype=torch.float64)
    options = {"direction": direction, "tail": "bucket", "temperature": 2.0}

    def of(logps: Tensor, **changes: str) -> float:
        eye = torch.eye(50, dtype=torch.float64)
        return topk_divergence(z, eye, ids, logps, one, **(options | changes)).loss.item()

    assert of(softened) == pytest.approx(0, abs=1e-12)
    normalised = softened.log_softmax(-1)
    assert of(normalised) > 0.1
    if direction == "reverse":  # by the logarithm of what rounding left
        assert of(normalised) > 10 * of(normalised, tail="ignore") > 0


@pytest.mark.parametrize("tail", [pytest.param("ignore", marks=pytest.mark.slow), "bucket"])
def test_a_certain_teacher_is_a_cross_entropy(target: Target, tail: str) -> None:
    """q = 1 at the target, where p is up to 1 - 1e-9."""
    case = make_case(
        vocab=67, lengths=(7, 4), signs=(1, -1), logits="confident", device=target.device
    )
    weights = case.token_weights
    ids = case.targets.clamp(min=-1)[:, None]  # none where masked
    logps = torch.zeros(ids.shape, device=target.device).masked_fill(ids < 0, -torch.inf)
    case = leaves(case)
    operands = case.hidden, case.weight
    made = topk_divergence(*operands, ids, logps, weights, tail=tail, backend=target.backend)
    loss, token_logps = signed_cross_entropy(
        *operands, case.targets, weights, backend=target.backend
    )
    torch.testing.assert_close(made.loss, loss)
    torch.testing.assert_close(made.token_divergences, -token_logps, rtol=1e-5, atol=1e-12)
    expected = gradients(loss, *operands)
    assert_equal(gradients(made.loss, *operands), expected, 2e-6)


def test_one_pass_is_the_sum_of_two(target: Target) -> None:
    """Of a divergence at its temperature and of a cross-entropy at 1."""
    case = teacher_case(tokens=5).on(target.device).to(torch.float32)
    options = {"backend": target.backend, **LOGITS}
    divergence = {"direction": "jsd", "tail": "bucket", "temperature": 2.0}
    made, got = value_and_gradients(case, **options, **divergence, **case.mixed)
    alone = topk_divergence(*case.arguments, **options, **divergence, targets=case.targets)
    loss, logps = signed_cross_entropy(
        case.hidden, case.weight, case.targets, case.target_weights, **options
    )
    torch.testing.assert_close(made.loss, alone.loss + loss)
    torch.testing.assert_close(made.token_divergences, alone.token_divergences)
    torch.testing.assert_close(made.token_logps, logps)
    assert not made.token_logps.requires_grad
    assert not made.token_divergences.requires_grad
    assert_equal(got, gradients(alone.loss + loss, case.hidden, case.weight), 2e-6)


@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(sorted(FORMS)),
    vocab=st.integers(1, 12),
    scale=st.floats(1e-3, 200.0),
    temperature=st.floats(0.05, 20.0),
    softcap=st.none() | st.floats(0.5, 50.0),
)
@settings(max_examples=25)
def test_divergences_keep_their_bounds_and_gradients_of_a_row_sum_to_0(
    seed: int, form: str, vocab: int, scale: float, temperature: float, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    options = FORMS[form]
    z = (scale * torch.randn(5, vocab, generator=generator)).requires_grad_()
    taught = (2 * torch.randn(5, vocab, generator=generator)).log_softmax(-1)
    entries = int(torch.randint(1, vocab + 1, (), generator=generator))
    logps, ids = taught.topk(entries)
    out = torch.rand(5, entries, generator=generator) < 0.3
    ids, logps = ids.masked_fill(out, -1), logps.masked_fill(out, -torch.inf)
    made = topk_divergence(
        z, torch.eye(vocab), ids, logps, torch.ones(5), temperature=temperature, softcap=softcap,
        **options,
    )  # fmt: skip
    divergences = made.token_divergences
    assert divergences.isfinite().all()
    q = logps.exp()
    mass = q.sum(-1)
    without_tail = options["tail"] == "ignore"
    if options["direction"] == "forward" and without_tail:
        assert (divergences >= torch.xlogy(mass, mass) - 1e-4).all()  # p is q / sum q there
    else:
        assert (divergences >= -1e-5).all()
    if options["direction"] == "jsd":
        assert (divergences <= math.log(2) + 1e-5).all()
    elif options["skew"]:
        most = -math.log(options["skew"])
        assert (divergences <= most * 1.001).all()
    (dz,) = torch.autograd.grad(made.loss, z)
    assert dz.isfinite().all()
    if softcap is None:
        assert (dz.sum(-1).abs() <= 2e-5 * dz.abs().sum(-1) + 1e-7).all()
    # Neither the entries' order matters, nor what is left out of them.
    order = torch.randperm(entries, generator=generator)
    wider = [
        F.pad(values[:, order], (1, 2), value=pad)
        for values, pad in ((ids, -1), (logps, -torch.inf))
    ]
    again = topk_divergence(
        z, torch.eye(vocab), *wider, torch.ones(5), temperature=temperature, softcap=softcap,
        **options,
    )  # fmt: skip
    torch.testing.assert_close(again.loss, made.loss, rtol=1e-5, atol=1e-5)


def test_a_bounded_divergence_leaves_the_tokens_that_are_far_from_their_teacher() -> None:
    """What a negative weight is for: the push fades, where a forward divergence's does not."""
    ids, logps = torch.tensor([[0]]), torch.tensor([[math.log(0.9)]])
    z = torch.tensor([[-30.0, 0.0, 0.0]], requires_grad=True)
    pushes = {}
    for form, options in FORMS.items():
        loss = topk_divergence(z, torch.eye(3), ids, logps, -torch.ones(1), **options).loss
        pushes[form] = float(torch.autograd.grad(loss, z)[0].abs().max())
    assert pushes["forward, bucket"] > 0.8
    for form in ("forward, bucket, skew 0.1", "reverse, bucket", "jsd, bucket"):
        assert pushes[form] < 1e-9


def test_the_schedule_is_the_callers(target: Target) -> None:
    """Tokens of weight 0 have divergences, and with num_with_grad the logits alone."""
    case = teacher_case(tokens=7).on(target.device).to(torch.float32)
    with_grad = torch.arange(len(case.targets), device=target.device) < 4
    weights = case.weights * with_grad
    targets = case.targets.clamp(min=0)
    options = {"targets": targets, "target_weights": case.target_weights * with_grad}
    moved = replace(case, weights=weights)
    expected, exact = value_and_gradients(moved, backend="reference", **options)
    for schedule in (
        {},
        {"valid_index": torch.arange(7, device=target.device), "num_with_grad": 4},
    ):
        made, got = value_and_gradients(
            moved, backend=target.backend, chunk_tokens=3, **options, **schedule
        )
        torch.testing.assert_close(made.loss, expected.loss)
        torch.testing.assert_close(made.token_divergences, expected.token_divergences)
        assert_equal(got, exact, 2e-5)
        assert not got.dhidden[4:].any()


def test_leading_dimensions_and_narrow_tables_are_the_same(target: Target) -> None:
    case = teacher_case(tokens=6).on(target.device).to(torch.float32)
    case = replace(case, logps=case.logps.half())
    made, got = value_and_gradients(case, tail="bucket", backend=target.backend, **case.mixed)
    batch, expected = value_and_gradients(
        replace(
            case,
            hidden=case.hidden.detach().view(2, 3, -1).requires_grad_(),
            ids=case.ids.int().view(2, 3, -1),
            logps=case.logps.view(2, 3, -1),
            weights=case.weights.view(2, 3),
        ),
        tail="bucket",
        targets=case.targets.view(2, 3),
        target_weights=case.target_weights.view(2, 3),
        backend=target.backend,
    )
    assert torch.equal(batch.loss, made.loss)
    for value, flat in zip(batch[1:], made[1:], strict=True):
        assert value.shape == (2, 3)
        assert torch.equal(value.flatten(), flat)
    assert torch.equal(expected.dhidden.flatten(0, 1), got.dhidden)
    assert torch.equal(expected.dweight, got.dweight)


def test_a_rounded_teacher_has_a_tail_however_its_mass_was_rounded() -> None:
    """In float16 a mass of 1 - 1e-5 becomes 1.0002: KL(student, teacher) stays finite."""
    ids, logps = torch.tensor([[0, 1]]), torch.tensor([[0.56, 0.43999]]).log()
    assert logps.half().double().exp().sum() > 1
    z = torch.zeros(1, 9, requires_grad=True)
    for table in (logps, logps.half()):
        made = topk_divergence(
            z, torch.eye(9), ids, table, torch.ones(1), direction="reverse", tail="bucket"
        )
        assert 0 < made.token_divergences < 20
    # Half a unit of the last place of each log-prob, 2^-11 of it, is what rounding may have taken.
    stored = torch.tensor([[0.5, 0.5]]).log().half()
    (tail,) = reference.teacher_tails(ids, stored, vocab=9).tolist()
    assert tail == pytest.approx(2**-11 * math.log(2), rel=1e-3)
    assert tail > 1 - stored.double().exp().sum() > 0


@pytest.mark.parametrize(
    "wrong", [61, *(pytest.param(one, marks=pytest.mark.slow) for one in (2**31 - 1, -2))]
)
def test_an_id_out_of_range_that_nobody_checked_is_nan(
    target: Target, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a target: a GPU does not read them."""
    if target.backend == "torch":
        pytest.skip("PyTorch checks indices")
    monkeypatch.setattr(topk, "check_teacher_values", lambda *_: None)
    case = teacher_case(tokens=5, ragged=False).on(target.device).to(torch.float32)
    ids = case.ids.clone()
    ids[3, 1] = wrong
    made = topk_divergence(
        case.hidden, case.weight, ids, case.logps, case.weights, backend=target.backend
    )
    assert made.loss.isnan()
    others = torch.arange(len(ids), device=target.device) != 3
    assert made.token_divergences[others].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("with_targets", [True, False])
def test_the_op_keeps_its_contract_and_compiles(target: Target, with_targets: bool) -> None:
    case = teacher_case(tokens=4, vocab=11, width=3, entries=2).on(target.device)
    case = case.to(torch.float32)
    options = {"tail": "bucket", "backend": target.backend, "chunk_tokens": 2}
    if with_targets:
        options |= case.mixed

    def step(*arguments: Tensor) -> Tensor:
        made = topk_divergence(*arguments, **options)
        return made.loss + made.token_divergences.sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*case.arguments), step(*case.arguments)
    torch.testing.assert_close(got, expected)
    assert_equal(
        gradients(got, case.hidden, case.weight),
        gradients(expected, case.hidden, case.weight),
        1e-6,
    )
    if with_targets:
        schedule = None, None, 2
        opcheck(
            torch.ops.redi.topk_divergence.default,
            (*case.arguments[:2], case.targets, *case.arguments[2:], case.target_weights,
             *schedule, target.backend, "forward", 2.0, True, 0.1, (True, True), 0.5, 8.0),
        )  # fmt: skip


def test_a_row_without_ids_takes_no_part() -> None:
    case = teacher_case()
    ids = case.ids.clone()
    ids[3] = -1
    logps = case.logps.masked_fill(ids < 0, -torch.inf)
    hidden = case.hidden.detach().clone()
    hidden[3] = torch.nan
    made = topk_divergence(hidden, case.weight, ids, logps, case.weights, tail="bucket")
    assert made.loss.isfinite()
    assert made.token_divergences[3] == 0
    assert made.token_logps is None
    assert reference.teacher_targets(ids)[3] == -100
