"""Each objective against its formula, implemented here on full logits in float64."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import make_tokens
from op_counter import OpCounter
from torch import Tensor
from torch.nn.functional import logsigmoid

from redi.engine.cli import main
from redi.engine.config.objectives import OBJECTIVES, ObjectiveKind
from redi.engine.config.parse import load_recipe, train_parser
from redi.engine.config.sections import ObjectiveConfig
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.packing import Cost, PackedBatch, build_batch, pack
from redi.engine.data.schedule import select
from redi.engine.errors import InputError
from redi.engine.loss.objectives import FORMULAS, Formula, Sequences, formula, pairs
from redi.engine.loss.packed_loss import PackedLoss, StepTotals

V, D = 97, 12
BETA, MARGIN, ALPHA, KL = 0.3, 0.7, 0.6, 1.7
PROMPTS = [3, 3, 1, 1, 5, 5, 2, 2, 4, 4]
COMPLETIONS = [4, 9, 1, 1, 17, 3, 2, 12, 6, 6]
SIGNS = [1, -1] * 5
UNITS = {"positives": 5, "traces": 10, "pairs": 5, "margins": 5}


def section(name: str, **options: Any) -> ObjectiveConfig:
    needed = {"beta": BETA} if "beta" in OBJECTIVES[name].parameters else {}
    return ObjectiveConfig(name=name, **{"alpha": ALPHA, **needed, **options})  # type: ignore[arg-type]


def log_odds(logps: Tensor) -> Tensor:
    p = logps.mean().exp()
    return torch.log(p / (1 - p).clamp(min=2.0**-100))


# name: section, and the loss as a function of the log-probs of the tokens of each positive y and
# negative z, reference sums r and q, and weights of both. Formulas are as in the papers.
Pair = tuple[Tensor, Tensor, float, float, float, float]
CASES: dict[str, tuple[ObjectiveConfig, Callable[..., Tensor]]] = {
    "sft": (section("sft"), lambda y, z, r, q, a, b: -a * y.mean() / 5),
    "sft-token": (
        section("sft", normalisation="token"),
        lambda y, z, r, q, a, b: -a * y.sum() / sum(COMPLETIONS[::2]),
    ),
    "redi": (section("redi"), lambda y, z, r, q, a, b: (-a * y.mean() + b * 0.6 * z.mean()) / 5),
    "redi-gamma": (
        section("redi", negative_gamma=0.5),
        lambda y, z, r, q, a, b: (
            (-a * y.mean() + b * 0.6 * z.mean() * torch.exp(0.5 * z.mean())) / 5
        ),
    ),
    "signed": (
        section("signed", positive_weight=0.25),
        lambda y, z, r, q, a, b: (-a * 0.25 * y.mean() + b * 0.6 * z.mean()) / 10,
    ),
    "asymre": (  # baseline V = -0.4: weights r - V = 1.4 and -0.6, sums over tokens
        section("signed", positive_weight=1.4, normalisation="none"),
        lambda y, z, r, q, a, b: (-a * 1.4 * y.sum() - b * -0.6 * z.sum()) / 10,
    ),
    "nsr": (
        section("signed", positive_weight=0.0, normalisation="token"),
        lambda y, z, r, q, a, b: b * 0.6 * z.sum() / sum(COMPLETIONS),
    ),
    "dft": (
        section("dft"),
        lambda y, z, r, q, a, b: -a * (y.detach().exp() * y).mean() / 5,
    ),
    "unlikelihood": (
        section("unlikelihood"),
        lambda y, z, r, q, a, b: (-a * y.mean() - b * 0.6 * torch.log1p(-z.exp()).mean()) / 5,
    ),
    "bounded_redi": (
        section("bounded_redi"),
        lambda y, z, r, q, a, b: (-a * y.mean() + b * 0.6 * z.mean().exp()) / 5,
    ),
    "bounded_redi-hot": (
        section("bounded_redi", temperature=2.5),
        lambda y, z, r, q, a, b: (-a * y.mean() + b * 0.6 * 2.5 * (z.mean() / 2.5).exp()) / 5,
    ),
    "simper": (
        section("simper"),
        lambda y, z, r, q, a, b: (-a * y.mean().exp() + b * z.mean().exp()) / 5,
    ),
    "sft_simper": (
        section("sft_simper"),
        lambda y, z, r, q, a, b: (
            (-a * (y.mean() + 0.6 * y.mean().exp()) + b * 0.6 * z.mean().exp()) / 5
        ),
    ),
    "robust_dpo": (
        section("robust_dpo", label_smoothing=0.2),
        lambda y, z, r, q, a, b: (
            (a + b)
            / 2
            * (
                -0.8 * logsigmoid(BETA * (y.sum() - r - z.sum() + q))
                + 0.2 * logsigmoid(-BETA * (y.sum() - r - z.sum() + q))
            )
            / 0.6
            / 5
        ),
    ),
    "hinge": (
        section("hinge"),
        lambda y, z, r, q, a, b: (
            (a + b) / 2 * (1 - BETA * (y.sum() - r - z.sum() + q)).clamp(min=0) / 5
        ),
    ),
    "ipo": (
        section("ipo"),
        lambda y, z, r, q, a, b: (
            (a + b)
            / 2
            * (y.mean() - r / max(len(y), 1) - z.mean() + q / max(len(z), 1) - 0.5 / BETA) ** 2
            / 5
        ),
    ),
    "apo_zero": (
        section("apo_zero"),
        lambda y, z, r, q, a, b: (
            (
                a * (1 - torch.sigmoid(BETA * (y.sum() - r)))
                + b * torch.sigmoid(BETA * (z.sum() - q))
            )
            / 5
        ),
    ),
    "apo_zero_unpaired": (
        section("apo_zero_unpaired"),
        lambda y, z, r, q, a, b: (
            (
                a * (1 - torch.sigmoid(BETA * (y.sum() - r)))
                + b * torch.sigmoid(BETA * (z.sum() - q))
            )
            / 10
        ),
    ),
    "kto": (
        section("kto", desirable_weight=1.5, undesirable_weight=0.7),
        lambda y, z, r, q, a, b: (
            (
                a * 1.5 * (1 - torch.sigmoid(BETA * (y.sum() - r - KL)))
                + b * 0.7 * (1 - torch.sigmoid(BETA * (KL - z.sum() + q)))
            )
            / 10
        ),
    ),
    "topr": (
        section("topr"),
        lambda y, z, r, q, a, b: (
            (-a * y.mean() + b * 0.6 * (z.sum().detach() - q).exp().clamp(max=1) * z.mean()) / 5
        ),
    ),
    "orpo": (
        section("orpo"),
        lambda y, z, r, q, a, b: (
            (a + b) / 2 * (-y.mean() - BETA * logsigmoid(log_odds(y) - log_odds(z))) / 5
        ),
    ),
    "simpo": (
        section("simpo", margin=MARGIN),
        lambda y, z, r, q, a, b: (
            -(a + b) / 2 * logsigmoid(BETA * y.mean() - BETA * z.mean() - MARGIN) / 5
        ),
    ),
    "dpo": (
        section("dpo"),
        lambda y, z, r, q, a, b: (
            -(a + b) / 2 * logsigmoid(BETA * (y.sum() - r) - BETA * (z.sum() - q)) / 5
        ),
    ),
    "dpo-smoothed": (
        section("dpo", label_smoothing=0.2),
        lambda y, z, r, q, a, b: (
            (a + b)
            / 2
            * (
                -0.8 * logsigmoid(BETA * (y.sum() - r - z.sum() + q))
                - 0.2 * logsigmoid(-BETA * (y.sum() - r - z.sum() + q))
            )
            / 5
        ),
    ),
}
REFERENCE = torch.linspace(-40, -3, len(SIGNS))


def test_every_objective_has_a_case() -> None:
    of_teachers = {"kd"}  # tests/engine/train/test_distill.py
    assert {of.name for of, _ in CASES.values()} | of_teachers == set(OBJECTIVES)


@pytest.fixture(params=[False, True], ids=["plain", "weighted"])
def tokens(request: pytest.FixtureRequest, tmp_path: Path) -> TokenizedTraces:
    weights = np.linspace(0.5, 2, len(SIGNS)) if request.param else None
    groups = np.repeat(np.arange(5), 2)
    return make_tokens(tmp_path / "set", PROMPTS, COMPLETIONS, SIGNS, groups, weights)


def packs_of(tokens: TokenizedTraces, of: ObjectiveConfig, row_tokens: int) -> list[PackedBatch]:
    """The whole set as the packs of one step, with a dummy pack as other ranks may have."""
    examples = select(
        tokens,
        objective_needs=of.kind.units,
        max_tokens=100,
        overlong="error",
        row_tokens=row_tokens,
    )
    sequences = examples.units.reshape(-1)
    packing = pack(
        examples.lengths[sequences],
        row_tokens=row_tokens,
        world_size=1,
        cost=Cost(1.0, 0.0),
        keep_pairs_together=examples.keep_pairs_together,
    )
    chosen = [sequences[own] for step in packing.packs for own in step] + [sequences[:0]]
    batches = [build_batch(tokens, row, examples.lengths[row]) for row in chosen]
    return [replace(batch, targets=_in_vocabulary(batch.targets)) for batch in batches]


def _in_vocabulary(targets: Tensor) -> Tensor:
    return torch.where(targets < 0, targets, targets % V)


def states_of(tokens: TokenizedTraces, index: int) -> Tensor:
    """Random hidden states of a trace, the same in any pack."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(int(tokens.lengths[index]), D, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("row_tokens", [30, 1000], ids=["split", "one pack"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_formula(
    case: str, row_tokens: int, tokens: TokenizedTraces
) -> None:
    of, expected_loss = CASES[case]
    compare_with_formula(of, expected_loss, row_tokens, tokens)


