"""Operands of the loss at any size: random, or with logits distributed as a trained model's.

The cost and the error of a loss op depend on its logits. A trained model is sure of most tokens;
its logits are up to 20 away from 0, the target's up to 35 above the others' mean. Random operands
lack this; "trained" ones take it from `smollm2_hidden.json`, which `redi.bench.hidden_statistics`
records.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

ALPHA = 0.8
COMPETITORS = 7
"""Tokens other than the target whose log-probs are recorded and set one by one."""
STATISTICS = Path(__file__).with_name("smollm2_hidden.json")

# The first column of the lm_head. Its product with a hidden state's first entry is the mean of the
# logits, as with outlier dimensions of trained models.
MEAN_COLUMN = 0.5
SLICE_TOKENS = 4096

Inputs = Literal["random", "trained", "states"]


@dataclass(frozen=True)
class LossSizes:
    """Sizes of the operands, their dtype, device and kind."""

    tokens: int
    vocab: int
    hidden: int
    sequences: int
    """Even; every second one is a negative."""
    dtype: str
    device: str
    threads: int
    inputs: Inputs = "random"
    states: str = ""
    """For "states": a file written by `redi.bench.filter --states`."""
    loss: Literal["redi", "divergence"] = "redi"
    """What is measured; no matter of the operands."""


class Operands(NamedTuple):
    """Inputs of the loss; `hidden` [T, D] and `weight` [V, D] require gradients."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    signs: Tensor

    @property
    def token_weights(self) -> Tensor:
        """[T] float64: +1 / (pairs |y|) on a positive's tokens, -alpha / (pairs |y|) on others."""
        lengths = self.cu_seqlens.diff()
        weights = torch.where(self.signs > 0, 1.0, -ALPHA).double() / (lengths * self.pairs)
        return weights.repeat_interleave(lengths)

    @property
    def pairs(self) -> int:
        """Pairs of one positive and one negative."""
        return len(self.signs) // 2


