"""A sharded model reads its weights slice by slice; none is silently lost, untied or invented."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from redi.engine.cli import main
from redi.engine.config.sections import ObjectiveConfig, ShardConfig
from redi.engine.distributed import join_world
from redi.engine.errors import InputError
from redi.engine.loss.packed_loss import PackedLoss
from redi.engine.model.build import build_model
from redi.engine.model.sharding import shard
from redi.engine.model.student import Student
from redi.engine.model.weights import read_weights

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    with join_world():
        yield


def saved(folder: Path, config: Any, model_class: type[PreTrainedModel], **how: Any) -> Path:
    torch.manual_seed(3)
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # norms and biases too
    model.to(how.pop("dtype", torch.float32)).save_pretrained(folder, **how)
    return folder


def read(folder: Path, **changes: Any) -> Student:
    """Read as in a run: build, shard, read weights."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        config.rope_parameters[name] = value
    model = build_model(str(folder), config, "sdpa")
    student = Student(model, PackedLoss(ObjectiveConfig()))
    shard(student, ShardConfig(), torch.float32, CPU, row_tokens=64)
    assert all(p.is_meta for p in student.parameters())
    student.to_empty(device=CPU)
    read_weights(student.model, str(folder))
    return student


def assert_same(student: Student, expected: PreTrainedModel) -> None:
    ours, theirs = student.model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.full_tensor(), theirs[name].float()), name
    buffers = dict(expected.named_buffers())
    for name, buffer in student.model.named_buffers():
        assert torch.equal(buffer, buffers.pop(name)), name
    assert not buffers


ROPES = [
    (Qwen2Config, Qwen2ForCausalLM, {"rope_type": "default", "rope_theta": 1e4}),
    (Qwen2Config, Qwen2ForCausalLM, {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}),
    (Qwen3Config, Qwen3ForCausalLM, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}),
    (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "rope_theta": 5e5,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
]


@pytest.mark.parametrize(
    ("tied", "dtype"), [(False, torch.bfloat16), (True, torch.float16), (True, torch.float32)]
)
@pytest.mark.parametrize(("config", "model", "rope"), ROPES, ids=lambda v: str(v)[-12:])
@pytest.mark.usefixtures("alone")
def test_weights_and_buffers_are_those_that_transformers_loads(
    config: Any, model: Any, rope: dict[str, Any], tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = config(**SIZES, tie_word_embeddings=tied, rope_parameters=rope)
    folder = saved(tmp_path, made, model, dtype=dtype)
    student = read(folder)
    assert_same(student, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    embeddings = student.model.get_input_embeddings().weight
    assert (student.head.weight is embeddings) == tied


@pytest.mark.usefixtures("alone")
def test_weights_in_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    folder = saved(tmp_path, Qwen2Config(**SIZES), Qwen2ForCausalLM, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    expected = AutoModelForCausalLM.from_pretrained(folder)
    # A file that is not in the index is ignored, as other formats of the weights are.
    save_file({"junk": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert_same(read(folder), expected)


@pytest.mark.usefixtures("alone")
def test_another_rope_theta_changes_the_frequencies_and_nothing_else(tmp_path: Path) -> None:
    folder = saved(tmp_path, Qwen2Config(**SIZES), Qwen2ForCausalLM)
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters["rope_theta"] = 3e5
    expected = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert_same(read(folder, rope_theta=3e5), expected)
    original = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    assert not torch.equal(expected.model.rotary_emb.inv_freq, original)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
@pytest.mark.usefixtures("alone")
def test_a_tied_weight_may_have_either_name_or_both(kept: str, tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES, tie_word_embeddings=True)
    folder = saved(tmp_path, config, Qwen2ForCausalLM)
    weights = load_file(folder / "model.safetensors")
    embedding = weights.pop("model.embed_tokens.weight")
    names = ["model.embed_tokens.weight", "lm_head.weight"] if kept == "both" else [kept]
    weights |= {name: embedding.clone() for name in names}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(read(folder), AutoModelForCausalLM.from_pretrained(folder))


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.zeros(9)


def quantize(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)


def untie(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop, "missing weights: model.layers.1.mlp.up_proj.weight"),
        (add, "unexpected weights: model.layers.9.mlp.up_proj.weight"),
        (reshape, "model.norm.weight is [9] in model.safetensors, but [96] in the model"),
        (quantize, "model.layers.0.mlp.up_proj.weight is stored as F8_E4M3"),
        (untie, "the files have two different ones"),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_line(
    damage: Callable[[dict[str, torch.Tensor]], None],
    said: str,
    world: Path,
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    copy_model(world / ("tied" if damage is untie else "model"), folder)
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["train", str(recipe("r", {"model.path": str(folder)}))]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"redi: model.path: {folder}: ")
    assert said in last


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"\xff" * 64, "header"),
        ("model.safetensors.index.json", b"{", "Expecting"),
        ("model.safetensors.index.json", b"{}", "has no weight_map"),
        (
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}).encode(),
            "gone.safetensors",
        ),
    ],
)
def test_damaged_files_are_one_clear_line(
    name: str,
    content: bytes,
    said: str,
    world: Path,
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    copy_model(world / "model", folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / name).write_bytes(content)
    assert main(["train", str(recipe("r", {"model.path": str(folder)}))]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"redi: model.path: {folder}: ")
    assert said in last


def copy_model(source: Path, folder: Path) -> None:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


MIXTURES = {
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [0],
        },
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 6}),
}
EXPERT = re.compile(r"experts\.(\d+)\.")


