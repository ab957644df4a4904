"""Time, memory and error of one forward and backward of the REDI loss: `python -m redi.bench.loss`.

All contenders compute the same thing on the same operands, turn by turn in one run: the loss of a
packed row of positive and negative traces, dhidden and dweight. `floor` is the three matrix
products alone, on operands and into memory made beforehand; nothing that computes all three in
full can be faster. Errors are against float64. Writes JSON and prints a short table; exits with
status 1, and writes nothing, if this project's own error is out of bounds: a wrong result has no
speed.

Memory is what one forward and backward needs at its peak beyond its operands. On CUDA the
allocator tells. On a CPU it is the high-water mark of the resident set of a process that does
nothing else, less its resident set before; where a page is touched counts, not where it is
reserved, and buffers of the matrix library count too.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from redi.kernels import reference
from redi.kernels.losses import redi_loss

ALPHA = 0.8
# Rows of a chunk for torch's chunked op, about what this project takes itself. Its own choice for
# these shapes is 4 rows for a sequence of 512 tokens, and 14 times slower.
TORCH_CHUNK_TOKENS = {"cpu": 256, "cuda": 8192}
# Relative Frobenius errors above which a contender of this project is wrong.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    tokens: int
    vocab: int
    hidden: int
    sequences: int
    """Even; every second one is a negative."""
    dtype: str
    device: str
    threads: int


class Operands(NamedTuple):
    """Inputs of the loss; `hidden` [T, D] and `weight` [V, D] require gradients."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    signs: Tensor

    @property
    def token_weights(self) -> Tensor:
        """[T] float64: +1 / (pairs |y|) on a positive's tokens, -alpha / (pairs |y|) on others."""
        lengths = self.cu_seqlens.diff()
        weights = torch.where(self.signs > 0, 1.0, -ALPHA).double() / (lengths * self.pairs)
        return weights.repeat_interleave(lengths)

    @property
    def pairs(self) -> int:
        """Pairs of one positive and one negative."""
        return len(self.signs) // 2


class Result(NamedTuple):
    """What a contender returns."""

    loss: Tensor
    dhidden: Tensor
    dweight: Tensor


Step = Callable[[], Result | None]


@dataclass(frozen=True)
class Row:
    """One contender's line of the report."""

    name: str
    note: str
    seconds: list[float]
    median_s: float
    spread_s: tuple[float, float]
    """Fastest and slowest."""
    times_floor: float
    """Median over the turns of the time divided by the floor's in the same turn."""
    peak_extra_mib: float
    loss_error: float | None
    """Relative to float64; None for the floor, which computes no loss."""
    dhidden_error: float | None
    dweight_error: float | None


