"""`redi evaluate`: sample completions of problems, check their answers, report pass@k.

An evaluation's folder holds `evaluation.json` (what was asked for, and of what), written first;
`samples.jsonl`, a line a completion, flushed batch by batch; and `summary.json`, written last.
Completions are generated longest prompt first, an order that hangs on the data alone: one that was
interrupted goes on behind its last whole batch, and ends with the samples that it would have had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from transformers.utils import logging as transformers_logging

from redi.engine.checkers import open_checker
from redi.engine.console import Console
from redi.engine.data.problems import Problem, read_problems
from redi.engine.data.text import Encoder, TokenSettings
from redi.engine.errors import InputError, RunError
from redi.engine.evaluate_display import EvaluateProgress, print_scores
from redi.engine.evaluate_options import EvaluateOptions
from redi.engine.generate import (
    Completion,
    Request,
    Sampling,
    encode_prompts,
    generate_batches,
    longest_first,
    vllm_batches,
)
from redi.engine.model.load import find_config, load_weights, model_digest
from redi.engine.model.sharding import compute_dtype
from redi.engine.scoring import score
from redi.engine.train.run_folder import RECIPE, manifest

MOST_NEW_TOKENS = 32768  # the paper's

# What a resumed evaluation may change: the same samples, with batch_size and device to rounding.
FREE_ON_RESUME = ("batch_size", "device", "k", "out", "quiet")


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate, going on from where an earlier attempt stopped, and print the table.

    Returns:
        What summary.json holds.

    Raises:
        InputError: options, data or model are wrong, or the folder holds another evaluation.
        RunError: it was interrupted, or ran out of memory.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("redi evaluate is one process: start it without torchrun")
    transformers_logging.disable_progress_bar()
    console = Console(quiet=options.quiet)
    task = _prepare(options)
    folder = Path(options.out) if options.out else _default_folder(options)
    _check_same(folder, task.settings)
    samples = folder / "samples.jsonl"
    total = len(task.requests)
    done = _cut_to_batches(samples, options.batch_size, total)
    if done == total:
        console.say(f"{folder}: finished already; samples.jsonl holds all {total} samples")
    else:
        if done:
            console.say(f"{folder}: going on after {done} of {total} samples")
        _begin(folder, task)
        _sample(task, samples, done, console)
    facts = json.loads(_facts_file(folder).read_text(encoding="utf-8"))
    summary = {**facts, "benchmarks": _benchmarks(task, samples)}
    _write_json(folder / "summary.json", summary)
    print_scores(summary["benchmarks"])
    console.say(f"samples and summary: {folder}")
    return summary


@dataclass(frozen=True)
class _Task:
    """Everything that is known before a model is loaded."""

    options: EvaluateOptions
    problems: list[Problem]
    prompts: list[str]
    """Each problem's prompt as the model sees it."""
    units: list[tuple[int, int]]
    """(problem, sample) of each completion, in the order of generation."""
    requests: list[Request]
    """The same, as the generator takes them."""
    sampling: Sampling
    model_path: str
    model_config: Any
    encoder: Encoder
    engine: str
    device: torch.device
    dtype: torch.dtype
    settings: dict[str, Any]
    """What shapes the samples and their verdicts; it may not change on resume."""


def _prepare(options: EvaluateOptions) -> _Task:
    problems = read_problems(options.data, options.limit)
    path = _model_path(options.model)
    config = find_config(path, "MODEL")
    encoder = Encoder(TokenSettings((), "auto", options.template, options.system_prompt, path))
    prompts = [encoder.prompt_text(problem.prompt, problem.where) for problem in problems]
    ids = encode_prompts(encoder.tokenizer, prompts)
    max_new_tokens = _room(options.max_new_tokens, problems, ids, config)
    requests = [Request(prompt, sample) for prompt in ids for sample in range(options.samples)]
    order = longest_first(requests)
    device = _device(options.device)
    dtype = compute_dtype(options.dtype, device)
    engine = _engine(options.engine, device)
    free = {*FREE_ON_RESUME, "model", "data"}
    settings = {
        **{name: value for name, value in asdict(options).items() if name not in free},
        "max_new_tokens": max_new_tokens,
        "engine": engine,
        "dtype": str(dtype).removeprefix("torch."),
        # By content: the same bytes may lie elsewhere.
        "model": model_digest(path) or path,
        "data": xxhash.xxh3_128_hexdigest(repr([(p.prompt, p.answer) for p in problems]).encode()),
        "tokenizer": encoder.digest(),
    }
    return _Task(
        options=options,
        problems=problems,
        prompts=prompts,
        units=[divmod(place, options.samples) for place in order],
        requests=[requests[place] for place in order],
        sampling=Sampling(max_new_tokens, options.temperature, options.top_p, options.seed),
        model_path=path,
        model_config=config,
        encoder=encoder,
        engine=engine,
        device=device,
        dtype=dtype,
        settings=settings,
    )


def _model_path(model: str) -> str:
    """The folder or hub name to load: of a run, its export."""
    if not (Path(model) / RECIPE).is_file():
        return model
    export = Path(model) / "export"
    if not export.is_dir():
        raise InputError(
            f"MODEL: the run {model} has no export yet: finish it, or write a checkpoint with "
            f"`redi export {model}` and evaluate the folder that it names"
        )
    return str(export)


def _default_folder(options: EvaluateOptions) -> Path:
    names = [Path(path).name.removesuffix(".gz") for path in options.data]
    data = "+".join(name.partition(".")[0].replace(":", "-") for name in names)
    model = Path(options.model)
    if (model / RECIPE).is_file():
        return model / f"evaluate-{data}"
    if model.name.startswith("export") and (model.parent / RECIPE).is_file():
        return model.parent / f"evaluate{model.name.removeprefix('export')}-{data}"
    return Path("runs") / f"evaluate-{model.resolve().name}-{data}"


