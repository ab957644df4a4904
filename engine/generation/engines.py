"""Engines that complete a list of requests: transformers or vLLM, in this process.

Each yields completions as they finish, with the caller's number of their request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from redi.engine.data.text import load_tokenizer
from redi.engine.errors import RunError
from redi.engine.generation.generate import (
    Completion,
    Request,
    Sampling,
    end_tokens,
    generate_batches,
    request_seed,
)
from redi.engine.model.adapter import load_adapter, tokenizer_of
from redi.engine.model.load import find_config, load_weights

Item = tuple[int, Request]
"""A request with the caller's number."""
Finished = tuple[int, Completion]
"""The completion of the request with that number."""
Generate = Callable[[Sequence[Item]], Iterator[list[Finished]]]


@dataclass(frozen=True)
class EngineSettings:
    """An engine and its model."""

    kind: str
    """"transformers" or "vllm"."""
    model_path: str
    dtype: torch.dtype
    device: str
    """Of transformers; vLLM runs on CUDA."""
    sampling: Sampling
    context: int
    """Of vLLM: most tokens of a prompt with its completion. It reserves memory for so many."""
    batch_size: int
    """Of transformers: sequences generated together. vLLM takes all requests at once."""
    tensor_parallel: int = 1
    """Of vLLM: GPUs that share the model."""
    adapter: str | None = None
    """Of transformers: folder of an adapter of the model."""


def open_engine(settings: EngineSettings) -> Generate:
    """Load the model.

    Raises:
        InputError: model or tokenizer cannot be loaded.
        RunError: there is not enough memory, now or later.
    """
    return (_open_vllm if settings.kind == "vllm" else _open_transformers)(settings)


def _open_transformers(settings: EngineSettings) -> Generate:
    tokenizer = load_tokenizer(tokenizer_of(settings.model_path, settings.adapter))
    config = find_config(settings.model_path, "MODEL")
    with _memory_errors(settings.batch_size):
        model = load_weights(settings.model_path, "MODEL", config, settings.dtype)
        if settings.adapter is not None:
            load_adapter(model, settings.adapter)
        model = model.to(settings.device)

    def generate(items: Sequence[Item]) -> Iterator[list[Finished]]:
        numbers = iter([number for number, _ in items])
        requests = [request for _, request in items]
        batches = generate_batches(
            model, tokenizer, requests, settings.sampling, settings.batch_size
        )
        with _memory_errors(settings.batch_size):
            for batch in batches:
                yield [(next(numbers), completion) for completion in batch]

    return generate


@contextmanager
def _memory_errors(batch_size: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise RunError(
            f"out of memory with batch_size {batch_size}; the same command with a smaller "
            "batch_size resumes"
        ) from None


def _open_vllm(settings: EngineSettings) -> Generate:
    """vLLM's engine, which has its own sampling: its samples differ from those of transformers."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=settings.model_path,
            dtype=str(settings.dtype).removeprefix("torch."),
            tensor_parallel_size=settings.tensor_parallel,
            max_model_len=settings.context,
            generation_config="vllm",  # ignore the model's sampling defaults
        )
    )
    ends = end_tokens(settings.model_path, load_tokenizer(settings.model_path))
    sampling = settings.sampling

    def generate(items: Sequence[Item]) -> Iterator[list[Finished]]:
        for number, request in items:
            params = SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=request_seed(sampling.seed, request),
                stop_token_ids=ends,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(number), {"prompt_token_ids": list(request.prompt)}, params)
        while engine.has_unfinished_requests():
            found = [(int(one.request_id), one.outputs[0]) for one in engine.step() if one.finished]
            if found:
                yield [
                    (number, Completion(one.text, len(one.token_ids), one.finish_reason == "stop"))
                    for number, one in found
                ]

    return generate
