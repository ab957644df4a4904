"""Are the loss kernels right on this device? `python -m redi.bench.check_kernels`.

Each backend computes REDI's loss and gradients at each hidden size once; the errors against float64
have the bounds of `redi.bench.loss`. Log-probs also have their mean signed error, over all tokens
and by size of the target's logit: a product that truncates its sums errs in one direction, and more
the larger the logit. At the end: registers, spills and shared memory of the kernels that the GPU
has loaded, which is what ran and not what was built elsewhere.

The record is written anew after each result, so a killed run keeps those before. The exit status is
1 if a result is out of bounds, a kernel spills or a backend that is available fails.
"""

import argparse
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redi.bench.baselines import Absent, Exact
from redi.bench.inputs import LossSizes, Operands, make_operands
from redi.bench.loss import METHODS, TOLERANCE, errors_of, float64_result, why_rejected
from redi.bench.measure import problem_line
from redi.bench.report import LiveRecord

BACKENDS = ("redi-torch", "redi-triton", "redi-triton-exp")
KERNEL_MODULES = (
    "redi.kernels.segments_triton",
    "redi.kernels.softmax_triton",
    "redi.kernels.experimental.exp_gemm_triton",
    "redi.kernels.experimental.filter_triton",
)
BINS = 4


def bias_by_logit(gap: Tensor, logits: Tensor) -> list[dict[str, float]]:
    """Mean signed error of log-probs in `BINS` groups of equally many tokens.

    Args:
        gap: [T] float64, log-prob less its exact value.
        logits: [T] float64, exact logit of the target.

    Returns:
        For each group, from small to large |logit|: its mean |logit|, the mean of `gap`, and the
        standard error of this mean. A bias is one that is several times its standard error.
    """
    order = logits.abs().argsort()
    groups = [part for part in order.tensor_split(BINS) if len(part)]
    return [
        {
            "mean_abs_logit": float(logits[part].abs().mean()),
            "bias": float(gap[part].mean()),
            "standard_error": float(gap[part].std(correction=0) / len(part) ** 0.5),
        }
        for part in groups
    ]


def result_of(name: str, operands: Operands, exact: Exact, dtype: str) -> dict[str, Any]:
    """Errors of a backend, the bias of its log-probs, and why it is rejected (None: it is right).

    A backend that is not available here has `absent`, one that fails `failed`, with the reason.
    """
    try:
        contender = METHODS[name].build(operands)
    except (Absent, ImportError) as reason:
        return {"absent": str(reason)}
    try:
        errors = errors_of(contender, exact)
        assert contender.token_logps is not None
        with torch.no_grad():
            gap = contender.token_logps().double() - exact.token_logps
    except Exception as error:  # whatever a compiler or a driver raises
        return {"failed": problem_line(error)}
    hidden = operands.hidden.detach().double()
    logits = (hidden * operands.weight.detach()[operands.targets].double()).sum(1)
    return {
        **errors,
        "bias_by_logit": bias_by_logit(gap, logits),
        "rejected": why_rejected(name, errors, dtype),
    }


@dataclass(frozen=True)
class LoadedKernel:
    """A binary as the driver has loaded it."""

    name: str
    warps: int
    registers: int
    """Of a thread."""
    spills: int
    """Bytes of a thread's registers in local memory."""
    shared_bytes: int
    """Of a program."""


def loaded_kernels() -> list[LoadedKernel]:
    """The kernels that this process has launched on its GPU; none without Triton or a GPU."""
    if find_spec("triton") is None:
        return []
    from triton.runtime import JITFunction

    found = []
    for module in map(import_module, KERNEL_MODULES):
        for function in vars(module).values():
            # Only this module's own: others are imported by several.
            if not isinstance(function, JITFunction) or function.fn.__module__ != module.__name__:
                continue
            for binaries, *_ in function.device_caches.values():
                found += [
                    LoadedKernel(
                        one.metadata.name,
                        one.metadata.num_warps,
                        one.n_regs,
                        one.n_spills,
                        one.metadata.shared,
                    )
                    for one in binaries.values()
                    if getattr(one, "n_regs", None) is not None  # set when it is loaded
                ]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Check, print a line for each result, write."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.check_kernels", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=[str(d)[6:] for d in TOLERANCE], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1536, 3584])
    parser.add_argument("--inputs", choices=["random", "trained"], default="trained")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is not available: torch finds no GPU")
    record = LiveRecord("check-kernels", options.device, options.out)
    problems = 0
    for hidden in options.hidden:
        sizes = LossSizes(
            tokens=options.tokens,
            vocab=options.vocab,
            hidden=hidden,
            sequences=8,
            dtype=options.dtype,
            device=options.device,
            threads=torch.get_num_threads(),
            inputs=options.inputs,
        )
        operands = make_operands(sizes)
        exact = float64_result(operands)
        for name in options.backends:
            result = result_of(name, operands, exact, options.dtype)
            wrong = result.get("failed") or result.get("rejected")
            problems += wrong is not None
            record.add("results", {"backend": name, "hidden": hidden, **result})
            print(f"D {hidden:5} {name:16} {_line(result)}", flush=True)
        del operands, exact
    for kernel in loaded_kernels():
        problems += kernel.spills > 0
        record.add("loaded_kernels", vars(kernel))
        print(
            f"loaded: {kernel.name:32} {kernel.registers:4} registers {kernel.spills:4} B spilled "
            f"{kernel.shared_bytes:7} B shared {kernel.warps:3} warps"
        )
    print(f"written to {record.path}")
    return int(problems > 0)


def _line(result: dict[str, Any]) -> str:
    """A result in a line."""
    for why in ("absent", "failed"):
        if why in result:
            return f"{why}: {result[why]}"
    last = result["bias_by_logit"][-1]
    line = (
        f"logp {result['logp_error']:.1e}  dX {result['dhidden_error']:.1e}  "
        f"dW {result['dweight_error']:.1e}  bias {result['logp_bias']:+.1e}, at |z| "
        f"{last['mean_abs_logit']:.0f} {last['bias']:+.1e} +- {last['standard_error']:.0e}"
    )
    return f"{line}  WRONG: {result['rejected']}" if result["rejected"] else line


if __name__ == "__main__":
    sys.exit(main())
