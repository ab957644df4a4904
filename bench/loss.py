"""Time, memory and error of one forward and backward of the REDI loss: `python -m redi.bench.loss`.

All contenders compute the same result on the same operands, turn by turn in one run: the loss of a
pack of positive and negative traces, dhidden and dweight. `floor` is the three matrix products
alone, with operands and results allocated beforehand; no contender that computes all three in full
can be faster. `redi-filter` does not compute them in full; see its errors. Errors are against
float64. Prints a table and writes JSON and a picture. If an error of this project's op is out of
bounds, the record has the reason in its row (`rejected`) and the exit status is 1: the time of a
wrong result is meaningless. `--loss divergence` measures a divergence to a teacher instead, see
`divergence.py`.

A contender that cannot be measured (package absent, peer fails) is listed with the reason, and the
others run; a failure of this project's op makes the exit status 1. `bench/gpu.sh` runs this at full
size on a GPU. `--plot FILE.json` draws a record again.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redi.bench import baselines, divergence, peers
from redi.bench.baselines import Absent, Contender, Exact, LossMethod, Result
from redi.bench.inputs import LossSizes, Operands, make_operands, sizes_of_states
from redi.bench.measure import peak_cuda, peak_resident, problem_line, time_in_turns
from redi.bench.report import draw, environment, print_table, write_record
from redi.kernels import reference

METHODS: dict[str, LossMethod] = baselines.METHODS | peers.METHODS
DIVERGENCES = divergence.METHODS

# Relative Frobenius errors of the gradients, and the largest absolute error of a log-prob, above
# which a contender of this project is wrong.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
LOGP_TOLERANCE = 2e-4
# For a gradient that is approximate by design.
APPROXIMATE_TOLERANCE = 0.1


@dataclass(frozen=True)
class TimedRow:
    """One contender's line of the report."""

    name: str
    note: str
    seconds: list[float]
    median_s: float
    spread_s: tuple[float, float]
    """Fastest and slowest."""
    times_floor: float
    """Median over the turns of the time divided by the floor's in the same turn."""
    peak_extra_mib: float | None
    """In addition to the operands; None for the floor, whose memory is allocated beforehand."""
    loss_error: float | None
    """Relative to float64; None, like the other errors, if it computes another loss or none."""
    logp_error: float | None
    """Largest absolute error of a token's log-prob; None also if it returns no log-probs."""
    logp_bias: float | None
    """Mean signed error of the tokens' log-probs: a product that truncates shows here first."""
    dhidden_error: float | None
    """Frobenius norm of the error relative to that of the gradient."""
    dweight_error: float | None
    rejected: str | None
    """Why the result is wrong, and its time therefore meaningless; None if it is right."""


def float64_result(operands: Operands, slice_tokens: int = 512) -> Exact:
    """The oracle: `reference` in float64, summed over slices of tokens."""
    hidden = operands.hidden.detach().double()
    weight = operands.weight.detach().double().requires_grad_()
    targets, token_weights = operands.targets, operands.token_weights
    loss, dhidden, dweight = hidden.new_zeros(()), [], torch.zeros_like(weight)
    token_logps = []
    for start in range(0, len(hidden), slice_tokens):
        part = slice(start, start + slice_tokens)
        x = hidden[part].requires_grad_()
        term, logps = reference.signed_cross_entropy(x, weight, targets[part], token_weights[part])
        dx, dw = torch.autograd.grad(term, (x, weight))
        loss += term.detach()
        token_logps.append(logps)
        dhidden.append(dx)
        dweight += dw
    result = Result(loss, torch.cat(dhidden), dweight.detach())
    return Exact(result, torch.cat(token_logps))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of `exact`."""
    return float((value.double() - exact).norm() / exact.norm())


def errors_of(contender: Contender, exact: Exact) -> dict[str, float | None]:
    """The errors of a row."""
    keys = ("loss_error", "dhidden_error", "dweight_error")
    errors: dict[str, float | None] = dict.fromkeys(("logp_error", "logp_bias", *keys))
    result = None if contender.plain else contender.step()
    if result is not None:
        parts = zip(result, exact.result, strict=True)
        errors |= zip(keys, (relative_error(*part) for part in parts), strict=True)
    if contender.token_logps is not None:
        with torch.no_grad():
            gap = contender.token_logps().double() - exact.token_logps
        errors |= {"logp_error": float(gap.abs().max()), "logp_bias": float(gap.mean())}
    return errors


def methods_of(loss: str) -> dict[str, LossMethod]:
    """The contenders for a loss, "redi" or "divergence"."""
    return DIVERGENCES if loss == "divergence" else METHODS


def _method(name: str) -> LossMethod:
    """A contender for either loss: they have no name in common but the floor's."""
    return METHODS[name] if name in METHODS else DIVERGENCES[name]


