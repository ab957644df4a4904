"""Whether an architecture can be trained on packed rows with a fused loss.

Told from the configuration, and from one forward without weights or memory, before any data is
tokenized: a model that would be trained wrongly is refused, in one line.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from redi.engine.errors import InputError
from redi.engine.model.attention import (
    WITH_DROPOUT,
    document_kwargs,
    recording_calls,
    register_probe,
)
from redi.engine.model.load import empty_model, first_line

# Features that change logits or attention in ways the fused loss and packed attention do not
# reproduce.
UNSUPPORTED = {
    "final_logit_softcapping": "soft-capped logits",
    "attn_logit_softcapping": "soft-capped attention",
    "logit_scale": "scaled logits",
    "logits_scaling": "scaled logits",
    "lm_head_multiplier": "scaled logits",
}

PROBED_LAYERS = 2

DROPOUT_OPS = {"bernoulli", "bernoulli_", "native_dropout"}

# What leads from the last hidden states to lm_head's logits, in float32 or not.
HEAD_OPS = {
    "_to_copy",
    "_unsafe_view",
    "alias",
    "clone",
    "detach",
    "expand",
    "mm",
    "bmm",
    "slice",
    "t",
    "transpose",
    "view",
}


def check_architecture(path: str, config: Any) -> None:
    """Refuse a model that packed attention or the fused loss would train wrongly.

    Args:
        path: what the user calls the model, for messages.
        config: its configuration; it is left as it is.

    Raises:
        InputError: what the model has that is not supported.
    """
    if problem := _config_problem(config) or _probe_problem(config):
        raise InputError(f"model.path: {path}: {problem}")


def check_dropout(path: str, config: Any, attention: str) -> None:
    """Refuse dropout on attention probabilities that an attention does not have.

    Args:
        attention: as `choose_attention` names it.

    Raises:
        InputError: naming the ones that have it.
    """
    dropout = getattr(config, "attention_dropout", None)
    if dropout and attention not in WITH_DROPOUT:
        raise InputError(
            f"model.path: {path}: attention_dropout = {dropout:g} is not available with attention "
            f'"{attention}"; set it to 0 in config.json, or model.attention to "sdpa"'
        )


def router_loss(config: Any) -> str | None:
    """A warning where a mixture of experts asks for a loss of its router, which is left out."""
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if not coefficient or not getattr(config, "output_router_logits", False):
        return None
    return (
        f"the model's router loss (router_aux_loss_coef = {coefficient:g}, output_router_logits = "
        "true) is not trained: only the objective is"
    )


def _config_problem(config: Any) -> str | None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder; a causal language model is needed"
    if _is_composite(config):
        return (
            f"{kind} is a composite model (text with vision or audio); save its text model as a "
            "folder of its own"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"{kind} is not a causal language model"
    if getattr(config, "is_decoder", None) is False and not hasattr(config, "rope_parameters"):
        return f"{kind} has is_decoder = false; a causal language model is needed"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized (quantization_config), which cannot be trained"
    for name, meaning in UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value is not None and value != 1.0:
            return f"it has {meaning} ({name}), which is not supported"
    layers = getattr(config, "layer_types", None)
    if layers is None and getattr(config, "sliding_window", None) is not None:
        layers = ["sliding_attention"]
    if other := set(layers or ()) - {"full_attention"}:
        return (
            f"it has layers of type {', '.join(sorted(other))}; packed rows need full attention in "
            "every layer"
        )
    if "dynamic" in rope_types(config):
        return (
            "its rope_type is dynamic: a trace's positions would depend on the traces packed "
            'beside it; set another rope_type ("yarn", "linear") in config.json'
        )
    return None


def _is_composite(config: Any) -> bool:
    if {"vision_config", "audio_config"} & set(config.sub_configs):
        return True
    try:
        return config.get_text_config() is not config
    except ValueError:  # it has several
        return True


def rope_types(config: Any) -> set[str]:
    """The rope types of a configuration: one for all layers, or one a layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(one["rope_type"]) for one in [parameters, *nested] if one.get("rope_type")}


def _probe_problem(config: Any) -> str | None:
    """What stops a forward of two documents through two layers, on the meta device."""
    attention = register_probe()
    try:
        model = empty_model(_shallow(config), attention=attention)
    except Exception as error:  # transformers raises many types for what it does not know
        if isinstance(error, KeyError) and error.args == (attention,):
            return f"{config.model_type} has an attention that cannot be replaced by a packed one"
        return f"transformers cannot build it: {type(error).__name__}: {first_line(error)}"
    return model_problem(model) or _forward_problem(model)


