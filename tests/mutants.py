"""Changes source files at one place at a time and reports the changes that no test notices.

    python tests/mutants.py engine/train/loop.py --tests tests/engine/train/test_resume.py

The changes are made in a copy of the sources, so the checkout stays as it is. A mutant is killed if
the tests fail or take three times as long as without it: on a busy machine, try one that timed out
again. Each runs in a fork of this process, which has imported the libraries; processes that a test
starts import them anew.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import copy
import importlib
import multiprocessing
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import cache_from_source
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "kernels", "bench")
LIBRARIES = ("hypothesis", "peft", "pyarrow.parquet", "torch.distributed.fsdp")
FORK = multiprocessing.get_context("fork")

_LOSS = (
    "tests/engine/loss/test_objectives.py tests/engine/loss/test_trl.py"
    " tests/engine/loss/test_authors_options.py tests/engine/train/test_distill.py"
    " -k 'of_the_formula or exponentials or measures or ln_2 or gamma_0 or ones_run or pair or trl"
    " or original_length'"
)
_RUNS = (
    "tests/engine/train/test_generation_accuracy.py tests/engine/train/test_guards.py"
    " tests/engine/train/test_mixing_in_a_run.py tests/engine/train/test_terminal.py"
    " -k 'accuracy_is or long_generation or overflows or too_many or collapsed or draws or held_out"
    " or plain_lines or first_step'"
)
_STEP = (
    "tests/engine/train/test_expected_losses.py tests/engine/train/test_router_loss.py"
    " tests/engine/train/test_guards.py tests/engine/loss/test_filter.py"
    " tests/engine/train/test_generation_accuracy.py"
    " -k 'committed or many_packs or overflows or too_many or logs or long_generation'"
)
_KERNELS = (
    " ".join(
        f"tests/kernels/test_{name}.py"
        for name in ("terms", "exactness", "algebra", "sequence_loss", "topk_divergence")
    )
    + " -k 'not triton and not contract and not real_vocab and not finite_diff and not never_above'"
)
TESTS = {
    "engine/loss/objectives.py": _LOSS,
    "engine/loss/packed_loss.py": _LOSS,
    "engine/data/packing.py": "tests/engine/data/test_packing.py",
    "engine/data/schedule.py": (
        "tests/engine/data/test_schedule.py tests/engine/data/test_mixing.py"
        " tests/engine/data/test_summary.py tests/engine/data/test_selection.py"
        " tests/engine/loss/test_authors_options.py"
        " -k 'not every_kind and not leave_the_end and not scored_without and not edited'"
    ),
    "engine/train/loop.py": _RUNS,
    "engine/train/step.py": _STEP,
    "kernels/reference.py": _KERNELS,
    "kernels/chunked.py": _KERNELS,
    "kernels/softmax.py": _KERNELS,
}
"""Arguments of pytest: quick tests of each file."""

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True)
class Mutant:
    """One change of a file."""

    path: Path
    line: int
    before: str
    after: str
    source: str
    """The whole file with the change."""

    def __str__(self) -> str:
        place = f"{self.path.relative_to(ROOT)}:{self.line}"
        return f"{place}: {self.before[:80]!r} -> {self.after[:80]!r}"


def mutants(path: Path) -> list[Mutant]:
    """All changes of a file."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    source = text.encode()
    found = []
    for node in _executed(ast.parse(text)):
        for after in _changes(node):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            changed = (source[:begin] + after.encode() + source[end:]).decode()
            before = source[begin:end].decode()
            found.append(Mutant(path, node.lineno, before, after, changed))
    return found


def _executed(tree: ast.Module) -> Iterator[ast.expr | ast.stmt]:
    """The expressions and statements of a file, without annotations and decorators.

    Those inside of f-strings have no places of their own before Python 3.12.
    """
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        for name, value in () if isinstance(node, ast.JoinedStr) else ast.iter_fields(node):
            if name in ("annotation", "returns", "type_params", "decorator_list"):
                continue
            pending += [one for one in (value if isinstance(value, list) else [value]) if one]
        pending = [one for one in pending if isinstance(one, ast.AST)]
        if isinstance(node, ast.expr | ast.stmt):
            yield node