def _peak_resident(name: str, sizes: LossSizes) -> float:
    """Peak MiB of one step; runs in a separate process."""
    torch.set_num_threads(sizes.threads)
    # Run it once, very small, so that loading code and libraries is not counted.
    small = replace(sizes, tokens=64, vocab=128, hidden=16, inputs="random")
    method = _method(name)
    method.build(make_operands(small)).step()
    step = method.build(make_operands(sizes)).step
    return peak_resident(step)


def peak_extra_mib(name: str, contender: Contender, sizes: LossSizes) -> float:
    """Peak MiB of one step beyond its operands; see `measure.py`."""
    if sizes.device == "cuda":
        return peak_cuda(contender.step)
    context = get_context("forkserver")
    context.set_forkserver_preload(["redi.bench.peers"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_resident, name, sizes).result()


@dataclass(frozen=True)
class Measured:
    """The results of a run."""

    rows: list[TimedRow]
    absent: dict[str, str]
    """Why a contender is not available here, by name."""
    failed: dict[str, str]
    """The exception of a contender that is available, by name."""


def measure(sizes: LossSizes, names: list[str], repeats: int, limit_s: float) -> Measured:
    """Build, time and check each contender.

    Args:
        sizes: the operands.
        names: keys of `methods_of`, "floor" among them.
        repeats, limit_s: see `measure.time_in_turns`.
    """
    operands, methods = make_operands(sizes), methods_of(sizes.loss)
    built, absent, failed = _build(names, methods, operands)
    steps = {name: contender.step for name, contender in built.items()}
    seconds, problems = time_in_turns(steps, sizes.device, repeats, limit_s)
    failed |= problems
    if "floor" not in seconds:
        raise SystemExit(f"the floor could not be measured: {failed['floor']}")
    exact_of = divergence.float64_result if sizes.loss == "divergence" else float64_result
    exact = exact_of(operands)
    rows = []
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["floor"], strict=True)]
        try:
            memory = None if name == "floor" else peak_extra_mib(name, built[name], sizes)
            errors = errors_of(built[name], exact)
        except Exception as error:
            failed[name] = problem_line(error)
            continue
        rows.append(
            TimedRow(
                name=name,
                note=methods[name].note,
                seconds=taken,
                median_s=statistics.median(taken),
                spread_s=(min(taken), max(taken)),
                times_floor=statistics.median(ratios),
                peak_extra_mib=memory,
                rejected=why_rejected(name, errors, sizes.dtype),
                **errors,
            )
        )
    return Measured(rows, absent, failed)


def _build(
    names: list[str], methods: dict[str, LossMethod], operands: Operands
) -> tuple[dict[str, Contender], dict[str, str], dict[str, str]]:
    """(contenders, why absent, why failed), each by name."""
    built: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            built[name] = methods[name].build(operands)
        except (Absent, ImportError) as reason:
            absent[name] = str(reason)
        except Exception as error:  # a peer may raise anything at import
            failed[name] = problem_line(error)
    return built, absent, failed


