"""Slices of a pack for the ranks of a context group."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from redi.bench.traces import InMemoryTraces
from redi.engine.data.context_slice import PADDING, slice_pack, slice_tokens, targets_in_slice
from redi.engine.data.packing import IGNORE, PackedBatch, build_batch

LENGTHS = np.array([5, 2, 9, 3, 4])
PROMPTS = np.array([1, 1, 4, 2, 1])
SIGNS = np.array([1, -1, -1, 1, 1])


def packed(lengths: np.ndarray = LENGTHS) -> PackedBatch:
    number = len(lengths)
    ids = [np.arange(length) + 10 * place for place, length in enumerate(lengths)]
    traces: Any = InMemoryTraces(ids, prompt_lengths=PROMPTS[:number], signs=SIGNS[:number])
    return build_batch(traces, np.arange(number), lengths)


@pytest.mark.parametrize("count", [2, 3, 4, 8, 23])
def test_slices_make_up_the_pack_and_its_padding(count: int) -> None:
    whole = packed()
    slices = [slice_pack(whole, index, count) for index in range(count)]
    total, size = len(whole.input_ids), len(slices[0].input_ids)
    assert {len(one.input_ids) for one in slices} == {size} == {slice_tokens(total, count)}
    for name in ("input_ids", "position_ids", "targets"):
        joined = torch.cat([getattr(one, name) for one in slices])
        assert torch.equal(joined[:total], getattr(whole, name)), name
    padding = torch.cat([one.position_ids for one in slices])[total:]
    assert torch.equal(padding, torch.arange(count * size - total))
    assert sum(one.num_tokens for one in slices) == total
    for index, one in enumerate(slices):
        assert one.documents.tolist() == sorted({*whole.cu_seqlens.tolist(), count * size})
        assert one.documents.dtype == one.cu_seqlens.dtype == torch.int32
        assert (one.cu_seqlens[0], one.cu_seqlens[-1]) == (0, size)
        assert torch.equal(one.valid_index.sort().values, (one.targets != IGNORE).nonzero()[:, 0])
        assert sum(one.target_counts) == len(one.valid_index)
        inside = targets_in_slice(whole, index, count)
        assert torch.equal(
            whole.targets[whole.targets != IGNORE][inside], one.targets[one.targets != IGNORE]
        )
        for name in ("num_targets", "full_targets", "signs", "sequence_ids"):
            assert torch.equal(getattr(one, name), getattr(whole, name)), name


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_slice_has_its_tokens_of_each_sequence(count: int) -> None:
    whole = packed()
    numbers = torch.arange(len(LENGTHS)).repeat_interleave(torch.from_numpy(LENGTHS))
    size = slice_tokens(len(numbers), count)
    found: dict[int, torch.Tensor] = {}
    for index in range(count):
        one = slice_pack(whole, index, count)
        own = torch.arange(len(LENGTHS)).repeat_interleave(one.cu_seqlens.diff(), output_size=size)
        real = numbers[index * size : (index + 1) * size]
        assert torch.equal(own[: len(real)], real)
        # Positives come first in valid_index, document by document.
        counts = one.valid_index.split(list(one.target_counts))
        order = [*np.flatnonzero(SIGNS > 0), *np.flatnonzero(SIGNS <= 0)]
        for document, places in zip(order, counts, strict=True):
            assert (own[places] == document).all()
            found[document] = found.get(document, 0) + len(places)
        positive = torch.from_numpy(SIGNS)[own[one.valid_index]] > 0
        assert positive[: one.num_positive_targets].all()
        assert not positive[one.num_positive_targets :].any()
    assert [found[place] for place in range(len(LENGTHS))] == whole.num_targets.tolist()


def test_what_belongs_to_tokens_is_cut_too() -> None:
    whole = packed()
    tokens = len(whole.input_ids)
    given: dict[str, Any] = {
        "token_weights": torch.arange(tokens, dtype=torch.float32),
        "teacher_ids": torch.arange(2 * tokens).view(tokens, 2),
        "teacher_logps": torch.arange(2.0 * tokens).view(tokens, 2),
    }
    slices = [slice_pack(replace(whole, **given), index, 4) for index in range(4)]
    for name, values in given.items():
        joined = torch.cat([getattr(one, name) for one in slices])
        assert torch.equal(joined[:tokens], values)
    padding = joined[tokens:]
    assert len(padding) > 0
    assert (padding == -torch.inf).all(), "an entry of a teacher that does not exist"


@pytest.mark.parametrize("count", [2, 4])
def test_a_dummy_has_two_tokens_in_each_slice(count: int) -> None:
    nothing = np.zeros(0, dtype=np.int64)
    traces: Any = None
    for index in range(count):
        one = slice_pack(build_batch(traces, nothing, nothing), index, count)
        assert len(one.input_ids) == 2
        assert one.is_dummy
        assert len(one.valid_index) == 0
        assert one.documents.tolist() == ([0, 2, 2 * count])
        assert one.max_seqlen == max(2, 2 * count - 2)


def test_every_field_is_of_tokens_or_of_whole_sequences() -> None:
    """A field that is added to packs must be sliced if it has a value for each token."""
    of_tokens = {*PADDING, "position_ids"}
    places = {"cu_seqlens", "row_cu_seqlens", "valid_index", "padding", "max_seqlen"}
    counts = {"num_positive_targets", "target_counts"}
    of_sequences = {"signs", "weights", "num_targets", "full_targets", "sequence_ids", "is_dummy"}
    refused = {"attended", "own"}
    found = {field.name for field in fields(PackedBatch)}
    assert found == of_tokens | places | counts | of_sequences | refused


def test_alone_a_pack_is_its_own_slice() -> None:
    whole = packed()
    assert slice_pack(whole, 0, 1) is whole
    assert whole.documents is whole.cu_seqlens
    assert targets_in_slice(whole, 0, 1).all()
