"""Preparation of an evaluation: everything that is known before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import xxhash

from redi.engine.config.sections import DataConfig
from redi.engine.data.fingerprints import model_fingerprint
from redi.engine.data.problems import Problem, read_benchmark, read_problems
from redi.engine.data.text import Encoder, TokenSettings
from redi.engine.errors import InputError
from redi.engine.evaluate.benchmarks import BENCHMARKS, PRESETS, benchmark_paths
from redi.engine.evaluate.options import EvaluateOptions
from redi.engine.generation.generate import Request, Sampling, encode_prompts, longest_first
from redi.engine.model.adapter import model_and_adapter, tokenizer_of
from redi.engine.model.load import find_config
from redi.engine.model.sharding import compute_dtype
from redi.engine.train.run_folder import RECIPE, model_path

MOST_NEW_TOKENS = 32768
"""Upper limit of the default of max_new_tokens: the value of the paper's evaluation."""

# A resumed evaluation may change these: samples stay equal (up to rounding for batch_size, device).
MAY_CHANGE_ON_RESUME = (
    *("batch_size", "benchmark_dir", "concurrency", "device", "gpus", "judges", "k", "out"),
    *("preset", "quiet", "server", "tensor_parallel", "traces"),
)
# Without these the settings are those of evaluations from before there were any.
_LATER_SETTINGS = ("assistant_prefix", "benchmarks", "served_model", "template_variables")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, ready to run."""

    options: EvaluateOptions
    folder: Path
    """Output directory."""
    problems: list[Problem]
    prompts: list[str]
    """Rendered prompt of each problem, as the model gets it."""
    prefixes: list[str]
    """The end of each prompt that is the start of the completion; empty if there is none."""
    places: list[tuple[int, int]]
    """(problem, sample) of each completion, in the order of generation."""
    requests: list[Request]
    """The same completions, as input of the generator."""
    sampling: Sampling
    model_path: str
    adapter: str | None
    """Folder of an adapter of the model."""
    model_config: Any
    encoder: Encoder
    engine: str
    device: torch.device
    dtype: torch.dtype
    settings: dict[str, Any]
    """Everything that affects the samples or their correctness; fixed on resume."""


def prepare_evaluation(options: EvaluateOptions) -> Evaluation:
    """Read the problems, find model and tokenizer, and resolve `auto` on this machine.

    Raises:
        InputError: options, data or model are invalid, or do not match each other.
    """
    problems = _problems(options)
    path = model_path(options.model, "MODEL")
    path, adapter = model_and_adapter(path, "MODEL", DataConfig().cache_dir)
    tokenizer = tokenizer_of(path, adapter)
    config = find_config(path, "MODEL")
    template = options.template or "chat"
    variables = options.template_variables or {}
    encoder = Encoder(
        TokenSettings((), "auto", template, options.system_prompt, tokenizer, variables)
    )
    rendered = [encoder.prompt_text(problem.prompt, problem.where) for problem in problems]
    prefixes = [_prefix(text, options.assistant_prefix) for text in rendered]
    prompts = [text + prefix for text, prefix in zip(rendered, prefixes, strict=True)]
    try:
        ids = [encoder.with_start(one) for one in encode_prompts(encoder.tokenizer, prompts)]
    except ValueError as error:
        raise InputError(f"data: {error}") from None
    max_new_tokens = _room(options.max_new_tokens, problems, ids, config)
    requests = [Request(prompt, sample) for prompt in ids for sample in range(options.samples)]
    order = longest_first(requests)
    device = _device(options.device)
    dtype = compute_dtype(options.dtype, device)
    engine = "server" if options.server else _engine(options, device, adapter)
    unused = {name for name in _LATER_SETTINGS if not getattr(options, name)}
    free = {*MAY_CHANGE_ON_RESUME, "model", "data", *unused}
    settings = {
        **{name: value for name, value in asdict(options).items() if name not in free},
        "max_new_tokens": max_new_tokens,
        "engine": engine,
        "dtype": str(dtype).removeprefix("torch."),
        # Identified by content, since the files may be moved.
        "model": model_fingerprint(path, DataConfig().cache_dir) or path,
        **({"adapter": model_fingerprint(adapter, DataConfig().cache_dir)} if adapter else {}),
        "data": xxhash.xxh3_128_hexdigest(repr([(p.prompt, p.answer) for p in problems]).encode()),
        "tokenizer": encoder.fingerprint(),
        "rendered probe": encoder.rendering(),
    }
    return Evaluation(
        options=options,
        folder=Path(options.out) if options.out else _default_folder(options),
        problems=problems,
        prompts=prompts,
        prefixes=prefixes,
        places=[divmod(index, options.samples) for index in order],
        requests=[requests[index] for index in order],
        sampling=Sampling(max_new_tokens, options.temperature, options.top_p, options.seed),
        model_path=path,
        adapter=adapter,
        model_config=config,
        encoder=encoder,
        engine=engine,
        device=device,
        dtype=dtype,
        settings=settings,
    )


def _problems(options: EvaluateOptions) -> list[Problem]:
    """The problems of the data, then those of the benchmarks."""
    problems = read_problems(options.data, options.limit) if options.data else []
    for name, path in benchmark_paths(options.benchmarks, options.benchmark_dir).items():
        one = BENCHMARKS[name]
        try:
            problems += read_benchmark(name, path, one.prompt, one.answer, one.where, options.limit)
        except InputError as error:
            hint = "" if options.benchmark_dir else "; --benchmark_dir reads copies on this machine"
            raise InputError(f"{error}{hint}") from None
    return problems


def _prefix(rendered: str, prefix: str | None) -> str:
    """The text to add to a rendered prompt: the prefix, unless the template has written it."""
    if prefix is None or rendered.rstrip().endswith(prefix.strip()):
        return ""
    return prefix


def _default_folder(options: EvaluateOptions) -> Path:
    names = [Path(path).name.removesuffix(".gz") for path in options.data]
    names = [name.partition(".")[0].replace(":", "-") for name in names]
    preset = options.preset
    if preset and not names and options.benchmarks == PRESETS[preset]["benchmarks"]:
        names = [preset]
    else:
        names += options.benchmarks
    data = "+".join(names)
    model = Path(options.model)
    if (model / RECIPE).is_file():
        return model / f"evaluate-{data}"
    if model.name.startswith("export") and (model.parent / RECIPE).is_file():
        return model.parent / f"evaluate{model.name.removeprefix('export')}-{data}"
    return Path("runs") / f"evaluate-{model.resolve().name}-{data}"


def _room(
    wanted: int | None, problems: Sequence[Problem], ids: Sequence[tuple[int, ...]], config: Any
) -> int:
    """Maximum new tokens: as requested, else the context less the longest prompt."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    length, where = len(ids[longest]), problems[longest].where
    if (most := max(map(max, ids))) >= text_config.vocab_size:
        raise InputError(
            f"MODEL: the tokenizer yields token {most}, but the model's vocabulary has "
            f"{text_config.vocab_size} tokens"
        )
    if positions is None:
        return wanted or MOST_NEW_TOKENS
    if length >= positions:
        raise InputError(
            f"{where}: the prompt has {length} tokens, but the model's context is {positions}"
        )
    if wanted is not None and length + wanted > positions:
        raise InputError(
            f"max_new_tokens: {where} has a prompt of {length} tokens and the model a context of "
            f"{positions}, which leaves {positions - length}, not {wanted}"
        )
    return wanted or min(MOST_NEW_TOKENS, positions - length)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch is built without CUDA
        problem = str(error).strip().split("\n")[0]
        raise InputError(f"device {name!r} is not available: {problem}") from None
    return device


def _engine(options: EvaluateOptions, device: torch.device, adapter: str | None) -> str:
    installed = find_spec("vllm") is not None
    engine = options.engine
    if engine == "vllm" and adapter is not None:
        raise InputError(
            "engine: vllm needs a whole model: train with adapter.merge = true, or use "
            '"transformers"'
        )
    if engine == "vllm" and not installed:
        raise InputError('engine: vllm is not installed; install it, or use "transformers"')
    if engine == "auto":
        usable = installed and device.type == "cuda" and adapter is None
        engine = "vllm" if usable else "transformers"
    if engine == "transformers" and options.tensor_parallel > 1:
        raise InputError("tensor_parallel needs vLLM; with transformers each GPU holds the model")
    if options.gpus > 1 and device.index is not None:
        raise InputError(f"device: {device} is one GPU, but gpus = {options.gpus}; use cuda")
    if device.type == "cuda" and options.gpus > torch.cuda.device_count():
        raise InputError(f"gpus: {options.gpus} wanted, {torch.cuda.device_count()} available")
    return engine
