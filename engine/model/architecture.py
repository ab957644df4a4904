"""Checks that an architecture can be trained on packs with a fused loss.

The checks use the configuration and one forward on the meta device, without weights, and run before
data is tokenized. A model that would be trained wrongly is refused in one line.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from redi.engine.errors import InputError
from redi.engine.loss.packed_loss import Logits
from redi.engine.model.attention import (
    WITH_DROPOUT,
    AttentionCall,
    NoBoundariesError,
    choose_attention,
    document_kwargs,
    features_of,
    recording_calls,
    register_mask_probe,
    register_probe,
)
from redi.engine.model.boundaries import pass_boundaries
from redi.engine.model.context_attention import check_heads
from redi.engine.model.document_attention import PLAIN, Pattern, visible
from redi.engine.model.load import empty_model, first_line
from redi.engine.model.logits import logits_of
from redi.engine.model.mixers import has_attention, mixer_of, separate_documents, split_calls

PROBED_LAYERS = 2
"""Least number of layers of a probed model; more if there are more types of layers."""
PROBED_WINDOW = 3
PROBED_TOKENS = 6
"""More than the probed window."""

SUPPORTED_LAYERS = {"full_attention", "sliding_attention", "linear_attention", "conv"}

DROPOUT_OPS = {"bernoulli", "bernoulli_", "native_dropout"}


def check_architecture(path: str, config: Any) -> Logits:
    """Refuse a model that packed attention or the fused loss would train wrongly.

    Args:
        path: the user's path of the model, for messages.
        config: its configuration; not changed.

    Returns:
        The transform of its logits.

    Raises:
        InputError: names the feature of the model that is not supported.
    """
    try:
        if problem := _config_problem(config):
            raise InputError(problem)
        return _probed(config).logits
    except InputError as error:
        raise InputError(f"model.path: {path}: {error}") from None


def attention_for(
    config: Any, wanted: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """`choose_attention` with the features that a model's layers have."""
    patterns = filter(None, layer_patterns(config))
    features = {name for pattern in patterns for name in features_of(pattern)}
    return choose_attention(wanted, device, dtype, sorted(features))


def check_dropout(path: str, config: Any, attention: str) -> None:
    """Refuse dropout on attention probabilities if the chosen attention does not support it.

    Args:
        attention: a name returned by `choose_attention`.

    Raises:
        InputError: names an attention that supports it.
    """
    dropout = getattr(config, "attention_dropout", None)
    if dropout and attention not in WITH_DROPOUT:
        raise InputError(
            f"model.path: {path}: attention_dropout = {dropout:g} is not available with attention "
            f'"{attention}"; set it to 0 in config.json, or model.attention to "sdpa"'
        )


def slice_problem(config: Any) -> str | None:
    """Why a model needs whole documents in a pack, or None.

    Ranks of a context group cannot share its packs, nor traces their prompts.
    """
    if has_mixers(config):
        return "its linear attention, state spaces or convolutions need whole documents"
    if "longrope" in rope_types(config):
        return "its longrope chooses the factors of a whole document by its length"
    return None


def check_context(path: str, config: Any, ranks: int) -> None:
    """Raise InputError unless `ranks` ranks can share packs of a model (`[shard] context`)."""
    if ranks == 1:
        return
    if problem := slice_problem(config):
        raise InputError(f"shard.context: not available for {path}: {problem}; remove it")
    check_heads(config.num_attention_heads, ranks)


