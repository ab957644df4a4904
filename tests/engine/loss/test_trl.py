"""DPO and SimPO against TRL's own loss code on the same log-probs, where TRL is installed."""

from collections import defaultdict
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
    """Sums of log-probs: positive, negative, positive, ...; some margins saturate the sigmoid."""
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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_is_trl(smoothing: float, logps: Tensor) -> None:
    from trl import DPOTrainer

    section = ObjectiveConfig(name="dpo", beta=0.1, label_smoothing=smoothing)
    reference = logps.flip(0) * 0.9
    theirs = []
    for pair in range(PAIRS):
        both = slice(2 * pair, 2 * pair + 2)
        trainer = stand_in(section, logps[both, None])
        inputs = {
            "input_ids": torch.ones(2, 2, dtype=torch.long),
            "attention_mask": torch.ones(2, 2, dtype=torch.long),
            "completion_mask": torch.tensor([[0, 1], [0, 1]]),
            "ref_chosen_logps": reference[both][:1],
            "ref_rejected_logps": reference[both][1:],
        }
        theirs.append(DPOTrainer._compute_loss(trainer, trainer.model, inputs, False))
    torch.testing.assert_close(ours(section, logps, reference), torch.stack(theirs))


def stand_in(section: ObjectiveConfig, log_probs: Tensor) -> SimpleNamespace:
    """What TRL's DPO loss reads of its trainer, with a model that has these log-probs [2, 1].

    For a single pair TRL's "aot", the only one of its losses that smooths labels as DPO does, is
    that of DPO.
    """
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
        loss_types=["aot" if section.label_smoothing else "sigmoid"],
        loss_weights=[1.0],
        beta=section.beta,
        label_smoothing=section.label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
