"""Changes source files at one place at a time and reports the changes that no test notices.

    python tests/mutants.py engine/train/loop.py --tests tests/engine/train/test_resume.py

Each mutant is a copy of the sources, so the checkout stays as it is. A mutant is killed if the
tests fail or take three times as long as without it.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "kernels", "bench")

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
    """The expressions and statements of a file, without annotations.

    Those inside of f-strings have no places of their own before Python 3.12.
    """
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        for name, value in () if isinstance(node, ast.JoinedStr) else ast.iter_fields(node):
            if name in ("annotation", "returns", "type_params"):
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


def survives(mutant: Mutant, tests: list[str], seconds: float) -> bool:
    """Whether the tests pass with the change within `seconds`."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copied = Path(folder, "redi")
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copied / package)
        (copied / mutant.path.relative_to(ROOT)).write_text(mutant.source, encoding="utf-8")
        return _passes(tests, folder, seconds)


def _passes(tests: list[str], sources: str, seconds: float) -> bool:
    """Whether the tests pass with `redi` of the folder `sources`; redi is a namespace package."""
    pytest = str(Path(sys.executable).with_name("pytest"))  # `-m pytest` would import from here
    line = [pytest, "--import-mode=importlib", "-qx", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": sources, "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # and its children
            return False


def main() -> int:
    """Returns 1 if fewer mutants are killed than asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="source files to change")
    parser.add_argument(
        "--tests", required=True, help="arguments of pytest, quoted: 'FILE -k NAME'"
    )
    parser.add_argument("--lines", help="only lines A-B of the files")
    parser.add_argument("--sample", type=int, help="number of mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.9, help="share that must be killed")
    asked = parser.parse_args()
    found = [one for path in asked.files for one in mutants(path.resolve())]
    if asked.lines:
        first, _, last = asked.lines.partition("-")
        found = [one for one in found if int(first) <= one.line <= int(last or first)]
    if asked.sample is not None:
        random.Random(asked.seed).shuffle(found)
        del found[asked.sample :]
    if not found:
        print("no place to change")
        return 2
    began = time.monotonic()
    unchanged = Mutant(found[0].path, 0, "", "", found[0].path.read_text(encoding="utf-8"))
    tests = shlex.split(asked.tests)
    if not survives(unchanged, tests, 3600):
        print("the tests fail without a change")
        return 2
    seconds = 3 * (time.monotonic() - began) + 10
    left = []
    for number, mutant in enumerate(found, start=1):
        alive = survives(mutant, tests, seconds)
        print(f"{number}/{len(found)} {'SURVIVED' if alive else 'killed'} {mutant}", flush=True)
        left += [mutant] * alive
    killed = len(found) - len(left)
    print(f"killed {killed} of {len(found)}, {killed / len(found):.0%}")
    for mutant in left:
        print(f"survived: {mutant}")
    return int(killed < asked.least * len(found))


if __name__ == "__main__":
    sys.exit(main())
