"""A causal language model from a folder: safetensors only, nothing executed or unpickled.

To train, a model is built without memory, sharded, and only then given its weights, of which each
rank reads what it holds: it is never whole on a host.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from redi.engine.errors import InputError
from redi.engine.hub import NO_HUB_NAME, is_hub_name, quiet_hub_client


def find_config(path: str, name: str, weights: bool = True) -> Any:
    """The configuration of a model in a folder or on the hub.

    Args:
        name: what the user calls the path, for messages.
        weights: whether they are needed too.

    Raises:
        InputError: no model there, or no safetensors where they are needed.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{name}: {path} has no config.json; give a model folder")
        if weights and not any(folder.glob("*.safetensors")):
            raise InputError(
                f"{name}: {path} has no *.safetensors; weights in other formats are not "
                "read: load the model once and save it with save_pretrained()"
            )
    elif not is_hub_name(path):
        raise InputError(f"{name}: {path}: no such folder, {NO_HUB_NAME}")
    try:
        with quiet_hub_client():
            return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a wrong field raises errors of many types
        here = "" if folder.is_dir() else "no such folder here; the hub: "
        raise InputError(f"{name}: {path}: {here}{first_line(error)}") from None


def read_config(
    path: str,
    rope_theta: float | None = None,
    max_position_embeddings: int | None = None,
    weights: bool = True,
) -> Any:
    """The configuration of a model, with what replaces its own values (`check_architecture` tells
    whether it can be trained).

    Args:
        rope_theta, max_position_embeddings: take the place of the model's own.
        weights: whether they are needed too.

    Raises:
        InputError: as `find_config`, or there is no rope_theta to replace.
    """
    config = find_config(path, "model.path", weights)
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
        name: what the user calls the path, for messages.
        config: its configuration.
        dtype: of the weights; "auto": that of the files.

    Raises:
        InputError: the weights do not fit the configuration.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
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
    """The architecture on the meta device, without memory for weights.

    The model gets a copy of `config`: transformers writes the attention into the one that it is
    given, and one that another model lives by would change that model's attention too.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=dtype, attn_implementation=attention
        )


def generation_config(path: str) -> GenerationConfig | None:
    """The one that a model's folder has."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return None


def first_line(error: Exception) -> str:
    """Of its message; with the second where the first only announces it."""
    first, *others = [line.strip() for line in str(error).strip().split("\n")]
    return f"{first} {others[0]}" if first.endswith(":") and others else first
