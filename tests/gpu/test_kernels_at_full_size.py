"""The loss ops on a card, with Triton's kernels, at the sizes that they are made for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from gpu_cases import DRY_RUN, SCALE, exact_in_chunks, make_row, plain_in_chunks
from kernel_cases import (
    LOGITS,
    Gradients,
    assert_exact,
    gradients,
    leaves,
    make_case,
    mutants,
    oracle,
    relative_error,
    run,
    violations,
)

from redi.kernels import (
    filtered_redi_loss,
    linear_logprobs,
    redi_loss,
    redi_value_and_grad,
    reference,
    segment_sum,
    signed_cross_entropy,
)
from redi.kernels.chunk_sizes import buffer_rows, default_chunk_tokens, padded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or DRY_RUN), reason="needs a card"),
]
BACKENDS = ("triton", "triton-exp")
on_card = pytest.mark.skipif(DRY_RUN, reason="measures the card")


@contextmanager
def syncs_forbidden() -> Iterator[None]:
    """Any wait of the host for the card raises."""
    if DRY_RUN:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 1])
def test_log_probs_and_gradients_are_exact_at_full_size(size: int, backend: str) -> None:
    case = make_row(SCALE.tokens, SCALE.hidden[size])
    exact_logps, exact = exact_in_chunks(case)
    plain = plain_in_chunks(case)
    out, got = run(redi_loss, case, backend=backend, valid_index=case.valid_index)
    assert not violations(got, case, exact, plain)
    sums = reference.segment_sum(exact_logps, case.cu_seqlens)
    lengths = out.sequence_lengths.clamp(min=1)
    assert ((out.sequence_logps - sums) / lengths).abs().max() < 1e-4
    for name, mutant in mutants_of(got).items():
        assert violations(mutant, case, exact, plain), f"the rule lets pass: {name}"
    logps = linear_logprobs(
        case.hidden, case.weight, case.targets, valid_index=case.valid_index, backend=backend
    )
    assert (logps - exact_logps).abs().max() < 1e-4


def mutants_of(got: Gradients) -> dict[str, Gradients]:
    """Those of `kernel_cases.mutants` that need no second oracle."""
    return {
        "zero": Gradients(*(torch.zeros_like(g) for g in got)),
        "sign flipped": Gradients(*(-g for g in got)),
        "scaled by 1.01": Gradients(*((1.01 * g.float()).to(g.dtype) for g in got)),
    }


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("triton", torch.float32),
        ("triton", torch.bfloat16),
        ("triton", torch.float16),
        ("triton-exp", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("logits", LOGITS)
def test_every_kind_of_logits_is_exact_for_a_real_vocabulary(
    logits: str, backend: str, dtype: torch.dtype
) -> None:
    half = SCALE.few_tokens // 2
    case = make_case(
        dtype, vocab=SCALE.vocab, hidden=128, lengths=(half, half), signs=(1, -1), logits=logits,
        device=SCALE.device,
    )  # fmt: skip
    _, got = run(redi_loss, case, backend=backend)
    assert_exact(got, case, oracle(case)[1])


@pytest.mark.parametrize("size", [0, 1])
def test_a_filter_is_exact_at_0_and_within_its_bound_beyond_at_full_size(size: int) -> None:
    case = make_row(SCALE.tokens, SCALE.hidden[size])
    index = case.valid_index
    filtered = partial(
        filtered_redi_loss, backend="triton-exp", valid_index=index, num_with_grad=len(index)
    )
    _, exact = exact_in_chunks(case)
    with syncs_forbidden():
        out, whole = run(partial(filtered, epsilon=0.0), case)
    assert not violations(whole, case, exact, plain_in_chunks(case))
    assert not out.sequence_dropped.any()

    with syncs_forbidden():
        out, got = run(partial(filtered, epsilon=0.25), case)
    assert out.sequence_dropped.sum() > 1e-3 * len(index)
    assert (out.sequence_dropped <= out.sequence_lengths).all()
    largest = case.weight.float().norm(dim=1).max()
    bounds = case.cu_seqlens.tolist()
    for s, (start, end) in enumerate(pairwise(bounds)):
        part = slice(start, end)
        missing = (got.dhidden[part].float() - whole.dhidden[part].float()).norm()
        rounding = 2.0**-7 * whole.dhidden[part].float().norm()
        weight = case.token_weights[part].abs().max()
        assert missing <= weight * out.sequence_dropped[s] * largest + rounding


def test_triton_and_torch_agree() -> None:
    case = make_row(SCALE.tokens // 4, SCALE.hidden[0])
    weights = case.token_weights.float()
    for coefficient in ("weight", "dft", "unlikelihood"):
        results = []
        for backend in ("triton", "torch"):
            moved = leaves(case)
            loss, logps, entropies = signed_cross_entropy(
                *moved.arguments[:3], weights, coefficient=coefficient, entropy=True,
                backend=backend,
            )  # fmt: skip
            results.append((loss, logps, entropies, gradients(loss, moved.hidden, moved.weight)))
        (loss, logps, entropies, got), (*expected, expected_gradients) = results
        torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logps, expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropies, expected[2], rtol=1e-5, atol=1e-5)
        for value, true in zip(got, expected_gradients, strict=True):
            assert relative_error(value, true) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_beyond_two_to_the_31_logits_is_one_chunk_s_worth_of_small_ones(
    backend: str,
) -> None:
    case = make_row(SCALE.tall_chunk, SCALE.hidden[0])
    case = replace(case, targets=case.targets.clamp(min=0))  # all rows are in the chunk
    assert SCALE.tall_chunk * padded(SCALE.vocab) > 2**31 or DRY_RUN
    weights = torch.linspace(-1, 1, SCALE.tall_chunk, device=SCALE.device) / SCALE.tall_chunk
    results = []
    for rows in (SCALE.tall_chunk, SCALE.tall_chunk // 8):
        moved = leaves(case)
        loss, logps = signed_cross_entropy(
            *moved.arguments[:3], weights, backend=backend, chunk_tokens=rows
        )
        results.append((logps, gradients(loss, moved.hidden, moved.weight)))
    (logps, got), (expected_logps, expected) = results
    assert (logps - expected_logps).abs().max() < 1e-4
    last = slice(-(SCALE.tall_chunk // 8), None)  # rows behind the 2^31st logit
    assert relative_error(got.dhidden[last], expected.dhidden[last]) < 1e-3
    assert relative_error(got.dweight, expected.dweight) < 1e-3


def test_a_quarter_of_a_million_tokens_are_the_sum_of_their_parts() -> None:
    case = make_row(SCALE.long_tokens, SCALE.hidden[0])
    whole, dhidden, dweight = redi_value_and_grad(
        *case.arguments, **case.options, valid_index=case.valid_index, backend="triton"
    )
    middle = len(case.signs) // 2
    cut = int(case.cu_seqlens[middle])
    total = torch.zeros_like(dweight)
    losses, parts = [], []
    for tokens, bounds, signs in (
        (slice(0, cut), case.cu_seqlens[: middle + 1], case.signs[:middle]),
        (slice(cut, None), case.cu_seqlens[middle:] - cut, case.signs[middle:]),
    ):
        value, part, _ = redi_value_and_grad(
            case.hidden[tokens], case.weight, case.targets[tokens], bounds, signs,
            **case.options, dweight=total, backend="triton",
        )  # fmt: skip
        losses.append(value.loss)
        parts.append(part)
    torch.testing.assert_close(whole.loss, sum(losses), rtol=1e-5, atol=1e-6)
    assert relative_error(torch.cat(parts), dhidden) < 1e-3
    assert relative_error(total, dweight) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_calls_agree_bit_for_bit(backend: str) -> None:
    case = make_row(SCALE.tokens, SCALE.hidden[0])
    runs = [run(redi_loss, case, backend=backend) for _ in range(2)]
    assert torch.equal(runs[0][0].loss, runs[1][0].loss)
    assert torch.equal(runs[0][0].sequence_logps, runs[1][0].sequence_logps)
    for first, second in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(first, second)


@on_card
@pytest.mark.parametrize("size", [0, 1])
def test_memory_is_a_chunk_and_the_gradients_and_no_more(size: int) -> None:
    case = leaves(make_row(SCALE.tokens, SCALE.hidden[size]))
    index = case.valid_index

    def forward() -> torch.Tensor:
        return redi_loss(*case.arguments, **case.options, valid_index=index, backend="triton").loss

    forward()  # cuBLAS's workspace, Triton's binaries
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = forward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    del loss
    chunk_rows = default_chunk_tokens(len(index), case.weight)
    rows = buffer_rows(chunk_rows, case.weight.device)
    chunk = rows * (padded(SCALE.vocab) * 4 + SCALE.hidden[size] * (2 + 4))  # logits; x, dX of it
    dhidden, dweight = case.hidden.numel() * 4, case.weight.numel() * 4
    assert extra < 1.01 * (chunk + dhidden + dweight) + (32 << 20)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.bfloat16), ("triton", torch.float16), ("triton-exp", torch.bfloat16)],
    ids=str,
)
def test_with_valid_index_the_host_never_waits(backend: str, dtype: torch.dtype) -> None:
    case = leaves(make_row(SCALE.tokens // 8, SCALE.hidden[0], dtype))
    weights, index = case.token_weights.float(), case.valid_index

    def step() -> None:
        options = {"valid_index": index, "backend": backend}
        losses = [
            redi_loss(*case.arguments, **case.options, **options).loss,
            signed_cross_entropy(*case.arguments[:3], weights, **options)[0],
        ]
        for keep in (True, False):
            logps = linear_logprobs(*case.arguments[:3], keep=keep, **options)
            losses.append(segment_sum(logps, case.cu_seqlens).sum())
        for loss in losses:
            gradients(loss, case.hidden, case.weight)

    step()  # the first call compiles
    with syncs_forbidden():
        step()


def test_sums_do_not_depend_on_where_a_sequence_lies() -> None:
    generator = torch.Generator(SCALE.device).manual_seed(0)
    backend = "triton"
    for length in (1, 1023, 1025, 20_000):
        values = -torch.rand(length, device=SCALE.device, generator=generator)
        exact = values.double().sum()
        alone = segment_sum(values, torch.tensor([0, length], device=SCALE.device), backend=backend)
        torch.testing.assert_close(alone[0].double(), exact, rtol=1e-6, atol=0)
        for shift in (1, 2, 3, 4, 1024):
            shifted = torch.cat([torch.ones(shift, device=SCALE.device), values])
            bounds = torch.tensor([0, shift, shift + length], device=SCALE.device)
            for dtype in (torch.int32, torch.int64):
                sums = segment_sum(shifted, bounds.to(dtype), backend=backend)
                assert torch.equal(sums[1:], alone)
            unaligned = shifted[shift:]  # its first byte lies anywhere
            again = segment_sum(unaligned, bounds.new_tensor([0, length]), backend=backend)
            assert torch.equal(again, alone)


def test_it_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    case = leaves(make_case(torch.bfloat16, lengths=(9, 5), signs=(1, -1), device=SCALE.device))

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        moved = torch.tanh(hidden), weight, *case.arguments[2:]
        return 3 * redi_loss(*moved, **case.options, backend="triton").loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager" if DRY_RUN else "inductor")
    got, expected = compiled(case.hidden, case.weight), step(case.hidden, case.weight)
    torch.testing.assert_close(got, expected)
    for value, true in zip(
        gradients(got, case.hidden, case.weight),
        gradients(expected, case.hidden, case.weight),
        strict=True,
    ):
        assert relative_error(value, true) < 4e-3


def test_the_rule_at_full_size_is_the_rule_of_the_other_tests() -> None:
    """The oracle in chunks is the reference, and so are its mutants."""
    case = make_row(SCALE.few_tokens, 64)
    logps, exact = exact_in_chunks(case)
    expected, expected_gradients = oracle(case)
    torch.testing.assert_close(
        reference.segment_sum(logps, case.cu_seqlens), expected.sequence_logps
    )
    for value, true in zip(exact, expected_gradients, strict=True):
        assert relative_error(value, true) < 1e-12
    _, got = run(redi_loss, case, backend="triton")
    for name, mutant in mutants(got, case).items():
        assert violations(mutant, case, exact, plain_in_chunks(case)), name
