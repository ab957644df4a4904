"""Mismatched rows: completions after prompts of other problems."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from data_cases import make_tokens, save_tokenizer, settings, write_rows

from redi.engine.console import Console
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.mismatched import MismatchedTraces, mismatch
from redi.engine.data.packing import build_batch
from redi.engine.data.schedule import Examples, select
from redi.engine.data.tokens import tokenize
from redi.engine.errors import InputError

# Three problems, not in order; the last trace is too long and left out.
GROUPS = [0, 1, 0, 2, 0, 1, 2]
PROMPTS = [3, 6, 3, 2, 3, 6, 2]
COMPLETIONS = [4, 1, 9, 2, 12, 3, 40]
SIGNS = [1, -1, 1, -1, -1, 1, 1]


def traces_of(folder: Path, groups: list[int]) -> tuple[TokenizedTraces, Examples]:
    token_weights = [[0.0, 2.0, 1.0, 1.0], *[None] * 6]
    tokens = make_tokens(folder, PROMPTS, COMPLETIONS, SIGNS, groups, None, token_weights)
    examples = select(
        tokens, objective_needs="traces", max_tokens=16, overlong="drop", row_tokens=None
    )
    return tokens, examples


def test_each_completion_follows_the_prompt_of_another_problem(tmp_path: Path) -> None:
    tokens, examples = traces_of(tmp_path / "set", GROUPS)
    found: MismatchedTraces = pickle.loads(pickle.dumps(mismatch(tokens, examples)))
    owner = {tuple(tokens.ids(i)[: PROMPTS[i]].tolist()): i for i in range(6)}
    sources = []
    for trace in range(6):
        row = found.ids(trace).tolist()
        source = owner[tuple(row[: found.prompt_lengths[trace]])]
        completion = tokens.ids(trace)[PROMPTS[trace] :].tolist()
        whole = tokens.ids(source)[: PROMPTS[source]].tolist() + completion
        assert GROUPS[source] != GROUPS[trace]
        assert row == whole[:15]  # the longest trace in use has 15 tokens
        assert len(row) == found.lengths[trace]
        sources.append(source)
    assert sorted(sources) == list(range(6))
    assert max(found.lengths[:6]) == 15
    assert found.key != tokens.key


def test_equal_prompts_are_one_problem_whatever_their_ids(tmp_path: Path) -> None:
    rows = [
        {"id": number, "prompt": f"Problem {number // 4}", "completion": f"{number}", "label": True}
        for number in range(12)
    ]
    path, tokenizer = write_rows(tmp_path / "x.jsonl", rows), save_tokenizer(tmp_path / "model")
    quiet = Console(active=False)
    tokens = tokenize(settings(path, tokenizer), tmp_path / "cache", processes=1, console=quiet)
    assert len(set(tokens.groups)) == 12
    examples = select(
        tokens, objective_needs="traces", max_tokens=64, overlong="drop", row_tokens=None
    )
    found = mismatch(tokens, examples)
    for trace in range(12):
        prompt = found.ids(trace)[: found.prompt_lengths[trace]].tolist()
        assert prompt != tokens.ids(trace)[: tokens.prompt_lengths[trace]].tolist()


def test_a_row_has_the_sign_and_the_token_weights_of_its_completion(tmp_path: Path) -> None:
    tokens, examples = traces_of(tmp_path / "set", GROUPS)
    found = mismatch(tokens, examples)
    chosen = np.array([0, 5])
    pack = build_batch(found, chosen, found.lengths[chosen])
    first = int(found.prompt_lengths[0])
    assert pack.signs.tolist() == [1, 1]
    assert pack.num_targets.tolist() == [3, 3]
    assert pack.token_weights is not None
    assert pack.token_weights[first - 1 : first + 3].tolist() == [0.0, 2.0, 1.0, 1.0]
    assert pack.targets[first : first + 3].tolist() == tokens.ids(0)[4:].tolist()


def test_a_problem_with_most_traces_is_named(tmp_path: Path) -> None:
    tokens, examples = traces_of(tmp_path / "set", [0, 0, 0, 2, 0, 1, 2])
    with pytest.raises(InputError, match=r"made.jsonl:1: its problem has 4 of the 6 traces") as one:
        mismatch(tokens, examples)
    assert "\n" not in str(one.value)
