"""Composite checkpoints: a text model with vision, of which the text model is trained.

The text model is built, sharded and trained as if it were alone. The export is the composite again:
the same files with the same names, whose other tensors, configuration and processor are those of
the source, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from redi.engine.errors import InputError

TESTED = {"gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"}
"""Types whose text model computes, for text, what the composite does."""

# Text models that transformers has only within a composite -> the same model, for text.
CAUSAL = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}

SOURCE = "redi_composite_source"
"""Attribute of a text model's configuration: directory or hub name of the composite."""

CARRIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files of the source that the export has too, unless it writes them itself."""

# Beginnings of a text model's names in files of transformers 5 and 4 -> in the text model.
PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
    # Qwen2-VL and Qwen2.5-VL in files of transformers 4.
    "model.embed_tokens.": "model.embed_tokens.",
    "model.layers.": "model.layers.",
    "model.norm.": "model.norm.",
}


def text_config(config: Any, path: str) -> Any:
    """The configuration of a composite's text model.

    Raises:
        InputError: the text model alone would have other logits than the composite.
    """
    text = deepcopy(config.get_text_config())
    if text.model_type in CAUSAL:
        values = {name: value for name, value in text.to_dict().items() if name != "model_type"}
        text = AutoConfig.for_model(CAUSAL[text.model_type], **values)
    if getattr(text, "final_logit_softcapping", None) is not None:
        raise InputError(
            f"model.path: {path}: transformers ignores final_logit_softcapping in this composite "
            "model; set it to null in config.json"
        )
    text.tie_word_embeddings = config.tie_word_embeddings
    setattr(text, SOURCE, path)
    return text


def text_name(name: str) -> str | None:
    """The name in the text model of a tensor in a composite's files; None if it is another's."""
    for prefix, other in PREFIXES.items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return None


def text_names(files: Mapping[Path, Iterable[str]]) -> dict[Path, dict[str, str]]:
    """For each file of a composite: name in the file -> name in the text model."""
    return {
        file: {name: own for name in names if (own := text_name(name))}
        for file, names in files.items()
    }
