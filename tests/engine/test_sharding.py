"""How the student is grouped, gathered and cast under FSDP2."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from redi.engine.config import Objective as ObjectiveSection
from redi.engine.config import Shard
from redi.engine.data.packing import PackedBatch
from redi.engine.distributed import join_world
from redi.engine.model.attention import register_attention
from redi.engine.model.sharding import reshard, shard
from redi.engine.model.student import Student
from redi.engine.train.row_loss import Objective, StepTotals

CPU = torch.device("cpu")
TOTALS = StepTotals(units=1, targets=14)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with join_world():
        yield


def sharded(folder: Path, dtype: torch.dtype = torch.float32) -> Student:
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=register_attention("sdpa")
    )
    student = Student(model, Objective(ObjectiveSection(name="redi")))
    return shard(student, Shard(), dtype, CPU)


def row() -> PackedBatch:
    """A positive of 9 tokens and a negative of 7, a prompt of one token each."""
    ids = torch.randint(3, 12, (16,), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1)
    targets[[8, 15]] = -100
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(9), torch.arange(7)]),
        cu_seqlens=torch.tensor([0, 9, 16], dtype=torch.int32),
        targets=targets,
        signs=torch.tensor([1, -1]),
        weights=None,
        valid_index=(targets >= 0).nonzero()[:, 0],
        num_positive_targets=8,
        num_targets=torch.tensor([8, 6]),
        full_targets=torch.tensor([8, 6]),
        sequence_ids=torch.tensor([0, 1]),
        max_seqlen=9,
        is_dummy=False,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_an_untied_head_is_reduced_before_the_trunk_runs_backward(world: Path, tied: bool) -> None:
    student = sharded(world / ("tied" if tied else "model"))
    loss = student(row(), TOTALS).loss
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


def test_a_traces_weight_is_not_rounded_to_the_compute_dtype(world: Path) -> None:
    """In bfloat16 0.3 would be 0.30078125."""
    student = sharded(world / "model", torch.bfloat16)
    batch = row()
    plain = student(replace(batch, weights=torch.ones(2)), TOTALS).loss
    weighted = student(replace(batch, weights=torch.full((2,), 0.3)), TOTALS).loss
    assert weighted.item() == pytest.approx(0.3 * plain.item(), rel=1e-5)


@torch.no_grad()
def test_reshard_leaves_nothing_gathered_after_scoring(world: Path) -> None:
    student = sharded(world / "model")
    student(row(), None)
    assert not all(isinstance(p, DTensor) for p in student.parameters())
    reshard(student)
    assert all(isinstance(p, DTensor) for p in student.parameters())
