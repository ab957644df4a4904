"""When do incorrect traces help? A study of small students, with error bars.

For each of the teachers of `tasks.py`, `python -m redi.bench.learning` trains students of several
seeds on correct traces (stage 1). From each student it runs every method at every learning rate of
one grid. A method's learning rate is the best one on validation problems, over all seeds; the
results are measured on other problems. There are three sets of methods (`students.py`):

    --study alpha     REDI with alpha from 0, the control, to 1, and other objectives; three tasks
    --study bounded   bounded terms for incorrect traces beside control and REDI; five tasks
    --study teacher   a teacher's distributions instead of samples; one task (`teacher.py`)

The first takes about 70 minutes of CPU time in two processes, the second three times as much, the
third 28. The same command resumes: each run of stage 2 is saved when it is complete, and a study
that was stopped is continued with the first of its seeds that lack runs. A finished study prints
its tables again. Needs the extra `engine`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from redi.bench.learning.report import report
from redi.bench.learning.students import (
    BOUNDED_METHODS,
    METHODS,
    RATES,
    TEACHER_METHODS,
    StudyRuns,
    examine,
    look,
    reference_logps,
    teach_stage_1,
    teach_stage_2,
)
from redi.bench.learning.tasks import TASKS
from redi.bench.learning.trial import (
    StudySizes,
    describe_pairs,
    open_trial,
    whole_folder,
    write_trial,
)

STUDIES = {
    "alpha": (METHODS, ("habit", "slips", "pits")),
    "bounded": (BOUNDED_METHODS, tuple(TASKS)),
    "teacher": (TEACHER_METHODS, ("habit",)),
}
"""Methods and tasks by the name of the study."""
TINY = StudySizes(
    problems=80,
    validation=8,
    test=8,
    samples=2,
    hidden=16,
    layers=1,
    stage_1=0.02,
    stage_1_batch=8,
    steps=4,
    batch=4,
    log_every=1,
    look_every=2,
)


def run_seed(
    task: str, seed: int, runs: StudyRuns, sizes: StudySizes, folder: Path, device: str
) -> None:
    """Run what is missing of one task and seed, one record after another."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    own = folder / f"{task}-{seed}"
    if not own.is_dir():
        with whole_folder(own) as unfinished:
            write_trial(TASKS[task], seed, sizes, unfinished)
    trial = open_trial(TASKS[task], seed, sizes, own, torch.device(device))
    start = own / "stage-1.json"
    if not start.exists():
        began = time.process_time()
        student = teach_stage_1(trial)
        seconds = time.process_time() - began
        looks = [{"step": 0, **look(trial, student)}]
        record = {"pairs": describe_pairs(trial), "looks": looks, **examine(trial, student)}
        _write(start, {**record, "cpu_seconds": seconds})

    @cache
    def reference() -> torch.Tensor:
        return reference_logps(trial, teach_stage_1(trial))

    for path, (method, rate) in runs.cells(folder, task, seed).items():
        if not path.exists():
            began = time.process_time()
            record = teach_stage_2(trial, method, rate, reference)
            _write(path, {**record, "cpu_seconds": time.process_time() - began})


def _write(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically."""
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record) + "\n", encoding="utf-8")
    unfinished.rename(path)


def run_study(runs: StudyRuns, sizes: StudySizes, folder: Path, device: str, workers: int) -> None:
    """Run what is missing, one task and seed per worker at a time, with a progress bar."""
    cells = {
        (task, seed): list(runs.cells(folder, task, seed))
        for seed in range(1, runs.seeds + 1)
        for task in runs.tasks
    }

    def done() -> int:
        return sum(cell.exists() for own in cells.values() for cell in own)

    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context) as pool,
        tqdm(total=sum(map(len, cells.values())), initial=done(), unit="run") as bar,
    ):
        # Workers inherit the blocked signal, so that only this process handles Ctrl-C.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        pending = {
            pool.submit(run_seed, *trial, runs, sizes, folder, device)
            for trial, own in cells.items()
            if not all(cell.exists() for cell in own)
        }
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            while pending:
                finished, pending = wait(pending, timeout=2, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                bar.update(done() - bar.n)
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()  # else the pool waits many minutes for the current seeds
            raise


def check_settings(folder: Path, sizes: StudySizes, device: str) -> None:
    """Record the settings of a folder's runs, or compare with those recorded.

    Raises:
        SystemExit: a setting differs.
    """
    path = folder / "settings.json"
    settings = {**asdict(sizes), "device": device}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, settings)
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if before.get(key) != value:
            raise SystemExit(
                f"{folder} has runs with {key} = {before.get(key)}, now {value}; choose another "
                "--folder, or change it back to resume"
            )


def main() -> None:
    """Run the study, print its tables, and write records and pictures to --out."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", choices=STUDIES, default="alpha", help="the set of methods")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all of the study")
    parser.add_argument("--rates", nargs="+", type=float, choices=RATES, default=list(RATES))
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"), help="of all runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: those of the study")
    parser.add_argument("--seeds", type=int, default=5, help="students of each task")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--device", default="cpu", help="for example cuda")
    parser.add_argument("--steps", type=int, help="of stage 2, a multiple of 20")
    parser.add_argument("--problems", type=int, help="to train on, for each task and seed")
    parser.add_argument("--hidden", type=int, help="width of the students")
    parser.add_argument("--tiny", action="store_true", help="checks that everything runs: 1 minute")
    parser.add_argument("--out", type=Path, help="folder for a record and a picture of each task")
    args = parser.parse_args()
    given = {
        key: getattr(args, key)
        for key in ("steps", "problems", "hidden")
        if getattr(args, key) is not None
    }
    try:
        sizes = replace(TINY if args.tiny else StudySizes(), **given)
    except ValueError as error:
        parser.error(str(error))
    methods, tasks = STUDIES[args.study]
    names = [method.name for method in methods]
    if unknown := set(args.methods or ()) - set(names):
        parser.error(f"--methods: unknown {', '.join(unknown)}; available: {', '.join(names)}")
    chosen = [method for method in methods if method.name in (args.methods or names)]
    runs = StudyRuns(args.tasks or tasks, args.seeds, chosen, args.rates)
    check_settings(args.folder, sizes, args.device)
    try:
        run_study(runs, sizes, args.folder, args.device, args.workers)
    except KeyboardInterrupt:
        print("stopped; the same command resumes after the finished runs", file=sys.stderr)
        raise SystemExit(130) from None
    report(args.folder, args.study, runs, args.out)
