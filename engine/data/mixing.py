"""How often the units of each path are drawn: `[data] mixing_weights`.

A path's units form an endless stream of passes, each over all of them in an order of its own. An
epoch takes the next stretch of every path's stream, weight x units long, and the stretches are
shuffled together (`Schedule`). So a unit is drawn again only when all others of its path have been:
weight 0.5 takes one half in one epoch and the other half in the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.sources import find_sources
from redi.engine.errors import InputError

MOST_DRAWS = 1 << 30
"""Of a path in an epoch; the order of an epoch lies in memory, 8 bytes a draw."""


@dataclass(frozen=True, slots=True, eq=False)
class MixedPath:
    """One entry of `[data] path`, and what an epoch takes of it."""

    path: str
    """As the recipe has it: a file, a folder or a hub name."""
    weight: float
    units: np.ndarray
    """int64 [n], rising: the units that come from here."""
    draws: int
    """Of them in an epoch: weight * n, rounded."""


def mix(
    tokens: TokenizedTraces, units: np.ndarray, paths: Sequence[str], weights: Sequence[float]
) -> tuple[MixedPath, ...]:
    """What an epoch takes of each path.

    Args:
        tokens: the traces of `paths`.
        units: int64 [n, 1] or [n, 2], indices of traces. A unit comes from the path of its first
            trace, which of a pair is the positive.
        paths: files, folders (each one path, however many files it holds) and hub names.
        weights: one a path, finite and > 0; or none, and nothing is mixed: the result is empty.

    Raises InputError for a weight by which an epoch draws nothing of a path, or far too much. A
    path of weight 1 may give no unit, as it may without weights.
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
        if weight * len(own) > MOST_DRAWS:
            raise InputError(f"{product} are more than {MOST_DRAWS:,} draws an epoch: lower it")
        draws = round(weight * len(own))
        if not draws and weight != 1:
            remedy = "raise it" if len(own) else "set it to 1"
            raise InputError(f"{product} are no draw: {remedy}, or leave the path out")
        mixture.append(MixedPath(path, weight, own, draws))
    return tuple(mixture)


@lru_cache(maxsize=4)
def epoch_draws(mixture: tuple[MixedPath, ...], seed: int, epoch: int) -> np.ndarray:
    """The units that an epoch draws, each as often as it does, int64 [draws], rising.

    Where all weights are 1 these are all units: their order is then that of an unmixed run.
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
    """Places `start` to `start + draws` of a stream of passes over `count` units, int64 [draws].

    A pass that lies within the stretch whole comes unshuffled: what shuffles the epoch follows.
    """
    end = start + draws
    parts = []
    for turn in range(start // count, -(-end // count)):
        first, last = max(start - turn * count, 0), min(end - turn * count, count)
        if last - first == count:
            parts.append(np.arange(count))
        else:
            # The key sets these streams apart from each other and from the epochs' own orders.
            own = np.random.SeedSequence([seed, turn], spawn_key=(number,))
            parts.append(permutation(count, own)[first:last])
    return np.concatenate(parts)


def permutation(count: int, seed: np.random.SeedSequence) -> np.ndarray:
    """0 to count - 1 in an order that is the same in every version of numpy, int64 [count]."""
    # Sorted raw bits, not Generator.permutation: numpy promises the stream of bits for every
    # version, but not what Generator makes of it, and a resume may meet another numpy.
    bits = np.random.PCG64(seed).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64)
