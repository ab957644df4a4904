"""Output of the loss benchmark: machine and versions, table, JSON record, picture."""

import json
import math
import os
import platform
import re
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "triton",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "trl",
    "verl",
    "transformers",
)
# Okabe and Ito's colours, which the colour-blind can distinguish.
OURS, OTHERS, FLOOR = "#D55E00", "#56B4E9", "#999999"
ERRORS = {
    "logp_error": ("log-prob, max abs", "o", "#000000"),
    "dhidden_error": ("dX, relative", "^", "#0072B2"),
    "dweight_error": ("dW, relative", "s", "#009E73"),
}


def environment(device: str) -> dict[str, Any]:
    """Machine, versions and commit, for the record."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def output_of(*command: str) -> str | None:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    return {
        "hardware": hardware_name(device),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": output_of(*git, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(output_of(*git, "status", "--porcelain")),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware_name(device: str) -> str:
    """The card's name, or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def title(record: dict[str, Any]) -> str:
    """Title of a record of the loss, in one line."""
    sizes = record["sizes"]
    loss = "REDI loss" if sizes.get("loss", "redi") == "redi" else "Divergence to a teacher"
    return (
        f"{loss}, forward + backward: T {sizes['tokens']}, V {sizes['vocab']}, "
        f"D {sizes['hidden']}, {sizes['dtype']}, {sizes.get('inputs', 'random')} inputs, "
        f"{record['hardware']}"
    )


HEADER = (
    *("", "median", "fastest .. slowest", "x floor", "peak extra"),
    *("logp bias", "logp", "dX", "dW error"),
)


def label_of(row: dict[str, Any]) -> str:
    """A row's name, marked if its result was wrong."""
    return f"{row['name']} REJECTED" if row.get("rejected") else str(row["name"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    errors = (row.get(key) for key in ("logp_bias", *ERRORS))
    peak = row["peak_extra_mib"]
    return (
        label_of(row),
        f"{1e3 * row['median_s']:.1f} ms",
        " .. ".join(f"{1e3 * seconds:.1f}" for seconds in row["spread_s"]),
        f"{row['times_floor']:.3f}",
        "" if peak is None else f"{peak:.0f} MiB",
        *("" if error is None else f"{error:.1e}" for error in errors),
    )


def print_table(record: dict[str, Any]) -> None:
    """Print the record's rows, then the methods that were not measured, with the reason."""
    lines = [_cells(row) for row in record["rows"]]
    print(title(record))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in (HEADER, *lines)) for i in range(len(HEADER))]
        for line in (HEADER, *lines):
            name, *rest = (
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            print("  ".join([name, *rest]))
    else:
        table = Table(*HEADER, box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for line in lines:
            table.add_row(*line)
        # Wide enough for the table, also if the output is not a terminal.
        Console(width=140, highlight=False).print(table)
    for what in ("failed", "absent"):
        for name, reason in record[what].items():
            print(f"{what}: {name}: {reason}")


def write_record(record: dict[str, Any], folder: Path) -> Path:
    """Write FOLDER/BENCHMARK_HARDWARE_SIZES[_LABEL]_DATE.json; returns its path."""
    sizes = record["sizes"]
    slug = re.sub(r"[^a-z0-9]+", "-", record["hardware"].lower()).strip("-")
    shape = f"t{sizes['tokens']}-v{sizes['vocab']}-d{sizes['hidden']}-{sizes['inputs']}"
    label = [record["label"]] if record.get("label") else []
    name = "_".join([record["benchmark"], slug, shape, *label, date.today().isoformat()])
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


class LiveRecord:
    """A record that is on disk after each addition, so that a killed program keeps what it had.

    Args:
        benchmark: what was run.
        device: "cpu" or "cuda".
        folder: made if it does not exist.
        name: of the file, without .json; None takes `benchmark`. An earlier one is replaced.
        content: further keys.
    """

    def __init__(
        self, benchmark: str, device: str, folder: Path, name: str | None = None, **content: Any
    ) -> None:
        self._record: dict[str, Any] = {
            "benchmark": benchmark,
            "date": date.today().isoformat(),
            **environment(device),
            **content,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name or benchmark}.json"
        self._write()

    def set(self, **content: Any) -> None:
        """Set keys of the record."""
        self._record |= content
        self._write()

    def add(self, key: str, item: dict[str, Any]) -> None:
        """Append to a list of the record."""
        self._record.setdefault(key, []).append(item)
        self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._record, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)


def draw(record: dict[str, Any], path: Path) -> bool:
    """Draw time relative to the floor, memory and errors as a PNG; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = record["rows"]
    names = [row["name"] for row in rows]
    colors = [
        FLOOR if name == "floor" else OURS if name.startswith(("redi", "topk-t")) else OTHERS
        for name in names
    ]
    figure = Figure(figsize=(12, 1.6 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    times, memory, errors = figure.subplots(1, 3, sharey=True, width_ratios=(3, 2, 2))
    places = range(len(rows))

    ratios = [row["times_floor"] for row in rows]
    bars = times.barh(places, ratios, color=colors)
    times.bar_label(
        bars,
        [f"{r:.2f}  ({1e3 * row['median_s']:.0f} ms)" for r, row in zip(ratios, rows, strict=True)],
        padding=3,
        fontsize=8,
    )
    times.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    times.set_xlim(0, 1.3 * max(ratios))
    times.set_xlabel("time relative to the floor (median)")
    times.set_yticks(places, [label_of(row) for row in rows])
    times.invert_yaxis()

    # The floor's memory is allocated beforehand: its figure in older records has no meaning.
    peaks = [0.0 if row["name"] == "floor" else row["peak_extra_mib"] for row in rows]
    bars = memory.barh(places, peaks, color=colors)
    labels = [f"{peak:.0f}" if peak else "" for peak in peaks]
    memory.bar_label(bars, labels, padding=3, fontsize=8)
    if any(peaks):
        memory.set_xscale("log")
        memory.set_xlim(min(peak for peak in peaks if peak) / 3, 5 * max(peaks))
    memory.set_xlabel("peak extra memory, MiB")

    values = [row[key] for key in ERRORS for row in rows if row.get(key)]
    if values:
        errors.set_xscale("log")
        # Whole decades, so that the axis has few ticks.
        decades = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        errors.set_xlim(*(10.0**decade for decade in decades))
    for key, (label, marker, color) in ERRORS.items():
        points = [(row[key], i) for i, row in enumerate(rows) if row.get(key)]
        if points:
            errors.scatter(*zip(*points, strict=True), marker=marker, color=color, label=label)
    if values:
        figure.legend(loc="outside lower right", ncols=len(ERRORS), fontsize=8)
    errors.set_xlabel("error against float64")
    for axes in (memory, errors):
        axes.tick_params(left=False)
    for axes in (times, memory, errors):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(record), fontsize=10)
    figure.savefig(path, dpi=150)
    return True
