"""`python -m redi.bench.learning`; its workers import what they run, which this file cannot be."""

import os
import signal
import sys


def _leave(*_: object) -> None:
    print("stopped before it had begun", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    # Imports take seconds, and some turn a KeyboardInterrupt into an error of their own.
    signal.signal(signal.SIGINT, _leave)
    from redi.bench.learning.study import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
