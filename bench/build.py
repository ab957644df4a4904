"""Builds the Triton kernels ahead of time, without a GPU, and lists the resources each needs.

    python -m redi.bench.build [--targets sm_90 gfx942]

The public functions run on small tensors with a driver that launches nothing: each launch is
recorded as Triton specialises it (which arguments are multiples of 16, which are absent) and
compiled for the target. For each: registers per thread, shared memory, programs that fit a
multiprocessor, and stack and spilled registers, which must be 0. The binaries are those that the
GPU runs.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from redi import kernels
from redi.kernels import backends
from redi.kernels.experimental import exp_gemm_triton, filter_triton
from redi.kernels.experimental.launches import Launch, entries_for
from redi.kernels.reference import Backend

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VOCAB = 151_936
SHARD = VOCAB // 8  # rows of the lm_head where eight ranks divide it

# Of a multiprocessor, by NVIDIA's tuning guides for compute capability 8.0, 9.0 and 10.0.
REGISTERS, THREADS = 65_536, 2_048
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
RESERVED_SHARED_BYTES = 1 << 10  # for the system, of each program


@dataclass(frozen=True)
class Kernel:
    """A kernel as a call launches it."""

    call: str
    """What was called, a key of `calls`."""
    name: str
    function: Any
    """What `triton.jit` decorated."""
    signature: dict[str, str]
    """Triton's name of each argument's type; "constexpr" for values known when compiling."""
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    """What is known of other values, such as divisibility by 16."""
    options: dict[str, Any]
    """num_warps, num_stages, maxnreg if set, and others."""


@dataclass(frozen=True)
class Build:
    """A kernel's binary for one architecture."""

    call: str
    kernel: str
    target: str
    warps: int
    registers: int
    """Of a thread, 32 bits each."""
    shared_bytes: int
    """Of a program."""
    programs: int | None
    """That fit a multiprocessor at once; None where its size is not known."""
    stack_bytes: int
    """Local memory reserved per thread."""
    spills: int
    """Instructions that move registers to or from local memory (AMD: registers spilled)."""
    assembly: str
    """SASS or AMD assembly."""


