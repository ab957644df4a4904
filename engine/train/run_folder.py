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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from redi.engine.config.parse import dump_recipe
from redi.engine.config.resume import changed_keys
from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.schedule import Schedule
from redi.engine.data.summary import Summary
from redi.engine.distributed import World
from redi.engine.errors import InputError
from redi.engine.model.first_forward import Ran
from redi.engine.train.checkpoint import complete_checkpoints

RECIPE = "recipe.toml"
MANIFEST = "manifest.json"
NAMED_FILES = 3
"""Files that a message names at most."""
LIMITS = ("train.epochs", "train.max_steps")
"""What a run may be given more of."""


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
) -> tuple[Literal["chat", "none"], str | None, Literal["trained", "left_out"], str | None]:
    """The template, system prompt and end rule (data.eos) to ask a model with: its run's.

    Args:
        path: a run folder, an export in one, a model folder or hub name.
        template, system_prompt: what the user asked for; None: the run's, else "chat" and none.

    Returns:
        All three, and a warning where the user asked for another than the run's.
    """
    data: dict[str, Any] = {}
    for folder in (Path(path), Path(path).parent):
        if (folder / RECIPE).is_file():
            text = (folder / RECIPE).read_text(encoding="utf-8")
            data = tomllib.loads(text).get("data", {})
            break
    asked = {"template": template, "system_prompt": system_prompt}
    given = {name: value for name, value in asked.items() if value is not None}
    other = [
        f"{name} {value!r} is not that of the run, {data.get(name)!r}"
        for name, value in given.items()
        if data and value != data.get(name)
    ]
    warning = f"{path}: {'; '.join(other)}: the model was not trained so" if other else None
    found = data | given
    eos: Literal["trained", "left_out"] = found.get("eos", "trained")
    if found.get("template") == "none":
        return "none", system_prompt, eos, warning  # the run's has no place without a template
    return "chat", found.get("system_prompt"), eos, warning


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


@dataclass(frozen=True)
class Before:
    """What a run folder held before this command.

    Read at the start, by every rank: rank 0 writes it anew only when all have begun to train.
    """

    limits: tuple[int | None, int | None] | None
    """train.epochs and train.max_steps of its recipe; None: there is no run yet."""
    lengthened: tuple[dict[str, Any], ...] = ()
    """The manifest's: {"from": steps, "to": steps, "pending": bool} for each time."""
    finished: bool = False
    """Whether it has the export of what was asked for last."""
    exported: bool = False
    """Whether it has an export, be it the one from before it was lengthened."""

    def totals(self, schedule: Schedule) -> tuple[int, int]:
        """Steps that the run began with, and those that were asked for last.

        Args:
            schedule: of the recipe now; the data is the same.
        """
        if self.lengthened:
            return self.lengthened[0]["from"], self.lengthened[-1]["to"]
        if self.limits is None:
            return schedule.total_steps, schedule.total_steps
        epochs, max_steps = self.limits
        total = replace(schedule, epochs=epochs, max_steps=max_steps).total_steps
        return total, total

    def check_not_shortened(self, total: int, old: int, run_dir: Path) -> None:
        """A run can be given more steps, not fewer, and goes on from a checkpoint.

        Args:
            total, old: steps of the recipe now, and those asked for last.

        Raises:
            InputError: they are fewer, or the checkpoints of what was exported are gone.
        """
        if total < old:
            raise InputError(
                f"run.dir: {run_dir} holds a run of {old} steps, and train.epochs and "
                f"train.max_steps now give {total}: a run can only be lengthened; name another "
                "run.dir, or change them back to go on"
            )
        if self.exported and not complete_checkpoints(run_dir):
            raise InputError(
                f"run.dir: {run_dir} cannot be lengthened to {total} steps: it has no checkpoint "
                f"left to go on from; name another run.dir (model.path may be {run_dir / 'export'})"
            )


def read_before(run_dir: Path) -> Before:
    """What the folder holds of an earlier command; `check_same_recipe` has found it good."""
    if not (run_dir / RECIPE).is_file():
        return Before(limits=None)
    train = tomllib.loads((run_dir / RECIPE).read_text(encoding="utf-8")).get("train", {})
    lengthened = _lengthened(run_dir)
    exported = (run_dir / "export").is_dir()
    limits = (train.get("epochs"), train.get("max_steps"))
    return Before(limits, tuple(lengthened), is_finished(run_dir), exported)


