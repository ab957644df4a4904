"""The divergence to a stored teacher: exact, for any direction, tail, skew and weights."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import Gradients, Target, gradients, relative_error
from torch import Tensor

from redi.kernels import reference, signed_cross_entropy, topk_divergence

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
    case = teacher_case(tokens=4, vocab=7, width=3, entries=3)
    options = {**FORMS[form], **case.mixed, "temperature": 1.7, "softcap": 4.0}

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return topk_divergence(
            hidden, weight, *case.arguments[2:], backend="reference", **options
        ).loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight))


def limit_of(case: TeacherCase, true: Gradients, **options: Any) -> float:
    """Relative error of a gradient; float32 logits of up to 30 are off by 2e-6 themselves.

    bfloat16: a tenth more than if an exact gradient by the logits were rounded, and the products.
    """
    dtype = case.hidden.dtype
    if dtype != torch.bfloat16:
        return {torch.float64: 1e-12, torch.float16: 1e-3}.get(dtype, 2e-5)
    s = (case.hidden.double() @ case.weight.double().T).detach().requires_grad_()
    identity = torch.eye(s.shape[1], dtype=torch.float64)
    made = reference.topk_divergence(s, identity, *case.arguments[2:], **options)
    dlogits = torch.autograd.grad(made.loss, s)[0].to(dtype)
    rounded = Gradients(dlogits @ case.weight, dlogits.T @ case.hidden)
    return 1.1 * max(relative_error(*pair) for pair in zip(rounded, true, strict=True))


DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
LOGITS = {"scale": {"logit_scale": 0.7}, "softcap": {"logit_scale": 1.3, "softcap": 6.0}}


def assert_exact(target: Target, case: TeacherCase, dtype: torch.dtype, **options: Any) -> None:
    """Loss, divergences, log-probs and gradients are those of the float64 reference."""
    case = case.to(dtype)
    made, got = value_and_gradients(case, backend=target.backend, chunk_tokens=6, **options)
    exact, true = value_and_gradients(case.to(torch.float64), backend="reference", **options)
    expected_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for value, expected in zip(made, exact, strict=True):
        if expected is None:
            assert value is None
            continue
        assert value.dtype == expected_dtype
        rtol, atol = (1e-11, 1e-12) if dtype == torch.float64 else (2e-5, 5e-6)
        torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=atol)
    assert_equal(got, true, limit_of(case, true, **options))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_exact_in_every_form(target: Target, form: str, dtype: torch.dtype) -> None:
    """With and without targets, at two temperatures, for a near and a far teacher."""
    if dtype == torch.float64 and target.backend != "torch":
        pytest.skip("Triton computes in float32")
    for distance, sharpness, temperature in ((0.1, 1.0, 1.0), (1.0, 0.5, 1.7)):
        case = teacher_case(distance=distance, sharpness=sharpness)
        options = {**FORMS[form], "temperature": temperature}
        assert_exact(target, case, dtype, **options)
        assert_exact(target, case, dtype, **options, **case.mixed, **LOGITS["softcap"])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ids": [[0, 0], [1, 2]]}, "teacher_ids must name an entry once per token, got 0 at token 0"),
    ({"ids": [[0, 7], [1, 2]]}, r"teacher_ids must be in \[0, 7\) or -1, got 7 at token 0"),
    ({"ids": [[0, 1], [1, -2]]}, r"or -1, got -2 at token 1, entry 1"),
    ({"ids": [[0, 1], [1, -1]]}, "teacher_logps must be -inf where teacher_ids is -1, got -1.0"),
    ({"logps": [[-1.0, 0.1], [-1, -1]]}, "teacher_logps must be log-probs, at most 0, got 0.1"),
    ({"logps": [[-1.0, math.nan], [-1, -1]]}, "at most 0, got nan at token 0, entry 1"),
    ({"logps": [[-1.0, -1], [-0.1, -0.2]]}, "sum to at most 1 .* got 1.724 at token 1"),
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
    with pytest.raises((TypeError, ValueError), match=message):
        topk_divergence(torch.zeros(2, 3), torch.zeros(7, 3), ids, logps, torch.ones(2), **options)


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
