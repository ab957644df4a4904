"""LoRA by peft: the model is frozen in the compute dtype, small float32 matrices are trained.

An adapted layer computes W x + scaling B A x. peft keeps W as its `base_layer`, with A and B as
`lora_A` and `lora_B`, and for DoRA one magnitude per output. They are added on the meta device,
before sharding, and get their values after it. A group of FSDP2 may hold both: all gathered weights
have the compute dtype, and all gradients are those of float32 weights.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from redi.engine.config.sections import AdapterConfig, Recipe
from redi.engine.errors import InputError
from redi.engine.model.composite import SOURCE
from redi.engine.model.load import empty_model, first_line
from redi.engine.model.nf4 import SCALES, dequantized, quantize_blocks
from redi.engine.model.weights import ADAPTER_NAME, check_tensor, copy_shard, local_shard
from redi.engine.storage import fetch_model

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the model's own weights alone."""


@dataclass(frozen=True)
class Adapter:
    """What was added to a model."""

    config: LoraConfig
    scalings: Mapping[str, float]
    """Scaling of each adapted layer, by its name in the model."""
    is_new: bool
    """True if it does not continue another one: it starts as no change of the model."""
    quantized: str | None
    """Which layers of the model are in NF4; None: none is."""

    def text(self, model: nn.Module) -> str:
        """One line for the log."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        kind = "DoRA" if self.config.use_dora else "LoRA"
        dtype = str(frozen[0].dtype).removeprefix("torch.")
        kept = f"{sum(p.numel() for p in frozen):,} are frozen in {dtype}"
        if self.quantized:
            size = sum(p.nbytes for p in frozen) / 2**30
            kept = f"{self.quantized} are frozen in NF4, the rest in {dtype} ({size:.2f} GiB)"
        return (
            f"{kind} of rank {self.config.r} on {len(self.scalings)} linear layers: {trained:,} "
            f"weights are trained, {kept}"
        )


def add_adapter(model: PreTrainedModel, section: AdapterConfig, dtype: torch.dtype) -> Adapter:
    """Freeze a model on the meta device and add an adapter without values to it, in place.

    Args:
        model: unsharded, with its own lm_head.
        section: an adapter is wanted.
        dtype: of computation; the frozen weights are stored in it.

    Raises:
        InputError: peft is not installed, or the adapter does not fit the model.
    """
    try:
        from peft import inject_adapter_in_model
        from peft.tuners.lora import Linear as LoraLinear
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise InputError(
            "adapter: peft is not installed: pip install 'redi-engine[lora]'"
        ) from None
    where = "adapter.targets" if section.path is None else f"adapter.path: {section.path}"
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)  # not the buffers: rotary frequencies are float32
    linear = _linear_layers(model)
    names = sorted({name.rpartition(".")[2] for name in linear})
    targets = [name for name in names if not _means_experts(name, model)]
    known = ", ".join(targets)
    for target in section.names or ():
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise InputError(
                f"{where}: no linear layer of a block is called {target}; there are {known}"
            )
        if _means_experts(target, model):
            raise InputError(
                f"{where}: peft takes {target} for the stacked experts, which cannot be adapted; "
                f"use some of {known}"
            )
    config = new_config(section, targets) if section.path is None else stored_config(section)
    try:
        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise InputError(f"{where}: {first_line(error)} The blocks have {known}") from None
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    quantized = None
    if section.base == "nf4":
        if config.use_dora:
            raise InputError(
                'adapter.dora is not available with adapter.base = "nf4": magnitudes need the '
                "weights; remove one of them"
            )
        quantized = quantize_blocks(model)
    for name, module in adapted.items():
        if name not in linear or not isinstance(module, LoraLinear):
            raise InputError(f"{where}: {name} is not a linear layer of a block; leave it out")
    return Adapter(
        config,
        {name: module.scaling["default"] for name, module in adapted.items()},
        section.path is None,
        quantized,
    )


def check_adapter(recipe: Recipe, config: Any, dtype: torch.dtype) -> None:
    """Raise InputError if the recipe's adapter does not fit its model, before data is read."""
    if not recipe.adapter.wanted:
        return
    if hasattr(config, SOURCE) and not recipe.adapter.merge:
        raise InputError(
            f"adapter: {recipe.model.path} is a composite model, for which peft would not find the "
            "adapter of its text model; set adapter.merge = true to export a whole model"
        )
    for name in ("rope_theta", "max_position_embeddings"):
        if getattr(recipe.model, name) is not None and not recipe.adapter.merge:
            raise InputError(
                f"model.{name}: an adapter is used with the model as it is in model.path; set "
                "adapter.merge = true to export a whole model, or change its config.json"
            )
    add_adapter(empty_model(config), recipe.adapter, dtype)


