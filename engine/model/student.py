"""The student: trunk and loss in one module, whose forward returns the loss.

The fused loss needs lm_head's weight whole inside the root module's forward, which is where FSDP2
has gathered it: once a micro-step, not once a chunk. Calling the trunk from outside would mix
plain tensors with sharded ones.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from redi.engine.data.packing import PackedBatch
from redi.engine.model.attention import document_kwargs
from redi.engine.train.objectives import Objective, StepTotals
from redi.kernels import RediLoss


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

    def forward(self, batch: PackedBatch, totals: StepTotals) -> RediLoss:
        """Loss share, and per-sequence log-prob sums, of one packed row.

        Args:
            batch: one row, on the student's device.
            totals: global counts of the optimizer step, the loss's denominators.
        """
        hidden = self.hidden_states(batch)
        return self.objective(hidden, self.model.get_output_embeddings().weight, batch, totals)

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """Last hidden states [T, D] of a packed row, each document on its own."""
        output = self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            **document_kwargs(batch.cu_seqlens, batch.max_seqlen),
        )
        return output.last_hidden_state[0]
