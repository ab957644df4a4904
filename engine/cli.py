"""The command `redi`. Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 75 stopped by a
signal: the same command resumes."""

from __future__ import annotations

import difflib
import faulthandler
import os
import signal
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from redi.engine.config.options import command_parser, parse_arguments
from redi.engine.config.parse import build_parser, check_overrides, explain, load_recipe
from redi.engine.config.sections import DataConfig, ModelConfig, Recipe, TrainConfig, check_replicas
from redi.engine.errors import InputError, RunError, Stopped
from redi.engine.extras import missing_packages
from redi.engine.hub import is_asked_for
from redi.engine.plan.cards import CARDS, MFU, Cluster
from redi.engine.train.signals import StopRequest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""

RANK_0_SECONDS = 5.0
"""How long the other ranks leave rank 0 to say what is wrong."""

USAGE = """\
usage: redi COMMAND ...

Train language models on correct and incorrect reasoning traces: SFT, then REDI.

commands:
  prepare openr1 DATA [MORE ...] --out FOLDER               OpenR1-Math-Raw to the paper's sets
  prepare RECIPE.toml [MORE.toml ...]                       tokenize, show what would be trained
  plan RECIPE.toml [MORE.toml ...] [--ranks N --card NAME]  packing, steps, memory, time; no card
  train RECIPE.toml [MORE.toml ...] [--section.key value]   train; the same line again resumes
  evaluate MODEL --data FILE [FILE ...]                     sample, check answers, pass@k
  logprobs MODEL --data FILE [FILE ...] --out FILE.parquet  what a model says of each trace
  export RUN [--step N]                                     write a checkpoint as a model folder
  report RUN [MORE ...]                                     table and curves of runs
  doctor                                                    what this machine has; tests the loss

examples:
  redi train sft.toml redi.toml                  both stages; the second starts from the first
  redi train redi.toml --objective.alpha 0.5     one value changed
  torchrun --nproc-per-node 8 -m redi.engine.cli train redi.toml

`redi COMMAND --help` lists every option, `redi --version` says which this is. Exit codes: 0 done,
1 the run failed, 2 wrong input, 75 stopped by a signal (the same command resumes).
"""

PREPARE_EXAMPLES = """\
examples:
  redi prepare redi.toml --ranks 8 --report report
  redi prepare openr1 open-r1/OpenR1-Math-Raw --out data --tokenizer Qwen/Qwen2.5-Math-1.5B
"""

PLAN_EXAMPLES = """\
examples:
  redi plan sft.toml redi.toml --ranks 8
  redi plan redi.toml --ranks 64 --card h200 --shard.checkpointing full --json plan.json
"""


def prepare(argv: Sequence[str]) -> None:
    """`redi prepare`: select the paper's sets from raw rows, or fill the cache of recipes."""
    from redi.engine.console import Console

    if argv and argv[0] == "openr1":
        from redi.engine.commands.prepare_options import parse_prepare

        options = parse_prepare(argv[1:])
        _tell_of_the_hub("model", options.tokenizer)
        _find_data(*options.data)

        from redi.engine.commands.prepare import select_openr1

        select_openr1(options, Console())
        return
    parser = build_parser(
        "redi prepare",
        "Tokenize the data of recipes into the cache and show what would be trained. "
        "`redi prepare openr1 --help`: select the paper's sets from OpenR1-Math-Raw.",
        PREPARE_EXAMPLES,
    )
    parser.add_argument("--ranks", type=int, default=1, help="of the run, for rank efficiency")
    parser.add_argument("--report", type=Path | None, help="folder of report.json and lengths.png")
    arguments = parser.parse_args(list(argv))
    if arguments.ranks < 1:
        raise InputError(f"ranks must be >= 1, got {arguments.ranks}")
    recipes = _with_models(parser, arguments.recipes, argv, "its tokenizer is needed")

    from redi.engine.commands.prepare import fill_cache
    from redi.engine.distributed import join_world

    console = Console(quiet=arguments.quiet)
    with join_world() as world:
        for _, recipe in recipes:
            fill_cache(recipe, world, console, arguments.ranks, arguments.report)


