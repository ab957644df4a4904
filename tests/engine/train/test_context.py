"""Context parallelism by the real command: ranks that share each pack train what one rank trains.

`test_invariants.py` has it for the objectives, on 2 and 4 ranks.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_cases import draw_weights, tiny_config
from data_cases import shared_data
from processes import ranks
from run_cases import untimed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from redi.engine.cli import main

WriteRecipe = Callable[..., Path]
Steps = Callable[[Path], list[dict[str, Any]]]

LONG = 4096
QWEN = "tokenizers/qwen2.5"
BASE = {
    "optim.eps": 1e-3,
    "optim.schedule": "constant",
    "optim.warmup": 0.0,
    "train.max_steps": 2,
    "train.row_tokens": 128,
}
# What context parallelism composes with: changes to a recipe. The reference is without [shard].
SETTINGS: dict[str, dict[str, Any]] = {
    "selective": {"shard.checkpointing": "selective"},
    "attention": {"shard.checkpointing": "attention"},
    "full": {"shard.checkpointing": "full"},
    "offload": {"shard.checkpointing": "full", "shard.offload": True},
    "each-micro-step": {"shard.reduce": "micro_step"},
    "compiled": {"shard.compile": True},
    "lora": {"adapter.rank": 4},
    "sums": {"objective.name": "signed", "objective.normalisation": "none"},
}
FAMILIES = ("gemma2", "gpt_oss", "qwen3_moe", "mistral", "deepseek_v3")
"""Windows, soft caps and sinks of heads, experts, latent attention."""


@pytest.fixture(scope="module")
def composed(
    world: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_recipe: WriteRecipe,
    redi: Callable[..., Any],
) -> Path:
    """Each setting and family by one rank, and by two that share each pack."""
    folder = tmp_path_factory.mktemp("composed")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    cases = dict(SETTINGS)
    for kind in FAMILIES:
        torch.manual_seed(0)
        config = tiny_config(kind)
        config.vocab_size = len(tokenizer)
        config.max_position_embeddings = 128
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        draw_weights(model)
        model.save_pretrained(folder / f"{kind}-model")
        tokenizer.save_pretrained(folder / f"{kind}-model")
        cases[kind] = {"model.path": str(folder / f"{kind}-model")}
    recipes: dict[int, list[Path]] = {1: [], 2: []}
    for name, changes in cases.items():
        alone = {key: value for key, value in changes.items() if not key.startswith("shard.")}
        recipes[1].append(write_recipe(folder, f"{name}-1", BASE | alone))
        recipes[2].append(write_recipe(folder, f"{name}-2", BASE | changes | {"shard.context": 2}))
    assert main(["train", *map(str, recipes[1])]) == 0
    done = redi("train", *recipes[2], ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SETTINGS, *FAMILIES])
def test_two_ranks_that_share_each_pack_are_one(name: str, composed: Path, steps: Steps) -> None:
    ran = json.loads((composed / f"{name}-2" / "manifest.json").read_text())["ran"]
    assert [one["context_ranks"] for one in ran] == [2, 2]
    compare(steps(composed / f"{name}-2"), steps(composed / f"{name}-1"))


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "positive_logp", "negative_logp"):
            if other[name] is None:
                assert one[name] is None, name
            else:
                assert one[name] == pytest.approx(other[name], rel=1e-6), name
        for name in ("grad_norm", "update_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-5), name
        assert one["tokens"] == other["tokens"]


@pytest.mark.slow
def test_evaluation_and_generation_are_those_of_one_rank(
    world: Path, recipe: Callable[..., Path], redi: Callable[..., Any], tmp_path: Path
) -> None:
    changes = BASE | {
        "eval.path": str(world / "traces.jsonl"),
        "eval.every": 1,
        "objective.name": "dpo",
        "objective.beta": 0.1,
    }
    assert main(["train", str(recipe("one", changes))]) == 0
    done = redi("train", recipe("two", changes | {"shard.context": 2}), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("two", "one")
    )
    evaluations = [[one for one in run if one.get("event") == "eval"] for run in (ours, theirs)]
    assert len(evaluations[0]) == 3
    for one, other in zip(*evaluations, strict=True):
        for name in ("positive_logp", "negative_logp", "margin_accuracy"):
            assert one[name] == pytest.approx(other[name], rel=2e-6), name


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks_for_a_pack(
    recipe: Callable[..., Path], tmp_path: Path, steps: Steps
) -> None:
    longer = BASE | {"train.max_steps": 4, "run.save_every": 2}
    assert main(["train", str(recipe("whole", longer))]) == 0
    run = tmp_path / "run"
    shutil.copytree(
        tmp_path / "whole", run, ignore=shutil.ignore_patterns("export", "step-4", "*finished*")
    )
    for one in ranks(2, "train", recipe("run", longer | {"shard.context": 2}), log=tmp_path / "a"):
        assert one.end() == 0, one.stderr
    assert "resumes after step 2" in (tmp_path / "a0").read_text()
    assert len(steps(run)) == 4
    compare(steps(run), steps(tmp_path / "whole"))


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_it_resumes_bit_equal(
    recipe: Callable[..., Path], tmp_path: Path, steps: Steps
) -> None:
    changes = BASE | {"train.max_steps": 8, "run.save_every": 2, "shard.context": 2}
    for one in ranks(2, "train", recipe("whole", changes), log=tmp_path / "whole-log"):
        assert one.end() == 0, one.stderr
    job = ranks(2, "train", recipe("run", changes), log=tmp_path / "log")
    job[1].wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step-2" / ".metadata").exists())
    job[1].kill()
    assert job[0].end(60) not in (0, None)
    for one in ranks(2, "train", recipe("run", changes), log=tmp_path / "again"):
        assert one.end() == 0, one.stderr
    assert untimed(steps(tmp_path / "run")) == untimed(steps(tmp_path / "whole"))
    weights = [tmp_path / name / "export" / "model.safetensors" for name in ("run", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard.context": 2}, "shard.context = 2 does not divide the 1 ranks of this run"),
        ({"shard.context": 0}, "shard.context must be >= 1, got 0"),
        (
            {"shard.context": 2, "objective.filter_epsilon": 0.1},
            "objective.filter_epsilon is not available with shard.context",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    recipe: Callable[..., Path],
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", str(recipe("run", changes))]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def wide(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model whose activations outweigh all else, with one trace of 4,096 tokens a step."""
    folder = tmp_path_factory.mktemp("wide")
    config = AutoConfig.from_pretrained(world / "model")
    config.intermediate_size, config.max_position_embeddings = 4096, LONG
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(folder / "model")
    with (folder / "traces.jsonl").open("w") as file:
        for number in range(2):
            digits = "".join(str((number + place * place) % 10) for place in range(LONG - 4))
            file.write(json.dumps({"prompt": f"{number}=", "completion": digits}) + "\n")
    return BASE | {
        "model.path": str(folder / "model"),
        "data.path": str(folder / "traces.jsonl"),
        "data.max_tokens": LONG,
        "objective.name": "sft",
        "train.batch": 1,
        "train.row_tokens": LONG,
        "train.max_steps": 1,
    }


