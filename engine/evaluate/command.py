"""`redi evaluate`: sample completions of problems, check their answers, report pass@k.

The output directory holds `evaluation.json` (settings and versions), written first;
`samples.jsonl`, a line per completion, written as they finish; and `summary.json` and `table.md`,
written last.
Completions are generated longest prompt first, an order that depends only on the data. An
interrupted evaluation generates what is missing and yields the same samples: transformers repeats
whole batches, since other batches would round differently.
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
from transformers.utils import logging as transformers_logging

from redi.engine.console import Console, print_table
from redi.engine.data.sources import unread_splits
from redi.engine.data.write_rows import row_writer
from redi.engine.errors import InputError, Stopped
from redi.engine.evaluate.benchmarks import benchmark_paths
from redi.engine.evaluate.options import EvaluateOptions
from redi.engine.evaluate.samples import Recorder, keep_complete, put_in_order
from redi.engine.evaluate.table import as_markdown, print_comparison
from redi.engine.evaluate.task import Evaluation, prepare_evaluation
from redi.engine.generation.checkers import NOT_JUDGED
from redi.engine.generation.engines import EngineSettings, Finished
from redi.engine.generation.generate import end_tokens
from redi.engine.generation.judging import open_judges
from redi.engine.generation.scoring import macro_average, score
from redi.engine.generation.server import complete, find_server
from redi.engine.generation.workers import generate_items
from redi.engine.train.run_folder import manifest, trained_prompts, trained_variables

_DOUBTS_SHOWN = 5


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate, resuming an earlier attempt if there is one, and print the table.

    Returns:
        Contents of summary.json.

    Raises:
        InputError: options, data or model are invalid, or the directory holds another evaluation.
        Stopped: it was interrupted.
        RunError: it ran out of memory, a worker was killed or the server failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("redi evaluate runs in one process; start it without torchrun")
    transformers_logging.disable_progress_bar()
    console = Console(quiet=options.quiet)
    template, system_prompt, eos, warning = trained_prompts(
        options.model, options.template, options.system_prompt
    )
    if warning:
        console.warn(warning)
    if eos == "left_out":
        console.warn(
            f'{options.model}: trained with data.eos = "left_out", without the ends of traces; '
            "a completion ends as with the model before training, else at max_new_tokens"
        )
    variables = options.template_variables
    if variables is None and template == "chat":
        variables = trained_variables(options.model)
    options = replace(
        options, template=template, system_prompt=system_prompt, template_variables=variables
    )
    task = prepare_evaluation(options)
    for line in unread_splits(options.data):
        console.warn(line)
    folder = task.folder
    _check_same(folder, task.settings)
    samples = folder / "samples.jsonl"
    total = len(task.requests)
    unit = options.batch_size if task.engine == "transformers" else 1
    done = keep_complete(samples, task.places, unit)
    if len(done) == total:
        console.say(f"{folder}: already finished; samples.jsonl holds all {total} samples")
    else:
        if done:
            console.say(f"{folder}: resuming after {len(done)} of {total} samples")
        generated = _generated(task, done)  # a server that does not answer leaves no folder
        _begin(task)
        _sample(task, samples, generated, len(done), console)
    put_in_order(samples, task.places)
    facts = json.loads(_facts_file(folder).read_text(encoding="utf-8"))
    summary = {**facts, **_scores(task, samples)}
    _write_json(folder / "summary.json", summary)
    _write_text(folder / "table.md", as_markdown([summary]))
    _print_scores(summary)
    if options.benchmarks:
        print_comparison([summary])
    _report_doubts(summary["doubts"], console)
    console.say(f"samples and summary: {folder}")
    if options.traces:
        _write_traces(task, samples, Path(options.traces))
        console.say(f"rows to train on: {options.traces}")
    return summary


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    """Raise InputError if the directory holds anything but this evaluation."""
    path = _facts_file(folder)
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out: {folder} exists and holds no evaluation; choose another out")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); choose another out") from None
    for name, value in settings.items():
        if old.get(name) != value:
            raise InputError(
                f"out: {folder} holds an evaluation with another {name} ({old.get(name)}, now "
                f"{value}); choose another out, or change it back to resume"
            )


def _begin(task: Evaluation) -> None:
    """Create the directory and evaluation.json, unless an earlier attempt has."""
    folder = task.folder
    if _facts_file(folder).is_file():
        return
    options = task.options
    benchmarks = benchmark_paths(options.benchmarks, options.benchmark_dir)
    paths = {"model": task.model_path, "data": [*options.data, *benchmarks.values()]}
    facts = manifest(1, task.device, **paths, settings=task.settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(_facts_file(folder), facts)
    except OSError as error:
        raise InputError(f"out: {folder} cannot be written: {error}") from None


def _facts_file(folder: Path) -> Path:
    return folder / "evaluation.json"


def _sample(
    task: Evaluation, path: Path, generated: Iterator[list[Finished]], done: int, console: Console
) -> None:
    """Check and write the samples that are generated; `done` of them are there already."""
    options = task.options
    progress = console.progress("sample", len(task.places), done)
    made = correct = tokens = 0
    began = time.monotonic()

    def written(lines: Sequence[dict[str, Any]]) -> None:
        nonlocal made, correct, tokens
        made += len(lines)
        correct += sum(line["traces"][0]["correct"] for line in lines)
        tokens += sum(line["tokens"] for line in lines)
        speed = tokens / max(time.monotonic() - began, 1e-9)
        progress.update(len(lines), f"accuracy {correct / made:.3f}", f"{speed:,.0f} tok/s")

    try:
        with (
            open_judges(options.checker, options.answer_pattern, options.judges) as judge,
            Recorder(task, path, judge, written) as recorder,
        ):
            for finished in generated:
                recorder.add(finished)
    except KeyboardInterrupt:
        raise Stopped(
            f"interrupted: {path} holds the samples so far; the same command resumes"
        ) from None
    finally:
        progress.close()


def _generated(task: Evaluation, done: set[int]) -> Iterator[list[Finished]]:
    """The samples that are not done, as they are asked for; numbers are indices of their places.

    Raises:
        InputError: the server does not answer.
    """
    options = task.options
    items = [item for item in enumerate(task.requests) if item[0] not in done]
    if options.server is not None:
        server = find_server(options.server, options.concurrency, options.served_model)
        ends = end_tokens(task.model_path, task.encoder.tokenizer)
        return complete(server, items, task.sampling, ends)
    settings = EngineSettings(
        kind=task.engine,
        model_path=task.model_path,
        adapter=task.adapter,
        dtype=task.dtype,
        device=str(task.device),
        sampling=task.sampling,
        context=max(len(one.prompt) for one in task.requests) + task.sampling.max_new_tokens,
        batch_size=options.batch_size,
        tensor_parallel=options.tensor_parallel,
    )
    return generate_items(settings, items, options.gpus // options.tensor_parallel)


def _scores(task: Evaluation, path: Path) -> dict[str, Any]:
    """Scores of each data file and benchmark, and of all, from the samples on disk."""
    shape = (len(task.problems), task.options.samples)
    correct, ended = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    tokens = np.zeros(shape, dtype=np.int64)
    doubts: dict[str, list[dict[str, Any]]] = {}
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            if doubt := line.get("doubt"):
                shown = ("problem", "id", "sample", "extracted", "answer")
                verdict = {"correct": line["traces"][0]["correct"]}
                doubts.setdefault(doubt, []).append({**{n: line[n] for n in shown}, **verdict})
            place = line["problem"], line["sample"]
            correct[place], ended[place] = line["traces"][0]["correct"], line["ended"]
            tokens[place] = line["tokens"]
    sources = np.array([problem.source for problem in task.problems])
    names = list(dict.fromkeys(sources.tolist()))
    groups = {name: sources == name for name in names}
    average = macro_average([correct[chosen] for chosen in groups.values()])
    if len(names) > 1 and not task.options.benchmarks:
        groups["all"] = np.ones(len(sources), dtype=bool)
    benchmarks = [
        {
            "name": name,
            **asdict(score(correct[chosen], task.options.ks)),
            "truncated": float(1 - ended[chosen].mean()),
            "mean_tokens": float(tokens[chosen].mean()),
        }
        for name, chosen in groups.items()
    ]
    return {
        "benchmarks": benchmarks,
        **({"average": asdict(average)} if len(names) > 1 else {}),
        # Verdicts that a person should look at; none is changed.
        "doubts": {
            doubt: {"count": len(found), "first": found[:_DOUBTS_SHOWN]}
            for doubt, found in doubts.items()
        },
    }


def _write_traces(task: Evaluation, samples: Path, target: Path) -> None:
    """Write the samples as rows of the shape `traces`: a row per problem, in the data's order."""
    places: dict[int, list[tuple[int, int]]] = {}  # problem -> (sample, start of its line)
    with samples.open("rb") as file, row_writer(target) as write:
        start = 0
        for line in file:
            sample = json.loads(line)
            places.setdefault(sample["problem"], []).append((sample["sample"], start))
            start += len(line)
        for problem in sorted(places):
            lines = []
            for _, start in sorted(places[problem]):
                file.seek(start)
                lines.append(json.loads(file.readline()))
            row = {name: lines[0][name] for name in ("id", "prompt", "answer")}
            write(row | {"traces": [trace for line in lines for trace in line["traces"]]})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _report_doubts(doubts: dict[str, Any], console: Console) -> None:
    counts = {doubt: found["count"] for doubt, found in doubts.items()}
    if missing := counts.pop(NOT_JUDGED, 0):
        console.warn(f"{missing} answers were not judged in time and count as incorrect")
    if counts:
        shown = ", ".join(f"{count} {doubt}" for doubt, count in counts.items())
        console.say(f"uncertain verdicts, examples in summary.json: {shown}")


def _print_scores(summary: dict[str, Any]) -> None:
    """Print the scores of summary.json as a table in percent, on stdout."""
    benchmarks = summary["benchmarks"]
    ks = [k for k in benchmarks[0]["pass_at"] if k != 1]
    columns = ("data", "problems", "samples", "pass@1", "+-")
    rows = [
        (
            Path(row["name"]).name,
            f"{row['problems']:,}",
            str(row["samples"]),
            *_with_errors(row),
            *(_percent(row["pass_at"][k]) for k in ks),
            _percent(row["truncated"]),
            f"{row['mean_tokens']:,.0f}",
        )
        for row in benchmarks
    ]
    if average := summary.get("average"):
        rows.append(("average", "", "", *_with_errors(average), *[""] * (len(ks) + 2)))
    print_table(
        "percent; +-: standard error over samples | over problems",
        (*columns, *(f"pass@{k}" for k in ks), "truncated", "tokens"),
        rows,
        file=sys.stdout,
    )


def _with_errors(score: dict[str, Any]) -> tuple[str, str]:
    """pass@1, and its standard errors over samples and over problems."""
    errors = _percent(score["sem_over_samples"]), _percent(score["sem_over_problems"])
    return _percent(score["pass_at_1"]), " | ".join(errors)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
