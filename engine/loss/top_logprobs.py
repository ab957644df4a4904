"""The most likely tokens of each prediction, without the logits of all predictions in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from redi.engine.loss.packed_loss import PLAIN, Logits
from redi.kernels.chunk_sizes import default_chunk_tokens, split


@torch.no_grad()
def top_logprobs(
    hidden: Tensor, weight: Tensor, count: int, logits: Logits = PLAIN
) -> tuple[Tensor, Tensor]:
    """The `count` most likely tokens of each prediction and their log-probs, most likely first.

    Args:
        hidden: [N, D].
        weight: [V, D], weight of lm_head.
        count: K, at most V.
        logits: how the model computes its logits.

    Returns:
        int32 [N, K] ids and float32 [N, K] log-probs of the whole distribution, in nats.
    """
    ids = torch.empty(len(hidden), count, dtype=torch.int32, device=hidden.device)
    logps = torch.empty(len(hidden), count, device=hidden.device)
    for start, end in split(0, len(hidden), default_chunk_tokens(len(hidden), weight)):
        values = (hidden[start:end] @ weight.T).float() * logits.logit_scale
        if logits.softcap is not None:
            values = logits.softcap * torch.tanh(values / logits.softcap)
        top, places = values.topk(count, dim=-1)
        ids[start:end] = places
        logps[start:end] = top - values.logsumexp(-1, keepdim=True)
    return ids, logps
