"""Options of `redi evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from redi.engine.config.options import command_parser, parse_options, parse_values
from redi.engine.config.patterns import answer_pattern
from redi.engine.config.ranges import AT_LEAST_1, NOT_NEGATIVE, Range, check_ranges, ranged
from redi.engine.data.write_rows import check_target
from redi.engine.evaluate.benchmarks import BENCHMARKS, PRESETS

EXAMPLES = """\
examples:
  redi evaluate runs/redi --data test.jsonl                       one sample per problem, T = 0.6
  redi evaluate runs/redi --data aime24.jsonl math500.parquet --samples 16
  redi evaluate Qwen/Qwen2.5-Math-1.5B --data test.csv --temperature 0 --limit 100
  redi evaluate runs/sft --data train.jsonl --samples 8 --traces samples.jsonl   to train on
  redi evaluate runs/redi --preset paper                          the paper's benchmarks, settings
  redi evaluate runs/redi --preset paper --benchmarks aime25 --samples 64
  redi evaluate runs/quickstart/redi --data runs/quickstart/test.jsonl --answer_pattern '(.)$'

The same command resumes after an interruption; once finished, it prints the table again.
"""


@dataclass(frozen=True)
class EvaluateOptions:
    """Settings of an evaluation."""

    model: str
    """A run directory (its export), a Hugging Face directory, or a hub name."""
    data: list[str] = field(default_factory=list)
    """Problems: JSONL, JSON, Parquet or CSV files (also gzip), directories of them, or hub names.
    A row needs a prompt (prompt, problem or question) and an answer (answer, final_answer or
    solution)."""
    benchmarks: list[str] = field(default_factory=list)
    """Names of benchmarks, in `redi.engine.evaluate.benchmarks`."""
    benchmark_dir: str | None = None
    """Folder of the benchmarks, for machines without the hub: NAME.jsonl (or .json, .parquet, .csv,
    .gz) or a folder NAME each."""
    preset: Literal["paper"] | None = None
    """paper: defaults for the evaluation of arXiv 2505.24850. --data or --benchmarks replace its
    benchmarks."""
    samples: int = ranged(1, AT_LEAST_1)
    """Completions per problem."""
    temperature: float = ranged(0.6, NOT_NEGATIVE)
    """Sampling temperature; 0: greedy decoding."""
    top_p: float = ranged(0.95, Range(0, 1, open_low=True))
    """Nucleus sampling: draw from the smallest set of tokens with at least this probability."""
    max_new_tokens: int | None = ranged(None, AT_LEAST_1)
    """Maximum tokens of a completion. If omitted: the model's context less the longest prompt, at
    most 32768."""
    k: list[int] | None = None
    """Which pass@k to report. If omitted: 1, 2, 4, ... up to the number of samples."""
    checker: Literal["auto", "math", "exact"] = "auto"
    """math: equal according to math-verify. exact: equal as text. auto: exact with answer_pattern,
    else math."""
    answer_pattern: str | None = None
    """For exact: a regular expression with one group, the answer; its last match counts. If
    omitted: the last boxed answer, else the text after the last ####, else the last line."""
    template: Literal["chat", "none"] | None = None
    """chat: the tokenizer's chat template. none: the unchanged prompt. If omitted: the run's, else
    chat."""
    system_prompt: str | None = None
    """System message of conversations without one. If omitted: the run's, if MODEL is a run."""
    assistant_prefix: str | None = None
    """Start of each completion, such as <think>, unless the template writes it."""
    template_variables: dict[str, bool | int | float | str] | None = None
    """Variables of the chat template. If omitted: the run's, if MODEL is a run."""
    limit: int | None = ranged(None, AT_LEAST_1)
    """Maximum problems per file."""
    seed: int = ranged(0, NOT_NEGATIVE)
    """Random seed. A sample depends only on the seed, its prompt and its sample number."""
    batch_size: int = ranged(64, AT_LEAST_1)
    """Completions that transformers generates together; lower values need less memory. May change
    on resume."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """auto: vLLM if it is installed and a CUDA device is available, else transformers."""
    gpus: int = ranged(1, AT_LEAST_1)
    """GPUs: a worker process for each `tensor_parallel` of them. Without CUDA, worker processes."""
    tensor_parallel: int = ranged(1, AT_LEAST_1)
    """GPUs that share a model; needs vLLM."""
    server: str | None = None
    """URL of a server with OpenAI's API that generates, such as http://localhost:8000/v1; MODEL
    then gives the prompts and their tokens."""
    served_model: str | None = None
    """The server's name of the model, if it serves several."""
    concurrency: int = ranged(256, AT_LEAST_1)
    """Requests that the server gets at the same time."""
    judges: int | None = ranged(None, AT_LEAST_1)
    """Processes that check answers. If omitted: half the CPUs, at most 8."""
    device: str = "auto"
    """auto: cuda if available, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on CUDA, else float32."""
    out: str | None = None
    """Directory of samples.jsonl and summary.json. If omitted: evaluate-DATA in the run directory,
    for other models runs/evaluate-MODEL-DATA."""
    traces: str | None = None
    """File (.jsonl or .parquet) for all samples as rows of the shape traces, one per problem."""
    quiet: bool = False
    """Print only the table."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.data and not self.benchmarks:
            raise ValueError("missing: --data FILE, --benchmarks NAME or --preset paper")
        for name in self.benchmarks:
            if name not in BENCHMARKS:
                known = ", ".join(BENCHMARKS)
                raise ValueError(f"benchmarks: unknown benchmark {name!r}; available: {known}")
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise ValueError("benchmarks: a benchmark is named twice; name it once")
        if self.benchmark_dir is not None and not self.benchmarks:
            raise ValueError("benchmark_dir is not used without benchmarks; remove it")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples = {self.samples} with temperature 0 would give {self.samples} equal "
                "completions; raise temperature, or remove samples"
            )
        if self.gpus % self.tensor_parallel:
            raise ValueError(
                f"gpus = {self.gpus} is not a multiple of tensor_parallel = {self.tensor_parallel}"
            )
        if self.server is not None and (self.gpus > 1 or self.engine != "auto"):
            raise ValueError("server generates elsewhere; remove gpus, tensor_parallel and engine")
        if self.server is None and self.served_model is not None:
            raise ValueError("served_model is not used without server; remove it")
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise ValueError(
                    f"k must be between 1 and the number of samples, {self.samples}; got {k}"
                )
        if self.checker == "math" and self.answer_pattern is not None:
            raise ValueError('answer_pattern needs the checker "exact"; remove one')
        if self.answer_pattern is not None:
            try:
                answer_pattern(self.answer_pattern)
            except ValueError as error:
                raise ValueError(f"answer_pattern: {error}") from None
        if self.traces is not None:
            check_target(self.traces, "traces")

    @property
    def ks(self) -> list[int]:
        """Sorted k of the reported pass@k."""
        if self.k is not None:
            return sorted(set(self.k))
        return [2**power for power in range(self.samples.bit_length())]


def parse_evaluate(argv: Sequence[str]) -> EvaluateOptions:
    """Parse the arguments that follow `redi evaluate`.

    Raises:
        InputError, ArgumentError: an option is unknown, missing or has an invalid value.
    """
    parser = command_parser(
        "redi evaluate",
        "Sample completions, check their answers, report pass@k.",
        EXAMPLES,
        "redi evaluate MODEL (--data FILE [...] | --benchmarks NAME [...] | --preset paper) "
        "[options]",
    )
    parser.add_argument("model", metavar="MODEL", help="run directory, model directory or hub name")
    parser.add_argument("--data", nargs="+", metavar="FILE", default=[], help="problems")
    parser.add_argument(
        "--benchmarks", nargs="+", metavar="NAME", default=[], help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--k", nargs="+", type=int, metavar="K", help="which pass@k to report")
    parser.add_argument("--quiet", action="store_true", help="print only the table")
    parser.add_class_arguments(EvaluateOptions, skip={"model", "data", "benchmarks", "k", "quiet"})
    values = parse_values(parser, argv, EvaluateOptions)
    if preset := PRESETS.get(values["preset"] or ""):
        replaced = {"benchmarks"} if values["data"] else set()
        parser.set_defaults({name: v for name, v in preset.items() if name not in replaced})
    return parse_options(parser, argv, EvaluateOptions)
