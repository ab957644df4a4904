"""Context parallelism: the ranks of a group share each pack, and each has a slice of its tokens.

Everything but attention and sums over sequences treats tokens one by one, so a rank runs it on its
slice alone. Attention needs whole documents: before it ranks exchange their slices of all heads for
all tokens of some heads, and after it back (DeepSpeed Ulysses, arXiv 2309.14509).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from redi.engine.distributed import START_TIMEOUT, World


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share a pack with this one; by default this rank alone."""

    size: int = 1
    """Number of ranks: `[shard] context`."""
    index: int = 0
    """Place of this rank in the group, and of its slice in a pack."""
    group: dist.ProcessGroup | None = None
    """None if the rank is alone."""

    @classmethod
    def join(cls, size: int) -> ContextGroup:
        """The group of this rank: `size` neighbouring ranks. Collective.

        Args:
            size: divides the number of ranks.
        """
        if size == 1:
            return cls()
        group, _ = dist.new_subgroups(size, timeout=START_TIMEOUT)
        return cls(size, dist.get_rank() % size, group)

    @property
    def slice(self) -> tuple[int, int]:
        """This rank's slice of a pack: (index, count) of `slice_pack`."""
        return self.index, self.size

    def place(self, world: World) -> tuple[int, int]:
        """(number of this group, number of groups): those of a rank and of ranks in packing."""
        return world.rank // self.size, world.size // self.size

    def sum(self, values: Tensor) -> Tensor:
        """Sum of the ranks' values, differentiable: a gradient is the sum of all ranks' too."""
        return values if self.group is None else _Sum.apply(values, self.group)

    def tokens_to_heads(self, values: Tensor) -> Tensor:
        """[1, H, T / size, d] -> [1, H / size, T, d]: all tokens of some heads.

        Rank i gets the i-th of `size` equal groups of heads. Differentiable.
        """
        _, heads, tokens, width = values.shape
        sent = values.reshape(self.size, heads // self.size, tokens, width)
        received = self._exchange(sent)  # [rank, head, token, d]
        return received.transpose(0, 1).reshape(1, heads // self.size, self.size * tokens, width)

    def heads_to_tokens(self, values: Tensor) -> Tensor:
        """[1, T, H / size, d] -> [1, T / size, H, d], the inverse. Differentiable."""
        _, tokens, heads, width = values.shape
        sent = values.reshape(self.size, tokens // self.size, heads, width)
        received = self._exchange(sent)
        return received.transpose(0, 1).reshape(1, tokens // self.size, self.size * heads, width)

    def _exchange(self, values: Tensor) -> Tensor:
        """Send values[i] to rank i; the result's [i] is from rank i."""
        assert self.group is not None
        received: Tensor = all_to_all_single_autograd(values.contiguous(), None, None, self.group)
        return received


ALONE = ContextGroup()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(values, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradient, ctx.group), None


def _all_reduced(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


def key_value_copies(heads: int, groups: int, ranks: int) -> int:
    """How often a key and value head is repeated so that the ranks can divide them.

    Args:
        heads: query heads; `ranks` divides them.
        groups: key and value heads; they divide `heads`.
        ranks: of a context group.
    """
    copies = ranks // math.gcd(groups, ranks)
    return copies if heads % (groups * copies) == 0 else heads // groups
