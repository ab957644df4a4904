"""Steps of Muon on sharded matrices, for a pool of ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from redi.engine.train.tensor_steps import GatheredMuon

SHAPES = ((8, 24), (24, 8), (7, 5), (1, 5))
OPTIONS = {"lr": 1e-2, "adjust_lr_fn": "match_rms_adamw"}
STEPS = 3


def drawn() -> list[list[Tensor]]:
    """For each shape the matrix, then its gradients."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator) for _ in range(1 + STEPS)] for shape in SHAPES]


def sharded_steps() -> list[Tensor]:
    """The whole matrices after the steps, on each rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for matrix, *gradients in drawn():
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        layer.weight.data.copy_(matrix)
        fully_shard(layer, mesh=mesh)
        optimizer = GatheredMuon(layer.parameters(), **OPTIONS)
        for gradient in gradients:
            placed = distribute_tensor(gradient, mesh, layer.weight.placements)
            layer.weight.grad = placed
            optimizer.step()
        found.append(layer.weight.full_tensor().detach())
    return found
