"""Run folders and models on object storage (s3://, gs://), by fsspec.

A folder in a bucket has a working folder on this machine: the folder of the cache followed by the
URL (~/.cache/redi/s3:/bucket/runs/redi). Everything but checkpoints is read and written there; it
is fetched when a run starts and uploaded with each checkpoint and at the end. Checkpoints are
written and read in the bucket itself, by torch. A local folder is its own working folder, with
nothing to fetch or upload.

A bucket has no rename. What makes a folder complete is uploaded last: recipe.toml of a run,
config.json of an export, .metadata of a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from redi.engine.errors import InputError, RunError

if TYPE_CHECKING:
    from redi.engine.config.sections import Recipe
    from redi.engine.distributed import World

RECIPE = "recipe.toml"
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
FLIGHT_RECORDER = "flight-recorder"
VIEWED = "viewed"
"""Folder of the cache for runs that are looked at: a run in training has its own folder."""
_WHOLE_BYTES = 1 << 26
"""Smaller files are read before they are sent: metrics.jsonl may grow meanwhile."""
_MODELS = ("config.json", "adapter_config.json")
"""The file that a model, or an adapter alone, is complete with."""
_FETCHED = ".fetched.json"
_PROBE = ".probe"
_NOT_UPLOADED = {CHECKPOINTS, FLIGHT_RECORDER, "wandb", _PROBE}
"""Files and folders of a run that stay where they were written, or are removed at once."""
_OPTIONS = {"use_listings_cache": False}  # other machines write too
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "mtime", "created")


_ONE_SLASH = re.compile(r"[a-z0-9]+:/(?!/)")


def is_remote(path: str | None) -> TypeGuard[str]:
    """True for a URL, false for a path or the name of a model on the hub."""
    return path is not None and "://" in path


def inside(folder: str, name: str) -> str:
    """The path or URL of `name` in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def check_available(path: str | None, key: str) -> None:
    """Check that a URL has a bucket and a name, and that the package for its protocol is installed.

    Raises:
        InputError: otherwise; `key` names the key of the recipe or the option.
    """
    if path is not None and _ONE_SLASH.match(path):
        raise InputError(f"{key}: {path}: a URL has two slashes, such as s3://bucket/folder")
    if not is_remote(path):
        return
    import fsspec  # takes a tenth of a second; a local path needs none

    protocol, _, name = path.partition("://")
    if len(name.strip("/").split("/")) < 2:
        raise InputError(f"{key}: {path} names no folder in a bucket (s3://bucket/folder)")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        raise InputError(
            f"{key}: {path}: the package for {protocol}:// is not installed: "
            "pip install 'redi-engine[storage]'"
        ) from None
    except ValueError:
        raise InputError(f"{key}: {path}: unknown protocol; use s3://, gs:// or file://") from None


def working_folder(path: str, cache_dir: Path) -> Path:
    """The folder on this machine for a path or URL."""
    if not is_remote(path):
        return Path(path)
    protocol, _, name = path.partition("://")
    return cache_dir.absolute() / f"{protocol}:" / name.strip("/")


def url_of(folder: Path) -> str | None:
    """The URL of which `folder` is the working folder; None for another folder."""
    for number, part in enumerate(folder.parts):
        if part.endswith(":"):
            import fsspec

            if part[:-1] in fsspec.available_protocols():
                start = ":///" if part == "file:" else "://"
                return part[:-1] + start + "/".join(folder.parts[number + 1 :])
    return None


def shown(folder: Path) -> str:
    """The path or URL of a run, for messages."""
    return url_of(folder) or str(folder)


