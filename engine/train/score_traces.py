"""Log-probs and entropies of whole traces under a model, computed once and cached with the tokens.

Traces are scored in blocks. A block is packed over all ranks, scored without a gradient (one
product with the vocabulary) and written by rank 0 to one file. A killed pass therefore resumes
after its last complete block, with any number of ranks.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from redi.engine.config.sections import Recipe
from redi.engine.console import Console, Progress
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.context_slice import slice_pack, targets_in_slice
from redi.engine.data.fingerprints import model_fingerprint
from redi.engine.data.mismatched import MismatchedTraces
from redi.engine.data.packing import Cost, build_batch, pack
from redi.engine.distributed import World
from redi.engine.errors import RunError
from redi.engine.model.adapter import adapter_off
from redi.engine.model.sharding import reshard
from redi.engine.model.student import Student

BLOCK = 256
"""Traces in a block: the most that a killed pass has to repeat."""
TOP_BLOCK = 32
"""The same if the most likely tokens are wanted: memory holds those of a block."""
VERSION = "2"
"""Increase it if the same input would give other scores."""
CPU_PACK_TOKENS = 4096
"""Tokens of a pack that is scored on a CPU. Packs of 32,768 took seven times as long, and 5.4 GiB
instead of 0.6 (1,000 traces of 155 tokens, the quickstart's model)."""
_KINDS = 3
_TOKENS, _TOP_IDS, _TOP_LOGPS = ".tokens.npy", ".top_ids.npy", ".top_logps.npy"
_UNREAD_CONFIG = ("_name_or_path", "transformers_version", "dtype", "use_cache")


@dataclass(frozen=True)
class SequenceScores:
    """Sums over the trained tokens of each trace; float64 [n], in the order of the request."""

    logps: np.ndarray
    entropies: np.ndarray
    """Entropies of the model's predictions, in nats."""
    weighted_logps: np.ndarray
    """`logps` with each token's log-prob multiplied by its weight."""
    token_files: list[Path]
    """Files with the cached scores of tokens, on rank 0."""


@dataclass(frozen=True)
class BlockScores:
    """Scores of the traces of a block."""

    sums: np.ndarray
    """float64 [_KINDS, n], as in `SequenceScores`."""
    tokens: np.ndarray | None
    """float32 [2, N]: log-prob and entropy of each trained token, trace by trace; on rank 0, if
    asked for."""
    top_ids: np.ndarray | None = None
    """int32 [N, K]: the most likely tokens at each of them, most likely first; likewise."""
    top_logps: np.ndarray | None = None
    """float16 [N, K]: their log-probs."""


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
    each_block: Callable[[BlockScores], None] | None = None,
    per_token: bool = False,
    top: int = 0,
) -> SequenceScores:
    """Score traces, or read scores cached by an earlier pass. Collective.

    Args:
        student: sharded; `model` identifies its weights.
        sequences: int64 [n], indices of the traces.
        lengths: int64 [traces], tokens kept of each.
        model: identifies the weights and how they are used; see `model_key`. That of rank 0 is
            used.
        row_tokens, cost: as in training.
        each_block: called on rank 0 with the scores of each BLOCK of `sequences`, in order.
        per_token: whether `each_block` gets the scores of tokens. They are cached as well.
        top: K, the number of most likely tokens that it gets with them.

    Raises:
        RunError: the scores cannot be written.
    """
    size = min(BLOCK, TOP_BLOCK) if top else BLOCK
    named = [VERSION, str(size), model, tokens.key] + ([f"top {top}"] if top else [])
    digest = xxhash.xxh3_128("\n".join(named).encode())
    digest.update(np.stack([sequences, lengths[sequences]]).tobytes())
    folder = tokens.folder / f"logprobs-{digest.hexdigest()}"
    found = np.empty((_KINDS, len(sequences)))
    with closing(
        console.progress("log-probs of trace", len(sequences), endpoints=False)
    ) as progress:
        for number, start in enumerate(range(0, len(sequences), size)):
            block = sequences[start : start + size]
            path = folder / f"{number}.npy"
            counts = tokens.num_targets(block, lengths[block])
            scores = _stored(path, counts, per_token, top, world)
            if scores is None:
                scores = _score_block(
                    student, tokens, block, lengths, row_tokens, cost, world, progress, top
                )
                if world.is_main:
                    for suffix, values in _of_tokens(scores) if per_token else ():
                        _store(path.with_suffix(suffix), values)
                    _store(path, scores.sums)
            else:
                progress.update(len(block))
            found[:, start : start + size] = scores.sums
            if world.is_main and each_block is not None:
                each_block(scores)
    reshard(student)  # an optimizer created now would otherwise get the gathered weights
    token_files = []
    if world.is_main and per_token:
        for suffix in (_TOKENS, _TOP_IDS, _TOP_LOGPS):
            token_files += sorted(folder.glob(f"*{suffix}"))
    logps, entropies, weighted = found
    return SequenceScores(logps, entropies, weighted, token_files)