# Weights of the tokens of each completion; of the third pair all tokens of the negative are masked.
TOKEN_WEIGHTS: list[list[float] | None] = [
    None
    if n == 3
    else [(0.0, 0.5, 1.0, -2.0, 3.0)[(place + n) % 5 if n != 5 else 0] for place in range(count)]
    for n, count in enumerate(COMPLETIONS)
]
UNMASKED = [
    count if weights is None else sum(weight != 0 for weight in weights)
    for count, weights in zip(COMPLETIONS, TOKEN_WEIGHTS, strict=True)
]
# The formulas that are not those of CASES with weighted log-probs in place of log-probs; w and v
# are the weights of the positive's and of the negative's unmasked tokens.
SPAN_CASES: dict[str, Callable[..., Tensor]] = {
    "sft-token": lambda y, z, r, q, a, b, w, v: -(w * y).sum() / sum(UNMASKED[::2]),
    "nsr": lambda y, z, r, q, a, b, w, v: 0.6 * (v * z).sum() / sum(UNMASKED),
    "dft": lambda y, z, r, q, a, b, w, v: -(w * y.detach().exp() * y).sum() / max(len(y), 1) / 5,
    "unlikelihood": lambda y, z, r, q, a, b, w, v: (
        (unlikelihood(y, w) + unlikelihood(z, -0.6 * v)) / 5
    ),
}


