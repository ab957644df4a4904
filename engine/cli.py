"""The command `redi`.

Exit codes: 0 success, 1 the run failed, 2 invalid input, 75 stopped by a signal (the same command
resumes).
"""

from __future__ import annotations

import difflib
import errno
import faulthandler
import os
import signal
import sys
import time
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from redi.engine.config.options import command_parser, parse_arguments
from redi.engine.config.parse import (
    build_parser,
    check_overrides,
    explain,
    load_recipe,
    train_parser,
)
from redi.engine.config.sections import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    Recipe,
    TrainConfig,
    check_replicas,
)
from redi.engine.config.stages import continued, exports_adapter, follow
from redi.engine.errors import InputError, RunError, Stopped
from redi.engine.extras import missing_packages
from redi.engine.failure import RANK_0_SECONDS, describe, end_job
from redi.engine.hub import needs_hub
from redi.engine.launch import check_launch, rank
from redi.engine.output import printable, tolerant_streams
from redi.engine.plan.cards import CARDS, MFU, Cluster
from redi.engine.storage import (
    check_available,
    fetch_model,
    fetch_run,
    fetch_trained,
    inside,
    is_remote,
    shown,
)
from redi.engine.train.signals import StopRequest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

STOPPED = 75
"""Exit code after a signal: EX_TEMPFAIL of sysexits.h, "try again"."""

USAGE = """\
usage: redi COMMAND ...

Train language models on correct and incorrect reasoning traces: SFT, then REDI.

commands:
  prepare openr1 DATA [MORE ...] --out DIR                  select the paper's sets from raw data
  prepare RECIPE.toml [MORE.toml ...]                       tokenize and summarize training data
  plan RECIPE.toml [MORE.toml ...] [--ranks N --card NAME]  estimate memory and time; needs no GPU
  train RECIPE.toml [MORE.toml ...] [--section.key value]   train; the same command resumes
  evaluate MODEL --data FILE [FILE ...]                     sample, check answers, report pass@k
  table EVALUATION [MORE ...]                               compare evaluations in one table
  logprobs MODEL --data FILE [FILE ...] --out FILE.parquet  score each trace under a model
  select DATA [MORE ...] --out FILE                         choose traces to train on
  export RUN [--step N] [--push_to_hub OWNER/NAME]          convert a checkpoint to Hugging Face
  merge MODEL:WEIGHT [MORE ...] --out DIR                   write the weighted mean of models
  report RUN [MORE ...]                                     compare runs: a table, curves, a page
  doctor                                                    show versions, devices; test the loss

examples:
  redi train sft.toml redi.toml                  both stages; the second starts from the first
  redi train redi.toml --objective.alpha 0.5     override one value
  torchrun --nproc-per-node 8 --no-python redi train redi.toml

`redi COMMAND --help` lists every option, `redi --version` prints the version. Exit codes:
0 success, 1 the run failed, 2 invalid input, 75 stopped by a signal (the same command resumes).
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
    """`redi prepare`: select the paper's sets from raw rows, or tokenize the data of recipes."""
    from redi.engine.console import Console

    if argv and argv[0] == "openr1":
        from redi.engine.commands.prepare_options import parse_prepare

        options = parse_prepare(argv[1:])
        _announce_hub("model", options.tokenizer)
        _find_data(*options.data)

        from redi.engine.commands.prepare import select_openr1

        select_openr1(options, Console())
        return
    parser = build_parser(
        "redi prepare",
        "Tokenize the data of recipes into the cache and print a summary of it.\n"
        "To select the paper's sets from OpenR1-Math-Raw, see `redi prepare openr1 --help`.",
        PREPARE_EXAMPLES,
    )
    parser.add_argument(
        "--ranks", type=int, default=1, help="ranks of the run, for rank efficiency"
    )
    parser.add_argument(
        "--report", type=Path | None, help="directory of report.json and lengths.png"
    )
    arguments = parser.parse_args(list(argv))
    if arguments.ranks < 1:
        raise InputError(f"ranks must be >= 1, got {arguments.ranks}")
    recipes = _with_models(parser, arguments.recipes, argv, "its tokenizer is needed")
    check_overrides([recipe for _, recipe in recipes], argv)

    from redi.engine.commands.prepare import fill_cache
    from redi.engine.distributed import join_world

    with join_world() as world:
        console = Console(active=world.is_main, quiet=arguments.quiet)
        report = arguments.report if world.is_main else None
        for _, recipe in recipes:
            fill_cache(recipe, world, console, arguments.ranks, report)


