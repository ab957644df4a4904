"""Read weights from safetensors files into a model that may be sharded.

Each rank reads the slices of its shard. Files are memory-mapped and read slice by slice, so no rank
holds more than its shard and one slice. torch's HuggingFaceStorageReader is similar, but reads
every file of the directory, even a second copy of the weights, and does not report unexpected ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.conversion_mapping import extract_weight_conversions_for_model
from transformers.core_model_loading import revert_weight_conversion

from redi.engine.errors import InputError
from redi.engine.model.composite import CARRIED, SOURCE, text_names
from redi.engine.model.conversions import Merged, translate
from redi.engine.model.load import first_line
from redi.engine.model.nf4 import SCALES, fill, stand_in

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_NAME = re.compile(r"\.lora_(?:A|B|magnitude_vector)\.default\.")
"""In the names of an adapter's tensors in a model. peft keeps the adapted layer as `base_layer`."""
FLOATS = {"F64", "F32", "F16", "BF16"}


@torch.no_grad()
def read_weights(model: PreTrainedModel, path: str) -> None:
    """Fill a model in place: read parameters, in the model's dtype, and compute buffers.

    Args:
        model: sharded or not; its parameters have memory but no values (`to_empty`). Weights that
            `to_empty` untied are tied again.
        path: directory or hub name.

    Raises:
        InputError: the files do not fit the model.
    """
    model.tie_weights()
    _compute_buffers(model, path)
    try:
        files = weight_files(path)
        if hasattr(model.config, SOURCE):
            _read_text_model(model, files)
        elif extract_weight_conversions_for_model(model):
            _read_converted(model, files)
        else:
            check_weights(model, files)
            _read(model, {file: {name: name for name in names} for file, names in files.items()})
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"model.path: {path}: {str(error).strip()}") from None


def weight_files(path: str) -> dict[Path, list[str]]:
    """Names of a model's weights by file, with the files that transformers would choose.

    Raises:
        ValueError, OSError: there are no files, or the index is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        patterns = ["*.safetensors", *CARRIED]  # also what a composite's export needs
        folder = Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns="*/*"))
    if (folder / SINGLE).is_file():
        with safe_open(folder / SINGLE, "pt") as file:
            return {folder / SINGLE: list(file.keys())}
    if not (folder / INDEX).is_file():
        raise ValueError(f"there is neither {SINGLE} nor {INDEX}")
    index = json.loads((folder / INDEX).read_text("utf-8"))
    if "weight_map" not in index:
        raise ValueError(f"{INDEX} has no weight_map")
    names: dict[Path, list[str]] = {}
    for name, file in index["weight_map"].items():
        names.setdefault(folder / file, []).append(name)
    return names


def base_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors of a model without those of an adapter, with the names that they have without it.

    A weight in NF4 has a stand-in, which `copy_shard` fills.
    """
    state = model.state_dict()
    for name in [n for n in state if n.endswith(f".{SCALES}")]:
        weight = f"{name.removesuffix(SCALES)}weight"
        if (scales := state[name]).dtype == torch.uint8:
            state[weight] = stand_in(state[weight], scales)
            del state[name]
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if not ADAPTER_NAME.search(name)
    }