def model_problem(model: PreTrainedModel) -> str | None:
    """What of a model's build the packed rows, the fused loss or the sharding cannot take."""
    name = type(model).__name__
    blocks = getattr(model.base_model, "layers", ())
    if not blocks or not all(hasattr(block, "self_attn") for block in blocks):
        return f"{name} is not built of attention blocks, which packed rows need"
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return f"{name} has no plain lm_head (a bias is not supported)"
    scalars = [key for key, tensor in model.state_dict().items() if tensor.dim() == 0]
    if scalars:
        return f"{name} has a weight without dimensions, which cannot be sharded: {scalars[0]}"
    return None


def _forward_problem(model: PreTrainedModel) -> str | None:
    name = type(model).__name__
    for module_name, module in model.named_modules():
        if module_name.rpartition(".")[2] == "experts":
            # Which tokens an expert gets is not known without values; shapes stay as they are.
            module.forward = _first_argument
    tokens = torch.arange(6, device="meta")[None]
    boundaries = torch.tensor([0, 4, 6], dtype=torch.int32)
    ops = _ProbedOps()
    hook = model.base_model.register_forward_hook(ops.leave_trunk)
    try:
        with recording_calls() as calls, torch.no_grad(), ops:
            logits = model(
                input_ids=tokens, position_ids=tokens, **document_kwargs(boundaries, 4)
            ).logits
    except InputError as error:
        return f"{name}: {error}, which packed rows do not allow"
    except Exception as error:
        if isinstance(error, NotImplementedError) or "meta" in str(error):
            # Not every layer runs without values. The first forward of training looks again.
            return None
        return f"{name}: its forward fails without a mask: {first_line(error)}"
    finally:
        hook.remove()
    blocks = len(model.base_model.layers)
    if len(calls) != blocks:
        return f"{name}: {len(calls)} of {blocks} layers call the attention function"
    if ops.random:
        return f"{name}: it draws random numbers in training ({ops.random[0]})"
    if ops.on_logits or logits.shape[-1] != model.get_output_embeddings().weight.shape[0]:
        how = f" ({ops.on_logits[0]})" if ops.on_logits else ""
        return f"{name}: its logits are not lm_head's alone{how}, which the fused loss needs"
    return None


class _ProbedOps(TorchDispatchMode):
    """Records ops of a forward that the engine would not repeat.

    Random numbers other than dropout's: a router that samples. And what is done to the last hidden
    states beside their product with lm_head: scaled, capped or otherwise changed logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.random: list[str] = []
        self.on_logits: list[str] = []
        self._in_trunk = True

    def leave_trunk(self, *_: Any) -> None:
        """Hook after the trunk's forward."""
        self._in_trunk = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if isinstance(out, torch.Tensor) and out.is_meta:  # layer dropout draws a number on the CPU
            if torch.Tag.nondeterministic_seeded in func.tags and name not in DROPOUT_OPS:
                self.random.append(name)
            by_one = name in ("div", "mul") and args[1] == 1
            if not self._in_trunk and name not in HEAD_OPS and not by_one:
                self.on_logits.append(name)
        return out


def _first_argument(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden


def _shallow(config: Any) -> Any:
    """A copy with few layers; lists of a value a layer are cut to them."""
    depth = getattr(config, "num_hidden_layers", 0)
    copy = deepcopy(config)
    copy.pad_token_id = None  # one outside the vocabulary is told with the tokenizer, later
    if depth <= PROBED_LAYERS:
        return copy
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth:
            setattr(copy, name, value[:PROBED_LAYERS])
    copy.num_hidden_layers = PROBED_LAYERS
    return copy


def per_document_rope(model: nn.Module, config: Any) -> None:
    """Let longrope choose its factors document by document.

    transformers takes the long ones for the whole row as soon as one document is long, so that a
    trace's log-probs would depend on its neighbours.
    """
    if "longrope" not in rope_types(config):
        return
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "rotary_emb":
            module.forward = partial(_by_document, module.forward)


def _by_document(
    forward: Any, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotary embedding's `forward`, run for each document of a row."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    if position_ids.shape[0] != 1 or starts[:1] != [0]:  # generation: a batch, not a packed row
        return forward(x, position_ids, *args, **kwargs)
    ends = [*starts[1:], position_ids.shape[1]]
    parts = [
        forward(x[:, a:b], position_ids[:, a:b], *args, **kwargs)
        for a, b in zip(starts, ends, strict=True)
    ]
    cos, sin = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return cos, sin
