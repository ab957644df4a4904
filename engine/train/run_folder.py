"""The run directory: which recipe, data and model it belongs to, and its manifest."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from redi.engine.config.parse import dump_recipe
from redi.engine.config.resume import changed_keys
from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.schedule import Schedule
from redi.engine.data.summary import Summary
from redi.engine.distributed import World
from redi.engine.errors import InputError, RunError
from redi.engine.model.first_forward import ForwardRecord
from redi.engine.run_files import check_run_files, read_manifest, read_recipe
from redi.engine.storage import FLIGHT_RECORDER, MANIFEST, RECIPE, inside, shown
from redi.engine.train.checkpoint import complete_checkpoints

NAMED_FILES = 3
"""Maximum number of files that a message names."""
RECORDS_ELSEWHERE = bool(
    os.environ.keys() & {"TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}
)
"""True if the user has named files for torch's flight recorder."""
LIMITS = ("train.epochs", "train.max_steps")
"""Keys that may be raised on resume."""


def model_path(path: str, name: str) -> str:
    """The directory or hub name to load a model from; for a run directory, its export.

    Args:
        path: given by the user.
        name: option or key of the path, for messages.

    Raises:
        InputError: the run has no export yet, or only that from before it was lengthened.
    """
    if not (Path(path) / RECIPE).is_file():
        return path
    export = Path(path) / "export"
    if not export.is_dir():
        raise InputError(
            f"{name}: the run {path} has no export yet; finish it, or export a checkpoint with "
            f"`redi export {path}` and give its directory here"
        )
    if not is_finished(Path(path)):
        raise InputError(
            f"{name}: the run {path} is being lengthened; finish it, or give {export}, the model "
            "from before"
        )
    return str(export)


def trained_prompts(
    path: str, template: str | None, system_prompt: str | None
) -> tuple[Literal["chat", "none"], str | None, Literal["trained", "left_out"], str | None]:
    """The template, system prompt and end rule (data.eos) of the run that trained a model.

    Args:
        path: a run directory, an export in one, a model directory or a hub name.
        template, system_prompt: given by the user; None: those of the run, else "chat" and no
            system prompt.

    Returns:
        The three, and a warning if the user gave others than those of the run.
    """
    data = _data_section(path)
    given = {"template": template, "system_prompt": system_prompt}
    given = {name: value for name, value in given.items() if value is not None}
    other = [
        f"{name} {value!r} is not that of the run, {data.get(name)!r}"
        for name, value in given.items()
        if data and value != data.get(name)
    ]
    warning = f"{path}: {'; '.join(other)}: the model was not trained with it" if other else None
    found = data | given
    eos: Literal["trained", "left_out"] = found.get("eos", "trained")
    if found.get("template") == "none":
        return "none", system_prompt, eos, warning  # the run's is not used without a template
    return "chat", found.get("system_prompt"), eos, warning


def trained_variables(path: str) -> dict[str, Any]:
    """The variables of the chat template of the run that trained a model; see `trained_prompts`."""
    return _data_section(path).get("template_variables", {})


def _data_section(path: str) -> dict[str, Any]:
    """The section `[data]` of the run that trained a model; empty for other models."""
    for folder in (Path(path), Path(path).parent):
        if (folder / RECIPE).is_file():
            return read_recipe(folder).get("data", {})
    return {}


@dataclass(frozen=True)
class PreviousRun:
    """What a run directory held before this command.

    Only rank 0 reads the directory: on a network file system other ranks may see an older state.
    """

    limits: tuple[int | None, int | None] | None
    """train.epochs and train.max_steps of its recipe; None if there is no run yet."""
    lengthened: tuple[dict[str, Any], ...] = ()
    """From the manifest, {"from": steps, "to": steps, "pending": bool} for each time."""
    finished: bool = False
    """True if it has the export of the number of steps requested last."""
    exported: bool = False
    """True if it has any export, even one from before it was lengthened."""
    complete: tuple[int, ...] = ()
    """Steps of its complete checkpoints."""
    row_tokens: int | None = None
    """Of its recipe; None if there is no run yet."""

    def totals(self, schedule: Schedule) -> tuple[int, int]:
        """Number of steps that the run was started with, and number requested last.

        Args:
            schedule: of the current recipe; the data is the same.
        """
        if self.lengthened:
            return self.lengthened[0]["from"], self.lengthened[-1]["to"]
        if self.limits is None:
            return schedule.total_steps, schedule.total_steps
        epochs, max_steps = self.limits
        total = replace(schedule, epochs=epochs, max_steps=max_steps).total_steps
        return total, total

    def check_not_shortened(self, total: int, old: int, run_dir: Path) -> None:
        """Check that a run gets more steps, not fewer, and has a checkpoint to resume from.

        Args:
            total, old: steps of the current recipe, and steps requested last.

        Raises:
            InputError: there are fewer steps, or the run was exported and has no checkpoint left.
        """
        if total < old:
            raise InputError(
                f"run.dir: {shown(run_dir)} holds a run of {old} steps, and train.epochs and "
                f"train.max_steps now give {total}; a run can only be lengthened: choose another "
                "run.dir, or change them back to resume"
            )
        if self.exported and not self.complete:
            raise InputError(
                f"run.dir: {shown(run_dir)} cannot be lengthened to {total} steps: it has no "
                f"checkpoint left to resume from; choose another run.dir (model.path may be "
                f"{inside(shown(run_dir), 'export')})"
            )


