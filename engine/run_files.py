"""Reads the files of a run directory that another program, or a person, may have changed."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redi.engine.errors import InputError
from redi.engine.storage import FLIGHT_RECORDER, MANIFEST, RECIPE

_FOLDERS = ("checkpoints", "export", "tensorboard")
_REPLACED = (RECIPE, MANIFEST, "report.html")
_FILES = (
    *_REPLACED,
    *(f"{name}.partial" for name in _REPLACED),
    *("metrics.jsonl", "metrics.partial", "samples.jsonl", "curves.png"),
)
_OTHERS = ("wandb", FLIGHT_RECORDER)
"""Folders that other programs write, with links in them."""
_PART_NAMES = ("files", "version", "format", "template", "system_prompt", "tokenizer")


def check_run_files(run_dir: Path) -> None:
    """Check that all in a run directory is a regular file or directory, as its name says.

    A command that writes into a run must not write elsewhere, through a link. The run directory
    itself may be a link, and a checkpoint, into which nothing is written when it is complete.

    Raises:
        InputError: it is not so; the message names the entry.
    """
    for parent, folders, files in os.walk(run_dir):
        top = Path(parent) == Path(run_dir)
        if top:
            folders[:] = [name for name in folders if name not in _OTHERS]
        for name in (*folders, *files):
            path = Path(parent, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a temporary file, removed meanwhile
                continue
            wanted = "regular file or directory"
            fits = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
            if top and name in _FOLDERS:
                wanted, fits = "directory", stat.S_ISDIR(mode)
            elif top and name in _FILES:
                wanted, fits = "regular file", stat.S_ISREG(mode)
            elif Path(parent) == Path(run_dir) / "checkpoints":
                fits = fits or path.is_dir()  # a checkpoint that was moved to another disk
            if not fits:
                raise InputError(f"{path}: {_kind(mode)}, not a {wanted}; remove it")


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a regular file" if stat.S_ISREG(mode) else "a special file"


def read_recipe(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The recipe of a run, by section, as it was resolved; the keys are not checked.

    Raises:
        InputError: it is damaged.
    """
    path = run_dir / RECIPE
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    for name, section in content.items():
        if not isinstance(section, dict):
            raise _damaged(path, f"{name} is no section")
    return content


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest of a run; empty if there is none yet.

    Raises:
        InputError: it is damaged.
    """
    path = run_dir / MANIFEST
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(content, dict):
        raise _damaged(path, "not an object")
    for name, fits in _FITS.items():
        if name in content and not fits(content[name]):
            raise _damaged(path, f"{name} has another form")
    return content


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(f"{path}: damaged ({problem}); restore it, or use another run directory")


def _are_lengthened(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("from"), int)
        and isinstance(one.get("to"), int)
        and isinstance(one.get("pending"), bool)
        for one in value
    )


def _are_parts(value: object) -> bool:
    """What is hashed of the tokenized sets, by section; see `TokenizedTraces.parts`."""
    return isinstance(value, dict) and all(
        one is None
        or one == {}
        or (
            isinstance(one, dict)
            and all(name in one for name in _PART_NAMES)
            and isinstance(one["files"], list)
            and all(
                isinstance(file, list) and len(file) == 2 and all(isinstance(x, str) for x in file)
                for file in one["files"]
            )
        )
        for one in value.values()
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(one, str) for one in value.values())


_FITS = {
    "lengthened": _are_lengthened,
    "parts": _are_parts,
    "overview": lambda value: isinstance(value, dict),
    "versions": _are_texts,
    "dtype": lambda value: value in ("float32", "bfloat16", "float16"),
    "attention_cost": lambda value: isinstance(value, int | float),
}
"""The values of a manifest that commands read as more than text."""