def plan(argv: Sequence[str]) -> None:
    """`redi plan`: estimate packing, memory and time of recipes without a GPU."""
    from redi.engine.console import Console

    parser = build_parser(
        "redi plan",
        "Estimate packing, steps, memory and time of recipes on a number of GPUs. Trains nothing.\n"
        "Needs neither a GPU nor weights: the model's config.json and tokenizer are enough.",
        PLAN_EXAMPLES,
    )
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks, one GPU each")
    parser.add_argument("--card", default="h100", help=f"GPU model: {', '.join(CARDS)}")
    parser.add_argument(
        "--mfu", type=float, default=MFU, help="assumed fraction of the GPU's bfloat16 peak"
    )
    parser.add_argument("--json", type=Path | None, help="write all figures to this file")
    arguments = parser.parse_args(list(argv))
    cluster = Cluster(arguments.ranks, arguments.card.lower(), arguments.mfu)
    if target := arguments.json:  # checked before minutes of work
        if not target.absolute().parent.is_dir():
            raise InputError(f"json: {target.parent}: no such directory")
        if target.is_dir():
            raise InputError(f"json: {target} is a directory; name a file")
    recipes = _with_models(parser, arguments.recipes, argv, "its config and tokenizer are needed")
    check_overrides([recipe for _, recipe in recipes], argv)
    for _, recipe in recipes:
        check_replicas(recipe.shard, cluster.ranks)

    from redi.engine.plan.command import plan_recipes

    with _ended_at_once():
        plan_recipes(recipes, cluster, Console(quiet=arguments.quiet), arguments.json)


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """End the process at a signal inside the block, which has nothing to save.

    The block runs autograd, whose native code aborts if a hook raises KeyboardInterrupt.
    """

    def end(number: int, frame: object) -> NoReturn:
        os.write(2, b"\nredi: interrupted\n" if sys.stderr.isatty() else b"redi: interrupted\n")
        os._exit(STOPPED)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _with_models(
    parser: ArgumentParser, paths: Sequence[str], argv: Sequence[str], why: str
) -> list[tuple[str, Recipe]]:
    """Load recipes and check that their data exists.

    A recipe that trains the export of an earlier one gets that recipe's model, because the export
    need not exist yet.

    Args:
        why: reason why a model is needed, for the message if there is none.

    Returns:
        (path, recipe) pairs.
    """
    recipes = [(path, load_recipe(parser, path, argv)) for path in paths]
    for path, recipe in recipes:
        _find_data_of(path, recipe)
    resolved: list[tuple[str, Recipe]] = []
    exports: dict[Path, ModelConfig] = {}  # of runs that need not have started
    adapters: dict[str | None, AdapterConfig] = {}  # likewise
    for path, recipe in recipes:
        model, adapter = recipe.model, recipe.adapter
        if model.path is None:
            if not resolved:
                raise InputError(f"{path}: model.path is missing: {why}")
            before = resolved[-1][1]
            model = _as_exported(before.model, model)
            if exports_adapter(before):
                adapter = continued(path, adapter, before.adapter)
        elif not Path(model.path).exists() and Path(model.path) in exports:
            model = _as_exported(exports[Path(model.path)], model)
        elif is_remote(model.path):
            folder = fetch_model(model.path, recipe.data.cache_dir, "model.path", weights=False)
            model = replace(model, path=folder)
        if adapter.path in adapters and not Path(adapter.path or "").exists():
            adapter = continued(path, adapter, adapters[adapter.path])
        elif is_remote(adapter.path):
            folder = fetch_model(adapter.path, recipe.data.cache_dir, "adapter.path")
            adapter = replace(adapter, path=folder)
        recipe = replace(recipe, model=model, adapter=adapter)
        resolved.append((path, recipe))
        export = inside(recipe.run.dir or f"runs/{Path(path).stem}", "export")
        if exports_adapter(recipe):
            adapters[export] = adapter
        else:
            exports[Path(export)] = model
    return resolved


