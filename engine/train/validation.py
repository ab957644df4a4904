"""Held-out log-probs of both signs, and greedy accuracy, during training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from redi.engine.data.packing import Cost, build_batch, pack
from redi.engine.data.schedule import Examples
from redi.engine.data.tokens import TokenizedTraces
from redi.engine.distributed import World
from redi.engine.model.student import Student
from redi.engine.train.generation_accuracy import HeldOutProblems, greedy_accuracy
from redi.engine.train.score_traces import scored_row_tokens
from redi.engine.train.signals import StopRequest


@dataclass(frozen=True)
class HeldOut:
    """Traces that are not trained: single positives, or pairs."""

    tokens: TokenizedTraces
    examples: Examples
    problems: HeldOutProblems | None = None
    """The same problems with their answers, if these are checked."""

    @property
    def sequences(self) -> np.ndarray:
        """int64 [n], the traces that are scored, each once."""
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
    """Mean log-prob per token of the held-out traces, and what their problems show.

    Every rank must call it.

    Args:
        row_tokens, cost: as in training; on a CPU rows are shorter (`scored_row_tokens`).
        stop: a request on any rank breaks it off before the next row, or at the next token.

    Returns:
        None when it was broken off, else positive_logp, and for pairs negative_logp and
        margin_accuracy: the share of pairs whose positive has the higher mean log-prob; with
        problems also the figures of `greedy_accuracy`.
    """
    tokens, examples = held_out.tokens, held_out.examples
    sequences = held_out.sequences
    lengths = examples.lengths[sequences]
    row_tokens = scored_row_tokens(row_tokens, lengths, world.device)
    packing = pack(lengths, row_tokens=row_tokens, world_size=world.size, cost=cost)
    means = torch.zeros(len(examples.lengths), dtype=torch.float64)
    student.eval()
    stopped = False
    for rows in packing.rows:
        if stopped := world.any_rank(stop.asked):
            break
        row = sequences[rows[world.rank]]
        batch = build_batch(tokens, row, examples.lengths[row]).to(world.device)
        out = student(batch, None)
        if not batch.is_dummy:
            mean = out.sequence_logps.double() / out.sequence_lengths.clamp(min=1)
            means[row] = mean.cpu()
    student.train()
    if stopped or world.any_rank(stop.asked):
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
