"""SIGTERM and SIGINT ask for a stop; the loop decides, on all ranks at the same step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Remembers that a stop was asked for. A context manager: handlers are restored on exit.

    torchrun forwards a signal that ranks may also get directly, so repeats within moments are
    one request. Only a second SIGINT, over two seconds after the first and without torchrun,
    exits at once.

    Args:
        speaks: whether this process says that it was asked.
    """

    def __init__(self, *, verbose: bool) -> None:
        self._speaks = verbose
        self.asked = False
        self._breaks_off = False
        self._first_sigint = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def interruptible(self, when: bool = True) -> Iterator[None]:
        """Work that loses nothing when it ends in the middle: a request ends it at once.

        Args:
            when: False leaves the block as it is, because other ranks would wait for this one.

        Raises:
            KeyboardInterrupt: a stop was asked for, in the block or before it.
        """
        self._breaks_off = when
        try:
            self._break_off()
            yield
            self._break_off()  # the first one may have come where Python drops exceptions
        finally:
            self._breaks_off = False

    def _break_off(self) -> None:
        if self.asked and self._breaks_off:
            self._breaks_off = False  # once: what cleans up is left alone
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        impatient = self._first_sigint and now - self._first_sigint > 2
        if number == signal.SIGINT and impatient and "TORCHELASTIC_RUN_ID" not in os.environ:
            os._exit(130)
        if number == signal.SIGINT and not self._first_sigint:
            self._first_sigint = now
        # Set before anything is written: a second signal may come meanwhile.
        first, self.asked = not self.asked, True
        self._break_off()
        if first and self._speaks:
            # Not through print: the signal may have come in the middle of one.
            again = "; Ctrl-C again leaves at once, unsaved" if number == signal.SIGINT else ""
            os.write(2, f"\nstopping: this step is finished and saved first{again}\n".encode())
