"""Adapters: a run trains them alone, exactly as plain peft, and exports what peft loads."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from architecture_cases import draw_weights, tiny_config
from data_cases import packed_row
from peft import PeftModel
from run_cases import untimed
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from redi.engine.cli import main
from redi.engine.config.parse import load_recipe, train_parser
from redi.engine.console import Console
from redi.engine.data.loader import StepLoader
from redi.engine.data.packing import Cost
from redi.engine.distributed import join_world
from redi.engine.loss.packed_loss import StepTotals
from redi.engine.model.adapter import WEIGHTS, adapter_off
from redi.engine.model.build import build_student, model_config
from redi.engine.model.student import Student
from redi.engine.train.optimizer import make_optimizer
from redi.engine.train.prepare_data import prepare_data

Steps = Callable[[Path], list[dict[str, Any]]]
RATE = 1e-2
STEPS = 3
LORA = {
    "adapter.rank": 4,
    "optim.lr": RATE,
    "optim.schedule": "constant",
    "optim.warmup": 0.0,
    "optim.eps": 1e-3,  # rounding of a gradient near 0 would else be a whole step
    "optim.max_grad_norm": 0.0,
    "train.max_steps": STEPS,
    "run.save_every": 1,
    "run.keep": 0,
}
LAYERS = 3
PER_LAYER = 7


@pytest.fixture(scope="module")
def runs(write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs lora and merged, equal but for the export."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [
        write_recipe(folder, "lora", LORA),
        write_recipe(folder, "merged", LORA | {"adapter.merge": True}),
    ]
    assert main(["train", *map(str, paths)]) == 0
    return folder


def student_of(path: Path, **changes: Any) -> Student:
    """The student of a recipe, as a run builds it, in a world of one rank."""
    argv = [str(path), *(f"--{key.replace('__', '.')}={value}" for key, value in changes.items())]
    recipe = load_recipe(train_parser(), str(path), argv)
    with join_world() as world:
        quiet = Console(active=False)
        return build_student(recipe, model_config(recipe), torch.float32, world, quiet)[0]


def scores(model: Path, out: Path, data: Path) -> np.ndarray:
    assert main(["logprobs", str(model), "--data", str(data), "--out", str(out)]) == 0
    return pq.read_table(out)["logp_sum"].to_numpy()


def test_a_new_adapter_changes_no_bit(recipe: Callable[..., Path]) -> None:
    batch, totals = packed_row((9, 7), 3, 12), StepTotals(units=1, targets=14)
    plain = student_of(recipe("plain"))(batch, totals)
    for name, changes in {"lora": {}, "dora": {"adapter.dora": True}}.items():
        adapted = student_of(recipe(name, LORA | changes))(batch, totals)
        assert torch.equal(adapted.loss, plain.loss)
        assert torch.equal(adapted.sequence_logps, plain.sequence_logps)


@pytest.mark.parametrize("kind", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "deepseek_v3"])
def test_a_mixture_is_adapted_but_for_its_experts(
    kind: str, recipe: Callable[..., Path], world: Path, tmp_path: Path, capfd: Any
) -> None:
    """Its files have a tensor per expert. deepseek_v3 has linear layers named as its experts."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_weights(model)
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    here = {"model.path": str(tmp_path / kind)}
    batch, totals = packed_row((9, 7), 3, 12), StepTotals(units=1, targets=14)
    plain = student_of(recipe("plain", here))(batch, totals)
    student = student_of(recipe("lora", LORA | here))
    assert torch.equal(student(batch, totals).loss, plain.loss)
    assert all(".self_attn." in name for name in student.adapter.scalings)  # type: ignore[union-attr]
    PeftModel(model, student.adapter.config)  # type: ignore[union-attr]
    assert main(["train", str(recipe("no", LORA | here | {"adapter.targets": "gate_proj"}))]) == 2
    named = "is called" if kind == "qwen3_moe" else "takes gate_proj for the stacked experts"
    assert named in capfd.readouterr().err