def is_finished(run_dir: Path) -> bool:
    """Whether a run has its export, and was not lengthened since."""
    exported = (run_dir / "export").is_dir()
    return exported and not any(one["pending"] for one in _lengthened(run_dir))


def _lengthened(run_dir: Path) -> list[dict[str, Any]]:
    if not (run_dir / MANIFEST).is_file():
        return []
    return json.loads((run_dir / MANIFEST).read_text(encoding="utf-8")).get("lengthened", [])


def finish(run_dir: Path) -> None:
    """Note that the export is that of all steps asked for."""
    lengthened = _lengthened(run_dir)
    if any(one["pending"] for one in lengthened):
        done = [one | {"pending": False} for one in lengthened]
        add_to_manifest(run_dir, lengthened=done)


def check_same_recipe(recipe: Recipe, run_dir: Path) -> None:
    """A run folder belongs to one recipe; what may be more than it was is for `Before`."""
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
        if key in LIMITS:
            continue
        section, name = key.split(".")
        raise InputError(
            f"run.dir: {run_dir} holds a run with another {key} "
            f"({old.get(section, {}).get(name)}, now {getattr(getattr(recipe, section), name)}); "
            "name another run.dir, or change it back to go on"
        )


def check_same_data(
    data_keys: Mapping[str, str | None], parts: Mapping[str, dict[str, Any]], run_dir: Path
) -> None:
    """The files of a run may not change under it.

    Args:
        data_keys: hashes of the tokenized sets, by section of the recipe.
        parts: what they are hashes of, as `TokenizedTraces` has it.
    """
    if not (run_dir / MANIFEST).is_file():
        return
    old = json.loads((run_dir / MANIFEST).read_text(encoding="utf-8"))
    for name, key in data_keys.items():
        if old[name] != key:
            before = old.get("parts", {}).get(name) or {}
            found = before and what_changed(before, parts[name])
            what = "changed" if found else "the data or tokenizer has changed"
            raise InputError(
                f"{name}.path: {what} since {run_dir} began{': ' if found else ''}{found or ''}; "
                "name another run.dir, or put it back to go on"
            )


def what_changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which parts of a tokenized set differ, in a user's words; "" for none."""
    found = []
    before, now = dict(old["files"]), dict(new.get("files", ()))
    for name in sorted({*before, *now}):
        if name in before and name in now and before[name] != now[name]:
            found.append(name)
        elif name not in before and now[name] not in before.values():
            found.append(f"{name} (new)")
        elif name not in now and before[name] not in now.values():
            found.append(f"{name} (gone)")
    if len(found) > NAMED_FILES:
        found[NAMED_FILES:] = [f"{len(found) - NAMED_FILES} more files"]
    if not found and [*before.values()] != [*now.values()]:
        found.append("the order of the files")
    named = {
        "tokenizer": "the tokenizer or its chat template",
        "version": "how redi-engine tokenizes",
        **{name: f"data.{name}" for name in ("format", "template", "system_prompt")},
    }
    found += [words for part, words in named.items() if old[part] != new.get(part)]
    lines = [str(parts.get("rendering")).splitlines() for parts in (old, new)]
    for one, other in zip(*lines, strict=False):
        if one != other:
            found.append(f"what the chat template prints ({one!r}, now {other!r})")
            break
    return ", ".join(found)


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
    keys: Mapping[str, Any],
    overview: Summary,
    dtype: torch.dtype,
    run_dir: Path,
    world: World,
    old_steps: int,
) -> None:
    """Start the run folder; it appears with recipe and manifest whole, or not at all.

    Args:
        keys: hashes of "data", "eval" and "model", and the "parts" of the first two.
        old_steps: those of an earlier command, or the overview's.
    """
    if (run_dir / RECIPE).is_file():
        folder = run_dir  # what may differ on resume is noted
        if overview.steps > old_steps:
            # Before the recipe: a run that is killed between them is unfinished, not another one.
            step = {"from": old_steps, "to": overview.steps, "pending": True}
            lengthened = [*_lengthened(run_dir), step]
            add_to_manifest(run_dir, lengthened=lengthened, overview=asdict(overview))
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
