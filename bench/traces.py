"""Traces in memory, where a benchmark or a check needs no file."""

from collections.abc import Sequence

import numpy as np


class InMemoryTraces:
    """Traces with the interface of a tokenized set that packing reads; all weights are 1.

    Args:
        ids: token ids of each trace, prompt and completion.
        prompt_lengths: int64 [n].
        signs: int [n], +1 or -1.
    """

    def __init__(
        self, ids: Sequence[np.ndarray], prompt_lengths: np.ndarray, signs: np.ndarray
    ) -> None:
        self._ids = ids
        self.lengths = np.array([len(trace) for trace in ids])
        self.prompt_lengths = prompt_lengths
        self.signs = signs
        self.weights = np.ones(len(ids), np.float32)
        self.weighted = np.zeros(len(ids), bool)
        numbers: dict[bytes, int] = {}
        prompts = [trace[:end].tobytes() for trace, end in zip(ids, prompt_lengths, strict=True)]
        self.prompt_digests = np.array([numbers.setdefault(p, len(numbers)) for p in prompts])

    def ids(self, index: int) -> np.ndarray:
        """Token ids of one trace."""
        return self._ids[index]

    def num_targets(self, indices: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Trained tokens of traces of which the first `lengths` tokens are kept."""
        return lengths - self.prompt_lengths[indices]
