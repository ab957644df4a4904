"""`redi evaluate`: sample completions of problems, check their answers, report pass@k.

An evaluation's folder holds `evaluation.json` (what was asked for, and of what), written first;
`samples.jsonl`, a line a completion, flushed batch by batch; and `summary.json`, written last.
Completions are generated longest prompt first, an order that hangs on the data alone: one that was
interrupted goes on behind its last whole batch, and ends with the samples that it would have had.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from redi.engine.console import Console, print_table
from redi.engine.data.sources import unread_splits
from redi.engine.errors import InputError, RunError, Stopped
from redi.engine.evaluate.options import EvaluateOptions
from redi.engine.evaluate.task import Task, prepare
from redi.engine.generation.checkers import Checker, open_checker
from redi.engine.generation.generate import Completion, generate_batches, vllm_batches
from redi.engine.generation.scoring import score
from redi.engine.model.load import load_weights
from redi.engine.train.run_folder import manifest, trained_prompts


def run(options: EvaluateOptions) -> dict[str, Any]:
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
    template, system_prompt, eos, warning = trained_prompts(
        options.model, options.template, options.system_prompt
    )
    if warning:
        console.warn(warning)
    if eos == "left_out":
        console.warn(
            f'{options.model}: trained with data.eos = "left_out", without the ends of traces: '
            "a completion ends where the model before training would, else at max_new_tokens"
        )
    task = prepare(replace(options, template=template, system_prompt=system_prompt))
    for line in unread_splits(options.data):
        console.warn(line)
    folder = task.folder
    _check_same(folder, task.settings)
    samples = folder / "samples.jsonl"
    total = len(task.requests)
    done = _cut_to_batches(samples, options.batch_size, total)
    if done == total:
        console.say(f"{folder}: finished already; samples.jsonl holds all {total} samples")
    else:
        if done:
            console.say(f"{folder}: going on after {done} of {total} samples")
        _begin(task)
        _sample(task, samples, done, console)
    facts = json.loads(_facts_file(folder).read_text(encoding="utf-8"))
    summary = {**facts, "benchmarks": _benchmarks(task, samples)}
    _write_json(folder / "summary.json", summary)
    _print_scores(summary["benchmarks"])
    console.say(f"samples and summary: {folder}")
    return summary


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
                if len(ends) == 1:
                    _check_columns(path, line)
                ends.append(ends[-1] + len(line))
    lines = len(ends) - 1
    kept = total if lines == total else lines - lines % batch_size
    os.truncate(path, ends[kept])
    return kept


def _check_columns(path: Path, line: bytes) -> None:
    """Samples of an older version have other columns, and one file must not hold both."""
    try:
        is_current = "traces" in json.loads(line)
    except (ValueError, TypeError):
        raise InputError(f"{path}:1: not valid JSON; name another out") from None
    if not is_current:
        raise InputError(
            f"{path}: has the columns of an older version of redi (no traces); name another out"
        )


def _begin(task: Task) -> None:
    """Start the folder, unless an earlier attempt has."""
    folder = task.folder
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


def _sample(task: Task, path: Path, done: int, console: Console) -> None:
    """Generate, check and write what is not done."""
    options = task.options
    units = iter(task.units[done:])
    progress = console.progress("sample", len(task.units), done)
    made = correct = tokens = 0
    began = time.monotonic()
    try:
        with (
            open_checker(options.checker, options.answer_pattern) as check,
            path.open("a", encoding="utf-8") as file,
        ):
            for batch in _batches(task, done):
                lines = [_line(task, *next(units), completion, check) for completion in batch]
                file.write("".join(json.dumps(line) + "\n" for line in lines))
                file.flush()
                made += len(lines)
                correct += sum(line["traces"][0]["correct"] for line in lines)
                tokens += sum(line["tokens"] for line in lines)
                speed = tokens / max(time.monotonic() - began, 1e-9)
                progress.update(len(lines), f"accuracy {correct / made:.3f}", f"{speed:,.0f} tok/s")
    except KeyboardInterrupt:
        raise Stopped(
            f"interrupted: {path} holds the samples so far; the same command goes on from there"
        ) from None
    except torch.OutOfMemoryError:
        raise RunError(
            f"out of memory with batch_size {options.batch_size}: the same command with a smaller "
            "one goes on from there"
        ) from None
    finally:
        progress.close()


def _line(
    task: Task, problem_index: int, sample: int, completion: Completion, check: Checker
) -> dict[str, Any]:
    """A completion with its verdict, as samples.jsonl has it."""
    problem, prompt = task.problems[problem_index], task.prompts[problem_index]
    verdict = check(prompt, completion.text, problem.answer)
    plain = problem.prompt
    return {
        "problem": problem_index,
        "id": problem.id,
        "sample": sample,
        # The columns of the row shape `traces`: samples can be trained on as they are.
        "prompt": plain if isinstance(plain, str) else [asdict(message) for message in plain],
        "traces": [
            {
                "text": completion.text,
                "correct": verdict.correct,
                "teacher": task.options.model,
                "finished": completion.ended,
            }
        ],
        "rendered_prompt": prompt,
        "extracted": verdict.extracted,
        "answer": problem.answer,
        "ended": completion.ended,
        "tokens": completion.tokens,
    }


def _batches(task: Task, done: int) -> Iterator[list[Completion]]:
    requests, batch_size = task.requests[done:], task.options.batch_size
    if task.engine == "vllm":
        return vllm_batches(task.model_path, task.dtype, requests, task.sampling, batch_size)
    model = load_weights(task.model_path, "MODEL", task.model_config, task.dtype).to(task.device)
    return generate_batches(model, task.encoder.tokenizer, requests, task.sampling, batch_size)


def _benchmarks(task: Task, path: Path) -> list[dict[str, Any]]:
    """Scores of each file, and of all if there are several, from the samples on disk."""
    shape = (len(task.problems), task.options.samples)
    correct, ended = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    tokens = np.zeros(shape, dtype=np.int64)
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            place = line["problem"], line["sample"]
            correct[place], ended[place] = line["traces"][0]["correct"], line["ended"]
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


def _print_scores(benchmarks: Sequence[dict[str, Any]]) -> None:
    """The benchmarks of summary.json as a table in per cent, on stdout."""
    ks = [k for k in benchmarks[0]["pass_at"] if k != 1]
    columns = ("data", "problems", "samples", "pass@1", "+-")
    rows = [
        (
            Path(row["name"]).name,
            f"{row['problems']:,}",
            str(row["samples"]),
            _per_cent(row["pass_at_1"]),
            f"{_per_cent(row['sem_over_samples'])} | {_per_cent(row['sem_over_problems'])}",
            *(_per_cent(row["pass_at"][k]) for k in ks),
            _per_cent(row["truncated"]),
            f"{row['mean_tokens']:,.0f}",
        )
        for row in benchmarks
    ]
    print_table(
        "per cent; +-: standard error over samples | over problems",
        (*columns, *(f"pass@{k}" for k in ks), "cut off", "tokens"),
        rows,
        file=sys.stdout,
    )


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
