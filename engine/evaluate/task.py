"""What `redi evaluate` is about to do: everything that is known before a model is loaded."""

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
from redi.engine.data.problems import Problem, read_problems
from redi.engine.data.text import Encoder, TokenSettings
from redi.engine.errors import InputError
from redi.engine.evaluate.options import EvaluateOptions
from redi.engine.generation.generate import Request, Sampling, encode_prompts, longest_first
from redi.engine.model.load import find_config
from redi.engine.model.sharding import compute_dtype
from redi.engine.train.run_folder import RECIPE, model_path

MOST_NEW_TOKENS = 32768
"""Where the model's positions leave more: as many as the paper's evaluation."""

# What a resumed evaluation may change: the same samples, with batch_size and device to rounding.
MAY_CHANGE_ON_RESUME = ("batch_size", "device", "k", "out", "quiet")


@dataclass(frozen=True)
class Task:
    """An evaluation, ready to run."""

    options: EvaluateOptions
    folder: Path
    """Where samples and figures go."""
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


def prepare(options: EvaluateOptions) -> Task:
    """Read the problems, find model and tokenizer, settle what `auto` means here.

    Raises:
        InputError: options, data or model are wrong, or do not fit each other.
    """
    problems = read_problems(options.data, options.limit)
    path = model_path(options.model, "MODEL")
    config = find_config(path, "MODEL")
    template = options.template or "chat"
    encoder = Encoder(TokenSettings((), "auto", template, options.system_prompt, path))
    prompts = [encoder.prompt_text(problem.prompt, problem.where) for problem in problems]
    try:
        ids = [encoder.with_start(one) for one in encode_prompts(encoder.tokenizer, prompts)]
    except ValueError as error:
        raise InputError(f"data: {error}") from None
    max_new_tokens = _room(options.max_new_tokens, problems, ids, config)
    requests = [Request(prompt, sample) for prompt in ids for sample in range(options.samples)]
    order = longest_first(requests)
    device = _device(options.device)
    dtype = compute_dtype(options.dtype, device)
    engine = _engine(options.engine, device)
    free = {*MAY_CHANGE_ON_RESUME, "model", "data"}
    settings = {
        **{name: value for name, value in asdict(options).items() if name not in free},
        "max_new_tokens": max_new_tokens,
        "engine": engine,
        "dtype": str(dtype).removeprefix("torch."),
        # By content: the same bytes may lie elsewhere.
        "model": model_fingerprint(path, DataConfig().cache_dir) or path,
        "data": xxhash.xxh3_128_hexdigest(repr([(p.prompt, p.answer) for p in problems]).encode()),
        "tokenizer": encoder.digest(),
        "rendered probe": encoder.rendering(),
    }
    return Task(
        options=options,
        folder=Path(options.out) if options.out else _default_folder(options),
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