def test_the_adapter_alone_is_trained_saved_and_counted(runs: Path, world: Path) -> None:
    """Checkpoints hold no weight of the model; a resumed run reads these from `model.path`."""
    metadata = FileSystemReader(runs / "lora" / "checkpoints" / "step-3").read_metadata()
    names = list(metadata.state_dict_metadata)
    model = [name for name in names if name.startswith("model.")]
    assert len(model) == 2 * LAYERS * PER_LAYER
    assert all(".lora_" in name for name in names if "param_groups" not in name)
    moments = [name for name in names if "exp_avg" in name]
    assert len(moments) == 2 * len(model)
    ran = json.loads((runs / "lora" / "manifest.json").read_text())["ran"]
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert ran[0]["adapter"] == dict.fromkeys(kinds, LAYERS)


def test_optimizer_and_masters_are_those_of_the_adapter(recipe: Callable[..., Path]) -> None:
    student = student_of(recipe("run", LORA), train__dtype="bfloat16")
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * LAYERS * PER_LAYER
    for name, parameter in student.named_parameters():
        assert parameter.dtype == torch.float32 or name not in trained
    path = recipe("run", LORA)
    optimizer = make_optimizer(student, load_recipe(train_parser(), str(path), [str(path)]).optim)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_frozen_head_costs_two_products(recipe: Callable[..., Path], adapted: bool) -> None:
    """Logits and dX; with all weights trained also dW."""
    student = student_of(recipe("run", LORA | {"adapter.rank": 4 if adapted else None}))
    hidden = torch.randn(16, student.head.weight.shape[1], requires_grad=True)
    batch, totals = packed_row((9, 7), 3, 12), StepTotals(units=1, targets=14)
    student(batch, totals)  # counted
    student.hidden_states = lambda _: hidden  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        student.score_or_loss(batch, totals).loss.backward()
    products = sum(
        event.name in ("aten::mm", "aten::addmm_", "aten::addmm") for event in trace.events()
    )
    assert products == (2 if adapted else 3)


def test_three_steps_are_those_of_plain_peft(runs: Path, recipe: Callable[..., Path]) -> None:
    """transformers' model with peft's adapter and torch's AdamW, document by document."""
    path = runs / "lora.toml"
    settings = load_recipe(train_parser(), str(path), [str(path)])
    first = student_of(path)
    with join_world() as alone:
        data = prepare_data(settings, alone, Console(active=False))
    start = recipe("start", LORA | {"optim.lr": 0.0, "train.max_steps": 1})
    assert main(["train", str(start)]) == 0
    base = AutoModelForCausalLM.from_pretrained(settings.model.path, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, start.with_suffix("") / "export", is_trainable=True)
    drawn = first.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.full_tensor()
    there = base.model.layers[0].self_attn.q_proj.lora_A.default.weight
    assert torch.equal(drawn, there)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=RATE,
        eps=settings.optim.eps,
        weight_decay=settings.optim.weight_decay,
    )
    sizes = {"row_tokens": 4096, "rank": 0, "world_size": 1, "cost": Cost(1.0, 0.0)}
    loader = StepLoader(data.tokens, data.examples, data.schedule, **sizes)
    for batches, _ in zip(loader.steps(0), range(STEPS), strict=False):
        loss = torch.zeros(())
        for index in data.examples.units[batches.units].flatten().tolist():
            ids = torch.from_numpy(data.tokens.ids(index).astype("int64"))
            logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            mean = logp.gather(1, ids[1:, None])[data.tokens.prompt_lengths[index] - 1 :].mean()
            sign = 1.0 if data.tokens.signs[index] > 0 else -settings.objective.alpha
            loss = loss - sign * mean / len(batches.units)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = load_file(runs / "lora" / "export" / WEIGHTS)
    theirs = {n.replace(".default.", "."): p for n, p in model.named_parameters() if "lora_" in n}
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < 1e-6, name
    moved = max(weight.abs().max() for name, weight in ours.items() if "lora_B" in name)
    assert moved > RATE


@pytest.mark.slow
def test_a_merged_dora_is_that_of_peft(recipe: Callable[..., Path], world: Path) -> None:
    settings = LORA | {"adapter.dora": True}
    alone, merged = recipe("alone", settings), recipe("merged", settings | {"adapter.merge": True})
    assert main(["train", str(alone), str(merged)]) == 0
    same_as_merged_by_peft(world, alone.with_suffix(""), merged.with_suffix(""))


