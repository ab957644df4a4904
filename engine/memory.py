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
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from redi.engine.config import Recipe
from redi.engine.data.loader import StepBatches
from redi.engine.data.packing import PackedBatch
from redi.engine.estimate import Card
from redi.engine.model.attention import register_attention
from redi.engine.model.load import model_to_train
from redi.engine.model.sharding import compute_dtype, shard
from redi.engine.model.student import Student
from redi.engine.train.loop import clip, forward_backward
from redi.engine.train.objectives import formula
from redi.engine.train.optimizer import make_optimizer, squared_update, step_if
from redi.engine.train.row_loss import Objective
from redi.kernels.chunked import gpu_workspace, padded
from redi.kernels.launches import fastest_backend
from redi.kernels.logprobs import GPU_KEEP_SHARE
from redi.kernels.reference import accumulation_dtype

PARTS = {
    "masters": "float32 master weights",
    "moments": "AdamW's moments",
    "gradients": "gradients",
    "gathered": "gathered parameters, gradients being reduced",
    "activations": "activations",
    "loss": "loss: dX, dW, a chunk of the vocabulary",
    "update": "clipping and update",
}
"""What memory is for, as tables call it."""

RESERVE = 0.1
"""Share of a card left to CUDA, NCCL, cuBLAS and the allocator's gaps. An assumption."""

SHALLOW = 3
"""Blocks of the smaller model that is run: a first, a last and one like all between them."""

Phase = tuple[Any, ...]


@dataclass(frozen=True)
class StepMemory:
    """The most that a rank holds at one time in a training step."""

    parts: dict[str, int]
    """Bytes by key of `PARTS`, at that time."""
    phase: str
    """When it is: "forward", "loss", "backward" or "update"."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def step_memory(
    recipe: Recipe, config: Any, rows: list[PackedBatch], ranks: int, card: Card
) -> StepMemory:
    """The peak of a rank's step.

    Counted as on CUDA with flash attention and without liger-kernel's layers, which save some.

    Args:
        recipe: resolved; `model.path` is set.
        config: the model's configuration; no weights are needed.
        rows: of the step, one a micro-step.
        ranks: of the run.
        card: decides the chunks of the loss.

    Raises:
        InputError: the model is not built as training needs it.
    """
    depth = config.num_hidden_layers
    if depth <= SHALLOW + 1:
        peaks = list(phase_peaks(recipe, config, rows, ranks, card).items())
    else:
        few, more = (
            phase_peaks(recipe, _of_depth(config, blocks), rows, ranks, card)
            for blocks in (SHALLOW, SHALLOW + 1)
        )
        peaks = list(_continued(few, more, depth - SHALLOW))
    phase, parts = max(peaks, key=lambda peak: peak[1].total())
    return StepMemory({name: parts[name] for name in PARTS}, phase[1])


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
    recipe: Recipe, config: Any, rows: list[PackedBatch], ranks: int, card: Card
) -> dict[Phase, Counter[str]]:
    """Bytes by part at the peak of each phase: (micro-step, name) or (micro-step, name, block)."""
    device = torch.device("cpu")  # stands for the card: FSDP2 asks a device for its streams
    dtype = compute_dtype(recipe.train.dtype, torch.device("cuda"))
    model = model_to_train(recipe.model.path or "", config, register_attention("varlen"))
    model.train()
    section = recipe.objective
    exponentials = _takes_exponentials(recipe, card, dtype, config.hidden_size)
    student = Student(
        model, Objective(replace(section, backend="torch-exp" if exponentials else "torch"))
    )
    vocab, hidden_size = student.head.weight.shape
    tokens = max(len(row.valid_index) for row in rows)
    kept = tokens * padded(vocab) * dtype.itemsize
    with _ranks(ranks):
        shard(student, replace(recipe.shard, compile=False), dtype, device)
        ledger = Ledger(
            workspace=gpu_workspace(
                tokens,
                vocab,
                hidden_size,
                dtype,
                dtype if exponentials else accumulation_dtype(dtype),
                card.memory,
                card.processors,
            ),
            kept=kept if kept <= card.memory // GPU_KEEP_SHARE else 0,
        )
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            student.to_empty(device=device)
            ledger.settle("masters")
            if formula(section).reference:
                traces = 1 + max(int(row.sequence_ids.max()) for row in rows)
                student.objective = replace(student.objective, reference=torch.zeros(traces))
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


def _takes_exponentials(recipe: Recipe, card: Card, dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether the loss keeps exponentials of a chunk in the place of logits."""
    if recipe.objective.filter_epsilon:
        return True
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


