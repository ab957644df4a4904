"""The command `redi`. Exit codes: 0 done, 1 the run failed, 2 the input is wrong."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from redi.engine.config import Recipe, build_parser, explain, load_recipe
from redi.engine.errors import InputError, RunError

USAGE = """\
usage: redi COMMAND ...

Train language models on correct and incorrect reasoning traces: SFT, then REDI.

commands:
  train RECIPE.toml [MORE.toml ...] [--section.key value]   train; the same line again resumes
  evaluate MODEL --data FILE [FILE ...]                     sample, check answers, pass@k
  export RUN [--step N]                                     write a checkpoint as a model folder
  doctor                                                    what this machine has; tests the loss

examples:
  redi train sft.toml redi.toml                  both stages; the second starts from the first
  redi train redi.toml --objective.alpha 0.5     one value changed
  torchrun --nproc-per-node 8 -m redi.engine.cli train redi.toml

`redi COMMAND --help` lists every option. Exit codes: 0 done, 1 the run failed, 2 wrong input.
"""


def train(argv: Sequence[str]) -> None:
    """`redi train`: run recipes in order, each from the export of the one before."""
    parser = build_parser("redi train", "Train by recipe; the same command again resumes.")
    arguments = parser.parse_args(list(argv))
    paths = arguments.recipes
    recipes = [load_recipe(parser, path, argv) for path in paths]
    resolved: list[tuple[str, Recipe]] = []
    for path, recipe in zip(paths, recipes, strict=True):
        folder = recipe.run.dir or f"runs/{Path(path).stem}"
        if any(folder == other.run.dir for _, other in resolved):
            raise InputError(f"{path}: run.dir {folder} is also that of the recipe before it")
        model = recipe.model
        if model.path is None:
            if not resolved:
                raise InputError(
                    f"{path}: model.path is missing (only a recipe that follows another may "
                    "leave it out)"
                )
            model = replace(model, path=str(Path(resolved[-1][1].run.dir or "") / "export"))
        if not all(recipe.data.paths):
            raise InputError(f"{path}: data.path is missing")
        resolved.append((path, replace(recipe, model=model, run=replace(recipe.run, dir=folder))))

    from redi.engine.console import Console
    from redi.engine.data.rows import find_sources
    from redi.engine.distributed import join_world
    from redi.engine.train.loop import run_recipe

    for _, recipe in resolved:  # before the first has trained for hours
        find_sources([*recipe.data.paths, *recipe.eval.paths])
    with join_world() as world:
        console = Console(active=world.is_main, quiet=arguments.quiet)
        for _, recipe in resolved:
            if not run_recipe(recipe, world, console):
                break  # stopped by a signal: the next would start from an unfinished run


def export(argv: Sequence[str]) -> None:
    """`redi export`: a checkpoint of a run as a Hugging Face folder."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="redi export",
        description="Write a checkpoint as a Hugging Face folder, RUN/export-step-N.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--step", type=int | None, help="which checkpoint; left out: the newest")
    args = parser.parse_args(list(argv))

    from redi.engine.model.export import export_run

    print(export_run(Path(args.run), args.step))


def evaluate(argv: Sequence[str]) -> None:
    """`redi evaluate`: sample completions, check their answers, report pass@k."""
    from redi.engine.evaluate_options import parse_options

    options = parse_options(argv)

    from redi.engine import evaluate

    evaluate.evaluate(options)


def doctor(argv: Sequence[str]) -> None:
    """`redi doctor`: versions, devices, what a run here will use, and a self-test."""
    from jsonargparse import ArgumentParser

    ArgumentParser(
        prog="redi doctor",
        description="What this machine has, what a run here uses and why; tests the loss.",
        exit_on_error=False,
    ).parse_args(list(argv))

    from redi.engine.doctor import examine

    if not examine():
        raise RunError("the self-test of the loss failed")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "export": export,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    speaks = int(os.environ.get("RANK", "0")) == 0
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"unknown command {argv[0]}; the commands are {', '.join(COMMANDS)}")
        COMMANDS[argv[0]](argv[1:])
    except (InputError, ArgumentError) as error:
        if speaks:
            text = explain(error) if isinstance(error, ArgumentError) else str(error)
            print(f"redi: {text}", file=sys.stderr)
        return 2
    except RunError as error:
        if speaks:
            print(f"redi: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # during training it is handled: this is before the first step
        if speaks:
            print("redi: interrupted before the first step", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `redi doctor | head`: whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as request:  # --help of a command
        return int(request.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
