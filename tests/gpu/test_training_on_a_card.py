"""What training needs of a card beside the loss: sharding, packed attention."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gpu_cases import DRY_RUN, SCALE, make_row
from kernel_cases import Case, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from redi.kernels import RediLoss, redi_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or DRY_RUN), reason="needs a card"),
]


class Head(nn.Module):
    """A layer of trunk, an lm_head, and the loss in one forward, as FSDP2 wants it."""

    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(hidden, hidden)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, x: Tensor, targets: Tensor, cu_seqlens: Tensor, signs: Tensor) -> RediLoss:
        return redi_loss(
            self.trunk(x), self.lm_head.weight, targets, cu_seqlens, signs,
            alpha=0.8, num_pairs=8, backend="triton",
        )  # fmt: skip


def test_sharded_is_unsharded(tmp_path: Path) -> None:
    case = make_row(SCALE.tokens // 8, SCALE.hidden[0])
    torch.manual_seed(0)
    plain = Head(SCALE.hidden[0], SCALE.vocab).to(SCALE.device)
    sharded = Head(SCALE.hidden[0], SCALE.vocab).to(SCALE.device)
    sharded.load_state_dict(plain.state_dict())
    plain.to(torch.bfloat16)(*inputs(case)).loss.backward()
    dist.init_process_group(
        "gloo" if DRY_RUN else "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0,
        world_size=1,
    )  # fmt: skip
    try:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(sharded, mesh=init_device_mesh(SCALE.device, (1,)), mp_policy=policy)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded(*inputs(case)).loss.backward()
        pairs = zip(sharded.parameters(), plain.parameters(), strict=True)
        for parameter, expected in pairs:
            assert parameter.dtype == torch.float32
            assert relative_error(parameter.grad.full_tensor(), expected.grad) < 1e-6
    finally:
        dist.destroy_process_group()


def inputs(case: Case) -> tuple[Tensor, ...]:
    """Of `Head`."""
    return case.hidden, *case.arguments[2:]


@pytest.fixture
def states() -> Callable[..., Tensor]:
    """Last hidden states [T, D] of a pack by a small model: `states(ids, bounds)`."""
    transformers = pytest.importorskip("transformers")
    from redi.engine.model.attention import choose_attention, document_kwargs, register_attention

    device = torch.device(SCALE.device)
    dtype = torch.float32 if DRY_RUN else torch.bfloat16
    kind, _ = choose_attention("sdpa" if DRY_RUN else "varlen", device, dtype)
    config = transformers.Qwen2Config(
        vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=register_attention(kind), dtype=dtype
    ).to(device)

    def run(
        ids: Tensor, bounds: list[int], attended: Tensor | None = None, own: Tensor | None = None
    ) -> Tensor:
        lengths = [b - a for a, b in pairwise(bounds)]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        with torch.no_grad():
            return model.base_model(
                input_ids=ids[None],
                position_ids=(positions if own is None else positions[own])[None],
                **document_kwargs(cu_seqlens, max(lengths), attended, own),
            ).last_hidden_state[0]

    return run


def test_traces_of_one_prompt_share_it_in_a_pack(states: Callable[..., Tensor]) -> None:
    device = torch.device(SCALE.device)
    prompt, first, second = (torch.randint(300, (n,), device=device) for n in (40, 30, 90))
    whole = torch.cat([prompt, first, prompt, second])
    expected = states(whole, [0, 70, 200])
    own = torch.tensor([*range(70), *range(109, 200)], device=device)
    attended = torch.tensor([*range(70), *range(39), *range(70, 161)], device=device)
    assert torch.equal(whole[own][attended], whole)
    shared = states(whole[own], [0, 70, 200], attended, own)
    assert relative_error(shared, expected[own]) < 2e-2


def test_documents_of_a_packed_row_do_not_see_each_other(states: Callable[..., Tensor]) -> None:
    device = torch.device(SCALE.device)
    bounds = [0, 70, 71, 200, 233]
    ids = torch.randint(300, (233,), device=device)
    before = states(ids, bounds)
    changed = ids.clone()
    changed[71:200] = (changed[71:200] + 1) % 300
    after = states(changed, bounds)
    others = [*range(71), *range(200, 233)]
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[71:200], before[71:200])
    # The other way round: with the boundary gone they do, and the test can tell.
    assert not torch.equal(states(changed, [0, 70, 71, 233])[200:], before[200:])
    for start, end in pairwise(bounds):
        alone = states(ids[start:end], [0, end - start])
        assert relative_error(alone, before[start:end]) < 2e-2
