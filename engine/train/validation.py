"""Validation during training: held-out log-probs of both signs, and greedy accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from redi.engine.data.context_slice import slice_pack
from redi.engine.data.packing import Cost, build_batch, pack
from redi.engine.data.schedule import Examples
from redi.engine.data.tokens import TokenizedTraces
from redi.engine.distributed import World
from redi.engine.model.student import Student
from redi.engine.train.generation_accuracy import HeldOutProblems, greedy_accuracy
from redi.engine.train.score_traces import scoring_pack_tokens
from redi.engine.train.signals import StopRequest


@dataclass(frozen=True)
class HeldOut:
    """Held-out traces: single positives, or pairs."""

    tokens: TokenizedTraces
    examples: Examples
    problems: HeldOutProblems | None = None
    """The same problems with their answers; None if answers are not checked."""

    @property
    def sequences(self) -> np.ndarray:
        """int64 [n], indices of the scored traces, each once."""
        return np.unique(self.examples.units)


@torch.no_grad()
def validate(
    student: Student,
    held_out: HeldOut,
    *,
    row_tokens: int,
    cost: Cost,
    world: World,
    stop: StopRequest,
) -> dict[str, float] | None:
    """Mean log-prob per token of the held-out traces, and accuracy on their problems. Collective.

    Args:
        row_tokens, cost: as in training; on a CPU packs are shorter (`scoring_pack_tokens`).
        stop: a request on any rank interrupts it before the next pack, or at the next token.

    Returns:
        None if it was interrupted. Else positive_logp; for pairs also negative_logp and
        margin_accuracy, the fraction of pairs whose positive has the higher mean log-prob; with
        problems also the figures of `greedy_accuracy`.
    """
    tokens, examples = held_out.tokens, held_out.examples
    sequences = held_out.sequences
    lengths = examples.lengths[sequences]
    row_tokens = scoring_pack_tokens(row_tokens, lengths, world.device)
    group, groups = student.context.place(world)
    packing = pack(lengths, row_tokens=row_tokens, world_size=groups, cost=cost)
    means = torch.zeros(len(examples.lengths), dtype=torch.float64)
    student.eval()
    stopped = False
    for packs in packing.packs:
        if stopped := world.any_rank(stop.requested):
            break
        row = sequences[packs[group]]
        batch = slice_pack(
            build_batch(tokens, row, examples.lengths[row]), *student.context.slice
        ).to(world.device)
        out = student(batch, None)
        if not batch.is_dummy:
            mean = out.sequence_logps.double() / out.sequence_lengths.clamp(min=1)
            means[row] = mean.cpu()
    student.train()
    if stopped or world.any_rank(stop.requested):
        return None
    dist.all_reduce(means)
    by_unit = means.numpy()[examples.units]
    result = {"positive_logp": float(by_unit[:, 0].mean())}
    if by_unit.shape[1] == 2:
        result["negative_logp"] = float(by_unit[:, 1].mean())
        result["margin_accuracy"] = float((by_unit[:, 0] > by_unit[:, 1]).mean())
    if held_out.problems is None:
        return result
    accuracy = greedy_accuracy(student, held_out.problems, world, stop)
    return None if accuracy is None else result | accuracy
