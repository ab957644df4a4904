"""Flops of training, computed from the model's configuration before its weights are read."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from redi.engine.data.packing import Cost
from redi.engine.model.load import empty_model


def training_cost(config: PretrainedConfig) -> Cost:
    """Training flops of a sequence: 6 N per token, and 6 * layers * width per pair of tokens.

    The second term is causal attention. N counts all parameters except the input embedding, which
    is only a look-up; lm_head is counted even if it is tied to the input embedding.
    """
    trunk, head = _products(config)
    return Cost(linear=6.0 * (trunk + head), quadratic=6.0 * _attention(config))


def run_cost(config: PretrainedConfig, checkpointing: str) -> Cost:
    """Flops executed for a sequence: those of training, plus recomputation.

    If `[shard] checkpointing` is "full", the forward of the blocks runs twice; if it is
    "attention", all but its attention. "selective" keeps the results of all matrix products.
    """
    again = 2.0 if checkpointing in ("attention", "full") else 0.0
    attention_again = 2.0 if checkpointing == "full" else 0.0
    trunk, head = _products(config)
    return Cost(
        linear=6.0 * (trunk + head) + again * trunk,
        quadratic=(6.0 + attention_again) * _attention(config),
    )


def _products(config: PretrainedConfig) -> tuple[int, int]:
    """Number of parameters of the blocks (including norms) and of lm_head."""
    model = empty_model(config)
    embeddings = model.get_input_embeddings().weight.numel()
    trunk = sum(p.numel() for p in model.base_model.parameters()) - embeddings
    return trunk, model.get_output_embeddings().weight.numel()


def head_dim(config: Any) -> int:
    """Dimension of a head's query, key or value."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention(config: Any) -> int:
    """Layers * width."""
    return int(config.num_hidden_layers * config.num_attention_heads * head_dim(config))
