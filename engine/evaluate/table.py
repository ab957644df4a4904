"""One table of several evaluations, in the shape of the paper's table 2: a row per model."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redi.engine.console import Console, print_table
from redi.engine.errors import InputError
from redi.engine.evaluate.benchmarks import BENCHMARKS

# Settings that must be equal. Those of prompts may follow the model.
_SHARED = ("data", "samples", "temperature", "top_p", "max_new_tokens", "checker", "answer_pattern")
_TITLE = "pass@1 in percent ± its standard error over samples"


def compare(folders: Sequence[Path], out: Path | None) -> None:
    """Print the table of the evaluations in `folders`, and write it to `out` as Markdown.

    Raises:
        InputError: a folder holds no finished evaluation, or `out` cannot be written.
    """
    summaries = []
    for folder in folders:
        path = folder / "summary.json"
        try:
            summaries.append(json.loads(path.read_text(encoding="utf-8")))
            summaries[-1]["benchmarks"][0]["sem_over_samples"]
        except OSError:
            raise InputError(f"{folder}: no finished evaluation (no summary.json)") from None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"{path}: not the summary of an evaluation ({error})") from None
    for folder, summary in zip(folders[1:], summaries[1:], strict=True):
        if other := _other_settings(summaries[0], summary):
            Console().warn(f"{folder}: cannot be compared with {folders[0]}: {other}")
    print_comparison(summaries)
    if out is not None:
        try:
            out.write_text(as_markdown(summaries), encoding="utf-8")
        except OSError as error:
            raise InputError(f"out: {out} cannot be written: {error.strerror}") from None


def _other_settings(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What changes scores and differs between two evaluations; the model may."""
    pairs = [(name, *(s.get("settings", {}).get(name) for s in (one, other))) for name in _SHARED]
    found = [f"{name} is {b!r}, not {a!r}" for name, a, b in pairs if name != "data" and a != b]
    if any(name == "data" and a != b for name, a, b in pairs):
        found.insert(0, "it has other problems")
    return ", ".join(found)


def print_comparison(summaries: Sequence[dict[str, Any]]) -> None:
    """Print the table of summaries on stdout."""
    columns, rows = _cells(summaries)
    print_table(_TITLE, columns, rows, file=sys.stdout)


def as_markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    columns, rows = _cells(summaries)
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return f"{_TITLE}\n\n" + "".join(f"| {line} |\n" for line in cells)


def _cells(summaries: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and the cells of each row."""
    found = [{one["name"]: one for one in summary["benchmarks"]} for summary in summaries]
    names = [name for name in dict.fromkeys(name for row in found for name in row) if name != "all"]
    titles = [BENCHMARKS[name].title if name in BENCHMARKS else Path(name).stem for name in names]
    rows = []
    for summary, scores in zip(summaries, found, strict=True):
        # An average over other benchmarks than those of the row above cannot be compared with it.
        average = summary.get("average") if len(scores.keys() - {"all"}) == len(names) else None
        row = [*(scores.get(name) for name in names), *([average] if len(names) > 1 else [])]
        model = str(summary.get("model", "-")).removesuffix("/export")
        rows.append([model, *map(_percent, row)])
    return ["model", *titles, *(["average"] if len(names) > 1 else [])], rows


def _percent(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    error = score["sem_over_samples"]
    return f"{100 * score['pass_at_1']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
