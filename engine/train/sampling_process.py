"""The process that generates `[eval] samples`: `redi evaluate` at low priority.

It ends when its standard input closes, which the kernel does however training ends. So it is
started with a pipe that only the training process can write to, and in a process group that holds
also the processes that check answers.

Usage: python -m redi.engine.train.sampling_process OPTIONS, the options of `redi evaluate` as JSON.
"""

import json
import os
import signal
import sys
import threading

NICENESS = 10


def _end_with_training() -> None:
    os.read(0, 1)  # not sys.stdin: its lock would be held while the interpreter exits
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Sample, unless training ends before."""
    threading.Thread(target=_end_with_training, daemon=True).start()
    os.nice(NICENESS)

    from redi.engine.evaluate.command import run  # imports torch, for seconds
    from redi.engine.evaluate.options import EvaluateOptions

    run(EvaluateOptions(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
