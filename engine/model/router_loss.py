"""The load-balancing loss of a mixture's routers, over all tokens of an optimizer step.

    loss = coefficient * E * sum_e f_e P_e

E experts; f_e is the number of times that a token chooses expert e, and P_e the sum of its
probabilities, both divided by the number of tokens times the number of routers: transformers'
`load_balancing_loss_func` (Switch Transformer, arXiv 2101.03961, equations 4 to 6) for a batch that
is the whole step.

Only P has a gradient. It is a sum over tokens, so each pack has a share of the loss once f is known
for the whole step. A step of one pack per rank reduces its counts between forward and backward. A
step of several packs counts in a forward before them (`train/expert_counts.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from redi.engine.config.sections import Recipe
from redi.engine.errors import InputError
from redi.engine.loss.packed_loss import StepTotals


class RouterSums(NamedTuple):
    """Sums over the tokens of a pack, of one router."""

    counts: Tensor
    """int64 [E]: tokens that chose each expert."""
    probabilities: Tensor
    """float32 [E], with a gradient."""


class RouterLoss:
    """Records a model's routers, and computes a pack's share of their loss.

    Args:
        model: gets hooks on its routers; before checkpointing and sharding.
        coefficient: positive.

    Raises:
        InputError: the model has no router.
    """

    def __init__(self, model: PreTrainedModel, coefficient: float) -> None:
        spec = model.base_model._can_record_outputs["router_logits"]
        assert isinstance(spec, OutputRecorder), "checked by router_coefficient"
        routers = [one for one in model.base_model.modules() if isinstance(one, spec.target_class)]
        if not routers:
            raise InputError("train.router_aux_loss: this model has no routers; remove it")
        self.coefficient = coefficient
        self.routers = len(routers)
        """Number of routers of the model."""
        self.recorded = 0
        """Number of routers in the last forward."""
        self.share = torch.zeros(())
        """Of the last pack, detached."""
        self._index = spec.index
        self._chosen: int = model.num_experts_per_tok
        self._tokens = 0
        self._found: list[RouterSums] | None = None
        for router in routers:
            router.register_forward_hook(self._record)

    def _record(self, _: nn.Module, __: Any, output: Any) -> None:
        # Also while backward recomputes a block: it must save the tensors that forward has saved.
        if self._found is None and not torch.is_grad_enabled():
            return
        logits = output[self._index] if isinstance(output, tuple) else output
        shares = logits.flatten(0, -2)[: self._tokens].float().softmax(-1)
        chosen = shares.detach().topk(self._chosen, dim=-1).indices
        counts = torch.zeros_like(shares, dtype=torch.bool).scatter_(1, chosen, True).sum(0)
        sums = RouterSums(counts, shares.sum(0))
        if self._found is not None:
            self._found.append(sums)

    @contextmanager
    def recording(self, tokens: int) -> Iterator[list[RouterSums]]:
        """The sums of the routers that run within the context, over the first `tokens` tokens."""
        found: list[RouterSums] = []
        self._found, self._tokens = found, tokens
        try:
            yield found
        finally:
            self._found = None
            self.recorded = len(found)

    def of_pack(self, found: list[RouterSums], totals: StepTotals) -> Tensor:
        """A pack's share of the step's loss, float32 scalar. Collective without expert counts.

        Args:
            found: of `recording`.
            totals: of the step.
        """
        assert len(found) == self.routers, "packed attention runs in every layer, and so do routers"
        own = torch.stack([one.counts for one in found]).sum(0)
        probabilities = torch.stack([one.probabilities for one in found]).sum(0)
        counts = totals.expert_counts
        if counts is None:
            dist.all_reduce(own)
            counts = own
        rows = totals.tokens * self.routers
        factors = self.coefficient * len(counts) * (counts.double() / rows) / rows
        share = (factors.float() * probabilities).sum()
        self.share = share.detach()
        return share


def router_coefficient(recipe: Recipe, config: Any) -> float:
    """The coefficient of the router loss: the recipe's, or the model's if its configuration has
    output_router_logits = true; 0: there is none.

    Raises:
        InputError: the recipe has one, and transformers has no such loss for the model.
    """
    wanted = recipe.train.router_aux_loss
    of_model = getattr(config, "router_aux_loss_coef", None)
    if wanted is None:
        asked = getattr(config, "output_router_logits", False) and _has_router_loss(config)
        return float(of_model or 0.0) if asked else 0.0
    if wanted and not _has_router_loss(config):
        raise InputError(
            f"train.router_aux_loss: transformers has no router loss for {config.model_type}; "
            "remove it"
        )
    return wanted


def router_loss(recipe: Recipe, model: PreTrainedModel) -> RouterLoss | None:
    """The router loss of a recipe's model, or None."""
    coefficient = router_coefficient(recipe, model.config)
    return RouterLoss(model, coefficient) if coefficient else None


def _has_router_loss(config: Any) -> bool:
    """True if transformers adds `load_balancing_loss_func` of recorded logits to a model's loss."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not hasattr(sys.modules[kind.__module__], "load_balancing_loss_func"):
        return False
    recorded = getattr(kind, "_can_record_outputs", None) or {}
    return isinstance(recorded.get("router_logits"), OutputRecorder)
