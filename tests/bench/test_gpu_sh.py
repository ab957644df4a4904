"""`bench/gpu.sh` fits a short lease, its checks find what is wrong, and each leaves its record."""

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from redi.bench import baselines, check_attention, check_kernels, check_train
from redi.bench import loss as bench
from redi.bench.baselines import Contender, LossMethod
from redi.bench.inputs import Operands
from redi.bench.parts import OTHER, Parts, kind_of
from redi.engine.model import attention

ROOT = Path(__file__).parents[2]
KERNELS = ["--device", "cpu", "--tokens", "24", "--vocab", "160", "--hidden", "32", "--out"]


def gpu_sh(*arguments: str, seconds: float = 30, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def record(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("what", ["right", "speed", "tests"])
def test_the_parts_of_a_call_have_four_minutes_together(what: str, tmp_path: Path) -> None:
    done = gpu_sh(what, str(tmp_path), PYTHON="true")
    limits = [int(limit) for limit in re.findall(r"\(at most (\d+) s\)", done.stdout)]
    assert len(limits) == done.stdout.count("\n== ") + done.stdout.startswith("==") - len(limits)
    assert 0 < sum(limits) <= 237


@pytest.mark.parametrize("arguments", [[], ["wrong"]])
def test_another_word_prints_the_usage(arguments: list[str]) -> None:
    done = gpu_sh(*arguments)
    assert done.returncode == 2
    assert "bench/gpu.sh right [FOLDER]" in done.stderr


def test_every_backend_is_checked_against_float64(tmp_path: Path) -> None:
    backends = ["redi-torch", "redi-triton", "redi-triton-exp"]
    assert check_kernels.main([*KERNELS, str(tmp_path)]) == 0
    results = record(tmp_path, "check-kernels")["results"]
    assert [one["backend"] for one in results] == backends
    for one in results:
        assert one["rejected"] is None
        assert abs(one["logp_bias"]) < 1e-5
        assert 0 < one["dhidden_error"] < 4e-3
        groups = [group["mean_abs_logit"] for group in one["bias_by_logit"]]
        assert groups == sorted(groups)


def _biased(operands: Operands) -> Contender:
    """Log-probs too small by 1e-5 of the target's logit, as truncated sums would make them."""
    right = bench.METHODS["redi-torch"].build(operands)
    logits = (operands.hidden * operands.weight[operands.targets]).sum(1).detach().abs()
    assert right.token_logps is not None
    logps = right.token_logps() - 1e-5 * logits
    return replace(right, token_logps=lambda: logps)


def _stopped(operands: Operands) -> Contender:
    raise KeyboardInterrupt


def test_a_bias_is_found_and_a_run_that_is_stopped_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.METHODS, "redi-triton", LossMethod("", _biased, ours=True))
    monkeypatch.setitem(bench.METHODS, "redi-triton-exp", LossMethod("", _stopped, ours=True))
    with pytest.raises(KeyboardInterrupt):
        check_kernels.main([*KERNELS, str(tmp_path)])
    right, biased = record(tmp_path, "check-kernels")["results"]
    for group, other in zip(biased["bias_by_logit"], right["bias_by_logit"], strict=True):
        expected = other["bias"] - 1e-5 * group["mean_abs_logit"]
        assert group["bias"] == pytest.approx(expected, abs=2e-6)
    assert biased["logp_bias"] < -1e-5 < right["logp_bias"]


def test_a_wrong_or_failing_backend_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_right = bench.METHODS["redi-torch"].build

    def wrong(operands: Operands) -> Contender:
        logps = torch.zeros(len(operands.targets))
        return replace(build_right(operands), token_logps=lambda: logps)

    def failing(operands: Operands) -> Contender:
        def step() -> None:
            raise RuntimeError("an illegal\nmemory access")

        return Contender(step)

    def absent(operands: Operands) -> Contender:
        raise baselines.Absent("needs a GPU")

    methods = {"redi-torch": wrong, "redi-triton": failing, "redi-triton-exp": absent}
    for name, build in methods.items():
        monkeypatch.setitem(bench.METHODS, name, LossMethod("", build, ours=True))
    assert check_kernels.main([*KERNELS, str(tmp_path)]) == 1
    first, second, third = record(tmp_path, "check-kernels")["results"]
    assert re.match(r"logp_error [\d.]+ > 0.0002$", first["rejected"])
    assert second["failed"] == "RuntimeError: an illegal memory access"
    assert third["absent"] == "needs a GPU"
    alone = ["--backends", "redi-triton-exp"]
    assert check_kernels.main([*KERNELS, str(tmp_path), *alone]) == 0


# What `check_attention.py` compares, each for plain attention, with a window and with a soft cap.
ATTENTION_RESULTS = [
    name + feature
    for feature in ("", " with a window", " with a soft cap")
    for name in ("out", "dquery", "dkey", "dvalue")
]
ATTENTION = ["--device", "cpu", "--tokens", "40", "--timed_tokens", "32", "--out"]


def test_packed_attention_is_checked_and_timed(tmp_path: Path) -> None:
    assert check_attention.main([*ATTENTION, str(tmp_path)]) == 0
    (sdpa,) = record(tmp_path, "check-attention")["kinds"]
    assert sdpa["kind"] == "sdpa"
    assert sdpa["wrong"] == []
    assert set(sdpa["errors"]) == set(ATTENTION_RESULTS)
    assert [one["documents"] for one in sdpa["speeds"]] == [1, 8]
    assert all(one["seconds"] > 0 for one in sdpa["speeds"])


def test_attention_across_documents_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention._sdpa

    def across(*args: Any, cu_seq_lens_q: torch.Tensor, **others: Any) -> Any:
        return right(*args, cu_seq_lens_q=cu_seq_lens_q[[0, 1, -1]], **others)

    monkeypatch.setattr(attention, "_sdpa", across)
    assert check_attention.main([*ATTENTION, str(tmp_path)]) == 1
    (sdpa,) = record(tmp_path, "check-attention")["kinds"]
    assert sdpa["wrong"] == ATTENTION_RESULTS


TRAINING = ["--device", "cpu", "--hidden", "64", "--head_dim", "16", "--layers", "2", "--vocab"]
TRAINING += ["64", "--longest", "60", "--row_tokens", "512", "--out"]


def test_without_its_packages_the_check_of_training_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_train, "NEEDED", ("torch", "no_such_package"))
    assert check_train.main([*TRAINING, str(tmp_path)]) == 0
    assert record(tmp_path, "check-train")["skipped"] == "not installed: no_such_package"
    assert "skipped: not installed: no_such_package; see WHEELS" in capsys.readouterr().out