def new_config(section: AdapterConfig, all_linear: Sequence[str]) -> LoraConfig:
    """peft's configuration of a new adapter; `all_linear` is what that target stands for."""
    from peft import LoraConfig

    assert section.rank is not None
    return LoraConfig(
        r=section.rank,
        lora_alpha=2 * section.rank if section.alpha is None else section.alpha,
        lora_dropout=section.dropout,
        target_modules=list(all_linear) if section.names is None else section.names,
        use_dora=section.dora,
        task_type="CAUSAL_LM",
    )


def stored_config(section: AdapterConfig) -> LoraConfig:
    """peft's configuration of the adapter in `adapter.path`, with the section's dropout.

    Raises:
        InputError: there is none, it is not a plain LoRA, or the section asks for another one.
    """
    from peft import LoraConfig, PeftConfig

    folder = Path(section.path or "")
    where = f"adapter.path: {folder}"
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{where} has no {name}; give the folder of a peft adapter")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # an invalid field raises errors of many types
        raise InputError(f"{where}: {first_line(error)}") from None
    if not isinstance(config, LoraConfig):
        raise InputError(f"{where} is a {config.peft_type} adapter; only LoRA is supported")
    more = ("modules_to_save", "target_parameters", "layer_replication", "trainable_token_indices")
    found = [name for name in more if getattr(config, name, None)]
    found += ["bias"] if config.bias != "none" or config.lora_bias else []
    found += ["init_lora_weights"] if config.init_lora_weights not in PLAIN_STARTS else []
    if found:
        raise InputError(f"{where} has {found[0]} = {getattr(config, found[0])!r}, not supported")
    wanted = {"rank": config.r, "alpha": config.lora_alpha, "dora": config.use_dora}
    default = AdapterConfig()
    for name, value in wanted.items():
        if getattr(section, name) not in (getattr(default, name), value):
            raise InputError(
                f"adapter.{name} = {getattr(section, name)}, but {folder} has {value}; leave it out"
            )
    if section.names is not None and set(section.names) != set(config.target_modules):
        raise InputError(f"adapter.targets are not those of {folder}; leave them out")
    config.lora_dropout = section.dropout
    config.inference_mode = False
    return config


def _linear_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers in blocks."""
    inside = {id(module) for module in model.base_model.layers.modules()}
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    }


def _means_experts(target: str, model: PreTrainedModel) -> bool:
    """True if peft takes a target for experts that transformers stacks, here and on loading.

    A mixture may also have linear layers of that name: shared experts, dense blocks.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[target])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it needs the names that are stacked together with this one
        return True
    return bool(config.target_parameters)


@torch.no_grad()
def fill_adapter(model: PreTrainedModel, section: AdapterConfig, seed: int) -> None:
    """Read the adapter of `path`, or give a new one its first values, which change nothing.

    A is drawn from the seed and its name, whatever the number of ranks, as in peft; B is 0. DoRA's
    magnitudes are the norms of the rows of W.

    Args:
        model: sharded or not, with the values of its own weights.
        section: with which `add_adapter` was called.
        seed: of new values.

    Raises:
        InputError: the adapter's file does not fit the model.
    """
    state = model.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if ADAPTER_NAME.search(name)}
    if section.path is not None:
        _read_adapter(tensors, Path(section.path))
        return
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(
                xxhash.xxh3_64_intdigest(f"{seed} {name}".encode())
            )
            whole = torch.empty(tensor.shape)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            copy_shard(tensor, whole)
        elif ".lora_B." in name:
            tensor.zero_()
        else:
            base, _ = local_shard(state[f"{name.partition('.lora_')[0]}.base_layer.weight"])
            local_shard(tensor)[0].copy_(torch.linalg.norm(base.float(), dim=1))


