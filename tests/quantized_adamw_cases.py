"""Steps of AdamW with 8-bit moments on sharded matrices, for a pool of ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from redi.engine.train.quantized_adamw import QuantizedAdamW

SHAPES = ((48, 96), (49, 96), (1, 4096), (24, 512))
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
STEPS = 3


def drawn(shape: tuple[int, ...]) -> list[Tensor]:
    """A matrix, then its gradients."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(1 + STEPS)]


def sharded_steps() -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The whole matrices and moments after the steps, on each rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for shape in SHAPES:
        matrix, *gradients = drawn(shape)
        layer = nn.Linear(shape[1], shape[0], bias=False)
        layer.weight.data.copy_(matrix)
        fully_shard(layer, mesh=mesh)
        optimizer = QuantizedAdamW([{"params": [layer.weight], "weight_decay": 0.1}], **OPTIONS)
        for gradient in gradients:
            layer.weight.grad = distribute_tensor(gradient, mesh, layer.weight.placements)
            optimizer.step()
        state = optimizer.state[layer.weight]
        moments = {name: value.full_tensor() for name, value in state.items() if name != "step"}
        found.append((layer.weight.full_tensor().detach(), moments))
    return found
