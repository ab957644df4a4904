"""On a card the attention that is installed is kept too, and runs once."""

from itertools import pairwise

import pytest
import torch
from gpu_cases import DRY_RUN, SCALE
from kernel_cases import relative_error
from op_counter import OpCounter
from torch import Tensor

from redi.engine.model.attention import choose_attention, document_kwargs, register_attention
from redi.engine.model.checkpointing import ATTENTION_OPS, NOT_KEPT, checkpoint_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or DRY_RUN), reason="needs a card"),
]

LAYERS = 2
BOUNDS = [0, 70, 72, 200, 233]


def trained(mode: str, kind: str) -> tuple[list[Tensor], int]:
    """Gradients of a small model on a pack, and the number of attention's forwards."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config,
        attn_implementation=register_attention(kind),
        dtype=torch.float32 if DRY_RUN else torch.bfloat16,
    ).to(SCALE.device)
    checkpoint_blocks(model.train(), mode)
    lengths = [end - start for start, end in pairwise(BOUNDS)]
    positions = torch.cat([torch.arange(length) for length in lengths]).to(SCALE.device)
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32, device=SCALE.device)
    ids = torch.arange(BOUNDS[-1], device=SCALE.device) % 300
    with OpCounter() as ops:
        out = model.base_model(
            input_ids=ids[None],
            position_ids=positions[None],
            **document_kwargs(cu_seqlens, max(lengths)),
        )
        out.last_hidden_state.float().square().mean().backward()
    forwards = sum(count for op, count in ops.ran.items() if op in ATTENTION_OPS)
    return [p.grad for p in model.base_model.parameters()], forwards


@pytest.mark.parametrize("wanted", ["auto", "varlen"])
def test_attention_runs_once_in_its_mode_and_twice_in_full(wanted: str) -> None:
    device = torch.device(SCALE.device)
    dtype = torch.float32 if DRY_RUN else torch.bfloat16
    kind, _ = choose_attention("sdpa" if DRY_RUN else wanted, device, dtype)
    if kind in NOT_KEPT:
        pytest.skip(f"{kind} is no registered op")
    once = LAYERS * (len(BOUNDS) - 1 if kind == "sdpa" else 1)
    plain, forwards = trained("none", kind)
    assert forwards == once
    for mode, times in (("selective", 1), ("attention", 1), ("full", 2)):
        gradients, forwards = trained(mode, kind)
        assert forwards == times * once, mode
        for one, other in zip(gradients, plain, strict=True):
            # Some backwards of attention add in any order.
            assert relative_error(one, other) < 1e-2, mode
