"""The student: trunk and loss in one module, whose forward returns the loss.

The fused loss needs lm_head's whole weight. It runs inside the forward of `Head`, for which FSDP2
gathers the weight: once per micro-step, not once per chunk. Calling the trunk from outside would
mix plain tensors with sharded ones.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function
from transformers import PreTrainedModel

from redi.engine.context import ContextGroup
from redi.engine.data.packing import PackedBatch
from redi.engine.loss.packed_loss import DistilledLoss, PackedLoss, StepTotals
from redi.engine.loss.top_logprobs import top_logprobs
from redi.engine.model.adapter import Adapter
from redi.engine.model.attention import NAME, document_kwargs
from redi.engine.model.first_forward import ForwardRecord, record_forward
from redi.engine.model.logits import logits_of
from redi.engine.model.offload import Offload
from redi.engine.model.router_loss import RouterLoss, RouterSums
from redi.kernels import FilteredRediLoss, RediLoss, segment_sum, signed_cross_entropy

Out = TypeVar("Out")


class PackScores(NamedTuple):
    """Log-probs and entropies of the traces of a pack, without a gradient.

    Of a slice: sums over its tokens alone, and the lengths of whole sequences.
    """

    sequence_logps: torch.Tensor
    """float32 [S]: sum of log-probs over each sequence's targets."""
    sequence_lengths: torch.Tensor
    """int64 [S]: number of targets of each sequence."""
    sequence_entropies: torch.Tensor
    """float32 [S]: sum over the same targets of the prediction's entropy, in nats."""
    weighted_logps: torch.Tensor
    """float32 [S]: `sequence_logps` with each log-prob multiplied by its token's weight."""
    tokens: torch.Tensor
    """float32 [2, N]: log-prob and entropy at each target, in the order of the pack."""
    top: tuple[torch.Tensor, torch.Tensor] | None = None
    """int32 and float32 [N, K]: the most likely tokens at each target and their log-probs."""


class Head(nn.Module):
    """Replaces the model's lm_head: returns logits, or the result of a function of its weight.

    If untied it is a separate sharding group, so all code that reads the weight runs in this
    forward.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        hidden: torch.Tensor,
        function: Callable[[torch.Tensor, torch.Tensor], Out] | None = None,
    ) -> torch.Tensor | Out:
        """`function(hidden, weight)`, or the logits without a function, as in generation."""
        if function is None:
            return F.linear(hidden, self.weight)
        return function(hidden, self.weight)


class Student(nn.Module):
    """A causal LM whose forward returns a pack's share of the step's loss."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: PackedLoss,
        adapter: Adapter | None = None,
        router_loss: RouterLoss | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter
        """What alone is trained, if it was added to the model."""
        self.objective = objective
        self.router_loss = router_loss
        """Added to the objective, if the model is a mixture of experts."""
        self.ran: ForwardRecord | None = None
        """Record of the first training forward, or of the first forward if there was none."""
        self._trained = False
        self.offload: Offload | None = None
        """Set by sharding if the inputs of blocks are offloaded."""
        self.logits = logits_of(model)
        model.set_output_embeddings(Head(model.get_output_embeddings().weight))

    @property
    def context(self) -> ContextGroup:
        """The ranks that share a pack; batches are slices then."""
        return self.objective.context

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks: the units of sharding, recomputation and compilation."""
        return self.model.base_model.layers

    @property
    def head(self) -> Head:
        """lm_head."""
        return self.model.get_output_embeddings()

    def forward(
        self, batch: PackedBatch, totals: StepTotals | None, top: int = 0
    ) -> RediLoss | FilteredRediLoss | DistilledLoss | PackScores:
        """Share of the loss, and log-prob sums per sequence, of one pack.

        Args:
            batch: one pack, on the student's device.
            totals: global counts of the optimizer step, the denominators of the loss. None: only
                score the pack (one matrix product with the vocabulary, no gradient).
            top: K, the number of most likely tokens that a score has too (a second product).

        Returns:
            The result of the objective, or PackScores without `totals`.

        Raises:
            InputError: the first forward did not run packed attention in every layer.
        """
        training = totals is not None
        if self.ran and (self._trained or not training):
            return self.score_or_loss(batch, totals, top)
        run = partial(self.score_or_loss, batch, totals, top)
        out, self.ran = record_forward(self.model, run)
        self._trained = training
        if training and self.router_loss is not None:
            self.ran = replace(self.ran, routers=self.router_loss.recorded)
        return out

    def score_or_loss(
        self, batch: PackedBatch, totals: StepTotals | None, top: int = 0
    ) -> RediLoss | FilteredRediLoss | DistilledLoss | PackScores:
        """`forward` without recording what ran."""
        if totals is None:
            hidden = self.hidden_states(batch).detach()
            return self.head(hidden, partial(self._score, batch=batch, top=top))
        router_loss = self.router_loss
        recording: AbstractContextManager[list[RouterSums]] = (
            router_loss.recording(batch.num_tokens) if router_loss else nullcontext([])
        )
        with recording as routers:
            hidden = self.hidden_states(batch)
        with record_function("redi.loss"):
            loss = partial(self.objective, batch=batch, totals=totals, logits=self.logits)
            out = self.head(hidden, loss)
            if router_loss is None:
                return out
            return out._replace(loss=out.loss + router_loss.of_pack(routers, totals))

    def expert_counts(self, batch: PackedBatch) -> torch.Tensor:
        """Tokens of a pack that choose each expert, over all routers, int64 [E]."""
        assert self.router_loss is not None
        with self.router_loss.recording(batch.num_tokens) as routers:
            self.hidden_states(batch)
        return torch.stack([one.counts for one in routers]).sum(0)

    def _score(
        self, hidden: torch.Tensor, weight: torch.Tensor, batch: PackedBatch, top: int
    ) -> PackScores:
        _, logps, entropies = signed_cross_entropy(
            hidden,
            weight.detach(),
            batch.targets,
            torch.zeros_like(batch.targets, dtype=torch.float32),
            entropy=True,
            valid_index=batch.valid_index,
            backend=self.objective.section.backend,
            **self.logits._asdict(),
        )
        sums = segment_sum(logps, batch.cu_seqlens)
        weighted = sums
        if batch.token_weights is not None:
            weighted = segment_sum(logps * batch.token_weights, batch.cu_seqlens)
        of_sequences = segment_sum(entropies, batch.cu_seqlens)
        targets = batch.valid_index.sort().values
        of_tokens = torch.stack([logps, entropies])[:, targets]
        likely = top_logprobs(hidden[targets], weight, top, self.logits) if top else None
        return PackScores(sums, batch.num_targets, of_sequences, weighted, of_tokens, likely)

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """Last hidden states [T, D] of a pack; documents do not attend to each other."""
        assert self.model.config._attn_implementation == NAME, "packed attention is not set"
        output = self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            **document_kwargs(batch.documents, batch.max_seqlen, batch.attended, batch.own),
        )
        return output.last_hidden_state[0]
