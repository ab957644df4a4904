"""Make the quickstart's data and model, or report its runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from redi.engine.quickstart.task import explain, make


def main() -> None:
    """`python -m redi.engine.quickstart make DIR`; after training `... report DIR`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "report"), help="make data, or report results")
    parser.add_argument("folder", type=Path, help="directory, such as runs/quickstart")
    parser.add_argument("--problems", type=int, default=8000, help="make: training problems")
    parser.add_argument("--held_out", type=int, default=500, help="make: evaluation problems")
    parser.add_argument("--seed", type=int, default=0, help="make: random seed")
    arguments = parser.parse_args()
    if arguments.what == "make":
        print(explain(), file=sys.stderr)
        make(arguments.folder, arguments.problems, arguments.held_out, arguments.seed)
        return
    from redi.engine.quickstart.report import report_quickstart  # imports torch

    report_quickstart(arguments.folder)


main()
