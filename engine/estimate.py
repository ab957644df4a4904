"""What training will cost, told from the model's shape before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from redi.engine.data.packing import Cost


@dataclass(frozen=True)
class Card:
    """What an estimate must know of a GPU."""

    peak_flops: float
    """bfloat16 products a second, dense (NVIDIA's data sheets; theirs with sparsity are twice
    that)."""
    memory: int
    """Bytes that torch finds on it (`total_memory`), a little less than the data sheet says."""
    processors: int
    """Streaming multiprocessors."""
    architecture: str
    """As `redi.kernels.launches.architecture_of` names it."""


CARDS = {
    "a100": Card(312e12, int(79.15 * 2**30), 108, "sm_80"),
    "h100": Card(989e12, int(79.1 * 2**30), 132, "sm_90"),
    "h200": Card(989e12, int(139.8 * 2**30), 132, "sm_90"),
    "b200": Card(2250e12, int(178.35 * 2**30), 148, "sm_100"),
}
"""SXM versions; the A100 with 80 GB."""


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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embeddings = model.get_input_embeddings().weight.numel()
    trunk = sum(p.numel() for p in model.base_model.parameters()) - embeddings
    return trunk, model.get_output_embeddings().weight.numel()


def _attention(config: Any) -> int:
    """Layers * width."""
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return int(config.num_hidden_layers * config.num_attention_heads * head_dim)
