"""Documents of a pack do not attend to each other."""

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

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
from redi.engine.model.attention import (
    FLASH,
    choose_attention,
    document_kwargs,
    find_flash,
    register_attention,
)
from redi.engine.model.checkpointing import checkpoint_blocks

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


@pytest.mark.parametrize("recomputed", ["none", "selective", "attention", "full"])
def test_changing_one_document_leaves_the_others_bitwise_alone(
    model: PreTrainedModel, ids: torch.Tensor, recomputed: str
) -> None:
    model.train()
    checkpoint_blocks(model, recomputed)
    before = packed(model, ids, BOUNDARIES)
    after = packed(model, changed_first_document(ids), BOUNDARIES)
    assert torch.equal(before[13:], after[13:])
    assert not torch.equal(before[:13], after[:13])
    # Nor does a gradient flow between documents.
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


# Stand-ins for flash-attn's releases, which need a GPU: their modules, signatures and return values
# (flash-attn 4 always returns a tuple), computed document by document.
SIGNATURES = {
    "flash-2": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,"
    " softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,"
    " alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None",
    "flash-3": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,"
    " seqused_k=None, softmax_scale=None, causal=False, qv=None,"
    " q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,"
    " softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,"
    " return_attn_probs=False",
    "flash-4": "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,"
    " max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, softmax_scale=None,"
    " causal=False, window_size=(None, None), deterministic=False, return_lse=False",
}
STAND_IN = """
import torch
import torch.nn.functional as F

def flash_attn_varlen_func({signature}):
    assert causal and q.dim() == 3 and cu_seqlens_q.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert isinstance(max_seqlen_q, int) and max_seqlen_q == max_seqlen_k == max(lengths)
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)))
    out = torch.cat([
        F.scaled_dot_product_attention(
            *(x[None] for x in document), is_causal=True, scale=softmax_scale, enable_gqa=True
        )[0]
        for document in documents
    ], dim=1).transpose(0, 1)
    return {result}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of packages, first on the path; its modules are removed afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("flash_attn"):
            del sys.modules[name]
    register_attention("sdpa")


def install(site: Path, kind: str, source: str | None = None) -> None:
    """A stand-in for a release of flash-attn, or with `source` a module with that text."""
    name = FLASH[kind].package
    info = site / f"{name.replace('-', '_')}-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
    write_module(site, kind, source)


def write_module(site: Path, kind: str, source: str | None = None) -> None:
    if source is None:
        result = "(out, None)" if kind == "flash-4" else "out"
        source = STAND_IN.format(signature=SIGNATURES[kind], result=result)
    path = site / FLASH[kind].module.replace(".", "/")
    path.mkdir(parents=True, exist_ok=True)
    (path / "__init__.py").write_text(source)
    for parent in path.relative_to(site).parents:
        (site / parent / "__init__.py").touch()


@pytest.mark.parametrize("kind", FLASH)
def test_each_flash_attn_is_called_as_its_release_wants_it(
    kind: str, model: PreTrainedModel, ids: torch.Tensor, site: Path
) -> None:
    expected = packed(model, ids, BOUNDARIES)
    install(site, kind)
    register_attention(kind)
    torch.testing.assert_close(packed(model, ids, BOUNDARIES), expected, atol=5e-6, rtol=1e-5)


def test_the_flash_attn_that_suits_the_card_is_taken(site: Path) -> None:
    assert find_flash(9) == (
        None,
        "flash-attn-3 is not installed; flash-attn-4 is not installed; flash-attn is not installed",
    )
    install(site, "flash-2")
    write_module(site, "flash-4")  # the older copy in flash-attn 2
    assert find_flash(10) == ("flash-2", "flash-attn 9.0")
    install(site, "flash-3", "raise OSError('undefined symbol')")
    assert find_flash(9) == ("flash-2", "flash-attn 9.0")
    kind, reason = find_flash(7)
    assert kind is None
    assert reason == "there is no flash-attn for sm_7x"


def test_on_hopper_3_comes_first_and_on_blackwell_4(site: Path) -> None:
    for kind in FLASH:
        install(site, kind)
    found = [find_flash(major)[0] for major in (8, 9, 10, 12)]
    assert found == ["flash-2", "flash-3", "flash-4", "flash-2"]
