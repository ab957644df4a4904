"""The record, tables and picture of the study, from its runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from redi.bench.learning.prediction import count_habit, share_by_contexts, share_by_one_row
from redi.bench.learning.students import TEMPERATURE, StudyRuns, cell_path
from redi.bench.learning.tasks import HABIT, TASKS
from redi.bench.learning.trial import read_pairs
from redi.bench.report import environment
from redi.engine.console import print_table
from redi.engine.generation.scoring import mean_and_error, paired_difference

CONTROL = "control"
ALPHAS = {CONTROL: 0.0, "REDI 0.2": 0.2, "REDI 0.5": 0.5, "REDI 0.8": 0.8, "REDI 1": 1.0}
"""Alpha by method."""
Record = dict[str, Any]


def collect(folder: Path, task: str, study: StudyRuns) -> Record:
    """All figures of a task's runs: test results by seed, means over seeds of the curves."""
    trials = [folder / f"{task}-{seed}" for seed in range(1, study.seeds + 1)]
    starts = [_read(trial / "stage-1.json") for trial in trials]
    methods = {}
    runs = []
    for method in study.methods:
        rates = {}
        for rate in study.rates:
            found = [_read(cell_path(trial, method.name, rate)) for trial in trials]
            runs += found
            rates[f"{rate:g}"] = {
                "figures": _by_seed([_figures(run) for run in found]),
                "steps": _means([run["steps"] for run in found]),
                "looks": _means([run["looks"] for run in found]),
            }
        methods[method.name] = {"chosen": choose_rate(rates), "rates": rates}
    record = {
        "task": task,
        "seeds": study.seeds,
        "cpu_seconds": sum(run["cpu_seconds"] for run in starts + runs),
        "pairs": {key: fmean(one["pairs"][key] for one in starts) for key in starts[0]["pairs"]},
        "stage 1": _by_seed([_figures(start) for start in starts]),
        "methods": methods,
    }
    if task == HABIT.name and methods.keys() >= ALPHAS.keys():
        record["predicted fault"] = _predictions(trials)
    return record


def _read(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))


def _figures(run: Record) -> dict[str, float]:
    """The figures reported for a student, by name."""
    sampled = run["test"]["sampled"]
    (best,) = (name for name in sampled if name.startswith("pass@"))
    found = {
        "validation": run["validation"]["sampled"]["accuracy"],
        "greedy": run["test"]["greedy"]["accuracy"],
        "sampled": sampled["accuracy"],
        best: sampled[best],
        "well formed": sampled["well_formed"],
        "fault": run["test"]["unsharpened"]["fault"],
    }
    last = run["looks"][-1]
    return found | {sign: last[f"{sign}_logp"] for sign in ("positive", "negative")}


def _by_seed(runs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [round(run[name], 5) for run in runs] for name in runs[0]}


def _means(courses: Sequence[Sequence[Record]]) -> dict[str, list[float]]:
    """Means over seeds of the records of each step."""
    names = [name for name, value in courses[0][0].items() if value is not None]
    return {
        name: [
            round(fmean(line[name] for line in lines), 5) for lines in zip(*courses, strict=True)
        ]
        for name in names
    }


def choose_rate(rates: dict[str, Record]) -> str:
    """The learning rate with the best sampled accuracy on validation problems; ties: the lowest."""
    ordered = sorted(rates, key=float)
    return max(ordered, key=lambda rate: fmean(rates[rate]["figures"]["validation"]))


def _predictions(trials: Sequence[Path]) -> dict[str, list[list[float]]]:
    """Shares of blank boxes that two tables predict, by alpha and seed."""
    pairs = [read_pairs(trial) for trial in trials]
    counts = [
        (count_habit([pair[1] for pair in some]), count_habit([pair[2] for pair in some]))
        for some in pairs
    ]
    return {
        name: [[round(predict(*both, alpha), 5) for both in counts] for alpha in ALPHAS.values()]
        for name, predict in (("one row", share_by_one_row), ("by context", share_by_contexts))
    }


def chosen(record: Record, method: str) -> Record:
    """A method's figures and curves at the learning rate chosen for it."""
    found = record["methods"][method]
    return found["rates"][found["chosen"]]


