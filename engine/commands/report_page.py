"""The page of `redi report`: one HTML file without scripts that requests nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redi.engine.commands.report import Curves, outcome
from redi.engine.commands.report_curves import draw_panels
from redi.engine.commands.report_samples import read_samples
from redi.engine.config.sections import Recipe
from redi.engine.data.summary import PERCENTILES
from redi.engine.output import visible
from redi.engine.run_files import read_manifest, read_recipe
from redi.engine.storage import shown

TEMPLATE = "report.html.jinja"
NOT_COMPARED = ("run.dir",)
"""Keys of the recipe in which all runs differ."""
FACTS = ("started", "device", "world_size", "threads", "dtype", "python", "commit", "machine")
"""Facts of the manifest that the page shows, with versions and hashes of the data."""
HASHES = ("data", "eval", "model")


@dataclass(frozen=True)
class Row:
    """A key and its value in each run."""

    key: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """True if the runs do not all have the same value."""
        return len(set(self.values)) > 1


def write_page(
    runs: Sequence[Curves],
    run_dirs: Sequence[Path],
    figures: Sequence[Sequence[str]],
    path: Path,
) -> None:
    """Write the page, replacing an older one.

    Args:
        runs: metrics of each run.
        run_dirs: their directories; recipe and manifest may be missing.
        figures: the rows of the table: a name, and the value of each run.
        path: the file.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    manifests = [read_manifest(folder) for folder in run_dirs]
    recipe = _recipe_rows(run_dirs)
    if len(runs) == 1:  # compared with the defaults
        defaults = _flat(asdict(Recipe()))
        recipe = [Row(row.key, [defaults.get(row.key, ""), *row.values]) for row in recipe]
    # `finalize` sees each value before it is escaped, and leaves the curves alone.
    environment = Environment(
        loader=PackageLoader("redi.engine", "commands"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(
        runs=[
            {
                "name": run.name,
                "path": shown(folder),
                "outcome": outcome(run) or "finished",
                "steps": run.steps[-1]["step"],
                "planned": manifest.get("overview", {}).get("steps"),
            }
            for run, folder, manifest in zip(runs, run_dirs, manifests, strict=True)
        ],
        figures=[row for row in figures if any(value != "-" for value in row[1:])],
        panels=[(panel, Markup(panel.svg)) for panel in draw_panels(runs)],
        recipe=recipe,
        facts=_fact_rows(manifests),
        lengths=_lengths(manifests),
        percentiles=PERCENTILES,
        problems=read_samples(run_dirs),
    )
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _recipe_rows(run_dirs: Sequence[Path]) -> list[Row]:
    """Every key of the recipes. One that a run of an older version lacks has its default."""
    recipes: list[dict[str, str]] = []
    for folder in run_dirs:
        try:
            found = read_recipe(folder)
        except OSError:
            recipes.append({})
            continue
        complete = asdict(Recipe())
        for section, values in found.items():
            complete[section] = complete.get(section, {}) | values
        recipes.append(_flat(complete))
    return [row for row in _rows(recipes) if row.key not in NOT_COMPARED]


def _fact_rows(manifests: Sequence[Mapping[str, Any]]) -> list[Row]:
    return _rows(
        [
            {name: str(manifest[name]) for name in FACTS if name in manifest}
            | {f"{name} (hash)": str(manifest[name]) for name in HASHES if manifest.get(name)}
            | {str(name): str(version) for name, version in manifest.get("versions", {}).items()}
            for manifest in manifests
        ]
    )


def _rows(columns: Sequence[Mapping[str, str]]) -> list[Row]:
    keys = dict.fromkeys(key for column in columns for key in column)
    return [Row(key, [column.get(key, "") for column in columns]) for key in keys]


def _flat(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each key of a recipe, with its section, and its value as text; "" for no value."""
    return {
        f"{section}.{key}": _plain(value)
        for section, values in recipe.items()
        for key, value in values.items()
    }


def _plain(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _lengths(
    manifests: Sequence[Mapping[str, Any]],
) -> list[tuple[list[int], str, Mapping[str, Any]]]:
    """Places of runs, kind and statistics of lengths; runs with the same ones share a row."""
    found: dict[str, list[int]] = {}
    for number, manifest in enumerate(manifests):
        for kind, statistics in manifest.get("overview", {}).get("lengths", {}).items():
            if statistics["count"]:
                found.setdefault(json.dumps([kind, statistics]), []).append(number)
    return [(numbers, *json.loads(key)) for key, numbers in found.items()]
