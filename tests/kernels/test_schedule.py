"""Chunks: their sizes, and that no product is computed that nobody asked for."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import Case, Target, gradients, leaves, make_case, relative_error, run
from torch import Tensor

from redi.engine.plan.memory_tracker import LossMemory, MemoryTracker
from redi.kernels import chunked, linear_logprobs, redi_loss, redi_value_and_grad, topk_divergence
from redi.kernels.chunk_sizes import fill_waves, gpu_chunk_tokens, gpu_workspace, split
from redi.kernels.softmax import GradientRows, multiplies_halves

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@given(st.integers(0, 50), st.integers(0, 1000), st.integers(1, 300))
def test_split_covers_the_range_in_equal_parts(start: int, length: int, most: int) -> None:
    ranges = split(start, start + length, most)
    assert [i for a, b in ranges for i in range(a, b)] == list(range(start, start + length))
    sizes = [b - a for a, b in ranges]
    assert all(0 < size <= most for size in sizes)
    assert len(ranges) == -(-length // most)
    assert len(set(sizes[:-1])) <= 1


@pytest.mark.parametrize(
    ("hidden", "processors", "most"), [(1536, 132, 8800), (3584, 132, 15000), (896, 108, 4000)]
)
def test_chunks_of_a_gpu_fill_its_processors(hidden: int, processors: int, most: int) -> None:
    def waves(rows: int) -> int:
        return -(-(-(-rows // 128) * -(-hidden // 256)) // processors)

    tokens = 32768
    rows = fill_waves(tokens, hidden, processors, most)
    assert rows <= most
    total = sum(waves(b - a) for a, b in split(0, tokens, rows))
    ideal = tokens / 128 * -(-hidden // 256) / processors
    assert total <= 1.12 * ideal + 1
    assert fill_waves(1, hidden, processors, most) == 1
    assert fill_waves(0, hidden, processors, most) == 1


def test_an_empty_shard_of_the_lm_head_leaves_the_chunk_to_the_other_ranks() -> None:
    rows = gpu_chunk_tokens(32768, 0, 1536, torch.float32, 80 << 30, 132)
    assert rows >= gpu_chunk_tokens(32768, 151_936 // 8, 1536, torch.float32, 80 << 30, 132)


@pytest.mark.parametrize("exponentials", [False, True])
def test_the_workspace_counts_what_a_chunk_s_products_allocate(
    monkeypatch: pytest.MonkeyPatch, exponentials: bool
) -> None:
    """Apart from the products, whose operands a CPU has to convert."""
    monkeypatch.setattr(chunked, "matmul", lambda a, b, out, accumulate=False: out)
    rows, vocab, width = 512, 1024, 256
    tracker = MemoryTracker(LossMemory(0, 0, 0, 0))
    with tracker:
        weight = torch.zeros(vocab, width, dtype=torch.bfloat16)
        states = torch.zeros(rows, width, dtype=torch.bfloat16)
        matrix = torch.zeros(rows, vocab, dtype=torch.bfloat16)
        parts = [torch.ones(rows), torch.ones(rows)] if exponentials else []
        out = chunked.Outputs(dhidden=torch.zeros(rows, width), dweight=torch.zeros(vocab, width))
        tokens = torch.arange(rows)
        chunk = chunked.Chunk(slice(0, rows), tokens, states, True)
        products = chunked.Products(weight, torch.zeros_like(tokens), out)
        before = tracker.held.total()
        tracker.enter(("products",))
        products.add(GradientRows(matrix, *parts), chunk)
    found = tracker.peaks["products",].total() - before
    workspace = gpu_workspace(
        rows, vocab, width, torch.bfloat16, 80 << 30, 132, exponentials=exponentials
    )
    in_buffer = rows * vocab * (2 if exponentials else 4)
    assert found == workspace - in_buffer - states.nbytes


@pytest.mark.parametrize(("capability", "hip", "whether"), [
    ((7, 5), None, False), ((8, 0), None, True), ((9, 0), None, True), ((9, 4), "6.4", False),
])  # fmt: skip
def test_halves_are_multiplied_where_the_gpu_can(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, whether: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert multiplies_halves(torch.device("cuda")) == whether
    assert not multiplies_halves(torch.device("cpu"))


class Products:
    """The matrix products that were computed, as (rows, inner, columns)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int, int]] = []
        matmul = chunked.matmul

        def spy(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
            assert out.shape == (a.shape[0], b.shape[1])
            self.shapes.append((a.shape[0], a.shape[1], b.shape[1]))
            return matmul(a, b, out, accumulate)

        monkeypatch.setattr(chunked, "matmul", spy)

    def count(self, case: Case) -> dict[str, int]:
        """Tokens that went through each of the three products."""
        vocab, hidden = case.weight.shape
        found = {"logits": 0, "dhidden": 0, "dweight": 0}
        for rows, inner, columns in self.shapes:
            if (inner, columns) == (hidden, vocab):
                found["logits"] += rows
            elif (inner, columns) == (vocab, hidden):
                found["dhidden"] += rows
            else:
                assert (rows, columns) == (vocab, hidden)
                found["dweight"] += inner
        self.shapes.clear()
        return found


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    return Products(monkeypatch)


def frozen(case: Case, hidden: bool = False, weight: bool = False) -> Case:
    case = leaves(case)
    case.hidden.requires_grad_(not hidden)
    case.weight.requires_grad_(not weight)
    return case


def loss_of(case: Case, target: Target, **options: object) -> Tensor:
    return redi_loss(
        *case.arguments, **(case.options | options), backend=target.backend, chunk_tokens=30
    ).loss


def test_masked_tokens_cost_nothing_and_the_rest_three_products(
    target: Target, products: Products
) -> None:
    case = make_case(device=target.device)
    run(redi_loss, case, backend=target.backend)
    n = len(case.valid_index)
    assert n < len(case.targets)
    assert products.count(case) == {"logits": n, "dhidden": n, "dweight": n}


def test_a_frozen_operand_costs_no_product(target: Target, products: Products) -> None:
    case = make_case(device=target.device)
    n = len(case.valid_index)
    _, expected = run(redi_loss, case, backend=target.backend)
    products.count(case)

    head = frozen(case, weight=True)
    (dhidden,) = torch.autograd.grad(loss_of(head, target), head.hidden)
    assert products.count(case) == {"logits": n, "dhidden": n, "dweight": 0}
    assert relative_error(dhidden, expected.dhidden) < 1e-6

    trunk = frozen(case, hidden=True)
    (dweight,) = torch.autograd.grad(loss_of(trunk, target), trunk.weight)
    assert products.count(case) == {"logits": n, "dhidden": 0, "dweight": n}
    assert relative_error(dweight, expected.dweight) < 1e-6

    both = frozen(case, hidden=True, weight=True)
    assert not loss_of(both, target).requires_grad
    assert products.count(case) == {"logits": n, "dhidden": 0, "dweight": 0}


def test_without_gradients_only_logits_are_computed(target: Target, products: Products) -> None:
    case = leaves(make_case(device=target.device))
    with_grad = loss_of(case, target)
    n = len(case.valid_index)
    products.count(case)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = loss_of(case, target)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, with_grad.detach(), rtol=1e-6, atol=1e-6)
        assert products.count(case) == {"logits": n, "dhidden": 0, "dweight": 0}


