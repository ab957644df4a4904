"""Export of the student as a Hugging Face directory that plain transformers loads.

Neither a device nor the host holds the whole model: tensors are gathered one by one, and the host
keeps those of the current file only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from redi.engine.distributed import World
from redi.engine.errors import RunError
from redi.engine.model.adapter import WEIGHTS, Adapter, adapter_names, merged, stored_name
from redi.engine.model.composite import SOURCE
from redi.engine.model.composite_export import restore_composite
from redi.engine.model.load import empty_model
from redi.engine.model.student import Student
from redi.engine.model.weights import INDEX, as_stored, check_weights, weight_files

FILE_BYTES = 5 * 10**9
"""Maximum bytes of weights in a file, unless a single tensor is larger."""


def export(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    world: World,
    base: str | None = None,
) -> None:
    """Gather the weights tensor by tensor and write them on rank 0. Collective.

    Args:
        base: path of the model without the student's adapter, to write the adapter alone. None:
            write a whole model; an adapter is added to its weights.

    Raises:
        RunError: the weights are not finite, or the written directory does not load.
    """
    state: dict[str, Any] = get_model_state_dict(student)
    model = architecture_to_export(student.model.config, dtype)
    files = files_of(model)
    adapter = student.adapter
    if base is not None:
        files = {WEIGHTS: [name.removeprefix("model.") for name in adapter_names(state)]}
        adapter = None

    def whole(name: str) -> torch.Tensor:
        tensor = state[f"model.{name}"]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def gathered() -> Iterator[torch.Tensor]:
        for names in files.values():
            # Rank 0 writes gigabytes before it gathers the next file's. Gathers that the others
            # had begun by then would outlast their timeout.
            world.after_rank0()
            for name in names:
                yield merged(name, adapter, whole)

    tensors = gathered()

    def write() -> None:
        if base is not None:
            assert student.adapter is not None
            write_adapter(folder, student.adapter, files[WEIGHTS], tensors, tokenizer, base)
            return
        generation = student.model.generation_config
        write_folder(folder, model, files, tensors, tokenizer, generation)

    if not world.is_main:
        deque(tensors, maxlen=0)
    # Other ranks wait until they see the directory, because a following recipe reads it.
    world.from_rank0(write, lambda _: folder.iterdir())


def architecture_to_export(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The exported model without weights, with dtype and architecture in its configuration."""
    model = empty_model(deepcopy(config), dtype)
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    return model


def files_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """Names of the weights by file. As in transformers, tied weights are stored once."""
    state = model.state_dict()
    for name in model.all_tied_weights_keys:
        del state[name]
    return split_torch_state_dict_into_shards(state, max_shard_size=FILE_BYTES).filename_to_tensors