def _as_exported(trained: ModelConfig, wanted: ModelConfig) -> ModelConfig:
    """Model settings for training the export of a run of `trained`.

    The export keeps the changes that `trained` made to the model's config; `wanted` may override
    them.
    """
    return replace(
        wanted,
        path=trained.path,
        tokenizer=wanted.tokenizer or trained.tokenizer,
        rope_theta=wanted.rope_theta or trained.rope_theta,
        max_position_embeddings=(wanted.max_position_embeddings or trained.max_position_embeddings),
    )


def train(argv: Sequence[str]) -> None:
    """`redi train`: run recipes in order; each starts from the export of the previous one.

    Raises:
        Stopped: a signal stopped it early.
    """
    finished = True
    with StopRequest(verbose=rank() == 0) as stop:
        try:
            with stop.interruptible():  # imports take seconds
                recipes, quiet = _read_recipes(argv)

                from redi.engine.console import Console
                from redi.engine.distributed import join_world
                from redi.engine.train.run import run_recipe
            with join_world() as world:
                console = Console(active=world.is_main, quiet=quiet)
                for recipe in recipes:
                    finished = run_recipe(recipe, world, console, stop)
                    if not finished:
                        break  # the next recipe would start from an unfinished run
        except KeyboardInterrupt:
            raise Stopped("stopped before training started; the same command resumes") from None
    if not finished:  # raised only here: ranks wait for each other when they leave the world
        raise Stopped


def _read_recipes(argv: Sequence[str]) -> tuple[list[Recipe], bool]:
    """Recipes for `redi train` with all defaults resolved, and whether `--quiet` is given."""
    parser = train_parser()
    arguments = parser.parse_args(list(argv))
    paths = arguments.recipes
    recipes = [load_recipe(parser, path, argv) for path in paths]
    check_overrides(recipes, argv)
    resolved: list[tuple[str, Recipe]] = []
    for path, recipe in zip(paths, recipes, strict=True):
        folder = recipe.run.dir or f"runs/{Path(path).stem}"
        check_available(folder, "run.dir")
        if any(folder == other.run.dir for _, other in resolved):
            raise InputError(
                f"{path}: run.dir {folder} is also used by an earlier recipe; set a different "
                "run.dir in each recipe (--run.dir applies to all)"
            )
        if recipe.model.path is None:
            if not resolved:
                raise InputError(
                    f"{path}: model.path is missing; only a recipe that follows another may "
                    "leave it out"
                )
            recipe = follow(path, recipe, resolved[-1][1])
        check_available(recipe.model.path, "model.path")
        check_available(recipe.adapter.path, "adapter.path")
        _find_data_of(path, recipe)  # checked before the first recipe trains for hours
        resolved.append((path, replace(recipe, run=replace(recipe.run, dir=folder))))
    return [recipe for _, recipe in resolved], arguments.quiet


def export(argv: Sequence[str]) -> None:
    """`redi export`: write a checkpoint of a run as a Hugging Face directory."""
    parser = _parser(
        "export",
        "Write a checkpoint and a model card as a Hugging Face directory, RUN/export-step-N.",
        "redi export runs/redi              the newest checkpoint",
        "redi export runs/redi --step 500",
        "redi export runs/redi --push_to_hub owner/name --private",
    )
    parser.add_argument("run", metavar="RUN", help="run directory or its URL")
    parser.add_argument(
        "--step", type=int | None, help="step of the checkpoint; if omitted, the newest"
    )
    parser.add_argument(
        "--push_to_hub",
        type=str | None,
        metavar="OWNER/NAME",
        help="also upload it to this model repository of the Hugging Face hub, made if needed",
    )
    parser.add_argument("--private", action="store_true", help="make that repository private")
    args = parse_arguments(parser, argv)
    if args.private and args.push_to_hub is None:
        raise InputError("private: needs push_to_hub")

    from redi.engine.commands.export import export_run, find_checkpoint
    from redi.engine.console import Console
    from redi.engine.train.guards import collapse_of

    cache = DataConfig().cache_dir
    run_dir = fetch_run(args.run, cache)
    if args.push_to_hub is not None:
        from redi.engine.commands.push import open_repository, push

        find_checkpoint(run_dir, args.step)
        open_repository(args.push_to_hub, args.private)  # before minutes of exporting
    folder = export_run(run_dir, args.step, cache)
    print(shown(folder))
    if args.push_to_hub is not None:
        print(push(folder, args.push_to_hub, f"Add {run_dir.name}, {folder.name}"))
    if args.step is None and (collapsed := collapse_of(run_dir)):
        Console().warn(collapsed)


