"""The options of `redi evaluate`."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from redi.engine.checkers import ExactChecker
from redi.engine.config import help_formatter, plain_type, unknown_option
from redi.engine.errors import InputError

EXAMPLES = """\
examples:
  redi evaluate runs/redi --data test.jsonl                       one sample a problem, T = 0.6
  redi evaluate runs/redi --data aime24.jsonl math500.parquet --samples 16
  redi evaluate Qwen/Qwen2.5-Math-1.5B --data test.csv --temperature 0 --limit 100
  redi evaluate runs/quickstart/redi --data runs/quickstart/test.jsonl --answer_pattern '(.)$'

The same line again goes on where it was stopped; when all is done it prints the table again.
"""


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, and how."""

    model: str
    """A run folder (its export), a Hugging Face folder, or a hub name."""
    data: list[str]
    """Problems: JSONL, JSON, Parquet or CSV files (gzip too), folders of them, or hub names. A
    row needs a prompt (prompt, problem or question) and an answer (answer or solution)."""
    samples: int = 1
    """Completions of each problem."""
    temperature: float = 0.6
    """0: greedy."""
    top_p: float = 0.95
    """Tokens outside the smallest set whose probability reaches it are never drawn."""
    max_new_tokens: int | None = None
    """Tokens of a completion at most; left out: what the longest prompt leaves of the model's
    positions, 32768 at most."""
    k: list[int] | None = None
    """Which pass@k; left out: 1, 2, 4, ... up to the number of samples."""
    checker: Literal["auto", "math", "exact"] = "auto"
    """math: equal by math-verify. exact: letter by letter. auto: exact with answer_pattern, else
    math."""
    answer_pattern: str | None = None
    """For exact: a regular expression whose one group holds the answer; its last match counts.
    Left out: the last boxed answer, else what follows the last ####, else the last line."""
    template: Literal["chat", "none"] | None = None
    """chat: the tokenizer's chat template; none: the prompt as it is; left out: the run's, else
    chat."""
    system_prompt: str | None = None
    """System message of conversations that have none; left out: the run's, if MODEL is one."""
    limit: int | None = None
    """Problems of each file at most."""
    seed: int = 0
    """A sample is fixed by the seed, its prompt and its number among the prompt's samples."""
    batch_size: int = 64
    """Completions that run side by side; less needs less memory. It may differ on resume."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """auto: vLLM when it is installed and there is a CUDA device, else transformers."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on CUDA, else float32."""
    out: str | None = None
    """Folder of samples.jsonl and summary.json; left out: evaluate-DATA in the run folder, for
    other models runs/evaluate-MODEL-DATA."""
    quiet: bool = False
    """Print the table and nothing else."""

    def __post_init__(self) -> None:
        _require(self.samples >= 1, f"samples must be >= 1, got {self.samples}")
        _require(
            0 <= self.temperature < float("inf"),
            f"temperature must be finite and >= 0, got {self.temperature}",
        )
        _require(
            self.samples == 1 or self.temperature > 0,
            f"samples = {self.samples} with temperature 0 would be {self.samples} times the same; "
            "raise the temperature, or leave samples out",
        )
        _require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        for name in ("max_new_tokens", "limit", "batch_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be >= 1, got {value}")
        _require(self.seed >= 0, f"seed must be >= 0, got {self.seed}")
        for k in self.ks:
            _require(
                1 <= k <= self.samples,
                f"k must lie between 1 and the number of samples, {self.samples}; got {k}",
            )
        _require(
            self.checker != "math" or self.answer_pattern is None,
            'answer_pattern needs the checker "exact"',
        )
        try:
            ExactChecker(self.answer_pattern)
        except ValueError as error:
            raise ValueError(f"answer_pattern: {error}") from None

    @property
    def ks(self) -> list[int]:
        """Which pass@k, in order."""
        if self.k is not None:
            return sorted(set(self.k))
        return [2**power for power in range(self.samples.bit_length())]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def parse_options(argv: Sequence[str]) -> EvaluateOptions:
    """The options of a command line.

    Raises:
        InputError, ArgumentError: an unknown or missing option, or a value of a wrong type or out
            of range.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="redi evaluate",
        usage="redi evaluate MODEL --data FILE [FILE ...] [options]",
        description="Sample completions, check their answers, report pass@k.",
        epilog=EXAMPLES,
        formatter_class=help_formatter(),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="run folder, model folder or hub name")
    parser.add_argument("--data", nargs="+", metavar="FILE", required=True, help="problems")
    parser.add_argument("--k", nargs="+", type=int, metavar="K", help="which pass@k")
    parser.add_argument("--quiet", action="store_true", help="print the table and nothing else")
    parser.add_class_arguments(EvaluateOptions, skip={"model", "data", "k", "quiet"})
    try:
        return EvaluateOptions(**vars(parser.parse_args(list(argv))))
    except ArgumentError as error:
        if problem := explain_options(str(error), EvaluateOptions, "redi evaluate"):
            raise InputError(problem) from None
        raise
    except ValueError as error:
        raise InputError(str(error)) from None


def explain_options(error: str, options: type, command: str) -> str | None:
    """One clear line for what jsonargparse says in several; None for what it says well.

    Args:
        error: its message.
        options: the dataclass of the command's options.
        command: the command line's beginning, "redi evaluate".
    """
    types = {f.name: f.type for f in fields(options)}
    if problem := unknown_option(error, types, command):
        return problem
    if found := re.search(r'Parser key "(\w+)"', error):
        value = re.search(r"(?:Given value|Got value): (.*)", error)
        got = value[1].strip() if value else "another type"
        return f"{found[1]}: needs {plain_type(types[found[1]])}, got {got}"
    return None