def read_previous_run(run_dir: Path) -> PreviousRun:
    """The state left by an earlier command; `check_same_recipe` must have accepted it.

    Every checkpoint is verified here, once.
    """
    if not (run_dir / RECIPE).is_file():
        return PreviousRun(limits=None)
    train = read_recipe(run_dir).get("train", {})
    lengthened = _lengthened(run_dir)
    exported = (run_dir / "export").is_dir()
    limits = (train.get("epochs"), train.get("max_steps"))
    complete = tuple(complete_checkpoints(run_dir))
    return PreviousRun(
        limits,
        tuple(lengthened),
        is_finished(run_dir),
        exported,
        complete,
        train.get("row_tokens"),
    )


def is_finished(run_dir: Path) -> bool:
    """True if a run has its export and was not lengthened since."""
    exported = (run_dir / "export").is_dir()
    return exported and not any(one["pending"] for one in _lengthened(run_dir))


def _lengthened(run_dir: Path) -> list[dict[str, Any]]:
    return read_manifest(run_dir).get("lengthened", [])


def finish(run_dir: Path) -> None:
    """Record in the manifest that the export is that of all requested steps."""
    lengthened = _lengthened(run_dir)
    if any(one["pending"] for one in lengthened):
        done = [one | {"pending": False} for one in lengthened]
        add_to_manifest(run_dir, lengthened=done)


def check_same_recipe(recipe: Recipe, run_dir: Path) -> None:
    """Check that the run directory is new, or that its recipe differs only in what may change.

    `LIMITS` are checked by `PreviousRun.check_not_shortened`.

    Raises:
        InputError: it is another directory, or holds a run with another recipe.
    """
    if not run_dir.exists():
        if run_dir.is_symlink():
            raise InputError(f"run.dir: {run_dir}: a symbolic link to nothing; remove it")
        return
    # A recipe alone may be the user's own file: a run directory appears with both.
    is_run = all((run_dir / name).is_file() for name in (RECIPE, MANIFEST))
    if not run_dir.is_dir() or (any(run_dir.iterdir()) and not is_run):
        raise InputError(
            f"run.dir: {shown(run_dir)} exists and is not a run directory; choose another"
        )
    if not is_run:
        return
    check_run_files(run_dir)
    if not recipe.run.resume:
        raise InputError(
            f"run.dir: {shown(run_dir)} holds a run and run.resume is false; remove it or choose "
            "another"
        )
    old = read_recipe(run_dir)
    for key in changed_keys(old, recipe):
        if key in LIMITS:
            continue
        section, name = key.split(".")
        raise InputError(
            f"run.dir: {shown(run_dir)} holds a run with another {key} "
            f"({old.get(section, {}).get(name)}, now {getattr(getattr(recipe, section), name)}); "
            "choose another run.dir, or change it back to resume"
        )


def check_same_data(
    data_keys: Mapping[str, str | None], parts: Mapping[str, dict[str, Any]], run_dir: Path
) -> None:
    """Check that the data of a run is unchanged.

    Args:
        data_keys: hashes of the tokenized sets, by section of the recipe.
        parts: what is hashed, see `TokenizedTraces.parts`.

    Raises:
        InputError: files, tokenizer or settings have changed; the message names them.
    """
    old = read_manifest(run_dir)
    if not old:
        return
    for name, key in data_keys.items():
        if old.get(name) != key:
            old_parts = old.get("parts", {}).get(name) or {}
            found = what_changed(old_parts, parts[name]) if old_parts else ""
            what = "changed" if found else "the data or tokenizer has changed"
            key = "model.tokenizer" if found.startswith("the tokenizer") else f"{name}.path"
            raise InputError(
                f"{key}: {what} since {shown(run_dir)} was started{': ' if found else ''}"
                f"{found}; choose another run.dir, or restore it to resume"
            )


def check_same_files(files: list[list[str]], run_dir: Path) -> None:
    """Check that the data files of a finished run are unchanged, without reading them.

    Args:
        files: see `file_fingerprints`; empty ones are not compared.

    Raises:
        InputError: some have changed; the message names them.
    """
    parts = read_manifest(run_dir).get("parts", {}).get("data")
    if not files or not parts:  # the manifest of an older version has no parts
        return
    if found := what_changed(parts, parts | {"files": files}):
        raise InputError(
            f"data.path: changed since {shown(run_dir)} was finished: {found}; choose another "
            "run.dir to train on it, or restore it"
        )


