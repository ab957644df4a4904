"""The options of `redi evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from redi.engine.config.options import command_parser, parse_options
from redi.engine.config.patterns import answer_pattern
from redi.engine.config.ranges import AT_LEAST_1, NOT_NEGATIVE, Range, check_ranges, ranged

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
    samples: int = ranged(1, AT_LEAST_1)
    """Completions of each problem."""
    temperature: float = ranged(0.6, NOT_NEGATIVE)
    """0: greedy."""
    top_p: float = ranged(0.95, Range(0, 1, open_low=True))
    """Tokens outside the smallest set whose probability reaches it are never drawn."""
    max_new_tokens: int | None = ranged(None, AT_LEAST_1)
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
    limit: int | None = ranged(None, AT_LEAST_1)
    """Problems of each file at most."""
    seed: int = ranged(0, NOT_NEGATIVE)
    """A sample is fixed by the seed, its prompt and its number among the prompt's samples."""
    batch_size: int = ranged(64, AT_LEAST_1)
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
        check_ranges(self)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples = {self.samples} with temperature 0 would be {self.samples} times the "
                "same; raise the temperature, or leave samples out"
            )
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise ValueError(
                    f"k must lie between 1 and the number of samples, {self.samples}; got {k}"
                )
        if self.checker == "math" and self.answer_pattern is not None:
            raise ValueError('answer_pattern needs the checker "exact"')
        if self.answer_pattern is not None:
            try:
                answer_pattern(self.answer_pattern)
            except ValueError as error:
                raise ValueError(f"answer_pattern: {error}") from None

    @property
    def ks(self) -> list[int]:
        """Which pass@k, in order."""
        if self.k is not None:
            return sorted(set(self.k))
        return [2**power for power in range(self.samples.bit_length())]


def parse_evaluate(argv: Sequence[str]) -> EvaluateOptions:
    """The options of a command line.

    Raises InputError or ArgumentError: an unknown or missing option, or a wrong value.
    """
    parser = command_parser(
        "redi evaluate",
        "Sample completions, check their answers, report pass@k.",
        EXAMPLES,
        "redi evaluate MODEL --data FILE [FILE ...] [options]",
    )
    parser.add_argument("model", metavar="MODEL", help="run folder, model folder or hub name")
    parser.add_argument("--data", nargs="+", metavar="FILE", required=True, help="problems")
    parser.add_argument("--k", nargs="+", type=int, metavar="K", help="which pass@k")
    parser.add_argument("--quiet", action="store_true", help="print the table and nothing else")
    parser.add_class_arguments(EvaluateOptions, skip={"model", "data", "k", "quiet"})
    return parse_options(parser, argv, EvaluateOptions)
