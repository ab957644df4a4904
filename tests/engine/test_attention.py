"""Documents of a packed row do not see each other."""

from itertools import pairwise

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from redi.engine.errors import InputError
from redi.engine.model.attention import choose_attention, document_kwargs, register_attention
from redi.engine.model.sharding import checkpoint_blocks

MODELS = [
    (Qwen2Config, Qwen2ForCausalLM),
    (Qwen3Config, Qwen3ForCausalLM),
    (LlamaConfig, LlamaForCausalLM),
]
BOUNDARIES = [0, 13, 14, 40]


@pytest.fixture(params=MODELS, ids=lambda m: m[1].__name__)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    config_class, model_class = request.param
    torch.manual_seed(0)
    config = config_class(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return model_class._from_config(config, attn_implementation=register_attention("sdpa"))


def packed(model: PreTrainedModel, ids: torch.Tensor, boundaries: list[int]) -> torch.Tensor:
    lengths = [b - a for a, b in pairwise(boundaries)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    kwargs = document_kwargs(torch.tensor(boundaries, dtype=torch.int32), max(lengths))
    return model.base_model(
        input_ids=ids[None], position_ids=positions[None], **kwargs
    ).last_hidden_state[0]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(0))


def changed_first_document(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([(ids[:13] + 7) % 50, ids[13:]])


@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_changing_one_document_leaves_the_others_bitwise_alone(
    model: PreTrainedModel, ids: torch.Tensor, recomputed: str
) -> None:
    model.train()
    checkpoint_blocks(model, recomputed)
    before = packed(model, ids, BOUNDARIES)
    after = packed(model, changed_first_document(ids), BOUNDARIES)
    assert torch.equal(before[13:], after[13:])
    assert not torch.equal(before[:13], after[:13])
    # The gradient does not cross either.
    embeddings = model.get_input_embeddings().weight
    after[13:].sum().backward()
    others = set(ids[13:].tolist())
    only_first = [i for i in changed_first_document(ids)[:13].tolist() if i not in others]
    assert only_first
    assert embeddings.grad is not None
    assert embeddings.grad[only_first].abs().max() == 0


def test_without_boundaries_it_would_leak(model: PreTrainedModel, ids: torch.Tensor) -> None:
    before = packed(model, ids, [0, 40])
    after = packed(model, changed_first_document(ids), [0, 40])
    assert (before[13:] - after[13:]).abs().max() > 0.1


def test_each_document_is_as_transformers_runs_it_alone(
    model: PreTrainedModel, ids: torch.Tensor
) -> None:
    ours = packed(model, ids, BOUNDARIES)
    model.set_attn_implementation("eager")
    alone = [
        model.base_model(input_ids=ids[None, a:b]).last_hidden_state[0]
        for a, b in pairwise(BOUNDARIES)
    ]
    torch.testing.assert_close(ours, torch.cat(alone), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("wanted", ["flash", "varlen"])
def test_an_attention_that_cannot_run_here_is_an_input_error(wanted: str) -> None:
    with pytest.raises(InputError, match=f'"{wanted}" needs CUDA'):
        choose_attention(wanted, torch.device("cpu"), torch.float32)
