"""Turns the export of a composite's text model into that of the composite."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from redi.engine.errors import RunError
from redi.engine.model.composite import CARRIED, SOURCE, text_name
from redi.engine.model.weights import INDEX, weight_files


def restore_composite(folder: Path, model: PreTrainedModel) -> None:
    """Turn a text model's export into that of the composite that it comes from.

    Args:
        folder: a complete export of the text model.
        model: the text model; its configuration has `SOURCE`.

    Raises:
        RunError: the source no longer fits the text model.
        OSError, ValueError, SafetensorError: the source cannot be read.
    """
    source = weight_files(getattr(model.config, SOURCE))
    trained = {name: file for file, names in weight_files(str(folder)).items() for name in names}
    used: set[str] = set()
    whole = folder / "composite"
    whole.mkdir()
    index: dict[str, str] = {}
    total = 0
    for file, names in source.items():
        tensors = {}
        with safe_open(file, "pt") as content:
            for name in names:
                own = text_name(name)
                own = model.all_tied_weights_keys.get(own, own)
                if own in trained:
                    with safe_open(trained[own], "pt") as export:
                        tensors[name] = export.get_tensor(own)
                    used.add(own)
                elif own is None:
                    tensors[name] = content.get_tensor(name)
                else:
                    raise RunError(f"the trained model has no {own}, which {file} has ({name})")
        save_file(tensors, whole / file.name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if missing := sorted(trained.keys() - used):
        raise RunError(f"{file.parent} has no {missing[0]}, which was trained")
    if (file.parent / INDEX).is_file():
        text = {"metadata": {"total_size": total}, "weight_map": index}
        (whole / INDEX).write_text(json.dumps(text, indent=2) + "\n", "utf-8")
    for one in {*trained.values()}:
        one.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    (folder / "config.json").unlink()
    for one in whole.iterdir():
        os.replace(one, folder / one.name)
    whole.rmdir()
    for pattern in CARRIED:
        for one in file.parent.glob(pattern):
            if not (folder / one.name).exists() and one.name != INDEX:
                shutil.copyfile(one, folder / one.name)
