"""Builds the Triton kernels ahead of time and lists what each takes of a GPU; no card is needed.

    python -m redi.bench.build [--targets sm_90 gfx942]

For each variant that the loss ops launch: registers a thread, shared memory, and what must be 0,
stack and spilled registers. The binaries are those that the GPU would run.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from redi.kernels.experimental.exp_gemm_triton import (
    exp_gemm_kernel,
    finalise_kernel,
    target_logits_kernel,
)
from redi.kernels.experimental.filter_triton import (
    DEPTH,
    ROWS,
    STAGES,
    WARPS,
    add_kept_rows_kernel,
    multiply_kept_columns_kernel,
)
from redi.kernels.experimental.launches import Launch, entries_for
from redi.kernels.segments_triton import (
    spread_segments_kernel,
    sum_segments_kernel,
    token_weights_kernel,
)
from redi.kernels.softmax_triton import launch_shape, softmax_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VOCAB = 151_936


@dataclass(frozen=True)
class Variant:
    """A kernel as one kind of call specialises it."""

    name: str
    kernel: Any
    """The function that `triton.jit` decorated."""
    types: dict[str, str]
    """Triton's name of each argument's type; an argument that is not here is a constant."""
    constants: dict[str, Any]
    """Values of arguments known when compiling; None for those neither here nor in `types`."""
    warps: int
    stages: int = 3
    aligned: bool = True
    """Whether pointers, strides and rooms are multiples of 16."""


@dataclass(frozen=True)
class Build:
    """A variant's binary for one architecture."""

    variant: str
    target: str
    registers: int
    """Of a thread, 32 bits each."""
    shared_bytes: int
    """Of a program."""
    stack_bytes: int
    """Of a thread: local memory that it has to reserve."""
    spills: int
    """Instructions that move registers to or from local memory (AMD: registers spilled)."""
    assembly: str
    """SASS or AMD assembly."""


def variants(target: GPUTarget) -> list[Variant]:
    """What the loss ops launch on that target."""
    halves_in_place = target.backend == "cuda"
    row = {
        "logits": "*fp32", "logits_stride": "i32", "vocab": "i32", "room": "i32",
        "tokens": "*i64", "targets": "*i64", "logps": "*fp32",
    }  # fmt: skip
    strides = {"dlogits_stride": "i32", "dlogits_room": "i32"}
    weighted = {"weights": "*fp32", **strides}
    halves = {"dlogits": "*bf16" if halves_in_place else "*fp32", **weighted}
    whole = {"dlogits": "*fp32", **weighted}
    block, warps = launch_shape(VOCAB, target.warp_size)
    of_bf16 = {
        "ROUNDED": tl.bfloat16,
        "COEFFICIENT": "weight",
        "HALVES_IN_PLACE": halves_in_place,
        "BLOCK": block,
    }
    of_fp16 = {**of_bf16, "ROUNDED": tl.float16}
    of_fp32 = {**of_bf16, "ROUNDED": tl.float32, "HALVES_IN_PLACE": False}
    fp16 = {"dlogits": "*fp16" if halves_in_place else "*fp32", **weighted}
    small_block, small_warps = launch_shape(500, target.warp_size)
    small = {**of_bf16, "BLOCK": small_block}

    found = [
        Variant(name, softmax_kernel, row | types, constants, warps)
        for name, types, constants in [
            ("loss bf16", halves, of_bf16),
            ("loss fp16", fp16, of_fp16),
            ("loss fp32", whole, of_fp32),
            ("loss bf16 entropy", halves | {"entropies": "*fp32"}, of_bf16),
            ("dft bf16", halves, of_bf16 | {"COEFFICIENT": "dft"}),
            ("unlikelihood bf16", halves, of_bf16 | {"COEFFICIENT": "unlikelihood"}),
            ("log-probs", {}, of_bf16 | {"HALVES_IN_PLACE": False}),
            (
                "log-probs kept bf16",
                {"dlogits": "*bf16"} | weighted,
                of_bf16 | {"HALVES_IN_PLACE": False},
            ),
        ]
    ]
    types = row | halves
    found.append(
        Variant("loss bf16 unaligned", softmax_kernel, types, of_bf16, warps, aligned=False)
    )
    found.append(Variant("loss bf16 V=500", softmax_kernel, types, small, small_warps))
    found.append(
        Variant(
            "token weights",
            token_weights_kernel,
            {
                "targets": "*i64", "cu_seqlens": "*i32", "signs": "*i64", "alpha": "fp32",
                "factor": "fp32", "weights": "*fp32", "lengths": "*i64",
            },
            {},
            4,
        )
    )  # fmt: skip
    found.append(
        Variant(
            "segment_sum",
            sum_segments_kernel,
            {"values": "*fp32", "cu_seqlens": "*i32", "sums": "*fp32"},
            {},
            4,
        )
    )
    found.append(
        Variant(
            "segment_sum backward",
            spread_segments_kernel,
            {"sums": "*fp32", "cu_seqlens": "*i32", "values": "*fp32"},
            {},
            4,
        )
    )
    entries = entries_for(f"sm_{target.arch}")
    # A group is an argument. Not a set: `_build_nth` counts on the order.
    for launch in dict.fromkeys(replace(entry.launch, group=1) for entry in entries):
        found += exp_gemm_variants(launch)
    return found


