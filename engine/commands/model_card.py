"""The model card (README.md) of an export, from the run's recipe, manifest and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import ModelCard, ModelCardData

from redi.engine.commands.report import figure_rows, read_run
from redi.engine.errors import InputError
from redi.engine.hub import is_hub_name
from redi.engine.output import visible
from redi.engine.run_files import read_manifest, read_recipe
from redi.engine.storage import RECIPE, is_remote

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
PATHS = (
    ("model", "path"),
    ("model", "tokenizer"),
    ("data", "path"),
    ("data", "cache"),
    ("eval", "path"),
    ("run", "dir"),
)
"""Keys with paths of the training machine: a card has the last part of each alone."""


def write_card(run_dir: Path, folder: Path, step: int) -> None:
    """Write README.md into `folder`, the export of a run after `step`.

    The card holds no folder of the training machine, only names of files, and names of the hub.
    """
    recipe = read_recipe(run_dir)
    base = _base_model(recipe)
    data = recipe.get("data", {}).get("path", "")
    names = [data] if isinstance(data, str) else data
    repositories = [name.partition(":")[0] for name in names]  # "owner/name:configuration:split"
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base if is_hub_name(base) else None,
            datasets=list(filter(is_hub_name, repositories)) or None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["redi-engine", recipe.get("objective", {}).get("name", "sft")],
        ),
        template_path=str(TEMPLATE),
        name=_cell(run_dir.name),
        step=step,
        base=_cell(_name(base)),
        objective=recipe.get("objective", {}).get("name", "sft"),
        data=[_cell(_name(name)) for name in names],
        overview=read_manifest(run_dir).get("overview", {}),
        manifest=read_manifest(run_dir),
        template=recipe.get("data", {}).get("template", "chat"),
        system_prompt=visible(recipe.get("data", {}).get("system_prompt", "")),
        figures=_figures(run_dir, step),
        evaluations=_evaluations(run_dir, step),
        recipe=visible(tomli_w.dumps(_without_folders(recipe))),
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _base_model(recipe: Mapping[str, Any]) -> str:
    """The model that the first of a chain of runs was trained from."""
    path = str(recipe.get("model", {}).get("path", ""))
    seen = set()
    while path not in seen and not is_remote(path):
        seen.add(path)
        for folder in (Path(path), Path(path).parent):
            if (folder / RECIPE).is_file():
                found = read_recipe(folder)
                path = str(found.get("model", {}).get("path", ""))
                break
    return path


def _name(path: str) -> str:
    """A hub name, or the last part of a path or URL."""
    is_hub = is_hub_name(path.partition(":")[0])
    return path if is_hub else path.rstrip("/").rpartition("/")[2]


def _without_folders(recipe: Mapping[str, Any]) -> dict[str, Any]:
    plain = {section: dict(values) for section, values in recipe.items()}
    for section, key in PATHS:
        value = plain.get(section, {}).get(key)
        if isinstance(value, str):
            plain[section][key] = _name(value)
        elif value:
            plain[section][key] = [_name(str(one)) for one in value]
    return plain


def _figures(run_dir: Path, step: int) -> list[list[str]]:
    """The figures of `redi report` up to a step; none if the metrics do not go so far."""
    try:
        run = read_run(run_dir)
    except InputError:
        return []
    steps = [line for line in run.steps if line["step"] <= step]
    held_out = [line for line in run.held_out if line["step"] <= step]
    if not steps:
        return []
    rows = figure_rows([replace(run, steps=steps, held_out=held_out, guard_events=[])])
    return [row for row in rows[1:] if row[1] != "-"]  # the number of steps is in the text


def _evaluations(run_dir: Path, step: int) -> list[tuple[str, dict[str, Any]]]:
    """Each benchmark of `redi evaluate` on this export, with how it was sampled."""
    found = []
    paths = list(run_dir.glob(f"evaluate-step-{step}-*/summary.json"))
    if read_manifest(run_dir).get("overview", {}).get("steps") == step:  # of the run's `export`
        paths += [
            path
            for path in run_dir.glob("evaluate-*/summary.json")
            if not path.parent.name.startswith("evaluate-step-")
        ]
    for path in sorted(paths):
        summary = json.loads(path.read_text(encoding="utf-8"))
        temperature = summary["settings"]["temperature"]
        for one in summary["benchmarks"]:
            row = one | {"name": _cell(_name(one["name"]))}
            found.append((f"T = {temperature:g}" if temperature else "greedy", row))
    return found


def _cell(text: str) -> str:
    """Text for a table or a line of Markdown."""
    return " ".join(visible(text).split()).replace("|", "/").replace("`", "'").replace("<", "‹")
