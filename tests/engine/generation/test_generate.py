"""Generation compared with plain forwards without padding, cache or batches."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redi.engine.generation.generate import (
    Completion,
    Request,
    Sampling,
    encode_prompts,
    generate,
    generate_batches,
)
from redi.engine.model.attention import register_attention

PROMPTS = ["1=", "22222222222222222=", "345=", "0", "98765432109876543210987654321="]


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world / "model")


@pytest.fixture(scope="module")
def model(world: Path) -> Any:
    """Model of the fixture `world`, with logits that depend strongly on the preceding tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "model")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return model


@torch.no_grad()
def greedy_one_by_one(model: Any, tokenizer: Any, prompt: str, most: int) -> Completion:
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < most:
        logits = model(torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] == tokenizer.eos_token_id:
            return Completion("".join(tokenizer.convert_ids_to_tokens(new[:-1])), len(new), True)
    return Completion("".join(tokenizer.convert_ids_to_tokens(new)), len(new), False)


@torch.no_grad()
def next_probabilities(model: Any, tokenizer: Any, prompt: str, temperature: float) -> np.ndarray:
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return (model(ids).logits[0, -1].double() / temperature).softmax(-1).numpy()


def first_tokens(model: Any, tokenizer: Any, prompt: str, sampling: Sampling, n: int) -> np.ndarray:
    """Frequency of each token as the first one drawn."""
    counts = np.zeros(len(tokenizer))
    for completion in generate(model, tokenizer, [prompt], sampling, samples=n, batch_size=n)[0]:
        token = completion.text or tokenizer.eos_token
        counts[tokenizer.convert_tokens_to_ids(token)] += 1
    return counts / n


def test_greedy_batches_of_ragged_prompts_equal_plain_forwards(model: Any, tokenizer: Any) -> None:
    expected = [greedy_one_by_one(model, tokenizer, prompt, 20) for prompt in PROMPTS]
    assert len({c.text for c in expected}) == len(PROMPTS)  # so that the comparison is meaningful
    for batch_size in (1, 2, 5):
        found = generate(model, tokenizer, PROMPTS, Sampling(20), batch_size=batch_size)
        assert [each for (each,) in found] == expected


def test_a_sequence_stops_at_its_end_and_reports_a_missing_end(model: Any, tokenizer: Any) -> None:
    sampling = Sampling(12, temperature=1.5)
    [completions] = generate(model, tokenizer, ["12="], sampling, samples=200)
    ended = [c for c in completions if c.ended]
    assert 20 < len(ended) < 180
    # Each token is one character here. The end counts as a token but adds no text.
    assert all(c.tokens == len(c.text) + 1 <= 12 for c in ended)
    assert all(c.tokens == len(c.text) == 12 for c in completions if not c.ended)


def test_a_sequence_also_stops_at_the_ends_of_the_generation_config(
    model: Any, tokenizer: Any
) -> None:
    free = generate(model, tokenizer, PROMPTS, Sampling(20))
    digit = tokenizer.convert_tokens_to_ids(free[0][0].text[3])
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [before, digit]
    try:
        stopped = generate(model, tokenizer, PROMPTS, Sampling(20))
    finally:
        model.generation_config.eos_token_id = before
    character = tokenizer.convert_ids_to_tokens(digit)
    for (whole,), (cut,) in zip(free, stopped, strict=True):
        assert cut.text == whole.text.split(character)[0]
        assert cut.ended == (whole.ended or character in whole.text)


def test_drawn_tokens_follow_the_softmax_at_the_temperature(model: Any, tokenizer: Any) -> None:
    p = next_probabilities(model, tokenizer, "31=", temperature=0.7)
    found = first_tokens(model, tokenizer, "31=", Sampling(1, temperature=0.7), n=6000)
    assert (abs(found - p) <= 4.5 * np.sqrt(p * (1 - p) / 6000) + 1e-9).all()
    flat = next_probabilities(model, tokenizer, "31=", temperature=1.4)
    assert not (abs(found - flat) <= 4.5 * np.sqrt(flat * (1 - flat) / 6000)).all()


