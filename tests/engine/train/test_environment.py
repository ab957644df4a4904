"""What a run chooses for torch by environment variables, and that the user's choice stands."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from redi.engine.distributed import World
from redi.engine.train import run_folder

# Ends at the missing recipe; prints the allocator's setting and whether torch was imported before.
PROGRAM = """
import os, sys
from redi.engine.cli import main
assert main(["train", "missing.toml"]) == 2
print(os.environ.get("PYTORCH_ALLOC_CONF"), "torch" in sys.modules)
"""


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_chosen_before_torch_is_imported(name: str | None) -> None:
    own = {name: "max_split_size_mb:512"} if name else {}
    environment = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k} | own
    line = [sys.executable, "-c", PROGRAM]
    output = subprocess.run(line, env=environment, text=True, capture_output=True, check=True)
    setting = own.get("PYTORCH_ALLOC_CONF") if own else "expandable_segments:True"
    assert output.stdout.split() == [str(setting), "False"]


@pytest.fixture
def on_cuda() -> World:
    """Rank 0 of a run on CUDA, without a card."""
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)
    return World(0, 1, torch.device("cuda"), dist.HashStore(), group)


def test_the_flight_recorder_writes_into_the_run_folder(
    on_cuda: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "")  # restored afterwards
    run_folder.record_flight(tmp_path, on_cuda)
    file = Path(f"{os.environ['TORCH_FR_DUMP_TEMP_FILE']}0")
    file.write_text("written by torch")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("rank_0")] == [
        Path("flight-recorder/rank_0")
    ]


def test_each_machine_has_a_folder_for_the_flight_recorder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rank 0's machine has the working folder of a run on object storage before."""
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "")  # restored afterwards
    store = dist.HashStore()
    folders = [tmp_path / f"machine-{rank}" / "run" for rank in range(2)]
    folders[0].mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        for rank, folder in enumerate(folders):
            group = dist.ProcessGroup(store, rank, 2)
            world = World(rank, 2, torch.device("cuda"), store, group)
            pool.submit(run_folder.record_flight, folder, world)
    assert all((folder / "flight-recorder").is_dir() for folder in folders)


def test_the_flight_recorder_leaves_the_users_files(
    on_cuda: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "mine")
    monkeypatch.setattr(run_folder, "RECORDS_ELSEWHERE", True)
    run_folder.record_flight(tmp_path, on_cuda)
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "mine"
    assert not list(tmp_path.iterdir())
