"""`redi.bench.loss` at a tiny size: it measures, records, and refuses to time a wrong result."""

import json
from pathlib import Path

import pytest
import torch

from redi.bench import loss as bench

TINY = [
    "--tokens", "96", "--vocab", "160", "--hidden", "24", "--sequences", "4", "--repeats", "2",
    "--threads", str(torch.get_num_threads()),
]  # fmt: skip


def test_it_prints_a_table_and_writes_a_full_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "loss.json"
    assert bench.main([*TINY, "--contenders", "redi", "eager", "--out", str(out)]) == 0
    assert "x floor" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["sizes"] | {"tokens": 96, "vocab": 160, "hidden": 24} == record["sizes"]
    assert record["torch"] == torch.__version__
    assert record["hardware"]
    assert "commit" in record
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["floor", "redi", "eager"]
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert row["spread_s"][0] <= row["median_s"] <= row["spread_s"][1]
        assert row["peak_extra_mib"] >= 0
    assert rows["floor"]["times_floor"] == 1.0
    for name in ("redi", "eager"):
        assert rows[name]["dhidden_error"] < 2e-5
        assert rows[name]["dweight_error"] < 2e-5


def test_every_contender_computes_the_same_loss_and_gradients() -> None:
    sizes = bench.Sizes(90, 70, 16, 4, "float32", "cpu", 1)
    operands = bench.make_operands(sizes)
    exact = bench.float64_result(operands, slice_tokens=40)
    for name, contender in bench.CONTENDERS.items():
        result = contender(operands)()
        if name == "floor":
            assert result is None
            continue
        for value, true in zip(result, exact, strict=True):
            assert bench.relative_error(value, true) < 2e-5, name


def test_a_wrong_result_has_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(operands: bench.Operands) -> bench.Step:
        step = bench.redi(operands)

        def wrong() -> bench.Result:
            loss, dhidden, dweight = step()
            return bench.Result(loss, 1.01 * dhidden, dweight)

        return wrong

    monkeypatch.setitem(bench.CONTENDERS, "redi", broken)
    monkeypatch.setattr(bench, "measure_memory", lambda name, sizes: 0.0)
    out = tmp_path / "loss.json"
    assert bench.main([*TINY, "--contenders", "redi", "--out", str(out)]) == 1
    assert not out.exists()
    assert "nothing is recorded" in capsys.readouterr().err
