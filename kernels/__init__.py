"""Loss ops that never hold the logits: REDI, signed cross-entropy, log-probs of given tokens.

Start with `redi.kernels.reference`, which defines each op in plain PyTorch.
"""

from redi.kernels.logprobs import linear_logprobs
from redi.kernels.losses import (
    FilteredRediLoss,
    filtered_redi_loss,
    redi_loss,
    redi_value_and_grad,
    signed_cross_entropy,
)
from redi.kernels.reference import (
    IGNORE_INDEX,
    Backend,
    Coefficient,
    Direction,
    RediLoss,
    Tail,
    TopkDivergence,
)
from redi.kernels.segment_sum import segment_sum
from redi.kernels.sequence_loss import sequence_loss
from redi.kernels.topk import topk_divergence
from redi.kernels.vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_logprobs,
    vocab_parallel_redi_loss,
)

__all__ = [
    "IGNORE_INDEX",
    "Backend",
    "Coefficient",
    "Direction",
    "FilteredRediLoss",
    "RediLoss",
    "Tail",
    "TopkDivergence",
    "filtered_redi_loss",
    "linear_logprobs",
    "redi_loss",
    "redi_value_and_grad",
    "segment_sum",
    "sequence_loss",
    "signed_cross_entropy",
    "topk_divergence",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_logprobs",
    "vocab_parallel_redi_loss",
]
