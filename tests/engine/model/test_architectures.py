"""Each causal architecture of transformers is trained correctly or refused."""

import pytest
from architecture_cases import PAGE, page, sweep, try_type

KNOWN = {
    "llama": "works",
    "qwen2": "works",
    "qwen3_moe": "works",
    "granite": "works",
    "gemma2": "works",
    "gpt_oss": "works",
    "axk2": "refused",
}


@pytest.mark.parametrize("kind", KNOWN)
def test_a_tiny_model_trains_as_transformers_has_it_or_is_refused(kind: str) -> None:
    seen = try_type(kind)
    assert seen.outcome == KNOWN[kind], seen.text


def test_attention_s_result_can_be_viewed_as_transformers_own() -> None:
    seen = try_type("afmoe", "full")
    assert seen.outcome == "works", seen.text


@pytest.mark.parametrize(
    ("kind", "variant", "said"),
    [
        ("bert", "", "is_decoder = false"),
        ("musicgen", "", "encoder-decoder"),
        ("cohere_compass_text", "", "KeyError: 'full_attention'"),
        ("phimoe", "full", "draws random numbers in training"),
        ("phi4_multimodal", "", "composite model"),
    ],
)
def test_a_refusal_gives_its_reason(kind: str, variant: str, said: str) -> None:
    seen = try_type(kind, variant)
    assert seen.outcome == "refused", seen.text
    assert said in seen.text


@pytest.mark.slow
def test_no_architecture_trains_wrongly_and_the_page_has_what_is_seen() -> None:
    seen = sweep()
    assert [one for one in seen if one.outcome not in ("works", "refused")] == []
    assert sum(one.outcome == "works" for one in seen if not one.variant) >= 80
    assert PAGE.read_text() == page(seen)
