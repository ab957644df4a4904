"""Mismatched rows: each trace's completion after the prompt of another problem.

KTO estimates from them how far the policy has moved from its reference on completions that have
nothing to do with the prompt (arXiv 2402.01306). The completions of a step's mismatched rows are
those of its traces, as the paper recommends. Their prompts depend on the data set alone, so neither
packing nor ranks nor the order of the steps change a row, and its reference log-prob is computed
once.
"""

from __future__ import annotations

import numpy as np
import xxhash

from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.schedule import Examples
from redi.engine.errors import InputError


class MismatchedTraces(TokenizedTraces):
    """The traces of a set with the prompts of others, under the same indices.

    Row i has the completion of trace i with its sign and weights.

    Args:
        matched: the traces.
        prompts_of: int64 [n], the trace whose prompt each row has.
        lengths: int64 [n], tokens of each row.
    """

    def __init__(
        self, matched: TokenizedTraces, prompts_of: np.ndarray, lengths: np.ndarray
    ) -> None:
        vars(self).update(vars(matched))  # without reading the files again
        self._matched = matched
        self._prompts_of = prompts_of
        self.lengths = lengths
        self.prompt_lengths = matched.prompt_lengths[prompts_of]
        self.key = xxhash.xxh3_128_hexdigest(matched.key.encode() + prompts_of.tobytes())

    def ids(self, index: int) -> np.ndarray:
        """Token ids of a row, int32 [lengths[index]]."""
        source = int(self._prompts_of[index])
        prompt = self._matched.ids(source)[: self.prompt_lengths[index]]
        completion = self._matched.ids(index)[self._matched.prompt_lengths[index] :]
        return np.concatenate([prompt, completion])[: self.lengths[index]]

    def token_weights(self, index: int) -> np.ndarray | None:
        """Those of the completion, see `TokenizedTraces`."""
        return self._matched.token_weights(index)

    def __reduce__(self) -> tuple[object, ...]:
        return MismatchedTraces, (self._matched, self._prompts_of, self.lengths)


def mismatch(tokens: TokenizedTraces, examples: Examples) -> MismatchedTraces:
    """The mismatched rows of single traces.

    Ordered by problem, each trace gets the prompt of the trace as many places before it (from the
    first back to the last) as the largest problem has traces. So it is of another problem, and each
    trace's prompt is used once. No row is longer than the longest trace.

    Args:
        tokens: the data set.
        examples: its traces in use; a unit is one trace.

    Raises:
        InputError: a problem has more than half of the traces.
    """
    traces = examples.units[:, 0]
    problems = _problems(tokens)
    traces = traces[np.argsort(problems[traces], kind="stable")]
    numbers, sizes = np.unique(problems[traces], return_counts=True)
    shift = int(sizes.max())
    if 2 * shift > len(traces):
        first = traces[problems[traces] == numbers[sizes.argmax()]][0]
        raise InputError(
            f"{tokens.where(int(first))}: its problem has {shift} of the {len(traces)} traces, but "
            "kto pairs each completion with the prompt of another problem, so that none may have "
            'more than half: add problems, or use objective.name = "apo_zero_unpaired"'
        )
    prompts_of = np.arange(len(tokens))
    prompts_of[traces] = np.roll(traces, shift)
    lengths = examples.lengths - tokens.prompt_lengths + tokens.prompt_lengths[prompts_of]
    longest = int(examples.lengths[traces].max())
    return MismatchedTraces(tokens, prompts_of, np.minimum(lengths, longest))


def _problems(tokens: TokenizedTraces) -> np.ndarray:
    """Problem numbers as in `groups`, int64 [n], but equal prompts are one problem.

    If each row has an id, `groups` has each row apart, and neighbours often have the same prompt.
    """
    _, first, prompt = np.unique(tokens.prompt_digests, return_index=True, return_inverse=True)
    return tokens.groups[first][prompt]