def test_runs_that_differ_or_stop_early_are_found() -> None:
    step = {"loss": 1.0, "positive_logp": -2.0, "negative_logp": -3.0}
    steps = [step] * check_train.STEPS
    assert check_train.compare(steps, steps, 1e-4) == []
    for key, value in step.items():
        for other in (1.001 * value, float("nan")):
            changed = [*steps[:-1], {**step, key: other}]
            (problem,) = check_train.compare(changed, steps, 1e-4)
            assert problem == f"step {check_train.STEPS} {key}: {other} and {value}"
    assert check_train.compare(steps[1:], steps, 1e-4) == ["5 and 6 steps, expected 6"]


@pytest.mark.slow
def test_the_real_training_is_counted_by_the_profiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_train.main([*TRAINING, str(tmp_path)]) == 0
    found = record(tmp_path, "check-train")
    assert found["problems"] == []
    assert found["ran"]["attention_calls"] == 2
    # two steps of 8 pairs in two layers
    assert sum(found["attention"].values()) == 2 * 16 * 2
    assert len(found["steps"]) == len(found["plain_steps"]) == check_train.STEPS
    assert found["steps"][0]["loss"] != found["steps"][-1]["loss"]

    # A trace in which the loss ran once more, and attention in one layer less, is not accepted.
    profiled = check_train.what_was_profiled

    def altered(run_dir: Path) -> dict[str, dict[str, int]]:
        counts = profiled(run_dir)
        counts["ops"]["redi::signed_cross_entropy"] += 1
        counts["ops"]["aten::_scaled_dot_product_flash_attention_for_cpu"] -= 32
        return counts

    monkeypatch.setattr(check_train, "what_was_profiled", altered)
    assert check_train.main([*TRAINING, str(tmp_path)]) == 1
    calls, losses = record(tmp_path, "check-train")["problems"]
    assert calls == "calls of attention in the trace: 32, expected 64"
    assert losses.startswith("calls of the loss in the trace: ")


