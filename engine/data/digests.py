"""Hashes of data files, remembered: a file of gigabytes is read once, not at every start."""

import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

import xxhash

from redi.engine.data.rows import Source, hub_dataset
from redi.engine.errors import InputError

WORTH_REMEMBERING = 1 << 26
"""Bytes; a smaller file is hashed in the time that it takes to look it up."""
_CLOCK_TICK = 2_000_000_000
"""Nanoseconds: the coarsest clock that a file system stamps its files by."""
_MEMORY = "digests.json"


def source_digest(source: Source, cache_dir: Path) -> str:
    """Hash of a source's content (for the hub: of the data set's own fingerprint).

    The hash of a large file is kept in `cache_dir`, with the file's size, inode and times. It
    counts as the same file while all of these are as they were: the kernel sets the time of the
    last status change at every write, and no copy, `touch` or `mv` sets it back.

    Raises InputError for a file that cannot be read.
    """
    if source.kind == "hub":
        fingerprint = hub_dataset(source.name)._fingerprint
        return xxhash.xxh3_128_hexdigest(f"{source.kind}{fingerprint}".encode())
    path = Path(source.name).resolve()
    now = time.time_ns()
    try:
        stamp = _stamp(path)
        if path.stat().st_size < WORTH_REMEMBERING:
            return _hashed(path, source.kind)
        known = _remembered(cache_dir).get(str(path))
        if known is not None and known[:-1] == stamp:
            return str(known[-1])
        digest = _hashed(path, source.kind)
        # A file that changes in the tick in which it was hashed would keep its times.
        settled = now - max(stamp[2:]) > _CLOCK_TICK and _stamp(path) == stamp
    except OSError as error:
        raise InputError(f"{source.name}: cannot be read: {error.strerror}") from error
    if settled:
        _remember(cache_dir, path, [*stamp, digest])
    return digest


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _hashed(path: Path, kind: str) -> str:
    hasher = xxhash.xxh3_128(kind.encode())
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def _remembered(cache_dir: Path) -> dict[str, list[int | str]]:
    """By path: the stamp, then the hash. Nothing if there is no memory, or a broken one."""
    try:
        known = json.loads((cache_dir / _MEMORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(cache_dir: Path, path: Path, entry: list[int | str]) -> None:
    # Of two processes at once one may be forgotten; a cache that is only read remembers nothing.
    with suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        passing = cache_dir / f"{_MEMORY}.{uuid.uuid4().hex}.tmp"
        passing.write_text(json.dumps(_remembered(cache_dir) | {str(path): entry}, indent=1))
        os.replace(passing, cache_dir / _MEMORY)
