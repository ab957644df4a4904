"""The Triton kernels compile for the GPUs they are meant for, into what they are meant to be.

Real binaries, no card: see `redi.bench.build`. They are built in a process of their own, as the
other tests have Triton interpret.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("triton")
# Minutes of compiling; that nothing spills is asked by `make kernels` at every change.
pytestmark = pytest.mark.slow

# Prints each build of the targets in argv as a line of JSON.
BUILD = """
import dataclasses, json, sys
from redi.bench.build import build, launched
for target in sys.argv[1:]:
    for kernel in launched(target):
        print(json.dumps(dataclasses.asdict(build(kernel, target))))
"""


@dataclass(frozen=True)
class Instructions:
    """Those of SASS that matter here, in order, without registers: "LDG.E.128", "BAR.SYNC", ..."""

    names: list[str]

    @classmethod
    def of(cls, sass: str) -> "Instructions":
        return cls(re.findall(r"\b((?:LDG|STG|BAR|ATOM|RED)\.[A-Z0-9.]+)", sass))

    def count(self, prefix: str) -> int:
        return sum(name.startswith(prefix) for name in self.names)

    def between_last_loads_and_stores(self) -> list[str]:
        """What stands between the last wide load and the first wide store behind it."""
        last_load = max(i for i, name in enumerate(self.names) if name.startswith("LDG.E.128"))
        rest = self.names[last_load + 1 :]
        return rest[: next(i for i, name in enumerate(rest) if name.startswith("STG.E.128"))]


def run_without_interpreter(program: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@dataclass(frozen=True)
class Builds:
    """Those of a target."""

    made: list[dict[str, Any]]

    @classmethod
    def of(cls, target: str) -> "Builds":
        made = [json.loads(line) for line in run_without_interpreter(BUILD, target).splitlines()]
        return cls(made)

    def get(self, call: str, kernel: str, number: int = 0) -> dict[str, Any]:
        """The first form of a kernel that a call launches as none before it, or a later one."""
        found = [m for m in self.made if (m["call"], m["kernel"]) == (call, kernel)]
        return found[number]

    def row(self, call: str) -> dict[str, Any]:
        return self.get(f"triton {call}", "softmax_kernel")


def assert_nothing_spills(builds: Builds) -> None:
    assert len({made["kernel"] for made in builds.made}) >= 4
    for made in builds.made:
        assert made["spills"] == made["stack_bytes"] == 0, made["call"]
        # A product keeps 128 sums a thread, and one program fills an SM.
        product = made["kernel"].startswith(("exp_gemm", "multiply_kept", "add_kept"))
        assert 0 < made["registers"] <= (255 if product else 128), made["call"]
        assert made["programs"] is None or made["programs"] >= 1, made["call"]


@pytest.fixture(scope="module")
def sm_90() -> Builds:
    return Builds.of("sm_90")


def test_nothing_spills_on_hopper(sm_90: Builds) -> None:
    assert_nothing_spills(sm_90)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_nothing_spills_on_other_gpus(target: str) -> None:
    assert_nothing_spills(Builds.of(target))


HALVES = ["redi_loss", "redi_loss float16", "dft", "unlikelihood", "log-probs kept"]


@pytest.mark.parametrize("call", [*HALVES, "z-loss", "softcap"])
def test_two_programs_of_the_main_kernel_fit_an_sm(sm_90: Builds, call: str) -> None:
    """1024 threads each: 65,536 registers are 32 a thread."""
    assert sm_90.row(call)["programs"] == 2


@pytest.mark.parametrize("call", [*HALVES, "redi_loss float32"])
def test_logits_move_sixteen_bytes_at_a_time(sm_90: Builds, call: str) -> None:
    found = Instructions.of(sm_90.row(call)["assembly"])
    # 16 columns a thread and pass: four loads, and 64 or 32 bytes to store. The others are of
    # one word: token, target, target's logit, weight; log-prob.
    assert found.count("LDG.E.128") == 8
    assert found.count("STG.E.128") == (4 if call == "redi_loss float32" else 2)
    assert found.count("STG") - found.count("STG.E.128") == 1
    assert found.count("ATOM") + found.count("RED.") == 0


@pytest.mark.parametrize(
    ("call", "barrier"),
    [
        ("redi_loss", True),
        ("redi_loss float16", True),
        ("redi_loss float32", False),
        ("log-probs kept", False),
    ],
)
def test_halves_wait_for_the_logits_that_they_overwrite(
    sm_90: Builds, call: str, barrier: bool
) -> None:
    """A barrier stands between loads and stores where, and only where, halves lie over words."""
    found = Instructions.of(sm_90.row(call)["assembly"])
    between = found.between_last_loads_and_stores()
    assert any(name.startswith("BAR.SYNC") for name in between) == barrier


def test_log_probs_alone_write_no_gradient(sm_90: Builds) -> None:
    found = Instructions.of(sm_90.row("log-probs")["assembly"])
    assert found.count("LDG.E.128") == 4
    assert found.count("STG") == 1


def test_the_product_with_exponentials_is_made_of_hopper_s_instructions(sm_90: Builds) -> None:
    """Products of four warps at a time, tiles by descriptors both ways, exp2 on the spot."""
    build = sm_90.get("triton-exp redi_loss", "exp_gemm_kernel")
    sass = build["assembly"]
    assert sass.count("HGMMA.64x256x16.F32.BF16") == 4  # 64 of D in steps of 16
    assert sass.count("UTMALDG.2D") >= 2
    assert sass.count("UTMASTG.2D") >= 1
    assert 128 <= sass.count("MUFU.EX2") < 256  # of a thread's 128 sums, once each
    assert build["shared_bytes"] <= 227 << 10
    found = Instructions.of(sass)
    assert found.count("LDG.E.128") == found.count("ATOM") + found.count("RED.") == 0


@pytest.mark.parametrize("kernel", ["multiply_kept_columns_kernel", "add_kept_rows_kernel"])
def test_products_over_kept_tiles_keep_four_steps_under_way(sm_90: Builds, kernel: str) -> None:
    """Where the operands lie is itself loaded, which costs stages: see `filter_triton.STAGES`."""
    build = sm_90.get("triton-exp filter", kernel)
    assert build["assembly"].count("HGMMA.64x256x16.F32.BF16") == 4
    assert build["assembly"].count("UTMALDG.2D") >= 8  # three steps before the loop, one in it
    assert 4 * (48 << 10) <= build["shared_bytes"] <= 227 << 10


@pytest.mark.parametrize(
    ("kernel", "stores"), [("shard_sums_kernel", 0), ("shard_gradient_kernel", 2)]
)
def test_several_programs_of_a_shard_s_kernels_fit_an_sm(
    sm_90: Builds, kernel: str, stores: int
) -> None:
    build = sm_90.get("triton vocab-parallel", kernel)
    assert build["programs"] >= 4
    found = Instructions.of(build["assembly"])
    assert found.count("LDG.E.128") == 4
    assert found.count("STG.E.128") == stores


# Prints for each form of the product that tuning tries: the programs that it counts on, and its
# build.
CANDIDATES = """
import dataclasses, json
from unittest.mock import patch
from redi.bench import build, tune
from redi.kernels.experimental import exp_gemm_triton
for launch in dict.fromkeys(dataclasses.replace(c, l2_share=0.5) for c in tune.candidates("sm_90")):
    with (
        patch.object(exp_gemm_triton, "launch_for", lambda weight: launch),
        build.recorded_launches(build.TARGETS["sm_90"]) as found,
    ):
        build.calls()["redi_loss"]("triton-exp")
    for kernel in found:
        if kernel.name == "exp_gemm_kernel":
            made = dataclasses.asdict(build.build(kernel, "sm_90"))
            print(json.dumps([launch.programs, made]))
