"""Model flops utilization of a step: the metrics `model_tflops` and `mfu`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from redi.engine.config.sections import Recipe
from redi.engine.distributed import World
from redi.engine.model.flops import ModelSize
from redi.engine.model.sharding import compute_dtype
from redi.engine.plan.cards import CARDS, card_of


class Utilization:
    """Speed of a run's steps in flops, as PaLM defines it (arXiv 2204.02311, appendix B).

        mfu = flops that the step's traces need / (seconds * ranks * peak of a device)

    The flops are those of one forward and backward of the true documents, with each shared prompt
    once, without padding, dummies and recomputation (`ModelSize.step_flops`). The seconds are those
    of the whole step, including the update and the wait for data. The peak is the dense bfloat16
    peak of a data sheet.

    Args:
        recipe: resolved.
        size: of the model.
        world: its ranks share the flops; the peak is that of this rank's device.
    """

    def __init__(self, recipe: Recipe, size: ModelSize, world: World) -> None:
        self._size = size
        self._ranks = world.size
        self._peak = peak_flops(world.device, compute_dtype(recipe.train.dtype, world.device))

    def of(self, line: dict[str, Any], lengths: np.ndarray) -> dict[str, float | None]:
        """The figures of a step.

        Args:
            line: its line of metrics.jsonl, with `targets`, `shared_tokens` and `seconds`.
            lengths: tokens of each of its traces on all ranks, int64 [S].

        Returns:
            `model_tflops`, 10^12 flops a second and rank, and `mfu`, a share of the peak or None.
        """
        of_step = self._size.step_flops(lengths, line["targets"], line["shared_tokens"])
        flops = of_step / (line["seconds"] * self._ranks)
        return {
            "model_tflops": flops / 1e12,
            "mfu": flops / self._peak if self._peak else None,
        }


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense bfloat16 flops a second of a GPU; None if unknown, or if it computes in float32."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    card = card_of(torch.cuda.get_device_name(device))
    return CARDS[card].peak_flops if card else None
