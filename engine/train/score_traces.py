"""Log-probs and entropies of whole traces under a model, computed once and kept beside the tokens.

The pass goes through the traces in blocks. A block is packed over all ranks, scored without a
gradient (one product with the vocabulary) and written by rank 0 as a file of its own, so a pass
that was killed goes on behind its last block, with any number of ranks.
"""

from __future__ import annotations

import json
import uuid
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from redi.engine.config.sections import Recipe
from redi.engine.console import Console, Progress
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.packing import Cost, build_batch, pack
from redi.engine.distributed import World
from redi.engine.errors import RunError
from redi.engine.model.sharding import reshard
from redi.engine.model.student import Student

BLOCK = 256
"""Traces of a block: what a killed pass may lose."""
VERSION = "1"
"""Raise it whenever the same input would give other figures."""
CPU_ROW_TOKENS = 4096
"""Tokens of a row where a CPU computes no gradient. Rows of 32,768 took seven times as long, and
5.4 GiB instead of 0.6 (1,000 traces of 155 tokens, the quickstart's model)."""
_UNREAD_CONFIG = ("_name_or_path", "transformers_version", "dtype", "use_cache")


@dataclass(frozen=True)
class SequenceScores:
    """Sums over the trained tokens of each trace; float64 [n], in the order that was asked for."""

    logps: np.ndarray
    entropies: np.ndarray
    """Of the model's predictions, in nats."""


def score_traces(
    student: Student,
    tokens: TokenizedTraces,
    sequences: np.ndarray,
    lengths: np.ndarray,
    *,
    model: str,
    row_tokens: int,
    cost: Cost,
    world: World,
    console: Console,
) -> SequenceScores:
    """Score traces, or find their scores where an earlier pass has left them. Collective.

    Args:
        student: sharded; its weights are those that `model` names.
        sequences: int64 [n], which traces.
        lengths: int64 [traces], how much of each is kept.
        model: names the weights and how they are used; see `model_key`. Rank 0's counts.
        row_tokens, cost: as in training.

    Raises:
        RunError: the scores cannot be written.
    """
    digest = xxhash.xxh3_128("\n".join([VERSION, str(BLOCK), model, tokens.key]).encode())
    digest.update(np.stack([sequences, lengths[sequences]]).tobytes())
    folder = tokens.folder / f"logprobs-{digest.hexdigest()}"
    found = np.empty((2, len(sequences)))
    with closing(
        console.progress("log-probs of trace", len(sequences), endpoints=False)
    ) as progress:
        for number, start in enumerate(range(0, len(sequences), BLOCK)):
            block = sequences[start : start + BLOCK]
            scores = _stored(folder / f"{number}.npy", len(block), world)
            if scores is None:
                scores = _score_block(
                    student, tokens, block, lengths, row_tokens, cost, world, progress
                )
                if world.is_main:
                    _store(folder / f"{number}.npy", scores)
            else:
                progress.update(len(block))
            found[:, start : start + BLOCK] = scores
    reshard(student)  # else an optimizer made next would see the gathered weights, not the shards
    return SequenceScores(*found)


def model_key(student: Student, path: str, digest: str | None, dtype: torch.dtype) -> str:
    """What a model's log-probs depend on: weights, configuration, dtype.

    Args:
        digest: of the weights (`model_fingerprint`); None for a hub name, known by its commit.
    """
    config = student.model.config
    facts = {k: v for k, v in config.to_dict().items() if k not in _UNREAD_CONFIG}
    weights = digest or f"{path}@{getattr(config, '_commit_hash', None)}"
    return json.dumps([weights, facts, str(dtype)], sort_keys=True, default=str)


def set_reference(
    student: Student,
    recipe: Recipe,
    tokens: TokenizedTraces,
    units: np.ndarray,
    lengths: np.ndarray,
    *,
    digest: str | None,
    dtype: torch.dtype,
    cost: Cost,
    world: World,
    console: Console,
) -> None:
    """Give the objective the log-probs of the student as it is now: the reference of DPO.

    Args:
        units: int64 [n, 2], the pairs that are trained.
        lengths: int64 [traces], how much of each is kept.
        digest: see `model_key`.
    """
    sequences = np.unique(units)
    scores = score_traces(
        student,
        tokens,
        sequences,
        lengths,
        model=model_key(student, recipe.model.path or "", digest, dtype),
        row_tokens=recipe.train.row_tokens,
        cost=cost,
        world=world,
        console=console,
    )
    reference = torch.zeros(len(tokens))
    reference[torch.from_numpy(sequences)] = torch.from_numpy(scores.logps).float()
    student.objective = replace(student.objective, reference=reference.to(world.device))


def scored_row_tokens(row_tokens: int, lengths: np.ndarray, device: torch.device) -> int:
    """How long rows are to be where no gradient is computed.

    Args:
        row_tokens: as in training; the most.
        lengths: int64 [n], of the sequences; each must fit.
    """
    if device.type != "cpu":
        return row_tokens
    return min(row_tokens, max(CPU_ROW_TOKENS, int(lengths.max())))


@torch.no_grad()
def _score_block(
    student: Student,
    tokens: TokenizedTraces,
    block: np.ndarray,
    lengths: np.ndarray,
    row_tokens: int,
    cost: Cost,
    world: World,
    progress: Progress,
) -> np.ndarray:
    """[2, n] log-probs and entropies, on every rank."""
    row_tokens = scored_row_tokens(row_tokens, lengths[block], world.device)
    packing = pack(lengths[block], row_tokens=row_tokens, world_size=world.size, cost=cost)
    sums = torch.zeros(2, len(block), dtype=torch.float64, device=world.device)
    student.eval()
    for rows in packing.rows:
        positions = rows[world.rank]
        traces = block[positions]
        batch = build_batch(tokens, traces, lengths[traces]).to(world.device)
        scores = student(batch, None)
        if not batch.is_dummy:
            both = torch.stack([scores.sequence_logps, scores.sequence_entropies])
            sums[:, torch.from_numpy(positions).to(world.device)] = both.double()
        progress.update(sum(map(len, rows)))
    student.train()
    dist.all_reduce(sums)
    return sums.cpu().numpy()


def _stored(path: Path, count: int, world: World) -> np.ndarray | None:
    """A block that an earlier pass wrote. Rank 0 reads: the others may not see its disk."""
    read: list[np.ndarray | None] = [None]
    if world.is_main:
        try:
            scores = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            scores = None
        if scores is not None and scores.shape == (2, count):
            read[0] = scores
    dist.broadcast_object_list(read, src=0)
    return read[0]


def _store(path: Path, scores: np.ndarray) -> None:
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # others may do the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, scores)
        partial.replace(path)
    except OSError as error:
        raise RunError(f"{path.parent}: log-probs cannot be written: {error}") from error
