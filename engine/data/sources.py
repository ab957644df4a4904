"""Finds the files and data sets that the entries of `[data] path` refer to."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from redi.engine.errors import InputError
from redi.engine.hub import NO_HUB_NAME, is_hub_name, quiet_hub_client

FILE_KINDS = ("jsonl", "json", "parquet", "csv")
_SPLIT = re.compile(r":[\w.\[\]%-]+$")
# "owner/name", "owner/name:split" or "owner/name:config:split"; a split may be "train[:10%]".
_HUB = re.compile(
    r"(?P<repository>[^:]+?)(?::(?P<config>[\w.+-]+))??(?::(?P<split>[\w.-]+(?:\[[^\]]*\])?))?"
)

# Metadata that `datasets` writes: `save_to_disk`, and older data cards of the hub.
_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"
_METADATA = frozenset({_INFO, _DICT, "dataset_infos.json"})
# Common names: these files are metadata only if a file named here is in the same folder.
_METADATA_NEXT_TO = {
    _STATE: (_INFO,),
    "evaluation.json": ("samples.jsonl",),
    "summary.json": ("samples.jsonl",),
    "report.json": ("sft.jsonl", "pref.jsonl"),
}

# The words by which `datasets` detects the split of a file.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_HUB_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}[-.]")
_NO_LETTERS = re.compile(r"[^a-z]+")


@dataclass(frozen=True, slots=True)
class Source:
    """One file, one saved data set, or one split of a hub data set."""

    name: str
    """The path, or "owner/name:split" or "owner/name:config:split"."""
    kind: str
    """One of FILE_KINDS, "saved" (a folder written by `save_to_disk`), or "hub"."""


@dataclass(frozen=True, slots=True)
class _Folder:
    """The part of a folder that is read."""

    sources: list[Source]
    split: str = ""
    """The split that is read; empty if the folder has no splits to choose from."""
    others: tuple[str, ...] = ()
    """The splits that are not read."""


def find_sources(paths: Sequence[str]) -> list[Source]:
    """Find the files and data sets that `paths` refer to, in order.

    Args:
        paths: files; folders, with all data files in them and in their sub-folders, sorted by
            path; folders written by `save_to_disk` of `datasets`; and hub names ("owner/name").
            "folder:split" and "owner/name:split" select a split; default: "train";
            "owner/name:config:split" selects a configuration too.

    Raises:
        InputError: a path is missing, has no data, or occurs twice (also as a folder and a file
            in it), or a folder has several splits but none is "train" (names them).
    """
    sources = []
    for name in paths:
        path, split = _split_name(name)
        if path.is_dir():
            sources += _folder(name, path, split).sources
        elif path.exists():
            kind = file_kind(path)
            if not kind:
                raise InputError(f"{name}: not a supported kind of file ({_kinds_text()})")
            sources.append(Source(str(path), kind))
        elif not file_kind(path) and (found := _HUB.fullmatch(name)) and is_hub_name(found[1]):
            sources.append(Source(name if found["split"] else f"{name}:train", "hub"))
        else:
            raise InputError(f"{name}: no such file or folder, {NO_HUB_NAME}")
    if not sources:
        raise InputError("[data] path is empty: name at least one file, folder or hub data set")
    seen = set()
    for source in sources:
        place = source.name if source.kind == "hub" else str(Path(source.name).resolve())
        if place in seen:
            raise InputError(
                f"{source.name}: is named twice; name it once (to draw it more often, move it out "
                "of its folder and set [data] mixing_weights)"
            )
        seen.add(place)
    return sources


def unread_splits(paths: Sequence[str]) -> list[str]:
    """One line for each folder of which only the default split is read."""
    lines = []
    for name in paths:
        path, split = _split_name(name)
        if split or not path.is_dir():
            continue
        folder = _folder(name, path, split)
        if folder.others:
            verb = "is" if len(folder.others) == 1 else "are"
            lines.append(
                f"{name}: only its split {folder.split} is read, {' and '.join(folder.others)} "
                f'{verb} not; name another one as "{name}:{folder.others[0]}"'
            )
    return lines


def file_kind(path: Path) -> str:
    """The kind of a file by its name, one of FILE_KINDS; empty if none."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    return kind if kind in FILE_KINDS else ""


@lru_cache(maxsize=8)
def hub_dataset(name: str) -> Any:
    """The `datasets.Dataset` of "owner/name:split" or "owner/name:config:split"."""
    import datasets  # imported late: slow, and local files do not need it

    found = _HUB.fullmatch(name)
    assert found is not None, "`find_sources` has matched it"
    config = [found["config"]] if found["config"] else []
    try:
        with quiet_hub_client():
            return datasets.load_dataset(found["repository"], *config, split=found["split"])
    except Exception as error:  # the hub client raises many types
        problem = " ".join(str(error).split())[:300]
        if "config name is missing" in problem.lower():
            problem = f'name a configuration as "{found["repository"]}:CONFIG:train" ({problem})'
        raise InputError(
            f"{name}: neither a local file nor an available data set on the hub: {problem}"
        ) from error