def as_stored(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model with the names, and in the pieces, of its files."""
    if not extract_weight_conversions_for_model(model):
        return tensors
    return revert_weight_conversion(model, tensors)


def check_weights(model: PreTrainedModel, files: Mapping[Path, Iterable[str]]) -> None:
    """Check by the files' headers that they have all of the model's weights and no others.

    Raises:
        ValueError: weights are missing or unexpected, or a shape or dtype does not match.
        OSError, SafetensorError: a file is missing or damaged.
    """
    stored = as_stored(model, base_weights(model))
    wanted = {name: list(tensor.shape) for name, tensor in stored.items()}
    found: set[str] = set()
    for file, names in files.items():
        with safe_open(file, "pt") as content:
            for name in names:
                if name in wanted:
                    check_tensor(name, content.get_slice(name), wanted[name], file.name)
                found.add(name)
    _check_names(model, wanted.keys(), found)


def check_tensor(name: str, header: Any, shape: list[int] | None, file: str) -> None:
    """Raise ValueError if a tensor of a file has another shape (None: any), or is quantized."""
    if shape is not None and header.get_shape() != shape:
        raise ValueError(f"{name} is {header.get_shape()} in {file}, but {shape} in the model")
    if header.get_dtype() not in FLOATS:
        raise ValueError(
            f"{name} is stored as {header.get_dtype()}; quantized weights cannot be trained"
        )


def _check_names(model: PreTrainedModel, wanted: Set[str], found: set[str]) -> None:
    """Raise ValueError if weights are missing or unexpected."""
    unexpected = model._keys_to_ignore_on_load_unexpected or ()
    ignored = re.compile("|".join(f"({p})" for p in [*unexpected, r"rotary_emb\.inv_freq$"]))
    tied = model.all_tied_weights_keys
    known = found | {a for a, b in tied.items() if b in found}
    known |= {b for a, b in tied.items() if a in found}
    extra = {name for name in found - wanted if not ignored.search(name)}
    for what, names in (("missing", wanted - known), ("unexpected", extra)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            raise ValueError(f"{what} weights: {listed}")


def _read_converted(model: PreTrainedModel, files: Mapping[Path, list[str]]) -> None:
    """Read weights that transformers renames or merges."""
    wanted = base_weights(model)
    file_of = {name: file for file, names in files.items() for name in names}
    renamed, merged, unknown = translate(model, wanted, file_of)
    targets = {target for one in merged for target in one.targets}
    _check_names(model, wanted.keys(), {*renamed.values(), *targets, *unknown})
    for one in merged:
        _read_merged(one, model, wanted, file_of)
    _read(
        model,
        {
            file: {name: renamed[name] for name in names if name in renamed}
            for file, names in files.items()
        },
    )


def _read_text_model(model: PreTrainedModel, files: Mapping[Path, list[str]]) -> None:
    """Read the weights of a composite's text model."""
    names = text_names(files)
    found = {name for own in names.values() for name in own.values()}
    _check_names(model, base_weights(model).keys(), found)
    _read(model, names)


def _read_merged(
    merged: Merged,
    model: PreTrainedModel,
    wanted: Mapping[str, torch.Tensor],
    file_of: Mapping[str, Path],
) -> None:
    """Read and merge: this rank's experts if they are stacked, else the weights of a layer."""
    whole = wanted[merged.first]
    local, own = local_shard(whole)
    stacked = merged.stacks(len(whole))
    if stacked and not local.numel():
        return
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        tensors: dict[str, list[torch.Tensor]] = {}
        for pattern, names in merged.sources.items():
            tensors[pattern] = []
            for name in names[own] if stacked else names:
                file = file_of[name]
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, "pt"))
                check_tensor(name, opened[file].get_slice(name), None, file.name)
                tensors[pattern].append(opened[file].get_tensor(name))
        try:
            made = merged.make(model, tensors)
        except RuntimeError as error:  # of torch.cat or torch.stack
            raise ValueError(f"{merged.first} cannot be merged: {first_line(error)}") from None
        del tensors
    for name, tensor in made.items():
        local, _ = local_shard(wanted[name])
        shape = list(local.shape if stacked else wanted[name].shape)
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in the files, but {shape} in the model"
            )
        if stacked:
            local.copy_(tensor)
        else:
            copy_shard(wanted[name], tensor)


def _read(model: PreTrainedModel, files: Mapping[Path, Mapping[str, str]]) -> None:
    """Read tensors of files: for each file name -> name in the model."""
    wanted = base_weights(model)
    tied = model.all_tied_weights_keys
    done: set[str] = set()
    for file, names in files.items():
        with safe_open(file, "pt") as content:
            for name, target in names.items():
                if target not in wanted:
                    continue
                header = content.get_slice(name)
                check_tensor(name, header, list(wanted[target].shape), file.name)
                source = tied.get(target, target)
                if source not in done:
                    copy_shard(wanted[target], header)
                    done.add(source)
                elif not _same_shard(wanted[target], header):
                    raise ValueError(
                        "config.json ties lm_head to the embeddings, but the files have two "
                        "different ones; set tie_word_embeddings to false in config.json"
                    )


def copy_shard(tensor: torch.Tensor, source: Any) -> None:
    """Fill this rank's shard from a whole tensor, or from its slice in a file."""
    if hasattr(tensor, "nf4"):
        (codes, own), (scales, _) = map(local_shard, tensor.nf4)
        if codes.numel():
            fill(codes, scales, source[own])
        return
    local, part = local_shard(tensor)
    if local.numel():
        local.copy_(source[part if tensor.dim() else ...])  # a buffer may have no dimension


def _same_shard(tensor: torch.Tensor, source: Any) -> bool:
    local, part = local_shard(tensor)
    return not local.numel() or torch.equal(local, source[part].to(local))


def local_shard(tensor: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """This rank's shard of a tensor, and its slice of the whole tensor's first dimension."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(None)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), slice(offset[0], offset[0] + shape[0])


def _compute_buffers(model: PreTrainedModel, path: str) -> None:
    """Compute the buffers that files do not have (rotary frequencies), as transformers does."""
    for name, buffer in model.named_non_persistent_buffers():
        module = model.get_submodule(name.rpartition(".")[0])
        # A value that no buffer has, to see that it is replaced.
        blank = torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min
        buffer.fill_(blank)
        model._init_weights(module)
        if not buffer.isfinite().all() or (buffer == blank).any():
            raise InputError(f"model.path: {path}: transformers does not compute its buffer {name}")