def plan(argv: Sequence[str]) -> None:
    """`redi plan`: how recipes would pack, fit and last on cards that are not there."""
    from redi.engine.console import Console

    parser = build_parser(
        "redi plan",
        "Packing, steps, memory and time of recipes on a number of cards; trains nothing. Needs "
        "neither a card nor weights: a folder with config.json and tokenizer will do.",
        PLAN_EXAMPLES,
    )
    parser.add_argument("--ranks", type=int, default=1, help="cards of the run")
    parser.add_argument("--card", default="h100", help=", ".join(CARDS))
    parser.add_argument(
        "--mfu", type=float, default=MFU, help="assumed share of the card's bfloat16 peak"
    )
    parser.add_argument("--json", type=Path | None, help="file for all figures")
    arguments = parser.parse_args(list(argv))
    cluster = Cluster(arguments.ranks, arguments.card.lower(), arguments.mfu)
    if target := arguments.json:  # before minutes of work
        if not target.absolute().parent.is_dir():
            raise InputError(f"json: {target.parent}: no such folder")
        if target.is_dir():
            raise InputError(f"json: {target} is a folder; name a file")
    recipes = _with_models(parser, arguments.recipes, argv, "its shape and tokenizer are needed")
    check_overrides([recipe for _, recipe in recipes], argv)
    for _, recipe in recipes:
        check_replicas(recipe.shard, cluster.ranks)

    from redi.engine.plan.command import plan_recipes

    plan_recipes(recipes, cluster, Console(quiet=arguments.quiet), arguments.json)


def _with_models(
    parser: ArgumentParser, paths: Sequence[str], argv: Sequence[str], why: str
) -> list[tuple[str, Recipe]]:
    """Recipes whose data is there, by path; one that trains the export of another has its model.

    Args:
        why: a model is needed, for messages.
    """
    recipes = [(path, load_recipe(parser, path, argv)) for path in paths]
    for path, recipe in recipes:
        _find_data_of(path, recipe)
    resolved: list[tuple[str, Recipe]] = []
    exports: dict[Path, ModelConfig] = {}  # of runs that need not have begun
    for path, recipe in recipes:
        model = recipe.model
        if model.path is None:
            if not resolved:
                raise InputError(f"{path}: model.path is missing: {why}")
            model = _as_exported(resolved[-1][1].model, model)
        elif not Path(model.path).exists() and Path(model.path) in exports:
            model = _as_exported(exports[Path(model.path)], model)
        resolved.append((path, replace(recipe, model=model)))
        exports[Path(recipe.run.dir or f"runs/{Path(path).stem}") / "export"] = model
    return resolved


def _as_exported(trained: ModelConfig, wanted: ModelConfig) -> ModelConfig:
    """What `wanted` will be of the export of a run of `trained`: that has what `trained` changed,
    and `wanted` may change it again."""
    return replace(
        wanted,
        path=trained.path,
        tokenizer=wanted.tokenizer or trained.tokenizer,
        rope_theta=wanted.rope_theta or trained.rope_theta,
        max_position_embeddings=(wanted.max_position_embeddings or trained.max_position_embeddings),
    )


def train(argv: Sequence[str]) -> None:
    """`redi train`: run recipes in order, each from the export of the one before.

    Raises:
        Stopped: a signal ended it early.
    """
    finished = True
    with StopRequest(verbose=_rank() == 0) as stop:
        try:
            with stop.interruptible():  # takes seconds
                recipes, quiet = _read_recipes(argv)

                from redi.engine.console import Console
                from redi.engine.distributed import join_world
                from redi.engine.train.loop import run_recipe
            with join_world() as world:
                console = Console(active=world.is_main, quiet=quiet)
                for recipe in recipes:
                    finished = run_recipe(recipe, world, console, stop)
                    if not finished:
                        break  # the next would start from an unfinished run
        except KeyboardInterrupt:
            if _rank() == 0:
                print("stopped before training began; the same command goes on", file=sys.stderr)
            raise Stopped from None
    if not finished:  # raised only now: leaving the world, ranks wait for each other
        raise Stopped