class LocalRun:
    """A run directory on this machine's file systems: nothing to fetch or upload.

    Args:
        folder: the directory.

    Attributes:
        url: None.
    """

    url: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self) -> None:
        """Fetch the run's files, except checkpoints and models."""

    def check_writable(self) -> None:
        """Check that the directory can be written, before hours of tokenizing. Leaves no file.

        Raises:
            InputError: it cannot be created or written, or its disk is full.
        """
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(b"one byte")
        except OSError as error:
            raise InputError(
                f"run.dir: {self.folder} cannot be written: {existing}: {error.strerror}"
            ) from None

    def publish(self) -> None:
        """Upload the run's files, except checkpoints and models."""

    @contextmanager
    def published(self) -> Iterator[None]:
        """Upload the run's files at the end of the block, also after an error."""
        yield

    def publish_model(self, name: str) -> None:
        """Upload an exported model, the directory `name` of the run."""

    def checkpoint(self, step: int) -> Path | str:
        """Folder or URL of a checkpoint."""
        return self.folder / CHECKPOINTS / f"step-{step}"

    def checkpoint_files(self) -> dict[int, dict[str, int]]:
        """The bytes of each file of each checkpoint, by step and name."""
        return _by_step(
            {
                f"{path.parent.name}/{path.name}": path.stat().st_size
                for path in self.folder.glob(f"{CHECKPOINTS}/step-*/*")
            }
        )

    def remove_checkpoint(self, step: int) -> None:
        """Remove a checkpoint, if there is one: its metadata first, so that it is not complete.

        Raises:
            RunError: it cannot be removed.
        """
        folder = self.folder / CHECKPOINTS / f"step-{step}"
        with _explained(f"{folder} cannot be removed", RunError), suppress(FileNotFoundError):
            (folder / ".metadata").unlink(missing_ok=True)
            shutil.rmtree(folder)


