"""Recipes and the command line: values are read; each mistake gives one clear line."""

import resource
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redi.engine.cli import COMMANDS, main
from redi.engine.config.parse import dump_recipe, load_recipe, train_parser
from redi.engine.config.resume import changed_keys
from redi.engine.config.sections import KEYS
from redi.engine.errors import InputError

WriteRecipe = Callable[..., Path]


def load(path: Path, *overrides: str) -> Any:
    argv = [str(path), *overrides]
    return load_recipe(train_parser(), str(path), argv)


def test_a_recipe_is_read_and_overridden(recipe: WriteRecipe) -> None:
    read = load(recipe("a", {"optim.lr": 3e-4, "optim.betas": [0.9, 0.95]}), "--optim.lr", "1e-5")
    assert read.optim.lr == 1e-5
    assert tuple(read.optim.betas) == (0.9, 0.95)
    assert read.train.seed == 42


def test_several_data_files_are_a_list(recipe: WriteRecipe) -> None:
    assert load(recipe("a", {"data.path": ["x", "y"]})).data.paths == ("x", "y")


@pytest.mark.parametrize("prompt", ["plain", r"\xi \x41 \boxed{}", "line\nline\t\x1b", 'a "b" \\'])
def test_the_resolved_recipe_reads_back_the_same(
    prompt: str, recipe: WriteRecipe, tmp_path: Path
) -> None:
    changes = {"optim.betas": [0.8, 0.9], "data.path": ["x", "y"], "data.system_prompt": prompt}
    changes |= {"data.mixing_weights": [2, 0.5]}
    changes |= {"data.teachers": ["r1"], "data.teacher_weights": {"r1": 2.0, "a b.c": 0.5}}
    first = load(recipe("a", changes))
    assert first.data.teacher_weights == {"r1": 2.0, "a b.c": 0.5}
    path = tmp_path / "resolved.toml"
    path.write_text(dump_recipe(first))
    assert load(path).data == first.data
    assert changed_keys(tomllib.loads(path.read_text()), first) == []


def test_a_key_that_an_old_run_lacks_counts_as_its_default(recipe: WriteRecipe) -> None:
    first = load(recipe("a"))
    old = tomllib.loads(dump_recipe(first))
    del old["data"]["pairing"], old["objective"]["alpha"]
    assert changed_keys(old, first) == []
    assert changed_keys(old, load(recipe("a"), "--objective.alpha=0.5")) == ["objective.alpha"]


def test_a_teacher_with_a_dot_in_its_name_has_a_weight_by_option(recipe: WriteRecipe) -> None:
    path = recipe("a", {"data.teacher_weights": {"r2": 3.0}})
    weights = {"r2": 3.0, "gpt-4.1": 0.5, "o3": 2.0}
    options = ["--data.teacher_weights.gpt-4.1", "0.5", "--data.teacher_weights.o3=2"]
    assert load(path, *options).data.teacher_weights == weights
    whole = ["--data.teacher_weights", '{"r1.0": 1}']
    assert load(path, *whole, *options).data.teacher_weights == {
        "r1.0": 1.0,
        "gpt-4.1": 0.5,
        "o3": 2.0,
    }
    assert load(path, *options, *whole).data.teacher_weights == {"r1.0": 1.0}


def test_a_weight_of_a_teacher_with_a_dot_in_its_name_is_trained_with(
    recipe: WriteRecipe, tmp_path: Path, world: Path
) -> None:
    data = tmp_path / "traces.jsonl"
    data.write_text((world / "traces.jsonl").read_text().replace('"t"', '"gpt-4.1"'))
    path = recipe("a", {"data.path": str(data), "train.max_steps": 1})
    assert main(["train", str(path), "--data.teacher_weights.gpt-4.1", "0.5"]) == 0
    resolved = tomllib.loads((tmp_path / "a" / "recipe.toml").read_text())
    assert resolved["data"]["teacher_weights"] == {"gpt-4.1": 0.5}


MISTAKES = {
    "[optim]\nlearning_rate = 1e-5\n": "unknown key optim.learning_rate; did you mean optim.lr?",
    "[objective]\nalhpa = 0.5\n": "did you mean objective.alpha?",
    "[training]\nseed = 1\n": "did you mean train.seed?",
    "objective = 'redi'\n": "is a section, not a value: [objective] with keys such as name",
    "[wandb]\nproject = 'x'\n": "the sections are model, adapter, data, objective",
    "[optim]\nfoo = 1\n": "[optim] has name, lr, weight_decay",
    "seed = 1\n": "did you mean train.seed?",
    "[optim]\nlr = 'fast'\n": "optim.lr: needs a number, got fast",
    "[optim]\nlr = -1.0\n": "optim.lr must be >= 0, got -1.0",
    "[objective]\nname = 'dop'\n": "objective.name: dop is unknown; available: sft, redi,",
    "[objective]\nalpha = nan\n": "objective.alpha must be finite",
    "[objective]\nname = 'redi'\nnormalisation = 'token'\n": "objective.normalisation",
    "[data]\npath = 'a'\nmixing_weights = [2, 1]\n": "must have one number per path, got 2 for 1",
    "[data]\npath = 'a'\nmixing_weights = [nan]\n": "must be finite and > 0, got nan",
    "[data]\npath = 'a'\nmixing_weights = 2\n": "needs a list of numbers such as [1,2], got 2",
    "num_train_epochs = 1\n": "did you mean train.epochs?",
    "[data]\nteacher_weights.gpt-4.1 = 1\n": 'a name with a dot needs quotes: "gpt-4.1"',
    "[data]\nteacher_weights = { r1 = 0 }\n": "data.teacher_weights.r1 must be > 0, got 0",
    "[data]\nteacher_weights = 3\n": "needs a table of numbers such as { r1 = 2.0 }",
    "[train]\nbatch = 0\n": "train.batch must be >= 1, got 0",
    "[train]\nbatch = 1.5\n": "train.batch: needs a whole number, got 1.5",
    "[model]\npath = 3\n": "model.path: needs text, got 3",
    f"[train]\nmax_steps = 1{'0' * 400}\n[optim]\nwarmup = 2.0\n": "optim.warmup must be in",
    "[optim]\nlr = 10.0\nweight_decay = 0.1\n": "optim.weight_decay * optim.lr must be < 1, got 1",
    "[run]\ntrackers = 'wandb'\n": "['tensorboard', 'wandb', 'trackio', 'mlflow'], got wandb",
    "[optim\nlr = 1\n": "not valid TOML",
    "\ufeff[optim]\nlr = 1\n": "begins with a byte order mark; save it as UTF-8 without one",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda t: t.replace("\n", " ")[:60])
