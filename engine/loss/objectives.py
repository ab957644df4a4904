"""The formulas of the objectives.

`config/objectives.py` declares each objective's name, keys and units. Its formula is one of three
kinds:

    weights     the weights of the log-probs of correct and of incorrect traces, known before the
                forward pass. It takes one fused pass of three matrix products. With `coefficient`
                the loss of a token may also depend on its own log-prob, at the same cost.
    exponential the weights of the mean log-probs of traces and of their exponentials. It takes one
                fused pass of three products too, unless spans weight tokens.
    terms       a function from the sequences' log-probs (`Sequences`) to the loss of each sequence
                or pair. The log-probs are computed first, then a backward scaled per sequence.

`packed_loss.py` computes a pack's share of the step's loss from any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from redi.engine.config.sections import ObjectiveConfig
from redi.kernels import Coefficient


@dataclass(frozen=True)
class Sequences:
    """The input of a formula of sequence log-probs: the sequences of a pack.

    With units "margins" a pack holds whole pairs only: sequence 2 i is the positive of pair i,
    sequence 2 i + 1 its negative.
    """

    logps: Tensor
    """[S]: log p(y_s | x), sums over tokens by their weights, differentiable."""
    lengths: Tensor
    """float32 [S]: |y_s|, at least 1."""
    signs: Tensor
    """int64 [S]: +1, -1, or 0 for a dummy."""
    reference: Tensor | None
    """[S]: the same sums under the reference model; None if the objective has no reference."""
    kl: Tensor | None = None
    """float64 scalar, see `StepTotals`; None if the objective has no mismatched rows."""

    @property
    def means(self) -> Tensor:
        """[S]: mean log-prob per token."""
        return self.logps / self.lengths


class ExponentialWeights(NamedTuple):
    """The loss - (a m + b tau exp(m / tau)) of a trace with mean log-prob m, by its verdict."""

    linear: tuple[float, float]
    """a of correct and of incorrect traces."""
    exponential: tuple[float, float]
    """b, likewise."""
    temperature: float = 1.0
    """tau."""

    def terms(self, sequences: Sequences) -> Tensor:
        """[S]: the loss of each sequence."""
        means, positive = sequences.means, sequences.signs > 0
        linear, exponential = (
            means.new_tensor(pair[1]).where(~positive, pair[0])
            for pair in (self.linear, self.exponential)
        )
        tau = self.temperature
        return -(linear * means + exponential * tau * (means / tau).exp())


@dataclass(frozen=True)
class Formula:
    """The formula of an objective: one of `weights`, `exponential` and `terms` is set."""

    weights: Callable[[ObjectiveConfig], tuple[float, float]] | None = None
    """Weights of the log-probs of correct and of incorrect traces."""
    coefficient: Coefficient = "weight"
    """See `redi.kernels.signed_cross_entropy`."""
    exponential: Callable[[ObjectiveConfig], ExponentialWeights] | None = None
    terms: Callable[[ObjectiveConfig, Sequences], Tensor] | None = None
    """Returns [S], or [S / 2] for units "margins"."""


def _positives(section: ObjectiveConfig) -> tuple[float, float]:
    """Correct traces only."""
    return 1.0, 0.0


def _redi(section: ObjectiveConfig) -> tuple[float, float]:
    """Correct traces with weight 1, incorrect ones with -alpha (arXiv 2505.24850)."""
    return 1.0, -section.alpha


def _signed(section: ObjectiveConfig) -> tuple[float, float]:
    """A weight for correct and one for incorrect traces.

    AsymRE (arXiv 2506.20520) with baseline V has positive_weight 1 - V and alpha 1 + V; NSR and
    PSR (arXiv 2506.01347) set one of the two to 0.
    """
    return section.positive_weight, -section.alpha


def _discounted_redi(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
    """REDI with each negative's term multiplied by exp(gamma * mean log-prob), not detached.

    An option of the authors' code. The less likely a negative is, the weaker its gradient.
    """
    means = sequences.means
    negative = section.alpha * means * (section.negative_gamma * means).exp()
    return (-means).where(sequences.signs > 0, negative)


def _bounded_redi(section: ObjectiveConfig) -> ExponentialWeights:
    """REDI with tau exp(mean log-prob / tau) in place of an incorrect trace's mean log-prob.

    Its gradient is REDI's times exp(mean / tau): the less likely a negative is, the weaker. The
    term is bounded by alpha tau from above and by 0 from below. As tau grows it approaches REDI's.
    """
    return ExponentialWeights((1.0, 0.0), (0.0, -section.alpha), section.temperature)


def _simper(section: ObjectiveConfig) -> ExponentialWeights:
    """-exp(mean log-prob) for a positive, +exp for a negative (SimPER, arXiv 2502.00883)."""
    return ExponentialWeights((0.0, 0.0), (1.0, -1.0))


def _sft_simper(section: ObjectiveConfig) -> ExponentialWeights:
    """Imitation plus alpha times SimPER: -mean_w - alpha exp(mean_w) + alpha exp(mean_l).

    What both traces share has the weight 1 + alpha (exp(mean_w) - exp(mean_l)): at least that of
    imitation while the positive is the likelier one.
    """
    return ExponentialWeights((1.0, 0.0), (section.alpha, -section.alpha))


def _topr(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
    """REDI with each negative's term multiplied by min(1, p/p_ref), detached.

    The taper of TOPR (arXiv 2503.14286, with its limits 0 and 1): a negative that has
    become less likely than under the reference is pushed less. Log-probs are means per token.
    """
    assert sequences.reference is not None
    taper = (sequences.logps.detach() - sequences.reference).clamp(max=0).exp()
    means = sequences.means
    return (-means).where(sequences.signs > 0, section.alpha * taper * means)


def _orpo(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
    """-mean_w - beta log sigmoid(log odds_w - log odds_l) (ORPO, arXiv 2403.07691).

    The odds p / (1 - p) are those of p = exp(mean log-prob). 1 - p counts as at least 2^-100.
    """
    assert section.beta is not None
    means = sequences.means
    log_odds = means - (-means.expm1()).clamp(min=2.0**-100).log()
    positive, negative = pairs(log_odds)
    return -pairs(means)[0] - section.beta * logsigmoid(positive - negative)


def _simpo(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
    """-log sigmoid(beta (mean_w - mean_l) - margin) (SimPO, arXiv 2405.14734, equation 6)."""
    assert section.beta is not None
    positive, negative = pairs(sequences.means)
    return -logsigmoid(section.beta * (positive - negative) - section.margin)


def _dpo(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) with label smoothing e.

    h is `_log_ratios` (arXiv 2305.18290, equation 7; smoothing as in its reference code).
    """
    assert section.beta is not None
    logits = section.beta * _log_ratios(sequences)
    smoothing = section.label_smoothing
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def _robust_dpo(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
    """DPO's loss without the bias of swapped labels, a share e (arXiv 2403.00409).

    (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e).
    """
    assert section.beta is not None
    logits = section.beta * _log_ratios(sequences)
    swapped = section.label_smoothing
    loss = -(1 - swapped) * logsigmoid(logits) + swapped * logsigmoid(-logits)
    return loss / (1 - 2 * swapped)


def _hinge(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
    """max(0, 1 - beta h): a pair with a margin of 1 / beta is done (as in arXiv 2309.06657)."""
    assert section.beta is not None
    return (1 - section.beta * _log_ratios(sequences)).relu()


def _ipo(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
    """(h - 1 / (2 beta))^2 with h of means per token (IPO, arXiv 2310.12036, equation 17).

    The paper has sums; TRL's note names means as what its authors ran.
    """
    assert section.beta is not None
    assert sequences.reference is not None
    positive, negative = pairs((sequences.logps - sequences.reference) / sequences.lengths)
    return (positive - negative - 1 / (2 * section.beta)).square()


def _apo_zero(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
    """sigmoid(-beta r) for a positive, sigmoid(beta r) for a negative, r = log p/p_ref.

    APO-zero (arXiv 2408.06266, equation 7) is a sum of terms of single traces, so they need not be
    in one pack, nor paired.
    """
    assert section.beta is not None
    assert sequences.reference is not None
    ratios = sequences.logps - sequences.reference
    return (-section.beta * sequences.signs * ratios).sigmoid()


def _kto(section: ObjectiveConfig, sequences: Sequences) -> Tensor:
    """w (1 - sigmoid(beta s (r - z))) with r = log p/p_ref, a trace's sign s and its weight w.

    KTO (arXiv 2402.01306, equation 7); z is that of `estimate_kl`.
    """
    assert section.beta is not None
    assert sequences.reference is not None
    assert sequences.kl is not None
    ratios = sequences.logps - sequences.reference
    desirable = ratios.new_tensor(section.desirable_weight)
    weights = desirable.where(sequences.signs > 0, section.undesirable_weight)
    return weights * (-section.beta * sequences.signs * (ratios - sequences.kl)).sigmoid()


def _log_ratios(sequences: Sequences) -> Tensor:
    """h, [S / 2]: log p/p_ref of the positive minus that of the negative, sums over tokens."""
    assert sequences.reference is not None
    positive, negative = pairs(sequences.logps - sequences.reference)
    return positive - negative


def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """[S] of whole pairs -> [S / 2] of the positives and of the negatives; drops a dummy."""
    whole = values[: values.shape[0] // 2 * 2].view(-1, 2)
    return whole[:, 0], whole[:, 1]


FORMULAS = {
    "sft": Formula(_positives),
    "redi": Formula(_redi),
    "signed": Formula(_signed),
    "kd": Formula(_redi),  # of the divergence from a teacher
    "dft": Formula(_positives, "dft"),
    "unlikelihood": Formula(_redi, "unlikelihood"),
    "bounded_redi": Formula(exponential=_bounded_redi),
    "simper": Formula(exponential=_simper),
    "sft_simper": Formula(exponential=_sft_simper),
    "topr": Formula(terms=_topr),
    "simpo": Formula(terms=_simpo),
    "orpo": Formula(terms=_orpo),
    "dpo": Formula(terms=_dpo),
    "robust_dpo": Formula(terms=_robust_dpo),
    "hinge": Formula(terms=_hinge),
    "ipo": Formula(terms=_ipo),
    "apo_zero": Formula(terms=_apo_zero),
    "apo_zero_unpaired": Formula(terms=_apo_zero),
    "kto": Formula(terms=_kto),
}
_DISCOUNTED_REDI = Formula(terms=_discounted_redi)


def formula(section: ObjectiveConfig) -> Formula:
    """The formula of a recipe's objective."""
    if section.name == "redi" and section.negative_gamma:
        return _DISCOUNTED_REDI
    if section.alpha == 0 and section.name in ("bounded_redi", "sft_simper"):
        return FORMULAS["redi"]  # incorrect traces are only measured, in one product
    return FORMULAS[section.name]
