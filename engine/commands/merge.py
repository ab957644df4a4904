"""`redi merge`: the weighted mean of models, read slice by slice from their safetensors files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from redi.engine.config.sections import DataConfig
from redi.engine.console import Console
from redi.engine.data.fingerprints import model_fingerprint
from redi.engine.errors import InputError, RunError
from redi.engine.hub import quiet_hub_client
from redi.engine.model.export import check_loads, replaced, write_index
from redi.engine.model.load import empty_model, find_config, first_line
from redi.engine.model.weights import FLOATS, weight_files
from redi.engine.train.run_folder import manifest

MANIFEST = "merge.json"
FILE_BYTES = 2 * 10**9
"""Maximum bytes of weights in a file, unless a single tensor is larger."""
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*")
"""Files copied from the first model: configuration, tokenizer and template."""
_NOT_COPIED = ("*.index.json", MANIFEST)
# They do not change what a weight means; those of the first model are kept.
_FREE_IN_CONFIG = (
    *("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_TORCH_DTYPES = dict(
    zip(
        ("F64", "F32", "F16", "BF16"),
        (torch.float64, torch.float32, torch.float16, torch.bfloat16),
        strict=True,
    )
)
_SLICE_BYTES = 1 << 26
"""Bytes of float32 of a slice."""


@dataclass(frozen=True)
class Part:
    """A model of the mean."""

    name: str
    """As given by the user."""
    weight: float
    path: str
    """Directory or hub name of the model."""


def parse_parts(given: Sequence[str]) -> list[tuple[str, float]]:
    """(name, weight) of each NAME:WEIGHT; equal weights if no name has one.

    Weights that add up to 1 but for rounding, such as three times 0.333, are divided by their sum.

    Raises:
        InputError: some names have no weight, or the weights do not add up to 1.
    """
    if len(given) < 2:
        raise InputError("merge needs two models or more, such as runs/a:0.5 runs/b:0.5")
    split = [_split(one) for one in given]
    if all(weight is None for _, weight in split):
        return [(name, 1 / len(split)) for name, _ in split]
    for name, weight in split:
        if weight is None:
            raise InputError(f"{name} has no weight; give all models one ({name}:0.5), or none")
    parts = [(name, weight) for name, weight in split if weight is not None]
    total = sum(weight for _, weight in parts)
    if not abs(total - 1) < 1e-3:
        hint = "change them"
        if total > 0:
            scaled = " ".join(f"{name}:{weight / total:.3g}" for name, weight in parts)
            hint = f"for the same ratio give {scaled}"
        raise InputError(f"the weights add up to {total:g}, not to 1; {hint}")
    return [(name, weight / total) for name, weight in parts]


def _split(given: str) -> tuple[str, float | None]:
    name, _, weight = given.rpartition(":")
    try:
        return (name, float(weight)) if name else (given, None)
    except ValueError:
        return given, None


def merge(parts: Sequence[Part], out: Path, console: Console) -> None:
    """Write the weighted mean of the parts as a Hugging Face directory.

    Every weight is the sum of the parts' weights times their factors, in float32, in the dtype of
    the first part; a part with the factor 0 is not read. Configuration, tokenizer and template are
    those of the first part. `merge.json` has the parts, with hashes of their weights, and versions.
    Memory holds one file twice (as tensors and as they are written) and a slice of each part.

    Raises:
        InputError: a part is no model, the parts differ in names, shapes, configuration or
            vocabulary, or `out` exists.
        RunError: the directory cannot be written, or a weight is not finite.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out: {out} exists; choose another out")
    transformers_logging.disable_progress_bar()
    config = _same_config(parts)
    folders = [_folder(part.path) for part in parts]
    num_tokens = _check_vocabulary(parts, folders)
    tied = empty_model(config).all_tied_weights_keys
    cache = DataConfig().cache_dir
    hashes = [model_fingerprint(str(folder), cache) for folder in folders]
    with ExitStack() as stack:
        models = [_Model(part, tied, stack) for part in parts]
        first = _same_tensors(models)
        progress = stack.enter_context(closing(console.progress("tensor", len(first))))
        with replaced(out) as partial:
            _copy_files(folders[0], partial)
            index: dict[str, str] = {}
            files = split_torch_state_dict_into_shards(first, max_shard_size=FILE_BYTES)
            for file, names in files.filename_to_tensors.items():
                tensors = {}
                for name in names:
                    tensors[name] = _mean(name, first[name], models)
                    progress.update(1)
                save_file(tensors, partial / file, metadata={"format": "pt"})
                index |= dict.fromkeys(names, file)
            write_index(partial, index, sum(tensor.nbytes for tensor in first.values()))
            facts = [
                {"path": part.name, "weight": part.weight, "fingerprint": digest}
                for part, digest in zip(parts, hashes, strict=True)
            ]
            made = manifest(1, torch.device("cpu"), models=facts)
            (partial / MANIFEST).write_text(json.dumps(made, indent=2) + "\n", "utf-8")
            check_loads(partial, num_tokens)


def _same_config(parts: Sequence[Part]) -> Any:
    """The configuration of the first part, after comparing it with the others."""
    configs = [find_config(part.path, part.name) for part in parts]
    first = configs[0].to_dict()
    for part, config in zip(parts[1:], configs[1:], strict=True):
        other = config.to_dict()
        for key in sorted(first.keys() | other.keys()):
            if key not in _FREE_IN_CONFIG and first.get(key) != other.get(key):
                raise InputError(
                    f"{part.name}: config.json has {key} = {other.get(key)}, but "
                    f"{parts[0].name} has {first.get(key)}; only models of one architecture can "
                    "be merged"
                )
    return configs[0]