def what_changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which parts of a tokenized set differ, as text for the user; "" if none."""
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
            found.append(f"the output of the chat template ({one!r}, now {other!r})")
            break
    return ", ".join(found)


def check_same_model(fingerprint: str | None, adapter: str | None, run_dir: Path) -> None:
    """Check that the initial weights of a run are unchanged: they are also the reference of DPO.

    Args:
        fingerprint: of the weights that are in `model.path` now; None for a hub name.
        adapter: of those in `adapter.path`; None if there is none.

    Raises:
        InputError: they have changed.
    """
    old = read_manifest(run_dir)
    for name, now in (("model", fingerprint), ("adapter", adapter)):
        if old and old.get(name) != now:
            raise InputError(
                f"{name}.path: the weights have changed since {shown(run_dir)} was started; choose "
                "another run.dir, or restore them to resume"
            )


def write_run_dir(
    recipe: Recipe,
    keys: Mapping[str, Any],
    summary: Summary,
    dtype: torch.dtype,
    run_dir: Path,
    world: World,
    old_steps: int,
) -> None:
    """Create the run directory, atomically with recipe and manifest, or update it on resume.

    Args:
        keys: hashes of "data", "eval" and "model", and the "parts" of the first two.
        old_steps: number of steps requested by an earlier command, else that of the summary.
    """
    if (run_dir / RECIPE).is_file():
        folder = run_dir  # the new recipe records what may differ on resume
        if summary.steps > old_steps:
            # Before the recipe: a run killed between the two is unfinished, not a different run.
            step = {"from": old_steps, "to": summary.steps, "pending": True}
            lengthened = [*_lengthened(run_dir), step]
            add_to_manifest(run_dir, lengthened=lengthened, overview=asdict(summary))
    else:
        folder = run_dir.with_name(run_dir.name + ".partial")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        facts = manifest(
            world.size,
            world.device,
            **keys,
            overview=asdict(summary),
            dtype=str(dtype).removeprefix("torch."),
        )
        (folder / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    partial = folder / "recipe.toml.partial"
    partial.write_text(dump_recipe(recipe), encoding="utf-8")
    os.replace(partial, folder / RECIPE)
    if folder != run_dir:
        os.replace(folder, run_dir)


def record_flight(run_dir: Path, world: World) -> None:
    """Let torch's flight recorder write into the run folder, unless the user has named a file.

    On CUDA torch keeps the last 2000 collectives of each rank and writes them when one times out or
    fails, by default into the user's home. It reads the name only then, so each run of a command
    gets its own. For a run on object storage each machine has such a folder. Collective.
    """
    if world.device.type == "cuda" and not RECORDS_ELSEWHERE:
        folder = run_dir / FLIGHT_RECORDER
        world.once_per_node(lambda: folder.mkdir(parents=True, exist_ok=True))
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder.absolute() / "rank_")


def add_to_manifest(run_dir: Path, **facts: Any) -> None:
    """Add facts to the manifest of a run, or replace existing ones; it is replaced atomically."""
    content = read_manifest(run_dir) | facts
    partial = run_dir / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    os.replace(partial, run_dir / MANIFEST)


def report_what_ran(
    ran: ForwardRecord | None, run_dir: Path | None, world: World, console: Console
) -> None:
    """Log the record of each rank's first forward, and write it into the manifest of `run_dir`.

    Collective.
    """
    assert ran is not None, "the first forward has run"
    records: list[Any] = [None] * world.size
    dist.all_gather_object(records, ran)
    for text in dict.fromkeys(one.text() for one in records):
        ranks = [rank for rank, other in enumerate(records) if other.text() == text]
        on = f" on ranks {', '.join(map(str, ranks))}" if len(ranks) < world.size else ""
        console.say(f"ran{on}: {text}")
    if world.is_main and run_dir is not None:
        add_to_manifest(run_dir, ran=[asdict(other) for other in records])


def manifest(world_size: int, device: torch.device, **facts: Any) -> dict[str, Any]:
    """Versions, commit and machine of a run, with `facts` (hashes and more)."""
    packages = (
        "redi-engine",
        "torch",
        "transformers",
        "triton",
        "flash-attn",
        "liger-kernel",
        "peft",
        "torchao",
        "bitsandbytes",
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
    """The engine's git commit, if it runs from a checkout."""
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


@contextmanager
def file_errors_named(run_dir: Path) -> Iterator[None]:
    """Turn an error of a file into a RunError that names the run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{shown(run_dir)}: {error}; the same command resumes from the newest complete "
            "checkpoint"
        ) from error