def saved_dataset(path: str) -> Any:
    """The `datasets.Dataset` that `save_to_disk` wrote to a folder, memory-mapped."""
    import datasets

    try:
        # Reset the format: one that returns tensors was set for another program.
        return datasets.load_from_disk(path).with_format(None)
    except Exception as error:  # Arrow, JSON, the file system and `datasets` each raise their own
        problem = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: the saved data set cannot be read: {problem}") from error


def saved_files(path: Path) -> list[Path]:
    """The files of a saved data set, in a fixed order."""
    return [path / _STATE, path / _INFO, *sorted(path.glob("*.arrow"))]


def _split_name(name: str) -> tuple[Path, str]:
    """(path, split) if `name` is "folder:split" and the folder exists; else (path, "")."""
    path = Path(name).expanduser()
    if not path.exists() and (found := _SPLIT.search(name)):
        folder = Path(name[: found.start()]).expanduser()
        if folder.is_dir():
            return folder, found.group()[1:]
    return path, ""


def _folder(name: str, path: Path, split: str) -> _Folder:
    """The part of the folder `path` that is read; `split` selects a split if not empty."""
    try:
        if (path / _DICT).is_file():
            return _saved_splits(path, split)
        if _is_saved(path):
            if split:
                raise InputError(
                    f"{name}: the data set saved there has no splits; remove the split"
                )
            return _Folder([Source(str(path), "saved")])
        found = list(_found_in(path, set()))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not found:
        raise InputError(f"{name}: no data file in this folder ({_kinds_text()})")
    by_split: dict[str, list[Source]] = {}
    for file in found:
        source = Source(str(file), "saved" if file.is_dir() else file_kind(file))
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(source)
    unmarked = by_split.pop("", [])
    if split:
        split = _SPLIT_WORDS.get(split, split) if split not in by_split else split
        if split not in by_split:
            raise _no_split(name, split, list(by_split))
        return _Folder(by_split[split], split)
    if len(by_split) < 2:
        return _Folder(sorted(chain(unmarked, *by_split.values()), key=_path))
    if "train" not in by_split:
        raise _no_split(name, "train", list(by_split))
    others = tuple(other for other in by_split if other != "train")
    return _Folder(sorted([*unmarked, *by_split["train"]], key=_path), "train", others)


def _path(source: Source) -> Path:
    return Path(source.name)


def _saved_splits(path: Path, split: str) -> _Folder:
    """The selected split of a `datasets.DatasetDict` on disk, which has one folder per split."""
    try:
        splits = json.loads((path / _DICT).read_text(encoding="utf-8"))["splits"]
        names = [str(name) for name in splits]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / _DICT}: damaged ({error}); save the data set again") from None
    wanted = split or ("train" if len(names) > 1 or not names else names[0])
    if wanted not in names:
        raise _no_split(str(path), wanted, names)
    if not _is_saved(path / wanted):
        raise InputError(f"{path / wanted}: the saved data set is incomplete; save it again")
    others = tuple(name for name in names if name != wanted)
    return _Folder([Source(str(path / wanted), "saved")], wanted, others)


def _no_split(name: str, split: str, known: Sequence[str]) -> InputError:
    base = _SPLIT.sub("", name) if name.endswith(f":{split}") else name
    remedy = f'; name one as "{base}:{known[0]}"' if known else ""
    return InputError(
        f"{base}: the folder has no split {split!r}; it has: {', '.join(known) or 'none'}{remedy}"
    )


def _is_saved(path: Path) -> bool:
    return (path / _STATE).is_file() and (path / _INFO).is_file()


def _found_in(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Find data files and saved data sets at any depth.

    As in `datasets`, hidden files and folders such as __pycache__ are skipped.

    Args:
        folder: where to search.
        seen: folders already searched, as symbolic links may form a cycle.
    """
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.name.startswith("__"):
                continue
            if (path / _DICT).is_file():
                yield from (Path(source.name) for source in _saved_splits(path, "").sources)
            elif _is_saved(path):
                yield path
            else:
                yield from _found_in(path, seen)
        elif file_kind(path) and not _is_metadata(path):
            yield path


def _is_metadata(path: Path) -> bool:
    """True if the file describes the data instead of containing it."""
    neighbours = _METADATA_NEXT_TO.get(path.name, ())
    return path.name in _METADATA or any((path.parent / name).is_file() for name in neighbours)


def _split_of(path: Path) -> str:
    """The split of a data file by its path in the data set; empty if it has none.

    Follows `datasets`: in the hub's layout, data/NAME-00000-of-00001.parquet, the split has any
    name; otherwise a known word in the name of the file or of a folder determines it.
    """
    if path.parent.name == "data" and (shard := _HUB_SHARD.match(path.name)):
        return shard[1]
    for part in reversed(path.parts):
        words = _NO_LETTERS.split(part.lower())
        found = Counter(_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS)
        if found:
            return next(iter(found)) if len(found) == 1 else ""
    return ""


def _kinds_text() -> str:
    return ", ".join(f".{kind}" for kind in FILE_KINDS) + ", or one of these with .gz"
