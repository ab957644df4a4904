"""What the tests on a card share: sizes, realistic rows, a float64 oracle that goes in chunks.

With REDI_GPU_DRY_RUN=1 the same tests run at a tiny size on a CPU, by Triton's interpreter: so a
slip of the pen is found where no card is.
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kernel_cases import ALPHA, Case, Gradients
from torch import Tensor

DRY_RUN = os.environ.get("REDI_GPU_DRY_RUN", "0") == "1"
ORACLE_ROWS = 2048


@dataclass(frozen=True)
class Scale:
    """Sizes of a test run."""

    device: str
    tokens: int
    vocab: int
    hidden: tuple[int, int]
    """Qwen2.5's at 1.5B and 7B."""
    long_tokens: int
    tall_chunk: int
    """Rows of one chunk, so many that row x vocab passes 2^31."""
    few_tokens: int
    """Where whole logits in float64 must fit."""


SCALE = (
    Scale("cpu", 40, 331, (16, 24), 80, 36, 60)
    if DRY_RUN
    else Scale("cuda", 32_768, 151_936, (1536, 3584), 262_144, 16_384, 600)
)


def make_row(tokens: int, hidden: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Case:
    """A packed row of up to 16 sequences with alternating signs, a fifth of each a masked prompt.

    Every other token is likely (its logit near 8), the rest are not; logits spread by 2.
    """
    generator = torch.Generator(SCALE.device).manual_seed(seed)
    on = {"device": SCALE.device, "generator": generator}
    weight = torch.randn(SCALE.vocab, hidden, **on) / hidden**0.5
    targets = torch.randint(SCALE.vocab, (tokens,), **on)
    targets[-1] = SCALE.vocab - 1
    x = 2 * torch.randn(tokens, hidden, **on)
    x[::2] += 8 * F.normalize(weight[targets[::2]])
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(seed))[:15] + 1
    bounds = torch.cat([torch.tensor([0, tokens]), cuts]).sort().values
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        targets[start : start + (end - start) // 5] = -100
    signs = torch.ones(len(bounds) - 1, dtype=torch.int64)
    signs[1::2] = -1
    return Case(
        hidden=x.to(dtype),
        weight=weight.to(dtype),
        targets=targets,
        cu_seqlens=bounds.to(SCALE.device, torch.int32),
        signs=signs.to(SCALE.device),
        alpha=ALPHA,
        num_pairs=8.0,
    )


def exact_in_chunks(case: Case) -> tuple[Tensor, Gradients]:
    """Log-probs [T] and REDI's gradients in float64, written out: z, p, u (p - onehot)."""
    weight = case.weight.double()
    logps = torch.zeros(len(case.targets), dtype=torch.float64, device=weight.device)
    dhidden = torch.zeros(case.hidden.shape, dtype=torch.float64, device=weight.device)
    dweight = torch.zeros_like(weight)
    u = case.token_weights
    for tokens in case.valid_index.split(ORACLE_ROWS):
        x, target = case.hidden[tokens].double(), case.targets[tokens, None]
        dz = torch.log_softmax(x @ weight.T, -1)
        logps[tokens] = dz.gather(1, target)[:, 0]
        dz.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float64))
        dz *= u[tokens, None]
        dhidden[tokens] = dz @ weight
        dweight.addmm_(dz.T, x)
    return logps, Gradients(dhidden, dweight)


def plain_in_chunks(case: Case) -> Gradients:
    """`kernel_cases.baseline` without whole logits; dW is added up in float32."""
    dhidden = torch.zeros_like(case.hidden)
    dweight = torch.zeros(case.weight.shape, device=case.weight.device)
    u = case.token_weights
    for tokens in case.valid_index.split(ORACLE_ROWS):
        x = case.hidden[tokens]
        p = torch.softmax((x @ case.weight.T).float(), -1)
        p.scatter_add_(1, case.targets[tokens, None], torch.full_like(p[:, :1], -1.0))
        dlogits = p.mul_(u[tokens, None].float()).to(x.dtype)
        dhidden[tokens] = dlogits @ case.weight
        dweight += dlogits.T @ x
    return Gradients(dhidden, dweight.to(case.weight.dtype))
