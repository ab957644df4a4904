"""The launch table: what it may decide, and that tuning writes what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from redi.bench import tune
from redi.kernels import backends
from redi.kernels.experimental import exp_gemm_triton, launches
from redi.kernels.experimental.launches import TABLE, Entry, Launch, read_table, write_entry

LAUNCH = Launch(
    rows=16,
    columns=64,
    depth=64,
    warps=4,
    stages=1,
    stores=1,
    programs=1,
    l2_share=0.5,
    flatten=False,
    kept_width=64,
)


def entry(hidden: int, backend: str = "triton-exp", measured: bool = True) -> Entry:
    return Entry(
        "sm_90", "bfloat16", hidden, backend, LAUNCH, {"date": "a day"} if measured else None
    )


def test_nothing_that_is_committed_and_unmeasured_is_chosen() -> None:
    """An entry that makes "auto" choose triton-exp says where and when it was measured."""
    for row in read_table():
        if row.backend == "triton-exp":
            assert row.measured is not None
            times = row.measured["milliseconds"]
            assert times["triton-exp"] < times["triton"]
            assert {"hardware", "date", "torch", "triton"} <= set(row.measured)


def test_the_table_has_a_row_for_each_key_and_is_sorted(tmp_path: Path) -> None:
    copy = tmp_path / "launches.json"
    copy.write_bytes(TABLE.read_bytes())
    write_entry(read_table()[0], copy)
    assert copy.read_bytes() == TABLE.read_bytes()


def test_an_entry_takes_the_place_of_the_one_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    path.write_text("[]")
    for row in (entry(3584), entry(1536, measured=False), entry(1536)):
        write_entry(row, path)
    assert read_table(path) == [entry(1536), entry(3584)]


@pytest.mark.parametrize(
    ("rows", "hidden", "dtype", "chosen"),
    [
        ([entry(1536)], 1536, torch.bfloat16, "triton-exp"),
        ([entry(1536, measured=False)], 1536, torch.bfloat16, "triton"),
        ([entry(1536, backend="triton")], 1536, torch.bfloat16, "triton"),
        ([entry(1536)], 2048, torch.bfloat16, "triton"),
        ([entry(1536)], 1536, torch.float16, "triton"),
        ([replace(entry(1536), architecture="sm_100")], 1536, torch.bfloat16, "triton"),
        ([], 1536, torch.bfloat16, "triton"),
    ],
)
def test_auto_chooses_what_was_measured_to_be_faster_at_this_very_size(
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Entry],
    hidden: int,
    dtype: torch.dtype,
    chosen: str,
) -> None:
    monkeypatch.setattr(launches, "_ENTRIES", rows)
    monkeypatch.setattr(launches, "architecture_of", lambda device: "sm_90")
    assert backends.choose_backend("auto", torch.device("cuda"), dtype, hidden) == chosen


def test_a_gpu_without_a_launch_is_refused_and_another_size_takes_the_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near, far = entry(1536), replace(entry(4096), launch=replace(LAUNCH, stages=5))
    monkeypatch.setattr(launches, "_ENTRIES", [near, far])
    monkeypatch.setattr(launches, "architecture_of", lambda device: "sm_90")
    assert launches.launch_for(torch.empty(9, 2048)) == near.launch
    assert launches.launch_for(torch.empty(9, 3584)) == far.launch
    monkeypatch.setattr(launches, "architecture_of", lambda device: "sm_80")
    with pytest.raises(ValueError, match='no launch for the architecture of cuda: use "triton"'):
        backends.choose_backend("triton-exp", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(("hidden", "most"), [(1536, 66), (2048, 50), (3584, 28), (8192, 12)])
def test_the_hidden_states_of_a_group_fit_half_of_the_l2_cache(hidden: int, most: int) -> None:
    hopper = replace(LAUNCH, rows=128)
    assert launches.most_in_group(hopper, hidden, 50 << 20) == most
    assert launches.most_in_group(replace(hopper, rows=256), hidden, 50 << 20) == most // 2
    assert launches.most_in_group(hopper, hidden, 1 << 20) == max(1, (1 << 19) // (256 * hidden))


@pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="writes an entry of the interpreter")
def test_tuning_writes_the_fastest_launch_that_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, right = tune.candidates("interpreter")
    exp_gemm = exp_gemm_triton.exp_gemm

    def one_of_them_wrong(*args: object, launch: Launch, **options: object) -> object:
        made = exp_gemm(*args, launch=launch, **options)
        return replace(made, factors=1.02 * made.factors) if launch == wrong else made

    monkeypatch.setattr(exp_gemm_triton, "exp_gemm", one_of_them_wrong)
    path = tmp_path / "launches.json"
    path.write_bytes(TABLE.read_bytes())
    code = tune.main([
        "--device", "cpu", "--tokens", "32", "--vocab", "160", "--hidden", "24",
        "--inputs", "random", "--repeats", "1", "--table", str(path),
    ])  # fmt: skip
    assert code == 0
    assert "its gradients differ by" in capsys.readouterr().out
    (row,) = [row for row in json.loads(path.read_text()) if row["hidden"] == 24]
    assert Launch(**row["launch"]) == right
    times = row["measured"]["milliseconds"]
    assert (row["backend"] == "triton-exp") == (times["triton-exp"] < times["triton"])
    assert len(read_table(path)) == len(read_table()) + 1
