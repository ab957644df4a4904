"""Estimates the GPU memory of a training step, without a GPU.

One rank's step runs on tensors with shapes but no memory (`FakeTensorMode`), by the training code:
FSDP2 over a process group without other processes, recomputation, loss, clipping, AdamW. Every
storage is counted from its allocation to its release. All blocks are alike, so memory is linear in
their number: two shallow models are run, and each phase's peak is extrapolated to the real depth.

Not counted: memory of CUDA, NCCL and cuBLAS, and unused gaps between tensors in the allocator's
blocks (`RESERVE` in `cards.py`).
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
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from redi.engine.config.distill import divergence_weight
from redi.engine.config.sections import Recipe
from redi.engine.context import ContextGroup
from redi.engine.data.context_slice import slice_pack, slice_tokens
from redi.engine.data.loader import StepBatches
from redi.engine.data.packing import PackedBatch
from redi.engine.loss.packed_loss import PLAIN, PackedLoss
from redi.engine.model.adapter import add_adapter
from redi.engine.model.attention import PLANNED
from redi.engine.model.build import build_model
from redi.engine.model.flops import ModelSize, head_dim
from redi.engine.model.offload import host_memory
from redi.engine.model.router_loss import router_loss
from redi.engine.model.sharding import compute_dtype, reshard, shard
from redi.engine.model.student import Student
from redi.engine.plan.cards import Card
from redi.engine.plan.memory_tracker import PARTS, LossMemory, MemoryTracker, Phase
from redi.engine.plan.types import StepMemory
from redi.engine.train.generation_accuracy import HeldOutProblems
from redi.engine.train.optimizer import make_optimizer, squared_update, step_if
from redi.engine.train.step import clip, forward_backward
from redi.engine.train.tensor_steps import TensorSteps
from redi.kernels.chunk_sizes import gpu_workspace, padded
from redi.kernels.experimental.launches import sizes_for_triton_exp
from redi.kernels.logprobs import GPU_KEEP_SHARE
from redi.kernels.reference import accumulation_dtype

SHALLOW = 3
"""Blocks of the smaller model: the first, the last, and one that represents all others."""


FILTER_COLUMNS = 256
"""Vocabulary columns of a filter's tile in the launch table."""


@dataclass(frozen=True)
class Load:
    """Properties of a run's packing that determine its memory."""

    pack: PackedBatch
    """The fullest pack."""
    targets: frozenset[int]
    """Trained tokens of each pack. The loss's chunk is sized to fill the GPU's processors, so it
    is not always largest for the fullest pack."""
    micro_steps: int
    """Maximum per step."""

    def of_rank(self, context: int) -> Load:
        """What a rank has if `context` ranks share each pack: the slice with most targets."""
        if context == 1:
            return self
        slices = [slice_pack(self.pack, index, context) for index in range(context)]
        fullest = max(slices, key=lambda pack: len(pack.valid_index))
        most = len(fullest.input_ids)
        return Load(
            fullest, frozenset(min(count, most) for count in self.targets), self.micro_steps
        )


