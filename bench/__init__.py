"""Benchmarks, each a program: `python -m redi.bench.NAME`; README.md lists them.

They import what they measure at the top. If a package is missing because only the kernels are
installed, a program ends with one line instead of a traceback.
"""

import sys
from types import TracebackType

_traceback = sys.excepthook


def _name_the_extra(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not isinstance(error, ModuleNotFoundError) or (error.name or "redi").startswith("redi"):
        _traceback(kind, error, trace)
        return
    extra = "triton" if error.name == "triton" else "engine"
    # Not sys.stderr: the hook of torch.distributed, which calls this one, replaces it by a buffer.
    print(
        f"{error.name} is not installed: pip install 'redi-engine[{extra}]'",
        file=sys.__stderr__,
        flush=True,
    )
    raise SystemExit(2)


if sys.argv[0] == "-m":  # Python is looking for the program in this package, not a caller's import
    sys.excepthook = _name_the_extra