def test_tokens_of_weight_zero_cost_the_logits_alone(target: Target, products: Products) -> None:
    case = replace(make_case(masked=0.0, device=target.device), alpha=0.0)
    negatives = int(case.cu_seqlens.diff()[case.signs < 0].sum())
    _, got = run(redi_loss, case, backend=target.backend)
    n = len(case.targets)
    positives = n - negatives
    assert products.count(case) == {"logits": n, "dhidden": positives, "dweight": positives}
    assert not got.dhidden[case.token_weights == 0].any()

    nobody = replace(case, signs=torch.zeros_like(case.signs))
    _, got = run(redi_loss, nobody, backend=target.backend)
    assert products.count(case) == {"logits": n, "dhidden": 0, "dweight": 0}
    assert not got.dhidden.any()
    assert not got.dweight.any()


def test_num_with_grad_tells_a_gpu_which_tokens_cost_the_logits_alone(
    target: Target, products: Products
) -> None:
    """A GPU must not read the weights, as a CPU does; here it is told, and given another order."""
    case = replace(make_case(device=target.device), alpha=0.0)
    expected = run(redi_loss, case, backend=target.backend)
    products.count(case)
    index = case.valid_index.flip(0)
    positive = case.token_weights[index] > 0
    index = torch.cat([index[positive], index[~positive]])
    count = int(positive.sum())
    out, got = run(redi_loss, case, backend=target.backend, valid_index=index, num_with_grad=count)
    assert products.count(case) == {"logits": len(index), "dhidden": count, "dweight": count}
    torch.testing.assert_close(out.loss, expected[0].loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.sequence_logps, expected[0].sequence_logps)
    assert relative_error(got.dhidden, expected[1].dhidden) < 1e-6
    assert relative_error(got.dweight, expected[1].dweight) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_divergence_and_a_cross_entropy_cost_three_products_together(
    target: Target, products: Products, temperature: float
) -> None:
    case = leaves(make_case(device=target.device))
    n = len(case.valid_index)
    ids = torch.arange(3, device=target.device).expand(len(case.targets), 3)
    weights = torch.ones(len(ids), device=target.device)
    made = topk_divergence(
        case.hidden, case.weight, ids, torch.full(ids.shape, -2.0, device=target.device), weights,
        temperature=temperature, tail="bucket", targets=case.targets, target_weights=weights,
        backend=target.backend,
    )  # fmt: skip
    gradients(made.loss, case.hidden, case.weight)
    assert products.count(case) == {"logits": n, "dhidden": n, "dweight": n}