def mixture(folder: Path, kind: str, **how: Any) -> Path:
    """Saved as its authors do, with a tensor per expert."""
    config, model, sizes = MIXTURES[kind]
    return saved(folder, config(**SIZES, **sizes), model, **how)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("alone")
def test_experts_are_those_that_transformers_loads(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = mixture(tmp_path, kind, dtype=dtype, max_shard_size="10KB")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(names.values())) > 3
    assert any(EXPERT.search(name) for name in names)
    assert_same(read(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.usefixtures("alone")
def test_experts_that_are_stored_merged_are_read_too(tmp_path: Path) -> None:
    folder = mixture(tmp_path, "qwen3_moe")
    expected = AutoModelForCausalLM.from_pretrained(folder)
    save_file(expected.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(read(folder), expected)


def test_a_rank_reads_its_experts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 experts on 5 ranks the first three have two each."""
    folder = mixture(tmp_path, "qwen3_moe")
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    seen: set[str] = set()

    class Watched:
        """A file that records whole tensors that are read."""

        def __init__(self, *where: Any) -> None:
            self._file = safe_open(*where)

        def __enter__(self) -> Any:
            self._content = self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._content, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            seen.add(name)
            return self._content.get_tensor(name)

    monkeypatch.setattr("redi.engine.model.weights.safe_open", Watched)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=5)
    try:
        student = read(folder)
    finally:
        dist.destroy_process_group()
    own = range(2, 4)
    assert {int(EXPERT.search(name)[1]) for name in seen} == set(own)
    assert len(seen) == 3 * len(own)  # gate, up and down of the only layer with experts
    stacked = "model.layers.1.mlp.experts.gate_up_proj"
    local = student.model.state_dict()[stacked].to_local()
    assert torch.equal(local, expected[stacked][own.start : own.stop])


def drop_expert(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.experts.4.up_proj.weight"]


def drop_experts(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "layers.1.mlp.experts" in name]:
        del weights[name]


def reshape_expert(weights: dict[str, torch.Tensor]) -> None:
    for expert in range(6):
        weights[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] = torch.zeros(9, 9)


def quantize_expert(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop_expert, "experts.gate_up_proj cannot be merged: Sizes of tensors must match"),
        (drop_experts, "missing weights: model.layers.1.mlp.experts.down_proj, model.layers.1"),
        (add, "unexpected weights: model.layers.9.mlp.up_proj.weight"),
        (reshape, "model.norm.weight is [9] in model.safetensors, but [32] in the model"),
        (reshape_expert, "experts.down_proj is [6, 9, 9] in the files, but [6, 32, 16] in the"),
        (quantize_expert, "experts.0.up_proj.weight is stored as F8_E4M3"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_experts_that_do_not_fit_are_one_clear_line(
    damage: Callable[[dict[str, torch.Tensor]], None], said: str, tmp_path: Path
) -> None:
    folder = mixture(tmp_path, "qwen3_moe")
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        read(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"model.path: {folder}: ")
    assert said in str(error.value)
