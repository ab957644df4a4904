"""Offloaded inputs of blocks: bytes that a real run copied, and an unchanged result."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import packed_row
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from redi.engine.cli import main
from redi.engine.config.sections import ObjectiveConfig, ShardConfig
from redi.engine.distributed import join_world
from redi.engine.errors import RunError
from redi.engine.loss.packed_loss import PackedLoss, StepTotals
from redi.engine.model.attention import register_attention
from redi.engine.model.sharding import shard
from redi.engine.model.student import Student

Steps = Callable[[Path], list[dict[str, Any]]]
Recipe = Callable[..., Path]

BLOCKS, WIDTH = 5, 64
PACKS = [packed_row(lengths, 0, 50) for lengths in ((9, 7), (20, 5), (3, 3))]


def student_of(dropout: float = 0.0, **section: Any) -> Student:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention("sdpa"))
    student = Student(model.train(), PackedLoss(ObjectiveConfig(name="redi")))
    return shard(student, ShardConfig(**section), torch.float32, torch.device("cpu"), row_tokens=64)


def gradients(student: Student, passes: int = 1) -> list[Tensor]:
    """Of all packs as micro-steps."""
    torch.manual_seed(1)  # of dropout
    for pack in PACKS * passes:
        student(pack, StepTotals(units=1, targets=14)).loss.backward()
    return [parameter.grad.full_tensor() for parameter in student.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("checkpointing", ["attention", "full"])
def test_gradients_are_bit_equal_and_each_input_is_copied_once(
    checkpointing: str, dropout: float
) -> None:
    with join_world():
        plain = gradients(student_of(dropout))
        student = student_of(dropout, checkpointing=checkpointing, offload=True)
        offloaded = gradients(student)
    for one, other in zip(plain, offloaded, strict=True):
        assert torch.equal(one, other)
    assert student.offload is not None
    tokens = sum(pack.num_tokens for pack in PACKS)
    gib = (BLOCKS - 1) * tokens * WIDTH * 4 / 2**30
    assert student.offload.figures() == {"offloaded_gib": gib, "fetched_gib": gib}
    assert student.offload.figures() == {"offloaded_gib": 0.0, "fetched_gib": 0.0}


def test_host_memory_is_allocated_once_and_inputs_are_freed_in_forward() -> None:
    with join_world():
        student = student_of(checkpointing="full", offload=True)
        offload = student.offload
        assert offload is not None
        allocated: list[int] = []
        inputs: list[weakref.ref[Tensor]] = []
        allocate, save = offload.allocate, offload.save

        def counting(size: int) -> Tensor:
            allocated.append(size)
            return allocate(size)

        def watching(block: int, hidden: Tensor) -> None:
            gc.collect()
            # transformers holds the embeddings, the input of block 0, through the whole forward.
            alive = {number for number, ref in enumerate(inputs) if ref() is not None}
            assert alive <= {0, block - 1}
            inputs.append(weakref.ref(hidden.untyped_storage()))
            save(block, hidden)

        offload.allocate = counting
        offload.save = watching  # type: ignore[method-assign]
        out = student(PACKS[1], StepTotals(units=1, targets=14))
        assert [ref() is not None for ref in inputs] == [False] * (BLOCKS - 1) + [True]
        out.loss.backward()
        offload.save = save  # type: ignore[method-assign]
        gradients(student, passes=2)
    # For a pack of 64 tokens, although the first had fewer than a later one.
    assert allocated == [16384] * (BLOCKS - 1)


def test_too_little_host_memory_is_one_line() -> None:
    def refuse(size: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nmore")

    with join_world():
        student = student_of(checkpointing="full", offload=True)
        assert student.offload is not None
        student.offload.allocate = refuse
        with pytest.raises(RunError) as error:
            student(PACKS[0], StepTotals(units=1, targets=14))
    assert str(error.value) == (
        "shard.offload: 0.00 GiB of host memory for the input of block 0 of 5 cannot be allocated "
        "(CUDA error: out of memory); lower train.row_tokens, or remove shard.offload"
    )


def test_scoring_and_a_forward_without_backward_copy_nothing_back() -> None:
    with join_world():
        student = student_of(checkpointing="full", offload=True)
        assert student.offload is not None
        with torch.no_grad():
            student(PACKS[0], None)
        assert student.offload.figures() == {"offloaded_gib": 0.0, "fetched_gib": 0.0}
        student(PACKS[0], StepTotals(units=1, targets=14))
        student.offload.figures()
        assert all(map(torch.equal, gradients(student), gradients(student_of())))


def test_a_real_run_copies_all_inputs_but_the_last_block_s(
    recipe: Recipe, steps: Steps, tmp_path: Path, world: Path
) -> None:
    lines, weights = {}, {}
    modes: dict[str, dict[str, Any]] = {
        "none": {},
        "full": {"shard.checkpointing": "full", "shard.offload": True},
        "attention": {"shard.checkpointing": "attention", "shard.offload": True},
    }
    for name, changes in modes.items():
        changes |= {"eval.path": str(world / "traces.jsonl"), "train.max_steps": 3}
        assert main(["train", str(recipe(name, changes))]) == 0
        lines[name] = steps(tmp_path / name)
        weights[name] = load_file(tmp_path / name / "export" / "model.safetensors")
    width = Qwen2Config.from_pretrained(world / "model").hidden_size
    blocks = Qwen2Config.from_pretrained(world / "model").num_hidden_layers
    assert "offloaded_gib" not in lines["none"][0]
    for name in ("full", "attention"):
        for line, plain in zip(lines[name], lines["none"], strict=True):
            assert line["micro_steps"] > 1
            computed = line["tokens"] - line["shared_tokens"]
            copied = (blocks - 1) * computed * width * 4 / 2**30
            assert line["offloaded_gib"] == line["fetched_gib"] == copied
            assert line["loss"] == plain["loss"]
            assert line["grad_norm"] == plain["grad_norm"]
        for key, weight in weights[name].items():
            assert torch.equal(weight, weights["none"][key]), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{"reduce": "step"}, {"reduce": "micro_step"}, {"gather": "step"}],
    ids=lambda layout: "-".join(*layout.items()),
)
def test_two_ranks_are_bit_equal_with_and_without(
    recipe: Recipe, redi: Callable[..., Any], steps: Steps, tmp_path: Path, layout: dict[str, str]
) -> None:
    kept = {"shard.checkpointing": "full"} | {f"shard.{key}": of for key, of in layout.items()}
    paths = [recipe("kept", kept), recipe("offloaded", kept | {"shard.offload": True})]
    done = redi("train", *paths, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    pairs = zip(steps(tmp_path / "kept"), steps(tmp_path / "offloaded"), strict=True)
    for plain, line in pairs:
        assert line["offloaded_gib"] == line["fetched_gib"] > 0
        for figure in ("loss", "grad_norm", "update_norm"):
            assert line[figure] == plain[figure]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, 'shard.offload needs shard.checkpointing = "attention" or "full", got "none"'),
        ({"shard.checkpointing": "selective"}, 'or "full", got "selective"'),
        (
            {"shard.checkpointing": "full", "shard.compile": True},
            "shard.offload and shard.compile exclude each other",
        ),
    ],
    ids=["none", "selective", "compile"],
)
def test_what_cannot_be_offloaded_is_one_line(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    assert main(["train", str(recipe("r", {"shard.offload": True, **changes}))]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