def _folder(path: str) -> Path:
    """The folder of a model; one on the hub is downloaded."""
    if Path(path).is_dir():
        return Path(path)
    try:
        with quiet_hub_client():
            patterns = ["*.safetensors", *_COPIED]
            return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types
        raise InputError(f"{path}: {first_line(error)}") from None


def _check_vocabulary(parts: Sequence[Part], folders: Sequence[Path]) -> int:
    """Number of tokens. Raise unless all parts have the same: else rows would mix tokens."""
    first: dict[str, int] = {}
    for part, folder in zip(parts, folders, strict=True):
        try:
            vocabulary = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
        except Exception as error:  # transformers raises many types
            raise InputError(f"{part.name}: no tokenizer loads: {first_line(error)}") from None
        first = first or vocabulary
        if vocabulary != first:
            token = min(set(first.items()) ^ set(vocabulary.items()), key=lambda one: one[1])
            raise InputError(
                f"{part.name}: the tokenizer's vocabulary differs from that of {parts[0].name} "
                f"(first at token {token[1]}, {token[0]!r}); only models of one vocabulary can be "
                "merged"
            )
    return len(first)


class _Model:
    """The opened files of a part, by the names of its weights."""

    def __init__(self, part: Part, tied: Mapping[str, str], stack: ExitStack) -> None:
        """Open the files.

        Args:
            tied: the weight to which each one is tied. If a file has both, they must be equal, and
                only the second one is used.

        Raises:
            InputError: a file is missing or damaged, or two tied weights differ.
        """
        self.name = part.name
        self.weight = part.weight
        self._places: dict[str, tuple[Path, Any, str]] = {}
        try:
            for path, names in weight_files(part.path).items():
                file = stack.enter_context(safe_open(path, "pt"))
                self._places |= {name: (path, file, name) for name in names}
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{part.name}: {first_line(error)}") from None
        for name, source in tied.items():
            if name not in self._places:
                continue
            if source not in self._places:
                self._places[source] = self._places[name]
            elif any(not torch.equal(*both) for both in self._slices_of(name, source)):
                raise InputError(
                    f"{self.file(name)}: config.json ties {name} to {source}, but the two differ; "
                    "set tie_word_embeddings to false in config.json"
                )
            del self._places[name]

    @property
    def names(self) -> list[str]:
        """Names of the weights."""
        return list(self._places)

    def file(self, name: str) -> Path:
        """The file of a weight, for messages."""
        return self._places[name][0]

    def header(self, name: str) -> Any:
        """Shape and dtype of a weight, and its values when it is sliced.

        Raises:
            InputError: the file lacks it.
        """
        path, file, stored = self._places[name]
        try:
            return file.get_slice(stored)
        except SafetensorError as error:
            raise InputError(f"{path}: {first_line(error)}") from None

    def read(self, name: str, rows: slice | None) -> torch.Tensor:
        """Rows of a weight; None: all of one without dimensions."""
        if rows is None:
            _, file, stored = self._places[name]
            return file.get_tensor(stored)
        return self.header(name)[rows]

    def _slices_of(self, *names: str) -> Iterator[list[torch.Tensor]]:
        shapes = [self.header(name).get_shape() for name in names]
        if shapes[1:] != shapes[:-1]:
            raise InputError(f"{self.file(names[0])}: {' and '.join(names)} differ in shape")
        for rows in _slices(shapes[0]):
            yield [self.read(name, rows) for name in names]


def _same_tensors(models: Sequence[_Model]) -> dict[str, torch.Tensor]:
    """The weights of the first model as tensors without memory, after comparing the others."""
    for model in models:
        for name in model.names:
            if (dtype := model.header(name).get_dtype()) not in FLOATS:
                raise InputError(
                    f"{model.file(name)}: {name} is stored as {dtype}; quantized weights cannot be "
                    "merged"
                )
    first = models[0]
    found = {}
    for name in first.names:
        header = first.header(name)
        dtype = _TORCH_DTYPES[header.get_dtype()]
        found[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    for model in models[1:]:
        for one, other in ((first, model), (model, first)):
            if missing := sorted(set(one.names) - set(other.names)):
                raise InputError(
                    f"{other.name}: has no weight {missing[0]}, which {one.file(missing[0])} has"
                )
        for name, tensor in found.items():
            if (shape := model.header(name).get_shape()) != list(tensor.shape):
                raise InputError(
                    f"{model.file(name)}: {name} has the shape {shape}, but {list(tensor.shape)} "
                    f"in {first.file(name)}"
                )
    return found


def _mean(name: str, like: torch.Tensor, models: Sequence[_Model]) -> torch.Tensor:
    """The weighted mean of a tensor, in the shape and dtype of `like`."""
    mean = torch.empty(like.shape, dtype=like.dtype)
    precise = torch.promote_types(like.dtype, torch.float32)
    used = [model for model in models if model.weight]
    for rows in _slices(list(like.shape)):
        # Not `sum`, which begins with 0: it would turn -0 into 0.
        total = reduce(add, (one.weight * one.read(name, rows).to(precise) for one in used))
        mean[... if rows is None else rows] = total
    if not mean.isfinite().all():
        raise RunError(f"not merged, weights are not finite: {name}")
    return mean


def _slices(shape: Sequence[int]) -> Iterator[slice | None]:
    """Rows of a tensor of this shape, about _SLICE_BYTES together; None if it has no dimensions."""
    if not shape:
        yield None
        return
    rows = max(1, _SLICE_BYTES // (4 * max(1, math.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)


def _copy_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and template."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if not any(path.match(one) for one in _NOT_COPIED):
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(path, copy)
