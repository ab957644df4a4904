"""The student: trunk and loss in one module, whose forward returns the loss.

The fused loss needs lm_head's weight whole inside the root module's forward, which is where FSDP2
has gathered it: once a micro-step, not once a chunk. Calling the trunk from outside would mix
plain tensors with sharded ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from redi.engine.data.packing import PackedBatch
from redi.engine.model.attention import document_kwargs
from redi.engine.train.row_loss import Objective, StepTotals
from redi.kernels import RediLoss, segment_sum, signed_cross_entropy


class Scores(NamedTuple):
    """What a model says of a packed row's traces, without a gradient."""

    sequence_logps: torch.Tensor
    """float32 [S]: sums of log-probs over each sequence's targets."""
    sequence_lengths: torch.Tensor
    """int64 [S]: targets of each sequence."""
    sequence_entropies: torch.Tensor
    """float32 [S]: sums over the same tokens of the entropy of the model's prediction, in nats."""


class Student(nn.Module):
    """A causal LM that turns a packed row into its share of the step's loss."""

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks: the units of sharding, recomputation and compilation."""
        return self.model.base_model.layers

    def forward(self, batch: PackedBatch, totals: StepTotals | None) -> RediLoss | Scores:
        """Loss share, and per-sequence log-prob sums, of one packed row.

        Args:
            batch: one row, on the student's device.
            totals: global counts of the optimizer step, the loss's denominators; None: the row is
                only scored (one matrix product by the vocabulary, no gradient).

        Returns:
            RediLoss, or Scores without `totals`.
        """
        hidden, weight = self.hidden_states(batch), self.model.get_output_embeddings().weight
        if totals is None:
            return self._score(hidden.detach(), weight.detach(), batch)
        return self.objective(hidden, weight, batch, totals)

    def _score(self, hidden: torch.Tensor, weight: torch.Tensor, batch: PackedBatch) -> Scores:
        _, logps, entropies = signed_cross_entropy(
            hidden,
            weight,
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
        output = self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            **document_kwargs(batch.cu_seqlens, batch.max_seqlen),
        )
        return output.last_hidden_state[0]
