"""Benchmarks, each a program: `python -m redi.bench.NAME`.

They import at the top what they measure. Where that is a package which an installation of the
kernels alone leaves out, the program ends with one line instead of a traceback.
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
    # Not sys.stderr: torch.distributed's own hook, which calls this one, has put a buffer there.
    print(
        f"{error.name} is not installed: pip install 'redi-engine[{extra}]'",
        file=sys.__stderr__,
        flush=True,
    )
    raise SystemExit(2)


sys.excepthook = _name_the_extra
