"""Tracks tensor memory by purpose, from the allocation of each storage to its release."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

PARTS = {
    "masters": "master weights (float32), a frozen model (compute dtype)",
    "moments": "moments of the optimizer",
    "gradients": "gradients",
    "gathered": "gathered parameters, gradients in reduction",
    "activations": "activations (with transformers' own layers)",
    "loss": "loss: dX, dW, a chunk of the vocabulary",
    "update": "clipping and update",
}
"""Purpose of memory: key and name in tables."""

Phase = tuple[Any, ...]
"""Name of a part of a step, chosen by the caller that runs the step."""

_CHUNKED = {
    "signed_cross_entropy",
    "sequence_loss",
    "topk_divergence",
    "linear_logprobs",
    "linear_logprobs_backward",
}
"""Ops that process the vocabulary in chunks."""


@dataclass(frozen=True)
class LossMemory:
    """Bytes that loss ops use on a GPU in addition to their results; maxima over all packs."""

    workspace: int
    """During an op that computes the gradient in its forward."""
    forward: int
    """During `linear_logprobs`, including what it keeps."""
    kept: int
    """Kept by `linear_logprobs` for its backward."""
    backward: int
    """During that backward, including what was kept."""


@dataclass
class _Entry:
    """A live storage."""

    part: str
    size: int


@dataclass(frozen=True)
class _Peak:
    """Memory at the peak of a phase."""

    total: int
    held: Counter[str]
    unsettled: tuple[_Entry, ...]


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all storages allocated while it is active, by part, until release.

    Args:
        loss: memory that loss ops allocate only on a GPU.

    Attributes:
        held: current bytes by part.
    """

    def __init__(self, loss: LossMemory) -> None:
        super().__init__()
        self._loss = loss
        self._entries: dict[int, _Entry] = {}
        self._unsettled: dict[int, _Entry] = {}
        self._phase: Phase = ()
        self._peaks: dict[Phase, _Peak] = {}
        self._open: set[Phase] = set()
        self._total = 0
        self._counts = True
        self.held: Counter[str] = Counter()

    def __enter__(self) -> MemoryTracker:
        # FSDP2 frees and reallocates gathered parameters by resizing storages, without an op.
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
        """Phase -> bytes by part at the time of their largest sum."""
        return {phase: peak.held for phase, peak in self._peaks.items() if phase}

    def enter(self, phase: Phase) -> None:
        """Start a phase; its peak starts at the memory currently held."""
        self._phase = phase
        self._add("activations", 0)

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Storages allocated within the context are in host memory and have no size."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def settle(self, part: str) -> None:
        """Assign to `part` all live storages allocated since the last call.

        Only a storage's survival distinguishes, for example, a gradient from an intermediate.
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
            self._add_unseen(name, args, result)
        return result

    def _add_unseen(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Add what a loss op uses on a GPU in addition to its results; fake ops do not show it."""
        loss = self._loss
        kept, inside = 0, loss.workspace
        if name == "sequence_loss":
            inside += 4 * args[1].numel()  # at most, for sequences longer than a chunk
        elif name == "linear_logprobs":
            kept = loss.kept - result[1].nbytes  # on the CPU it may keep less
            inside = loss.forward - loss.kept
            self._add("loss", kept)
        elif name == "linear_logprobs_backward":
            kept = loss.kept - args[1].nbytes
            # The float32 gradients, before rounding.
            inside = loss.backward - loss.kept
            inside += sum(4 * grad.numel() for grad in result if grad.itemsize < 4)
        self._add("loss", inside)
        self._add("loss", -inside)
        if name == "linear_logprobs_backward":
            self._add("loss", -kept)

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
        size = storage.nbytes() if self._counts else 0
        self._entries[key] = self._unsettled[key] = _Entry(part, size)
        weakref.finalize(storage, self._forget, key).atexit = False
        self._add(part, size)

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
