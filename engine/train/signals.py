"""SIGTERM and SIGINT ask for a stop; the loop decides, on all ranks at the same step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType


class StopRequest:
    """Remembers that a stop was asked for. A context manager: handlers are restored on exit.

    torchrun forwards a signal that ranks may also get directly, so repeats within moments are
    one request. Only a second SIGINT, over two seconds after the first and without torchrun,
    exits at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first_sigint = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        impatient = self._first_sigint and now - self._first_sigint > 2
        if number == signal.SIGINT and impatient and "TORCHELASTIC_RUN_ID" not in os.environ:
            os._exit(130)
        if number == signal.SIGINT and not self._first_sigint:
            self._first_sigint = now
        self.asked = True