def _read_recipes(argv: Sequence[str]) -> tuple[list[Recipe], bool]:
    """What `redi train` is to run, with every default filled in; and whether quietly."""
    parser = build_parser("redi train", "Train by recipe; the same command again resumes.")
    arguments = parser.parse_args(list(argv))
    paths = arguments.recipes
    recipes = [load_recipe(parser, path, argv) for path in paths]
    check_overrides(recipes, argv)
    resolved: list[tuple[str, Recipe]] = []
    for path, recipe in zip(paths, recipes, strict=True):
        folder = recipe.run.dir or f"runs/{Path(path).stem}"
        if any(folder == other.run.dir for _, other in resolved):
            raise InputError(
                f"{path}: run.dir {folder} is also that of the recipe before it; name each its own "
                "in the recipes, not by --run.dir, which applies to all"
            )
        model = recipe.model
        if model.path is None:
            if not resolved:
                raise InputError(
                    f"{path}: model.path is missing (only a recipe that follows another may "
                    "leave it out)"
                )
            model = replace(model, path=str(Path(resolved[-1][1].run.dir or "") / "export"))
        _find_data_of(path, recipe)  # before the first has trained for hours
        resolved.append((path, replace(recipe, model=model, run=replace(recipe.run, dir=folder))))
    return [recipe for _, recipe in resolved], arguments.quiet


def export(argv: Sequence[str]) -> None:
    """`redi export`: a checkpoint of a run as a Hugging Face folder."""
    parser = _parser(
        "export",
        "Write a checkpoint as a Hugging Face folder, RUN/export-step-N.",
        "redi export runs/redi              the newest checkpoint",
        "redi export runs/redi --step 500",
    )
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--step", type=int | None, help="which checkpoint; left out: the newest")
    args = parse_arguments(parser, argv)

    from redi.engine.commands.export import export_run
    from redi.engine.console import Console
    from redi.engine.train.guards import collapse_of

    print(export_run(Path(args.run), args.step))
    if args.step is None and (collapsed := collapse_of(Path(args.run))):
        Console().warn(collapsed)


def evaluate(argv: Sequence[str]) -> None:
    """`redi evaluate`: sample completions, check their answers, report pass@k."""
    from redi.engine.evaluate.options import parse_evaluate

    options = parse_evaluate(argv)
    _tell_of_the_hub("model", options.model)
    _find_data(*options.data)

    from redi.engine.evaluate.command import run

    run(options)


def logprobs(argv: Sequence[str]) -> None:
    """`redi logprobs`: per-trace log-probs and entropies as Parquet."""
    parser = _parser(
        "logprobs",
        "Write each trace's log-prob (sum and mean) and mean entropy under a model, as Parquet.",
        "redi logprobs model --data traces.jsonl --out scores.parquet",
    )
    parser.add_argument("model", help="run folder, model folder or hub name")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="as data.path")
    parser.add_argument("--out", required=True, metavar="FILE.parquet", help="what is written")
    parser.add_argument(
        "--template", choices=["chat", "none"], help="left out: the run's, else chat"
    )
    parser.add_argument("--system_prompt", type=str | None, help="left out: the run's")
    parser.add_argument("--row_tokens", type=int, default=32768, help="as train.row_tokens")
    args = parse_arguments(parser, argv)
    _tell_of_the_hub("model", args.model)
    _find_data(*args.data)

    from redi.engine.train.run_folder import trained_prompts

    asked = (args.template, args.system_prompt)
    template, system_prompt, eos, warning = trained_prompts(args.model, *asked)
    try:
        recipe = Recipe(
            model=ModelConfig(path=args.model),
            data=DataConfig(
                path=args.data, template=template, system_prompt=system_prompt, eos=eos
            ),
            train=TrainConfig(row_tokens=args.row_tokens),
        )
    except ValueError as error:
        raise InputError(str(error)) from None

    from redi.engine.commands.logprobs import write_logprobs
    from redi.engine.console import Console
    from redi.engine.distributed import join_world

    with join_world() as world:
        console = Console(active=world.is_main)
        if warning:
            console.warn(warning)
        write_logprobs(recipe, Path(args.out), world, console)
    if _rank() == 0:
        print(args.out)


