"""`redi.bench.loss` measures, records, lists what failed, and rejects a wrong result."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redi.bench import hidden_statistics, inputs, measure
from redi.bench import loss as bench
from redi.bench.baselines import Absent, Contender, LossMethod, Result
from redi.bench.inputs import LossSizes, Operands, make_operands

ROOT = Path(__file__).parents[2]
TINY = [
    "--tokens", "96", "--vocab", "160", "--hidden", "24", "--sequences", "4", "--repeats", "2",
    "--threads", str(torch.get_num_threads()),
]  # fmt: skip


def run(out: Path, *contenders: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status, and the records that were written."""
    code = bench.main([*TINY, "--contenders", *contenders, "--out", str(out)])
    return code, [json.loads(file.read_text()) for file in out.glob("*.json")]


@pytest.fixture
def no_memory_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in other processes, which do not see what a test puts in METHODS."""
    monkeypatch.setattr(bench, "peak_extra_mib", lambda *_: 1.0)


@pytest.mark.slow
def test_it_prints_a_table_and_leaves_a_full_record_with_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, (record,) = run(tmp_path, "redi-torch", "eager", "redi-triton", "compiled")
    assert code == 0
    assert "x floor" in capsys.readouterr().out
    assert record["sizes"] | {"tokens": 96, "vocab": 160, "hidden": 24} == record["sizes"]
    assert record["torch"] == torch.__version__
    assert record["hardware"]
    assert "commit" in record
    assert "GPU" in record["absent"]["compiled"]
    rows = {row["name"]: row for row in record["rows"]}
    assert {"floor", "redi-torch", "eager"} <= set(rows)
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert row["spread_s"][0] <= row["median_s"] <= row["spread_s"][1]
    assert rows["floor"]["times_floor"] == 1.0
    for name in ("redi-torch", "eager"):
        assert rows[name]["dhidden_error"] < 2e-5
        assert rows[name]["dweight_error"] < 2e-5
        assert rows[name]["logp_error"] < 2e-5
        assert rows[name]["peak_extra_mib"] >= 0
    if find_spec("matplotlib"):
        (picture,) = tmp_path.glob("*.png")
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_memory_processes")
def test_without_rich_and_matplotlib_it_still_prints_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("rich.console", "rich.table", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    code, records = run(tmp_path, "redi-torch")
    assert (code, len(records)) == (0, 1)
    printed = capsys.readouterr()
    assert "redi-torch" in printed.out
    assert "matplotlib is not installed" in printed.err


@pytest.mark.slow
def test_every_contender_at_hand_computes_the_same_loss_and_gradients() -> None:
    operands = make_operands(LossSizes(90, 70, 16, 4, "float32", "cpu", 1))
    exact = bench.float64_result(operands, slice_tokens=40)
    whole_row = torch.nn.functional.cross_entropy
    checked = set()
    for name, method in bench.METHODS.items():
        try:
            contender = method.build(operands)
        except (Absent, ImportError):
            continue
        checked.add(name)
        if contender.plain:
            hidden, weight = (t.detach().double().requires_grad_() for t in operands[:2])
            loss = whole_row(hidden @ weight.T, operands.targets)
            true = Result(loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
            result = contender.step()
            assert result is not None
            for value, exact_value in zip(result, true, strict=True):
                assert bench.relative_error(value, exact_value) < 2e-5, name
            continue
        errors = bench.errors_of(contender, exact)
        assert all(error is None or error < 2e-5 for error in errors.values()), (name, errors)
        assert (errors["dweight_error"] is None) == (name == "floor")
    assert {"floor", "redi-torch", "eager", "torch-by-sequence", "torch-by-token"} <= checked


@pytest.mark.slow
def test_every_divergence_at_hand_is_recorded_and_those_of_one_loss_agree(tmp_path: Path) -> None:
    code = bench.main([*TINY, "--loss", "divergence", "--out", str(tmp_path)])
    assert code == 0
    (file,) = tmp_path.glob("divergence_*.json")
    record = json.loads(file.read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert {"floor", "topk-torch", "topk-torch-jsd", "cross-entropy", "topk-eager"} <= set(rows)
    for name in ("topk-torch", "topk-eager"):
        assert rows[name]["dhidden_error"] < 2e-5
        assert rows[name]["dweight_error"] < 2e-5
    assert rows["topk-torch"]["logp_error"] < 2e-5
    assert not any(row["rejected"] for row in record["rows"])
    assert not record["failed"]


def test_a_contender_of_another_loss_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--loss", "divergence", "--contenders", "redi-torch"])
    assert "redi-torch computes no divergence: see --loss" in capsys.readouterr().err


def _altered(gradient: float, logps: float) -> LossMethod:
    def build(operands: Operands) -> Contender:
        right = bench.METHODS["eager"].build(operands)

        def step() -> Result:
            result = right.step()
            assert result is not None
            return result._replace(dhidden=gradient * result.dhidden)

        def token_logps() -> Tensor:
            assert right.token_logps is not None
            return right.token_logps() + logps

        return Contender(step, token_logps)

    return LossMethod("altered", build, ours=True)


@pytest.mark.slow
@pytest.mark.parametrize(("gradient", "logps"), [(1.01, 0.0), (1.0, 1e-3)])
@pytest.mark.usefixtures("no_memory_processes")
def test_a_wrong_result_has_no_speed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gradient: float,
    logps: float,
) -> None:
    monkeypatch.setitem(bench.METHODS, "redi-torch", _altered(gradient, logps))
    code, (record,) = run(tmp_path, "redi-torch", "redi-triton")
    assert code == 1
    rows = {row["name"]: row for row in record["rows"]}
    wrong = rows.pop("redi-torch")
    assert ("logp_error" in wrong["rejected"]) == (logps > 0)
    assert ("dhidden_error" in wrong["rejected"]) == (gradient > 1)
    assert "dweight_error" not in wrong["rejected"]
    assert wrong["logp_bias"] == pytest.approx(logps, abs=1e-5)
    assert all(row["rejected"] is None for row in rows.values())
    printed = capsys.readouterr()
    assert f"redi-torch: its time is meaningless, it is wrong: {wrong['rejected']}" in printed.err
    assert "redi-torch REJECTED" in printed.out
    assert "redi-triton REJECTED" not in printed.out


@pytest.mark.parametrize(("name", "status"), [("torch-plain", 0), ("redi-torch", 1)])
@pytest.mark.usefixtures("no_memory_processes")
def test_one_that_fails_is_reported_and_stops_no_other_but_ours_fails_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    status: int,
) -> None:
    def build(operands: Operands) -> Contender:
        calls = iter(range(2))

        def step() -> Result | None:
            if next(calls, None) is None:  # in the second turn
                raise RuntimeError("out of\nmemory")
            return None

        return Contender(step)

    monkeypatch.setitem(bench.METHODS, name, LossMethod("", build, ours=bench.METHODS[name].ours))
    code, (record,) = run(tmp_path, name, "eager")
    assert code == status
    assert [row["name"] for row in record["rows"]] == ["floor", "eager"]
    assert record["failed"] == {name: "RuntimeError: out of memory"}
    assert f"failed: {name}: RuntimeError" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets peaks")
def test_the_memory_of_a_step_is_its_own_peak_whatever_was_held_before() -> None:
    before = torch.ones(2**27)  # 512 MiB
    del before

    def step() -> None:
        torch.ones(2**26)  # 256 MiB, freed

    assert measure.peak_resident(step) == pytest.approx(256, abs=8)


def test_a_record_can_be_drawn_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for file in (ROOT / "bench/results").glob("loss_*.json"):
        copy = tmp_path / file.name
        copy.write_bytes(file.read_bytes())
        assert bench.main(["--plot", str(copy)]) == 0
        assert copy.with_suffix(".png").stat().st_size > 10_000


def _summary(operands: Operands) -> dict[str, Tensor]:
    with torch.no_grad():
        logits = operands.hidden.float() @ operands.weight.float().T
    return inputs.logit_summary(logits, operands.targets)


def _looks_trained(summary: dict[str, Tensor], vocab: int) -> bool:
    """Each quantile from 0.05 to 0.95 near what was recorded of SmolLM2 on real traces.

    nll and entropy within a factor of 1.5 (they span three orders of magnitude), top_p within
    0.05, the logits' mean within 1 and their deviation, which is capped, within 0.2.
    """
    recorded = {key: torch.tensor(value) for key, value in inputs.recorded_quantiles().items()}
    levels = recorded.pop("levels")
    recorded["logit_std"].clamp_(max=math.log(vocab) ** 0.5)
    inner = (levels >= 0.05) & (levels <= 0.95)
    found = {key: torch.quantile(values, levels)[inner] for key, values in summary.items()}
    gaps = {key: (found[key] - recorded[key][inner]).abs().max() for key in found}
    ratios = {key: (found[key] / recorded[key][inner]).log().abs().max() for key in found}
    return bool(
        max(ratios["nll"], ratios["entropy"]) < math.log(1.5)
        and gaps["top_p"] < 0.05
        and gaps["logit_mean"] < 1.0
        and gaps["logit_std"] < 0.2
    )


@pytest.mark.parametrize(
    ("vocab", "hidden", "dtype"),
    [(4096, 256, "float32"), (8192, 300, "bfloat16"), (12007, 512, "float32")],
)
def test_trained_inputs_have_the_logits_of_a_trained_model_at_any_size(
    vocab: int, hidden: int, dtype: str
) -> None:
    sizes = LossSizes(2048, vocab, hidden, 4, dtype, "cpu", 1, inputs="trained")
    assert _looks_trained(_summary(make_operands(sizes)), vocab)


def test_random_inputs_do_not_pass_for_trained_ones() -> None:
    sizes = LossSizes(512, 4096, 256, 4, "float32", "cpu", 1, inputs="random")
    assert not _looks_trained(_summary(make_operands(sizes)), sizes.vocab)


def test_the_same_sizes_give_the_same_operands() -> None:
    sizes = LossSizes(64, 512, 128, 4, "bfloat16", "cpu", 1, inputs="trained")
    for first, second in zip(make_operands(sizes), make_operands(sizes), strict=True):
        assert torch.equal(first, second)


def test_the_statistics_split_each_tokens_probability_into_target_competitors_and_bulk() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(700, 12, generator=generator)
    weight = torch.randn(90, 12, generator=generator)
    targets = torch.randint(90, (700,), generator=generator)
    record = hidden_statistics.describe(hidden, weight, targets, sample=300)
    mean, deviation, log_bulk, target, *competitors = torch.tensor(record["sample"]).T
    probs = [log_bulk.exp(), target.exp(), *(value.exp() for value in competitors)]
    assert torch.stack(probs).sum(0) == pytest.approx(torch.ones(300), abs=2e-3)
    assert len(competitors) == inputs.COMPETITORS
    strongest = torch.stack(competitors)
    assert (strongest[:-1] >= strongest[1:]).all()
    assert (deviation > 0).all()
    assert mean.abs().max() < 12
    nll = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    levels = torch.tensor(record["quantile_levels"])
    expected = torch.quantile(nll, levels).tolist()
    assert record["quantiles"]["nll"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_gpu_sh_goes_on_after_a_failure_leaves_json_and_fails(tmp_path: Path) -> None:
    variables = {
        "PYTHON": sys.executable, "DEVICE": "cpu", "DTYPE": "float32", "TOKENS": "64",
        "VOCAB": "512", "HIDDEN": "8 64", "INPUTS": "random", "REPEATS": "1",
        "CONTENDERS": "floor",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), "results"],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "D 8, random inputs, ours: FAILED" in done.stderr  # too small to be measured
    assert "D 64, random inputs, ours: FAILED" not in done.stderr
    files = sorted((tmp_path / "results").glob("*.json"))
    assert ["_ours_" in file.name for file in files] == [True, False]
    for file in files:
        assert json.loads(file.read_text())["sizes"]["hidden"] == 64
        assert file.name in done.stdout


@pytest.mark.slow
def test_ligers_triton_kernels_compute_redi_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    names = ["liger-1-by-sequence", "liger-16-by-token"]
    subprocess.run(
        [
            *(sys.executable, "-P", "-m", "redi.bench.loss", *TINY),
            *("--contenders", *names, "--out", str(tmp_path)),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=300,
        check=True,
    )
    (file,) = tmp_path.glob("*.json")
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    for name in names:
        assert rows[name]["dhidden_error"] < 2e-5
        assert rows[name]["dweight_error"] < 2e-5
