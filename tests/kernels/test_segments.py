"""Sums over sequences do not depend on packing, by a single bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Target

from redi.kernels import reference, segment_sum
from redi.kernels.backends import kernels_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Around the block of 1024, empty, and one that needs three levels of blocks.
LENGTHS = st.lists(
    st.one_of(st.integers(0, 5), st.integers(1020, 1030), st.integers(2040, 5000)), max_size=6
)


def bounds(lengths: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def sums_of(target: Target, values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """By the target's backend on its device, on the CPU again."""
    moved = values.to(target.device), cu_seqlens.to(target.device)
    return segment_sum(*moved, backend=target.backend).cpu()


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # neither holds any state
)
@given(
    lengths=LENGTHS,
    seed=st.integers(0, 1000),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_a_sum_is_right_and_the_same_bits_wherever_the_sequence_lies(
    target: Target, lengths: list[int], seed: int, index: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [-torch.rand(n, generator=generator) for n in lengths]
    values = torch.cat([torch.zeros(0), *parts])
    sums = sums_of(target, values, bounds(lengths, index))
    exact = reference.segment_sum(values.double(), bounds(lengths))
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=0)
    for part, total in zip(parts, sums, strict=True):
        alone = sums_of(target, part, bounds([len(part)]))
        assert torch.equal(alone[0], total)
        shifted = torch.cat([torch.ones(3), part, torch.ones(1500)])
        assert torch.equal(sums_of(target, shifted, bounds([3, len(part), 1500]))[1], total)


def test_a_sequence_of_over_a_million_tokens_is_summed_exactly_enough(target: Target) -> None:
    torch.manual_seed(0)
    values = -torch.rand(1024**2 + 1500)
    sums = sums_of(target, values, bounds([1024**2 + 77, 1423]))
    exact = reference.segment_sum(values.double(), bounds([1024**2 + 77, 1423]))
    torch.testing.assert_close(sums.double(), exact, rtol=5e-7, atol=0)


def test_the_gradient_goes_to_the_sequence_s_own_tokens(target: Target) -> None:
    values = torch.randn(9, device=target.device, requires_grad=True)
    cu_seqlens = bounds([2, 0, 4, 3]).to(target.device)
    dsums = torch.tensor([1.0, 2.0, 3.0, 4.0], device=target.device, requires_grad=True)
    sums = segment_sum(values, cu_seqlens, backend=target.backend)
    (grad,) = torch.autograd.grad(sums, values, dsums, create_graph=True)
    assert grad.tolist() == [1, 1, 3, 3, 3, 3, 4, 4, 4]
    # The gradient is linear in what comes from above, and its gradient the sum again.
    (again,) = torch.autograd.grad(grad, dsums, torch.arange(9.0, device=target.device))
    assert again.tolist() == [1, 0, 14, 21]


def test_gradients_are_finite_differences() -> None:
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, bounds([2, 0, 4, 3])), values)
    assert torch.autograd.gradgradcheck(lambda v: segment_sum(v, bounds([2, 0, 4, 3])), values)


def test_token_weights_are_redi_s_and_zero_where_nothing_is_trained(target: Target) -> None:
    """Masked, of sign 0, or after the last sequence."""
    lengths, signs = [0, 2, 0, 1, 2, 1100], [1, -1, 1, 0, 1, -1]
    targets = torch.tensor([5, -100, 7, 1, 2, *range(1100), 3])
    targets[20:] = -100
    targets[[30, 1104]] = 9
    weights, found = kernels_of(target.backend).token_weights(
        targets.to(target.device),
        bounds(lengths, torch.int32).to(target.device),
        torch.tensor(signs, dtype=torch.int8, device=target.device),
        0.5,
        4.0,
        torch.float32,
    )
    assert found.tolist() == [0, 1, 0, 1, 2, 17]
    expected = torch.zeros(1106)
    expected[0] = -0.5 / 4
    expected[3:5] = 1 / (4 * 2)
    expected[[*range(5, 20), 30, 1104]] = -0.5 / (4 * 17)
    torch.testing.assert_close(weights.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("values", "cu_seqlens", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.bfloat16), [0, 3], TypeError, "values must be float32 or"),
        (torch.zeros(3, 1), [0, 3], ValueError, r"values must have shape \[T\], got \(3, 1\)"),
        (torch.zeros(3), [0, 2], ValueError, "from 0 to T = 3, got 0 to 2"),
        (torch.zeros(3), [0, 2, 1, 3], ValueError, "must not fall, got 2 then 1 at 2"),
        (torch.zeros(3), [0.0, 3.0], TypeError, "cu_seqlens must be int32 or int64"),
        (torch.zeros(3), [], TypeError, "cu_seqlens must be int32 or int64"),
    ],
)
def test_wrong_arguments_are_named(
    values: torch.Tensor, cu_seqlens: list[float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        segment_sum(values, torch.tensor(cu_seqlens))
