"""`redi doctor`: versions, devices, the backends that a run uses, and a test of the loss."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from redi.engine.config.sections import DataConfig
from redi.engine.console import print_table
from redi.engine.model.attention import choose_attention
from redi.engine.model.liger import liger_problem
from redi.engine.model.sharding import compute_dtype
from redi.kernels import redi_loss, reference
from redi.kernels.backends import choose_backend
from redi.kernels.reference import RediLoss

PACKAGES = (
    "redi-engine",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "triton",
    "liger-kernel",
    "flash-attn",
    "torchao",
    "bitsandbytes",
    "math-verify",
    "vllm",
    "tensorboard",
    "wandb",
)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-3}
"""Relative Frobenius error of the gradients against float64 that the self-test accepts."""
SHAPE = {"cpu": (1024, 8192, 256), "cuda": (2048, 32_768, 1024)}
"""Tokens, vocabulary and hidden size of the self-test."""

Row = tuple[str, str]  # of a table
Loss = Callable[..., RediLoss]


def versions() -> list[Row]:
    """Versions of Python, the platform and the relevant packages, or "not installed"."""
    rows = [("python", platform.python_version()), ("machine", platform.platform())]
    for name in PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def devices() -> list[Row]:
    """CPU, GPUs with free memory, and the token cache's directory with free disk space."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [("cpu", f"{cores} cores, torch uses {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"sm_{card.major}{card.minor}"
        rows.append(
            (
                f"cuda:{index}",
                f"{card.name}, {capability}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free",
            )
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no GPU is visible" if built else "this torch is built for CPUs"
        rows.append(("cuda", f"none: {reason}"))
    cache = DataConfig().cache_dir
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    return [*rows, ("token cache", f"{cache}, {free_gib:.0f} GiB free")]


def choices(device: torch.device) -> list[Row]:
    """What "auto" selects in a run on this machine, with the reason."""
    dtype = compute_dtype("auto", device)
    attention, why = choose_attention("auto", device, dtype)
    problem = liger_problem(device)
    distributed = "nccl" if device.type == "cuda" else "gloo"
    rows = [
        ("compute dtype", str(dtype).removeprefix("torch.")),
        ("attention", f"{attention}: {why}"),
        ("loss backend", choose_backend("auto", device)),
        (
            "liger-kernel layers",
            "off: " + problem if problem else "on, if liger-kernel supports the model",
        ),
        ("collectives", distributed),
        (
            "torchrun",
            shutil.which("torchrun") or "python -m torch.distributed.run",
        ),
    ]
    optional = {"vllm": "redi evaluate", "tensorboard": "run.trackers", "wandb": "run.trackers"}
    for name, use in optional.items():
        absent = find_spec(name) is None
        rows.append((f"{name}, for {use}", _pip(name) if absent else "available"))
    return rows


def _pip(extra: str) -> str:
    return f"not installed: pip install 'redi-engine[{extra}]'"


def self_test(device: torch.device) -> tuple[list[Row], bool]:
    """Run forward and backward of the loss; measure errors against float64 and speed.

    Returns:
        Rows of a table, and whether the errors are within TOLERANCE.
    """
    dtype = compute_dtype("auto", device)
    num_tokens, vocabulary, width = SHAPE[device.type]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden = normal(num_tokens, width).to(dtype)
    weight = (3 * normal(vocabulary, width) / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator, device=device)
    boundaries = torch.tensor([0, num_tokens // 3, num_tokens], device=device)
    signs = torch.tensor([1, -1], device=device)

    def gradients(op: Loss, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        operands = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        out = op(*operands, targets, boundaries, signs, alpha=0.8, num_pairs=1)
        return torch.autograd.grad(out.loss, operands)

    seconds = []
    for _ in range(3):
        _wait(device)
        began = time.perf_counter()
        found = gradients(redi_loss, dtype)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    exact = gradients(reference.redi_loss, torch.float64)
    errors = [
        float((one.double() - right).norm() / right.norm())
        for one, right in zip(found, exact, strict=True)
    ]
    flops = 6.0 * num_tokens * vocabulary * width
    good = all(error <= TOLERANCE[dtype] for error in errors)
    limit = f"limit {TOLERANCE[dtype]:g}"
    rows = [
        ("result", "correct" if good else "WRONG: do not train here; please report this table"),
        ("error of the hidden gradient", f"{errors[0]:.1e} ({limit})"),
        ("error of the lm_head gradient", f"{errors[1]:.1e} ({limit})"),
        (
            "forward and backward",
            f"{1e3 * min(seconds):.1f} ms for {num_tokens} tokens, vocabulary {vocabulary}, hidden "
            f"{width}: {flops / min(seconds) / 1e12:.2g} TFLOP/s",
        ),
    ]
    return rows, good


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def examine() -> bool:
    """Print all tables; returns whether the self-test passed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_table("versions", ("", ""), versions(), sys.stdout)
    print_table("machine", ("", ""), devices(), sys.stdout)
    print_table("what a run here uses", ("", ""), choices(device), sys.stdout)
    rows, good = self_test(device)
    print_table("self-test of the loss", ("", ""), rows, sys.stdout)
    return good
