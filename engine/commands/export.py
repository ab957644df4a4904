"""`redi export`: a checkpoint as a Hugging Face folder, without a device for the model."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from redi.engine.errors import InputError
from redi.engine.model.export import architecture_to_export, files_of, write_folder
from redi.engine.model.load import generation_config, read_config
from redi.engine.train.checkpoint import complete_checkpoints


def export_run(run_dir: Path, step: int | None) -> Path:
    """`redi export`: write a checkpoint of a run, the newest or that of `step`.

    Returns:
        The folder, `RUN/export-step-N`.

    Raises:
        InputError: no such run or checkpoint.
    """
    if not (run_dir / "recipe.toml").is_file():
        raise InputError(f"{run_dir} is not a run folder (it has no recipe.toml)")
    checkpoints = complete_checkpoints(run_dir)
    if not checkpoints or (step is not None and step not in checkpoints):
        have = ", ".join(map(str, sorted(checkpoints))) or "none"
        wanted = "" if step is None else f" of step {step}"
        raise InputError(f"{run_dir} has no complete checkpoint{wanted}; it has: {have}")
    transformers_logging.disable_progress_bar()
    step = max(checkpoints) if step is None else step
    recipe = tomllib.loads((run_dir / "recipe.toml").read_text(encoding="utf-8"))
    path = recipe["model"]["path"]
    model = recipe["model"]
    config = read_config(path, model.get("rope_theta"), model.get("max_position_embeddings"))
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    architecture = architecture_to_export(config, getattr(torch, manifest["dtype"]))
    files = files_of(architecture)
    tokenizer = AutoTokenizer.from_pretrained(model.get("tokenizer") or path)
    folder = run_dir / f"export-step-{step}"
    tensors = _checkpointed(checkpoints[step], architecture, files)
    write_folder(folder, architecture, files, tensors, tokenizer, generation_config(path))
    return folder


def _checkpointed(
    checkpoint: Path, model: PreTrainedModel, files: dict[str, list[str]]
) -> Iterator[torch.Tensor]:
    """The master weights of a checkpoint in the order of `files`, a file's worth in memory."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for names in files.values():
        state = {f"model.{name}": torch.empty(shapes[name]) for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it loads in a single process, which is meant
            dcp.load({"model": state}, checkpoint_id=checkpoint, no_dist=True)
        for name in names:
            yield state.pop(f"model.{name}")