def _changes(node: ast.expr | ast.stmt) -> Iterator[str]:
    """What may stand in the place of a node."""

    def with_(**fields: object) -> str:
        changed = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(changed, name, value)
        text = ast.unparse(changed)
        return f"({text})" if isinstance(node, ast.expr) else text

    match node:
        case ast.Compare(ops=[op]):
            for other in COMPARISONS[type(op)]:
                yield with_(ops=[other()])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in ARITHMETIC:
            yield with_(op=ARITHMETIC[type(op)]())
        case ast.BoolOp(op=op):
            yield with_(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value)):
            yield str(value + 1)
        case ast.IfExp(test=test):
            yield with_(test=ast.UnaryOp(ast.Not(), test))
        case ast.Continue() | ast.Break() | ast.Raise() | ast.Expr(value=ast.Call()):
            yield "pass"
        case ast.Return(value=ast.expr()):
            yield "return None"


def survives(mutant: Mutant, tests: list[str], sources: Path, seconds: float) -> bool:
    """Whether the tests pass with the change within `seconds`. `sources` holds all packages."""
    changed = sources / "redi" / mutant.path.relative_to(ROOT)
    unchanged = changed.read_text(encoding="utf-8")
    changed.write_text(mutant.source, encoding="utf-8")
    Path(cache_from_source(str(changed))).unlink(missing_ok=True)  # Python knows it by its seconds
    process = FORK.Process(target=_run_tests, args=(tests, sources))
    try:
        process.start()
        process.join(seconds)
        return process.exitcode == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # and its children
        process.join()
        changed.write_text(unchanged, encoding="utf-8")


def _run_tests(tests: list[str], sources: Path) -> NoReturn:
    """Run pytest with `redi` of the folder `sources`, and exit with its status."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.environ |= {"PYTHONPATH": str(sources), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(sources))
    os.chdir(ROOT)
    # The test that killed the last mutant comes first: it often kills the next one.
    cache = ["-o", f"cache_dir={sources / 'cache'}", "--failed-first"]
    os._exit(pytest.main(["--import-mode=importlib", "-qx", *cache, *tests]))


def main() -> int:
    """Returns 1 if fewer mutants are killed than asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="source files to change; default: all of TESTS")
    parser.add_argument("--tests", help="arguments of pytest, quoted; default: those in TESTS")
    parser.add_argument("--lines", help="only lines A-B of the files")
    parser.add_argument("--sample", type=int, help="mutants of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.9, help="share that must be killed")
    asked = parser.parse_args()
    for library in LIBRARIES:
        importlib.import_module(library)
    survived, count = [], 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        sources = Path(folder)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, sources / "redi" / package)
        compileall.compile_dir(sources, quiet=1)
        for name in asked.files or TESTS:
            path = (ROOT / name).resolve()
            found = mutants(path)
            if asked.lines:
                first, _, last = asked.lines.partition("-")
                found = [one for one in found if int(first) <= one.line <= int(last or first)]
            if asked.sample is not None:
                random.Random(asked.seed).shuffle(found)
                del found[asked.sample :]
            left = survivors(path, found, shlex.split(asked.tests or TESTS[name]), sources)
            print(f"{name}: killed {len(found) - len(left)} of {len(found)}", flush=True)
            survived += left
            count += len(found)
    for mutant in survived:
        print(f"survived: {mutant}")
    return int(count - len(survived) < asked.least * count)


def survivors(path: Path, found: list[Mutant], tests: list[str], sources: Path) -> list[Mutant]:
    """The mutants of a file that the tests do not notice."""
    began = time.monotonic()
    if not survives(
        Mutant(path, 0, "", "", path.read_text(encoding="utf-8")), tests, sources, 3600
    ):
        sys.exit(f"{path}: the tests fail without a change")
    seconds = 3 * (time.monotonic() - began) + 10
    left = []
    for number, mutant in enumerate(found, start=1):
        began = time.monotonic()
        alive = survives(mutant, tests, sources, seconds)
        took = time.monotonic() - began
        fate = "SURVIVED" if alive else "killed" if took < seconds else "timed out"
        print(f"{number}/{len(found)} {fate} in {took:.0f} s {mutant}", flush=True)
        left += [mutant] * alive
    return left


if __name__ == "__main__":
    sys.exit(main())
