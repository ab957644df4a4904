"""Benchmarks that `redi evaluate` knows by name, and presets of its options.

Their problems are not part of this package; they are read from the hub or from local files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.engine.data.sources import file_kind, find_sources
from redi.engine.errors import InputError


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark on the Hugging Face hub."""

    title: str
    """Its name in tables."""
    hub_name: str
    """As for [data] path: "owner/name:split" or "owner/name:config:split"."""
    prompt: str
    """Column of the prompt."""
    answer: str
    """Column of the correct answer: text, maybe with the answer marked in it, or a list."""
    where: str | None = None
    """Which rows belong to it; an expression as in [data] where. None: all."""


BENCHMARKS = {
    "math500": Benchmark("MATH-500", "HuggingFaceH4/MATH-500:test", "problem", "answer"),
    "aime24": Benchmark("AIME24", "HuggingFaceH4/aime_2024:train", "problem", "answer"),
    "aime25": Benchmark("AIME25", "math-ai/aime25:test", "problem", "answer"),
    "amc23": Benchmark("AMC23", "math-ai/amc23:test", "question", "answer"),
    "minerva": Benchmark("Minerva", "math-ai/minervamath:test", "question", "answer"),
    "olympiad": Benchmark(
        "Olympiad", "Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", "question", "final_answer"
    ),
    "gsm8k": Benchmark("GSM8K", "openai/gsm8k:main:test", "question", "answer"),
    "math_level5": Benchmark(
        "MATH level 5",
        "DigitalLearningGmbH/MATH-lighteval:default:test",
        "problem",
        "solution",
        where="level == 'Level 5'",
    ),
}

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2505.24850, table 2. Its limit of 32,768 new tokens is the default.
    "paper": {
        "benchmarks": ["math500", "aime24", "amc23", "minerva", "olympiad"],
        "samples": 16,
        "temperature": 0.6,
        "top_p": 0.95,
        "system_prompt": "Please reason step by step, and put your final answer within \\boxed{}.",
        "assistant_prefix": "<think>",
    },
}


def benchmark_paths(names: Sequence[str], folder: str | None) -> dict[str, str]:
    """Name of each benchmark -> its hub name, or its file or folder in `folder`.

    Raises:
        InputError: the folder lacks one of them.
    """
    if folder is None:
        return {name: BENCHMARKS[name].hub_name for name in names}
    return {name: _local_path(Path(folder), name) for name in names}


def _local_path(folder: Path, name: str) -> str:
    hub_name = BENCHMARKS[name].hub_name
    if (folder / name).is_dir():
        path = f"{folder / name}:{hub_name.rpartition(':')[2]}"
        try:
            find_sources([path])
        except InputError:  # its files are of no split
            return str(folder / name)
        return path
    found = sorted(path for path in folder.glob(f"{name}.*") if file_kind(path))
    if not found:
        raise InputError(
            f"benchmark_dir: {folder} has no folder {name} and no file {name}.jsonl (or .json, "
            f".parquet, .csv, .gz); save {hub_name} there"
        )
    return str(found[0])
