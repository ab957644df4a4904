"""One command at a time trains in a run directory."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from redi.engine.errors import InputError
from redi.engine.storage import shown


class RunLock:
    """A lock of a run directory. The system releases it when the process ends, however it ends.

    A context manager that releases it. Some network file systems lock no directories; there is no
    protection then.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, run_dir: Path) -> None:
        """Lock a directory, if it exists and is not locked yet by this object.

        Raises:
            InputError: another command trains in it.
        """
        if self._descriptor is not None or not run_dir.is_dir():
            return
        with suppress(OSError):
            descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise InputError(
                    f"run.dir: another command trains in {shown(run_dir)}; wait for its end, or "
                    "choose another run.dir"
                ) from None
            except OSError:
                os.close(descriptor)
                raise
            self._descriptor = descriptor

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
