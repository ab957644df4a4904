"""Flops of training, counted from the model's modules before its weights are read.

The convention is that of PaLM (arXiv 2204.02311, appendix B): a matrix product of a weight with a
token costs 2 flops per weight in the forward and 4 in the backward; nothing else is counted but
attention. Causal attention is counted once, which is half of the square that it masks. Of a linear
attention or state space its projections are counted, not the updates of its state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from redi.engine.config.sections import AdapterConfig, Recipe
from redi.engine.data.packing import Cost
from redi.engine.model.adapter import add_adapter
from redi.engine.model.architecture import layer_patterns, slice_problem
from redi.engine.model.load import empty_model


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that determine its flops."""

    trunk: int
    """Weights of the blocks' matrix products that one token uses: of a mixture's experts the few
    that its router chooses, with the router and shared experts. Norms, biases and embeddings, which
    are look-ups, take part in no product."""
    head: int
    """Weights of lm_head, also if it is tied to the input embedding."""
    attention: int
    """Sum over layers without a window, and heads, of the dimensions of a key and of a value."""
    parameters: int
    """All weights, as they are stored and gathered."""
    layers: int
    spared: int
    """Weights of the blocks' last products, of `trunk`, if backward does not read their results:
    recomputation ends before them."""
    windows: tuple[tuple[int, int], ...] = ()
    """(w, the same sum as `attention`) over the layers with a sliding window of w tokens."""
    adapter: int = 0
    """Weights of the adapter that alone is trained; 0: all weights are trained."""
    heads: int = 1
    """Query heads of a layer, of which ranks can have equal shares (`[shard] context`); 1 if ranks
    cannot share packs of this model."""
    key_value_heads: int = 1
    """Heads of keys and values of a layer."""
    has_router_loss: bool = False
    """True if a step of several packs counts experts before them."""
    whole_documents: bool = False
    """True if a layer needs whole documents in a pack (`slice_problem`)."""

    def shares_prompts(self, recipe: Recipe) -> bool:
        """True if traces of a pack share prompts: the loss and all layers run token by token."""
        needs_whole = self.whole_documents or self.has_router_loss or recipe.shard.context > 1
        # A pack with shared prompts and one without would need a graph each.
        return recipe.train.share_prompts and not needs_whole and not recipe.shard.compile

    @property
    def trained(self) -> int:
        """Weights that have a gradient."""
        return self.adapter or self.parameters

    @property
    def _products(self) -> float:
        """Flops of a forward and backward per token that use `trunk` and the adapter.

        A frozen weight has no gradient, so its backward is one product, not two.
        """
        return 4.0 * self.trunk + 6.0 * self.adapter if self.adapter else 6.0 * self.trunk

    @property
    def _head_products(self) -> float:
        return (4.0 if self.adapter else 6.0) * self.head

    def step_flops(self, lengths: np.ndarray, targets: int, shared_tokens: int = 0) -> float:
        """Flops of one forward and backward of sequences: what a step needs, not what it executes.

            6 trunk T + 6 head targets + 3 attention sum(length²),   T = sum(length) - shared_tokens

        With an adapter 4 trunk T + 6 adapter T + 4 head targets in place of the products.

        lm_head is computed for trained positions alone, so it counts for those alone. A pair of
        tokens costs a layer's head 2 (key + value) forward and twice that backward; a causal
        sequence has length² / 2 pairs, fewer in layers with a window (`Cost`). Recomputed
        activations and logits do not count.

        Args:
            lengths: int [S], tokens of each sequence.
            targets: trained tokens of all sequences.
            shared_tokens: of prompts that are computed once for several sequences and counted
                again in `lengths`. Attention computes them again.
        """
        trunk = self._cost(self._products, 3.0)
        products = self._head_products * targets - self._products * shared_tokens
        return float(trunk.of(lengths).sum()) + products

    def training_cost(self) -> Cost:
        """Training flops of a sequence, for packing: every token counts as trained."""
        return self._cost(self._products + self._head_products, 3.0, self._head_products)

    def _cost(self, linear: float, half_pair: float, trained: float = 0.0) -> Cost:
        """A cost with flops of half a pair of tokens for each dimension of a key or value."""
        windows = tuple((window, half_pair * dims) for window, dims in self.windows)
        return Cost(linear, half_pair * self.attention, windows, trained)

    def run_cost(self, checkpointing: str, counts_experts: bool = False) -> Cost:
        """Flops executed for a sequence: those of training, plus recomputation.

        If `[shard] checkpointing` is "full", the forward of the blocks runs twice, but for the last
        product of a dense block (`spared`); if it is "attention", all but its attention too.
        "selective" keeps the results of all matrix products. Exact for dense blocks; of a mixture's
        experts the last product counts as recomputed, since the router's weights multiply it.

        Args:
            checkpointing: as in `[shard]`.
            counts_experts: True if another forward of the blocks counts experts.
        """
        again = 2.0 if checkpointing in ("attention", "full") else 0.0
        attention_again = 2.0 if checkpointing == "full" else 0.0
        linear = self.training_cost().linear + again * (self.trunk - self.spared + self.adapter)
        if counts_experts:
            linear += 2.0 * (self.trunk + self.adapter)
            attention_again += 2.0
        return self._cost(linear, (6.0 + attention_again) / 2, self._head_products)

    def scoring_cost(self) -> Cost:
        """Flops of a sequence's forward alone: every token counts as scored."""
        return self._cost(2.0 * (self.trunk + self.adapter + self.head), 1.0)


