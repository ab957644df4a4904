"""Generated samples in run folders: of `[eval] samples` and of `redi evaluate`, by problem."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_PROBLEMS = 8
"""Problems that are shown."""
LONGEST_TEXT = 6000
"""Characters of a text that are shown: of a longer one the start and the end."""


@dataclass(frozen=True)
class ShownSample:
    """A completion and its verdict."""

    run: int
    """Place of the run in the report."""
    when: str
    """After which step, or by which evaluation."""
    text: str
    correct: bool
    ended: bool
    tokens: int | None


@dataclass
class SampledProblem:
    """A problem with its samples in the order of runs and steps."""

    prompt: str
    answer: str
    samples: list[ShownSample] = field(default_factory=list)


def read_samples(run_dirs: Sequence[Path]) -> list[SampledProblem]:
    """The first sample of each problem, before and after training of each run.

    Of samples made during training those of the first and of the last step are shown. A run without
    them is shown by its evaluations. Lines that are damaged or of another version are left out.

    Returns:
        At most MOST_PROBLEMS problems, those with most samples first.
    """
    problems: dict[str, SampledProblem] = {}
    for run, folder in enumerate(run_dirs):
        for when, line in _lines(folder):
            trace, prompt = line["traces"][0], _text(line["prompt"])
            problem = problems.setdefault(prompt, SampledProblem(prompt, str(line["answer"])))
            problem.samples.append(
                ShownSample(
                    run=run,
                    when=when,
                    text=_shortened(str(trace["text"])),
                    correct=bool(trace["correct"]),
                    ended=bool(line.get("ended", True)),
                    tokens=line.get("tokens"),
                )
            )
    return sorted(problems.values(), key=lambda one: -len(one.samples))[:MOST_PROBLEMS]


def _lines(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a run's first samples, each with when it was made."""
    trained = list(_read(folder / "samples.jsonl"))
    if steps := [line["step"] for line in trained if isinstance(line.get("step"), int)]:
        for step in sorted({min(steps), max(steps)}):
            for line in trained:
                if line.get("step") == step:
                    yield f"after step {step:,}", line
        return
    for path in sorted(folder.glob("evaluate-*/samples.jsonl")):
        for line in _read(path):
            yield path.parent.name, line


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
                if line.get("sample", 0) == 0 and isinstance(line["traces"][0]["text"], str):
                    _ = line["prompt"], line["answer"], line["traces"][0]["correct"]
                    yield line
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                continue


def _text(prompt: Any) -> str:
    """A prompt as text; a conversation with the roles of its messages."""
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return "\n".join(f"{one.get('role')}: {one.get('content')}" for one in prompt)
    return str(prompt)


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"
