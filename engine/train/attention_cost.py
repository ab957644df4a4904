"""Measures what a flop of attention costs in time, so that packs are balanced in time, not flops.

Kernels reach another share of the peak in attention than in matrix products. If packs are balanced
by flops and attention costs twice as much per flop, ranks with long traces are late: 6 to 9 % of a
step of 256 simulated R1-like pairs on 64 ranks (bench/NOTES.md).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.packing import Cost
from redi.engine.distributed import World
from redi.engine.model.architecture import attention_for
from redi.engine.model.attention import document_kwargs, register_attention
from redi.engine.model.flops import head_dim
from redi.engine.model.sharding import compute_dtype
from redi.engine.run_files import read_manifest

KEY = "attention_cost"
"""Key in the manifest."""
TOKENS = 16_384
"""Of the measured packs: one document, and the same tokens as `SPLIT` documents."""
SPLIT = 8
ROUNDED = 0.25
"""The result is a multiple of this, so that the noise of a measurement rarely changes it."""
RANGE = (0.5, 4.0)
"""A result outside is a failed measurement, and is cut to it."""
REPEATS = 5


def calibrated(
    cost: Cost, recipe: Recipe, config: Any, run_dir: Path, world: World, console: Console
) -> tuple[Cost, float]:
    """A cost whose attention counts as much as it takes; equal on every rank. Collective.

    A run measures once, on rank 0, and keeps the result in its manifest, so that its packs stay the
    same on resume. Runs on a CPU and with `train.deterministic`, which must not depend on a
    measurement, and runs started by an older version have 1.

    Returns:
        The cost, and the factor on its attention.
    """

    def find() -> float:
        if manifest := read_manifest(run_dir):
            return float(manifest.get(KEY, 1.0))
        if world.device.type != "cuda" or recipe.train.deterministic:
            return 1.0
        dtype = compute_dtype(recipe.train.dtype, world.device)
        kind, _ = attention_for(config, recipe.model.attention, world.device, dtype)
        try:
            return rounded(measure(config, kind, world.device, dtype))
        except RuntimeError as error:  # packs remain valid, only less balanced
            console.warn(f"attention was not measured ({str(error).splitlines()[0]})")
            return 1.0

    factor = world.from_rank0(find)
    if factor != 1:
        console.say(f"a flop of attention counts {factor:g} times in packing, as measured")
    return cost.attention_times(factor), factor


def rounded(factor: float) -> float:
    """The nearest multiple of `ROUNDED` within `RANGE`."""
    return min(max(round(factor / ROUNDED) * ROUNDED, RANGE[0]), RANGE[1])


def measure(
    config: Any, kind: str, device: torch.device, dtype: torch.dtype, tokens: int = TOKENS
) -> float:
    """Seconds of a flop of attention over those of a flop of a block's matrix products.

    Forward and backward, by the model's sizes and the run's attention. One document and the same
    tokens in short ones differ in pairs of tokens alone: all that is linear cancels.

    Args:
        kind: of attention, a name returned by `choose_attention`.
        tokens: of the longer document.
    """
    name = register_attention(kind)
    function = AttentionInterface()[name]
    heads, dim = config.num_attention_heads, head_dim(config)
    groups = getattr(config, "num_key_value_heads", None) or heads

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    query, key, value = (random(1, count, tokens, dim) for count in (heads, groups, groups))

    def attend(documents: int) -> Callable[[], torch.Tensor]:
        length = tokens // documents
        boundaries = torch.arange(documents + 1, dtype=torch.int32, device=device) * length
        packed = document_kwargs(boundaries, length)
        return lambda: function(None, query, key, value, None, **packed)[0]

    seconds = _seconds(attend(1), device) - _seconds(attend(SPLIT), device)
    # As in `ModelSize.step_flops`: 3 (key + value) a head and pair of the square.
    flops = 6.0 * heads * dim * (tokens**2 - SPLIT * (tokens // SPLIT) ** 2)
    hidden, weight = random(tokens, config.hidden_size), random(config.hidden_size, 4 * heads * dim)
    product = _seconds(lambda: hidden @ weight, device)
    return (seconds / flops) / (product / (6.0 * hidden.numel() * weight.shape[1]))


def _seconds(forward: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Median time of a forward and backward."""
    times = []
    for _ in range(REPEATS + 1):
        _wait(device)
        began = time.perf_counter()
        out = forward()
        out.backward(torch.ones_like(out))
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])  # the first one warms up


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