ON_A_CPU = {"DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_right_runs_dry_on_a_cpu(tmp_path: Path) -> None:
    done = gpu_sh(
        "right",
        str(tmp_path),
        DEVICE="cpu",
        PYTHON=sys.executable,
        OMP_NUM_THREADS="1",
        seconds=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {one["backend"] for one in record(tmp_path, "check-kernels")["results"]} == {
        "redi-torch", "redi-triton", "redi-triton-exp",
    }  # fmt: skip
    assert record(tmp_path, "check-attention")["kinds"]
    assert record(tmp_path, "check-train")["problems"] == []
    (loss,) = tmp_path.glob("loss_*.json")
    rows = json.loads(loss.read_text())["rows"]
    assert [row["name"] for row in rows] == ["floor", "redi-triton-exp", "redi-triton"]


@pytest.mark.slow
def test_speed_runs_dry_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "carried_by_the_test")
    out = tmp_path / "out"
    few = {"CONTENDERS": "floor torch-by-token", "WHEELS": str(tmp_path / "wheels")}
    done = gpu_sh("speed", str(out), seconds=550, **ON_A_CPU, **few)
    assert done.returncode == 0, done.stderr[-3000:]
    step = record(out, "step")["results"]["packed"]
    assert set(step["parts"]) == {"forward", "loss, in forward", "backward", "update"}
    assert step["parts"]["loss, in forward"] < step["parts"]["forward"] < 1
    assert sum(step["device_time"].values()) == pytest.approx(1)
    assert step["model_tflops"] > 0
    (tuned,) = [one for one in record(out, "launches") if one["measured"]]
    assert (tuned["architecture"], tuned["hidden"]) == ("interpreter", 64)
    (peers,) = out.glob("loss_*_peers_*.json")
    assert "torch-by-token" in {row["name"] for row in json.loads(peers.read_text())["rows"]}


def wheel(folder: Path, name: str) -> None:
    """Write a wheel of one empty module."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        file.writestr(f"{info}/RECORD", "")


def test_carried_wheels_are_importable(tmp_path: Path) -> None:
    wheel(tmp_path, "carried_by_the_test")
    python = tmp_path / "python"  # pip as it is, any program an import of the module
    python.write_text(
        '#!/bin/sh\n[ "$3" = pip ] || set -- -c "import carried_by_the_test"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    done = gpu_sh("tests", str(tmp_path), PYTHON=str(python), WHEELS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    done = gpu_sh("tests", str(tmp_path), PYTHON=str(python))
    assert done.returncode == 1
    assert "No module named 'carried_by_the_test'" in done.stderr


def test_parts_and_kinds_of_a_step_are_told_apart() -> None:
    kinds = {
        "flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64>>": "attention",
        "softmax_kernel": "loss, but products",
        "exp_gemm_kernel": "loss, but products",
        "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT": "products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "products",
        "aten::mm": "products",
        "multi_tensor_apply_kernel<FusedAdam>": "optimizer and clipping",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
        "Memcpy DtoD (Device -> Device)": "copies",
        "vectorized_elementwise_kernel<4, silu>": OTHER,
    }
    assert {name: kind_of(name) for name in kinds} == kinds

    parts = Parts("cpu")

    def step() -> None:
        with parts.part("outer"):
            parts.begin("inner")
            time.sleep(0.02)
            parts.end("inner")
            time.sleep(0.02)
        time.sleep(0.02)

    step()  # off: nothing is kept
    shares = parts.of(step)
    assert set(shares) == {"outer", "inner"}
    assert 0.2 < shares["inner"] < shares["outer"] < 0.9
