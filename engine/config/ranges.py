"""Ranges of numbers: declared in the metadata of a field, checked by `check_ranges`."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    """Exclude the lower bound itself."""
    open_high: bool = False
    """Exclude the upper bound itself."""

    def problem(self, value: float) -> str | None:
        """What `value` must be, or None if it is in the range."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        is_finite = isinstance(value, int) or math.isfinite(value)  # an int may be too large
        if is_finite and above and below:
            return None
        if self.high < math.inf:
            left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
            return f"be in {left}{self.low:g}, {self.high:g}{right}"
        bound = f"{'>' if self.open_low else '>='} {self.low:g}" if self.low > -math.inf else ""
        finite = "" if is_finite else "finite"
        return f"be {' and '.join(filter(None, (finite, bound)))}"


FINITE = Range()
POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
AT_LEAST_1 = Range(1)
SHARE = Range(0, 1)


def ranged(default: Any, allowed: Range) -> Any:
    """A dataclass field with a range. If None is allowed, it is in every range."""
    return field(default=default, metadata=in_range(allowed))


def in_range(allowed: Range) -> dict[str, Range]:
    """The metadata of a field whose value (or each of its values) must be in a range."""
    return {"range": allowed}


def check_ranges(section: Any, prefix: str = "") -> None:
    """Check every number of a dataclass, including those in lists, tuples and dict values.

    Args:
        section: an instance of a dataclass with fields made by `ranged`.
        prefix: put before a field's name in the message, such as "train.".

    Raises:
        ValueError: a number is out of range; the message names field, range and value.
    """
    for declared in fields(section):
        if (allowed := declared.metadata.get("range")) is None:
            continue
        for name, value in _numbers(declared, getattr(section, declared.name)):
            if problem := allowed.problem(value):
                raise ValueError(f"{prefix}{name} must {problem}, got {value}")


def _numbers(declared: Field[Any], value: Any) -> list[tuple[str, float]]:
    if value is None or isinstance(value, str):  # a word in place of a number, such as "auto"
        return []
    if isinstance(value, dict):
        return [(f"{declared.name}.{key}", number) for key, number in value.items()]
    if isinstance(value, list | tuple):
        return [(declared.name, number) for number in value]
    return [(declared.name, value)]
