"""Is packed attention right on this device, and how fast? `python -m redi.bench.check_attention`.

Each kind that a run could choose here attends within the documents of a pack, forward and backward,
with the heads of Qwen2.5-1.5B. Its result and gradients are compared with a float64 softmax
document by document. Then it is timed on long packs: one document, and eight. The record is
written anew after each kind. The exit status is 1 if one is wrong or fails.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from redi.bench.measure import peak_cuda, problem_line, seconds_of
from redi.bench.report import LiveRecord
from redi.engine.model.attention import (
    SUPPORT,
    choose_attention,
    document_kwargs,
    features_of,
    find_flash,
    register_attention,
)
from redi.engine.model.document_attention import PLAIN, Pattern

HEADS, KEY_HEADS, HEAD_DIM = 12, 2, 128
# Relative Frobenius error, by dtype; halves round the probabilities, the result and its gradient.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
SHARES = (0.4, 0.0, 0.25, 0.05, 0.3)
"""Documents of the pack that is checked, as shares of its tokens; the second has one token."""


class Projections(NamedTuple):
    """Queries [1, HEADS, T, d], keys and values [1, KEY_HEADS, T, d]."""

    query: Tensor
    key: Tensor
    value: Tensor


Attend = Callable[[Projections, list[int]], Tensor]
"""(projections, document boundaries) -> [1, T, HEADS, d]"""


def make_projections(tokens: int, dtype: torch.dtype, device: str) -> Projections:
    """Random ones that require gradients; the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, heads, tokens, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    made = (torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes)
    return Projections(*(one.requires_grad_() for one in made))


PATTERNS = {
    "": Pattern(),
    " with a window": Pattern(window=300),
    " with a soft cap": Pattern(softcap=20.0),
}
"""What is checked; a kind without a soft cap is not."""


def packed(kind: str, device: str, pattern: Pattern = PLAIN) -> Attend:
    """Attention of a kind as a model calls it."""
    attention = ALL_ATTENTION_FUNCTIONS[register_attention(kind)]
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]

    def attend(projections: Projections, bounds: list[int]) -> Tensor:
        longest = max(end - start for start, end in pairwise(bounds))
        documents = document_kwargs(torch.tensor(bounds, dtype=torch.int32, device=device), longest)
        out, _ = attention(
            module,
            *projections,
            None,
            scaling=HEAD_DIM**-0.5,
            sliding_window=pattern.window,
            softcap=pattern.softcap,
            **documents,
        )
        return out

    return attend


def plain(projections: Projections, bounds: list[int], pattern: Pattern) -> Tensor:
    """Softmax attention written out, document by document."""
    groups = HEADS // KEY_HEADS
    key, value = (x.repeat_interleave(groups, 1) for x in projections[1:])
    outs = []
    for start, end in pairwise(bounds):
        q, k, v = (x[:, :, start:end] for x in (projections.query, key, value))
        scores = q @ k.mT * HEAD_DIM**-0.5
        if pattern.softcap is not None:
            scores = pattern.softcap * (scores / pattern.softcap).tanh()
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        if pattern.window is not None:
            hidden |= torch.ones_like(hidden).tril(-pattern.window)
        outs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return torch.cat(outs, 2).transpose(1, 2)


def errors_of(
    attend: Attend, projections: Projections, bounds: list[int], pattern: Pattern
) -> dict[str, float]:
    """Relative Frobenius errors of the result and of the three gradients against float64."""
    exact_inputs = Projections(*(x.detach().double().requires_grad_() for x in projections))
    exact, got = plain(exact_inputs, bounds, pattern), attend(projections, bounds)
    upstream = torch.randn_like(got)
    true = (exact.detach(), *torch.autograd.grad(exact, exact_inputs, upstream.double()))
    found = (got.detach(), *torch.autograd.grad(got, projections, upstream))
    names = ("out", "dquery", "dkey", "dvalue")
    return {
        name: float((a.double() - b).norm() / b.norm())
        for name, a, b in zip(names, found, true, strict=True)
    }


def speed_of(attend: Attend, tokens: int, documents: int, device: str) -> dict[str, Any]:
    """Median seconds of forward and backward over a pack, and flops a second.

    A causal document of n tokens takes 2 n^2 d flops a head forward and 2.5 times that backward.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    projections = make_projections(tokens, dtype, device)
    bounds = [tokens * i // documents for i in range(documents + 1)]
    upstream = torch.randn_like(projections.query.transpose(1, 2))

    def step() -> None:
        torch.autograd.grad(attend(projections, bounds), projections, upstream)

    step()
    seconds = statistics.median(seconds_of(step, device) for _ in range(5))
    pairs = sum((end - start) ** 2 for start, end in pairwise(bounds))
    return {
        "tokens": tokens,
        "documents": documents,
        "seconds": seconds,
        "tflops": 3.5 * 2 * pairs * HEAD_DIM * HEADS / seconds / 1e12,
        "peak_extra_mib": peak_cuda(step) if device == "cuda" else None,
    }


def kinds_of(device: torch.device, dtype: torch.dtype) -> list[str]:
    """What "auto" chooses here first, then what else could be asked for."""
    first, _ = choose_attention("auto", device, dtype)
    others = ["sdpa"]
    if device.type == "cuda":
        flash, _ = find_flash(torch.cuda.get_device_capability(device)[0])
        others = [*([flash] if flash else []), "varlen", "sdpa"]
    return list(dict.fromkeys([first, *others]))


def main(arguments: list[str] | None = None) -> int:
    """Check and time each kind, print a line for each, write."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.check_attention",
        description=(__doc__ or "").partition("\n\n")[0],
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tokens", type=int, default=2048, help="of the pack that is checked")
    parser.add_argument("--timed_tokens", type=int, default=32_768)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is not available: torch finds no GPU")
    device, tokens = options.device, options.tokens
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    record = LiveRecord("check-attention", device, options.out, dtype=str(dtype)[6:])
    lengths = [max(1, int(share * tokens)) for share in SHARES]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    projections = make_projections(bounds[-1], dtype, device)
    failed = False
    for kind in kinds_of(torch.device(device), dtype):
        try:
            attend = packed(kind, device)
            errors = {}
            for what, pattern in PATTERNS.items():
                if all(kind in SUPPORT[feature] for feature in features_of(pattern)):
                    found = packed(kind, device, pattern)
                    for name, error in errors_of(found, projections, bounds, pattern).items():
                        errors[name + what] = error
            wrong = [n for n, error in errors.items() if not error <= TOLERANCE[dtype]]
            speeds = [speed_of(attend, options.timed_tokens, n, device) for n in (1, 8)]
        except Exception as error:  # whatever a driver or a package raises
            failed = True
            record.add("kinds", {"kind": kind, "failed": problem_line(error)})
            print(f"{kind:8} failed: {problem_line(error)}")
            continue
        failed = failed or bool(wrong)
        record.add("kinds", {"kind": kind, "errors": errors, "wrong": wrong, "speeds": speeds})
        shown = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
        timed = "  ".join(
            f"{one['documents']} documents {1e3 * one['seconds']:.1f} ms "
            f"({one['tflops']:.0f} TFLOP/s)"
            for one in speeds
        )
        print(f"{kind:8} {shown}  {timed}" + (f"  WRONG: {', '.join(wrong)}" if wrong else ""))
    print(f"written to {record.path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
