"""SIGTERM and SIGINT request a stop. The training loop stops all ranks after the same step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Records stop requests. A context manager: it restores the previous handlers on exit.

    torchrun forwards a signal that ranks may also get directly, so signals in quick succession
    count as one request. Only a second SIGINT, over two seconds after the first and without
    torchrun, exits at once.

    Args:
        verbose: True if this process prints a line on the first request.

    Attributes:
        requested: True once a stop was requested.
    """

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self.requested = False
        self._interruptible = False
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
        """Within the context, a stop request raises at once: no work would be lost.

        Args:
            when: False: requests are only recorded, because other ranks would wait for this one.

        Raises:
            KeyboardInterrupt: a stop was requested, in the context or before it.
        """
        self._interruptible = when
        try:
            self._raise_if_requested()
            yield
            self._raise_if_requested()  # the handler may have raised where it was dropped
        except Exception:
            if when and self.requested:  # a library turned the interrupt into its own error
                raise KeyboardInterrupt from None
            raise
        finally:
            self._interruptible = False

    def _raise_if_requested(self) -> None:
        if self.requested and self._interruptible:
            self._interruptible = False  # once: clean-up is not interrupted
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        repeated = self._first_sigint and now - self._first_sigint > 2
        if number == signal.SIGINT and repeated and "TORCHELASTIC_RUN_ID" not in os.environ:
            os._exit(130)
        if number == signal.SIGINT and not self._first_sigint:
            self._first_sigint = now
        # Set before anything is printed: a second signal may arrive meanwhile.
        first, self.requested = not self.requested, True
        self._raise_if_requested()
        if first and self._verbose:
            # Not by print: the signal may have interrupted one.
            again = "; Ctrl-C again exits without saving" if number == signal.SIGINT else ""
            os.write(2, f"\nstopping after this step and its checkpoint{again}\n".encode())
