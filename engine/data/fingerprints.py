"""Fingerprints (hashes) of data files, tokenizers and weights, cached between runs."""

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

MIN_CACHED_BYTES = 1 << 26
"""Smaller content is not cached: hashing it takes no longer than looking it up."""
_FINE_TICK = 0.1
"""Seconds: longer than the resolution of time stamps that have a fraction of a second."""
_COARSE_TICK = 2.0
"""Seconds: the coarsest resolution of a file system's time stamps."""
_CACHE_FILE = "fingerprints.json"


def source_fingerprint(source: Source, cache_dir: Path) -> str:
    """Hash of a source's content (on the hub: of the fingerprint that `datasets` gives it).

    The hash of a large file is cached in `cache_dir`; see `_cached`.

    Raises:
        InputError: a file cannot be read.
    """
    if source.kind == "hub":
        fingerprint = hub_dataset(source.name)._fingerprint
        return xxhash.xxh3_128_hexdigest(f"{source.kind}{fingerprint}".encode())
    path = Path(source.name).resolve()

    def files() -> list[Path]:
        return saved_files(path) if source.kind == "saved" else [path]

    try:
        return _content_fingerprint(str(path), files, source.kind, cache_dir)
    except OSError as error:
        raise InputError(f"{source.name}: cannot be read: {error.strerror}") from error


def model_fingerprint(path: str, cache_dir: Path) -> str | None:
    """Hash of the weights in a model folder; None for a hub name.

    The hash of large files is cached in `cache_dir`; see `_cached`.

    Raises:
        InputError: a file cannot be read.
    """
    folder = Path(path).resolve()

    def files() -> list[Path]:
        return sorted(folder.glob("*.safetensors"))

    try:
        if not files():
            return None
        return _content_fingerprint(f"{folder} weights", files, "", cache_dir)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error


def tokenizer_fingerprint(path: str, cache_dir: Path, compute: Callable[[], str]) -> str:
    """Hash of a tokenizer's content. The hash of a folder is cached in `cache_dir`; see `_cached`.

    Args:
        path: folder or hub name.
        cache_dir: folder of the token cache.
        compute: loads the tokenizer, which takes a second or two, and hashes it.
    """
    folder = Path(path).resolve()
    if not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        return compute()  # raises with the reason if the path is wrong

    def files() -> list[Path]:
        found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
        return sorted(file for file in found if file.is_file())

    # Another version of these packages may read the same files differently.
    readers = " ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers"))
    return _cached(f"{folder} {readers}", files, compute, cache_dir)


def data_checksum(file: Path, cache_dir: Path) -> str:
    """Hash of a file's content. That of a large file is cached in `cache_dir`; see `_cached`.

    Raises:
        OSError: it cannot be read.
    """
    return _content_fingerprint(str(file.resolve()), lambda: [file], "", cache_dir)


def _content_fingerprint(
    name: str, files: Callable[[], list[Path]], kind: str, cache_dir: Path
) -> str:
    """Hash of the concatenated bytes of the files and of their kind."""
    if sum(file.stat().st_size for file in files()) < MIN_CACHED_BYTES:
        return _hashed(files(), kind)
    return _cached(name, files, lambda: _hashed(files(), kind), cache_dir)


def _cached(
    name: str, files: Callable[[], list[Path]], compute: Callable[[], str], cache_dir: Path
) -> str:
    """The result of `compute`, cached in `cache_dir` with the files' sizes, inodes and times.

    The cached value is used while all of these are unchanged. A write cannot go unnoticed: the
    file system updates the time of the last status change, which no copy, `touch` or `mv` sets
    back. A change within one tick of that clock would leave the time unchanged, so hashing starts
    a tick after the times were read: an earlier change is hashed, a later one has another time.
    Only durations are compared. The clock of a file server may differ from this machine's.
    """
    stamps = _stamps(files())
    known = _read_cache(cache_dir).get(name)
    if known is not None and known[0] == stamps:
        return str(known[1])
    time.sleep(_tick(stamps))
    found = compute()
    if _stamps(files()) == stamps:
        _write_cache(cache_dir, name, [stamps, found])
    return found


def _tick(stamps: list[list[Any]]) -> float:
    """Seconds after which a change gets another time: more if the times are whole seconds."""
    fine = all(changed % 1_000_000_000 for *_, changed in stamps)
    return _FINE_TICK if fine else _COARSE_TICK


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


def _read_cache(cache_dir: Path) -> dict[str, list[Any]]:
    """[stamps, hash] by name; without what is damaged, and empty if there is no cache file."""
    try:
        known = json.loads((cache_dir / _CACHE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {name: one for name, one in entries if _is_entry(one)}


def _is_entry(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)


def _write_cache(cache_dir: Path, name: str, entry: list[Any]) -> None:
    # If two processes write at once, one entry may be lost. A read-only cache is left unchanged.
    with suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = cache_dir / f"{_CACHE_FILE}.{uuid.uuid4().hex}.tmp"
        temporary.write_text(json.dumps(_read_cache(cache_dir) | {name: entry}, indent=1))
        os.replace(temporary, cache_dir / _CACHE_FILE)
