"""The end of a job in which one rank fails while the others wait for it in collectives.

The first rank that fails publishes its message in the job's store, before it closes any file. A
thread of every rank reads it there and ends its process by `os._exit`, because the main thread may
wait in native code, where no signal handler of Python runs. Only a rank that has failed too has
time to close its files first. Nothing is saved and no process group is destroyed: both would wait
for the other ranks. A checkpoint that is being written stays incomplete, and the next start skips
it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from redi.engine.errors import InputError, RunError
from redi.engine.output import printable

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS = 0.5
GRACE_SECONDS = 1.0
"""Seconds that the main thread has to report an error that all ranks raise."""
CLOSING_SECONDS = 30.0
"""Seconds that a rank which has failed has to close and upload its files."""
RANK_0_SECONDS = 5.0
"""Seconds that the other ranks wait for rank 0 to print. It may be the rank that is lost."""
STORE_SECONDS = 30.0
"""Seconds in which a lost connection to the store may be made again."""
CONNECT_SECONDS = 3
"""Maximum seconds of one attempt to connect."""

_KEY, _PRINTED = "failure", "failure/printed"
_KNOWN, _KNOWN_TO_ALL = "failure/known", "failure/known_to_all"

_watch: FailureWatch | None = None


class FailureWatch:
    """Watches for a failure of any rank. Rank 0 prints it, the others end silently.

    Args:
        store: shared by all ranks of this start. The watch opens another connection, since the
            main thread may wait in this one.
        rank, size: of this process, and number of processes.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        global _watch
        self._store = _connect(store)
        self._rank = rank
        self._size = size
        self._announced: dict[str, Any] | None = None  # this rank's failure
        self._printed = False
        self._finished = threading.Event()  # without a failure
        self._closed = threading.Event()  # the main thread, after a failure
        self._thread = threading.Thread(target=self._run, name="failures", daemon=True)
        self._thread.start()
        _watch = self

    def close(self) -> None:
        """Stop watching: this rank has finished, and others may leave."""
        global _watch
        _watch = None
        self._finished.set()
        self._thread.join()

    def announce(self, line: str, code: int, trace: str) -> None:
        """Publish this rank's failure; see `end_job`. Only the first call has an effect."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, after another rank has left
        if self._announced is not None:
            return
        failure = {"rank": self._rank, "line": line, "code": code}
        self._announced = first = failure
        with suppress(RuntimeError):  # the store is lost with its host
            first = json.loads(self._store.compare_set(_KEY, "", json.dumps(failure)))
        if first == failure:
            _write(trace)
        if self._rank == 0:
            self._print(first)

    def fail(self, line: str, code: int, trace: str) -> NoReturn:
        """Publish this rank's failure unless it is, and end the process, whose files are closed."""
        self.announce(line, code, trace)
        self._closed.set()
        while self._thread.is_alive():  # it ends the process
            with suppress(KeyboardInterrupt):
                self._thread.join()
        os._exit(code)

    def _run(self) -> None:
        failure = self._await_failure()
        if failure is None:
            return
        # NCCL aborts a rank that waits for one that has left. So all leave at the same time.
        with suppress(RuntimeError):
            if self._store.add(_KNOWN, 1) == self._size:
                self._store.set(_KNOWN_TO_ALL, "")
        self._appears(_KNOWN_TO_ALL, 2 * POLL_SECONDS)
        if self._finished.wait(GRACE_SECONDS):
            return
        if self._announced is not None:
            self._closed.wait(CLOSING_SECONDS)
        self._leave(failure)

    def _await_failure(self) -> dict[str, Any] | None:
        """The failure that was published first; None if this rank has finished."""
        lost_at = None
        while not self._finished.wait(POLL_SECONDS):
            try:
                if self._store.check([_KEY]):
                    return dict(json.loads(self._store.get(_KEY)))
                lost_at = None
            except RuntimeError:
                lost_at = lost_at or time.monotonic()
                if self._announced is not None:
                    return self._announced
                if time.monotonic() - lost_at > STORE_SECONDS:  # nobody else's line can be known
                    line = (
                        "redi: the connection to the job's store is lost; the same command resumes"
                    )
                    return {"rank": self._rank, "line": line, "code": 1}
                with suppress(RuntimeError):
                    self._store = _connect(self._store)
        return None

    def _leave(self, failure: dict[str, Any]) -> NoReturn:
        """Print the failure if that is this rank's part, and end the process."""
        if self._rank == 0:
            self._print(failure)
            if "TORCHELASTIC_RUN_ID" not in os.environ:  # else torchrun hosts the store
                time.sleep(3 * POLL_SECONDS)
        elif failure["rank"] == self._rank and not self._appears(_PRINTED, RANK_0_SECONDS):
            _write(_named(failure))
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(failure["code"])

    def _print(self, failure: dict[str, Any]) -> None:
        """Print the failure on rank 0, once for the job."""
        if self._printed:
            return
        self._printed = True
        # All ranks raise some errors, such as a collapse. Then it is nobody's in particular.
        shared = self._announced is not None and self._announced["line"] == failure["line"]
        _write(failure["line"] if shared else _named(failure))
        with suppress(RuntimeError):
            self._store.set(_PRINTED, "")

    def _appears(self, key: str, seconds: float) -> bool:
        """Wait until another rank has set a key. Returns False if none has."""
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError):
            while time.monotonic() < deadline:
                if self._store.check([key]):
                    return True
                time.sleep(0.05)
        return False


@contextmanager
def announced() -> Iterator[None]:
    """Publish an error of the block before the contexts around it close, which may take long."""
    try:
        yield
    except Exception as error:
        if _watch is not None:
            known = isinstance(error, InputError | RunError)
            line = f"redi: {error}" if known else f"redi: {describe(error)}"
            code = 2 if isinstance(error, InputError) else 1
            _watch.announce(line, code, "" if known else traceback.format_exc())
        raise


def describe(error: BaseException) -> str:
    """The type and message of an unexpected error, as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def end_job(line: str, code: int, trace: str = "") -> None:
    """End this process and, within seconds, all other ranks; return only if there are none.

    What this rank has announced before takes the place of the arguments.

    Args:
        line: printed once for the job, by rank 0 if it lives; with the number of the rank, unless
            rank 0 fails with the same line.
        code: exit code of all ranks.
        trace: printed by this rank if it is the first that fails.
    """
    if _watch is not None:
        _watch.fail(line, code, trace)


def _connect(store: Store) -> Store:
    """Another connection to the store."""
    connection: Store = store.clone()  # type: ignore[attr-defined]  # not in its stubs
    connection.set_timeout(timedelta(seconds=CONNECT_SECONDS))
    return connection


def _named(failure: dict[str, Any]) -> str:
    """The line of a failure, with its rank unless that is 0."""
    line: str = failure["line"]
    return line.replace("redi: ", f"redi: rank {failure['rank']}: ", 1) if failure["rank"] else line


def _write(text: str) -> None:
    """Write to stderr at once: the main thread may be writing, and is not waited for."""
    if text:
        above = "\n" if sys.stderr.isatty() else ""  # below a progress line
        with suppress(OSError):  # nobody reads stderr any more; the process ends all the same
            os.write(2, f"{above}{printable(text.rstrip())}\n".encode())
