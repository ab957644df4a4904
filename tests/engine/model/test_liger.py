"""liger-kernel computes what transformers does, in Triton's interpreter where there is no GPU."""

import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from architecture_cases import draw_weights, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from redi.engine.model.attention import document_kwargs, register_attention
from redi.engine.model.first_forward import liger_layers
from redi.engine.model.liger import apply_liger

BOUNDARIES = [0, 3, 4, 12]
# Family -> modules that are replaced in a model of two layers. Mixtures of experts are not here:
# their kernels are tuned when they are first called, which needs a GPU.
FAMILIES = {
    "llama": {"LlamaRMSNorm": 5, "LlamaMLP": 2, "rope": 1},
    "mistral": {"MistralRMSNorm": 5, "MistralMLP": 2, "rope": 1},
    "qwen2": {"Qwen2RMSNorm": 5, "Qwen2MLP": 2, "rope": 1},
    "qwen3": {"Qwen3RMSNorm": 9, "Qwen3MLP": 2, "rope": 1},
    "gemma": {"GemmaRMSNorm": 5, "GemmaMLP": 2, "rope": 1},
    "gemma2": {"Gemma2RMSNorm": 9, "Gemma2MLP": 2, "rope": 1},
    "gemma3_text": {"Gemma3RMSNorm": 13, "Gemma3MLP": 2, "rope": 1},
}


def forward_backward(model: PreTrainedModel) -> list[torch.Tensor]:
    """Hidden states of a pack [T, D], and the gradients of a function of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (1, BOUNDARIES[-1]), generator=generator)
    lengths = [b - a for a, b in pairwise(BOUNDARIES)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    kwargs = document_kwargs(torch.tensor(BOUNDARIES, dtype=torch.int32), max(lengths))
    model.zero_grad()
    hidden = model.base_model(input_ids=ids, position_ids=positions, **kwargs).last_hidden_state
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    gradients = [p.grad.clone() for p in model.base_model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.base_model.parameters()))
    return [hidden.detach(), *gradients]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter run liger-kernel's kernels.

    Its compiler makes float32 scalars of float arguments, the interpreter leaves them: `eps.to` in
    RMSNorm would fail. libdevice is for GPUs alone, so its functions are replaced by Triton's.
    """
    pytest.importorskip("liger_kernel")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here")
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats_too)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 1 - 2 / (tl.exp(2 * x) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.usefixtures("interpreted")
def test_liger_kernel_computes_what_transformers_does(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = tiny_config(kind)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-2:]
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=register_attention("sdpa"), dtype=torch.float32
    ).train()
    draw_weights(model)
    # liger-kernel replaces names of this module: undone after the test.
    code = sys.modules[type(model).__module__]
    for name, value in list(vars(code).items()):
        monkeypatch.setattr(code, name, value)
    expected = forward_backward(model)
    assert liger_layers(model) == {}
    assert apply_liger(model, "auto", torch.device("cuda")).startswith("on")
    found = forward_backward(model)
    assert liger_layers(model) == FAMILIES[kind]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
