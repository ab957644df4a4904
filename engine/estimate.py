"""What training will cost, told from the model's shape before its weights are read."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from redi.engine.data.packing import Cost


def training_cost(config: PretrainedConfig) -> Cost:
    """Training flops of a row: 6 N a token, and causal attention, 6 layers * width a token pair.

    N counts every parameter but the input embedding, which is looked up, and lm_head also where
    it is tied to that.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embeddings = model.get_input_embeddings().weight.numel()
    trunk = sum(p.numel() for p in model.base_model.parameters()) - embeddings
    head = model.get_output_embeddings().weight.numel()
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    width = config.num_attention_heads * head_dim
    return Cost(linear=6.0 * (trunk + head), quadratic=6.0 * config.num_hidden_layers * width)
