"""Attention of ranks that share a pack: documents do not leak, and heads that do not divide."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from architecture_cases import tiny_config
from context_cases import VOCAB, document_logps
from rank_pool import RankPool

from redi.engine.context import key_value_copies
from redi.engine.errors import InputError
from redi.engine.model.architecture import check_context

# 40 tokens: slices end at 20 (2 ranks), and at 10, 20 and 30 (4 ranks).
LENGTHS = {
    "spans slices": [12, 16, 12],
    "ends at a border": [12, 8, 10, 10],
    "padded": [7, 25, 5],
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", LENGTHS)
def test_a_document_does_not_depend_on_others_of_its_pack(
    pool: RankPool, size: int, case: str
) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCAB, length) for length in LENGTHS[case]]
    alone = [pool.run(document_logps, 1, [one], False)[0] for one in documents]
    before = pool.run(document_logps, size, documents, False)
    leaking = pool.run(document_logps, size, documents, True)
    torch.testing.assert_close(before[0], torch.cat(alone), rtol=1e-5, atol=1e-5)
    for changed in range(len(documents)):
        others = [place for place in range(len(documents)) if place != changed]
        replaced = list(documents)
        replaced[changed] = (documents[changed] + 1) % VOCAB
        after = pool.run(document_logps, size, replaced, False)
        for rank in range(4):
            assert torch.equal(after[rank][others], before[rank][others])
            assert after[rank][changed] != before[rank][changed]
        leaks = pool.run(document_logps, size, replaced, True)[0]
        later = [place for place in others if place > changed]
        assert (leaks[later] != leaking[0][later]).all()


@pytest.mark.parametrize(
    ("heads", "groups", "ranks", "copies"),
    [(28, 4, 4, 1), (28, 4, 2, 1), (40, 8, 8, 1), (8, 2, 4, 2), (12, 6, 4, 2), (14, 2, 7, 7)],
)
def test_keys_and_values_are_repeated_until_ranks_can_divide_them(
    heads: int, groups: int, ranks: int, copies: int
) -> None:
    assert key_value_copies(heads, groups, ranks) == copies
    assert (groups * copies) % ranks == 0
    assert heads % (groups * copies) == 0


@pytest.mark.parametrize(
    ("kind", "ranks", "message"),
    [
        ("qwen2", 3, r"shard.context = 3 does not divide the model's \d+ query heads; use one of "),
        ("qwen3_next", 2, "shard.context: not available for model: its linear attention"),
        ("lfm2", 2, "need whole documents; remove it"),
    ],
)
def test_what_cannot_share_a_pack_is_refused(kind: str, ranks: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_context("model", tiny_config(kind), ranks)
    check_context("model", tiny_config(kind), 1)