class _Driver:
    """A driver of Triton for a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend}{self._target.arch}"  # Triton caches launches by it

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def recorded_launches(target: GPUTarget) -> Iterator[list[Kernel]]:
    """Make launches inside the block append to a list instead; a kernel is appended once.

    The backends accept tensors on the CPU inside the block, and take them for the target's. Results
    of what is called are meaningless.
    """
    launches: list[Kernel] = []
    seen = set()

    def record(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if (fn.name, key) not in seen:
            seen.add((fn.name, key))
            # The hook's own arguments leave out the limit of registers.
            chosen = json.loads(compile["specialization_data"])["options"]
            names = ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion", "maxnreg")
            launches.append(
                Kernel(
                    "",
                    fn.name.rsplit(".", 1)[-1],
                    fn.jit_function,
                    compile["signature"],
                    compile["constants"],
                    compile["configs"][0],
                    {name: chosen[name] for name in names if chosen.get(name) is not None},
                )
            )
        return True  # nothing is compiled or launched

    hip = "stub" if target.backend == "hip" else None
    with (
        patch.object(triton.knobs.runtime, "jit_cache_hook", record),
        patch.object(backends, "TRITON_INTERPRETS", True),
        patch.object(torch.version, "hip", hip),
        patch.object(driver, "_active", _Driver(target)),
    ):
        yield launches


def calls() -> dict[str, Callable[[Backend], object]]:
    """Calls of the public functions that together launch each kernel in each form; by name.

    Each takes the backend. Launches depend on the vocabulary, and not on the number of tokens.
    """
    tokens, hidden_size = 24, 64
    hidden = torch.zeros(tokens, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(VOCAB, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 10, tokens], dtype=torch.int32)
    signs = torch.tensor([1, -1])
    weights = torch.ones(tokens)
    # Given, because kernels that compute what they are found from do not run.
    trained: dict[str, Any] = {"valid_index": torch.arange(tokens), "num_with_grad": tokens}

    def redi(backend: Backend, dtype: torch.dtype = torch.bfloat16) -> object:
        operands = hidden.to(dtype), weight.to(dtype), targets, cu_seqlens, signs
        out = kernels.redi_loss(*operands, alpha=0.5, num_pairs=1, backend=backend, **trained)
        out.loss.backward()
        return out

    def signed(backend: Backend, **options: Any) -> object:
        return kernels.signed_cross_entropy(
            hidden, weight, targets, weights, backend=backend, **trained, **options
        )

    def logprobs(backend: Backend) -> object:
        out = kernels.linear_logprobs(hidden, weight, targets, keep=True, backend=backend)
        return out.sum().backward()

    def no_grad(backend: Backend) -> object:
        with torch.no_grad():
            return kernels.linear_logprobs(hidden, weight, targets, backend=backend)

    def vocab_parallel(
        backend: Backend, dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> object:
        rows = weight[:SHARD].detach().to(dtype).requires_grad_()
        loss, *_ = kernels.vocab_parallel_cross_entropy(
            hidden.to(dtype), rows, targets, weights, group=_group_of_one(), backend=backend,
            **trained, **options,
        )  # fmt: skip
        return loss.backward()

    def statistics(backend: Backend) -> object:
        made = kernels.linear_logprobs(
            hidden, weight, targets, entropy=True, log_sum_exp=True, softcap=30.0, backend=backend
        )
        return torch.stack([values.sum() for values in made]).sum().backward()

    def segments(backend: Backend) -> object:
        values = torch.zeros(tokens, requires_grad=True)
        return kernels.segment_sum(values, cu_seqlens, backend=backend).sum().backward()

    def topk(
        backend: Backend, dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> kernels.TopkDivergence:
        ids, logps = torch.arange(4).expand(tokens, 4), torch.full((tokens, 4), -2.0)
        return kernels.topk_divergence(
            hidden.to(dtype), weight.to(dtype), ids, logps, weights, targets=targets,
            backend=backend, **trained, **options,
        )  # fmt: skip

    return {
        "redi_loss": redi,
        "redi_loss float16": lambda backend: redi(backend, torch.float16),
        "redi_loss float32": lambda backend: redi(backend, torch.float32),
        "entropy": lambda backend: signed(backend, entropy=True),
        "dft": lambda backend: signed(backend, coefficient="dft"),
        "unlikelihood": lambda backend: signed(backend, coefficient="unlikelihood"),
        "softcap": lambda backend: signed(backend, softcap=30.0, logit_scale=0.5),
        "z-loss": lambda backend: signed(backend, z_loss=1e-4),
        "label smoothing": lambda backend: signed(backend, label_smoothing=0.1),
        "entropy bonus": lambda backend: signed(backend, entropy_weights=weights),
        "all terms": lambda backend: signed(
            backend, z_loss=1e-4, label_smoothing=0.1, entropy_weights=weights, entropy=True,
            log_sum_exp=True, softcap=30.0, logit_scale=0.5,
        ),
        "differentiable entropy": statistics,
        "log-probs": no_grad,
        "log-probs kept": logprobs,
        "segment_sum": segments,
        "vocab-parallel": vocab_parallel,
        "vocab-parallel float32": lambda backend: vocab_parallel(
            backend, torch.float32, entropy=True
        ),
        "vocab-parallel terms": lambda backend: vocab_parallel(
            backend, logit_scale=0.5, softcap=30.0, label_smoothing=0.1, z_loss=0.1,
            entropy_weights=weights,
        ),
        "top-k divergence": topk,
        "top-k divergence float32": lambda backend: topk(backend, torch.float32),
        "top-k divergence, temperature": lambda backend: topk(
            backend, temperature=2.0, softcap=30.0
        ),
        "filter": lambda backend: kernels.filtered_redi_loss(
            hidden, weight, targets, cu_seqlens, signs,
            alpha=0.5, num_pairs=1, epsilon=2.0**-10, backend=backend, **trained,
        ),
    }  # fmt: skip


def _group_of_one() -> dist.ProcessGroup:
    """A process group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


