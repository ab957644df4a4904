"""Completions of a causal LM by transformers' `generate`: in batches, every sample reproducible.

Each sample has a random stream of its own, seeded by (seed, prompt, sample number), and takes one
number from it per token: the place where the cumulated probabilities pass that number is the next
token (inverse transform sampling). Other prompts, their order, the batch size and what was
generated before therefore leave a sample alone, up to rounding: a batch of another shape may
change the last bits of a logit. The same batches on the same machine give the same bits.
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
    """How tokens are drawn."""

    max_new_tokens: int
    """Tokens of a completion at most, its end included."""
    temperature: float = 0.0
    """Divides the logits; 0: the likeliest token, no randomness."""
    top_p: float = 1.0
    """Tokens outside the smallest set whose probability reaches it are never drawn."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


@dataclass(frozen=True, slots=True)
class Request:
    """One completion that is wanted."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sample: int
    """Which of the prompt's samples: with `Sampling.seed`, what its random stream hangs on."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated completion."""

    text: str
    """Without special tokens."""
    tokens: int
    """Generated tokens, the end included."""
    ended: bool
    """False: cut off at `max_new_tokens`."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_size: int = 64,
) -> list[list[Completion]]:
    """`samples` completions of each prompt, in the order of `prompts`.

    Args:
        model: a causal LM; left as it was.
        tokenizer: the model's.
        prompts: texts as the model is to see them, chat template and all.
        batch_size: sequences that run side by side.

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
    """Token ids of each prompt, without special tokens beyond those in its text.

    Raises:
        ValueError: a prompt has no token.
    """
    if not prompts:  # transformers cannot tokenize an empty batch
        return []
    # verbose: else it warns of sequences longer than the tokenizer's nominal maximum.
    encoded = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    for number, prompt in enumerate(encoded):
        if not prompt:
            raise ValueError(f"prompt {number} ({prompts[number]!r}) has no token")
    return [tuple(prompt) for prompt in encoded]


def longest_first(requests: Sequence[Request]) -> list[int]:
    """The order to generate in: little padding, and what needs most memory comes first."""
    return sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))


def generate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    sampling: Sampling,
    batch_size: int,
    *,
    in_step: bool = False,
    break_off: Callable[[], bool] = lambda: False,
) -> Iterator[list[Completion]]:
    """Yields the completions of `batch_size` requests at a time, in the order of `requests`.

    Stops a sequence at the tokenizer's EOS and at those of the model's generation config, from
    which nothing else is taken: its sampling defaults would change the result unseen.

    Args:
        in_step: every rank runs as many forwards of a batch as the slowest, because the model's
            blocks are sharded over them. Each must then have as many batches as the others.
        break_off: asked for each token; True ends the batch's sequences there. The next batch
            begins all the same, if it is asked for.
    """
    ends = end_tokens(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # the draw is made by the last logits processor
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
                stopping_criteria=StoppingCriteriaList([_BreakOff(break_off)]),
                synced_gpus=in_step,
            )
        new_tokens = output[:, ids.shape[1] :].tolist()
        yield [_completion(tokenizer, tokens, set(ends)) for tokens in new_tokens]


class _BreakOff(StoppingCriteria):
    """Ends every sequence when asked to."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.BoolTensor:
        """Whether each sequence [batch] ends here."""
        ends = torch.full(input_ids.shape[:1], self._asked(), device=input_ids.device)
        return cast(torch.BoolTensor, ends)


def vllm_batches(
    path: str,
    dtype: torch.dtype,
    requests: Sequence[Request],
    sampling: Sampling,
    batch_size: int,
) -> Iterator[list[Completion]]:
    """As `generate_batches`, by vLLM, which loads the model at `path` itself.

    vLLM draws by its own rule: its samples are not those of `generate_batches`.
    """
    from vllm import LLM, SamplingParams

    # generation_config="vllm": no sampling defaults of the model's.
    llm = LLM(path, dtype=str(dtype).removeprefix("torch."), generation_config="vllm")
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        params = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=int(_stream(sampling.seed, request).integers(2**31)),
            )
            for request in batch
        ]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in batch]
        outputs = [answer.outputs[0] for answer in llm.generate(prompts, params, use_tqdm=False)]
        yield [
            Completion(output.text, len(output.token_ids), output.finish_reason == "stop")
            for output in outputs
        ]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS, then those of the generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    listed = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(e for e in (tokenizer.eos_token_id, *listed) if e is not None))


def _left_padded(prompts: Sequence[tuple[int, ...]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask [batch, longest], int64: every prompt ends in the last column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
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
        processors.append(_OwnStreams([_stream(sampling.seed, request) for request in batch]))
    return processors


def _stream(seed: int, request: Request) -> np.random.Generator:
    prompt = xxhash.xxh3_64_intdigest(np.array(request.prompt, dtype=np.int64).tobytes())
    return np.random.default_rng([seed, request.sample, prompt])


class _OwnStreams(LogitsProcessor):
    """Draws each row's token with a number from the row's own stream.

    The drawn token keeps the only finite score, so that taking the largest, which is what
    `generate` does next, takes it.
    """

    def __init__(self, streams: Sequence[np.random.Generator]) -> None:
        self._streams = streams

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [batch, V] of the next token, in which the drawn one alone is finite."""
        numbers = [stream.random() for stream in self._streams]
        drawn = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None]
        # float64: cumulated over 150,000 tokens in fp32, the rare ones would lose their share.
        cumulated = scores.double().softmax(-1).cumsum(-1)
        # right: the first that is larger, hence never a token of probability 0.
        token = torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@contextmanager
def _generation_state(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, attention that knows padding and a cache, and no defaults of the model's.

    `generate` fills whatever `config` leaves open from the model's own generation config (a
    repetition penalty, for one); a model in training has packed attention, which has no cache.
    """
    training, defaults = model.training, model.generation_config
    attention = model.config._attn_implementation
    model.eval()
    model.generation_config = config
    if attention == PACKED_ATTENTION:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.train(training)
        model.generation_config = defaults
        if attention == PACKED_ATTENTION:
            model.set_attn_implementation(attention)
