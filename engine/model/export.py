"""The student as a Hugging Face folder that plain transformers loads.

Neither a device nor the host ever holds the whole model: tensors come one by one, the host keeps
those of the file that is being written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
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
from redi.engine.model.load import empty_model
from redi.engine.model.student import Student
from redi.engine.model.weights import INDEX, as_stored, check_weights, weight_files

FILE_BYTES = 5 * 10**9
"""Most bytes of weights in a file, but that a single tensor may be larger."""


def export(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    world: World,
) -> None:
    """Gather the weights tensor by tensor and write them on rank 0; every rank must call it.

    Raises:
        RunError: the weights are not finite, or what was written would not load.
    """
    state: dict[str, Any] = get_model_state_dict(student)
    model = architecture_to_export(student.model.config, dtype)
    files = files_of(model)
    tensors = (_whole(state[f"model.{name}"]) for names in files.values() for name in names)

    def write() -> None:
        if world.is_main:
            try:
                generation = student.model.generation_config
                write_folder(folder, model, files, tensors, tokenizer, generation)
            finally:
                deque(tensors, maxlen=0)  # the others gather to the end, whatever happened here

    if not world.is_main:
        deque(tensors, maxlen=0)
    # The others wait: a recipe that follows reads the folder.
    world.rank0_first(write)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def architecture_to_export(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """What is exported, without weights; its configuration says so."""
    model = empty_model(deepcopy(config), dtype)
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    return model


def files_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """Which file holds which weights; a tied one is in none, as transformers has it."""
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

    The folder appears whole or not at all: it is written beside its place, checked, and renamed.

    Args:
        model: the architecture on the meta device, in the dtype to write.
        files: names of weights by file.
        tensors: the weights in this order, of any dtype, on any device.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _save_config(model.config, partial)
        _save_tokenizer(tokenizer, partial)
        if generation is not None:
            generation.save_pretrained(partial)
        _write_weights(partial, model, files, tensors)
        _check_loads(partial, len(tokenizer))
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise RunError(
                f"{folder} cannot be written: {error}; the same command goes on with the export"
            ) from error
        raise
    for file in partial.iterdir():
        # safetensors writes files that only their owner may read.
        shutil.copymode(partial / "config.json", file)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)  # it stays until the new one is in its place
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _save_config(config: Any, folder: Path) -> None:
    """Write config.json for transformers 5 and 4.

    4 takes `rope_theta` from the top level (10000 where it is absent), scaling from `rope_scaling`
    and the dtype from `torch_dtype`; 5 writes them as `rope_parameters` and `dtype`. 5 reads
    `rope_scaling`, where there is one, in place of `rope_parameters`, so that it is written whole.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text("utf-8"))
    if "dtype" in content:
        content["torch_dtype"] = content["dtype"]
    rope = dict(content.get("rope_parameters") or {})
    if "rope_type" in rope:  # else one dict a layer type, which 4 had no common form for
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                content[key] = rope.pop(key)
        if rope["rope_type"] != "default":
            content["rope_scaling"] = rope
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """OSError where it cannot be written: tokenizers raises an Exception of no kind for that."""
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
            if not weights[name].isfinite().all():
                raise RunError(f"not exported, weights are not finite: {name}")
        weights = {n: tensor.contiguous() for n, tensor in as_stored(model, weights).items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(weights, file)
        total += sum(tensor.nbytes for tensor in weights.values())
    if len(files) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _check_loads(folder: Path, num_tokens: int) -> None:
    """That a folder's files hold what its configuration describes; no weight is loaded."""
    try:
        model = empty_model(AutoConfig.from_pretrained(folder))
        check_weights(model, weight_files(str(folder)))
    except Exception as error:  # whatever stops transformers would stop the user
        raise RunError(f"{folder} does not load as it was saved: {error}") from error
    if len(AutoTokenizer.from_pretrained(folder)) != num_tokens:
        raise RunError(f"{folder}: the tokenizer does not load as it was saved")


def check_exportable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, at: Path) -> None:
    """Before step 1: save all but the weights, load it again, compare names and shapes.

    What cannot be saved should stop a run before it has cost anything, not after its last step.

    Args:
        model: unsharded.
        tokenizer: the one that is exported with it.
        at: a folder to write in; it is removed again.

    Raises:
        RunError: what is wrong.
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
            raise RunError("the exported tokenizer would not load as it is")
    except RunError:
        raise
    except Exception as error:  # transformers validates on saving, with errors of any type
        raise RunError(f"the export would fail: {' '.join(str(error).split())}") from error
    finally:
        shutil.rmtree(at, ignore_errors=True)