def model_size(
    config: PretrainedConfig, adapter: AdapterConfig | None = None, has_router_loss: bool = False
) -> ModelSize:
    """Count the modules of a model on the meta device, without its weights."""
    model = empty_model(config)
    trunk = 0
    for name, module in model.base_model.named_modules():
        if not isinstance(module, nn.Embedding):
            share = _active_share(model.base_model, name)
            trunk += sum(
                int(share * weight.numel())
                for key, weight in module.named_parameters(recurse=False)
                if weight.dim() > 1 and "bias" not in key
            )
    attention: dict[int | None, int] = {None: 0}
    patterns = layer_patterns(config)
    for layer, pattern in zip(model.base_model.layers, patterns, strict=True):
        if pattern is None:
            continue
        one = layer.self_attn
        heads = getattr(one, "num_heads", None) or config.num_attention_heads
        key, value = (
            getattr(one, name, None) or getattr(one, "head_dim", None) or head_dim(config)
            for name in ("qk_head_dim", "v_head_dim")
        )
        window = pattern.window
        attention[window] = attention.get(window, 0) + heads * (key + value)
    whole_documents = slice_problem(config) is not None
    size = ModelSize(
        trunk=trunk,
        head=model.get_output_embeddings().weight.numel(),
        attention=attention.pop(None),
        parameters=sum(p.numel() for p in model.parameters()),
        layers=len(model.base_model.layers),
        spared=sum(map(_spared, model.base_model.layers)),
        windows=tuple((window, dims) for window, dims in attention.items() if window is not None),
        heads=1 if whole_documents else config.num_attention_heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        has_router_loss=has_router_loss,
        whole_documents=whole_documents,
    )
    if adapter is None or not adapter.wanted:
        return size
    add_adapter(model, adapter, torch.float32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return replace(size, adapter=trained)


def _spared(block: nn.Module) -> int:
    """Weights of a block's last product, if its result is only added to the block's input.

    torch ends recomputation at the last tensor that backward needs, and that is this product's
    input. A norm after it needs its result.
    """
    last = getattr(getattr(block, "mlp", None), "down_proj", None)
    names = [name for name, _ in block.named_children()]
    normed = any(name.startswith(("post_mlp", "post_feedforward")) for name in names)
    return last.weight.numel() if isinstance(last, nn.Linear) and not normed else 0


def _active_share(model: nn.Module, name: str) -> float:
    """Share of a module's weights that a token uses: less than 1 for routed experts."""
    parent, _, own = name.rpartition(".")
    if own != "experts":
        return 1.0
    experts = next(model.get_submodule(name).parameters()).shape[0]
    chosen = (getattr(module, "top_k", None) for module in model.get_submodule(parent).modules())
    return next(filter(None, chosen), experts) / experts


def training_cost(config: PretrainedConfig) -> Cost:
    """`ModelSize.training_cost` of a model."""
    return model_size(config).training_cost()


def head_dim(config: Any) -> int:
    """Dimension of a head's query, key or value."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
