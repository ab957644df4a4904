"""Linear attentions, state spaces and convolutions run document by document."""

from itertools import pairwise

import pytest
import torch
from architecture_cases import draw_weights, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from redi.engine.model.attention import document_kwargs, recording_calls, register_attention
from redi.engine.model.checkpointing import checkpoint_blocks
from redi.engine.model.mixers import has_attention, mixer_of, separate_documents, split_calls

BOUNDARIES = [0, 13, 14, 40]
# Family -> layers with attention and with a mixer.
FAMILIES = {
    "lfm2": (2, 2),
    "qwen3_next": (1, 3),
    "bamba": (2, 2),
    "olmo_hybrid": (1, 3),
    "qwen3_5_text": (1, 3),
    "qwen3_5_moe_text": (1, 3),
    "lfm2_moe": (2, 2),
    "lfm3": (1, 3),
    "kimi_linear": (1, 3),
    "bailing_hybrid": (1, 3),
    "granitemoehybrid": (2, 2),
}
QUICK = ("lfm2", "qwen3_next")


def packed(
    model: PreTrainedModel, ids: torch.Tensor, boundaries: list[int] = BOUNDARIES
) -> torch.Tensor:
    lengths = [b - a for a, b in pairwise(boundaries)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    kwargs = document_kwargs(torch.tensor(boundaries, dtype=torch.int32), max(lengths))
    return model.base_model(
        input_ids=ids[None], position_ids=positions[None], **kwargs
    ).last_hidden_state[0]


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES],
)
def test_documents_do_not_leak_through_a_mixer(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(kind), attn_implementation=register_attention("sdpa"), dtype=torch.float32
    ).train()
    draw_weights(model)
    ids = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(0))
    changed = torch.cat([(ids[:13] + 7) % 50, ids[13:]])
    separate_documents(model)
    # Without the boundaries they would leak, also through the mixers alone.
    leaked = [packed(model, x, [0, 40])[13:] for x in (ids, changed)]
    assert (leaked[0] - leaked[1]).abs().max() > 1e-3
    mixer = next(filter(None, map(mixer_of, model.base_model.layers)))
    hidden = torch.randn(1, 40, 32)
    other = torch.cat([hidden[:, :13] + 1, hidden[:, 13:]], dim=1)
    alone = [mixer(hidden_states=x)[:, 13] for x in (hidden, other)]
    assert not torch.equal(*alone)

    with recording_calls() as found:
        before = packed(model, ids)
    # An expert's product has the tokens of all documents, so it may round in another way.
    experts = any(name.endswith("experts") for name, _ in model.named_modules())
    difference = (before[13:] - packed(model, changed)[13:]).abs().max()
    assert difference <= (1e-6 * before.abs().max() if experts else 0)
    attention, mixers = split_calls(found)
    assert (len(attention), len(mixers)) == FAMILIES[kind]
    assert {call.documents for call in found} == {3}
    blocks = model.base_model.layers
    assert sum(map(has_attention, blocks)) == len(attention)
    assert sum(mixer_of(block) is not None for block in blocks) == len(mixers)

    # Nor does a gradient; it is the same when blocks are recomputed.
    def gradient() -> torch.Tensor:
        model.zero_grad()
        packed(model, changed)[13:].square().sum().backward()
        grad = model.get_input_embeddings().weight.grad
        assert grad is not None
        return grad.clone()

    plain = gradient()
    others = set(ids[13:].tolist())
    only_first = [i for i in changed[:13].tolist() if i not in others]
    assert only_first
    assert plain[only_first].abs().max() == 0
    checkpoint_blocks(model, "full")
    assert torch.equal(gradient(), plain)
