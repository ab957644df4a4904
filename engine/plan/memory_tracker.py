"""Counts the memory of tensors, from the making of each storage to its end, by what it is for."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

PARTS = {
    "masters": "float32 master weights",
    "moments": "AdamW's moments",
    "gradients": "gradients",
    "gathered": "gathered parameters, gradients being reduced",
    "activations": "activations, of transformers' own layers",
    "loss": "loss: dX, dW, a chunk of the vocabulary",
    "update": "clipping and update",
}
"""What memory is for, as tables call it."""

Phase = tuple[Any, ...]
"""A stretch of a step, as whoever runs the step names it."""

_CHUNKED = {"signed_cross_entropy", "linear_logprobs", "linear_logprobs_backward"}
"""Ops that run through the vocabulary in chunks."""


@dataclass(frozen=True)
class LossMemory:
    """Bytes that loss ops take on a card beside their results, each at the worst of all rows."""

    workspace: int
    """While an op runs that makes the gradient at once."""
    forward: int
    """While `linear_logprobs` runs, with what it keeps."""
    kept: int
    """For its backward."""
    backward: int
    """While that runs, with what was kept."""


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


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, by part, until they end.

    Args:
        loss: what only a card allocates.

    Attributes:
        held: bytes by part, now.
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
        self.held: Counter[str] = Counter()

    def __enter__(self) -> MemoryTracker:
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
            self._add_unseen(name, args, result)
        return result

    def _add_unseen(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """What a loss op takes on a card, beside its results, and no fake of it shows."""
        loss = self._loss
        kept, inside = 0, loss.workspace
        if name == "linear_logprobs":
            kept = loss.kept - result[1].nbytes  # what this CPU had no room for
            inside = loss.forward - loss.kept
            self._add("loss", kept)
        elif name == "linear_logprobs_backward":
            kept = loss.kept - args[1].nbytes
            # The gradients in float32, before they are rounded.
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