def exp_gemm_variants(launch: Launch) -> list[Variant]:
    """What `backend="triton-exp"` launches besides."""
    rows, columns, depth = launch.rows, launch.columns, launch.depth
    product = {
        "hidden": f"tensordesc<bf16[{rows}, {depth}]>",
        "weight": f"tensordesc<bf16[{columns}, {depth}]>",
        "e": f"tensordesc<bf16[{rows}, {columns}]>",
        "shifts": "*fp32", "log2_scale": "*fp32", "sums": "*fp32", "sums_stride": "i32",
        "rows": "i32", "vocab": "i32", "depth": "i32", "most_in_group": "i32",
        "first_tile": "i32", "last_tile": "i32",
    }  # fmt: skip
    repair = {"row_blocks": "*i64", "num_row_blocks": "*i64"}
    skipping = {"skip_below": "*fp32", "target_tiles": "*i32"}
    tile = {
        "BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "BLOCK_DEPTH": depth,
    }  # fmt: skip
    row = {
        "e": "*bf16", "e_stride": "i32", "vocab": "i32", "sums": "*fp32", "sums_stride": "i32",
        "tiles": "i32", "tokens": "*i64", "targets": "*i64", "z_target": "*fp32",
        "shifts": "*fp32", "log2_scale": "*fp32", "logps": "*fp32",
    }  # fmt: skip
    factors = {"factors": "*fp32", "residues": "*fp32", "weights": "*fp32"}
    block = {
        "COEFFICIENT": "weight", "BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns,
        "BLOCK_TILES": triton.next_power_of_2(triton.cdiv(VOCAB, columns)),
    }  # fmt: skip
    first, again = {"outside": "*i32"}, {"redone": "*i32"}
    dot = {
        "hidden": "*bf16", "hidden_stride": "i32", "weight": "*bf16", "weight_stride": "i32",
        "depth": "i32", "tokens": "*i64", "targets": "*i64", "z_target": "*fp32",
        "log2_scale": "*fp32", "weights": "*fp32",
    }  # fmt: skip
    return [
        *(
            Variant(
                name,
                exp_gemm_kernel,
                product | types,
                tile | options,
                launch.warps,
                launch.stages,
            )
            for name, types, options in [
                ("exp product", {}, {"MAXIMA": False, "FLATTEN": launch.flatten}),
                ("exp product filter", skipping, {"MAXIMA": False, "FLATTEN": False}),
                ("exp repair maxima", repair, {"MAXIMA": True, "FLATTEN": False}),
                ("exp repair product", repair, {"MAXIMA": False, "FLATTEN": False}),
            ]
        ),
        *(
            Variant(name, finalise_kernel, row | types, block, 4)
            for name, types in [
                ("exp finalise", first | factors),
                ("exp repair finalise", again | factors),
            ]
        ),
        Variant(
            "exp target logits",
            target_logits_kernel,
            dot,
            {"BLOCK": 1024},
            4,
        ),
        *kept_product_variants(launch),
    ]


def kept_product_variants(launch: Launch) -> list[Variant]:
    """The two products over the tiles that a filter leaves."""
    common = {"out": "*fp32", "out_stride": "i32", "found": "*i32", "found_stride": "i32"}
    common |= {"counts": "*i32", "width": "i32"}
    options = {
        "BLOCK_ROWS": launch.rows, "BLOCK_COLUMNS": launch.columns,
        "DEPTH": DEPTH, "ROWS": ROWS, "WIDTH": launch.kept_width,
    }  # fmt: skip
    return [
        Variant(name, kernel, common | types, options, WARPS, STAGES)
        for name, kernel, types in [
            (
                "filter dhidden",
                multiply_kept_columns_kernel,
                {
                    "matrix": f"tensordesc<bf16[{ROWS}, {DEPTH}]>",
                    "weight": f"tensordesc<bf16[{DEPTH}, {launch.kept_width}]>",
                    "block_order": "*i64",
                    "num_rows": "i32",
                },
            ),
            (
                "filter dweight",
                add_kept_rows_kernel,
                {
                    "matrix": f"tensordesc<bf16[{DEPTH}, {ROWS}]>",
                    "x": f"tensordesc<bf16[{DEPTH}, {launch.kept_width}]>",
                    "order": "*i64",
                    "vocab": "i32",
                },
            ),
        ]
    ]


def build(variant: Variant, target: str) -> Build:
    """Compile a variant for one of `TARGETS`."""
    names = variant.kernel.arg_names
    assert {*variant.types, *variant.constants} <= {*names}
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    constants = {name: None for name in names if name not in variant.types} | variant.constants
    any_rank = {p.name for p in variant.kernel.params if p.do_not_specialize_on_alignment}
    aligned = [
        name
        for name, kind in variant.types.items()
        if (kind.startswith("*") and name not in any_rank) or name.endswith(("stride", "room"))
    ]
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, constants, divisible if variant.aligned else {}),
        target=TARGETS[target],
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
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
    shared = compiled.metadata.shared
    return Build(variant.name, target, registers, shared, stack, spills, text)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS, and the resource usage of the one function in it, by the tool in Triton's package."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "--dump-sass", "--dump-resource-usage", path]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage, sass = out.split("code for", 1)
    return sass, usage.split("Function", 1)[1]


def _build_nth(target: str, number: int) -> Build:
    """A kernel cannot be sent to another process; its place among the variants can."""
    return build(variants(TARGETS[target])[number], target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if anything spills or needs a stack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, as interpreted kernels are not compiled")
    print(f"Triton {triton.__version__}")
    print(f"{'kernel':24}{'target':8}{'registers':>10}{'shared B':>10}{'stack B':>9}{'spills':>8}")
    jobs = [(t, n) for t in options.targets for n in range(len(variants(TARGETS[t])))]
    clean = True
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        builds = pool.map(_build_nth, *zip(*jobs, strict=True))
        for (target, _), made in zip(jobs, builds, strict=True):
            clean = clean and not made.stack_bytes and not made.spills
            print(
                f"{made.variant:24}{target:8}{made.registers:10}{made.shared_bytes:10}"
                f"{made.stack_bytes:9}{made.spills:8}"
            )
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
