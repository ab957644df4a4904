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
from redi.bench.build import TARGETS, build, variants
for target in sys.argv[1:]:
    for variant in variants(TARGETS[target]):
        print(json.dumps(dataclasses.asdict(build(variant, target))))
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


def builds(*targets: str) -> dict[tuple[str, str], dict[str, Any]]:
    """By target and variant."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *targets], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    return {(build["target"], build["variant"]): build for build in made}


def assert_nothing_spills(made: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert len(made) >= 13
    for name, build in made.items():
        assert build["spills"] == build["stack_bytes"] == 0, name
        # A product keeps 128 sums a thread, and one program fills an SM.
        product = re.search("product|maxima|filter", name[1])
        assert 0 < build["registers"] <= (255 if product else 128), name


@pytest.fixture(scope="module")
def sm_90() -> dict[tuple[str, str], dict[str, Any]]:
    return builds("sm_90")


def test_nothing_spills_on_hopper(sm_90: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert_nothing_spills(sm_90)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_nothing_spills_on_other_gpus(target: str) -> None:
    assert_nothing_spills(builds(target))


def test_two_programs_of_the_main_kernel_fit_an_sm(
    sm_90: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """1024 threads each: 65,536 registers are 32 a thread."""
    assert sm_90["sm_90", "loss bf16"]["registers"] <= 32


@pytest.mark.parametrize("variant", ["loss bf16", "loss fp16", "loss fp32", "unlikelihood bf16"])
def test_logits_move_sixteen_bytes_at_a_time(
    sm_90: dict[tuple[str, str], dict[str, Any]], variant: str
) -> None:
    found = Instructions.of(sm_90["sm_90", variant]["assembly"])
    # 16 columns a thread and pass: four loads, and 64 or 32 bytes to store. The others are of
    # one word: token, target, target's logit, weight; log-prob.
    assert found.count("LDG.E.128") == 8
    assert found.count("STG.E.128") == (4 if variant == "loss fp32" else 2)
    assert found.count("STG") - found.count("STG.E.128") == 1
    assert found.count("ATOM") + found.count("RED.") == 0


@pytest.mark.parametrize(
    ("variant", "barrier"),
    [
        ("loss bf16", True),
        ("loss fp16", True),
        ("loss fp32", False),
        ("log-probs kept bf16", False),
    ],
)
def test_halves_wait_for_the_logits_that_they_overwrite(
    sm_90: dict[tuple[str, str], dict[str, Any]], variant: str, barrier: bool
) -> None:
    """A barrier stands between loads and stores where, and only where, halves lie over words."""
    found = Instructions.of(sm_90["sm_90", variant]["assembly"])
    between = found.between_last_loads_and_stores()
    assert any(name.startswith("BAR.SYNC") for name in between) == barrier


def test_log_probs_alone_write_no_gradient(sm_90: dict[tuple[str, str], dict[str, Any]]) -> None:
    found = Instructions.of(sm_90["sm_90", "log-probs"]["assembly"])
    assert found.count("LDG.E.128") == 4
    assert found.count("STG") == 1


def test_the_product_with_exponentials_is_made_of_hopper_s_instructions(
    sm_90: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """Products of four warps at a time, tiles by descriptors both ways, exp2 on the spot."""
    build = sm_90["sm_90", "exp product"]
    sass = build["assembly"]
    assert sass.count("HGMMA.64x256x16.F32.BF16") == 4  # 64 of D in steps of 16
    assert sass.count("UTMALDG.2D") >= 2
    assert sass.count("UTMASTG.2D") >= 1
    assert 128 <= sass.count("MUFU.EX2") < 256  # of a thread's 128 sums, once each
    assert build["shared_bytes"] <= 227 << 10
    found = Instructions.of(sass)
    assert found.count("LDG.E.128") == found.count("ATOM") + found.count("RED.") == 0


@pytest.mark.parametrize("variant", ["filter dhidden", "filter dweight"])
def test_products_over_kept_tiles_keep_four_steps_under_way(
    sm_90: dict[tuple[str, str], dict[str, Any]], variant: str
) -> None:
    """Where the operands lie is itself loaded, which costs stages: see `filter_triton.STAGES`."""
    build = sm_90["sm_90", variant]
    assert build["assembly"].count("HGMMA.64x256x16.F32.BF16") == 4
    assert build["assembly"].count("UTMALDG.2D") >= 8  # three steps before the loop, one in it
    assert 4 * (48 << 10) <= build["shared_bytes"] <= 227 << 10


# Prints how Triton specialises the softmax kernel for chunks of tokens that begin at 16 bytes or 8.
SPECIALISE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from redi.kernels.softmax_triton import softmax_kernel as kernel

bind = create_function_from_signature(
    kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
)
integers, logits = torch.zeros(100, dtype=torch.int64), torch.zeros(4, 64)
names = [name for name in kernel.arg_names if name.islower()]
plain = dict.fromkeys(names) | dict(logits=logits, logits_stride=64, vocab=50, room=64)
plain |= dict(dlogits=logits, dlogits_stride=64, dlogits_room=64)
constants = dict(ROUNDED=None, COEFFICIENT="weight", HALVES_IN_PLACE=False, BLOCK=128)
for start in (0, 1):
    read = {name: integers[start:] for name in ("tokens", "targets")}
    read |= {name: torch.zeros(100)[start:] for name in ("logps", "weights")}
    print(bind(**plain | read, **constants)[1])
"""


def test_no_chunk_compiles_anew() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SPECIALISE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = done.stdout.splitlines()
    assert len(found) == 2
    assert len(set(found)) == 1
