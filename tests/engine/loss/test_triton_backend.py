"""Training with Triton's kernels: sharded over two ranks, by the interpreter where no card is."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redi.engine.cli import main
from redi.kernels.backends import TRITON_INSTALLED, TRITON_INTERPRETS


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks would share the card")
@pytest.mark.skipif(not (TRITON_INSTALLED and TRITON_INTERPRETS), reason="no interpreter")
@pytest.mark.slow
def test_two_sharded_ranks_with_triton_train_as_one_process_with_torch(
    recipe: Callable[..., Path],
    redi: Callable[..., Any],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    small = {"train.batch": 2, "train.max_steps": 1}
    assert main(["train", str(recipe("torch", small | {"objective.backend": "torch"}))]) == 0
    path = recipe("triton", small | {"objective.backend": "triton"})
    done = redi("train", path, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    (expected,), (got,) = steps(tmp_path / "torch"), steps(tmp_path / "triton")
    for name in ("loss", "positive_logp", "negative_logp"):
        assert math.isclose(got[name], expected[name], rel_tol=1e-6), name
    assert math.isclose(got["grad_norm"], expected["grad_norm"], rel_tol=2e-5)
