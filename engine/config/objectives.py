"""What each objective is called, which keys it reads and what it draws.

The formulas are in `loss/objectives.py`. They need torch; recipes are checked before torch is
imported, and by this table alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

UnitKind = Literal["positives", "traces", "pairs", "margins"]
"""What the schedule draws: correct traces, all traces, pairs whose traces are packed independently,
or pairs that stay in one pack because their loss depends on both."""


@dataclass(frozen=True)
class ObjectiveKind:
    """What a recipe and the schedule need to know of an objective."""

    units: UnitKind
    parameters: tuple[str, ...]
    """The keys of `[objective]` that only some objectives read."""
    normalisations: tuple[str, ...] = ("sequence",)
    """The values of `normalisation` it accepts; one value if the formula fixes the mean."""
    reference: bool = False
    """True if it needs the log-probs of the model before step 1."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of `[objective]` that it reads."""
        mean = ("normalisation",) if len(self.normalisations) > 1 else ()
        return ("name", "backend", *self.parameters, *mean)


OBJECTIVES = {
    "sft": ObjectiveKind("positives", ("length", "filter_epsilon"), ("sequence", "token")),
    "redi": ObjectiveKind("pairs", ("alpha", "negative_gamma", "length", "filter_epsilon")),
    "signed": ObjectiveKind(
        "traces", ("alpha", "positive_weight", "length"), ("sequence", "token", "none")
    ),
    "dft": ObjectiveKind("positives", ("length",), ("sequence", "token")),
    "unlikelihood": ObjectiveKind("pairs", ("alpha", "length")),
    "simper": ObjectiveKind("pairs", ("length",)),
    "simpo": ObjectiveKind("margins", ("beta", "margin", "length")),
    "dpo": ObjectiveKind("margins", ("beta", "label_smoothing"), reference=True),
}
