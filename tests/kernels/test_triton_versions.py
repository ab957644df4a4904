"""The kernels build with the versions of Triton that come with the supported versions of torch.

torch 2.11 brings 3.6, 2.12 and 2.13 bring 3.7.1, 2.14 brings 3.8; the installed one has
`test_build.py`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow  # 200 MB to install, minutes of compiling

TWO_PROGRAMS = ["redi_loss", "redi_loss float16", "dft", "unlikelihood"]


@pytest.mark.parametrize("version", ["3.6.0", "3.8.0"])
def test_nothing_spills_and_two_programs_of_the_row_kernel_fit_an_sm(
    version: str, tmp_path: Path
) -> None:
    install = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
        *("--target", str(tmp_path / "triton"), f"triton=={version}"),
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"triton {version} is not available: {done.stderr.splitlines()[-1]}")
    path = [str(tmp_path / "triton"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    build = [sys.executable, "-P", "-W", "ignore", "-m", "redi.bench.build", "--targets", "sm_90"]
    done = subprocess.run(build, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == f"Triton {version}"
    # call, kernel, target, registers, shared bytes, programs, stack bytes, spills
    row = re.compile(r"(\S.*?) +(\w+) +sm_90 +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)")
    found = [match.groups() for match in map(row.fullmatch, lines[2:]) if match]
    assert len(found) == len(lines) - 2
    assert {kernel for _, kernel, *_ in found} >= {"softmax_kernel", "exp_gemm_kernel"}
    programs = {
        call: int(fit) for call, kernel, _, _, fit, *_ in found if kernel == "softmax_kernel"
    }
    assert {call: programs[f"triton {call}"] for call in TWO_PROGRAMS} == dict.fromkeys(
        TWO_PROGRAMS, 2
    )
    assert {(stack, spills) for *_, stack, spills in found} == {("0", "0")}