def model_key(student: Student, recipe: Recipe, fingerprint: str | None, dtype: torch.dtype) -> str:
    """Identifies all that a model's log-probs depend on: weights, configuration, precision.

    Args:
        recipe: its model and the adapter that it continues. A new adapter changes nothing yet.
        fingerprint: of the weights (`model_fingerprint`); None for a hub name, which is identified
            by its commit.
    """
    config = student.model.config
    facts = {k: v for k, v in config.to_dict().items() if k not in _UNREAD_CONFIG}
    weights = fingerprint or f"{recipe.model.path}@{getattr(config, '_commit_hash', None)}"
    if recipe.adapter.path:
        weights += f" {model_fingerprint(recipe.adapter.path, recipe.data.cache_dir)}"
    if recipe.adapter.base == "nf4":
        weights += " nf4"
    if recipe.train.fp8:
        weights += " float8"
    return json.dumps([weights, facts, str(dtype)], sort_keys=True, default=str)


def set_reference(
    student: Student,
    recipe: Recipe,
    tokens: TokenizedTraces,
    units: np.ndarray,
    lengths: np.ndarray,
    *,
    mismatched: MismatchedTraces | None = None,
    fingerprint: str | None,
    dtype: torch.dtype,
    cost: Cost,
    world: World,
    console: Console,
) -> None:
    """Set the objective's reference (of DPO): log-probs under the student's current weights.

    A new adapter is off meanwhile.

    Args:
        units: int64 [n, 1] or [n, 2], the traces or pairs that are trained.
        lengths: int64 [traces], tokens kept of each.
        mismatched: the mismatched rows of the same traces, if the objective needs them.
        fingerprint: see `model_key`.
    """
    sequences = np.unique(units)

    def logps_of(tokens: TokenizedTraces, lengths: np.ndarray) -> torch.Tensor:
        scores = score_traces(
            student,
            tokens,
            sequences,
            lengths,
            model=model_key(student, recipe, fingerprint, dtype),
            row_tokens=recipe.train.resolved_row_tokens,
            cost=cost,
            world=world,
            console=console,
        )
        logps = torch.zeros(len(tokens))
        logps[torch.from_numpy(sequences)] = torch.from_numpy(scores.weighted_logps).float()
        return logps.to(world.device)

    is_new = student.adapter is not None and student.adapter.is_new
    with adapter_off(student) if is_new else nullcontext():
        objective = replace(student.objective, reference=logps_of(tokens, lengths))
        if mismatched is not None:
            of_mismatched = logps_of(mismatched, mismatched.lengths)
            objective = replace(objective, mismatched_reference=of_mismatched)
    student.objective = objective


