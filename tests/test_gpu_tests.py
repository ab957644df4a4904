"""The tests of `tests/gpu` at a tiny size on a CPU: whether they run, not what a card does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run in earnest")
def test_the_gpu_tests_run_dry() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("pytest")), "--import-mode=importlib", "-m", "gpu",
         "-q", str(Path(__file__).parent / "gpu")],
        env={**os.environ, "REDI_GPU_DRY_RUN": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