def _config_problem(config: Any) -> str | None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder; a causal language model is needed"
    if _is_composite(config):
        return (
            f"{kind} is a composite model (text with vision or audio); save its text model in a "
            "separate directory"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"{kind} is not a causal language model"
    if getattr(config, "is_decoder", None) is False and not hasattr(config, "rope_parameters"):
        return f"{kind} has is_decoder = false; a causal language model is needed"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized (quantization_config), which cannot be trained"
    layers = getattr(config, "layer_types", None)
    if other := set(layers or ()) - SUPPORTED_LAYERS:
        return (
            f"it has layers of type {', '.join(sorted(other))}; packs need full, sliding or "
            "linear attention, or convolutions"
        )
    if "dynamic" in rope_types(config):
        return (
            "its rope_type is dynamic: a trace's positions would depend on the other traces of its "
            'pack; set another rope_type ("yarn", "linear") in config.json'
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


def layer_patterns(config: Any) -> tuple[Pattern | None, ...]:
    """What each layer's attention has besides causality; None for a layer without attention.

    Raises:
        InputError: as `check_architecture`.
    """
    return _probed(config).patterns


def drops_boundaries(config: Any) -> bool:
    """True if a model needs `pass_boundaries`. InputError: as `check_architecture`."""
    return _probed(config).drops_boundaries


def has_mixers(config: Any) -> bool:
    """True if a model has layers that run document by document (`mixers.py`)."""
    return _probed(config).has_mixers


class _Probed(NamedTuple):
    """What forwards of a model on the meta device show."""

    logits: Logits
    patterns: tuple[Pattern | None, ...]
    has_mixers: bool
    drops_boundaries: bool


_known: dict[str, _Probed] = {}
"""Results of `_probed` in this process, by configuration: several checks of a run need them."""


def _probed(config: Any) -> _Probed:
    key = f"{type(config)} {config.to_json_string(use_diff=False)}"
    if key not in _known:
        model = _probe(config)
        if problem := model_problem(model):
            raise InputError(problem)
        separate_documents(model)
        mixers = any(mixer_of(block) for block in model.base_model.layers)
        dropped = False
        try:
            patterns = _patterns(model, config)
        except NoBoundariesError:
            dropped = True
            pass_boundaries(model)
            patterns = _patterns(model, config)
        _known[key] = _Probed(logits_of(model), patterns, mixers, dropped)
    return _known[key]


def _probe(config: Any, **changes: Any) -> PreTrainedModel:
    """A model of few layers on the meta device, with attention that computes nothing.

    Args:
        config: of the whole model; not changed.
        changes: other values for it.
    """
    attention = register_probe()
    try:
        shallow = _shallow(config)
        for name, value in changes.items():
            setattr(shallow, name, value)
        return empty_model(shallow, attention=attention)
    except Exception as error:  # transformers raises many types
        if isinstance(error, KeyError) and error.args == (attention,):
            raise InputError(
                f"{config.model_type} has an attention that cannot be replaced by a packed one"
            ) from None
        raise InputError(
            f"transformers cannot build it: {type(error).__name__}: {first_line(error)}"
        ) from None


def model_problem(model: PreTrainedModel) -> str | None:
    """The part of a model that packs, the fused loss or sharding do not support, or None."""
    name = type(model).__name__
    blocks = getattr(model.base_model, "layers", ())
    if not blocks or not all(has_attention(one) or mixer_of(one) for one in blocks):
        return f"{name} is not built of attention blocks, which packs need"
    if not any(map(has_attention, blocks)):
        return f"{name} has no layer of attention, which packs need"
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return f"{name} has no plain lm_head (a bias is not supported)"
    scalars = [key for key, weight in model.named_parameters() if weight.dim() == 0]
    if scalars:
        return f"{name} has a weight without dimensions, which cannot be sharded: {scalars[0]}"
    return None


def _patterns(model: PreTrainedModel, config: Any) -> tuple[Pattern | None, ...]:
    """The patterns of a model's layers, by forwards of its first layer of each type.

    Raises:
        InputError: its attention is not causal within a window that the packed one is given.
    """
    depth, kept = config.num_hidden_layers, _probed_layers(config)
    types = _layer_types(config) or [""] * depth
    calls = _packed_calls(model)
    _check_masks(config, checked=calls is not None)
    attention = [has_attention(block) for block in model.base_model.layers]
    # If it does not run without values, the first forward of training checks the number of calls.
    found = iter([PLAIN] * sum(attention) if calls is None else [call.pattern for call in calls])
    patterns = [next(found) if attends else None for attends in attention]
    of_type = {types[layer]: pattern for layer, pattern in zip(kept, patterns, strict=True)}
    return tuple(of_type[kind] for kind in types)


def _packed_calls(model: PreTrainedModel) -> list[AttentionCall] | None:
    """The calls of attention in a forward of two documents; None if it does not run on meta.

    Raises:
        InputError: a layer does not call it, or its mixer does not run by document.
    """
    tokens = torch.arange(PROBED_TOKENS, device="meta")[None]
    boundaries = torch.tensor([0, 4, PROBED_TOKENS], dtype=torch.int32)
    ops = _RandomOps()
    documents = document_kwargs(boundaries, 4, attended=tokens[0], own=tokens[0])
    with ops:
        calls = _calls_of(model, position_ids=tokens, **documents)
    if calls is None:
        return None
    name = type(model).__name__
    attention, mixers = split_calls(calls)
    if len(attention) != (wanted := sum(map(has_attention, model.base_model.layers))):
        raise InputError(f"{name}: {len(attention)} of {wanted} layers call the attention function")
    if not all(call.shares_prompts for call in attention):
        raise InputError(f"{name}: it passes its attention the documents of a pack only in part")
    wanted = sum(mixer_of(block) is not None for block in model.base_model.layers)
    if len(mixers) != wanted:
        raise InputError(f"{name}: {len(mixers)} of {wanted} mixers are given document boundaries")
    if ops.random:
        raise InputError(f"{name}: it draws random numbers in training ({ops.random[0]})")
    return attention


def _check_masks(config: Any, checked: bool) -> None:
    """Compare the masks of transformers' own attention with what the packed one is given.

    transformers' own functions use the masks alone. A layer may have one that its arguments do not
    have (a chunk, a window): packed attention would then be another.

    Args:
        checked: False if the calls of packed attention are not known.

    Raises:
        InputError: they differ.
    """
    has_window = isinstance(getattr(config, "sliding_window", None), int)
    model = _probe(config, **{"sliding_window": PROBED_WINDOW} if has_window else {})
    model.set_attn_implementation(register_mask_probe())
    tokens = PROBED_TOKENS
    whole = torch.ones(1, tokens, dtype=torch.int64, device="meta")
    calls = _calls_of(model, attention_mask=whole, use_cache=False)
    if calls is None and "sliding_attention" not in (_layer_types(config) or ()):
        return
    name = type(model).__name__
    if calls is None or not checked:
        raise InputError(f"{name}: its sliding windows cannot be checked without weights")
    for number, call in enumerate(calls):
        window = call.pattern.window
        if window is not None and window != PROBED_WINDOW:
            raise InputError(f"{name}: it has a window that is not its sliding_window ({window})")
        expected = visible(0, tokens, 0, window)
        if call.mask is None or not torch.equal(call.mask.view(tokens, tokens), expected):
            raise InputError(
                f"{name}: attention of its layer {number} is not causal, or has a mask"
            )


def _calls_of(model: PreTrainedModel, **inputs: Any) -> list[AttentionCall] | None:
    """The calls of attention in a forward on the meta device; None if it does not run there.

    Raises:
        InputError: attention is called with what it does not support, or the forward fails.
    """
    name = type(model).__name__
    for module_name, module in model.named_modules():
        if module_name.rpartition(".")[2] == "experts":
            # Without values the tokens of an expert are unknown. The shapes do not change.
            module.forward = _first_argument
    ids = torch.arange(PROBED_TOKENS, device="meta")[None]
    try:
        with recording_calls() as calls, torch.no_grad():
            model.base_model(input_ids=ids, **inputs)
    except InputError as error:
        raise type(error)(f"{name}: {error}, which packs do not support") from None
    except Exception as error:
        if isinstance(error, NotImplementedError) or "meta" in str(error):
            return None  # some layers do not run without values
        raise InputError(
            f"{name}: its forward fails without weights or a mask: {first_line(error)}"
        ) from None
    return calls


class _RandomOps(TorchDispatchMode):
    """Records random numbers other than dropout's (a router that samples)."""

    def __init__(self) -> None:
        super().__init__()
        self.random: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        # Layer dropout draws a number on the CPU.
        on_device = isinstance(out, torch.Tensor) and out.is_meta
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if on_device and is_random and name not in DROPOUT_OPS:
            self.random.append(name)
        return out


def _first_argument(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden


def _shallow(config: Any) -> Any:
    """A copy with few layers, those of `_probed_layers`."""
    copy = deepcopy(config)
    copy.pad_token_id = None  # `check_vocabulary` checks it later
    depth, kept = getattr(config, "num_hidden_layers", 0), _probed_layers(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth:
            setattr(copy, name, [value[layer] for layer in kept])
    copy.num_hidden_layers = len(kept)
    return copy


def _probed_layers(config: Any) -> list[int]:
    """The first layer of each type, and others up to `PROBED_LAYERS`."""
    depth = getattr(config, "num_hidden_layers", 0)
    types = _layer_types(config) or []
    first = {types.index(kind) for kind in types}
    others = [layer for layer in range(depth) if layer not in first]
    return sorted([*first, *others[: max(0, PROBED_LAYERS - len(first))]])


def _layer_types(config: Any) -> list[str] | None:
    """The type of each layer's attention."""
    types = getattr(config, "layer_types", None)
    return types if types and len(types) == config.num_hidden_layers else None


def per_document_rope(model: nn.Module, config: Any) -> None:
    """Make longrope choose its factors document by document.

    transformers uses the long factors for the whole pack if one of its documents is long, so a
    trace's log-probs would depend on the other traces of its pack.
    """
    if "longrope" not in rope_types(config):
        return
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "rotary_emb":
            module.forward = partial(_by_document, module.forward)


def _by_document(
    forward: Any, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotary embedding's `forward`, run for each document of a pack."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    if position_ids.shape[0] != 1 or starts[:1] != [0]:  # generation: a batch, not a pack
        return forward(x, position_ids, *args, **kwargs)
    ends = [*starts[1:], position_ids.shape[1]]
    parts = [
        forward(x[:, a:b], position_ids[:, a:b], *args, **kwargs)
        for a, b in zip(starts, ends, strict=True)
    ]
    cos, sin = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return cos, sin
