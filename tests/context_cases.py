"""What each rank of a `RankPool` runs in the tests of context parallelism."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from redi.bench.traces import InMemoryTraces
from redi.engine.config.sections import ObjectiveConfig
from redi.engine.context import ContextGroup
from redi.engine.data.context_slice import slice_pack
from redi.engine.data.packing import PackedBatch, build_batch
from redi.engine.loss.packed_loss import PackedLoss
from redi.engine.model.attention import register_attention
from redi.engine.model.student import Student

VOCAB = 32


def document_logps(size: int, documents: list[np.ndarray], merged: bool) -> Tensor:
    """Log-prob of each document, float32 [S], by groups of `size` ranks that share the pack.

    Args:
        documents: their tokens.
        merged: whether attention is given the pack as one document.
    """
    context = ContextGroup.join(size)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    attention = register_attention("sdpa", context)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=attention)
    student = Student(model, PackedLoss(ObjectiveConfig(), context=context))
    pack = slice_pack(pack_of(documents), *context.slice)
    if merged:
        whole = pack.documents[[0, -1]]
        pack = replace(pack, row_cu_seqlens=whole, max_seqlen=int(whole[-1]))
    with torch.no_grad():
        logps = student(pack, None).sequence_logps
    if context.group is not None:
        dist.all_reduce(logps, group=context.group)
    return logps


def pack_of(documents: list[np.ndarray]) -> PackedBatch:
    """A pack of documents; the first token of each is the prompt."""
    ones = np.ones(len(documents), np.int64)
    traces: Any = InMemoryTraces(documents, prompt_lengths=ones, signs=ones)
    return build_batch(traces, np.arange(len(documents)), np.array(list(map(len, documents))))
