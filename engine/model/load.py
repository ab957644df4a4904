"""Load a causal language model: from safetensors only, without remote code or pickles.

To train, a model is built on the meta device and sharded; then each rank reads its shard of the
weights. So no host holds the whole model.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)

from redi.engine.errors import InputError
from redi.engine.hub import NO_HUB_NAME, is_hub_name, quiet_hub_client
from redi.engine.model.composite import TESTED, text_config


def find_config(path: str, name: str, weights: bool = True) -> Any:
    """The configuration of a model in a directory or on the hub.

    Args:
        path: directory or hub name.
        name: option or key of the path, for messages.
        weights: True if the weights must be available too.

    Raises:
        InputError: there is no model, or weights are needed and there are no safetensors.
    """
    folder = Path(path)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{name}: {path} is an adapter; give the model that it belongs to, and the adapter "
                "as adapter.path"
            )
        if not (folder / "config.json").is_file():
            raise InputError(f"{name}: {path} has no config.json; give a model directory")
        if weights and not any(folder.glob("*.safetensors")):
            raise InputError(
                f"{name}: {path} has no *.safetensors, and other formats are not supported; load "
                "the model once and save it with save_pretrained()"
            )
    elif not is_hub_name(path):
        raise InputError(f"{name}: {path}: no such directory, {NO_HUB_NAME}")
    try:
        with quiet_hub_client():
            return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # an invalid field raises errors of many types
        here = "" if folder.is_dir() else "no such directory; the hub: "
        raise InputError(f"{name}: {path}: {here}{first_line(error)}") from None


def read_config(
    path: str,
    rope_theta: float | None = None,
    max_position_embeddings: int | None = None,
    weights: bool = True,
) -> Any:
    """The configuration of a model, with replaced values. `check_architecture` checks it.

    Of a composite model (`composite.TESTED`) it is that of its text model.

    Args:
        path: directory or hub name.
        rope_theta, max_position_embeddings: replace the model's values.
        weights: True if the weights must be available too.

    Raises:
        InputError: as `find_config`, or there is no rope_theta to replace.
    """
    config = find_config(path, "model.path", weights)
    if config.model_type in TESTED:
        if rope_theta is not None or max_position_embeddings is not None:
            raise InputError(
                f"model.rope_theta and model.max_position_embeddings: {path} is a composite model, "
                "whose config.json is exported as it is; change it there"
            )
        return text_config(config, path)
    if rope_theta is not None:
        if "rope_theta" not in (getattr(config, "rope_parameters", None) or {}):
            raise InputError(f"model.rope_theta: {path} has no rope_theta to replace")
        config.rope_parameters["rope_theta"] = rope_theta
    if max_position_embeddings is not None:
        config.max_position_embeddings = max_position_embeddings
    return config


def load_weights(
    path: str, name: str, config: Any, dtype: torch.dtype | Literal["auto"]
) -> PreTrainedModel:
    """Load a whole model on the CPU.

    Args:
        path: directory or hub name.
        name: option or key of the path, for messages.
        config: its configuration.
        dtype: of the loaded weights; "auto": that of the files.

    Raises:
        InputError: the weights do not fit the configuration.
    """
    # Not all composites whose text model is trained are causal language models to transformers.
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or config.model_type not in TESTED
    auto: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    try:
        model, info = auto.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{name}: {path}: {first_line(error)}") from None
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            names = ", ".join(sorted(map(str, info[problem]))[:3])
            raise InputError(f"{name}: {path}: {problem.replace('_', ' ')}: {names} ...")
    return model


def empty_model(
    config: Any, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> PreTrainedModel:
    """The model on the meta device, without memory for weights.

    The model gets a copy of `config`, because transformers writes the attention into it. A shared
    configuration would change the attention of another model too.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=dtype, attn_implementation=attention
        )


def generation_config(path: str) -> GenerationConfig | None:
    """The generation configuration of a model, or None."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return None


def first_line(error: Exception) -> str:
    """First line of an error's message; with the second if the first ends with a colon."""
    first, *others = [line.strip() for line in str(error).strip().split("\n")]
    return f"{first} {others[0]}" if first.endswith(":") and others else first
