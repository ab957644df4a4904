"""How the kernels are launched."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """Of the logits product with exponentials, `exponentials_triton.exponentials_kernel`."""

    rows: int
    """Of a tile."""
    columns: int
    depth: int
    """Of D that one step of a tile's product takes."""
    warps: int
    stages: int
    """Steps whose operands are under way or at hand in shared memory."""
    group: int
    """Blocks of rows that share a walk over the columns."""
    flatten: bool
    """Whether the next tile's operands are fetched during the epilogue."""


# By compute capability. 128 x 256 tiles are what cuBLAS takes too: their 256 KiB of sums fill half
# of an SM's registers, and three steps of operands and the stored tile most of its shared memory.
# On sm_100 a flattened loop spills.
LAUNCHES = {
    90: Launch(rows=128, columns=256, depth=64, warps=8, stages=3, group=32, flatten=True),
    100: Launch(rows=128, columns=256, depth=64, warps=8, stages=3, group=32, flatten=False),
}
# Small, so that tests have several blocks of rows and tiles.
INTERPRETED = Launch(rows=16, columns=128, depth=64, warps=4, stages=1, group=2, flatten=False)


def launch_for(weight: Tensor) -> Launch:
    """The launch for an lm_head [V, D]."""
    if not weight.is_cuda:
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(weight.device)
    return LAUNCHES[max(arch for arch in LAUNCHES if arch <= 10 * major + minor)]