def unlikelihood(logps: Tensor, weights: Tensor) -> Tensor:
    terms = torch.where(weights > 0, -weights * logps, weights * torch.log1p(-logps.exp()))
    return terms.sum() / max(len(logps), 1)


@pytest.mark.parametrize("row_tokens", [30, 1000], ids=["split", "one pack"])
@pytest.mark.parametrize("case", CASES)
def test_spans_weight_the_tokens_of_the_formula(case: str, row_tokens: int, tmp_path: Path) -> None:
    """Masked tokens are left out of sums and of |y|, other weights multiply the coefficients."""
    of, formula_of_pairs = CASES[case]
    exponential = of.kind.exponential or case == "redi-gamma"
    weights = [
        found and [abs(weight) if exponential else weight for weight in found]
        for found in TOKEN_WEIGHTS
    ]

    def expected(y: Tensor, z: Tensor, *rest: Any) -> Tensor:
        *marks, w, v = rest
        if case in SPAN_CASES:
            return SPAN_CASES[case](y, z, *marks, w, v)
        none = torch.zeros(1, dtype=torch.float64)  # the mean of no tokens is 0
        return formula_of_pairs(w * y if len(y) else none, v * z if len(z) else none, *marks)

    groups = np.repeat(np.arange(5), 2)
    tokens = make_tokens(
        tmp_path / "set", PROMPTS, COMPLETIONS, SIGNS, groups, token_weights=weights
    )
    compare_with_formula(of, expected, row_tokens, tokens)


