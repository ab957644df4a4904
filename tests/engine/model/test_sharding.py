"""Groups, gathers and casts of the student under FSDP2."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_cases import packed_row
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AutoModelForCausalLM

from redi.engine.config.sections import ObjectiveConfig, ShardConfig
from redi.engine.data.packing import PackedBatch, build_batch
from redi.engine.distributed import join_world
from redi.engine.loss.packed_loss import PackedLoss, StepTotals
from redi.engine.model.attention import NAME, register_attention
from redi.engine.model.sharding import reduce_in_place, reshard, shard
from redi.engine.model.student import Student

CPU = torch.device("cpu")
TOTALS = StepTotals(units=1, targets=14)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with join_world():
        yield


def sharded(folder: Path, dtype: torch.dtype = torch.float32, **section: Any) -> Student:
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=register_attention("sdpa")
    )
    student = Student(model, PackedLoss(ObjectiveConfig(name="redi")))
    return shard(student, ShardConfig(**section), dtype, CPU, row_tokens=64)


def masked_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **of: Any
) -> tuple[Tensor, None]:
    """Documents separated by a mask: one graph captures it, as it does attention on a GPU."""
    positions = torch.arange(query.shape[2])
    document = torch.searchsorted(of["cu_seq_lens_q"], positions, right=True)
    mask = (document[:, None] == document) & (positions[:, None] >= positions)
    out = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    return out.transpose(1, 2), None


def pack(lengths: Sequence[int] = (9, 7)) -> PackedBatch:
    """A pack with token ids of the small world."""
    return packed_row(lengths, 3, 12)


@pytest.mark.parametrize("tied", [False, True])
def test_an_untied_head_is_reduced_before_the_trunk_runs_backward(world: Path, tied: bool) -> None:
    student = sharded(world / ("tied" if tied else "model"))
    loss = student(pack(), TOTALS).loss
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        loss.backward()
    prefix = "FSDP::post_backward_reduce"
    events = sorted(trace.events(), key=lambda event: event.time_range.start)
    reduced = [event.name for event in events if event.name.startswith(prefix)]
    in_order = ["layers.2", "layers.1", "layers.0"]
    if not tied:
        in_order.insert(0, "lm_head")
    assert len(reduced) == len(in_order) + 1  # the root's group, last
    for name, group in zip(reduced, in_order, strict=False):
        assert group in name


@pytest.mark.parametrize("each", [False, True], ids=["once", "each pack"])
def test_gradients_that_are_reduced_in_place_are_those_of_a_copy(world: Path, each: bool) -> None:
    found = []
    for in_place in (False, True):
        student = sharded(world / "model", torch.bfloat16)
        if in_place:
            reduce_in_place(student)
        for number, lengths in enumerate([(9, 7), (4, 12), (8, 8)]):
            student.set_requires_gradient_sync(each or number == 2)
            student(pack(lengths), TOTALS).loss.backward()
        found.append([p.grad.to_local().clone() for p in student.parameters()])
        buffers = {p.grad.to_local().untyped_storage().data_ptr() for p in student.parameters()}
        assert len(buffers) == 5  # one of each group
    assert all(gradient.any() for gradient in found[0])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_traces_weight_is_not_rounded_to_the_compute_dtype(world: Path) -> None:
    """0.3 rounds to 0.30078125 in bfloat16."""
    student = sharded(world / "model", torch.bfloat16)
    batch = pack()
    plain = student(replace(batch, weights=torch.ones(2)), TOTALS).loss
    weighted = student(replace(batch, weights=torch.full((2,), 0.3)), TOTALS).loss
    assert weighted.item() == pytest.approx(0.3 * plain.item(), rel=1e-5)


@torch.no_grad()
def test_reshard_leaves_nothing_gathered_after_scoring(world: Path) -> None:
    student = sharded(world / "model")
    student(pack(), None)
    assert not all(isinstance(p, DTensor) for p in student.parameters())
    reshard(student)
    assert all(isinstance(p, DTensor) for p in student.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "attention", "full"])
def test_compiled_blocks_compute_the_same(world: Path, checkpointing: str) -> None:
    torch.compiler.reset()
    counters.clear()
    found = []
    for compiles in (False, True):
        register_attention("sdpa")
        student = sharded(world / "model", compile=compiles, checkpointing=checkpointing)
        student(pack(), TOTALS)  # the first forward is counted, and runs uncompiled
        AttentionInterface.register(NAME, masked_attention)
        out = student(pack(), TOTALS)
        out.loss.backward()
        gradients = [p.grad.full_tensor() for p in student.parameters()]
        found.append([out.loss.detach(), out.sequence_logps, *gradients])
    assert counters["stats"]["unique_graphs"] == 1  # for all blocks, whole
    assert not counters["graph_break"]
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_packs_of_any_lengths_and_dummies_share_compiled_graphs(world: Path) -> None:
    nothing = np.array([], np.int64)
    dummy = build_batch(None, nothing, nothing)  # type: ignore[arg-type]
    student = sharded(world / "model", compile=True)
    for lengths in ((9, 7), (12, 5), (20, 8, 9)):
        student(pack(lengths), TOTALS).loss.backward()
    counters.clear()
    for lengths in ((30, 4), (5, 6, 7, 8, 9), (44, 13), (3, 3)):
        student(pack(lengths), TOTALS).loss.backward()
    student(dummy, TOTALS).loss.backward()
    assert counters["stats"]["unique_graphs"] == 0
