"""What a training step takes of a card's memory, counted without a card.

One rank's step is run on tensors that have shapes but no memory (`FakeTensorMode`), by the code
that trains: FSDP2 over a process group without other processes, recomputation, loss, clipping,
AdamW. Every storage is counted from its making to its end. All blocks being alike, memory is linear
in their number: two shallow models are run, and each phase's peak is continued to the real depth.

Not counted: what CUDA, NCCL and cuBLAS take for themselves, and what the allocator's blocks leave
unused between tensors (`RESERVE`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from redi.engine.config.sections import Recipe
from redi.engine.data.loader import StepBatches
from redi.engine.data.packing import PackedBatch
from redi.engine.loss.packed_loss import PackedLoss
from redi.engine.model.build import build_model
from redi.engine.model.flops import head_dim
from redi.engine.model.sharding import compute_dtype, shard
from redi.engine.model.student import Student
from redi.engine.plan.cards import Card
from redi.engine.plan.memory_tracker import PARTS, LossMemory, MemoryTracker, Phase
from redi.engine.plan.types import StepMemory
from redi.engine.train.generation_accuracy import HeldOutProblems
from redi.engine.train.optimizer import make_optimizer, squared_update, step_if
from redi.engine.train.step import clip, forward_backward
from redi.kernels.chunk_sizes import gpu_workspace, padded
from redi.kernels.experimental.launches import fastest_backend
from redi.kernels.logprobs import GPU_KEEP_SHARE
from redi.kernels.reference import accumulation_dtype

RESERVE = 0.1
"""Share of a card left to CUDA, NCCL, cuBLAS and the allocator's gaps. An assumption."""

SHALLOW = 3
"""Blocks of the smaller model that is run: a first, a last and one like all between them."""


@dataclass(frozen=True)
class Load:
    """What of a run's packing decides its memory."""

    row: PackedBatch
    """The fullest."""
    targets: frozenset[int]
    """Trained tokens of each row. The loss's chunk need not be largest for the fullest row, as it
    is cut to fill the card's processors."""
    micro_steps: int
    """Of a step, at most."""


def step_memory(recipe: Recipe, config: Any, load: Load, ranks: int, card: Card) -> StepMemory:
    """The peak of a rank's step.

    Counted are flash attention, transformers' own layers and blocks that are not compiled.

    Args:
        recipe: resolved; `model.path` is set.
        config: the model's configuration; no weights are needed.
        load: the rows.
        ranks: of the run.
        card: decides the chunks of the loss.

    Raises:
        InputError: the model is not built as training needs it.
    """
    depth = config.num_hidden_layers
    if depth <= SHALLOW + 1:
        peaks = list(phase_peaks(recipe, config, load, ranks, card).items())
    else:
        few, more = (
            phase_peaks(recipe, _of_depth(config, blocks), load, ranks, card)
            for blocks in (SHALLOW, SHALLOW + 1)
        )
        peaks = list(_continued(few, more, depth - SHALLOW))
    phase, parts = max(peaks, key=lambda peak: peak[1].total())
    return StepMemory({name: parts[name] for name in PARTS}, phase[1])


def cache_memory(recipe: Recipe, config: Any, problems: HeldOutProblems) -> int:
    """Bytes of the keys and values of a batch of `problems` with the longest completions."""
    dtype = compute_dtype(recipe.train.dtype, torch.device("cuda"))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    tokens = problems.longest_prompt + problems.new_tokens(config)
    a_token = 2 * config.num_hidden_layers * heads * head_dim(config) * dtype.itemsize
    return a_token * tokens * min(problems.batch_size, len(problems.prompts))


def _of_depth(config: Any, blocks: int) -> Any:
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        shallow.layer_types = config.layer_types[:blocks]
    return shallow


def _continued(
    few: dict[Phase, Counter[str]], more: dict[Phase, Counter[str]], blocks: int
) -> Iterator[tuple[Phase, Counter[str]]]:
    """Peaks of a model of so many blocks more than `few` has; `more` has one more.

    A block has its like in the deeper model at the same distance from the first one, or from the
    last; for those between the two memory lies between as well.
    """
    for phase, parts in few.items():
        likes = {phase}
        if len(phase) == 3:
            micro_step, name, block = phase
            likes = {phase} if block < SHALLOW - 1 else set()
            likes |= {(micro_step, name, block + 1)} if block > 0 else set()
        for like in likes:
            longer = more[like]
            names = parts.keys() | longer.keys()
            yield (
                phase,
                Counter({n: parts[n] + blocks * (longer[n] - parts[n]) for n in names}),
            )


