"""Losses of the study that know the habit's teacher: not its traces alone, but its distributions.

The impatient teacher's next box depends on its running value and on how many boxes it just left
blank, and both can be read off a problem and the boxes so far. So its distribution over the next
token is known at each token of each trace, and so is the one of those of its traces that end
correctly: what a student that imitates correct traces learns from samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redi.engine.data.packing import PackedBatch
from redi.engine.loss.packed_loss import PLAIN, Logits, PackedLoss, StepTotals
from redi.engine.quickstart.task import BLANK_PROBABILITY, DIGITS, ERROR_PROBABILITY
from redi.kernels import RediLoss, segment_sum, topk_divergence

BOXES = DIGITS - 1
BLANK_ID, END_ID = 11, 12
"""Of the quickstart's tokenizer, whose digits are the ids 0 to 9."""


def box_probabilities(values: Tensor, blanks: int | Tensor, last: bool) -> Tensor:
    """[..., 12] of the ten digits, "=" and a blank, before the answer is known to be right.

    `values` [...] are the right digits, `blanks` the blanks before the box.
    """
    error = torch.tensor(ERROR_PROBABILITY, dtype=torch.float64)[blanks]
    written = 1.0 if last else 1 - BLANK_PROBABILITY
    wrong = (written * error / 9).expand(values.shape)
    found = wrong[..., None].repeat_interleave(BLANK_ID + 1, -1)
    found[..., 10] = 0.0
    found[..., BLANK_ID] = 0.0 if last else BLANK_PROBABILITY
    right = (written * (1 - error)).expand(values.shape)
    return found.scatter(-1, values[..., None], right[..., None])


def chances(problems: Tensor) -> list[Tensor]:
    """Of each place, then after the last: [S, 10, BOXES + 1] chances of a correct answer.

    By the running value before the place and the blanks before it. `problems` is [S, DIGITS].
    """
    values = torch.arange(10).expand(len(problems), 10)
    truth = problems[:, :1]
    for place in range(BOXES):
        truth = (truth - problems[:, place + 1, None]).abs()
    found = [(values == truth).double()[..., None].expand(-1, -1, BOXES + 1)]
    for place in reversed(range(BOXES)):
        right = (values - problems[:, place + 1, None]).abs()
        after = found[0]
        chance = torch.zeros_like(after)
        for blanks in range(place + 1):
            p = box_probabilities(right, blanks, place == BOXES - 1)
            skipped = after[..., blanks + 1].gather(1, right)
            chance[..., blanks] = (p[..., :10] @ after[:, :, :1])[..., 0] + p[..., 11] * skipped
        found.insert(0, chance)
    return found


def distributions(documents: Tensor, outcomes: Tensor) -> Tensor:
    """[S, BOXES + 1, 13]: the teacher's probability of each token at each box and at the end.

    Args:
        documents: [S, tokens] problems, "=", boxes, the end.
        outcomes: [S] +1: of those of its traces that end correctly, -1: incorrectly, 0: of all.
    """
    problems = documents[:, :DIGITS]
    boxes = documents[:, DIGITS + 1 : DIGITS + 1 + BOXES]
    chance = chances(problems)
    value, blanks = problems[:, 0], torch.zeros_like(problems[:, 0])
    found = torch.zeros(len(documents), BOXES + 1, END_ID + 1, dtype=torch.float64)
    found[:, BOXES, END_ID] = 1.0
    rows = torch.arange(len(documents))
    wanted = outcomes[:, None, None]
    for place in range(BOXES):
        value = (value - problems[:, place + 1]).abs()
        q = box_probabilities(value, blanks, place == BOXES - 1)
        after = chance[place + 1]
        after = torch.where(wanted > 0, after, torch.where(wanted < 0, 1 - after, 1.0))
        q[:, :10] *= after[:, :, 0]
        q[:, BLANK_ID] *= after[rows, value, blanks + 1]
        found[:, place, : BLANK_ID + 1] = q / q.sum(-1, keepdim=True)
        blank = boxes[:, place] == BLANK_ID
        value = torch.where(blank, value, boxes[:, place])
        blanks = torch.where(blank, blanks + 1, 0)
    return found


class TaughtLoss(PackedLoss):
    """REDI whose correct traces' tokens, samples of the teacher's, are replaced by distributions.

    KL(teacher, student) along correct traces, and alpha times the mean log-prob of incorrect ones.
    """

    filtered = True
    """Whether the teacher's distributions are those of its traces that end as the trace does."""
    negatives = False
    """Whether incorrect traces' tokens are replaced as well."""
    form: dict[str, Any] = {"direction": "forward"}  # noqa: RUF012
    """Options of `topk_divergence`."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        totals: StepTotals,
        logits: Logits = PLAIN,
    ) -> RediLoss:
        """The pack's share of the loss; see `PackedLoss`."""
        signs = batch.signs.cpu()
        documents = torch.arange(len(signs)).repeat_interleave(batch.cu_seqlens.diff().long().cpu())
        q = distributions(
            batch.input_ids.view(len(signs), -1).cpu(), signs if self.filtered else 0 * signs
        )
        position = (batch.position_ids.cpu() - DIGITS).clamp(min=0, max=BOXES)
        logps = q[documents, position].log().to(hidden.device, torch.float32)
        ids = torch.arange(END_ID + 1, device=hidden.device).expand_as(logps)
        scale = torch.where(batch.signs > 0, 1.0, -self.section.alpha)
        token_weights = (scale / (batch.num_targets * totals.units))[documents.to(hidden.device)]
        taught = token_weights if self.negatives else token_weights.clamp(min=0)
        made = topk_divergence(
            hidden,
            weight,
            ids.masked_fill(logps == -torch.inf, -1),
            logps,
            taught,
            targets=batch.targets,
            target_weights=token_weights - taught,
            valid_index=batch.valid_index,
            **self.form,
        )
        assert made.token_logps is not None
        sums = segment_sum(made.token_logps, batch.cu_seqlens)
        return RediLoss(made.loss, sums, batch.num_targets)


class UnfilteredLoss(TaughtLoss):
    """`TaughtLoss` with the distributions that a teacher's logits give: of all of its traces."""

    filtered = False


class TaughtPairsLoss(TaughtLoss):
    """`TaughtLoss` with distributions along incorrect traces too, each sign's own."""

    negatives = True


class BoundedPairsLoss(TaughtPairsLoss):
    """`TaughtPairsLoss` with Jensen-Shannon divergences: at most log 2 of each token."""

    form = {"direction": "jsd", "tail": "bucket"}  # noqa: RUF012