def load_adapter(model: PreTrainedModel, path: str) -> None:
    """Add the adapter of a folder, with its values, to a whole model that is not trained.

    Raises:
        InputError: it does not fit the model.
    """
    section = AdapterConfig(path=path)
    add_adapter(model, section, model.dtype)
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False).to(model.dtype)
    fill_adapter(model, section, seed=0)


def _read_adapter(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    wanted = {stored_name(name): tensor for name, tensor in tensors.items()}
    where = f"adapter.path: {folder}"
    try:
        with safe_open(folder / WEIGHTS, "pt") as content:
            found = set(content.keys())
            for what, names in (
                ("missing", wanted.keys() - found),
                ("more", found - wanted.keys()),
            ):
                if names:
                    raise ValueError(f"{what} weights than the model has: {sorted(names)[0]} ...")
            for name, tensor in wanted.items():
                header = content.get_slice(name)
                check_tensor(name, header, list(tensor.shape), WEIGHTS)
                copy_shard(tensor, header)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{where}: {str(error).strip()}") from None


def stored_name(name: str) -> str:
    """The name of an adapter's tensor in peft's file."""
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return "base_model.model." + name.replace(".default.", ".")


def lasting_path(path: str) -> str:
    """The path of a model as an adapter's folder names it: a directory from the root."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def model_and_adapter(path: str, name: str, cache_dir: Path) -> tuple[str, str | None]:
    """The model and the adapter to load for a path: of an adapter's folder, or of a model.

    Args:
        path: directory or hub name.
        name: option of the path, for messages.
        cache_dir: folder of the cache, for a model on object storage.

    Raises:
        InputError: the adapter's folder does not name its model.
    """
    file = Path(path) / CONFIG
    if not file.is_file():
        return path, None
    try:
        base = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{name}: {file}: damaged ({error})") from None
    if not base:
        raise InputError(f"{name}: {file} does not name its model (base_model_name_or_path)")
    return fetch_model(base, cache_dir, name), path


def tokenizer_of(path: str, adapter: str | None) -> str:
    """The path of a tokenizer: of the adapter's folder if it has one, else of the model."""
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        return adapter
    return path


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that have an adapter."""
    return [m for m in model.modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict)]


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes without its adapter.

    peft's own switch also freezes the adapter, and FSDP2 would take that over for good.
    """
    layers = adapted_layers(model)
    for layer in layers:
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False  # type: ignore[assignment]


@contextmanager
def counting_adapters(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts the adapted layers that run within the block with their adapter, by name."""
    found: Counter[str] = Counter()
    handles = []
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):

            def count(module: nn.Module, *_: Any, name: str = name.rpartition(".")[2]) -> None:
                found[name] += not module.disable_adapters

            handles.append(layer.register_forward_hook(count))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def merged(
    name: str, adapter: Adapter | None, whole: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """A weight of the model with the adapter added to it, in float32 where there is one.

    Args:
        name: in the model without an adapter.
        adapter: None if there is none to add.
        whole: the whole tensor with a name in the adapted model.
    """
    layer, _, kind = name.rpartition(".")
    if adapter is None or layer not in adapter.scalings:
        return _of_model(name, whole)
    base = _of_model(f"{layer}.base_layer.{kind}", whole)
    if kind != "weight":
        return base
    a, b = (whole(f"{layer}.lora_{factor}.default.weight").float() for factor in "AB")
    weight = base.float() + adapter.scalings[layer] * (b @ a)
    if adapter.config.use_dora:
        magnitude = whole(f"{layer}.lora_magnitude_vector.default.weight").float()
        weight *= (magnitude / torch.linalg.norm(weight, dim=1))[:, None]
    return weight


def _of_model(name: str, whole: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A whole tensor of the model itself; a weight in NF4 has its rounded values in float32."""
    tensor = whole(name)
    if tensor.dtype != torch.uint8:
        return tensor
    return dequantized(tensor, whole(f"{name.removesuffix('weight')}{SCALES}"), torch.float32)


def adapter_names(state: Mapping[str, torch.Tensor]) -> Sequence[str]:
    """The names of an adapter's tensors in a model's state, in its order."""
    return [name for name in state if ADAPTER_NAME.search(name)]
