"""What training will cost, told from the model's shape before its weights are read."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from redi.engine.data.packing import Cost
from redi.engine.model.load import empty_model


def training_cost(config: PretrainedConfig) -> Cost:
    """Training flops of a row: 6 N a token, and causal attention, 6 layers * width a token pair.

    N counts every parameter but the input embedding, which is looked up, and lm_head also where
    it is tied to that.
    """
    trunk, head = _products(config)
    return Cost(linear=6.0 * (trunk + head), quadratic=6.0 * _attention(config))


def run_cost(config: PretrainedConfig, checkpointing: str) -> Cost:
    """Flops that are run for a row: training's, and the blocks' forward once more where
    `[shard] checkpointing` is "full". ("selective" keeps all products.)
    """
    again = 2.0 if checkpointing == "full" else 0.0
    trunk, head = _products(config)
    return Cost(
        linear=6.0 * (trunk + head) + again * trunk,
        quadratic=(6.0 + again) * _attention(config),
    )


def _products(config: PretrainedConfig) -> tuple[int, int]:
    """Parameters of the blocks (with the norms) and of lm_head."""
    model = empty_model(config)
    embeddings = model.get_input_embeddings().weight.numel()
    trunk = sum(p.numel() for p in model.base_model.parameters()) - embeddings
    return trunk, model.get_output_embeddings().weight.numel()


def head_dim(config: Any) -> int:
    """Numbers of a head's query, key or value."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention(config: Any) -> int:
    """Layers * width."""
    return int(config.num_hidden_layers * config.num_attention_heads * head_dim(config))