def merge(argv: Sequence[str]) -> None:
    """`redi merge`: write the weighted mean of models."""
    parser = _parser(
        "merge",
        "Write the weighted mean of models of one architecture as a Hugging Face directory.",
        "redi merge runs/math:0.5 runs/code:0.5 --out merged",
        "redi merge runs/a runs/b runs/c --out merged             equal weights",
        "redi merge runs/redi:1.5 runs/sft:-0.5 --out further     beyond runs/redi",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL:WEIGHT",
        help="run directories, model directories, hub names or URLs, with weights that add up to 1",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    args = parse_arguments(parser, argv)

    from redi.engine.commands.merge import Part, merge, parse_parts
    from redi.engine.console import Console
    from redi.engine.train.run_folder import model_path

    parts = []
    for name, weight in parse_parts(args.models):
        _announce_hub("model", name)
        path = model_path(fetch_trained(name, DataConfig().cache_dir), name)
        parts.append(Part(name, weight, path))
    merge(parts, Path(args.out), Console())
    print(args.out)


def evaluate(argv: Sequence[str]) -> None:
    """`redi evaluate`: sample completions, check their answers, report pass@k."""
    from redi.engine.evaluate.benchmarks import benchmark_paths
    from redi.engine.evaluate.options import parse_evaluate

    options = parse_evaluate(argv)
    _announce_hub("model", options.model)
    benchmarks = benchmark_paths(options.benchmarks, options.benchmark_dir)
    _find_data(*options.data, *benchmarks.values(), kept_from={"traces": options.traces})
    if is_remote(options.model) and options.out is None:
        raise InputError(f"out is missing: the samples of {options.model} need a folder here")
    options = replace(options, model=fetch_trained(options.model, DataConfig().cache_dir))

    from redi.engine.evaluate.command import run

    run(options)


def table(argv: Sequence[str]) -> None:
    """`redi table`: show evaluations as one table, as the paper's table 2."""
    parser = _parser(
        "table",
        "Print pass@1 of evaluations, one row each, with its standard error, in percent.",
        "redi table runs/redi/evaluate-paper runs/sft/evaluate-paper --out table.md",
    )
    parser.add_argument("folders", nargs="+", metavar="EVALUATION", help="folders of evaluations")
    parser.add_argument("--out", type=Path | None, help="also write it as a Markdown file")
    args = parse_arguments(parser, argv)

    from redi.engine.evaluate.table import compare

    compare([Path(folder) for folder in args.folders], args.out)


def logprobs(argv: Sequence[str]) -> None:
    """`redi logprobs`: write per-trace log-probs and entropies as Parquet."""
    parser = _parser(
        "logprobs",
        "Write each trace's log-prob (sum and mean) and mean entropy under a model, as Parquet.",
        "redi logprobs model --data traces.jsonl --out scores.parquet",
        "redi logprobs model --data traces.jsonl --out tokens.parquet --tokens",
        "redi logprobs teacher --data traces.jsonl --out teacher.parquet --top 64",
    )
    parser.add_argument("model", metavar="MODEL", help="run directory, model directory or hub name")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="traces, as for data.path"
    )
    parser.add_argument("--out", required=True, metavar="FILE.parquet", help="output file")
    parser.add_argument(
        "--template", choices=["chat", "none"], help="if omitted, the run's, else chat"
    )
    parser.add_argument("--system_prompt", type=str | None, help="if omitted, the run's")
    parser.add_argument(
        "--row_tokens", type=int, default=32768, help="tokens per pack, as train.row_tokens"
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="also write id, log-prob, entropy and place in the trace of each token, as lists",
    )
    parser.add_argument(
        "--top",
        type=int,
        metavar="K",
        help="also write the K most likely tokens at each token and their log-probs, to distill",
    )
    args = parse_arguments(parser, argv)
    if args.top is not None and args.top < 1:
        raise InputError(f"--top must be >= 1, got {args.top}")
    _announce_hub("model", args.model)
    _find_data(*args.data, kept_from={"out": args.out})

    from redi.engine.train.run_folder import trained_prompts, trained_variables

    asked = (args.template, args.system_prompt)
    template, system_prompt, eos, warning = trained_prompts(args.model, *asked)
    try:
        recipe = Recipe(
            model=ModelConfig(path=args.model),
            data=DataConfig(
                path=args.data,
                template=template,
                system_prompt=system_prompt,
                template_variables=trained_variables(args.model) if template == "chat" else {},
                eos=eos,
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
        write_logprobs(recipe, Path(args.out), world, console, args.tokens, args.top or 0)
    if rank() == 0:
        print(args.out)


def select(argv: Sequence[str]) -> None:
    """`redi select`: choose traces to train on."""
    from redi.engine.commands.select_options import parse_select

    options = parse_select(argv)
    kept_from = {"out": options.out}
    _find_data(*options.data, kept_from=kept_from)
    if options.samples:  # they may be the data itself
        _find_data(*options.samples, kept_from=kept_from)

    from redi.engine.commands.select import select as select_traces
    from redi.engine.console import Console

    select_traces(options, Console(quiet=options.quiet))
    print(options.out)


def doctor(argv: Sequence[str]) -> None:
    """`redi doctor`: show versions, devices and backends, and test the loss."""
    parser = _parser(
        "doctor",
        "Show versions, devices and which backends a run here uses and why; test the loss.",
        "redi doctor",
    )
    parse_arguments(parser, argv)

    from redi.engine.commands.doctor import examine

    if not examine():
        raise RunError("the self-test of the loss failed")


def report(argv: Sequence[str]) -> None:
    """`redi report`: show runs as a table and as curves."""
    parser = _parser(
        "report",
        "Print a table of runs; write a page with curves, differences of the recipes, samples and\n"
        "lengths, report.html, and curves.png into the first directory. The page is one file.",
        "redi report runs/redi",
        "redi report runs/redi-alpha-0.5 runs/redi-alpha-0.8      side by side",
        "redi report s3://bucket/runs/redi --out redi.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories or URLs")
    parser.add_argument(
        "--out",
        type=Path | None,
        metavar="FILE.html",
        help="file of the page; curves.png is written next to it",
    )
    args = parse_arguments(parser, argv)
    if page := args.out:
        if page.suffix != ".html" or page.is_dir():
            raise InputError(f"out: {page}: name a file that ends in .html")
        if not page.absolute().parent.is_dir():
            raise InputError(f"out: {page.parent}: no such directory")

    from redi.engine.commands.report import report_runs

    folders = [fetch_run(run, DataConfig().cache_dir) for run in args.runs]
    print(*report_runs(folders, page), sep="\n")


def _find_data_of(path: str, recipe: Recipe) -> None:
    if not all(recipe.eval.paths):
        raise InputError(f"{path}: eval.path has an empty name")
    if not all(recipe.data.paths):
        raise InputError(f"{path}: data.path is missing")
    _announce_hub("model", recipe.model.path, recipe.model.tokenizer)
    _find_data(*recipe.data.paths)
    if recipe.eval.paths:
        _find_data(*recipe.eval.paths)


def _find_data(*paths: str, kept_from: Mapping[str, str | None] | None = None) -> None:
    """Raise InputError for a missing file, before importing torch, which takes seconds.

    Args:
        kept_from: option -> file that the command writes, which must not replace one of the data.
    """
    from redi.engine.data.sources import find_sources

    sources = find_sources(paths)
    hub = [source.name for source in sources if source.kind == "hub"]
    read = {Path(source.name).resolve() for source in sources if source.kind != "hub"}
    for option, target in (kept_from or {}).items():
        if target is not None and Path(target).resolve() in read:
            raise InputError(
                f"{option}: {target} is read as data, and would be replaced; name another file"
            )
    _announce_hub("dataset", *(name.partition(":")[0] for name in hub))


def _announce_hub(kind: Literal["model", "dataset"], *names: str | None) -> None:
    """Announce hub look-ups: a mistyped path can pass for a hub name, and looking it up is slow."""
    for name in dict.fromkeys(names):
        if name and rank() == 0 and needs_hub(name, kind):
            notice = f"{name}: no local path and not cached; looking it up on the Hugging Face hub"
            print(notice, file=sys.stderr, flush=True)


def _parser(command: str, description: str, *examples: str) -> ArgumentParser:
    """Parser of a command that takes no recipe."""
    lines = "\n".join(f"  {example}" for example in examples)
    return command_parser(f"redi {command}", description, f"examples:\n{lines}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "prepare": prepare,
    "plan": plan,
    "train": train,
    "evaluate": evaluate,
    "table": table,
    "export": export,
    "merge": merge,
    "logprobs": logprobs,
    "select": select,
    "report": report,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv[1:]) and return the exit code."""
    with tolerant_streams() as stdout:
        code = _run(sys.argv[1:] if argv is None else argv)
        stdout.flush()
        if stdout.error is None:
            return code
        if not isinstance(stdout.error, BrokenPipeError):  # `redi doctor | head`
            return _fail(f"stdout cannot be written: {stdout.error}", code or 1)
        return code or 1


def _run(argv: Sequence[str]) -> int:
    """`main` on streams that do not fail."""
    if argv and argv[0] in ("train", "logprobs"):
        _choose_allocator()
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # print the Python stack if native code crashes
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
        if argv[0] != "train":  # train installs its own handlers, to finish the step
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        check_launch()
        _check_names(argv)
        _check_directory()
        if argv[0] not in COMMANDS:
            near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"available: {', '.join(COMMANDS)}"
            raise InputError(f"unknown command {argv[0]}; {hint}")
        COMMANDS[argv[0]](argv[1:])
    except ArgumentError as error:
        return _fail(explain(error), 2)
    except InputError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except Stopped as stopped:
        end_job(str(stopped), STOPPED)
        if str(stopped) and rank() == 0:
            print(stopped, file=sys.stderr, flush=True)
        return STOPPED
    except KeyboardInterrupt:
        return _fail("interrupted", STOPPED)
    except OSError as error:
        if "No usable temporary directory" in str(error):  # of Python's tempfile, for a library
            return _fail("no directory for temporary files can be written; set TMPDIR to one", 1)
        if error.filename is None:
            end_job(f"redi: {describe(error)}", 1, traceback.format_exc())
            raise
        code = 2 if error.errno == errno.ENAMETOOLONG else 1
        return _fail(f"{os.fsdecode(error.filename)}: {error.strerror}", code)
    except SystemExit as request:  # --help of a command
        return int(request.code or 0)
    except BaseException as error:
        end_job(f"redi: {describe(error)}", 1, traceback.format_exc())
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        # If a KeyboardInterrupt left code compiled from a string (dataclasses, on import), CPython
        # exits `python -m` by SIGINT although it was caught; running another string resets that.
        exec("")
    return 0


def _check_names(argv: Sequence[str]) -> None:
    """Raise InputError for an argument that is no UTF-8: files of a run could not hold the name."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            remedy = "not valid UTF-8; rename the file or directory"
            with suppress(UnicodeDecodeError):
                argument = os.fsencode(argument).decode()
                remedy = (
                    f"not readable in the locale's {sys.getfilesystemencoding()}; set PYTHONUTF8=1"
                )
            raise InputError(f"{argument}: {remedy}") from None


def _check_directory() -> None:
    """Raise InputError if the current directory, which paths are relative to, was removed."""
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"the current directory cannot be read ({error.strerror}): cd to another one"
        ) from None


def _choose_allocator() -> None:
    """Let the CUDA allocator extend its segments, unless the user has chosen.

    Packs differ in length, and segments of fixed size fragment. torch reads the variable when it is
    imported.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _fail(text: str, code: int) -> int:
    """Print one line on stderr and return `code`, or end all ranks that this one has joined.

    Under torchrun, rank 0 reports an error that all ranks have before they join. torchrun ends all
    ranks when the first one exits. The other ranks wait, so that rank 0 prints first; a rank that
    is alive after the wait failed alone and prints its own error.
    """
    end_job(f"redi: {text}", code)
    if number := rank():
        with suppress(KeyboardInterrupt):  # torchrun ends this rank
            time.sleep(RANK_0_SECONDS)
        text = f"rank {number}: {text}"
    print(f"redi: {printable(text)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