def doctor(argv: Sequence[str]) -> None:
    """`redi doctor`: versions, devices, what a run here will use, and a self-test."""
    parser = _parser(
        "doctor",
        "What this machine has, what a run here uses and why; tests the loss.",
        "redi doctor",
    )
    parse_arguments(parser, argv)

    from redi.engine.commands.doctor import examine

    if not examine():
        raise RunError("the self-test of the loss failed")


def report(argv: Sequence[str]) -> None:
    """`redi report`: runs as a table and as curves."""
    parser = _parser(
        "report",
        "Print a table of runs and draw their curves into the first one's folder, curves.png.",
        "redi report runs/redi",
        "redi report runs/redi-alpha-0.5 runs/redi-alpha-0.8      side by side",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    args = parse_arguments(parser, argv)

    from redi.engine.commands.report import report

    print(report([Path(run) for run in args.runs]))


def _find_data_of(path: str, recipe: Recipe) -> None:
    if not all(recipe.data.paths):
        raise InputError(f"{path}: data.path is missing")
    _tell_of_the_hub("model", recipe.model.path, recipe.model.tokenizer)
    _find_data(*recipe.data.paths)
    if recipe.eval.paths:
        _find_data(*recipe.eval.paths)


def _find_data(*paths: str) -> None:
    """InputError for a file that is not there: before torch is imported, which takes seconds."""
    from redi.engine.data.sources import find_sources

    hub = [source.name for source in find_sources(paths) if source.kind == "hub"]
    _tell_of_the_hub("dataset", *(name.partition(":")[0] for name in hub))


def _tell_of_the_hub(kind: Literal["model", "dataset"], *names: str | None) -> None:
    """A mistyped path may pass for a name on the hub: nobody should wait for it unknowing."""
    for name in dict.fromkeys(names):
        if name and _rank() == 0 and is_asked_for(name, kind):
            notice = f"{name}: not on this machine, so it is looked for on the Hugging Face hub"
            print(notice, file=sys.stderr, flush=True)


def _parser(command: str, description: str, *examples: str) -> ArgumentParser:
    """The parser of a command without a recipe."""
    lines = "\n".join(f"  {example}" for example in examples)
    return command_parser(f"redi {command}", description, f"examples:\n{lines}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "prepare": prepare,
    "plan": plan,
    "train": train,
    "evaluate": evaluate,
    "export": export,
    "logprobs": logprobs,
    "report": report,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # a crash in native code should say where Python was
    if missing := missing_packages():
        return _fail(missing, 2)
    if argv and argv[0] == "--version":
        print(f"redi-engine {version('redi-engine')}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    before = signal.getsignal(signal.SIGTERM)
    try:
        if argv[0] != "train":  # which has handlers of its own, to finish the step
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        if argv[0] not in COMMANDS:
            near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise InputError(f"unknown command {argv[0]}; {hint}")
        COMMANDS[argv[0]](argv[1:])
    except ArgumentError as error:
        return _fail(explain(error), 2)
    except InputError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except Stopped as stopped:
        if str(stopped):
            print(stopped, file=sys.stderr, flush=True)
        return STOPPED
    except KeyboardInterrupt:
        return _fail("interrupted", STOPPED)
    except BrokenPipeError:  # `redi doctor | head`: whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as request:  # --help of a command
        return int(request.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
        # Where a KeyboardInterrupt has left code made from text (dataclasses, on import), CPython
        # ends `python -m` by SIGINT although it was caught; running other text undoes that.
        exec("")
    return 0


def _rank() -> int:
    """This process's number under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def _fail(text: str, code: int) -> int:
    """One line on stderr. Under torchrun rank 0 speaks for all.

    The first rank to exit has torchrun end the others, so those wait for rank 0 to have spoken;
    one that is still alive then has met a fault of its own.
    """
    rank = _rank()
    if rank:
        time.sleep(RANK_0_SECONDS)
        text = f"rank {rank}: {text}"
    print(f"redi: {text}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
