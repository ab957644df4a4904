"""How often an epoch draws the units of each path: `[data] mixing_weights`.

The units of a path form an endless stream of passes; each pass has all units in a different order.
An epoch takes the next stretch of each path's stream, weight x units long. `Schedule` shuffles the
stretches together. A unit is thus drawn again only after all other units of its path: weight 0.5
takes one half in one epoch and the other half in the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.sources import find_sources
from redi.engine.errors import InputError

MAX_DRAWS = 1 << 30
"""Per path and epoch; the order of an epoch is held in memory, 8 bytes per draw."""


@dataclass(frozen=True, slots=True, eq=False)
class MixedPath:
    """One entry of `[data] path`, and the number of draws from it."""

    path: str
    """As written in the recipe: a file, a folder or a hub name."""
    weight: float
    units: np.ndarray
    """int64 [n], ascending: the units of this path."""
    draws: int
    """Draws per epoch: weight * n, rounded."""


def mix(
    tokens: TokenizedTraces, units: np.ndarray, paths: Sequence[str], weights: Sequence[float]
) -> tuple[MixedPath, ...]:
    """Assign the units to the paths, and compute how many draws an epoch takes of each.

    Args:
        tokens: the traces of `paths`.
        units: int64 [n, 1] or [n, 2], indices of traces. A unit belongs to the path of its first
            trace, which is the positive in a pair.
        paths: files, folders (one path each, with any number of files) and hub names.
        weights: one per path, finite and > 0. If empty, the result is empty: nothing is mixed.

    Raises:
        InputError: with its weight an epoch draws nothing of a path, or more than MAX_DRAWS. A path
            of weight 1 may have no units, as without weights.
    """
    if not weights:
        return ()
    files = [len(find_sources([path])) for path in paths]
    path_of_file = np.repeat(np.arange(len(paths)), files)
    path_of_unit = path_of_file[tokens.source_numbers[units[:, 0]]]
    mixture = []
    for number, (path, weight) in enumerate(zip(paths, weights, strict=True)):
        own = np.flatnonzero(path_of_unit == number)
        product = (
            f"{path}: [data] mixing_weights {weight:g} times {len(own)} units (sequences, or pairs "
            "by their correct trace)"
        )
        if weight * len(own) > MAX_DRAWS:
            raise InputError(f"{product} are more than {MAX_DRAWS:,} draws per epoch: lower it")
        draws = round(weight * len(own))
        if not draws and weight != 1:
            remedy = "raise it" if len(own) else "set it to 1"
            raise InputError(f"{product} give no draw: {remedy}, or remove the path")
        mixture.append(MixedPath(path, weight, own, draws))
    return tuple(mixture)


@lru_cache(maxsize=4)
def epoch_draws(mixture: tuple[MixedPath, ...], seed: int, epoch: int) -> np.ndarray:
    """The units that an epoch draws, repeated as often as drawn, int64 [draws], ascending.

    If all weights are 1 these are all units, and the order is the same as without weights.
    """
    stretches = [
        mixed.units[_stretch(len(mixed.units), epoch * mixed.draws, mixed.draws, seed, number)]
        for number, mixed in enumerate(mixture)
        if mixed.draws
    ]
    draws = np.sort(np.concatenate(stretches))
    draws.flags.writeable = False
    return draws


def _stretch(count: int, start: int, draws: int, seed: int, number: int) -> np.ndarray:
    """Positions `start` to `start + draws` of a stream of passes over `count` units, int64 [draws].

    A pass that the stretch contains completely is not shuffled here: the epoch is shuffled later.
    """
    end = start + draws
    parts = []
    for turn in range(start // count, -(-end // count)):
        first, last = max(start - turn * count, 0), min(end - turn * count, count)
        if last - first == count:
            parts.append(np.arange(count))
        else:
            # The key makes these streams differ from each other and from the orders of the epochs.
            own = np.random.SeedSequence([seed, turn], spawn_key=(number,))
            parts.append(permutation(count, own)[first:last])
    return np.concatenate(parts)


def permutation(count: int, seed: np.random.SeedSequence) -> np.ndarray:
    """Shuffle 0 to count - 1, in the same order with every version of numpy, int64 [count]."""
    # Sorted raw bits, not Generator.permutation: numpy guarantees the same bits in every version,
    # but not the same results of Generator, and a run may resume with another version of numpy.
    bits = np.random.PCG64(seed).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64)