@pytest.mark.parametrize(("keep", "logits_twice"), [(True, 1), (False, 2)])
def test_logprobs_keep_or_recompute_the_logits(
    target: Target, products: Products, keep: bool, logits_twice: int
) -> None:
    case = leaves(make_case(device=target.device))
    n = len(case.valid_index)
    logps = linear_logprobs(
        case.hidden, case.weight, case.targets, keep=keep, backend=target.backend
    )
    gradients(logps.sum(), case.hidden, case.weight)
    assert products.count(case) == {"logits": logits_twice * n, "dhidden": n, "dweight": n}


def test_keep_auto_is_a_matter_of_size(
    target: Target, products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = leaves(make_case(device=target.device))
    n = len(case.valid_index)
    for budget, times in ((1 << 30, 1), (1000, 2)):
        monkeypatch.setattr("redi.kernels.logprobs._keep_budget", lambda device, b=budget: b)
        logps = linear_logprobs(*case.arguments[:3], backend=target.backend)
        gradients(logps.sum(), case.hidden, case.weight)
        assert products.count(case)["logits"] == times * n


def test_no_more_rows_of_logits_than_asked_for_are_ever_at_hand(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(device=target.device)
    sizes: list[int] = []
    matmul = chunked.matmul

    def spy(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        if out.shape[1] == len(case.weight):
            sizes.append(out.untyped_storage().nbytes() // (out.element_size() * out.stride(0)))
        return matmul(a, b, out, accumulate)

    monkeypatch.setattr(chunked, "matmul", spy)
    redi_value_and_grad(*case.arguments, **case.options, chunk_tokens=7, backend=target.backend)
    assert sizes
    assert max(sizes) <= 7


def test_a_chunk_s_dx_is_gone_before_the_next_one_s_is_made(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At D = 3584 it is 190 MB."""
    case = make_case(device=target.device)
    vocab, size = case.weight.shape
    matmul, alive, counts = chunked.matmul, weakref.WeakSet(), []

    def spy(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        if (a.shape[1], out.shape[1]) == (vocab, size):
            alive.add(out)
            counts.append(len(alive))
        return matmul(a, b, out, accumulate)

    monkeypatch.setattr(chunked, "matmul", spy)
    redi_value_and_grad(*case.arguments, **case.options, chunk_tokens=7, backend=target.backend)
    assert len(counts) > 2
    assert max(counts) == 1


def teach(case: Case) -> None:
    """A divergence to a teacher of eight entries a token."""
    case, tokens = leaves(case), len(case.targets)
    ids = torch.arange(8).expand(tokens, 8)
    logps, weights = torch.full((tokens, 8), -3.0), torch.ones(tokens)
    made = topk_divergence(
        case.hidden, case.weight, ids, logps, weights, tail="bucket", targets=case.targets
    )
    gradients(made.loss, case.hidden, case.weight)


@pytest.mark.parametrize("step", [partial(run, redi_loss), teach])
def test_memory_for_a_step_does_not_grow_with_tokens_times_vocabulary(
    step: Callable[..., object],
) -> None:
    """Peak of live allocations, from the profiler: far below one whole [N, V] tensor."""
    case = make_case(vocab=4096, hidden=32, lengths=(2048, 2048), signs=(1, -1), masked=0.0)
    step(case)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step(case)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    whole = 4096 * 4096 * 4
    assert whole / 20 < peak < whole / 4