def why_rejected(name: str, errors: dict[str, float | None], dtype: str) -> str | None:
    """Which errors of a method of this project are out of bounds; None if none is.

    Args:
        name: a key of METHODS or DIVERGENCES.
        errors: see `errors_of`; one that is absent or NaN is out of bounds.
        dtype: of the operands, a name of `TOLERANCE` such as "bfloat16".
    """
    method = _method(name)
    if not method.ours:
        return None
    gradient = TOLERANCE[getattr(torch, dtype)]
    if method.approximate:
        gradient = APPROXIMATE_TOLERANCE
    bounds = {"logp_error": LOGP_TOLERANCE, "dhidden_error": gradient, "dweight_error": gradient}
    wrong = [
        f"{key} {errors[key]} > {bound}"
        for key, bound in bounds.items()
        if (error := errors[key]) is None or not error <= bound
    ]
    return ", ".join(wrong) or None


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.loss", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=8, help="even: pairs of traces")
    parser.add_argument("--inputs", choices=["random", "trained"], default="random")
    parser.add_argument(
        "--states",
        type=Path,
        metavar="FILE",
        help="states written by `redi.bench.filter`, instead of inputs and sizes",
    )
    parser.add_argument("--dtype", choices=[str(d)[6:] for d in TOLERANCE], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="no repeat begins after this time"
    )
    parser.add_argument(
        "--loss",
        choices=["redi", "divergence"],
        default="redi",
        help="divergence: to a teacher, of `redi.bench.divergence`",
    )
    names = list(METHODS | DIVERGENCES)
    parser.add_argument("--contenders", nargs="+", choices=names, help="all of the loss if absent")
    parser.add_argument("--without", nargs="+", choices=names, default=[])
    parser.add_argument("--label", default="", help="suffix of the record's name")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="only draw this record")
    options = parser.parse_args(arguments)
    known = methods_of(options.loss)
    options.contenders = options.contenders or [*known]
    if strangers := set(options.contenders) - set(known):
        parser.error(f"{', '.join(sorted(strangers))} computes no {options.loss}: see --loss")
    if options.sequences < 2 or options.sequences % 2 or options.repeats < 1:
        parser.error("--sequences must be even and at least 2, --repeats at least 1")
    if options.tokens < 2 * options.sequences or options.vocab < 16 or options.hidden < 16:
        parser.error("--tokens must be at least two a sequence, --vocab and --hidden at least 16")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is not available: torch finds no GPU")
    return options


def plot(file: Path) -> int:
    """Draw a record into a picture in the same folder."""
    picture = file.with_suffix(".png")
    if draw(json.loads(file.read_text(encoding="utf-8")), picture):
        print(f"drawn to {picture}")
        return 0
    print("matplotlib is not installed: no picture", file=sys.stderr)
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse_arguments(arguments)
    if options.plot:
        return plot(options.plot)
    sizes = LossSizes(
        tokens=options.tokens,
        vocab=options.vocab,
        hidden=options.hidden,
        sequences=options.sequences,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        inputs=options.inputs,
        loss=options.loss,
    )
    if options.states:
        found = sizes_of_states(options.states, sizes.dtype, sizes.device, sizes.threads)
        sizes = replace(found, loss=options.loss)
    torch.set_num_threads(sizes.threads)
    left_out = {"floor", *options.without}
    names = ["floor", *(name for name in options.contenders if name not in left_out)]
    measured = measure(sizes, names, options.repeats, options.seconds)
    record: dict[str, Any] = {
        "benchmark": "loss" if sizes.loss == "redi" else sizes.loss,
        "date": date.today().isoformat(),
        "label": options.label,
        **environment(sizes.device),
        "sizes": asdict(sizes),
        "memory": "allocator peak" if sizes.device == "cuda" else "resident set, separate process",
        **asdict(measured),
    }
    print_table(record)
    path = write_record(record, options.out)
    print(f"written to {path}")
    plot(path)
    rejected = {row.name: row.rejected for row in measured.rows if row.rejected}
    for name, reason in rejected.items():
        print(f"{name}: its time is meaningless, it is wrong: {reason}", file=sys.stderr)
    return int(bool(rejected) or any(_method(name).ours for name in measured.failed))


if __name__ == "__main__":
    sys.exit(main())