def step_memory(recipe: Recipe, config: Any, load: Load, ranks: int, card: Card) -> StepMemory:
    """Peak memory of a rank in one training step.

    Assumes flash attention, transformers' own layers and uncompiled blocks.

    Args:
        recipe: resolved; `model.path` is set.
        config: the model's configuration; no weights are needed.
        load: packs of the step.
        ranks: number of ranks.
        card: the GPU; it determines the chunks of the loss.

    Raises:
        InputError: training does not support the model's architecture.
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
    pack = load.of_rank(recipe.shard.context).pack
    for entries in (pack.teacher_ids, pack.teacher_logps):
        parts["loss"] += 0 if entries is None else entries.nbytes
    host = 0
    if recipe.shard.offload:
        dtype = compute_dtype(recipe.train.dtype, torch.device("cuda"))
        tokens = slice_tokens(recipe.train.resolved_row_tokens, recipe.shard.context)
        an_input = tokens * config.hidden_size * dtype.itemsize
        host = host_memory(depth, an_input)
    return StepMemory({name: parts[name] for name in PARTS}, phase[1], host)


def generation_memory(
    step: StepMemory, recipe: Recipe, config: Any, size: ModelSize, problems: HeldOutProblems
) -> int:
    """Bytes of a rank while it generates for `[eval] checker`, equal for all rows and `[shard]`.

    They are its shard of masters and moments, all weights in the compute dtype, keys and values.
    """
    dtype = compute_dtype(recipe.train.dtype, torch.device("cuda"))
    weights = (size.parameters + size.adapter) * dtype.itemsize
    cache = cache_memory(recipe, config, problems)
    return step.parts["masters"] + step.parts["moments"] + weights + cache


def cache_memory(recipe: Recipe, config: Any, problems: HeldOutProblems) -> int:
    """Bytes of the keys and values of a batch of `problems` at the maximum completion length."""
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
    """Extrapolate peaks to a model with `blocks` more blocks than that of `few`.

    `more` has the peaks of a model with one block more than `few`. A block corresponds to the block
    of the deeper model at the same distance from the first or from the last one; memory in between
    is bounded by these two.
    """
    for phase, parts in few.items():
        partners = {phase}
        if len(phase) == 3:
            micro_step, name, block = phase
            partners = {phase} if block < SHALLOW - 1 else set()
            partners |= {(micro_step, name, block + 1)} if block > 0 else set()
        for partner in partners:
            deeper = more[partner]
            names = parts.keys() | deeper.keys()
            yield (
                phase,
                Counter({n: parts[n] + blocks * (deeper[n] - parts[n]) for n in names}),
            )


def phase_peaks(
    recipe: Recipe, config: Any, load: Load, ranks: int, card: Card
) -> dict[Phase, Counter[str]]:
    """Phase -> bytes by part at its peak.

    A phase is (micro-step, name) or (micro-step, name, block).
    """
    device = torch.device("cpu")  # not CUDA: FSDP2 would need its streams
    dtype = compute_dtype(recipe.train.dtype, torch.device("cuda"))
    load = load.of_rank(recipe.shard.context)
    section = recipe.objective
    filters = section.filter_epsilon > 0
    # The second micro-step starts with what the first has left, like any later one.
    packs = [load.pack] * min(load.micro_steps, 2)
    with _ranks(ranks):
        context = ContextGroup.join(recipe.shard.context)
        model = build_model(recipe.model.path or "", config, PLANNED, context)
        adapter = None
        if recipe.adapter.wanted:
            adapter = add_adapter(model, recipe.adapter, dtype)
        router = router_loss(recipe, model)
        model.train()
        objective = PackedLoss(
            replace(section, backend="torch"),
            context=context,
            divergence_weight=divergence_weight(recipe),
        )
        if section.kind.reference:
            traces = int(load.pack.sequence_ids.max()) + 1
            objective = replace(objective, reference=torch.zeros(traces))
        student = Student(model, objective, adapter, router)
        exp_gemm = student.logits == PLAIN and _uses_exp_gemm(
            recipe, card, dtype, config.hidden_size
        )
        uncompiled = replace(recipe.shard, compile=False)
        shard(student, uncompiled, dtype, device, recipe.train.resolved_row_tokens)
        tracker = MemoryTracker(
            _loss_memory(load, student.head.weight.shape, dtype, exp_gemm, filters, card)
        )
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            student.to_empty(device=device)
            tracker.settle("masters")
            optimizer = make_optimizer(student, recipe.optim)
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            tracker.settle("moments")
            # Allocates the storages of gathered weights, which later steps resize: a step that
            # keeps them between micro-steps would otherwise count them as gradients.
            for module in student.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()
            reshard(student)
            tracker.settle("gathered")

            _watch(student, tracker)
            if student.offload is not None:
                student.offload.allocate = tracker.on_host()(student.offload.allocate)
            done = forward_backward(student, _step_of(packs), device, recipe.shard)
            tracker.settle("gradients")
            tracker.enter((len(packs), "update"))
            norm = clip(student, recipe.optim.max_grad_norm)
            finite = norm.isfinite()
            if isinstance(optimizer, TensorSteps):
                optimizer.step()  # `step_if` reads the value of `finite`, which has none
            else:
                step_if(optimizer, finite)
            optimizer.zero_grad()
            squared_update(optimizer, finite)
            del done
    return tracker.peaks


def _loss_memory(
    load: Load,
    head: torch.Size,
    dtype: torch.dtype,
    exp_gemm: bool,
    filters: bool,
    card: Card,
) -> LossMemory:
    vocab, hidden_size = head
    tiles = -(-vocab // FILTER_COLUMNS) if filters and exp_gemm else 0
    in_place = exp_gemm or dtype == accumulation_dtype(dtype)  # as in `cross_entropy_chunks`
    worst = LossMemory(0, 0, 0, 0)
    for tokens in load.targets:
        workspace = gpu_workspace(
            tokens,
            vocab,
            hidden_size,
            dtype,
            card.memory,
            card.processors,
            exponentials=exp_gemm,
            tiles=tiles,
        )
        if filters:
            workspace += vocab * hidden_size * dtype.itemsize  # the reordered weight
        kept = 0
        if tokens * vocab * dtype.itemsize <= card.memory // GPU_KEEP_SHARE:
            kept = tokens * padded(vocab) * dtype.itemsize
        forward = kept if kept and in_place else kept + workspace
        found = LossMemory(workspace, forward, kept, kept or workspace)
        pairs = zip(astuple(worst), astuple(found), strict=True)
        worst = LossMemory(*(max(pair) for pair in pairs))
    return worst


def _uses_exp_gemm(recipe: Recipe, card: Card, dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether the loss stores a chunk's exponentials instead of its logits."""
    if recipe.objective.filter_epsilon:
        return recipe.objective.backend != "torch"
    if recipe.objective.backend == "auto":
        return hidden_size in sizes_for_triton_exp(card.architecture, dtype)
    return recipe.objective.backend.endswith("-exp") and dtype == torch.bfloat16