def same_as_merged_by_peft(world: Path, alone: Path, merged: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(world / "model")
    plain = PeftModel.from_pretrained(plain, alone / "export").merge_and_unload()
    for name, weight in load_file(merged / "export" / "model.safetensors").items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_the_merged_model_scores_as_the_adapter_does(
    runs: Path, world: Path, tmp_path: Path
) -> None:
    data = world / "traces.jsonl"
    alone, merged, base = (
        scores(model, tmp_path / f"{number}.parquet", data)
        for number, model in enumerate((runs / "lora", runs / "merged", world / "model"))
    )
    assert np.abs(alone - merged).max() < 1e-4
    assert np.abs(alone - base).max() > 1
    same_as_merged_by_peft(world, runs / "lora", runs / "merged")


@pytest.mark.slow
def test_an_evaluated_adapter_answers_as_the_merged_model(runs: Path, tmp_path: Path) -> None:
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}=", "answer": "1"}}\n' for n in range(40)))
    texts = []
    for model in ("lora", "merged"):
        out = tmp_path / model
        line = ["evaluate", str(runs / model), "--data", str(data), "--out", str(out)]
        more = ["--answer_pattern", "(.)$", "--samples", "2", "--max_new_tokens", "8"]
        assert main([*line, *more]) == 0
        samples = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
        texts.append([sample["traces"][0]["text"] for sample in samples])
    assert len(texts[0]) == 80
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["lora", "merged"])
def test_the_export_of_a_checkpoint_is_that_of_the_run(runs: Path, name: str) -> None:
    assert main(["export", str(runs / name)]) == 0
    for file in (runs / name / "export").iterdir():
        again = runs / name / f"export-step-{STEPS}" / file.name
        assert again.read_bytes() == file.read_bytes(), file.name


def test_a_resumed_run_ends_bit_equal(
    runs: Path, recipe: Callable[..., Path], tmp_path: Path, steps: Steps
) -> None:
    path, run = recipe("lora", LORA), tmp_path / "lora"
    shutil.copytree(
        runs / "lora", run, ignore=shutil.ignore_patterns("export*", "step-2", "step-3")
    )
    assert main(["train", str(path)]) == 0
    same = (run / "export" / WEIGHTS).read_bytes()
    assert same == (runs / "lora" / "export" / WEIGHTS).read_bytes()
    assert untimed(steps(run)) == untimed(steps(runs / "lora"))


