"""Chooses texts that differ from each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def farthest_first(texts: Sequence[str], count: int) -> list[int]:
    """Indices of `count` texts (all, if there are fewer), in the order chosen.

    The first text is chosen first. Each next one is the text whose smallest distance to the chosen
    ones is largest (greedy farthest-point selection); of equal distances the first. The distance of
    two texts is the number of characters that turn one into the other by insertion and deletion,
    divided by the characters of both: 0 for equal texts, 1 for texts without a common character.
    """
    from rapidfuzz.distance import Indel  # imported late: only the extra `engine` has it
    from rapidfuzz.process import cdist

    if len(texts) <= count:
        return list(range(len(texts)))
    chosen = [0]
    nearest = np.full(len(texts), np.inf)
    while len(chosen) < count:
        found = cdist([texts[chosen[-1]]], texts, scorer=Indel.normalized_distance, workers=-1)
        nearest = np.minimum(nearest, found[0])
        nearest[chosen] = -1
        chosen.append(int(np.argmax(nearest)))
    return chosen
