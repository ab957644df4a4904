"""Hashes of data files, tokenizers and weights, remembered: work not done at every start."""

import json
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from redi.engine.data.sources import Source, hub_dataset, saved_files
from redi.engine.errors import InputError

WORTH_REMEMBERING = 1 << 26
"""Bytes; a smaller file is hashed in the time that it takes to look it up."""
_CLOCK_TICK = 2_000_000_000
"""Nanoseconds: the coarsest clock that a file system stamps its files by."""
_MEMORY = "fingerprints.json"


def source_fingerprint(source: Source, cache_dir: Path) -> str:
    """Hash of a source's content (for the hub: of the data set's own fingerprint).

    That of a large file is kept in `cache_dir`; see `_kept`.

    Raises InputError for a file that cannot be read.
    """
    if source.kind == "hub":
        fingerprint = hub_dataset(source.name)._fingerprint
        return xxhash.xxh3_128_hexdigest(f"{source.kind}{fingerprint}".encode())
    path = Path(source.name).resolve()

    def files() -> list[Path]:
        return saved_files(path) if source.kind == "saved" else [path]

    try:
        return _content_digest(str(path), files, source.kind, cache_dir)
    except OSError as error:
        raise InputError(f"{source.name}: cannot be read: {error.strerror}") from error


def model_fingerprint(path: str, cache_dir: Path) -> str | None:
    """Hash of a model folder's weights; None for a hub name.

    That of large files is kept in `cache_dir`; see `_kept`.

    Raises InputError for a file that cannot be read.
    """
    folder = Path(path).resolve()

    def files() -> list[Path]:
        return sorted(folder.glob("*.safetensors"))

    try:
        if not files():
            return None
        return _content_digest(f"{folder} weights", files, "", cache_dir)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error


def tokenizer_fingerprint(path: str, cache_dir: Path, digest: Callable[[], str]) -> str:
    """Hash of a tokenizer's content; that of a folder is kept in `cache_dir`, see `_kept`.

    Args:
        path: folder or hub name.
        digest: loads the tokenizer, which takes a second or two, and hashes it.
    """
    folder = Path(path).resolve()
    if not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        return digest()  # which says what is wrong with it

    def files() -> list[Path]:
        found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
        return sorted(file for file in found if file.is_file())

    # What a tokenizer's files come to is for these two to say.
    readers = " ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers"))
    return _kept(f"{folder} {readers}", files, digest, cache_dir)


def _content_digest(name: str, files: Callable[[], list[Path]], kind: str, cache_dir: Path) -> str:
    """Hash of the files' bytes in a row, and of what kind they are."""
    if sum(file.stat().st_size for file in files()) < WORTH_REMEMBERING:
        return _hashed(files(), kind)
    return _kept(name, files, lambda: _hashed(files(), kind), cache_dir)


def _kept(
    name: str, files: Callable[[], list[Path]], digest: Callable[[], str], cache_dir: Path
) -> str:
    """What `digest` makes of some files, kept in `cache_dir` with their sizes, inodes and times.

    They count as the same files while all of these are as they were: the kernel sets the time of
    the last status change at every write, and no copy, `touch` or `mv` sets it back.
    """
    now = time.time_ns()
    stamps = _stamps(files())
    known = _remembered(cache_dir).get(name)
    if known is not None and known[0] == stamps:
        return str(known[1])
    found = digest()
    # A file that changes in the tick in which it was hashed would keep its times.
    latest = max(when for stamp in stamps for when in stamp[-2:])
    if now - latest > _CLOCK_TICK and _stamps(files()) == stamps:
        _remember(cache_dir, name, [stamps, found])
    return found


def _stamps(files: list[Path]) -> list[list[Any]]:
    found = [(str(file), file.stat()) for file in files]
    return [[name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in found]


def _hashed(files: list[Path], kind: str) -> str:
    hasher = xxhash.xxh3_128(kind.encode())
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                hasher.update(block)
    return hasher.hexdigest()


def _remembered(cache_dir: Path) -> dict[str, list[Any]]:
    """By name: the stamps, then the hash. Nothing if there is no memory, or a broken one."""
    try:
        known = json.loads((cache_dir / _MEMORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(cache_dir: Path, name: str, entry: list[Any]) -> None:
    # Of two processes at once one may be forgotten; a cache that is only read remembers nothing.
    with suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        passing = cache_dir / f"{_MEMORY}.{uuid.uuid4().hex}.tmp"
        passing.write_text(json.dumps(_remembered(cache_dir) | {name: entry}, indent=1))
        os.replace(passing, cache_dir / _MEMORY)