def _watch(student: Student, ledger: Ledger) -> None:
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


@dataclass
class _Entry:
    """A storage that is alive."""

    part: str
    size: int


@dataclass(frozen=True)
class _Peak:
    """What was held when that was most."""

    total: int
    held: Counter[str]
    unsettled: tuple[_Entry, ...]


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, by part, until they end.

    Args:
        workspace: bytes that a loss op takes while it runs, which only a card allocates.
        kept: bytes that `linear_logprobs` keeps for its backward on the card.

    Attributes:
        held: bytes by part, now.
    """

    def __init__(self, workspace: int = 0, kept: int = 0) -> None:
        super().__init__()
        self._workspace = workspace
        self._kept = kept
        self._entries: dict[int, _Entry] = {}
        self._unsettled: dict[int, _Entry] = {}
        self._phase: Phase = ()
        self._peaks: dict[Phase, _Peak] = {}
        self._open: set[Phase] = set()
        self._total = 0
        self.held: Counter[str] = Counter()

    def __enter__(self) -> Ledger:
        # FSDP2 frees what it gathered, and takes it again, by resizing storages: no op tells.
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            if entry := self._entries.get(storage._cdata):
                self._add(entry.part, -entry.size)
                entry.part, entry.size = "gathered", size
                self._add("gathered", size)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    @property
    def peaks(self) -> dict[Phase, Counter[str]]:
        """Bytes by part, by phase, when their sum was largest."""
        return {phase: peak.held for phase, peak in self._peaks.items() if phase}

    def enter(self, phase: Phase) -> None:
        """A phase begins, with what is held."""
        self._phase = phase
        self._add("activations", 0)

    def settle(self, part: str) -> None:
        """All that was made since the last call and is still alive is of this part.

        A gradient is like any other product until it is seen to stay.
        """
        staying = {id(entry) for entry in self._unsettled.values()}
        for phase in self._open:
            peak = self._peaks[phase]
            for entry in peak.unsettled:
                if id(entry) in staying:
                    peak.held[entry.part] -= entry.size
                    peak.held[part] += entry.size
        for entry in self._unsettled.values():
            self.held[entry.part] -= entry.size
            self.held[part] += entry.size
            entry.part = part
        self._unsettled.clear()
        self._open.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        part = self._part(space, name)
        for leaf in tree_leaves(result):
            tensor = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):
                self._record(tensor.untyped_storage(), part)
        if space == "redi" and name in _CHUNKED:
            if name == "linear_logprobs" and not result[1].numel():
                self._add("loss", self._kept)
            self._add("loss", self._workspace)
            self._add("loss", -self._workspace)
            if name == "linear_logprobs_backward" and not args[1].numel():
                self._add("loss", -self._kept)
        return result

    def _part(self, space: str, name: str) -> str:
        if space == "redi":
            return "loss"
        if space in ("fsdp", "c10d") or name == "empty.memory_format":
            return "gathered"
        return "update" if "update" in self._phase else "activations"

    def _record(self, storage: torch.UntypedStorage, part: str) -> None:
        key = storage._cdata
        if key in self._entries:
            return
        self._entries[key] = self._unsettled[key] = _Entry(part, storage.nbytes())
        weakref.finalize(storage, self._forget, key).atexit = False
        self._add(part, storage.nbytes())

    def _forget(self, key: int) -> None:
        entry = self._entries.pop(key)
        self._unsettled.pop(key, None)
        self._add(entry.part, -entry.size)

    def _add(self, part: str, size: int) -> None:
        self.held[part] += size
        self._total += size
        known = self._peaks.get(self._phase)
        if known is None or self._total > known.total:
            unsettled = tuple(self._unsettled.values())
            self._peaks[self._phase] = _Peak(self._total, self.held.copy(), unsettled)
            self._open.add(self._phase)


_CHUNKED = {
    "redi_loss",
    "filtered_redi_loss",
    "signed_cross_entropy",
    "linear_logprobs",
    "linear_logprobs_backward",
}
"""Ops that run through the vocabulary in chunks."""
