"""Whatever the arguments, an op returns or raises TypeError or ValueError, the reference too."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redi.kernels import (
    filtered_redi_loss,
    linear_logprobs,
    redi_loss,
    redi_value_and_grad,
    segment_sum,
    sequence_loss,
    signed_cross_entropy,
    topk_divergence,
    vocab_parallel_cross_entropy,
    vocab_parallel_logprobs,
    vocab_parallel_redi_loss,
)

TOKENS, VOCAB = 6, 5
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(TOKENS, 4, generator=GENERATOR)
WEIGHT = torch.randn(VOCAB, 4, generator=GENERATOR)
TARGETS = torch.tensor([1, 4, -100, 0, 2, -100])
BOUNDS, SIGNS = torch.tensor([0, 3, 6]), torch.tensor([1, -1])
INDEX = torch.tensor([0, 1, 3, 4])
OPERANDS: dict[str, Any] = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS}
LOGITS: dict[str, Any] = {"logit_scale": 1.0, "softcap": None, "ignore_index": -100}
SCHEDULE: dict[str, Any] = {"valid_index": INDEX, "chunk_tokens": None}
PAIRS: dict[str, Any] = {"cu_seqlens": BOUNDS, "signs": SIGNS, "alpha": 0.5, "num_pairs": 2}
STATISTICS: dict[str, Any] = {"entropy": False, "log_sum_exp": False}
COMMON = OPERANDS | LOGITS | SCHEDULE
CROSS_ENTROPY: dict[str, Any] = (
    COMMON
    | STATISTICS
    | {
        "token_weights": torch.ones(TOKENS),
        "coefficient": "weight",
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "entropy_weights": None,
        "num_with_grad": None,
    }
)
VALID: dict[Callable[..., Any], dict[str, Any]] = {
    redi_loss: COMMON | PAIRS | {"num_with_grad": None},
    redi_value_and_grad: COMMON | PAIRS | {"num_with_grad": 4, "grad_scale": 1.0, "dweight": None},
    signed_cross_entropy: CROSS_ENTROPY,
    sequence_loss: COMMON
    | {
        "cu_seqlens": BOUNDS,
        "linear_weights": torch.ones(2),
        "exponential_weights": torch.zeros(2),
        "temperature": 1.0,
        "denominators": None,
        "exponential_lengths": None,
    },
    linear_logprobs: COMMON | STATISTICS | {"keep": "auto"},
    segment_sum: {"values": torch.ones(TOKENS), "cu_seqlens": BOUNDS},
    topk_divergence: COMMON
    | {
        "teacher_ids": torch.tensor([[0, 1], [2, -1], [-1, -1], [4, 3], [1, 0], [3, 2]]),
        "teacher_logps": torch.tensor(
            [[-1.0, -2], [-1, -math.inf], [-math.inf] * 2, [-1, -1], [-3, -0.5], [-2, -2]]
        ),
        "token_weights": torch.ones(TOKENS),
        "target_weights": None,
        "direction": "forward",
        "temperature": 1.0,
        "tail": "bucket",
        "skew": 0.0,
        "num_with_grad": None,
    },
    filtered_redi_loss: OPERANDS
    | {"hidden": HIDDEN.bfloat16(), "weight": WEIGHT.bfloat16()}
    | PAIRS
    | SCHEDULE
    | {"epsilon": 0.01, "sequence_weights": None, "ignore_index": -100, "num_with_grad": None},
    vocab_parallel_cross_entropy: CROSS_ENTROPY,
    vocab_parallel_redi_loss: COMMON | PAIRS | {"num_with_grad": None},
    vocab_parallel_logprobs: COMMON,
}
IN_A_GROUP = (vocab_parallel_cross_entropy, vocab_parallel_redi_loss, vocab_parallel_logprobs)
NUMBERS = [0, 1, -1, 2, 1.5, -0.5, 1e30, 10**30, -(10**400), math.nan, math.inf, True, False]
OTHERS = [None, "x", "auto", "torch", b"1", 1j, [], [1], (0.5,), {}, object, slice(1)]
TENSORS = [
    torch.tensor(1.5),
    torch.tensor(2),
    torch.tensor(math.nan),
    torch.tensor(True),
    torch.tensor(1j),
    torch.empty(0),
    torch.empty(0, dtype=torch.int64),
    torch.empty(0, 4),
    torch.ones(2),
    torch.ones(2, dtype=torch.int64),
    torch.ones(3, dtype=torch.int64),
    torch.ones(TOKENS),
    torch.full((TOKENS,), math.nan),
    torch.zeros(TOKENS, dtype=torch.int64),
    torch.full((TOKENS,), VOCAB),
    torch.tensor([0, 4, 2]),
    torch.tensor([0, 4, 2, 6]),
    torch.tensor([2, 6]),
    torch.tensor([0, 2**60]),
    torch.tensor([1, 2]),
    torch.tensor([3, 0, 1, 3]),
    torch.tensor([[0, 1], [2, VOCAB], [-1, -1], [4, 3], [1, 0], [3, 2]]),
    torch.zeros(TOKENS, 2, dtype=torch.int32),
    torch.full((TOKENS, 2), -1.0),
    torch.full((TOKENS, 2), -math.inf),
    torch.tensor([0, 1, 2, 3], dtype=torch.int8),
    torch.ones(TOKENS, 4, dtype=torch.bfloat16),
    torch.ones(2, 3, 4),
    torch.ones(VOCAB, 4, dtype=torch.float64),
    torch.ones(VOCAB, 3),
    torch.ones(TOKENS, 4, device="meta"),
    torch.ones(TOKENS, requires_grad=True),
    torch.eye(4).to_sparse(),
]
ANYTHING = st.sampled_from(NUMBERS) | st.sampled_from(OTHERS) | st.sampled_from(TENSORS)
CHANGES = st.lists(st.tuples(st.integers(0, 20), ANYTHING), min_size=1, max_size=2)


def outcome(op: Callable[..., Any], arguments: dict[str, Any], backend: str) -> str | Any:
    """The name of the error that a call raises, or what it returns."""
    copies = {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    try:
        return op(**copies, backend=backend)
    except (TypeError, ValueError) as error:
        return type(error).__name__


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def valid(op: Callable[..., Any]) -> dict[str, Any]:
    return VALID[op] | ({"group": dist.group.WORLD} if op in IN_A_GROUP else {})


def backends(op: Callable[..., Any]) -> tuple[str, ...]:
    has_reference = op is not filtered_redi_loss and op not in IN_A_GROUP
    return ("torch", "reference") if has_reference else ("torch",)


def check_call(op: Callable[..., Any], changes: list[tuple[int, Any]]) -> None:
    arguments = valid(op)
    names = list(arguments)
    for place, value in changes:
        arguments[names[place % len(names)]] = value
    outcomes = [outcome(op, arguments, backend) for backend in backends(op)]
    assert len({found if isinstance(found, str) else "returned" for found in outcomes}) == 1


OPS = st.sampled_from(list(VALID))


@settings(max_examples=20)
@given(op=OPS, changes=CHANGES)
def test_a_wrong_argument_is_a_type_error_or_a_value_error(op: Any, changes: Any) -> None:
    check_call(op, changes)


@pytest.mark.slow
@settings(max_examples=300)
@given(op=OPS, changes=CHANGES)
def test_many_wrong_arguments_are_type_errors_or_value_errors(op: Any, changes: Any) -> None:
    check_call(op, changes)


@pytest.mark.slow
@pytest.mark.parametrize("op", VALID)
def test_each_argument_may_be_anything(op: Callable[..., Any]) -> None:
    """Each value for each argument, one at a time."""
    for place in range(len(valid(op))):
        for value in [*NUMBERS, *OTHERS, *TENSORS]:
            check_call(op, [(place, value)])


@pytest.mark.parametrize("op", VALID)
def test_the_right_arguments_are_accepted(op: Callable[..., Any]) -> None:
    for backend in backends(op):
        assert not isinstance(outcome(op, valid(op), backend), str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((TOKENS,), VOCAB)}, "targets must be in"),
        ({"cu_seqlens": torch.tensor([0, 7, 6])}, "cu_seqlens must not fall"),
        ({"signs": torch.tensor([1, 2])}, r"signs must be \+1, -1 or 0"),
    ],
)
def test_the_reference_names_wrong_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        redi_loss(**VALID[redi_loss] | {"valid_index": None} | change, backend="reference")