def compare_with_formula(
    of: ObjectiveConfig,
    expected_loss: Callable[..., Tensor],
    row_tokens: int,
    tokens: TokenizedTraces,
) -> None:
    """Compare loss and gradients; a formula for tokens with weights gets these too."""
    spans = bool(tokens.weighted.any())
    counts = tokens.num_targets(np.arange(len(tokens)), tokens.lengths)
    generator = torch.Generator().manual_seed(99)
    head = torch.randn(V, D, generator=generator, dtype=torch.float64)
    states = {index: states_of(tokens, index) for index in range(len(tokens))}

    ours = head.clone().requires_grad_()
    targets = int((counts if of.kind.units == "traces" else counts[::2]).sum())
    totals = StepTotals(UNITS[of.kind.units], targets, kl=torch.tensor(KL).double())
    objective = PackedLoss(of, REFERENCE.double())
    total = torch.zeros((), dtype=torch.float64)
    leaves: dict[int, Tensor] = {}
    packs = packs_of(tokens, of, row_tokens)
    assert len(packs) >= 3 or row_tokens == 1000
    for batch in packs:
        parts = []
        for index in batch.sequence_ids.tolist():
            leaf = states.get(index, torch.zeros(2, D, dtype=torch.float64)).clone()
            leaves[index] = leaf.requires_grad_()
            parts.append(leaf)
        out = objective(torch.cat(parts), ours, batch, totals)
        out.loss.backward()
        total = total + out.loss.detach()
        assert out.sequence_lengths.tolist()[: len(batch.sequence_ids)] == [
            counts[index] if index >= 0 else 0 for index in batch.sequence_ids.tolist()
        ]

    theirs = head.clone().requires_grad_()
    plain = {index: state.clone().requires_grad_() for index, state in states.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for pair in range(5):
        logps, weights = [], []
        for index in (2 * pair, 2 * pair + 1):
            ids = torch.from_numpy(tokens.ids(index).astype("int64")) % V
            logits = plain[index][:-1] @ theirs.T
            logp = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            logp = logp[PROMPTS[index] - 1 :]
            given = tokens.token_weights(index)
            of_tokens = torch.ones_like(logp) if given is None else torch.tensor(given).double()
            logps.append(logp[of_tokens != 0])
            weights.append(of_tokens[of_tokens != 0])
        marks = REFERENCE[2 * pair : 2 * pair + 2].double().tolist()
        marks += tokens.weights[2 * pair : 2 * pair + 2].tolist()
        loss = loss + expected_loss(*logps, *marks, *(weights if spans else []))
    loss.backward()

    assert total.item() == pytest.approx(loss.item(), rel=1e-6)
    assert close(ours.grad, theirs.grad)
    for index, leaf in leaves.items():
        if index >= 0:
            assert close(leaf.grad, plain[index].grad), index


def close(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Weights and lengths are float32 in the pack, hence a tolerance of 1e-6."""
    assert ours is not None
    theirs = torch.zeros_like(ours) if theirs is None else theirs
    return bool((ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-15)


def test_ones_run_the_ops_of_no_spans_and_masks_too(tmp_path: Path) -> None:
    """Other weights are those of the op that takes a weight for each token."""
    found = []
    for number, weight in enumerate((None, 1.0, 0.0, 0.5)):
        given = None if weight is None else [[weight, *[1.0] * (n - 1)] for n in COMPLETIONS]
        groups = np.repeat(np.arange(5), 2)
        where = tmp_path / str(number)
        tokens = make_tokens(where, PROMPTS, COMPLETIONS, SIGNS, groups, token_weights=given)
        (batch, _) = packs_of(tokens, section("redi"), 1000)
        hidden = torch.cat([states_of(tokens, int(i)) for i in batch.sequence_ids]).float()
        head = torch.randn(V, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with OpCounter() as ops:
            out = PackedLoss(section("redi"))(hidden, head, batch, StepTotals(5, 1))
        (gradient,) = torch.autograd.grad(out.loss, head)
        assert ops.ran["redi::signed_cross_entropy"] == 1
        found.append((ops.ran["redi::token_weights"], out.loss, gradient))
    assert [ran for ran, _, _ in found] == [1, 1, 1, 0]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])
    assert not torch.equal(found[0][2], found[2][2])


@pytest.mark.parametrize("name", ["simper", "bounded_redi"])
def test_exponentials_are_one_fused_pass_unless_spans_weight_tokens(
    name: str, tmp_path: Path
) -> None:
    weights = [None, [0.5, *[1.0] * 8], *[None] * 8]
    plain, weighted = (
        ops_of(section(name), tmp_path / str(number), given)
        for number, given in enumerate((None, weights))
    )
    assert (plain["redi::sequence_loss"], plain["redi::linear_logprobs"]) == (1, 0)
    assert (weighted["redi::sequence_loss"], weighted["redi::linear_logprobs"]) == (0, 1)


def test_without_weight_bounded_redi_only_measures_incorrect_traces(tmp_path: Path) -> None:
    """One product for their tokens, as with `redi` at alpha 0."""
    ran = ops_of(section("bounded_redi", alpha=0.0), tmp_path, None)
    assert (ran["redi::signed_cross_entropy"], ran["redi::sequence_loss"]) == (1, 0)


def ops_of(of: ObjectiveConfig, folder: Path, weights: list[list[float] | None] | None) -> Any:
    """Counts of the ops that forward and backward of a pack run."""
    groups = np.repeat(range(5), 2)
    tokens = make_tokens(folder, PROMPTS, COMPLETIONS, SIGNS, groups, token_weights=weights)
    (batch, _) = packs_of(tokens, of, 1000)
    hidden = torch.cat([states_of(tokens, int(i)) for i in batch.sequence_ids]).float()
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with OpCounter() as ops:
        PackedLoss(of)(hidden, head, batch, StepTotals(5, 1)).loss.backward()
    return ops.ran


def test_dpo_before_any_step_is_ln_2(tmp_path: Path) -> None:
    """The margin is 0 if the reference is the policy."""
    tokens = make_tokens(tmp_path / "set", PROMPTS, COMPLETIONS, SIGNS, np.repeat(range(5), 2))
    of = section("dpo")
    (batch, _) = packs_of(tokens, of, 1000)
    hidden = torch.cat([states_of(tokens, int(i)) for i in batch.sequence_ids]).float()
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(1))
    totals = StepTotals(units=5, targets=1)
    logps = PackedLoss(of, torch.zeros(10))(hidden, head, batch, totals).sequence_logps
    reference = torch.empty(10)
    reference[batch.sequence_ids] = logps
    loss = PackedLoss(of, reference)(hidden, head, batch, totals).loss
    assert loss.item() == pytest.approx(math.log(2), rel=1e-7)


def test_redi_with_gamma_0_is_redi() -> None:
    assert formula(section("redi", negative_gamma=0.0)) == FORMULAS["redi"]


def test_another_objective_is_a_formula_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The square loss of a log-ratio, with DPO's keys: a formula and one declaration."""

    def square(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
        assert section.beta is not None
        positive, negative = pairs(sequences.logps - sequences.reference)
        return (positive - negative - 1 / (2 * section.beta)).square()

    monkeypatch.setitem(OBJECTIVES, "square", ObjectiveKind("margins", ("beta",), reference=True))
    monkeypatch.setitem(FORMULAS, "square", Formula(terms=square))
    path = tmp_path / "r.toml"
    path.write_text("[objective]\nname = 'square'\nbeta = 0.5\n")
    of = load_recipe(train_parser(), str(path), [str(path)]).objective
    tokens = make_tokens(tmp_path / "set", [2, 2], [7, 4], [1, -1], [0, 0])
    (batch, _) = packs_of(tokens, of, 100)
    hidden = torch.cat([states_of(tokens, int(i)) for i in batch.sequence_ids])
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective = PackedLoss(of, torch.tensor([-30.0, -20.0]).double())
    loss, logps, _ = objective(hidden, head, batch, StepTotals(units=1, targets=11))
    positive, negative = logps.tolist()
    assert loss.item() == pytest.approx((positive + 30 - negative - 20 - 1) ** 2, rel=1e-9)


def test_asymre_is_redi_with_another_alpha(tmp_path: Path) -> None:
    """PAPER: with r = +-1 and without length normalisation, alpha = (1 + V) / (1 - V)."""
    tokens = make_tokens(tmp_path / "set", [2, 2], [7, 7], [1, -1], [0, 0])
    baseline = -0.25
    asymre = section("signed", normalisation="none", positive_weight=1 - baseline)
    asymre = replace(asymre, alpha=1 + baseline)
    redi = replace(section("redi"), alpha=(1 + baseline) / (1 - baseline))
    losses = []
    for of, units in ((asymre, 2), (redi, 1)):
        (batch, _) = packs_of(tokens, of, 100)
        hidden = torch.cat([states_of(tokens, int(i)) for i in batch.sequence_ids])
        head = torch.randn(V, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        losses.append(PackedLoss(of)(hidden, head, batch, StepTotals(units, 14)).loss.item())
    assert losses[0] / (1 - baseline) * 2 / 7 == pytest.approx(losses[1], rel=1e-6)


def test_a_pair_with_a_margin_is_in_one_pack(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "set", PROMPTS, COMPLETIONS, SIGNS, np.repeat(range(5), 2))
    packs = packs_of(tokens, section("simpo"), 32)
    assert len(packs) > 3
    for batch in packs:
        ids = batch.sequence_ids[batch.sequence_ids >= 0].view(-1, 2)
        assert torch.equal(ids[:, 0] + 1, ids[:, 1])


def test_a_pair_longer_than_a_pack_is_an_input_error(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "set", PROMPTS, COMPLETIONS, SIGNS, np.repeat(range(5), 2))
    with pytest.raises(InputError, match=r"made.jsonl:5: its pair has 30 tokens.*row_tokens = 29"):
        packs_of(tokens, section("dpo"), 29)
    assert packs_of(tokens, section("redi"), 29)


USERS_MISTAKES = {
    "name = 'orpo'": "objective.beta is missing: orpo needs it",
    "name = 'bounded_redi'\ntemperature = 0.0": "objective.temperature must be > 0, got 0.0",
    "name = 'redi'\ntemperature = 2.0": "temperature is not used by redi (but by kd, bounded_redi, "
    "and with distill.weight)",
    "name = 'dpo'": "objective.beta is missing: dpo needs it; usual are values of 0.1 or less",
    "name = 'dpo'\nbeta = 0.0": "objective.beta must be > 0, got 0.0",
    "name = 'dpo'\nbeta = 0.1\nlabel_smoothing = 0.5": "label_smoothing must be in [0, 0.5)",
    "name = 'kto'": "objective.beta is missing: kto needs it; usual are values of 0.1 or less",
    "name = 'kto'\nbeta = 0.1\nalpha = 0.5": "objective.alpha is not used by kto",
    "name = 'kto'\nbeta = 0.1\nundesirable_weight = -1.0": (
        "objective.undesirable_weight must be >= 0"
    ),
    "name = 'redi'\nbeta = 0.1": "objective.beta is not used by redi (but by simpo, orpo, dpo,",
    "name = 'sft'\nalpha = 0.5": "objective.alpha is not used by sft",
    "name = 'simpo'\nbeta = 2.0\nmargin = inf": "objective.margin must be finite",
    "name = 'dpo'\nbeta = 1.0\nnormalisation = 'token'": "normalisation must be sequence for dpo",
    "name = 'simpoo'": "objective.name: simpoo is unknown; available: sft, redi, signed,",
    "name = 'dft'\nnormalisation = 'token'\nlength = 'original'": (
        'length = "original" is not used with objective.normalisation = "token"'
    ),
}


@pytest.mark.parametrize("text", USERS_MISTAKES)
def test_a_parameter_that_is_missing_or_unused_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f"[objective]\n{text}\n")
    with pytest.raises(InputError) as caught:
        load_recipe(train_parser(), str(path), [str(path)])
    assert USERS_MISTAKES[text] in str(caught.value)


def test_an_override_must_mean_something_to_one_of_the_recipes(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sft = recipe("sft", {"objective.name": "sft"})
    assert main(["train", str(sft), "--objective.alpha", "0.5"]) == 2
    assert "objective.alpha is not used by sft" in capsys.readouterr().err
    argv = [str(sft), "--objective.alpha", "0.5"]
    assert load_recipe(train_parser(), str(sft), argv).objective.alpha == 0.8


def test_incorrect_traces_alone_train_and_log_no_log_prob_of_correct_ones(
    recipe: Callable[..., Path], world: Path, tmp_path: Path, steps: Callable[[Path], list[Any]]
) -> None:
    """NSR on a set without a correct trace."""
    rows = [json.loads(line) for line in (world / "traces.jsonl").read_text().splitlines()]
    for row in rows:
        row["traces"] = [trace for trace in row["traces"] if not trace["correct"]]
    data = tmp_path / "incorrect.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows if row["traces"]))
    changes = {"objective.name": "signed", "data.path": str(data), "train.max_steps": 2}
    assert main(["train", str(recipe("run", changes))]) == 0
    for line in steps(tmp_path / "run"):
        assert line["positive_logp"] is None
        assert line["loss"] == pytest.approx(0.8 * line["negative_logp"], rel=1e-5)
