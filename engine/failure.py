"""The end of a job in which one rank fails while the others wait for it in collectives.

The first rank that fails publishes its message in the job's store. A thread of every rank reads it
there and ends its process by `os._exit`, because the main thread may wait in native code, where no
signal handler of Python runs. Nothing is saved and no process group is destroyed: both would wait
for the other ranks. A checkpoint that is being written stays incomplete, and the next start skips
it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS = 0.5
GRACE_SECONDS = 1.0
"""Seconds that the main thread has to report an error that all ranks raise, in its own words."""
RANK_0_SECONDS = 5.0
"""Seconds that the other ranks wait for rank 0 to print. It may be the rank that is lost."""

_KEY, _PRINTED = "failure", "failure/printed"

_watch: FailureWatch | None = None


class FailureWatch:
    """Watches for a failure of any rank. Rank 0 prints it, the others end silently.

    Args:
        store: shared by all ranks of this start. The watch has a connection of its own, since the
            main thread may wait in this one.
        rank: of this process.
    """

    def __init__(self, store: Store, rank: int) -> None:
        global _watch
        self._store = store.clone()  # type: ignore[attr-defined]  # not in its stubs
        self._rank = rank
        self._finished = threading.Event()
        self._ending = threading.Lock()  # taken by the thread that ends the process
        self._thread = threading.Thread(target=self._run, name="failures", daemon=True)
        self._thread.start()
        _watch = self

    def close(self) -> None:
        """Stop watching: this rank has finished, and others may leave."""
        global _watch
        _watch = None
        self._finished.set()
        self._thread.join()

    def fail(self, line: str, code: int, trace: str) -> NoReturn:
        """Publish this rank's failure and end the process; see `end_job`."""
        self._ending.acquire()
        mine = {"rank": self._rank, "line": line, "code": code}
        first = mine
        with suppress(RuntimeError):  # the store is lost with its host
            first = json.loads(self._store.compare_set(_KEY, "", json.dumps(mine)))
        # All ranks raise some errors, such as a disk that is full. Then it is nobody's in
        # particular.
        shared = first["line"] == line
        if first == mine:
            _write(trace)
        self._leave(mine if shared else first, alone=first == mine)

    def _run(self) -> None:
        while not self._finished.wait(POLL_SECONDS):
            try:
                if not self._store.check([_KEY]):
                    continue
                first, alone = json.loads(self._store.get(_KEY)), False
            except RuntimeError:  # its host is lost, so nobody else's line can be known
                line = "redi: the connection to the job's store is lost; the same command resumes"
                first, alone = {"rank": self._rank, "line": line, "code": 1}, True
            if not self._finished.wait(GRACE_SECONDS):
                self._ending.acquire()
                self._leave(first, alone=alone)

    def _leave(self, failure: dict[str, Any], *, alone: bool) -> NoReturn:
        """Print the failure if that is this rank's part, and end the process.

        Args:
            alone: this rank knows of no failure before, so it prints if rank 0 does not.
        """
        named = failure["line"]
        if failure["rank"]:
            named = named.replace("redi: ", f"redi: rank {failure['rank']}: ", 1)
        if self._rank == 0:
            _write(named)
            with suppress(RuntimeError):
                self._store.set(_PRINTED, "")
            if "TORCHELASTIC_RUN_ID" not in os.environ:  # else torchrun hosts the store
                time.sleep(3 * POLL_SECONDS)
        elif not self._printed() and alone:
            _write(named)
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(failure["code"])

    def _printed(self) -> bool:
        """Wait until rank 0 has printed. Returns False if it has not."""
        deadline = time.monotonic() + RANK_0_SECONDS
        try:
            while time.monotonic() < deadline:
                if self._store.check([_PRINTED]):
                    return True
                time.sleep(0.05)
        except RuntimeError:
            return False
        except KeyboardInterrupt:  # torchrun ends this rank, because rank 0 has left
            return True
        return False


def end_job(line: str, code: int, trace: str = "") -> None:
    """End this process and, within seconds, all other ranks; return only if there are none.

    Args:
        line: printed once for the job, by rank 0 if it lives; with the number of the rank, unless
            rank 0 fails with the same line.
        code: exit code of all ranks.
        trace: printed by this rank if it is the first that fails.
    """
    if _watch is not None:
        _watch.fail(line, code, trace)


def _write(text: str) -> None:
    """Write to stderr at once: the main thread may be writing, and is not waited for."""
    if text:
        above = "\n" if sys.stderr.isatty() else ""  # below a progress line
        with suppress(OSError):  # nobody reads stderr any more; the process ends all the same
            os.write(2, f"{above}{text.rstrip()}\n".encode())
