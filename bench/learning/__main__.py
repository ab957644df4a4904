"""`python -m redi.bench.learning`; the study is in `study.py`, which its workers can import."""

import os
import signal
import sys


def _leave(*_: object) -> None:
    print("stopped before the study began", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    # Imports take seconds, and some turn a KeyboardInterrupt into another error.
    signal.signal(signal.SIGINT, _leave)
    from redi.bench.learning.study import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its workers would outlive it
    main()