# The calls for "triton-exp" to build: others are computed as by "triton", or differ from redi_loss
# in a scalar, and take half a minute to build.
EXPONENTIALS = ("redi_loss", "log-probs", "filter")


def launched(target: str) -> list[Kernel]:
    """Each kernel in each form that the public functions launch on one of `TARGETS`."""
    gpu = TARGETS[target]
    # Not a set: `_build_nth` counts on the order.
    launches = dict.fromkeys(entry.launch for entry in entries_for(f"sm_{gpu.arch}"))
    with recorded_launches(gpu) as found:
        cases: list[tuple[Backend, Launch | None]] = [("triton", None)]
        cases += [("triton-exp", one) for one in launches]
        for backend, launch in cases:
            for name, call in calls().items():
                if backend == "triton" and name == "filter":
                    continue  # needs exponentials
                if backend == "triton-exp" and name not in EXPONENTIALS:
                    continue
                before = len(found)
                with _launch_table(launch):
                    call(backend)
                found[before:] = [
                    replace(kernel, call=f"{backend} {name}") for kernel in found[before:]
                ]
    return found


@contextmanager
def _launch_table(launch: Launch | None) -> Iterator[None]:
    """Make the table answer with `launch` inside the block."""
    with (
        patch.object(exp_gemm_triton, "launch_for", lambda weight: launch),
        patch.object(filter_triton, "launch_for", lambda weight: launch),
    ):
        yield


def build(kernel: Kernel, target: str) -> Build:
    """Compile a kernel for one of `TARGETS`."""
    compiled = triton.compile(
        ASTSource(kernel.function, kernel.signature, kernel.constants, kernel.attributes),
        target=TARGETS[target],
        options=kernel.options,
    )
    warps, shared = kernel.options["num_warps"], compiled.metadata.shared
    if TARGETS[target].backend == "hip":
        text = compiled.asm["amdgcn"]
        number = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.M)}
        registers = number["vgpr_count"]
        stack = number["private_segment_fixed_size"]
        spills = number["vgpr_spill_count"] + number["sgpr_spill_count"]
    else:
        text, usage = _disassemble(compiled.asm["cubin"])
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        registers, stack = number["REG"], number["STACK"] + number["LOCAL"]
        spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    programs = None
    if target in SHARED_BYTES:
        programs = programs_per_sm(warps, registers, shared, SHARED_BYTES[target])
    return Build(
        kernel.call, kernel.name, target, warps, registers, shared, programs, stack, spills, text
    )


def programs_per_sm(warps: int, registers: int, shared_bytes: int, most_shared: int) -> int:
    """Programs that run on a multiprocessor at once: by threads, registers and shared memory.

    A warp's registers are allocated in units of 256 (CUDA's occupancy calculator).
    """
    of_a_warp = -(-32 * registers // 256) * 256
    return min(
        THREADS // (32 * warps),
        REGISTERS // (of_a_warp * warps),
        most_shared // (shared_bytes + RESERVED_SHARED_BYTES),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS and resource usage of the only function, from the tool in Triton's package."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "--dump-sass", "--dump-resource-usage", path]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage, sass = out.split("code for", 1)
    return sass, usage.split("Function", 1)[1]


def _build_nth(target: str, number: int) -> Build:
    """Build a kernel by its index, since it cannot be sent to another process."""
    return build(launched(target)[number], target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if anything spills or needs a stack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so nothing would be compiled: unset it")
    print(f"Triton {triton.__version__}")
    print(
        f"{'call':28}{'kernel':30}{'target':7}{'registers':>10}{'shared B':>10}{'programs':>9}"
        f"{'stack B':>9}{'spills':>8}"
    )
    jobs = [(target, n) for target in options.targets for n in range(len(launched(target)))]
    clean = True
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for made in pool.map(_build_nth, *zip(*jobs, strict=True)):
            clean = clean and not made.stack_bytes and not made.spills
            print(
                f"{made.call:28}{made.kernel:30}{made.target:7}{made.registers:10}"
                f"{made.shared_bytes:10}{made.programs or '':>9}{made.stack_bytes:9}{made.spills:8}"
            )
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
