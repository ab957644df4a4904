"""The objectives by name: the recipe keys that each one reads and the units that it trains on.

The formulas are in `loss/objectives.py` and need torch. A recipe is checked against this table
alone, before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

UnitKind = Literal["positives", "traces", "pairs", "margins"]
"""The units of training: correct traces, all traces, pairs whose traces are packed independently,
or pairs that stay in one pack because their loss depends on both traces."""


@dataclass(frozen=True)
class ObjectiveKind:
    """The properties of an objective that a recipe and the schedule depend on."""

    units: UnitKind
    parameters: tuple[str, ...]
    """The keys of `[objective]` that only some objectives read."""
    normalisations: tuple[str, ...] = ("sequence",)
    """The values of `normalisation` it accepts; one value if the formula fixes the mean."""
    exponential: bool = False
    """True if the loss has the exponential of mean log-probs, which must not be above 0."""
    reference: bool = False
    """True if the loss needs the log-probs of the model as it was before step 1."""
    mismatched: bool = False
    """True if the loss needs log-probs of completions after prompts of other problems."""
    distills: bool = False
    """True if `[distill] weight` may add a divergence from a teacher."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of `[objective]` that it reads."""
        mean = ("normalisation",) if len(self.normalisations) > 1 else ()
        return ("name", "backend", *self.parameters, *mean)


DIVERGENCE = ("direction", "temperature", "tail", "skew")
"""The keys of a divergence from a teacher's distributions."""

OBJECTIVES = {
    "sft": ObjectiveKind(
        "positives", ("length", "filter_epsilon"), ("sequence", "token"), distills=True
    ),
    "redi": ObjectiveKind(
        "pairs", ("alpha", "negative_gamma", "length", "filter_epsilon"), distills=True
    ),
    "signed": ObjectiveKind(
        "traces",
        ("alpha", "positive_weight", "length"),
        ("sequence", "token", "none"),
        distills=True,
    ),
    "kd": ObjectiveKind(
        "traces", ("alpha", "ce_weight", "length", *DIVERGENCE), ("sequence", "token", "none")
    ),
    "dft": ObjectiveKind("positives", ("length",), ("sequence", "token")),
    "unlikelihood": ObjectiveKind("pairs", ("alpha", "length")),
    "bounded_redi": ObjectiveKind("pairs", ("alpha", "temperature", "length"), exponential=True),
    "simper": ObjectiveKind("pairs", ("length",), exponential=True),
    "sft_simper": ObjectiveKind("pairs", ("alpha", "length"), exponential=True),
    "topr": ObjectiveKind("pairs", ("alpha", "length"), reference=True),
    "simpo": ObjectiveKind("margins", ("beta", "margin", "length")),
    "orpo": ObjectiveKind("margins", ("beta", "length"), exponential=True),
    "dpo": ObjectiveKind("margins", ("beta", "label_smoothing"), reference=True),
    "robust_dpo": ObjectiveKind("margins", ("beta", "label_smoothing"), reference=True),
    "hinge": ObjectiveKind("margins", ("beta",), reference=True),
    "ipo": ObjectiveKind("margins", ("beta", "length"), reference=True),
    "apo_zero": ObjectiveKind("pairs", ("beta",), reference=True),
    "apo_zero_unpaired": ObjectiveKind("traces", ("beta",), reference=True),
    "kto": ObjectiveKind(
        "traces",
        ("beta", "desirable_weight", "undesirable_weight"),
        reference=True,
        mismatched=True,
    ),
}
