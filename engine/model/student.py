"""The student: trunk and loss in one module, whose forward returns the loss.

The fused loss needs lm_head's weight whole, so it runs inside the forward of `Head`, which is when
FSDP2 has gathered the weight: once a micro-step, not once a chunk. Calling the trunk from outside
would mix plain tensors with sharded ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from redi.engine.data.packing import PackedBatch
from redi.engine.loss.packed_loss import PackedLoss, StepTotals
from redi.engine.model.attention import NAME, document_kwargs
from redi.engine.model.first_forward import Ran, watch
from redi.kernels import FilteredRediLoss, RediLoss, segment_sum, signed_cross_entropy

Out = TypeVar("Out")


class Scores(NamedTuple):
    """What a model says of a packed row's traces, without a gradient."""

    sequence_logps: torch.Tensor
    """float32 [S]: sums of log-probs over each sequence's targets."""
    sequence_lengths: torch.Tensor
    """int64 [S]: targets of each sequence."""
    sequence_entropies: torch.Tensor
    """float32 [S]: sums over the same tokens of the entropy of the model's prediction, in nats."""


class Head(nn.Module):
    """lm_head, in the place of the model's own: logits, or what a function makes of its weight.

    Untied, it is sharded as a group of its own: all that reads the weight runs in this forward.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        hidden: torch.Tensor,
        function: Callable[[torch.Tensor, torch.Tensor], Out] | None = None,
    ) -> torch.Tensor | Out:
        """`function(hidden, weight)`; without one the logits, as generation wants them."""
        if function is None:
            return F.linear(hidden, self.weight)
        return function(hidden, self.weight)


class Student(nn.Module):
    """A causal LM that turns a packed row into its share of the step's loss."""

    def __init__(self, model: PreTrainedModel, objective: PackedLoss) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.ran: Ran | None = None
        """What this process ran: of the first training forward, else of the first one."""
        self._trained = False
        model.set_output_embeddings(Head(model.get_output_embeddings().weight))

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks: the units of sharding, recomputation and compilation."""
        return self.model.base_model.layers

    @property
    def head(self) -> Head:
        """lm_head."""
        return self.model.get_output_embeddings()

    def forward(
        self, batch: PackedBatch, totals: StepTotals | None
    ) -> RediLoss | FilteredRediLoss | Scores:
        """Loss share, and per-sequence log-prob sums, of one packed row.

        Args:
            batch: one row, on the student's device.
            totals: global counts of the optimizer step, the loss's denominators; None: the row is
                only scored (one matrix product by the vocabulary, no gradient).

        Returns:
            What the objective makes of the row, or Scores without `totals`.

        Raises:
            InputError: the first forward ran another attention than the packed one.
        """
        training = totals is not None
        if self.ran and (self._trained or not training):
            return self.score_or_loss(batch, totals)
        out, self.ran = watch(self.model, partial(self.score_or_loss, batch, totals))
        self._trained = training
        return out

    def score_or_loss(
        self, batch: PackedBatch, totals: StepTotals | None
    ) -> RediLoss | FilteredRediLoss | Scores:
        """`forward` without counting what ran."""
        hidden = self.hidden_states(batch)
        if totals is None:
            return self.head(hidden.detach(), partial(self._score, batch=batch))
        return self.head(hidden, partial(self.objective, batch=batch, totals=totals))

    def _score(self, hidden: torch.Tensor, weight: torch.Tensor, batch: PackedBatch) -> Scores:
        _, logps, entropies = signed_cross_entropy(
            hidden,
            weight.detach(),
            batch.targets,
            torch.zeros_like(batch.targets, dtype=torch.float32),
            entropy=True,
            valid_index=batch.valid_index,
            backend=self.objective.section.backend,
        )
        cu_seqlens = batch.cu_seqlens
        return Scores(
            segment_sum(logps, cu_seqlens), batch.num_targets, segment_sum(entropies, cu_seqlens)
        )

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """Last hidden states [T, D] of a packed row, each document on its own."""
        assert self.model.config._attn_implementation == NAME, "another attention was set"
        output = self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            **document_kwargs(batch.cu_seqlens, batch.max_seqlen),
        )
        return output.last_hidden_state[0]
