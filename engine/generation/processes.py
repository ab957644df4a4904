"""What worker processes of a command have in common."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
import threading
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """Kill this process and those that it has started once its parent ends, even by SIGKILL.

    Call it first in a worker process. The process leaves the parent's process group, so a Ctrl-C on
    the terminal reaches the parent only, which then ends its workers.
    """
    os.setpgrp()
    parent = multiprocessing.parent_process()
    assert parent is not None, "only worker processes call it"

    def watch() -> None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def limit_cpu(seconds: float) -> None:
    """Let the kernel end this process after that much more CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