def scoring_pack_tokens(row_tokens: int, lengths: np.ndarray, device: torch.device) -> int:
    """Tokens of a pack if no gradient is computed: fewer than in training on a CPU.

    Args:
        row_tokens: as in training; the maximum.
        lengths: int64 [n], of the sequences; each must fit.
    """
    if device.type != "cpu":
        return row_tokens
    return min(row_tokens, max(CPU_PACK_TOKENS, int(lengths.max())))


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
    top: int = 0,
) -> BlockScores:
    """Score a block; the scores are on every rank."""
    row_tokens = scoring_pack_tokens(row_tokens, lengths[block], world.device)
    group, groups = student.context.place(world)
    packing = pack(lengths[block], row_tokens=row_tokens, world_size=groups, cost=cost)
    sums = torch.zeros(_KINDS, len(block), dtype=torch.float64, device=world.device)
    starts = np.cumsum([0, *tokens.num_targets(block, lengths[block])])
    of_tokens = torch.zeros(2, starts[-1], device=world.device)
    top_ids = torch.zeros(starts[-1], top, dtype=torch.int32, device=world.device)
    top_logps = torch.zeros(starts[-1], top, device=world.device)
    student.eval()
    for packs in packing.packs:
        positions = packs[group]
        traces = block[positions]
        row = build_batch(tokens, traces, lengths[traces])
        scores = student(slice_pack(row, *student.context.slice).to(world.device), None, top)
        if not row.is_dummy:
            of_pack = torch.stack(
                [scores.sequence_logps, scores.sequence_entropies, scores.weighted_logps]
            )
            sums[:, torch.from_numpy(positions).to(world.device)] = of_pack.double()
            places = np.concatenate([np.arange(starts[p], starts[p + 1]) for p in positions])
            places = places[targets_in_slice(row, *student.context.slice)]
            at = torch.from_numpy(places).to(world.device)
            of_tokens[:, at] = scores.tokens.float()
            if scores.top is not None:
                top_ids[at], top_logps[at] = scores.top
        progress.update(sum(map(len, packs)))
    student.train()
    dist.all_reduce(sums)
    dist.all_reduce(of_tokens)
    if not top:
        return BlockScores(sums.cpu().numpy(), of_tokens.cpu().numpy())
    dist.all_reduce(top_ids)
    dist.all_reduce(top_logps)
    return BlockScores(
        sums.cpu().numpy(),
        of_tokens.cpu().numpy(),
        top_ids.cpu().numpy(),
        top_logps.half().cpu().numpy(),
    )


def _of_tokens(scores: BlockScores) -> list[tuple[str, np.ndarray]]:
    """The scores of tokens that a block has, with the suffix of the file of each."""
    parts = (
        (_TOKENS, scores.tokens),
        (_TOP_IDS, scores.top_ids),
        (_TOP_LOGPS, scores.top_logps),
    )
    return [(suffix, values) for suffix, values in parts if values is not None]


def _stored(
    path: Path, counts: np.ndarray, per_token: bool, top: int, world: World
) -> BlockScores | None:
    """A block written by an earlier pass, or None. Rank 0 reads: others may not see its disk.

    Args:
        counts: int64 [n], trained tokens of its traces.
        per_token: whether the scores of its tokens are needed.
        top: K, the number of most likely tokens that are needed.
    """
    sums = None
    of_tokens: list[np.ndarray | None] = []
    if world.is_main:
        sums = _read(path, (_KINDS, len(counts)))
        number = int(counts.sum())
        shapes = {_TOKENS: (2, number), _TOP_IDS: (number, top), _TOP_LOGPS: (number, top)}
        for suffix, shape in list(shapes.items())[: 3 if top else int(per_token)]:
            of_tokens.append(_read(path.with_suffix(suffix), shape))
        if any(one is None for one in of_tokens):
            sums = None
    read = [sums]
    dist.broadcast_object_list(read, src=0)
    return None if read[0] is None else BlockScores(read[0], *(of_tokens or [None]))


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The array of a file; None if there is none of this shape or it is damaged."""
    try:
        scores = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return scores if scores.shape == shape else None


def _store(path: Path, scores: np.ndarray) -> None:
    # Unique, because other runs may write the same file.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, scores)
        partial.replace(path)
    except OSError as error:
        raise RunError(f"{path.parent}: log-probs cannot be written: {error}") from error