def _step_of(packs: list[PackedBatch]) -> StepBatches:
    sequences = sum(len(pack.signs) for pack in packs)
    return StepBatches(
        step=1,
        micro_batches=packs,
        units=np.zeros(sequences, dtype=np.int64),
        num_sequences=sequences,
        num_positives=sequences,
        num_negatives=0,
        num_targets=sum(len(pack.valid_index) for pack in packs),
        num_tokens=sum(pack.num_tokens for pack in packs),
        shared_tokens=0,
        micro_steps=len(packs),
        rank_efficiency=1.0,
    )


@contextmanager
def _ranks(count: int) -> Iterator[None]:
    """Make this process rank 0 of `count` ranks that do not exist: nothing is communicated."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _watch(student: Student, tracker: MemoryTracker) -> None:
    """Register hooks that start a phase of the tracker when the student reaches it."""
    micro_step = -1

    def start_micro_step(*_: Any) -> None:
        nonlocal micro_step
        if micro_step >= 0:
            tracker.settle("gradients")  # everything that is left of a micro-step
        micro_step += 1
        tracker.enter((micro_step, "forward"))

    def start_loss(*_: Any) -> None:
        tracker.enter((micro_step, "loss"))

    def watch_block(block: int, module: torch.nn.Module) -> None:
        def forward(*_: Any) -> None:
            tracker.enter((micro_step, "forward", block))

        def backward(_: Tensor) -> None:
            tracker.enter((micro_step, "backward", block))

        def output(_: torch.nn.Module, __: Any, out: Tensor | tuple[Tensor, ...]) -> None:
            hidden = out if isinstance(out, Tensor) else out[0]
            if hidden.requires_grad:  # not while experts are counted
                hidden.register_hook(backward)

        module.register_forward_pre_hook(forward)
        module.register_forward_hook(output)

    student.register_forward_pre_hook(start_micro_step, prepend=True)  # before FSDP gathers
    student.head.register_forward_pre_hook(start_loss)
    for block, module in enumerate(student.blocks):
        watch_block(block, module)
