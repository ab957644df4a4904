"""Offloaded inputs of blocks on a card: copies on another stream, at any delay, and memory."""

import pytest
import torch
from gpu_cases import DRY_RUN, SCALE
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from redi.engine.model.offload import Offload, OffloadedBlock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or DRY_RUN), reason="needs a card"),
]

BLOCKS = 8
DEVICE = torch.device(SCALE.device)


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def trunk(offload: Offload | None) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(SCALE.hidden[0]).to(DEVICE, torch.bfloat16) for _ in range(BLOCKS)]
    if offload is None:
        return nn.Sequential(*map(checkpoint_wrapper, blocks))
    return nn.Sequential(
        *(OffloadedBlock(block, index, offload) for index, block in enumerate(blocks))
    )


def micro_step(model: nn.Module, tokens: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    x = torch.randn(tokens, SCALE.hidden[0], device=DEVICE, generator=generator)
    model(x.bfloat16().requires_grad_()).float().square().mean().backward()


def gradients(model: nn.Module, offload: Offload | None, late: bool = False) -> list[Tensor]:
    for tokens in (SCALE.tokens, SCALE.tokens // 4, SCALE.tokens // 2):
        if late and offload is not None and not DRY_RUN:
            with torch.cuda.stream(offload._copier):
                torch.cuda._sleep(200_000_000)  # about 0.1 s
        micro_step(model, tokens)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late copies"])
def test_gradients_are_bit_equal(late: bool) -> None:
    offload = Offload(BLOCKS, DEVICE, SCALE.tokens)
    found = gradients(trunk(offload), offload, late)
    expected = gradients(trunk(None), None)
    assert all(map(torch.equal, found, expected))
    figures = offload.figures()
    assert figures["offloaded_gib"] == figures["fetched_gib"] > 0


@pytest.mark.skipif(DRY_RUN, reason="a CPU has no memory apart")
def test_two_inputs_are_on_the_card_and_host_memory_is_allocated_once() -> None:
    peaks = []
    for offload in (None, Offload(BLOCKS, DEVICE, SCALE.tokens)):
        model = trunk(offload)
        micro_step(model, SCALE.tokens)
        torch.cuda.reset_peak_memory_stats()
        pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
        micro_step(model, SCALE.tokens)
        assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned
        peaks.append(torch.cuda.max_memory_allocated())
        del model
    of_input = SCALE.tokens * SCALE.hidden[0] * 2
    # The test itself holds the input of the first block.
    assert peaks[0] - peaks[1] >= 0.9 * (BLOCKS - 3) * of_input
