"""The student as a Hugging Face folder that plain transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from redi.engine.distributed import World
from redi.engine.errors import InputError, RunError
from redi.engine.model.load import read_config
from redi.engine.model.student import Student
from redi.engine.train.checkpoint import complete_checkpoints


def export(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    world: World,
) -> None:
    """Gather the full weights on rank 0 and write them; every rank must call it.

    Raises:
        RunError: the weights are not finite, or what was written does not load.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(student, options=options)
    model = student.model

    def write() -> None:
        if world.is_main:
            weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
            write_folder(folder, model.config, weights, dtype, tokenizer, model.generation_config)

    # The others wait: a recipe that follows reads the folder.
    world.main_first(write)


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
    dtype = getattr(torch, manifest["dtype"])
    shapes = _empty_model(config, torch.float32).state_dict()
    weights = {name: torch.empty(t.shape, dtype=torch.float32) for name, t in shapes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it loads in a single process, which is meant
        dcp.load(
            {"model": {f"model.{name}": tensor for name, tensor in weights.items()}},
            checkpoint_id=checkpoints[step],
            no_dist=True,
        )
    folder = run_dir / f"export-step-{step}"
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"].get("tokenizer") or path)
    try:
        generation_config = GenerationConfig.from_pretrained(path)
    except OSError:
        generation_config = None
    write_folder(folder, config, weights, dtype, tokenizer, generation_config)
    return folder


def write_folder(
    folder: Path,
    config: Any,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
) -> None:
    """Write configuration, tokenizer, template and weights.

    The folder appears whole or not at all: it is written beside its place, loaded, and renamed.
    """
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise RunError(f"{folder}: not written, weights are not finite: {', '.join(bad[:3])}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = _empty_model(config, dtype)
    model.load_state_dict({n: t.to(dtype) for n, t in weights.items()}, assign=True)
    model.tie_weights()
    _save(model, partial, tokenizer, generation_config)
    _, info = AutoModelForCausalLM.from_pretrained(
        partial, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    AutoTokenizer.from_pretrained(partial)
    if problems := [f"{what}: {names}" for what, names in info.items() if names]:
        raise RunError(f"{partial} does not load as it was saved: {'; '.join(problems)}")
    for file in partial.iterdir():
        # safetensors writes files that only their owner may read.
        shutil.copymode(partial / "config.json", file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


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
        empty = _empty_model(model.config, torch.float32)
        empty.config.save_pretrained(at)
        tokenizer.save_pretrained(at)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(at)
        loaded = _empty_model(AutoConfig.from_pretrained(at), torch.float32).state_dict()
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


def _empty_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture without memory for weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _save(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
) -> None:
    if generation_config is not None:
        model.generation_config = generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
