"""Activation offload: a checkpointed block's input waits for its backward in host memory.

The input of each block but the last is copied to host memory while the block computes, and copied
back while the block after it runs backward. So a rank holds one input in forward and two in
backward, whatever the number of blocks. Host memory is page-locked, so that copies run at full
speed next to computation, on a second stream. It is allocated once, for the longest possible pack:
allocating is slow, and torch keeps page-locked memory that is freed. On a CPU the same code makes
plain copies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from redi.engine.errors import RunError
from redi.engine.model.load import first_line


def host_memory(blocks: int, input_bytes: int) -> int:
    """Bytes of host memory of a rank that offloads the inputs of a model's blocks."""
    return (blocks - 1) * _rounded(input_bytes)


def _rounded(size: int) -> int:
    """The next power of two, to which torch rounds page-locked memory up."""
    return 1 << (size - 1).bit_length()


class Offload:
    """The copies of one model's block inputs.

    All copies are made by one stream, in the order in which they were started. Device memory is
    allocated and freed by the computing stream, which waits for a copy before it frees or reads
    what the copy uses.

    Args:
        blocks: number of blocks of the model.
        device: device of the model.
        row_tokens: most tokens of a pack.
    """

    def __init__(self, blocks: int, device: torch.device, row_tokens: int) -> None:
        self._row_tokens = row_tokens
        self._to_host = self._to_device = 0
        """Bytes copied since the last call of `figures`."""
        self._last = blocks - 1
        self._device = device
        self._streams = torch.get_device_module(device)
        self._copier = self._streams.Stream()
        self.allocate: Callable[[int], Tensor] = partial(
            torch.empty, dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        """Allocates host memory, uint8 [size]."""
        self._buffers: dict[int, Tensor] = {}
        """Block -> host memory, uint8."""
        self._on_host: dict[int, Tensor] = {}
        """Block -> its input, a view of its buffer."""
        self._on_device: dict[int, tuple[Tensor, Any]] = {}
        """Block -> its input, and the event of its copy or None."""
        self._leaving: tuple[Tensor, Any] | None = None
        """The input that is copied to the host, and the event of its copy."""

    def figures(self) -> dict[str, float]:
        """GiB copied since the last call by this rank, for the metrics."""
        figures = {"offloaded_gib": self._to_host / 2**30, "fetched_gib": self._to_device / 2**30}
        self._to_host = self._to_device = 0
        return figures

    def save(self, block: int, hidden: Tensor) -> None:
        """Start to copy the input of a block to the host. The last one stays: it is needed first.

        Args:
            block: its index. Blocks are saved in ascending order.
            hidden: its input [..., tokens, width], detached.

        Raises:
            RunError: there is not enough host memory.
        """
        if block == 0:
            self._on_device.clear()  # of a forward without backward
        computing = self._streams.current_stream()
        if self._leaving is not None:
            computing.wait_event(self._leaving[1])
            self._leaving = None
        if block == self._last:
            self._on_device[block] = hidden, None
            return
        host = self._host(block, hidden)
        self._copier.wait_stream(computing)  # until `hidden` is computed
        with self._streams.stream(self._copier):
            host.copy_(hidden, non_blocking=True)
            self._leaving = hidden, self._copier.record_event()
        self._on_host[block] = host
        self._to_host += hidden.nbytes

    def load(self, block: int) -> Tensor:
        """The input of a block on the device.

        Starts to copy the input of the block before it. Blocks are loaded in descending order.
        """
        hidden, copied = self._on_device.pop(block)
        if copied is not None:
            self._streams.current_stream().wait_event(copied)
        if block > 0:
            self._fetch(block - 1)
        return hidden

    def _fetch(self, block: int) -> None:
        host = self._on_host.pop(block)
        hidden = torch.empty_like(host, device=self._device)
        # Its memory may be that of a tensor which queued operations still use.
        self._copier.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._copier):
            hidden.copy_(host, non_blocking=True)
            self._on_device[block] = hidden, self._copier.record_event()
        self._to_device += hidden.nbytes

    def _host(self, block: int, hidden: Tensor) -> Tensor:
        """A block's host memory, in the shape of its input."""
        buffer = self._buffers.get(block)
        if buffer is None:
            size = _rounded(self._row_tokens * hidden.nbytes // hidden.shape[-2])
            try:
                buffer = self._buffers[block] = self.allocate(size)
            except RuntimeError as error:
                raise RunError(
                    f"shard.offload: {size / 2**30:.2f} GiB of host memory for the input of block "
                    f"{block} of {self._last + 1} cannot be allocated ({first_line(error)}); lower "
                    "train.row_tokens, or remove shard.offload"
                ) from error
        return buffer[: hidden.nbytes].view(hidden.dtype).view(hidden.shape)


class OffloadedBlock(CheckpointWrapper):
    """A checkpointed block whose input is offloaded.

    Args:
        block: the module to wrap.
        index: its position in the model.
        offload: makes the copies.
        options: of torch's `checkpoint`.
    """

    def __init__(
        self, block: torch.nn.Module, index: int, offload: Offload, **options: Any
    ) -> None:
        super().__init__(block, **options)
        self._index = index
        self._offload = offload

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = self._checkpoint_wrapped_module
        if not torch.is_grad_enabled():
            return block(hidden_states, *args, **kwargs)

        def run(hidden: Tensor) -> Any:
            return block(hidden, *args, **kwargs)

        # The hooks apply to the arguments of checkpoint(), which applies other hooks inside.
        with saved_tensors_hooks(self._save, self._load):
            return self.checkpoint_fn(run, hidden_states)  # type: ignore[call-arg]

    def _save(self, tensor: Tensor) -> Tensor | None:
        if not tensor.numel():
            return tensor  # checkpoint() saves an empty tensor too
        self._offload.save(self._index, tensor)
        return None

    def _load(self, saved: Tensor | None) -> Tensor:
        return self._offload.load(self._index) if saved is None else saved