def _room(
    wanted: int | None, problems: Sequence[Problem], ids: Sequence[tuple[int, ...]], config: Any
) -> int:
    """New tokens of a completion: as wanted, else what the longest prompt leaves."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    length, where = len(ids[longest]), problems[longest].where
    if (most := max(map(max, ids))) >= text_config.vocab_size:
        raise InputError(
            f"MODEL: the tokenizer gives token {most}, the model's vocabulary has "
            f"{text_config.vocab_size}"
        )
    if positions is None:
        return wanted or MOST_NEW_TOKENS
    if length >= positions:
        raise InputError(
            f"{where}: the prompt has {length} tokens, the model only {positions} positions"
        )
    if wanted is not None and length + wanted > positions:
        raise InputError(
            f"max_new_tokens: {where} has a prompt of {length} tokens and the model {positions} "
            f"positions, which leaves {positions - length}, not {wanted}"
        )
    return wanted or min(MOST_NEW_TOKENS, positions - length)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        problem = str(error).strip().split("\n")[0]
        raise InputError(f"device: {name!r} is not to be had here: {problem}") from None
    return device


def _engine(name: str, device: torch.device) -> str:
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise InputError('engine: vllm is not installed; install it, or use "transformers"')
    if name == "auto":
        return "vllm" if installed and device.type == "cuda" else "transformers"
    return name


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    """A folder belongs to one evaluation."""
    path = _facts_file(folder)
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out: {folder} exists and holds no evaluation; name another")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); name another out") from None
    for name, value in settings.items():
        if old.get(name) != value:
            raise InputError(
                f"out: {folder} holds an evaluation with another {name} ({old.get(name)}, now "
                f"{value}); name another out, or change it back to go on"
            )


def _cut_to_batches(path: Path, batch_size: int, total: int) -> int:
    """Cut what a killed attempt left behind its last whole batch. Returns the samples kept."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        ends = [0]
        for line in file:
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
    lines = len(ends) - 1
    kept = total if lines == total else lines - lines % batch_size
    os.truncate(path, ends[kept])
    return kept


def _begin(folder: Path, task: _Task) -> None:
    """Start the folder, unless an earlier attempt has."""
    if _facts_file(folder).is_file():
        return
    paths = {"model": task.model_path, "data": task.options.data}
    facts = manifest(1, task.device, **paths, settings=task.settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(_facts_file(folder), facts)
    except OSError as error:
        raise InputError(f"out: {folder} cannot be written: {error}") from None


def _facts_file(folder: Path) -> Path:
    return folder / "evaluation.json"


def _sample(task: _Task, path: Path, done: int, console: Console) -> None:
    """Generate, check and write what is not done."""
    options = task.options
    total = len(task.requests)
    progress = EvaluateProgress(console, total, done)
    try:
        with (
            open_checker(options.checker, options.answer_pattern) as check,
            path.open("a", encoding="utf-8") as file,
        ):
            for completions in _batches(task, done):
                lines = []
                for completion in completions:
                    problem_index, sample = task.units[done]
                    problem, prompt = task.problems[problem_index], task.prompts[problem_index]
                    verdict = check(prompt, completion.text, problem.answer)
                    line = {
                        "problem": problem_index,
                        "id": problem.id,
                        "sample": sample,
                        "prompt": prompt,
                        "completion": completion.text,
                        "extracted": verdict.extracted,
                        "answer": problem.answer,
                        "correct": verdict.correct,
                        "ended": completion.ended,
                        "tokens": completion.tokens,
                    }
                    lines.append(line)
                    done += 1
                file.write("".join(json.dumps(line) + "\n" for line in lines))
                file.flush()
                progress.batch(lines)
    except KeyboardInterrupt:
        raise RunError(
            f"interrupted: {path} holds the samples so far; the same command goes on from there"
        ) from None
    except torch.OutOfMemoryError:
        raise RunError(
            f"out of memory with batch_size {options.batch_size}: the same command with a smaller "
            "one goes on from there"
        ) from None
    finally:
        progress.close()


def _batches(task: _Task, done: int) -> Iterator[list[Completion]]:
    requests, batch_size = task.requests[done:], task.options.batch_size
    if task.engine == "vllm":
        return vllm_batches(task.model_path, task.dtype, requests, task.sampling, batch_size)
    model = load_weights(task.model_path, "MODEL", task.model_config, task.dtype).to(task.device)
    return generate_batches(model, task.encoder.tokenizer, requests, task.sampling, batch_size)


def _benchmarks(task: _Task, path: Path) -> list[dict[str, Any]]:
    """Scores of each file, and of all if there are several, from the samples on disk."""
    shape = (len(task.problems), task.options.samples)
    correct, ended = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    tokens = np.zeros(shape, dtype=np.int64)
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            place = line["problem"], line["sample"]
            correct[place], ended[place] = line["correct"], line["ended"]
            tokens[place] = line["tokens"]
    sources = np.array([problem.source for problem in task.problems])
    names = list(dict.fromkeys(sources.tolist()))
    groups = {name: sources == name for name in names}
    if len(names) > 1:
        groups["all"] = np.ones(len(sources), dtype=bool)
    return [
        {
            "name": name,
            **asdict(score(correct[chosen], task.options.ks)),
            "truncated": float(1 - ended[chosen].mean()),
            "mean_tokens": float(tokens[chosen].mean()),
        }
        for name, chosen in groups.items()
    ]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
