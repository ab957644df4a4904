"""The run folder: whose it is, and what its run was made with."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from redi.engine.config.parse import dump_recipe
from redi.engine.config.resume import changed_keys
from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.summary import Summary
from redi.engine.distributed import World
from redi.engine.errors import InputError
from redi.engine.model.first_forward import Ran

RECIPE = "recipe.toml"
MANIFEST = "manifest.json"


def model_path(path: str, name: str) -> str:
    """The folder or hub name to load: of a run folder, its export.

    Args:
        path: what the user gave.
        name: what the user calls it, for messages.

    Raises:
        InputError: a run that has no export yet.
    """
    if not (Path(path) / RECIPE).is_file():
        return path
    export = Path(path) / "export"
    if not export.is_dir():
        raise InputError(
            f"{name}: the run {path} has no export yet: finish it, or write a checkpoint with "
            f"`redi export {path}` and name its folder here"
        )
    return str(export)


def trained_prompts(
    path: str, template: str | None, system_prompt: str | None
) -> tuple[Literal["chat", "none"], str | None, str | None]:
    """The template and system prompt to ask a model with: those it was trained with.

    Args:
        path: a run folder, an export in one, a model folder or hub name.
        template, system_prompt: what the user asked for; None: the run's, else "chat" and none.

    Returns:
        Both, and a warning where the user asked for another than the run's.
    """
    data: dict[str, Any] = {}
    for folder in (Path(path), Path(path).parent):
        if (folder / RECIPE).is_file():
            text = (folder / RECIPE).read_text(encoding="utf-8")
            data = tomllib.loads(text).get("data", {})
            break
    trained = {"template": data.get("template"), "system_prompt": data.get("system_prompt")}
    asked = {"template": template, "system_prompt": system_prompt}
    other = [
        f"{name} {asked[name]!r} is not that of the run, {trained[name]!r}"
        for name in asked
        if data and asked[name] is not None and asked[name] != trained[name]
    ]
    found = {name: trained[name] if asked[name] is None else asked[name] for name in asked}
    if found["template"] == "none" and system_prompt is None:
        found["system_prompt"] = None  # the run's has no place without a template
    warning = f"{path}: {'; '.join(other)}: the model was not trained so" if other else None
    kind: Literal["chat", "none"] = "none" if found["template"] == "none" else "chat"
    return kind, found["system_prompt"], warning


def check_writable(run_dir: Path) -> None:
    """What could not be written is said before hours of tokenizing; leaves no trace.

    Raises:
        InputError: `run_dir` cannot be made or written in, or its disk is full.
    """
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"one byte")
    except OSError as error:
        raise InputError(
            f"run.dir: {run_dir} cannot be written: {existing}: {error.strerror}"
        ) from None


def check_same_recipe(recipe: Recipe, run_dir: Path) -> None:
    """A run folder belongs to one recipe."""
    if not run_dir.exists():
        return
    if not run_dir.is_dir() or (any(run_dir.iterdir()) and not (run_dir / RECIPE).is_file()):
        raise InputError(f"run.dir: {run_dir} exists and is not a run folder; name another")
    if not (run_dir / RECIPE).is_file():
        return
    if not recipe.run.resume:
        raise InputError(
            f"run.dir: {run_dir} holds a run and run.resume is false; remove it or name another"
        )
    try:
        old = tomllib.loads((run_dir / RECIPE).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{run_dir / RECIPE}: damaged ({error}); name another run.dir") from None
    for key in changed_keys(old, recipe):
        section, name = key.split(".")
        raise InputError(
            f"run.dir: {run_dir} holds a run with another {key} "
            f"({old.get(section, {}).get(name)}, now {getattr(getattr(recipe, section), name)}); "
            "name another run.dir, or change it back to go on"
        )


def check_same_data(data_keys: Mapping[str, str | None], run_dir: Path) -> None:
    """The files of a run may not change under it."""
    if not (run_dir / MANIFEST).is_file():
        return
    old = json.loads((run_dir / MANIFEST).read_text(encoding="utf-8"))
    for name, key in data_keys.items():
        if old[name] != key:
            raise InputError(
                f"{name}.path: the data or tokenizer has changed since {run_dir} began; "
                "name another run.dir, or put it back to go on"
            )


def check_same_model(digest: str | None, run_dir: Path) -> None:
    """The model that a run began with may not change under it: DPO measures against it.

    Args:
        digest: of the weights that `model.path` holds now; None for a hub name.
    """
    if not (run_dir / MANIFEST).is_file():
        return
    if json.loads((run_dir / MANIFEST).read_text(encoding="utf-8"))["model"] != digest:
        raise InputError(
            f"model.path: the weights have changed since {run_dir} began; name another run.dir, or "
            "put them back to go on"
        )


def write_run_dir(
    recipe: Recipe,
    keys: Mapping[str, str | None],
    overview: Summary,
    dtype: torch.dtype,
    run_dir: Path,
    world: World,
) -> None:
    """Start the run folder; it appears with recipe and manifest whole, or not at all.

    Args:
        keys: hashes of "data", "eval" and "model".
    """
    if (run_dir / RECIPE).is_file():
        folder = run_dir  # what may differ on resume is noted
    else:
        folder = run_dir.with_name(run_dir.name + ".partial")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        facts = manifest(
            world.size,
            world.device,
            **keys,
            overview=asdict(overview),
            dtype=str(dtype).removeprefix("torch."),
        )
        (folder / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    partial = folder / "recipe.toml.partial"
    partial.write_text(dump_recipe(recipe), encoding="utf-8")
    os.replace(partial, folder / RECIPE)
    if folder != run_dir:
        os.replace(folder, run_dir)


def add_to_manifest(run_dir: Path, **facts: Any) -> None:
    """Add facts to a run's manifest, or replace those that it has; it is never half written."""
    content = json.loads((run_dir / MANIFEST).read_text(encoding="utf-8")) | facts
    partial = run_dir / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    os.replace(partial, run_dir / MANIFEST)


def report_what_ran(ran: Ran | None, run_dir: Path | None, world: World, console: Console) -> None:
    """Log what each rank's first forward ran, and write it into the manifest of `run_dir`.

    Collective.
    """
    assert ran is not None, "the first forward has run"
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, ran)
    for text in dict.fromkeys(one.text() for one in everywhere):
        ranks = [rank for rank, other in enumerate(everywhere) if other.text() == text]
        on = f" on ranks {', '.join(map(str, ranks))}" if len(ranks) < world.size else ""
        console.say(f"ran{on}: {text}")
    if world.is_main and run_dir is not None:
        add_to_manifest(run_dir, ran=[asdict(other) for other in everywhere])


def manifest(world_size: int, device: torch.device, **facts: Any) -> dict[str, Any]:
    """What a run was made with: versions, commit, machine, and the hashes given as `facts`."""
    packages = (
        "redi-engine",
        "torch",
        "transformers",
        "triton",
        "flash-attn",
        "liger-kernel",
        "math-verify",
        "vllm",
    )
    return {
        "versions": {name: v for name in packages if (v := _version(name))},
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The engine's git commit, when it runs from a checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
