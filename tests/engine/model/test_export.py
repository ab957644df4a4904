"""What a run leaves behind is a Hugging Face folder that plain transformers loads and runs."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from redi.engine.cli import main
from redi.engine.errors import RunError
from redi.engine.model.export import check_exportable, write_folder
from redi.engine.model.load import empty_model

WriteRecipe = Callable[..., Path]
Steps = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="module", params=["model", "tied"])
def finished(
    request: pytest.FixtureRequest,
    world: Path,
    write_recipe: WriteRecipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of four steps, checkpoints at 2 and 4, evaluated on the way."""
    path = write_recipe(
        tmp_path_factory.mktemp("export"),
        "run",
        {
            "model.path": str(world / request.param),
            "run.save_every": 2,
            "eval.path": str(world / "traces.jsonl"),
            "eval.every": 2,
        },
    )
    assert main(["train", str(path)]) == 0
    return path.parent / "run"


def mean_logps(folder: Path, run: Path, world: Path) -> list[float]:
    """Mean log-prob of each correct trace by plain transformers, from text."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    means = []
    for line in (world / "traces.jsonl").read_text().splitlines():
        row = json.loads(line)
        correct = [t["text"] for t in row["traces"] if t["correct"]]
        incorrect = [t["text"] for t in row["traces"] if not t["correct"]]
        for text in correct[: len(incorrect)]:
            messages = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(messages, return_dict=False)
            answer = [{"role": "assistant", "content": text}]
            ids = torch.tensor(tokenizer.apply_chat_template(messages + answer, return_dict=False))
            with torch.no_grad():
                logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
            logps = logp.gather(1, ids[1:, None])[len(prompt) - 1 :]
            means.append(logps.mean().item())
    return means


def test_transformers_finds_the_log_probs_that_the_run_reported(
    finished: Path, world: Path
) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    evals = {line["step"]: line for line in lines if line.get("event") == "eval"}
    assert list(evals) == [0, 2, 4]
    assert main(["export", str(finished), "--step", "2"]) == 0
    for step, folder in ((4, "export"), (2, "export-step-2")):
        means = mean_logps(finished / folder, finished, world)
        assert evals[step]["positive_logp"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert evals[0]["positive_logp"] < evals[4]["positive_logp"] - 1e-3
    assert 0 <= evals[4]["margin_accuracy"] <= 1


def test_it_generates_and_keeps_template_and_tying(finished: Path, world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "export")
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "123="}], return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    original = AutoTokenizer.from_pretrained(world / "model")
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.get_vocab() == original.get_vocab()
    tied = model.config.tie_word_embeddings
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embeddings.weight.data_ptr() == head.weight.data_ptr()) == tied
    for file in (finished / "export").iterdir():
        assert file.stat().st_mode & 0o777 == (finished / "recipe.toml").stat().st_mode & 0o777


def test_the_export_of_the_last_checkpoint_is_the_export(finished: Path) -> None:
    assert main(["export", str(finished)]) == 0
    ours, theirs = (finished / n / "model.safetensors" for n in ("export-step-4", "export"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_large_weights_lie_in_several_files(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redi.engine.model.export.FILE_BYTES", 300_000)
    assert main(["export", str(finished)]) == 0
    folder = finished / "export-step-4"
    sizes = [file.stat().st_size for file in folder.glob("model-*-of-*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 310_000
    assert not (folder / "model.safetensors").exists()
    split = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    whole = AutoModelForCausalLM.from_pretrained(finished / "export").state_dict()
    assert split.keys() == whole.keys()
    assert all(torch.equal(split[name], whole[name]) for name in whole)


def test_what_is_not_finite_is_not_exported_and_what_was_there_stays(
    world: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    state = model.state_dict()

    def export() -> None:
        files = {"model.safetensors": list(state)}
        write_folder(
            tmp_path / "out",
            empty_model(model.config),
            files,
            iter(state.values()),
            tokenizer,
            None,
        )

    export()
    good = (tmp_path / "out" / "model.safetensors").read_bytes()
    state["model.norm.weight"][3] = torch.inf
    with pytest.raises(RunError, match=r"not finite: model\.norm\.weight"):
        export()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_second_recipe_starts_from_the_export_of_the_first(
    recipe: WriteRecipe, steps: Steps, tmp_path: Path
) -> None:
    paths = [
        recipe("one", {"objective.name": "sft"}),
        recipe("two", {"model.path": None}),
        recipe("again", {"model.path": str(tmp_path / "one" / "export")}),
    ]
    assert main(["train", *map(str, paths[:2])]) == 0
    assert main(["train", str(paths[2])]) == 0
    losses = [[line["loss"] for line in steps(tmp_path / name)] for name in ("two", "again")]
    assert losses[0] == losses[1]


def test_a_tokenizer_that_does_not_fit_on_the_disk_is_told_and_leaves_nothing(
    world: Path, tmp_path: Path
) -> None:
    model = empty_model(AutoConfig.from_pretrained(world / "model"))
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # tokenizer.json alone is larger
    try:
        with pytest.raises(RunError, match=r"out cannot be written: File too large"):
            write_folder(tmp_path / "out", model, {}, iter(()), tokenizer, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["export", "nowhere"], "is not a run folder"),
        (["export", "RUN", "--step", "3"], "no complete checkpoint of step 3; it has: 4"),
    ],
)
def test_what_cannot_be_exported_is_an_input_error(
    argv: list[str],
    said: str,
    recipe: WriteRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "RUN" in argv:
        assert main(["train", str(recipe("run"))]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "run") if a == "RUN" else a for a in argv]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_could_not_be_exported_fails_before_step_1(
    world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_exportable(model, tokenizer, tmp_path / "check")
    model.config.intermediate_size += 1  # the configuration no longer describes the weights
    with pytest.raises(RunError, match=r"mlp.* differ"):
        check_exportable(model, tokenizer, tmp_path / "check")
    model.generation_config.max_new_tokens = -3  # transformers refuses to save this
    with pytest.raises(RunError, match="max_new_tokens"):
        check_exportable(model, tokenizer, tmp_path / "check")
    assert not (tmp_path / "check").exists()
