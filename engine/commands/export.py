"""`redi export`: convert a checkpoint to a Hugging Face directory, without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from redi.engine.commands.model_card import write_card
from redi.engine.config.sections import AdapterConfig
from redi.engine.data.fingerprints import model_fingerprint
from redi.engine.errors import InputError
from redi.engine.model.adapter import (
    WEIGHTS,
    adapter_names,
    add_adapter,
    lasting_path,
    merged,
)
from redi.engine.model.composite import SOURCE
from redi.engine.model.export import architecture_to_export, files_of, write_adapter, write_folder
from redi.engine.model.load import empty_model, generation_config, read_config
from redi.engine.model.weights import read_weights
from redi.engine.run_files import check_run_files, read_manifest, read_recipe
from redi.engine.storage import MANIFEST, RECIPE, fetch_model, open_run, shown
from redi.engine.train.checkpoint import checkpoint_reader, complete_checkpoints
from redi.engine.train.run_folder import check_same_model


def export_run(run_dir: Path, step: int | None, cache_dir: Path) -> Path:
    """Write a checkpoint of a run as a Hugging Face directory with a model card.

    Args:
        run_dir: run directory, or the folder to which a run was fetched from object storage.
        step: step of the checkpoint; None: the newest.
        cache_dir: folder of the cache, for a model that must be fetched from object storage.

    Returns:
        The directory, `RUN/export-step-N`; of a run on object storage, its copy on this machine.

    Raises:
        InputError: there is no such run or checkpoint.
    """
    step = find_checkpoint(run_dir, step)
    transformers_logging.disable_progress_bar()
    recipe = read_recipe(run_dir)
    model = recipe.get("model", {})
    if not isinstance(model.get("path"), str):
        raise InputError(f"{run_dir / RECIPE}: damaged (model.path is missing); restore it")
    try:
        section = AdapterConfig(**recipe.get("adapter", {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"{run_dir / RECIPE}: damaged ({error}); restore it") from None
    merges = section.wanted and section.merge
    path, tokenizer_path = (
        fetch_model(one, cache_dir, "model.path", weights=merges)
        for one in (model["path"], model.get("tokenizer") or model["path"])
    )
    changes = (model.get("rope_theta"), model.get("max_position_embeddings"))
    config = read_config(path, *changes, weights=merges)
    if hasattr(config, SOURCE):  # the export has the composite's other weights too
        path = fetch_model(model["path"], cache_dir, "model.path")
        config = read_config(path)
    manifest = read_manifest(run_dir)
    if "dtype" not in manifest:
        raise InputError(f"{run_dir / MANIFEST}: damaged (dtype is missing); restore it")
    dtype = getattr(torch, manifest["dtype"])
    architecture = architecture_to_export(config, dtype)
    files = files_of(architecture)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    generation = generation_config(path)
    folder = run_dir / f"export-step-{step}"
    run = open_run(run_dir)
    checkpoint = run.checkpoint(step)
    if not section.wanted:
        tensors = _checkpointed(checkpoint, architecture, files)
        write_folder(folder, architecture, files, tensors, tokenizer, generation)
    else:
        adapted = empty_model(config)
        if section.path is not None:
            section = replace(section, path=fetch_model(section.path, cache_dir, "adapter.path"))
        adapter = add_adapter(adapted, section, dtype)
        names = adapter_names(adapted.state_dict())
        tensors = _checkpointed(checkpoint, adapted, {WEIGHTS: names})
        if merges:
            check_same_model(model_fingerprint(path, cache_dir), manifest.get("adapter"), run_dir)
            _read(adapted, path, names, tensors)
            state = adapted.state_dict()
            tensors = (
                merged(name, adapter, state.__getitem__) for one in files.values() for name in one
            )
            write_folder(folder, architecture, files, tensors, tokenizer, generation)
        else:
            write_adapter(folder, adapter, names, tensors, tokenizer, lasting_path(model["path"]))
    write_card(run_dir, folder, step)
    run.publish_model(folder.name)
    return folder


def find_checkpoint(run_dir: Path, step: int | None) -> int:
    """The step of a complete checkpoint; None: of the newest.

    Raises:
        InputError: there is no such run or checkpoint.
    """
    if not (run_dir / RECIPE).is_file():
        raise InputError(f"{shown(run_dir)} is not a run directory (it has no recipe.toml)")
    check_run_files(run_dir)
    checkpoints = complete_checkpoints(run_dir)
    if not checkpoints or (step is not None and step not in checkpoints):
        have = ", ".join(map(str, sorted(checkpoints))) or "none"
        wanted = "" if step is None else f" of step {step}"
        raise InputError(f"{shown(run_dir)} has no complete checkpoint{wanted}; available: {have}")
    return max(checkpoints) if step is None else step


@torch.no_grad()
def _read(
    model: PreTrainedModel, path: str, names: Sequence[str], tensors: Iterator[torch.Tensor]
) -> None:
    """Fill a model: its own weights from `path`, those of its adapter from a checkpoint."""
    model.to_empty(device="cpu")
    read_weights(model, path)
    state = model.state_dict()
    for name, tensor in zip(names, tensors, strict=True):
        state[name].copy_(tensor)


def _checkpointed(
    checkpoint: Path | str, model: PreTrainedModel, files: Mapping[str, Sequence[str]]
) -> Iterator[torch.Tensor]:
    """Yield a checkpoint's master weights in the order of `files`; memory holds one file's."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for names in files.values():
        state = {f"model.{name}": torch.empty(shapes[name]) for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # dcp warns of loading in a single process, which is intended
            reader = checkpoint_reader(checkpoint)
            dcp.load({"model": state}, storage_reader=reader, no_dist=True)
        for name in names:
            yield state.pop(f"model.{name}")
