"""Problems, traces, tokenizer and initial model shared by the students of a task and seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedTokenizerBase

from redi.bench.learning.tasks import Task
from redi.engine.config.sections import ObjectiveConfig
from redi.engine.console import Console
from redi.engine.data.packing import PackedBatch, build_batch
from redi.engine.data.schedule import Examples, Pairing, select
from redi.engine.data.summary_by_source import summarize_by_source
from redi.engine.data.text import TokenSettings, load_tokenizer
from redi.engine.data.tokens import TokenizedTraces, tokenize
from redi.engine.quickstart import task as quickstart

ROW_TOKENS = 1_000_000
"""A step is one pack: its traces are short."""


@dataclass(frozen=True)
class StudySizes:
    """Sizes of the study."""

    problems: int = 6000
    """To train on."""
    validation: int = 200
    """Problems on which learning rates are chosen."""
    test: int = 300
    """Problems of the reported results."""
    samples: int = 8
    """Of each test problem; k of pass@k."""
    hidden: int = 64
    """Width of the student, a Qwen2."""
    layers: int = 2
    stage_1: float = 1.0
    """Steps of stage 1, as a multiple of the task's own."""
    stage_1_batch: int = 64
    steps: int = 80
    """Of stage 2."""
    batch: int = 32
    """Pairs of a step of stage 2."""
    log_every: int = 4
    """Steps of stage 2 between recorded lines."""
    look_every: int = 20
    """Steps of stage 2 between evaluations on validation problems."""

    def __post_init__(self) -> None:
        if self.steps % self.look_every or self.look_every % self.log_every:
            raise ValueError(f"steps must be a multiple of {self.look_every}, got {self.steps}")


@dataclass(frozen=True)
class Trial:
    """Data shared by the students of one task and seed."""

    task: Task
    seed: int
    sizes: StudySizes
    folder: Path
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    train: TokenizedTraces
    pairs: PackedBatch
    """First correct and first incorrect trace of each validation problem that has both, in turn."""
    problems: dict[str, list[str]]
    """By split."""


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `folder` when complete, so that none is incomplete."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    yield unfinished
    unfinished.rename(folder)


def write_trial(task: Task, seed: int, sizes: StudySizes, folder: Path) -> None:
    """Write train.jsonl, validation.jsonl, test.jsonl and model/; no problem is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    counts = {"test": sizes.test, "validation": sizes.validation, "train": sizes.problems}
    problems = iter(quickstart.make_problems(sum(counts.values()), rng, task.draw_problem))
    for split, count in counts.items():
        some = [next(problems) for _ in range(count)]
        path = folder / f"{split}.jsonl"
        quickstart.write_traces(path, some, rng, task.attempt, task.answer, task.name)
    quickstart.write_model(folder / "model", seed, task.characters, sizes.hidden, sizes.layers)


def open_trial(
    task: Task, seed: int, sizes: StudySizes, folder: Path, device: torch.device
) -> Trial:
    """Read what `write_trial` wrote."""
    model = str(folder / "model")

    def tokens(split: str) -> TokenizedTraces:
        path = str(folder / f"{split}.jsonl")
        settings = TokenSettings((path,), "traces", "none", None, model)
        return tokenize(settings, folder / "cache", processes=1, console=Console(quiet=True))

    def problems(split: str) -> list[str]:
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    validation = tokens("validation")
    pairs = select_units(validation, ObjectiveConfig("redi")).units.reshape(-1)
    return Trial(
        task=task,
        seed=seed,
        sizes=sizes,
        folder=folder,
        device=device,
        tokenizer=load_tokenizer(model),
        train=tokens("train"),
        pairs=build_batch(validation, pairs, validation.lengths[pairs]).to(device),
        problems={split: problems(split) for split in ("validation", "test")},
    )


def select_units(
    tokens: TokenizedTraces, objective: ObjectiveConfig, pairing: Pairing = "first"
) -> Examples:
    """The units of training; stage 2 takes one trace of each sign from a problem."""
    return select(
        tokens,
        objective_needs=objective.kind.units,
        pairing=pairing,
        max_tokens=ROW_TOKENS,
        overlong="error",
        row_tokens=ROW_TOKENS,
    )


def read_pairs(folder: Path) -> list[tuple[str, str, str]]:
    """Problem, first correct and first incorrect trace of each training problem that has both."""
    pairs = []
    for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        first = {trace["correct"]: trace["text"] for trace in reversed(row["traces"])}
        if len(first) == 2:
            pairs.append((row["prompt"], first[True], first[False]))
    return pairs


def describe_pairs(trial: Trial) -> dict[str, float | None]:
    """Figures of the training pairs as in `redi prepare`, and the teacher's fault by verdict."""
    problems, positives, negatives = zip(*read_pairs(trial.folder), strict=True)
    examples = select_units(trial.train, ObjectiveConfig("redi"))
    found = {
        "pairs": len(examples.units),
        "overlap": summarize_by_source(trial.train, examples, ROW_TOKENS).overlap,
    }
    for name, traces in (("positive", positives), ("negative", negatives)):
        judged = zip(problems, traces, strict=True)
        found[f"{name}_tokens"] = fmean(len(trace) + 1 for trace in traces)
        found[f"{name}_fault"] = fmean(trial.task.fault_share(*pair) for pair in judged)
    return found
