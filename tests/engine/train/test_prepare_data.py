"""Traces against the positions of the model."""

from pathlib import Path

import numpy as np
import pytest
from data_cases import make_tokens
from transformers import BloomConfig, Qwen2Config

from redi.engine.errors import InputError
from redi.engine.train.prepare_data import check_positions


def test_the_first_trained_trace_beyond_the_positions_is_named_and_all_are_counted(
    tmp_path: Path,
) -> None:
    tokens = make_tokens(tmp_path / "made", [4] * 4, [6, 7, 20, 8], [1, -1, 1, -1], [0, 0, 1, 1])
    used = np.array([[0, 3], [0, 1]])  # of 10 and 12, 10 and 11 tokens
    with pytest.raises(InputError) as caught:
        check_positions(
            tokens, tokens.lengths, used, Qwen2Config(max_position_embeddings=10), "at most {}"
        )
    assert str(caught.value) == (
        "made.jsonl:2: 11 tokens are more than the model's 10 positions "
        "(2 of 3 traces are): at most 10"
    )
    check_positions(tokens, tokens.lengths, used, Qwen2Config(max_position_embeddings=12), "")
    check_positions(tokens, tokens.lengths, used, BloomConfig(), "")  # has no such limit
