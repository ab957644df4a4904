"""Memory and waiting time in the metrics are those of the rank with most, not of rank 0."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Runs the command; rank 1 holds 0.75 GiB more, and packs slowly.
SPY = """
import os, resource, sys, time
import torch
from redi.engine.data import loader

pack = loader.pack

def slow_pack(*arguments, **options):
    time.sleep(0.3)
    return pack(*arguments, **options)

if os.environ["RANK"] == "1":
    loader.pack = slow_pack
    ballast = torch.ones(int(0.75 * 2**28))
from redi.engine.cli import main
code = main(sys.argv[2:])
if os.environ["RANK"] == "0":
    with open(sys.argv[1], "w") as file:
        file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))
raise SystemExit(code)
"""


@pytest.mark.slow
def test_metrics_have_the_largest_ranks_figures(
    recipe: Callable[..., Path],
    command: Callable[..., list[str]],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    (tmp_path / "spy.py").write_text(SPY)
    line = command("train", recipe("run", {"train.max_steps": 2}), ranks=2)
    where = line.index("redi.engine.cli")
    line[where - 1 : where + 1] = [str(tmp_path / "spy.py"), str(tmp_path / "own")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    of_rank_0 = json.loads((tmp_path / "own").read_text())
    for step in steps(tmp_path / "run"):
        assert step["peak_memory_gib"] > of_rank_0 + 0.3
        assert 0.3 <= step["data_seconds"] < step["seconds"]