def make_operands(sizes: Sizes) -> Operands:
    """Random operands: logits of standard deviation about 2, no token masked."""
    generator = torch.Generator(sizes.device).manual_seed(0)
    dtype = getattr(torch, sizes.dtype)

    def normal(rows: int, deviation: float) -> Tensor:
        values = torch.empty(rows, sizes.hidden, dtype=dtype, device=sizes.device)
        return values.normal_(0.0, deviation, generator=generator).requires_grad_()

    bounds = [round(i * sizes.tokens / sizes.sequences) for i in range(sizes.sequences + 1)]
    return Operands(
        hidden=normal(sizes.tokens, 1.0),
        weight=normal(sizes.vocab, 2.0 / sizes.hidden**0.5),
        targets=torch.randint(
            sizes.vocab, (sizes.tokens,), device=sizes.device, generator=generator
        ),
        cu_seqlens=torch.tensor(bounds, device=sizes.device),
        signs=torch.tensor([1, -1] * (sizes.sequences // 2), device=sizes.device),
    )


def _gradients(loss: Tensor, operands: Operands) -> Result:
    return Result(loss.detach(), *torch.autograd.grad(loss, (operands.hidden, operands.weight)))


def floor(operands: Operands) -> Step:
    """Z = X W^T, dX = dZ W, dW = dZ^T X, into memory at hand, on a real dZ."""
    hidden, weight = operands.hidden.detach(), operands.weight.detach()
    logits = hidden @ weight.T
    dlogits = torch.softmax(logits, -1)
    dlogits.scatter_add_(1, operands.targets[:, None], torch.full_like(dlogits[:, :1], -1.0)).mul_(
        operands.token_weights.to(dlogits.dtype)[:, None]
    )
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(dlogits, weight, out=dhidden)
        torch.mm(dlogits.T, hidden, out=dweight)

    return step


def redi(operands: Operands) -> Step:
    """This project's op, the backend it chooses itself."""

    def step() -> Result:
        loss = redi_loss(*operands, alpha=ALPHA, num_pairs=operands.pairs).loss
        return _gradients(loss, operands)

    return step


def eager(operands: Operands) -> Step:
    """Whole logits, log-softmax in float32, autograd."""
    token_weights = operands.token_weights.float()

    def step() -> Result:
        logits = F.linear(operands.hidden, operands.weight)
        logps = F.log_softmax(logits.to(token_weights.dtype), -1)
        logps = logps.gather(1, operands.targets[:, None])[:, 0]
        return _gradients(-(token_weights * logps).sum(), operands)

    return step


def torch_by_sequence(operands: Operands) -> Step:
    """One chunked mean for each sequence (3 products): the fastest way to signs in this peer."""
    chunk = TORCH_CHUNK_TOKENS[operands.hidden.device.type]
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    lengths = operands.cu_seqlens.diff().tolist()
    scales = [(1.0 if sign > 0 else -ALPHA) / operands.pairs for sign in operands.signs.tolist()]

    def step() -> Result:
        parts = zip(
            operands.hidden.split(lengths), operands.targets.split(lengths), scales, strict=True
        )
        terms = [
            scale * F.linear_cross_entropy(hidden, operands.weight, targets, options=options)
            for hidden, targets, scale in parts
        ]
        return _gradients(torch.stack(terms).sum(), operands)

    return step


def torch_by_token(operands: Operands) -> Step:
    """One chunked call without reduction, times the token weights (4 products)."""
    chunk = TORCH_CHUNK_TOKENS[operands.hidden.device.type]
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    token_weights = operands.token_weights.float()

    def step() -> Result:
        losses = F.linear_cross_entropy(
            operands.hidden, operands.weight, operands.targets, reduction="none", options=options
        )
        return _gradients((token_weights * losses).sum(), operands)

    return step


CONTENDERS: dict[str, Callable[[Operands], Step]] = {"floor": floor, "redi": redi, "eager": eager}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    CONTENDERS |= {"torch by sequence": torch_by_sequence, "torch by token": torch_by_token}


def float64_result(operands: Operands, slice_tokens: int = 512) -> Result:
    """The oracle: `reference` in float64, summed over slices of tokens."""
    hidden = operands.hidden.detach().double()
    weight = operands.weight.detach().double().requires_grad_()
    targets, token_weights = operands.targets, operands.token_weights
    loss, dhidden, dweight = hidden.new_zeros(()), [], torch.zeros_like(weight)
    for start in range(0, len(hidden), slice_tokens):
        part = slice(start, start + slice_tokens)
        x = hidden[part].requires_grad_()
        term, _ = reference.signed_cross_entropy(x, weight, targets[part], token_weights[part])
        dx, dw = torch.autograd.grad(term, (x, weight))
        loss += term.detach()
        dhidden.append(dx)
        dweight += dw
    return Result(loss, torch.cat(dhidden), dweight)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of `exact`."""
    return float((value.double() - exact).norm() / exact.norm())


def measure_times(steps: dict[str, Step], sizes: Sizes, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each contender, in turns, so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm up
    for _ in range(repeats):
        for name, step in steps.items():
            if sizes.device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                step()
                end.record()
                torch.cuda.synchronize()
                seconds[name].append(begin.elapsed_time(end) / 1e3)
            else:
                begin_s = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - begin_s)
    return seconds


def measure_memory(name: str, sizes: Sizes) -> float:
    """Peak MiB of one step of a contender beyond its operands; see the top of this file."""
    if sizes.device == "cuda":
        return _peak_cuda(name, sizes)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_resident, name, sizes).result()


def _peak_cuda(name: str, sizes: Sizes) -> float:
    step = CONTENDERS[name](make_operands(sizes))
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_resident(name: str, sizes: Sizes) -> float:
    torch.set_num_threads(sizes.threads)
    # What loading code and libraries takes is not the contender's: run it once, very small.
    small = Sizes(64, 128, 16, sizes.sequences, sizes.dtype, sizes.device, sizes.threads)
    CONTENDERS[name](make_operands(small))()
    step = CONTENDERS[name](make_operands(sizes))
    before = _resident_bytes()
    step()
    return max(0.0, _peak_resident_bytes() - before) / 2**20


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():  # macOS: the peak so far, which loading may have made
        return _peak_resident_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(sizes: Sizes, repeats: int, names: list[str]) -> list[Row]:
    """One row for each contender; the first must be the floor."""
    memory = {name: measure_memory(name, sizes) for name in names}
    operands = make_operands(sizes)
    steps = {name: CONTENDERS[name](operands) for name in names}
    seconds = measure_times(steps, sizes, repeats)
    exact = float64_result(operands)
    rows = []
    for name in names:
        result = steps[name]()
        ratios = [a / b for a, b in zip(seconds[name], seconds["floor"], strict=True)]
        errors = (
            [None] * 3
            if result is None
            else [relative_error(value, true) for value, true in zip(result, exact, strict=True)]
        )
        rows.append(
            Row(
                name=name,
                note=(CONTENDERS[name].__doc__ or "").strip(),
                seconds=seconds[name],
                median_s=statistics.median(seconds[name]),
                spread_s=(min(seconds[name]), max(seconds[name])),
                times_floor=statistics.median(ratios),
                peak_extra_mib=memory[name],
                loss_error=errors[0],
                dhidden_error=errors[1],
                dweight_error=errors[2],
            )
        )
    return rows


def is_right(row: Row, sizes: Sizes) -> bool:
    """Whether the gradients are as exact as this project promises for the dtype."""
    tolerance = TOLERANCE[getattr(torch, sizes.dtype)]
    return all(e is not None and e <= tolerance for e in (row.dhidden_error, row.dweight_error))


def environment(device: str) -> dict[str, Any]:
    """Machine, versions and commit, for the record."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def output_of(*command: str) -> str | None:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    return {
        "hardware": hardware_name(device),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": output_of(*git, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(output_of(*git, "status", "--porcelain")),
    }


def hardware_name(device: str) -> str:
    """The card's name, or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def table(rows: list[Row], sizes: Sizes) -> str:
    """The rows as text."""
    lines = [
        f"REDI loss, forward + backward: T {sizes.tokens}, V {sizes.vocab}, D {sizes.hidden}, "
        f"{sizes.dtype}, {hardware_name(sizes.device)}",
        f"{'':<18}{'median':>10}{'fastest .. slowest':>22}{'x floor':>9}{'peak extra':>13}"
        f"{'dX error':>11}{'dW error':>11}",
    ]
    for row in rows:
        spread = " .. ".join(f"{1e3 * seconds:.1f}" for seconds in row.spread_s)
        errors = [
            "" if error is None else f"{error:.1e}"
            for error in (row.dhidden_error, row.dweight_error)
        ]
        lines.append(
            f"{row.name:<18}{1e3 * row.median_s:>7.1f} ms{spread:>19} ms{row.times_floor:>9.3f}"
            f"{row.peak_extra_mib:>9.0f} MiB{errors[0]:>11}{errors[1]:>11}"
        )
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=8, help="even: pairs of traces")
    parser.add_argument("--dtype", choices=[str(d)[6:] for d in TOLERANCE], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=[*CONTENDERS])
    parser.add_argument("--out", type=Path, help="default: bench/results/loss_HARDWARE_DATE.json")
    options = parser.parse_args(arguments)
    if options.sequences < 2 or options.sequences % 2 or options.repeats < 1:
        parser.error("--sequences must be even and at least 2, --repeats at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse_arguments(arguments)
    sizes = Sizes(
        tokens=options.tokens,
        vocab=options.vocab,
        hidden=options.hidden,
        sequences=options.sequences,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
    )
    torch.set_num_threads(sizes.threads)
    names = ["floor", *(name for name in options.contenders if name != "floor")]
    rows = measure(sizes, options.repeats, names)
    print(table(rows, sizes))
    if wrong := [row.name for row in rows if row.name == "redi" and not is_right(row, sizes)]:
        print(f"{wrong[0]}: the error is out of bounds, nothing is recorded", file=sys.stderr)
        return 1
    today = date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", hardware_name(sizes.device).lower()).strip("-")
    out = options.out or Path("bench/results") / f"loss_{slug}_{today}.json"
    record = {
        "benchmark": "loss",
        "date": today,
        **environment(sizes.device),
        "sizes": asdict(sizes),
        "memory": "allocator peak" if sizes.device == "cuda" else "resident set, process apart",
        "rows": [asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