def write_folder(
    folder: Path,
    model: PreTrainedModel,
    files: dict[str, list[str]],
    tensors: Iterator[torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
) -> None:
    """Write configuration, tokenizer, template and weights.

    The directory is replaced atomically: written under another name, checked, and renamed.

    Args:
        folder: the directory.
        model: the architecture on the meta device, in the dtype to write.
        files: names of the weights by file.
        tensors: the weights in the order of `files`, of any dtype, on any device.
        tokenizer: saved with the model.
        generation: saved with the model, unless None.

    Raises:
        RunError: it cannot be written, would not load, or a weight is not finite.
    """
    with replaced(folder) as partial:
        _save_config(model.config, partial)
        _save_tokenizer(tokenizer, partial)
        if generation is not None:
            generation.save_pretrained(partial)
        _write_weights(partial, model, files, tensors)
        check_loads(partial, len(tokenizer))
        if hasattr(model.config, SOURCE):
            restore_composite(partial, model)


def write_adapter(
    folder: Path,
    adapter: Adapter,
    names: Sequence[str],
    tensors: Iterator[torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    base: str,
) -> None:
    """Write an adapter as peft's folder, in float32, with the tokenizer. Else as `write_folder`.

    Args:
        names: of the tensors in the adapted model.
        base: path of the model that the adapter belongs to.
    """
    weights = {
        stored_name(name): tensor.to("cpu", torch.float32)
        for name, tensor in zip(names, tensors, strict=True)
    }
    _check_finite(weights)
    config = deepcopy(adapter.config)
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules)  # a set has another order each time
    config.inference_mode = True
    with replaced(folder) as partial:
        config.save_pretrained(partial)
        _save_tokenizer(tokenizer, partial)
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Replace a directory atomically, by the one that is written within the block.

    Raises:
        RunError: it cannot be written.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise RunError(
                f"{folder} cannot be written: {error}; the same command resumes with the export"
            ) from error
        raise
    # safetensors makes its files readable to their owner only, and copies have their source's mode.
    mode = partial.stat().st_mode & 0o666
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(mode)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)  # kept until the new one is in place
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _save_config(config: Any, folder: Path) -> None:
    """Write config.json for transformers 5 and 4.

    4 reads `rope_theta` from the top level (default 10000), scaling from `rope_scaling` and the
    dtype from `torch_dtype`. 5 writes them as `rope_parameters` and `dtype`. If there is a
    `rope_scaling`, 5 reads it in place of `rope_parameters`, so it is written with all its keys.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text("utf-8"))
    if "dtype" in content:
        content["torch_dtype"] = content["dtype"]
    rope = dict(content.get("rope_parameters") or {})
    if "rope_type" in rope:  # else one dict per layer type, for which 4 has no common form
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                content[key] = rope.pop(key)
        if rope["rope_type"] != "default":
            content["rope_scaling"] = rope
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise OSError if it cannot be written; tokenizers raises a plain Exception."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error)) from error


def _write_weights(
    folder: Path,
    model: PreTrainedModel,
    files: dict[str, list[str]],
    tensors: Iterator[torch.Tensor],
) -> None:
    index: dict[str, str] = {}
    total = 0
    for file, names in files.items():
        weights = {}
        for name in names:
            weights[name] = next(tensors).to("cpu", model.dtype)
        _check_finite(weights)
        weights = {n: tensor.contiguous() for n, tensor in as_stored(model, weights).items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(weights, file)
        total += sum(tensor.nbytes for tensor in weights.values())
    write_index(folder, index, total)


def write_index(folder: Path, index: dict[str, str], total: int) -> None:
    """Write the index of a model's weights, if they are in several files.

    Args:
        index: the file of each weight.
        total: bytes of all weights.
    """
    if len(set(index.values())) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _check_finite(weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise RunError(f"not exported, weights are not finite: {name}")


def check_loads(folder: Path, num_tokens: int) -> None:
    """Check that a directory's files match its configuration, without loading weights."""
    try:
        model = empty_model(AutoConfig.from_pretrained(folder))
        check_weights(model, weight_files(str(folder)))
    except Exception as error:  # any error of transformers would also stop the user
        raise RunError(f"{folder} does not load as it was saved: {error}") from error
    if len(AutoTokenizer.from_pretrained(folder)) != num_tokens:
        raise RunError(f"{folder}: the tokenizer does not load as it was saved")


def check_exportable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, at: Path) -> None:
    """Save all but the weights, load it again, and compare names and shapes.

    It runs before step 1: a model that cannot be saved should fail then, not after the last step.

    Args:
        model: unsharded.
        tokenizer: exported with the model.
        at: directory to write to; it is removed again.

    Raises:
        RunError: the export would fail or would not load.
    """
    shutil.rmtree(at, ignore_errors=True)
    try:
        _save_config(deepcopy(model.config), at)
        tokenizer.save_pretrained(at)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(at)
        loaded = empty_model(AutoConfig.from_pretrained(at)).state_dict()
        here = model.state_dict()
        differing = [
            name
            for name in loaded.keys() | here.keys()
            if name not in loaded or name not in here or loaded[name].shape != here[name].shape
        ]
        if differing:
            raise RunError(f"the export would not load: {', '.join(sorted(differing)[:3])} differ")
        if len(AutoTokenizer.from_pretrained(at)) != len(tokenizer):
            raise RunError("the exported tokenizer would not load unchanged")
    except RunError:
        raise
    except Exception as error:  # transformers validates on saving, with errors of any type
        raise RunError(f"the export would fail: {' '.join(str(error).split())}") from error
    finally:
        shutil.rmtree(at, ignore_errors=True)