"""


def test_every_form_of_the_product_that_tuning_tries_fits_its_processor() -> None:
    made = [json.loads(line) for line in run_without_interpreter(CANDIDATES).splitlines()]
    assert {programs for programs, _ in made} == {1, 2}
    for programs, one in made:
        assert one["spills"] == one["stack_bytes"] == 0
        assert one["programs"] >= programs


# Prints the number of launches that are compiled for chunks whose tokens begin at 16 bytes or at 8,
# and for vocabularies that are multiples of 16 and that are not.
SPECIALISE = """
import torch
from redi.bench.build import TARGETS, recorded_launches
from redi.kernels.softmax_triton import softmax
for vocab in (4080, 4081):
    with recorded_launches(TARGETS["sm_90"]) as found:
        for start in (0, 1):
            tokens = torch.zeros(100, dtype=torch.int64)[start:]
            values = torch.zeros(100)[start:]
            softmax(
                torch.zeros(8, 4160)[:, :vocab], tokens[:8], tokens, values,
                coefficient="weight", dtype=torch.bfloat16, logps=values,
            )
    print(len(found), found[0].signature, found[0].constants, found[0].attributes)
"""


def test_no_chunk_compiles_anew() -> None:
    found = run_without_interpreter(SPECIALISE).splitlines()
    assert [line.split()[0] for line in found] == ["1", "1"]
    assert len(set(found)) == 1  # whether a mask depends on V's divisibility: see softmax_kernel


# Prints the instructions of log-probs alone that subtract from a product which is not rounded.
FUSED_DIFFERENCES = r"""
import re, torch
from redi.bench.build import TARGETS, VOCAB, build, recorded_launches
from redi.kernels import linear_logprobs
with recorded_launches(TARGETS["sm_90"]) as found:
    linear_logprobs(
        torch.zeros(8, 64), torch.zeros(VOCAB, 64), torch.zeros(8, dtype=torch.int64),
        valid_index=torch.arange(8), logit_scale=0.3, backend="triton",
    )
(kernel,) = (kernel for kernel in found if kernel.name == "softmax_kernel")
print(re.findall(r"FFMA R\d+, \S+ \S+, -R\d+", build(kernel, "sm_90").assembly))
"""


def test_a_scaled_target_s_logit_is_rounded_before_the_largest_is_subtracted() -> None:
    """Else it would differ from itself where it is the largest, and log-probs could exceed 0."""
    assert run_without_interpreter(FUSED_DIFFERENCES).strip() == "[]"
