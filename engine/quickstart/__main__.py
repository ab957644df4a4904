"""Make the quickstart's data and model, or report on its three runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from redi.engine.quickstart.task import explain, make


def main() -> None:
    """`python -m redi.engine.quickstart.task make FOLDER`, and `report FOLDER` after training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "report"))
    parser.add_argument("folder", type=Path, help="such as runs/quickstart")
    parser.add_argument("--problems", type=int, default=8000, help="of make: to train on")
    parser.add_argument("--held_out", type=int, default=500, help="of make: to evaluate on")
    parser.add_argument("--seed", type=int, default=0, help="of make")
    arguments = parser.parse_args()
    if arguments.what == "make":
        print(explain(), file=sys.stderr)
        make(arguments.folder, arguments.problems, arguments.held_out, arguments.seed)
        return
    from redi.engine.quickstart.report import report  # imports torch

    report(arguments.folder)


main()
