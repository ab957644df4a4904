"""Finds the fastest launch of `triton-exp` on a GPU, and whether it is faster than `triton`.

    python -m redi.bench.tune --hidden 1536 3584

For each hidden size the loss with each candidate launch, and the loss of `backend="triton"`, are
timed turn by turn on the same operands. The fastest launch, and which backend won, become the
entry of `kernels/experimental/launches.json` for this architecture, hidden size and bfloat16: from
then on `backend="auto"` chooses accordingly. A candidate whose gradients differ from "triton"'s by
more than the rounding of both is left out: the time of a wrong result is meaningless.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor

from redi.bench.inputs import LossSizes, Operands, make_operands
from redi.bench.measure import time_in_turns
from redi.bench.report import hardware_name
from redi.kernels.backends import kernels_of
from redi.kernels.chunked import Outputs, TokenSchedule, cross_entropy_chunks
from redi.kernels.experimental import exp_gemm_triton
from redi.kernels.experimental.launches import (
    TABLE,
    Entry,
    Launch,
    architecture_of,
    entries_for,
    launch_for,
    write_entry,
)

# Relative difference of two bfloat16 gradients that are both right: each errs by up to 4e-3.
LARGEST_DIFFERENCE = 8e-3

Gradients = tuple[Tensor, Tensor]


def candidates(architecture: str) -> list[Launch]:
    """What is tried: tiles that fit registers and shared memory, and how many rows share a walk."""
    kept = entries_for(architecture)[0].launch  # what a filter adds is not tuned here
    if architecture == "interpreter":
        return [replace(kept, columns=columns) for columns in (64, 128)]
    tiles = [
        # rows, columns, warps, stages, stores, programs, flatten
        (128, 256, 8, 3, 1, 1, True),
        (128, 256, 8, 3, 1, 1, False),
        (128, 256, 8, 4, 2, 1, True),
        (256, 128, 8, 3, 1, 1, True),
        (128, 128, 4, 3, 2, 2, True),  # one program multiplies while the other's epilogue runs
        (128, 128, 4, 3, 2, 2, False),
    ]
    return [
        replace(
            kept,
            rows=rows,
            columns=columns,
            depth=64,
            warps=warps,
            stages=stages,
            stores=stores,
            programs=programs,
            l2_share=l2_share,
            flatten=flatten,
        )
        for (rows, columns, warps, stages, stores, programs, flatten), l2_share in product(
            tiles, (0.5, 0.125)
        )
    ]


def step_of(operands: Operands, launch: Launch | None) -> Callable[[], Gradients]:
    """Forward and backward, as `redi_loss` does them: dX and dW in float32. None: "triton"."""
    hidden, weight, targets = (tensor.detach() for tensor in operands[:3])
    token_weights = operands.token_weights.float()
    index = torch.arange(len(targets), device=targets.device)
    schedule = TokenSchedule(index, len(index), None)
    kernels = kernels_of("triton")
    if launch is not None:
        kernels = replace(kernels, exp_gemm=partial(exp_gemm_triton.exp_gemm, launch=launch))

    def step() -> Gradients:
        dhidden, dweight = (torch.empty_like(t, dtype=torch.float32) for t in (hidden, weight))
        logps = torch.empty(len(targets), device=targets.device)
        out = Outputs(logps=logps, dhidden=dhidden, dweight=dweight)
        cross_entropy_chunks(hidden, weight, targets, token_weights, out, schedule, kernels)
        return dhidden, dweight

    return step


def right_launches(operands: Operands, launches: list[Launch], limit_s: float) -> dict[Launch, str]:
    """The launches that run and agree with "triton"; prints why another is left out.

    Each is compiled, which takes seconds: none is begun after `limit_s`.
    """
    began = time.perf_counter()
    expected = step_of(operands, None)()
    found: dict[Launch, str] = {}
    for number, launch in enumerate(launches):
        if time.perf_counter() - began > limit_s:
            print(f"left out for lack of time: the last {len(launches) - number}")
            break
        try:
            got = step_of(operands, launch)()
        except Exception as error:  # more registers or shared memory than there are
            print(f"left out: {launch}: {' '.join(str(error).split())[:200]}")
            continue
        differences = [float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
        if all(one <= LARGEST_DIFFERENCE for one in differences):  # NaN is not
            found[launch] = f"exp {len(found)}"
        else:
            shown = ", ".join(f"{one:.1e}" for one in differences)
            print(f"left out: {launch}: its gradients differ by {shown}")
    return found


def tune(
    sizes: LossSizes, launches: list[Launch], repeats: int, limit_s: float, try_s: float = math.inf
) -> Entry:
    """Measure; the entry for the table.

    Args:
        sizes: of the operands.
        launches: candidates, the likeliest first.
        repeats, limit_s: see `measure.time_in_turns`.
        try_s: see `right_launches`.

    Raises:
        RuntimeError: nothing could be timed.
    """
    operands = make_operands(sizes)
    names = right_launches(operands, launches, try_s)
    steps = {"triton": step_of(operands, None)}
    for launch, name in names.items():
        steps[name] = step_of(operands, launch)
    seconds, problems = time_in_turns(steps, sizes.device, repeats, limit_s)
    if "triton" not in seconds:
        raise RuntimeError(f'backend="triton" could not be timed: {problems["triton"]}')
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    timed = {launch: medians[name] for launch, name in names.items() if name in medians}
    for launch, median in sorted(timed.items(), key=lambda item: item[1]):
        print(f"{1e3 * median:9.2f} ms  {launch}")
    print(f"{1e3 * medians['triton']:9.2f} ms  backend triton")
    best = min(timed, key=lambda launch: timed[launch]) if timed else launch_for(operands.weight)
    pays = best in timed and timed[best] < medians["triton"]
    device = operands.weight.device
    return Entry(
        architecture=architecture_of(device),
        dtype=sizes.dtype,
        hidden=sizes.hidden,
        backend="triton-exp" if pays else "triton",
        launch=best,
        measured={
            "hardware": hardware_name(sizes.device),
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "tokens": sizes.tokens,
            "vocab": sizes.vocab,
            "milliseconds": {
                "triton": 1e3 * medians["triton"],
                "triton-exp": 1e3 * timed[best] if best in timed else None,
            },
        },
    )


def main(arguments: list[str] | None = None) -> int:
    """Tune for each hidden size and write the entries."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.tune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[1536, 3584])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--inputs", choices=["random", "trained"], default="trained")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60.0, help="of turns, a hidden size")
    parser.add_argument(
        "--try_seconds", type=float, default=math.inf, help="no candidate is begun after, likewise"
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="file to write the entries to")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is not available: torch finds no GPU")
    if options.device == "cpu" and not triton.knobs.runtime.interpret:
        parser.error("--device cpu needs TRITON_INTERPRET=1 and checks only that it runs")
    architecture = architecture_of(torch.device(options.device))
    if not entries_for(architecture):
        parser.error(
            f"the kernels are not made for {architecture}: see kernels/experimental/launches.json"
        )
    for hidden in options.hidden:
        sizes = LossSizes(
            tokens=options.tokens,
            vocab=options.vocab,
            hidden=hidden,
            sequences=16,
            dtype="bfloat16",
            device=options.device,
            threads=torch.get_num_threads(),
            inputs=options.inputs,
        )
        limits = options.repeats, options.seconds, options.try_seconds
        entry = tune(sizes, candidates(architecture), *limits)
        write_entry(entry, options.table)
        print(f"D {hidden}: {entry.backend}, written to {options.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