@pytest.mark.slow
def test_a_run_whose_model_changed_does_not_resume(
    runs: Path, recipe: Callable[..., Path], tmp_path: Path, world: Path, capfd: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    path = recipe("run", LORA | {"model.path": str(model), "train.max_steps": 1})
    assert main(["train", str(path)]) == 0
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert main(["train", str(path), "--train.max_steps", "2"]) == 2
    assert "model.path: the weights have changed" in capfd.readouterr().err


LAYOUTS = {
    "sharded": {},
    "replicated": {"shard.replicate": 2},
    "gathered": {"shard.gather": "step"},
    "reduced": {"shard.reduce": "micro_step", "shard.checkpointing": "full"},
}


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_two_ranks_train_the_same_adapter(
    recipe: Callable[..., Path], redi: Callable[..., Any], tmp_path: Path, dora: bool
) -> None:
    """However it is sharded; a merged export of two ranks too."""
    settings = LORA | {"adapter.dora": dora}
    merged = settings | {"adapter.merge": True}
    assert main(["train", *(str(recipe(*of)) for of in (("1", settings), ("m1", merged)))]) == 0
    paths = [
        recipe(name, settings | {"train.row_tokens": 64} | changes)
        for name, changes in LAYOUTS.items()
    ]
    done = redi("train", *paths, recipe("m2", merged), ranks=2)
    assert done.returncode == 0, done.stderr
    files = {name: ("1", name, WEIGHTS) for name in LAYOUTS}
    for one, two, file in [*files.values(), ("m1", "m2", "model.safetensors")]:
        here, there = (load_file(tmp_path / run / "export" / file) for run in (one, two))
        for name, weight in here.items():
            assert (weight - there[name]).abs().max() < 1e-6, (two, name)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_dropout_is_the_same_when_recomputed(
    recipe: Callable[..., Path], tmp_path: Path, runs: Path, checkpointing: str
) -> None:
    dropped = LORA | {"adapter.dropout": 0.5, "train.max_steps": 2}
    for name, changes in {"kept": {}, "again": {"shard.checkpointing": checkpointing}}.items():
        assert main(["train", str(recipe(name, dropped | changes))]) == 0
    kept, again, without = (
        run / "export" / WEIGHTS for run in (tmp_path / "kept", tmp_path / "again", runs / "lora")
    )
    assert kept.read_bytes() == again.read_bytes()
    assert kept.read_bytes() != without.read_bytes()


@pytest.mark.slow
def test_compiled_blocks_train_the_same_adapter(
    runs: Path, recipe: Callable[..., Path], tmp_path: Path, steps: Steps
) -> None:
    assert main(["train", str(recipe("run", LORA | {"shard.compile": True}))]) == 0
    ours, theirs = (
        load_file(run / "export" / WEIGHTS) for run in (tmp_path / "run", runs / "lora")
    )
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < 1e-6, name
    for mine, other in zip(steps(tmp_path / "run"), steps(runs / "lora"), strict=True):
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_the_adapter_can_be_off_without_being_frozen(recipe: Callable[..., Path]) -> None:
    batch = packed_row((9, 7), 3, 12)
    plain = student_of(recipe("plain"))(batch, None)
    student = student_of(recipe("run", LORA))
    for parameter in student.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    with adapter_off(student), torch.no_grad():
        off = student(batch, None)
    on = student(batch, StepTotals(units=1, targets=14))
    assert torch.equal(off.sequence_logps, plain.sequence_logps)
    assert not torch.allclose(on.sequence_logps, plain.sequence_logps)
    on.loss.backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_following_recipe_continues_the_adapter(
    runs: Path, recipe: Callable[..., Path], steps: Steps, tmp_path: Path
) -> None:
    """Also DPO, whose reference is the model with the adapter of the recipe before."""
    first = recipe("first", LORA)
    dpo = {"objective.name": "dpo", "objective.beta": 0.1, "model.path": None}
    second = recipe("second", LORA | dpo | {"adapter.rank": 4, "train.max_steps": 1})
    assert main(["train", str(first), str(second)]) == 0
    written = tomllib.loads((tmp_path / "second" / "recipe.toml").read_text())
    assert written["adapter"]["path"] == str(tmp_path / "first" / "export")
    assert written["model"]["path"] == tomllib.loads(first.read_text())["model"]["path"]
    line = steps(tmp_path / "second")[0]
    assert line["loss"] == pytest.approx(np.log(2), rel=1e-6)  # no change from its reference
    # The first pairs are those of the first recipe's step 1, which has trained on them since.
    assert line["positive_logp"] != steps(tmp_path / "first")[0]["positive_logp"]


WRONG = {
    "rank": ({"adapter.rank": 0}, "adapter.rank must be >= 1, got 0"),
    "alone": ({"adapter.rank": None, "adapter.merge": True}, "adapter.merge needs adapter.rank"),
    "name": (
        {"adapter.targets": ["q_proj", "query"]},
        "layer of a block is called query",
    ),
    "head": ({"adapter.targets": "lm_head"}, "layer of a block is called lm_head"),
    "none": ({"adapter.targets": []}, "adapter.targets is empty"),
    "path": ({"adapter.path": "nowhere"}, "nowhere has no adapter_config.json"),
    "theta": ({"model.rope_theta": 2e4}, "set adapter.merge = true"),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_are_one_line(
    recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str], what: str
) -> None:
    changes, message = WRONG[what]
    assert main(["train", str(recipe("run", LORA | changes)), "--quiet"]) == 2
    line = capfd.readouterr().err.strip()
    assert message in line
    assert "\n" not in line


def test_a_path_that_does_not_fit_is_named(
    runs: Path, recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = runs / "lora" / "export"
    for changes, message in (
        ({"adapter.rank": 8, "adapter.path": str(adapter)}, f"{adapter} has 4; leave it out"),
        ({"model.path": str(adapter)}, "is an adapter; give the model that it belongs to"),
    ):
        assert main(["train", str(recipe("run", LORA | changes)), "--quiet"]) == 2
        assert message in capfd.readouterr().err
    follows = recipe("follows", {"model.path": None})
    assert main(["train", str(runs / "lora.toml"), str(follows), "--quiet"]) == 2
    assert "the recipe before exports an adapter, and this one has none" in capfd.readouterr().err
