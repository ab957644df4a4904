"""Batched, reproducible completions of a causal LM by transformers' `generate`.

Each sample has a separate random stream, seeded by (seed, prompt, sample number), and takes one
number from it per token. The next token is the first whose cumulative probability exceeds that
number (inverse transform sampling). So a sample does not depend on other prompts, their order, the
batch size or earlier generation, except for rounding: a different batch shape may change the last
bits of a logit. The same batches on the same machine give identical bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import xxhash
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from redi.engine.model.attention import NAME as PACKED_ATTENTION


@dataclass(frozen=True)
class Sampling:
    """Sampling settings."""

    max_new_tokens: int
    """Maximum tokens of a completion, including its end."""
    temperature: float = 0.0
    """Divisor of the logits; 0: greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: draw from the smallest set of tokens with at least this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


@dataclass(frozen=True, slots=True)
class Request:
    """Request for one completion."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sample: int
    """Sample number within the prompt; part of the seed of the random stream."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated completion."""

    text: str
    """Text without special tokens."""
    tokens: int
    """Number of generated tokens, including the end."""
    ended: bool
    """False if truncated at `max_new_tokens`."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_size: int = 64,
) -> list[list[Completion]]:
    """Generate `samples` completions of each prompt, in the order of `prompts`.

    Args:
        model: a causal LM; its state is restored afterwards.
        tokenizer: the model's tokenizer.
        prompts: rendered texts, with the chat template applied.
        sampling: sampling settings.
        samples: completions per prompt.
        batch_size: sequences generated together.

    Raises:
        ValueError: a prompt has no token.
    """
    ids = encode_prompts(tokenizer, prompts)
    requests = [Request(prompt, sample) for prompt in ids for sample in range(samples)]
    order = longest_first(requests)
    done: list[Completion | None] = [None] * len(requests)
    places = iter(order)
    sorted_requests = [requests[place] for place in order]
    for batch in generate_batches(model, tokenizer, sorted_requests, sampling, batch_size):
        for completion in batch:
            done[next(places)] = completion
    completions = [completion for completion in done if completion is not None]
    return [completions[start : start + samples] for start in range(0, len(requests), samples)]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[tuple[int, ...]]:
    """Token ids of each prompt; no special tokens are added to its text.

    Raises:
        ValueError: a prompt has no token.
    """
    if not prompts:  # transformers cannot tokenize an empty batch
        return []
    # verbose=False suppresses the warning about sequences beyond the tokenizer's nominal maximum.
    encoded = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    for number, prompt in enumerate(encoded):
        if not prompt:
            raise ValueError(f"prompt {number} ({prompts[number]!r}) has no token")
    return [tuple(prompt) for prompt in encoded]


def longest_first(requests: Sequence[Request]) -> list[int]:
    """Indices by falling prompt length: little padding, and the largest batch runs first."""
    return sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))


def generate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    sampling: Sampling,
    batch_size: int,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[list[Completion]]:
    """Yield the completions of `batch_size` requests at a time, in the order of `requests`.

    A sequence ends at the tokenizer's EOS and at the end tokens of the model's generation config.
    Nothing else is taken from that config: its sampling defaults would silently change the result.

    Args:
        model: a causal LM; its state is restored after each batch.
        tokenizer: the model's tokenizer.
        requests: completions to generate.
        sampling: sampling settings.
        batch_size: sequences generated together.
        should_stop: called for each token; True ends the sequences of the current batch. Later
            batches still start if the caller continues to iterate.
    """
    ends = end_tokens(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # the last logits processor samples
        eos_token_id=ends,
        pad_token_id=pad,
    )
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        ids, mask = _left_padded([request.prompt for request in batch], pad)
        with _generation_state(model, config):
            output = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=_processors(batch, sampling),
                stopping_criteria=StoppingCriteriaList([_StopIf(should_stop)]),
                synced_gpus=False,  # by default ranks with FSDP wait for each other at each token
            )
        new_tokens = output[:, ids.shape[1] :].tolist()
        yield [_completion(tokenizer, tokens, set(ends)) for tokens in new_tokens]


class _StopIf(StoppingCriteria):
    """Ends every sequence once a condition is true."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.BoolTensor:
        """Return for each sequence [batch] whether it ends here."""
        ends = torch.full(input_ids.shape[:1], self._condition(), device=input_ids.device)
        return cast(torch.BoolTensor, ends)


def end_tokens(model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion: the tokenizer's EOS, then the generation config's.

    Args:
        model: a model, or its directory or hub name.
        tokenizer: its tokenizer.
    """
    generation = _generation_config(model) if isinstance(model, str) else model.generation_config
    configured = generation.eos_token_id if generation else None
    listed = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(e for e in (tokenizer.eos_token_id, *listed) if e is not None))


def _generation_config(path: str) -> GenerationConfig:
    """The one that a model in a directory or on the hub has when it is loaded."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # it has no generation_config.json
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path))


def _left_padded(prompts: Sequence[tuple[int, ...]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, int64 [batch, longest], with each prompt's end in the last column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :] = torch.tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    return ids, mask


def _completion(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: set[int]
) -> Completion:
    length = next((place for place, token in enumerate(tokens) if token in ends), None)
    kept = tokens[:length]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ended = length is not None
    return Completion(text, len(kept) + ended, ended)


def _processors(batch: Sequence[Request], sampling: Sampling) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(float(sampling.top_p)))
        processors.append(
            _SampleFromStreams([_stream(sampling.seed, request) for request in batch])
        )
    return processors


def request_seed(seed: int, request: Request) -> int:
    """The seed of a request for engines with their own sampling, below 2^31."""
    return int(_stream(seed, request).integers(2**31))


def _stream(seed: int, request: Request) -> np.random.Generator:
    prompt = xxhash.xxh3_64_intdigest(np.array(request.prompt, dtype=np.int64).tobytes())
    return np.random.default_rng([seed, request.sample, prompt])


class _SampleFromStreams(LogitsProcessor):
    """Draws the next token of each sequence with a number from that sequence's random stream.

    The drawn token gets the only finite score, so the argmax that `generate` takes next selects it.
    """

    def __init__(self, streams: Sequence[np.random.Generator]) -> None:
        self._streams = streams

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [batch, V] in which only the drawn token is finite."""
        numbers = [stream.random() for stream in self._streams]
        drawn = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None]
        # float64: an fp32 cumsum over 150,000 tokens would lose the probability of rare ones.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        # right=True: the first larger entry, so a token of probability 0 is never drawn.
        token = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@contextmanager
def _generation_state(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Set evaluation mode, an attention with padding and cache, and `config`; restore afterwards.

    `generate` fills unset fields of `config` from the model's generation config (such as a
    repetition penalty), so that is replaced. A model in training has packed attention, which has
    no cache.
    """
    training, defaults = model.training, model.generation_config
    attention = model.config._attn_implementation
    model.eval()
    model.generation_config = config
    if attention == PACKED_ATTENTION:
        # SDPA has no soft cap and no sinks.
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.train(training)
        model.generation_config = defaults
        if attention == PACKED_ATTENTION:
            model.set_attn_implementation(attention)
