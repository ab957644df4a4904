"""Documents of a pack do not attend to each other."""

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from architecture_cases import draw_weights, tiny_config
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from redi.engine.errors import InputError
from redi.engine.model.architecture import drops_boundaries
from redi.engine.model.attention import (
    FLASH,
    choose_attention,
    document_kwargs,
    find_flash,
    recording_calls,
    register_attention,
)
from redi.engine.model.boundaries import pass_boundaries
from redi.engine.model.checkpointing import checkpoint_blocks
from redi.engine.model.document_attention import Pattern, attend_document

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

def flash_attn_varlen_func({signature}):
    cap, left = locals().get("softcap"), window_size[0]

    def attend(q, k, v):
        k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        scores = softmax_scale * q @ k.mT
        if cap:
            scores = cap * (scores / cap).tanh()
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        hidden = distance < 0
        if left not in (None, -1):
            hidden |= distance > left
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    assert causal and q.dim() == 3 and cu_seqlens_q.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert isinstance(max_seqlen_q, int) and max_seqlen_q == max_seqlen_k == max(lengths)
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)))
    out = torch.cat([attend(*document) for document in documents], dim=1).transpose(0, 1)
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


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((kind, "gemma3_text") for kind in FLASH), ("flash-2", "gemma2"), ("flash-3", "gemma2")],
)
def test_each_flash_attn_gets_the_window_and_the_cap(
    kind: str, family: str, ids: torch.Tensor, site: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family), attn_implementation=register_attention("sdpa"), dtype=torch.float32
    )
    draw_weights(model)
    expected = packed(model, ids, BOUNDARIES)
    install(site, kind)
    register_attention(kind)
    with recording_calls() as calls:
        torch.testing.assert_close(packed(model, ids, BOUNDARIES), expected, atol=5e-6, rtol=1e-5)
    assert {call.kind for call in calls} == {kind}
    assert {call.pattern.window for call in calls} == {None, 4}


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


# Kinds of layers whose attention is more than causal: each with a family that has it. Their windows
# are shorter than the documents of BOUNDARIES.
PATTERNS = {"gemma2": "softcap", "gpt_oss": "sinks", "gemma3_text": "window"}


@pytest.mark.parametrize("kind", PATTERNS)
def test_layers_with_a_window_a_cap_or_sinks_do_not_leak(kind: str, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = tiny_config(kind)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=register_attention("sdpa"), dtype=torch.float32
    ).train()
    draw_weights(model)
    before = packed(model, ids, BOUNDARIES)
    with recording_calls() as calls:
        after = packed(model, changed_first_document(ids), BOUNDARIES)
    assert torch.equal(before[13:], after[13:])
    assert not torch.equal(before[:13], after[:13])
    # Without the boundaries it would leak.
    leaked = [packed(model, x, [0, 40])[13:] for x in (ids, changed_first_document(ids))]
    assert (leaked[0] - leaked[1]).abs().max() > 0.01
    # What ran: full and sliding layers, three documents each.
    assert len(calls) == config.num_hidden_layers
    assert {call.documents for call in calls} == {3}
    patterns = [call.pattern for call in calls]
    types = ["full_attention" if p.window is None else "sliding_attention" for p in patterns]
    assert types == config.layer_types
    assert {p.window for p in patterns} == {None, config.sliding_window}
    assert all((p.softcap is not None) == (kind == "gemma2") for p in patterns)
    assert all((p.sinks is not None) == (kind == "gpt_oss") for p in patterns)


@pytest.mark.parametrize("kind", ["nemotron", "stablelm"])
def test_blocks_that_drop_boundaries_attend_within_them_also_when_recomputed(
    kind: str, ids: torch.Tensor
) -> None:
    """The second pack's forward comes between the first pack's and its recomputation."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    assert drops_boundaries(config)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=register_attention("sdpa"), dtype=torch.float32
    ).train()
    draw_weights(model)
    with pytest.raises(InputError, match="does not pass document boundaries"):
        packed(model, ids, BOUNDARIES)

    def gradient(recomputed: bool) -> torch.Tensor:
        model.zero_grad()
        first = packed(model, ids, BOUNDARIES)
        if recomputed:
            packed(model, ids, [0, 5, 40])
        (first * torch.arange(len(first))[:, None]).sum().backward()
        grad = model.get_input_embeddings().weight.grad
        assert grad is not None
        return grad.clone()

    pass_boundaries(model)
    plain = gradient(recomputed=False)
    before, after = (packed(model, x, BOUNDARIES) for x in (ids, changed_first_document(ids)))
    assert torch.equal(before[13:], after[13:])
    checkpoint_blocks(model, "full")
    assert torch.equal(gradient(recomputed=True), plain)
    assert not torch.equal(packed(model, ids, [0, 5, 40]), before)


@pytest.mark.parametrize("length", [1, 4, 5, 600])
@pytest.mark.parametrize("pattern", [Pattern(4), Pattern(300), Pattern(4, 1.5), Pattern(None, 1.5)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_document_s_attention_is_its_formula(
    length: int, pattern: Pattern, with_sinks: bool
) -> None:
    """Also over several blocks of queries, with its gradients."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return made.requires_grad_()

    inputs = [random(1, 2, length, 8) for _ in range(3)]
    sinks = random(2) if with_sinks else None
    ours = attend_document(*inputs, pattern._replace(sinks=sinks), 0.5, 0.0)

    query, key, value = inputs
    scores = 0.5 * query @ key.mT
    if pattern.softcap:
        scores = pattern.softcap * (scores / pattern.softcap).tanh()
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (pattern.window or length))
    weights = scores.exp() * seen
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    plain = weights / total @ value

    torch.testing.assert_close(ours, plain)
    upstream = torch.randn(plain.shape, dtype=plain.dtype, generator=generator)
    wanted = [*inputs, *([] if sinks is None else [sinks])]
    for a, b in zip(
        torch.autograd.grad(ours, wanted, upstream),
        torch.autograd.grad(plain, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_an_attention_without_what_the_model_needs_is_replaced_or_an_error() -> None:
    cuda = torch.device("cuda")
    sinks = ["sinks"]
    assert choose_attention("auto", torch.device("cpu"), torch.float32, sinks)[0] == "sdpa"
    with pytest.raises(InputError, match='"varlen": varlen has no sinks, which the model needs'):
        choose_attention("varlen", cuda, torch.bfloat16, sinks)
    assert choose_attention("varlen", cuda, torch.bfloat16)[0] == "varlen"