def test_a_mistake_in_a_recipe_is_one_line_with_file_and_key(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert MISTAKES[text] in message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


OVERRIDES = {
    ("--optim.learning_rate", "1"): "did you mean optim.lr?",
    ("--lr", "1"): "did you mean optim.lr?",
    ("--train.batch", "many"): "train.batch: needs a whole number, got many",
    ("--model", "folder"): "model is a section, not a key; it has model.path, model.tokenizer",
    ("--data.teacher_weights.gpt-4.1", "x"): "data.teacher_weights.gpt-4.1: needs a number, got x",
    ("--data.teacher_weights.gpt-4.1", "-2"): "teacher_weights.gpt-4.1 must be > 0, got -2",
    ("--data.teacher_weights.gpt-4.1",): "needs a number, got nothing",
    ("--data.teacher_weights.", "2"): "a name is missing after the dot",
    ("--train.max_steps+", "1"): "unknown key train.max_steps+",
    ("--train.batch", "-2"): "train.batch must be >= 1, got -2",
}


@pytest.mark.parametrize("override", OVERRIDES, ids=" ".join)
def test_a_mistake_on_the_command_line_exits_2_with_one_line(
    override: tuple[str, ...], recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe("a")), *override]) == 2
    err = capsys.readouterr().err
    assert OVERRIDES[override] in err
    assert err.count("\n") == 1
    assert ".toml" not in err  # the file is not at fault


@pytest.mark.parametrize("argv", [["train"], ["train", "no.toml"], ["trian", "x"], []])
def test_wrong_commands_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_recipe_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[optim]\nlr = 1\n", encoding="utf-16")
    with pytest.raises(InputError, match=r"not valid UTF-8; save it as UTF-8$"):
        load(path)


MISSING = {
    ("train",): "missing: RECIPE.toml; --help shows",
    ("report",): "missing: RUN; --help shows",
    ("evaluate",): "missing: MODEL; --help shows",
    ("evaluate", "folder"): "missing: --data FILE, --benchmarks NAME or --preset paper",
}


@pytest.mark.parametrize("argv", MISSING, ids=" ".join)
def test_what_is_missing_is_named_as_the_help_names_it(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert MISSING[argv] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("report run --step 1", "unknown option --step; `redi report --help` lists all"),
        ("export run --stp=3", "unknown option --stp; did you mean --step?"),
        ("export run -s 3", "unknown option -s; `redi export --help` lists all"),
        ("doctor all", "unknown argument all; `redi doctor --help` lists all"),
        (
            "logprobs m --data d.jsonl --out o.parquet --row-tokens 9",
            "unknown option --row-tokens; did you mean --row_tokens?",
        ),
        ("evaluate m --data d.jsonl --answer-pattern x", "did you mean --answer_pattern?"),
        ("prepare openr1 d.jsonl --outt x", "unknown option --outt; did you mean --out?"),
    ],
)
def test_an_unknown_option_is_reported_with_a_remedy(
    line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert expected in err


def test_ctrl_c_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "doctor", interrupt)
    assert main(["doctor"]) == 75
    assert capsys.readouterr().err == "redi: interrupted\n"


def test_the_first_recipe_must_name_its_model(
    recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe("a", {"model.path": None}))]) == 2
    assert "model.path is missing" in capsys.readouterr().err


def test_two_recipes_may_not_share_a_run_folder(
    recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"run.dir": str(tmp_path / "same")}
    assert main(["train", str(recipe("a", same)), str(recipe("b", same))]) == 2
    assert (
        "set a different run.dir in each recipe (--run.dir applies to all)"
        in capsys.readouterr().err
    )


def test_what_a_resumed_run_may_change(recipe: WriteRecipe) -> None:
    first = load(recipe("a"))
    old = tomllib.loads(dump_recipe(first))
    free = ["--run.save_every=3", "--run.keep=9", "--train.row_tokens=99", "--shard.compile=true"]
    free += ["--shard.reduce=micro_step", "--run.timeout=60"]
    assert changed_keys(old, load(recipe("a"), *free)) == []
    assert changed_keys(old, load(recipe("a"), "--shard.gather=step")) == []
    changed = load(recipe("a"), "--optim.lr=1", "--data.system_prompt=hi")
    assert changed_keys(old, changed) == ["data.system_prompt", "optim.lr"]


def test_every_key_is_in_the_help_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for key in KEYS:
        assert f"--{key}" in text
    assert "Weight of the incorrect traces" in text


def test_help_takes_under_half_a_second(redi: Callable[..., Any]) -> None:
    """Of a CPU, so that other processes do not count."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert redi("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5
