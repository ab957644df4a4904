"""`redi merge`: the mean of weights, in files that transformers loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from redi.engine.cli import main
from redi.engine.commands import merge
from redi.engine.quickstart.task import write_model

SINGLE = "model.safetensors"


@pytest.fixture
def models(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a and b, in bfloat16, and the tied model twice."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "model", "a")
    write_model(Path("b"), seed=1)
    for name in ("tied", "tied-b"):
        shutil.copytree(world / "tied", name)
    for name in ("a", "b"):
        change(Path(name), lambda weights: {k: v.bfloat16() for k, v in weights.items()})
    change(Path("tied-b"), lambda weights: {k: v.flip(0) for k, v in weights.items()})
    return tmp_path


def change(folder: Path, to: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = to(load_file(folder / SINGLE))
    save_file({name: one.contiguous() for name, one in weights.items()}, folder / SINGLE)


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_mean_is_that_of_each_weight_in_float32(models: Path, capsys: Any) -> None:
    assert main(["merge", "a:0.3", "b:0.7", "--out", "out"]) == 0
    assert capsys.readouterr().out == "out\n"
    a, b, mean = map(weights_of, ("a", "b", "out"))
    assert mean.keys() == a.keys()
    for name, found in mean.items():
        expected = 0.3 * a[name].float() + 0.7 * b[name].float()
        assert torch.equal(found, expected.bfloat16()), name
    assert (Path("out") / "chat_template.jinja").read_text()
    assert AutoTokenizer.from_pretrained("out").get_vocab()
    AutoModelForCausalLM.from_pretrained("out")
    made = json.loads((Path("out") / "merge.json").read_text())
    assert [(one["path"], one["weight"]) for one in made["models"]] == [("a", 0.3), ("b", 0.7)]
    assert len({one["fingerprint"] for one in made["models"]}) == 2
    assert not list(models.glob("*.partial"))


def test_a_weight_of_1_and_one_of_0_is_the_first_model_bit_for_bit(models: Path) -> None:
    change(Path("a"), lambda weights: {k: v.where(v > 0, -0.0) for k, v in weights.items()})
    change(Path("b"), lambda weights: {k: v * torch.inf for k, v in weights.items()})
    assert main(["merge", "a:1", "b:0", "--out", "out"]) == 0
    a, mean = weights_of("a"), weights_of("out")
    assert mean.keys() == a.keys()
    for name, found in mean.items():
        assert torch.equal(found.view(torch.int16), a[name].view(torch.int16)), name


def test_files_have_the_usual_modes_whatever_those_of_the_first_model(models: Path) -> None:
    templates = Path("a/additional_chat_templates")
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ messages }}")
    for file in (templates / "rag.jinja", Path("a/tokenizer_config.json")):
        file.chmod(0o400)
    assert main(["merge", "a", "b", "--out", "out"]) == 0
    Path("usual").mkdir()
    Path("usual/file").touch()
    for path in Path("out").rglob("*"):
        usual = Path("usual") if path.is_dir() else Path("usual/file")
        assert path.stat().st_mode == usual.stat().st_mode, path
    assert (Path("out") / "additional_chat_templates" / "rag.jinja").is_file()


def test_many_slices_and_files_hold_the_same_weights(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["merge", "a", "b", "--out", "whole"]) == 0
    monkeypatch.setattr(merge, "FILE_BYTES", 50_000)
    monkeypatch.setattr(merge, "_SLICE_BYTES", 3_000)
    assert main(["merge", "a", "b", "--out", "split"]) == 0
    assert len(list(Path("split").glob("*.safetensors"))) > 5
    whole, split = weights_of("whole"), weights_of("split")
    assert whole.keys() == split.keys()
    assert all(torch.equal(split[name], one) for name, one in whole.items())
    loaded = AutoModelForCausalLM.from_pretrained("split", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], one) for name, one in whole.items())
    # Those files are read in their turn.
    assert main(["merge", "split:1", "a:0", "--out", "again"]) == 0
    assert all(torch.equal(one, whole[name]) for name, one in weights_of("again").items())


@pytest.mark.parametrize("stored", ["once", "twice", "as lm_head"])
def test_tied_embeddings_are_merged_once(stored: str, models: Path) -> None:
    embedding = "model.embed_tokens.weight"

    def store(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = {"lm_head.weight": weights[embedding].clone()}
        rest = {k: v for k, v in weights.items() if k != embedding or stored != "as lm_head"}
        return rest | (head if stored != "once" else {})

    change(Path("tied-b"), store)
    for order in (["tied:0.25", "tied-b:0.75"], ["tied-b:0.75", "tied:0.25"]):
        out = order[0].partition(":")[0] + "-first"
        assert main(["merge", *order, "--out", out]) == 0
        assert "lm_head.weight" not in weights_of(out)
        model = AutoModelForCausalLM.from_pretrained(out)
        one = weights_of("tied")[embedding]
        assert torch.equal(model.lm_head.weight, 0.25 * one + 0.75 * one.flip(0))
        assert model.lm_head.weight is model.get_input_embeddings().weight


def to_int8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"model.norm.weight": weights["model.norm.weight"].to(torch.int8)}


def to_nan(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"model.norm.weight": weights["model.norm.weight"] * torch.nan}


def without_norm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in weights.items() if k != "model.norm.weight"}


def with_short_norm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"model.norm.weight": weights["model.norm.weight"][1:]}


def with_another_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}


BAD: dict[str, tuple[list[str], Callable[..., Any] | None, str]] = {
    "one model": (["a:1"], None, "merge needs two models or more, such as runs/a:0.5 runs/b:0.5"),
    "one weight": (["a:0.5", "b"], None, "b has no weight; give all models one (b:0.5), or none"),
    "weights": (
        ["a:0.5", "b:0.3"],
        None,
        "the weights add up to 0.8, not to 1; for the same ratio give a:0.625 b:0.375",
    ),
    "a sum of 0": (["a:1", "b:-1"], None, "the weights add up to 0, not to 1; change them"),
    "no model": (["a:0.5", "c:0.5"], None, "c: c: no such directory"),
    "another architecture": (
        ["a:0.5", "tied:0.5"],
        None,
        "tied: config.json has tie_word_embeddings = True, but a has False; only models of one",
    ),
    "integers": (
        ["b:0.5", "a:0.5"],
        to_int8,
        "b/model.safetensors: model.norm.weight is stored as I8",
    ),
    "integers in the second": (
        ["a:0.5", "b:0.5"],
        to_int8,
        "b/model.safetensors: model.norm.weight is stored as I8; quantized weights cannot be",
    ),
    "a shape": (
        ["a:0.5", "b:0.5"],
        with_short_norm,
        "b/model.safetensors: model.norm.weight has the shape [95], but [96] in a/model.saf",
    ),
    "a missing weight": (
        ["a:0.5", "b:0.5"],
        without_norm,
        "b: has no weight model.norm.weight, which a/model.safetensors has",
    ),
    "an additional weight": (
        ["b:0.5", "a:0.5"],
        without_norm,
        "b: has no weight model.norm.weight, which a/model.safetensors has",
    ),
    "not finite": (
        ["a:0.5", "b:0.5"],
        to_nan,
        "not merged, weights are not finite: model.norm.weight",
    ),
    "two tied weights": (
        ["tied:0.5", "tied-b:0.5"],
        with_another_head,
        "tied-b/model.safetensors: config.json ties lm_head.weight to model.embed_tokens",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_merged_is_one_line(what: str, models: Path, capsys: Any) -> None:
    given, to, fault = BAD[what]
    if to is not None:
        change(Path("tied-b" if "tied:0.5" in given else "b"), to)
    before = {path.name for path in models.iterdir()}
    assert main(["merge", *given, "--out", "out"]) == (1 if what == "not finite" else 2)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"redi: {fault}")
    assert {path.name for path in models.iterdir()} == before


def test_another_vocabulary_and_an_existing_folder_are_refused(models: Path, capsys: Any) -> None:
    assert main(["merge", "a", "b", "--out", "tied"]) == 2
    assert capsys.readouterr().err == "redi: out: tied exists; choose another out\n"
    path = Path("b") / "tokenizer.json"
    path.write_text(path.read_text().replace('"0": 0', '"x": 0'))
    assert main(["merge", "a", "b", "--out", "out"]) == 2
    fault = "b: the tokenizer's vocabulary differs from that of a (first at token 0, "
    assert fault in capsys.readouterr().err


def test_runs_are_merged_by_their_exports(models: Path, capsys: Any) -> None:
    for name in ("a", "b"):
        run = Path("runs") / name
        shutil.copytree(name, run / "export")
        (run / "recipe.toml").touch()
    assert main(["merge", "runs/a", "runs/b:0.5", "--out", "out"]) == 2
    capsys.readouterr()
    assert main(["merge", "runs/a:1", "runs/b:0", "--out", "out"]) == 0
    assert all(torch.equal(one, weights_of("a")[k]) for k, one in weights_of("out").items())
