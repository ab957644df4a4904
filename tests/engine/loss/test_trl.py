"""Objectives against TRL's loss code on the same log-probs, if TRL is installed."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from redi.engine.config.sections import ObjectiveConfig
from redi.engine.loss.objectives import FORMULAS, Sequences

pytest.importorskip("trl", reason="the extra 'trl' is not installed")

PAIRS = 6


@pytest.fixture
def logps() -> Tensor:
    """Log-prob sums: positive, negative, positive, ...; some margins saturate the sigmoid."""
    return -torch.rand(2 * PAIRS, generator=torch.Generator().manual_seed(0)).double() * 60


def ours(section: ObjectiveConfig, logps: Tensor, reference: Tensor | None) -> Tensor:
    terms = FORMULAS[section.name].terms
    assert terms is not None
    signs = torch.tensor([1, -1] * PAIRS)
    lengths = torch.arange(1.0, 2 * PAIRS + 1)
    return terms(section, Sequences(logps, lengths, signs, reference))


def test_simpo_is_trl(logps: Tensor) -> None:
    from trl.experimental.cpo import CPOTrainer

    section = ObjectiveConfig(name="simpo", beta=2.0, margin=1.0)
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=1.0,
        loss_type="simpo",
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    means = logps / torch.arange(1.0, 2 * PAIRS + 1)
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, means[::2], means[1::2])
    torch.testing.assert_close(ours(section, logps, None), theirs)


def test_orpo_is_trl(logps: Tensor) -> None:
    """TRL's loss is its mean nll less the mean of `odds_ratio_loss`, here pair by pair."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    means = logps / torch.arange(1.0, 2 * PAIRS + 1)
    bonus, *_ = ORPOTrainer.odds_ratio_loss(trainer, means[::2], means[1::2])
    found = ours(ObjectiveConfig(name="orpo", beta=0.4), logps, None)
    torch.testing.assert_close(found, -means[::2] - bonus.double(), rtol=1e-5, atol=1e-6)


# The name of the loss in TRL, and the label smoothing. For a single pair TRL's "aot", the only one
# of its losses that smooths labels as DPO does, is that of DPO.
TRL_LOSSES = {
    "dpo": ("sigmoid", 0.0),
    "dpo-smoothed": ("aot", 0.1),
    "robust_dpo": ("robust", 0.1),
    "hinge": ("hinge", 0.0),
    "ipo": ("ipo", 0.0),
    "apo_zero": ("apo_zero", 0.0),
}


@pytest.mark.parametrize("case", TRL_LOSSES)
def test_losses_with_a_reference_are_trl(case: str, logps: Tensor) -> None:
    from trl import DPOTrainer

    loss_type, smoothing = TRL_LOSSES[case]
    section = ObjectiveConfig(name=case.split("-")[0], beta=0.1, label_smoothing=smoothing)
    reference = logps.flip(0) * 0.9
    theirs = []
    for pair in range(PAIRS):
        both = slice(2 * pair, 2 * pair + 2)
        # The trace's log-prob is that of its first token; the others have 0.
        count = 2 * PAIRS
        log_probs = torch.zeros(2, count, dtype=torch.float64)
        log_probs[:, 0] = logps[both]
        lengths = torch.tensor([[2 * pair + 1], [2 * pair + 2]])
        mask = torch.arange(-1, count)[None] < lengths
        mask[:, 0] = False
        trainer = stand_in(section, loss_type, log_probs)
        inputs = {
            "input_ids": torch.ones(2, count + 1, dtype=torch.long),
            "attention_mask": torch.ones(2, count + 1, dtype=torch.long),
            "completion_mask": mask.long(),
            "ref_chosen_logps": reference[both][:1],
            "ref_rejected_logps": reference[both][1:],
        }
        theirs.append(DPOTrainer._compute_loss(trainer, trainer.model, inputs, False))
    found = ours(section, logps, reference)
    if case == "apo_zero":  # a sum of terms of single traces
        found = found[::2] + found[1::2]
    torch.testing.assert_close(found, torch.stack(theirs))


@pytest.mark.parametrize("moved", [0.7, -0.7], ids=["away", "closer"])
def test_kto_is_trl(moved: float, logps: Tensor) -> None:
    """The loss of six correct and six incorrect traces with its gradient; z is 0 if negative."""
    from trl import KTOTrainer

    section = ObjectiveConfig(name="kto", beta=0.1, desirable_weight=1.5, undesirable_weight=0.6)
    reference = logps.flip(0) * 0.9
    mismatched = reference * 0.8
    given = {
        "label": torch.tensor([True, False] * PAIRS),
        "ref_logps": reference,
        "ref_KL_logps": mismatched - moved,
    }
    leaf = logps.clone().requires_grad_()
    for prefix, values in (("", leaf), ("KL_", mismatched)):
        # The trace's log-prob is that of its only token.
        given[f"{prefix}input_ids"] = torch.stack([torch.zeros_like(values), values], 1)
        given[f"{prefix}attention_mask"] = torch.ones(2 * PAIRS, 2)
        given[f"{prefix}completion_mask"] = torch.tensor([[0, 1]] * (2 * PAIRS))

    class Model:
        training = True

        def __call__(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
            values = input_ids[:, 1:]
            return SimpleNamespace(log_probs=values, entropy=values, mean_logits=values)

    model = Model()
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=model,
        accelerator=accelerator,
        aux_loss_enabled=False,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=0.1,
        desirable_weight=1.5,
        undesirable_weight=0.6,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    theirs = KTOTrainer._compute_loss(trainer, model, given, False)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)
    kl = torch.tensor(trainer._metrics["train"]["kl"][0]).double()
    assert kl.item() == pytest.approx(max(moved, 0))
    signs = torch.tensor([1, -1] * PAIRS)
    sequences = Sequences(leaf, torch.ones(2 * PAIRS), signs, reference, kl)
    terms = FORMULAS["kto"].terms
    assert terms is not None
    found = terms(section, sequences).mean()
    (gradient,) = torch.autograd.grad(found, leaf)
    torch.testing.assert_close(found, theirs)
    torch.testing.assert_close(gradient, their_gradient)


def stand_in(section: ObjectiveConfig, loss_type: str, log_probs: Tensor) -> SimpleNamespace:
    """The attributes of a trainer that TRL's DPO loss reads; its model has log-probs [2, T]."""
    outputs = SimpleNamespace(
        log_probs=log_probs,
        entropy=torch.zeros_like(log_probs),
        mean_logits=torch.zeros_like(log_probs),
        is_top1=torch.zeros_like(log_probs, dtype=torch.bool),
    )
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    )

    class Model:
        training = True

        def __call__(self, **_: object) -> SimpleNamespace:
            return outputs

    return SimpleNamespace(
        model=Model(),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=section.beta,
        label_smoothing=section.label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