class BucketRun(LocalRun):
    """A run on object storage with its working folder.

    Args:
        folder: the working folder.
        url: the URL of the run.
    """

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        self.url = url
        self._bucket = _Bucket(url)
        self._sent: dict[str, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Replace the run's files in the working folder by those in the bucket.

        A directory `export` is made if the run has an export; `fetch_model` fills it.

        Raises:
            InputError: the bucket cannot be read, or the URL holds something else than a run.
        """
        with _explained(f"run.dir: {self.url} cannot be read", InputError):
            names = self._bucket.versions().keys()
            if names <= {MANIFEST, _PROBE}:  # no run, or killed before its recipe was uploaded
                shutil.rmtree(self.folder, ignore_errors=True)
                return
            if RECIPE not in names:
                raise InputError(
                    f"run.dir: {self.url} exists and is not a run directory; choose another"
                )
            for name in _small_files(self.folder):
                if name not in names:
                    (self.folder / name).unlink()
            for name in filter(_is_small, names):
                self._bucket.download(name, self.folder)
            export = self.folder / "export"
            if any(f"{export.name}/{last}" in names for last in _MODELS):
                export.mkdir(exist_ok=True)
            else:  # killed while it was uploaded
                shutil.rmtree(export, ignore_errors=True)

    def check_writable(self) -> None:
        """Check that the bucket and the working folder can be written. Leaves no file.

        Raises:
            InputError: one of them cannot.
        """
        super().check_writable()
        with _explained(f"run.dir: {self.url} cannot be written", InputError):
            self._bucket.write(_PROBE, b"one byte")
            self._bucket.remove([_PROBE])

    def publish(self) -> None:
        """Upload the files that changed since the last call: the recipe last.

        Raises:
            RunError: the bucket cannot be written.
        """
        names = _small_files(self.folder)
        for name in sorted(names, key=lambda name: (name == RECIPE, name == MANIFEST, name)):
            file = self.folder / name
            try:
                status = file.stat()
                stamp = (status.st_size, status.st_mtime_ns)
                if self._sent.get(name) == stamp:
                    continue
                content = file.read_bytes() if status.st_size < _WHOLE_BYTES else None
            except FileNotFoundError:  # a temporary file, removed meanwhile
                continue
            with _explained(f"{self.url}/{name} cannot be written", RunError):
                if content is None:
                    self._bucket.upload([name], self.folder)
                else:
                    self._bucket.write(name, content)
            self._sent[name] = stamp

    @contextmanager
    def published(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with suppress(RunError, OSError):
                self.publish()
            raise
        self.publish()

    def publish_model(self, name: str) -> None:
        """Upload a model, replacing an older one.

        Raises:
            RunError: the bucket cannot be written.
        """
        bucket, folder = _Bucket(f"{self.url}/{name}"), self.folder / name
        with _explained(f"{bucket.url} cannot be written", RunError):
            old = bucket.versions()
            bucket.remove([last for last in _MODELS if last in old])
            files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
            files.discard(_FETCHED)
            bucket.upload(sorted(files - set(_MODELS)), folder)
            bucket.remove(sorted(old.keys() - files - set(_MODELS)))
            bucket.upload([last for last in _MODELS if last in files], folder)
            (folder / _FETCHED).write_text(json.dumps(bucket.versions()))

    def checkpoint(self, step: int) -> Path | str:
        return f"{self.url}/{CHECKPOINTS}/step-{step}"

    def checkpoint_files(self) -> dict[int, dict[str, int]]:
        with _explained(f"run.dir: {self.url} cannot be read", InputError):
            versions = _Bucket(f"{self.url}/{CHECKPOINTS}").versions()
        return _by_step({name: size for name, (size, _) in versions.items()})

    def remove_checkpoint(self, step: int) -> None:
        bucket = _Bucket(str(self.checkpoint(step)))
        with _explained(f"{bucket.url} cannot be removed", RunError):
            files = bucket.versions()
            bucket.remove([".metadata"] if ".metadata" in files else [])
            bucket.remove([name for name in files if name != ".metadata"])


def open_run(folder: Path) -> LocalRun:
    """The run of a directory, which may be the working folder of a URL."""
    url = url_of(folder)
    return LocalRun(folder) if url is None else BucketRun(folder, url)


def fetch_model(
    path: str, cache_dir: Path, key: str, weights: bool = True, world: World | None = None
) -> str:
    """The folder of a model on this machine, fetched from object storage unless it is there.

    Args:
        path: returned as it is unless it is a URL.
        cache_dir: folder of the cache.
        key: key of the recipe or option, for messages.
        weights: False: the configuration and the tokenizer are enough.
        world: fetch once on each machine of these ranks; collective.

    Raises:
        InputError: there is no such model, or its upload is not complete.
    """
    if not is_remote(path):
        return path
    folder = working_folder(path, cache_dir)
    if not weights:
        folder = folder.with_name(f"{folder.name}-without-weights")

    def fetch() -> None:
        check_available(path, key)
        with _explained(f"{key}: {path} cannot be read", InputError):
            _fetch_model(path, folder, key, weights)

    world.once_per_node(fetch) if world else fetch()
    return str(folder)


def _fetch_model(path: str, folder: Path, key: str, weights: bool) -> None:
    bucket = _Bucket(path)
    versions = {
        name: version
        for name, version in bucket.versions().items()
        if weights or not name.endswith(".safetensors")
    }
    if not any(last in versions for last in _MODELS):
        raise InputError(
            f"{key}: {path} has no {_MODELS[0]}: it is no model, or its upload has not finished"
        )
    if _recorded(folder) == versions:
        return
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        bucket.download_all(list(versions), partial)
        (partial / _FETCHED).write_text(json.dumps(versions))
        if _recorded(folder) != versions:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    except OSError:
        if _recorded(folder) != versions:  # else another machine with the same cache was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch_models(recipe: Recipe, world: World) -> Recipe:
    """Fetch the model, tokenizer and adapter of a recipe to each machine. Collective.

    Returns:
        The recipe with the folders on this machine in place of URLs.

    Raises:
        InputError: as `fetch_model`.
    """
    cache, model = recipe.data.cache_dir, recipe.model
    path = model.path and fetch_model(model.path, cache, "model.path", world=world)
    tokenizer = model.tokenizer and fetch_model(
        model.tokenizer, cache, "model.tokenizer", weights=False, world=world
    )
    adapter = recipe.adapter
    start = adapter.path and fetch_model(adapter.path, cache, "adapter.path", world=world)
    return replace(
        recipe,
        model=replace(model, path=path, tokenizer=tokenizer),
        adapter=replace(adapter, path=start),
    )


def fetch_run(path: str, cache_dir: Path) -> Path:
    """The folder of a run to look at; for a URL, a copy that no training run works in.

    Raises:
        InputError: the bucket cannot be read.
    """
    check_available(path, "RUN")
    folder = working_folder(path, cache_dir / VIEWED)
    open_run(folder).fetch()
    return folder


def fetch_trained(path: str, cache_dir: Path) -> str:
    """The folder of a run with its export, or of a model, to evaluate; see `fetch_run`.

    Args:
        path: returned as it is unless it is a URL.
        cache_dir: folder of the cache.

    Raises:
        InputError: the bucket cannot be read, or holds neither.
    """
    if not is_remote(path):
        return path
    check_available(path, "MODEL")
    with _explained(f"MODEL: {path} cannot be read", InputError):
        is_model = any(map(_Bucket(path).has, _MODELS))
        parent = path.rstrip("/").rpartition("/")[0]
        in_run = is_model and _Bucket(parent).has(RECIPE)
    if in_run:
        fetch_run(parent, cache_dir)  # its template and system prompt
    if is_model:
        return fetch_model(path, cache_dir / VIEWED, "MODEL")
    run = fetch_run(path, cache_dir)
    if (run / "export").is_dir():
        fetch_model(inside(path, "export"), cache_dir / VIEWED, "MODEL")
    return str(run)


class _Bucket:
    """A folder on object storage. Names are relative to it."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self._fs, root = fsspec.core.url_to_fs(self.url, **_OPTIONS)
        self._root = str(root).rstrip("/")

    def versions(self) -> dict[str, list[Any]]:
        """[bytes, what changes with the content] of each file: one listing."""
        files = self._fs.find(self._root, detail=True)
        return {
            path[len(self._root) :].lstrip("/"): [
                info["size"],
                str(next((info[key] for key in _VERSIONS if key in info), "")),
            ]
            for path, info in files.items()
        }

    def has(self, name: str) -> bool:
        exists: bool = self._fs.exists(self._path(name))
        return exists

    def write(self, name: str, content: bytes) -> None:
        self._make_parent(name)
        self._fs.pipe_file(self._path(name), content)

    def upload(self, names: list[str], folder: Path) -> None:
        for name in names:
            self._make_parent(name)
            self._fs.put_file(str(folder / name), self._path(name))

    def download(self, name: str, folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{name}.partial"
        self._fs.get_file(self._path(name), str(partial))
        os.replace(partial, folder / name)

    def download_all(self, names: list[str], folder: Path) -> None:
        """Several at a time."""
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        self._fs.get([self._path(name) for name in names], [str(folder / name) for name in names])

    def remove(self, names: list[str]) -> None:
        if names:
            self._fs.rm([self._path(name) for name in names])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_parent(self, name: str) -> None:
        # A bucket has no folders; only a file system behind file:// needs them.
        if self._fs.protocol in ("file", ("file", "local")):
            self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)


def _small_files(folder: Path) -> list[str]:
    """Names of a run's files in its working folder, except checkpoints and models."""
    # Unlike rglob, os.walk passes over a folder that is removed meanwhile.
    files = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return [name for file in files if _is_small(name := str(file.relative_to(folder)))]


def _is_small(name: str) -> bool:
    """Whether a file of a run is fetched and uploaded with the run."""
    top = name.split("/")[0]
    return not (top in _NOT_UPLOADED or top.startswith("export") or ".partial" in name)


def _by_step(sizes: dict[str, int]) -> dict[int, dict[str, int]]:
    """Sort the sizes of files "step-N/name" by step."""
    steps: dict[int, dict[str, int]] = {}
    for path, size in sizes.items():
        folder, _, name = path.partition("/")
        step = folder.removeprefix("step-")
        if step.isdecimal() and folder != step:
            steps.setdefault(int(step), {})[name] = size
    return steps


def _recorded(folder: Path) -> dict[str, list[Any]] | None:
    """The versions of the files of a fetched or published model; None if one is missing."""
    try:
        versions: dict[str, list[Any]] = json.loads((folder / _FETCHED).read_text())
        if any((folder / name).stat().st_size != size for name, (size, _) in versions.items()):
            return None
    except (OSError, ValueError):
        return None
    return versions


@contextmanager
def _explained(what: str, kind: type[InputError] | type[RunError]) -> Iterator[None]:
    """Turn an error of a storage client into one line."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:  # each client has other types of errors
        raise kind(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error