def make_operands(sizes: LossSizes) -> Operands:
    """Operands of the given size and kind, the same for the same arguments; no token masked."""
    if sizes.inputs == "states":
        return _recorded(sizes)
    generator = torch.Generator(sizes.device).manual_seed(0)
    make = random_values if sizes.inputs == "random" else trained_values
    hidden, weight, targets = make(sizes, generator)
    bounds = [round(i * sizes.tokens / sizes.sequences) for i in range(sizes.sequences + 1)]
    return Operands(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=targets,
        cu_seqlens=torch.tensor(bounds, device=sizes.device),
        signs=torch.tensor([1, -1] * (sizes.sequences // 2), device=sizes.device),
    )


def sizes_of_states(path: Path, dtype: str, device: str, threads: int) -> LossSizes:
    """Sizes of a file written by `redi.bench.filter --states`; an unpaired last trace counts."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tokens, hidden = file.get_slice("hidden").get_shape()
        vocab = file.get_slice("weight").get_shape()[0]
        sequences = file.get_slice("lengths").get_shape()[0]
    return LossSizes(tokens, vocab, hidden, sequences, dtype, device, threads, "states", str(path))


def _recorded(sizes: LossSizes) -> Operands:
    """A real model's states; every second trace is a negative."""
    from safetensors.torch import load_file

    found = load_file(sizes.states, device=sizes.device)
    dtype = getattr(torch, sizes.dtype)
    bounds = torch.nn.functional.pad(found["lengths"].cumsum(0), (1, 0))
    signs = torch.ones(sizes.sequences, dtype=torch.int64, device=sizes.device)
    signs[1::2] = -1
    return Operands(
        hidden=found["hidden"].to(dtype).requires_grad_(),
        weight=found["weight"].to(dtype).requires_grad_(),
        targets=found["targets"],
        cu_seqlens=bounds,
        signs=signs,
    )


def random_values(sizes: LossSizes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, targets): logits of standard deviation about 2, any token the target."""
    shape = (sizes.tokens,)
    return (
        _normal(sizes.tokens, 1.0, sizes, generator),
        _normal(sizes.vocab, 2.0 / sizes.hidden**0.5, sizes, generator),
        torch.randint(sizes.vocab, shape, device=sizes.device, generator=generator),
    )


def trained_values(sizes: LossSizes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, targets) whose logits are distributed as recorded of a trained model.

    Each token follows one of the record: its target and its strongest competitors get the recorded
    log-probs, all other logits (the bulk) the recorded mean and standard deviation s. With random
    rows w_j of the lm_head, entries of deviation d, the bulk of a hidden state x is Gaussian with
    s = d |x|, and its log-sum-exp is log V + s^2 / 2 above its mean; from this follows the logit of
    a log-prob. Of the states x with the required logits at the target and the competitors, the
    smallest is a combination of their rows; adding a random vector orthogonal to these gives |x| =
    s / d. Target and competitors are drawn with frequencies 1 / rank.

    s is at most sqrt(log V): beyond it the largest few logits determine the bulk's sum. The rows'
    share of |x| grows as 1 / D, and below D = 256 it may exceed s / d: the bulk is then wider than
    recorded. Not modelled: the covariance of hidden states, except for the mean of the logits.
    """
    record = json.loads(STATISTICS.read_text(encoding="utf-8"))
    deviation = record["weight_row_norm"] / sizes.hidden**0.5
    weight = _normal(sizes.vocab, deviation, sizes, generator)
    weight[:, 0] = MEAN_COLUMN
    sample = torch.tensor(record["sample"], device=sizes.device)
    shape = (sizes.tokens,)
    rows = torch.randint(len(sample), shape, device=sizes.device, generator=generator)
    ids = _draw_tokens(sizes, generator)
    hidden = torch.empty(sizes.tokens, sizes.hidden, dtype=weight.dtype, device=sizes.device)
    for start in range(0, sizes.tokens, SLICE_TOKENS):
        part = slice(start, start + SLICE_TOKENS)
        mean, bulk_deviation, log_bulk = sample[rows[part], :3].T
        bulk_deviation = bulk_deviation.clamp(max=math.log(sizes.vocab) ** 0.5)
        bulk = math.log(sizes.vocab) + bulk_deviation.square() / 2 - log_bulk
        hidden[part, 0] = (mean / MEAN_COLUMN).to(hidden.dtype)
        hidden[part, 1:] = _states_with_logits(
            weight[ids[part], 1:].float(),
            bulk[:, None] + sample[rows[part], 3:],
            bulk_deviation / deviation,
            generator,
        ).to(hidden.dtype)
    return hidden, weight, ids[:, 0].contiguous()


def _states_with_logits(
    rows: Tensor, logits: Tensor, norms: Tensor, generator: torch.Generator
) -> Tensor:
    """Random x [n, D] of the given norms [n] with rows[i] x[i] = logits[i].

    `rows` is [n, K, D], K < D, and `logits` [n, K]. The norm is larger if the logits require it.
    """
    n, _, columns = rows.shape
    noise = torch.randn(n, columns, 1, device=rows.device, generator=generator)
    wanted = torch.cat([logits[:, :, None], rows @ noise], -1)
    combined = rows.mT @ torch.linalg.solve(rows @ rows.mT, wanted)
    smallest, along_rows = combined.unbind(-1)
    orthogonal = noise[:, :, 0] - along_rows
    remaining = (norms.square() - smallest.square().sum(1)).clamp(min=0).sqrt()
    return smallest + orthogonal * (remaining / orthogonal.norm(dim=1))[:, None]


def _draw_tokens(sizes: LossSizes, generator: torch.Generator) -> Tensor:
    """[T, 1 + COMPETITORS] distinct token ids in each row, frequencies 1 / rank, ranks random."""
    slots = 1 + COMPETITORS
    shape = (sizes.tokens, slots)
    uniform = torch.rand(shape, dtype=torch.float64, device=sizes.device, generator=generator)
    per_slot = sizes.vocab // slots
    ranks = (((per_slot + 1.0) ** uniform).long() - 1).clamp(max=per_slot - 1)
    # Slots have disjoint ranks, so that a row's are distinct; a random offset per row assigns them.
    first = torch.randint(slots, (sizes.tokens, 1), device=sizes.device, generator=generator)
    ranks = ranks * slots + (first + torch.arange(slots, device=sizes.device)) % slots
    return torch.randperm(sizes.vocab, device=sizes.device, generator=generator)[ranks]


def _normal(rows: int, deviation: float, sizes: LossSizes, generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, sizes.dtype)
    values = torch.empty(rows, sizes.hidden, dtype=dtype, device=sizes.device)
    return values.normal_(0.0, deviation, generator=generator)


def logit_summary(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Statistics of logits [n, V], for each token [n].

    `nll`: -log-prob of the target, nats; `top_p`: the largest probability; `entropy`, nats;
    `logit_mean` and `logit_std` over the vocabulary; `peak`: largest logit less the mean.
    """
    logps = logits.log_softmax(-1)
    probs = logps.exp()
    return {
        "nll": -logps.gather(1, targets[:, None])[:, 0],
        "top_p": probs.amax(1),
        "entropy": -(probs * logps).sum(1),
        "logit_mean": logits.mean(1),
        "logit_std": logits.std(1),
        "peak": logits.amax(1) - logits.mean(1),
    }


def recorded_quantiles() -> dict[str, Any]:
    """The quantiles of `logit_summary` that were recorded, with their levels."""
    record = json.loads(STATISTICS.read_text(encoding="utf-8"))
    return {"levels": record["quantile_levels"], **record["quantiles"]}