def result_table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for stage 1 and each method at its rate, in per cent.

    Δ is the difference from the control, seed by seed; ± is the standard error over seeds.
    """
    control = chosen(record, CONTROL)["figures"]
    (best,) = (name for name in control if name.startswith("pass@"))
    columns = ["", "lr", "greedy", "Δ greedy", "sampled", "Δ sampled", best, "formed", "fault"]
    columns += ["logp +", "logp -"]
    students = {"stage 1": ("", record["stage 1"])}
    students |= {
        name: (found["chosen"], chosen(record, name)["figures"])
        for name, found in record["methods"].items()
    }
    rows = []
    for name, (rate, figures) in students.items():
        row = [name, rate]
        for figure in ("greedy", "sampled"):
            difference = _percent(paired_difference(figures[figure], control[figure]), "+")
            row += [
                _percent(mean_and_error(figures[figure])),
                "" if name == CONTROL else difference,
            ]
        row += [f"{100 * fmean(figures[key]):.1f}" for key in (best, "well formed", "fault")]
        row += [f"{fmean(figures[sign]):.2f}" for sign in ("positive", "negative")]
        rows.append(row)
    return columns, rows


def rate_table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Columns, and for each method greedy and sampled accuracy at every rate, in per cent."""
    rows = []
    for name, found in record["methods"].items():
        cells = [
            " / ".join(f"{100 * fmean(one['figures'][key]):.0f}" for key in ("greedy", "sampled"))
            for one in found["rates"].values()
        ]
        rows.append([name, *cells])
    return ["greedy / sampled", *_rate_columns(record)], rows


def _rate_columns(record: Record) -> list[str]:
    return [f"lr {rate}" for rate in record["methods"][CONTROL]["rates"]]


def worst_table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Columns, and for each method its worst rate: sampled accuracy and form less the control's.

    Both are differences from the control at the same rate, in points, means over seeds.
    """
    control = record["methods"][CONTROL]["rates"]
    rows = []
    for name, found in record["methods"].items():
        cells = [name]
        for figure in ("sampled", "well formed"):
            differences = {
                rate: fmean(one["figures"][figure]) - fmean(control[rate]["figures"][figure])
                for rate, one in found["rates"].items()
            }
            rate = min(differences, key=differences.__getitem__)
            cells += [f"{100 * differences[rate]:+.1f}", rate]
        rows.append(cells)
    return ["worst rate", "sampled", "at lr", "formed", "at lr"], rows


def prediction_table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Columns, and for each alpha the share of blanks, predicted and measured."""
    predicted = record["predicted fault"]
    columns = ["alpha", *(f"predicted, {table}" for table in predicted)]
    columns += _rate_columns(record)
    rows = []
    for place, (name, alpha) in enumerate(ALPHAS.items()):
        lists = [predicted[table][place] for table in predicted]
        lists += [one["figures"]["fault"] for one in record["methods"][name]["rates"].values()]
        rows.append([f"{alpha:g}", *(_percent(mean_and_error(by_seed)) for by_seed in lists)])
    return columns, rows


def _percent(value: tuple[float, float], sign: str = "") -> str:
    return f"{100 * value[0]:{sign}.1f}±{100 * value[1]:.1f}"


def report(folder: Path, study: str, runs: StudyRuns, out: Path | None) -> None:
    """Print the tables of each task; write records and pictures to `out`, if given."""
    records = []
    prefix = "learning" if study == "alpha" else study
    for task in runs.tasks:
        record = collect(folder, task, runs)
        records.append(record)
        title = (
            f"{TASKS[task].title}. Sampled at T = {TEMPERATURE}; Δ: minus the control's; "
            f"fault: {TASKS[task].fault}, at T = 1"
        )
        print_table(title, *result_table(record), file=sys.stdout)
        print_table("Every learning rate", *rate_table(record), file=sys.stdout)
        if study == "bounded":
            print_table("Minus the control's, same rate", *worst_table(record), file=sys.stdout)
        if "predicted fault" in record:
            print_table("Boxes left blank at T = 1", *prediction_table(record), file=sys.stdout)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            settings = _read(folder / "settings.json")
            content = {**environment(settings["device"]), "sizes": settings, **record}
            path = out / f"{prefix}-{task}.json"
            path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    if out is None:
        return
    from redi.bench.learning.picture import draw, draw_methods

    if study != "alpha":
        draw_methods(records, out / f"{prefix}.png")
        return
    for record in records:
        draw(record, out / f"{prefix}-{record['task']}.png")