def phase_peaks(
    recipe: Recipe, config: Any, load: Load, ranks: int, card: Card
) -> dict[Phase, Counter[str]]:
    """Bytes by part at the peak of each phase: (micro-step, name) or (micro-step, name, block)."""
    device = torch.device("cpu")  # stands for the card: FSDP2 asks a device for its streams
    dtype = compute_dtype(recipe.train.dtype, torch.device("cuda"))
    model = build_model(recipe.model.path or "", config, "varlen")
    model.train()
    section = recipe.objective
    exponentials = _takes_exponentials(recipe, card, dtype, config.hidden_size)
    filters = section.filter_epsilon > 0
    objective = PackedLoss(replace(section, backend="torch"))
    if section.kind.reference:
        traces = int(load.row.sequence_ids.max()) + 1
        objective = replace(objective, reference=torch.zeros(traces))
    student = Student(model, objective)
    # The second micro-step finds what the first has left, and so does any later one.
    rows = [load.row] * min(load.micro_steps, 2)
    with _ranks(ranks):
        shard(student, replace(recipe.shard, compile=False), dtype, device)
        ledger = MemoryTracker(
            _loss_memory(load, student.head.weight.shape, dtype, exponentials, filters, card)
        )
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            student.to_empty(device=device)
            ledger.settle("masters")
            optimizer = make_optimizer(student, recipe.optim)
            for parameter in student.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            ledger.settle("moments")

            _watch(student, ledger)
            done = forward_backward(student, _step_of(rows), device, recipe.shard.reduce)
            ledger.settle("gradients")
            ledger.enter((len(rows), "update"))
            norm = clip(student, recipe.optim.max_grad_norm)
            finite = norm.isfinite()
            step_if(optimizer, finite)
            optimizer.zero_grad()
            squared_update(optimizer, finite)
            del done
    return ledger.peaks


def _loss_memory(
    load: Load,
    head: torch.Size,
    dtype: torch.dtype,
    exponentials: bool,
    filters: bool,
    card: Card,
) -> LossMemory:
    vocab, hidden_size = head
    buffer_dtype = dtype if exponentials else accumulation_dtype(dtype)
    in_place = exponentials or dtype == accumulation_dtype(dtype)  # as in `cross_entropy_chunks`
    worst = LossMemory(0, 0, 0, 0)
    for tokens in load.targets:
        workspace = gpu_workspace(
            tokens, vocab, hidden_size, dtype, buffer_dtype, card.memory, card.processors
        )
        if filters:
            workspace += vocab * hidden_size * dtype.itemsize  # the weight in the filter's order
        kept = 0
        if tokens * vocab * dtype.itemsize <= card.memory // GPU_KEEP_SHARE:
            kept = tokens * padded(vocab) * dtype.itemsize
        forward = kept if kept and in_place else kept + workspace
        found = LossMemory(workspace, forward, kept, kept or workspace)
        pairs = zip(astuple(worst), astuple(found), strict=True)
        worst = LossMemory(*(max(pair) for pair in pairs))
    return worst


def _takes_exponentials(recipe: Recipe, card: Card, dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether the loss keeps exponentials of a chunk in the place of logits."""
    if recipe.objective.filter_epsilon:
        return recipe.objective.backend != "torch"
    backend = recipe.objective.backend
    if backend == "auto":
        backend = fastest_backend(card.architecture, dtype, hidden_size)
    return backend.endswith("-exp") and dtype == torch.bfloat16


def _step_of(rows: list[PackedBatch]) -> StepBatches:
    sequences = sum(len(row.signs) for row in rows)
    return StepBatches(
        step=1,
        micro_batches=rows,
        units=np.zeros(sequences, dtype=np.int64),
        num_sequences=sequences,
        num_positives=sequences,
        num_negatives=0,
        num_targets=sum(len(row.valid_index) for row in rows),
        num_tokens=sum(row.num_tokens for row in rows),
        rank_efficiency=1.0,
    )


@contextmanager
def _ranks(count: int) -> Iterator[None]:
    """This process as rank 0 of so many, of whom there are no others: nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _watch(student: Student, ledger: MemoryTracker) -> None:
    """Tell the ledger of each phase as it begins."""
    micro_step = -1

    def begins(*_: Any) -> None:
        nonlocal micro_step
        if micro_step >= 0:
            ledger.settle("gradients")  # all that a micro-step leaves behind
        micro_step += 1
        ledger.enter((micro_step, "forward"))

    def loss_begins(*_: Any) -> None:
        ledger.enter((micro_step, "loss"))

    def watch_block(block: int, module: torch.nn.Module) -> None:
        def forward(*_: Any) -> None:
            ledger.enter((micro_step, "forward", block))

        def backward(_: Tensor) -> None:
            ledger.enter((micro_step, "backward", block))

        def output(_: torch.nn.Module, __: Any, out: Tensor | tuple[Tensor, ...]) -> None:
            hidden = out if isinstance(out, Tensor) else out[0]
            hidden.register_hook(backward)

        module.register_forward_pre_hook(forward)
        module.register_forward_hook(output)

    student.register_forward_pre_hook(begins, prepend=True)  # before anything is gathered
    student.head.register_forward_pre_hook(loss_begins)
    for block, module in enumerate(student.blocks):
        watch_block(block, module)