@pytest.mark.slow
def test_a_rank_s_activations_are_its_share(
    wide: dict[str, Any], recipe: Callable[..., Path], tmp_path: Path, steps: Steps
) -> None:
    """What the largest rank has resident, less what it has with traces of 8 tokens."""
    short = {"data.max_tokens": 8, "data.overlong": "truncate"}
    peaks = {}
    for size, changes in ((0, short), (1, {}), (2, {}), (4, {})):
        name = f"share-{size}"
        path = recipe(name, wide | changes | {"shard.context": max(1, size)})
        for one in ranks(max(1, size), "train", path, log=tmp_path / f"{name}-log"):
            assert one.end() == 0, one.stderr
        peaks[size] = steps(tmp_path / name)[0]["peak_memory_gib"]
    activations = {size: peaks[size] - peaks[0] for size in (1, 2, 4)}
    assert activations[1] > 0.5
    for size in (2, 4):
        assert activations[size] / activations[1] == pytest.approx(1 / size, abs=0.08), peaks


@pytest.mark.slow
def test_a_real_trace_of_14_000_tokens(
    recipe: Callable[..., Path], tmp_path: Path, steps: Steps
) -> None:
    data, tokenizer = (shared_data() / name for name in ("long_cot_gsm8k.jsonl.gz", QWEN))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16_384,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "model")
    changes = BASE | {
        "model.path": str(tmp_path / "model"),
        "data.path": str(data),
        "data.where": "tokens > 14000",
        "data.max_tokens": 16_384,
        "objective.name": "signed",
        "train.batch": 1,
        "train.row_tokens": 16_384,
        "train.max_steps": 1,
    }
    assert main(["train", str(recipe("one", changes))]) == 0
    shared = recipe("two", changes | {"shard.context": 2})
    for one in ranks(2, "train", shared, log=tmp_path / "log"):
        assert one.end() == 0, one.stderr
    (line,) = steps(tmp_path / "two")
    assert line["tokens"] > 14_000
    compare([line], steps(tmp_path / "one"))