def test_top_p_draws_from_the_smallest_set_that_reaches_it(model: Any, tokenizer: Any) -> None:
    p = next_probabilities(model, tokenizer, "31=", temperature=2.0)
    order = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[order]), 0.8)) + 1
    assert 2 < size < len(p) - 2
    kept = np.zeros_like(p)
    kept[order[:size]] = p[order[:size]] / p[order[:size]].sum()
    sampling = Sampling(1, temperature=2.0, top_p=0.8)
    found = first_tokens(model, tokenizer, "31=", sampling, n=6000)
    assert (abs(found - kept) <= 4.5 * np.sqrt(kept * (1 - kept) / 6000) + 1e-9).all()


def test_a_sample_depends_only_on_its_seed_prompt_and_number(model: Any, tokenizer: Any) -> None:
    sampling = Sampling(15, temperature=1.0, top_p=0.95, seed=7)
    expected = generate(model, tokenizer, PROMPTS, sampling, samples=6)
    assert len({c.text for row in expected for c in row}) > 25
    for batch_size in (1, 4, 100):
        found = generate(model, tokenizer, PROMPTS, sampling, samples=6, batch_size=batch_size)
        assert found == expected
    # among other requests, in another order
    ids = encode_prompts(tokenizer, PROMPTS)
    places = [(p, s) for p in range(len(PROMPTS)) for s in range(6)]
    random.Random(0).shuffle(places)
    requests = [Request(ids[p], s) for p, s in places[:17]]
    batches = generate_batches(model, tokenizer, requests, sampling, batch_size=5)
    found = [completion for batch in batches for completion in batch]
    assert found == [expected[p][s] for p, s in places[:17]]
    other = generate(model, tokenizer, PROMPTS, replace(sampling, seed=8), samples=6)
    same = [
        a == b for pair in zip(expected, other, strict=True) for a, b in zip(*pair, strict=True)
    ]
    assert sum(same) < 6


def test_sampling_defaults_of_the_model_change_nothing(model: Any, tokenizer: Any) -> None:
    from transformers import GenerationConfig

    sampling = Sampling(15, temperature=0.8)
    expected = generate(model, tokenizer, PROMPTS, sampling, samples=2)
    defaults = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=1,
        repetition_penalty=9.0,
        min_new_tokens=15,
        eos_token_id=defaults.eos_token_id,
    )
    try:
        assert generate(model, tokenizer, PROMPTS, sampling, samples=2) == expected
        assert model.generation_config.top_k == 1  # restored
    finally:
        model.generation_config = defaults


def test_a_model_in_training_generates_the_same_and_is_restored(
    world: Path, model: Any, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(
        world / "model", attn_implementation=register_attention("sdpa")
    )
    packed.load_state_dict(model.state_dict())
    packed.train()
    sampling = Sampling(15, temperature=0.8)
    expected = generate(model, tokenizer, PROMPTS, sampling, samples=2)
    assert generate(packed, tokenizer, PROMPTS, sampling, samples=2) == expected
    assert packed.training
    assert packed.config._attn_implementation == "redi_packed"
    assert all(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_a_model_that_sdpa_cannot_run_generates_as_plain_transformers(
    kind: str, tokenizer: Any
) -> None:
    from architecture_cases import draw_weights, tiny_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(kind)
    config.vocab_size = len(tokenizer)
    plain, packed = (
        AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.float32)
        for name in ("eager", register_attention("sdpa"))
    )
    draw_weights(plain)
    packed.load_state_dict(plain.state_dict())
    expected, found = (
        generate(one, tokenizer, PROMPTS, Sampling(15)) for one in (plain, packed.train())
    )
    assert found == expected
    assert packed.config._attn_implementation == "redi_packed"


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must"):
        Sampling(**{"max_new_tokens": 5, **wrong})


def test_a_prompt_without_tokens_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 .* has no token"):
        generate(model, tokenizer, ["1=", ""], Sampling(3))
