"""The losses over a vocabulary divided among processes are those over the whole vocabulary."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import vocab_parallel_cases as on_ranks
from kernel_cases import (
    LOGITS,
    TARGETS,
    Gradients,
    Target,
    assert_exact,
    gradients,
    leaves,
    loss_scale_exponent,
    make_case,
    oracle,
    relative_error,
)
from rank_pool import RankPool
from torch import Tensor

from redi.kernels import reference, signed_cross_entropy, vocab_parallel_cross_entropy

TRITON = [target for target in TARGETS if target.backend == "triton"]
# Every kind of logits in the interpreter takes minutes; some run in the default suite.
SWEPT = [
    pytest.param(target, marks=pytest.mark.slow) if target == Target("triton", "cpu") else target
    for target in TARGETS
]
VOCAB = 331  # of `make_case`
# Some of its targets, in order: a shard begins with the first and the third, ends with the second.
FIRST, LAST, NEXT = (
    make_case().targets[make_case().targets >= 0].sort().values[[9, 18, 27]].tolist()
)
# The first rows of each rank's shard, and V: uneven; of one row; empty, first, between and last.
BOUNDS = {
    "2 ranks": [0, FIRST, VOCAB],
    "2 ranks, one empty": [0, VOCAB, VOCAB],
    "4 ranks": [0, FIRST, LAST + 1, NEXT, VOCAB],
    "4 ranks, ragged": [0, 0, 1, 1, VOCAB],
}
# Four processes take the time of the others again.
FOUR = [pytest.param(name, marks=pytest.mark.slow) for name in BOUNDS if name[0] == "4"]
COEFFICIENTS = ["weight", "dft", "unlikelihood"]


class Pools(dict[int, RankPool]):
    """Processes by their number, started when they are first used."""

    def __missing__(self, count: int) -> RankPool:
        self[count] = RankPool(count)
        return self[count]


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    started = Pools()
    yield started
    for pool in started.values():
        pool.close()


@pytest.fixture(params=[*(name for name in BOUNDS if name[0] == "2"), *FOUR])
def bounds(request: pytest.FixtureRequest) -> list[int]:
    return BOUNDS[request.param]


def pool_for(pools: Pools, bounds: list[int]) -> RankPool:
    return pools[len(bounds) - 1]


def same_everywhere(values: tuple[Any, ...]) -> Any:
    """The value of the ranks, which must be bit-equal."""
    for other in values[1:]:
        assert torch.equal(other, values[0])
    return values[0]


def whole(results: list[tuple[Any, ...]]) -> Gradients:
    """The gradients from each rank's (..., dhidden, dweight of its shard)."""
    *_, dhidden, dweight = zip(*results, strict=True)
    return Gradients(same_everywhere(dhidden), torch.cat(dweight))


@pytest.mark.parametrize("target", SWEPT, ids="-".join)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("name", ["2 ranks", FOUR[1]])
def test_redi_loss_is_exact_for_every_kind_of_logits(
    pools: Pools, name: str, logits: str, dtype: torch.dtype, target: Target
) -> None:
    assert_redi_loss_is_exact(pools, name, logits, dtype, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TRITON, ids="-".join)
def test_redi_loss_is_exact_in_triton(pools: Pools, dtype: torch.dtype, target: Target) -> None:
    assert_redi_loss_is_exact(pools, "2 ranks", "random", dtype, target)


def assert_redi_loss_is_exact(
    pools: Pools, name: str, logits: str, dtype: torch.dtype, target: Target
) -> None:
    """By the rule that `redi_loss` has to keep, and the mutants that the rule rejects."""
    case = make_case(dtype, logits=logits, device=target.device)
    scale = 2.0 ** loss_scale_exponent(case) if dtype == torch.float16 else 1.0
    bounds = BOUNDS[name]
    results = pool_for(pools, bounds).run(
        on_ranks.redi, case, bounds, scale, backend=target.backend
    )
    outs, *_ = zip(*results, strict=True)
    loss = same_everywhere([out.loss for out in outs])
    logps = same_everywhere([out.sequence_logps for out in outs])
    lengths = same_everywhere([out.sequence_lengths for out in outs])
    exact_out, exact = oracle(case)

    size = max(1.0, float((case.hidden.double() @ case.weight.double().T).abs().max()) / 50)
    mean_error = ((logps - exact_out.sequence_logps) / lengths.clamp(min=1)).abs().max()
    assert mean_error <= 2e-4 * size
    assert abs(loss - exact_out.loss) <= 2e-4 * size
    assert torch.equal(lengths, exact_out.sequence_lengths)
    got = whole(results)
    assert got.dhidden.dtype == got.dweight.dtype == dtype
    assert_exact(
        got if scale == 1.0 else Gradients(*(g.double() / scale for g in got)), case, exact
    )


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("logits", ["random", "confident", "logp -500"])
def test_float64_is_that_of_one_process_to_1e_12(
    pools: Pools, bounds: list[int], coefficient: str, logits: str
) -> None:
    case = make_case(torch.float64, logits=logits)
    weights = torch.linspace(-1, 1, len(case.targets), dtype=torch.float64)
    options = {"coefficient": coefficient, "entropy": True}
    results = pool_for(pools, bounds).run(
        on_ranks.cross_entropy, case, bounds, weights, 3.0, chunk_tokens=10, **options
    )
    found, dhidden, dweight, _ = zip(*results, strict=True)
    loss, logps, entropies = (same_everywhere(values) for values in zip(*found, strict=True))

    exact_case = leaves(case)
    operands = exact_case.hidden, exact_case.weight
    # Where p is nearly 1 the reference subtracts it from 1, which cancels.
    op = signed_cross_entropy if logits == "confident" else reference.signed_cross_entropy
    exact = op(*operands, case.targets, weights, **options)
    exact_gradients = gradients(3 * exact[0], *operands)
    torch.testing.assert_close(loss, exact[0].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(logps, exact[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(entropies, exact[2], rtol=1e-12, atol=1e-14)
    assert relative_error(same_everywhere(dhidden), exact_gradients.dhidden) < 1e-12
    assert relative_error(torch.cat(dweight), exact_gradients.dweight) < 1e-12


@pytest.mark.parametrize("target", SWEPT, ids="-".join)
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("logits", ["random", "confident", "logp -80"])
@pytest.mark.parametrize("name", ["2 ranks, one empty", FOUR[0]])
def test_every_coefficient_is_exact_in_float32(
    pools: Pools, name: str, logits: str, coefficient: str, target: Target
) -> None:
    assert_coefficient_is_exact(pools, name, logits, coefficient, target)


@pytest.mark.parametrize("name", ["2 ranks, one empty", FOUR[0]])
@pytest.mark.parametrize("target", TRITON, ids="-".join)
def test_unlikelihood_is_exact_in_triton(pools: Pools, name: str, target: Target) -> None:
    assert_coefficient_is_exact(pools, name, "confident", "unlikelihood", target)


def assert_coefficient_is_exact(
    pools: Pools, name: str, logits: str, coefficient: str, target: Target
) -> None:
    """Bounds as in test_exactness.py."""
    bounds = BOUNDS[name]
    case = make_case(torch.float32, logits=logits, device=target.device)
    torch.manual_seed(1)
    weights = torch.randn(case.targets.shape, device=target.device)
    options = {"coefficient": coefficient, "entropy": True}
    results = pool_for(pools, bounds).run(
        on_ranks.cross_entropy, case, bounds, weights, backend=target.backend, **options
    )
    found, dhidden, dweight, _ = zip(*results, strict=True)
    loss, logps, entropies = (same_everywhere(values) for values in zip(*found, strict=True))

    exact_case = leaves(case.to(torch.float64))
    operands = exact_case.hidden, exact_case.weight
    exact = reference.signed_cross_entropy(*operands, case.targets, weights, **options)
    exact_gradients = gradients(exact[0], *operands)
    size = max(1.0, float((case.hidden @ case.weight.T).abs().max()) / 20)
    torch.testing.assert_close(loss, exact[0].detach().float(), rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(logps, exact[1].float(), rtol=2e-5, atol=2.0**-47)
    atol = 2.0**-47 if logits == "confident" else 2.0**-22
    torch.testing.assert_close(entropies, exact[2].float(), rtol=2e-5 * size, atol=atol)
    assert relative_error(same_everywhere(dhidden), exact_gradients.dhidden) < 2e-5 * size
    assert relative_error(torch.cat(dweight), exact_gradients.dweight) < 2e-5 * size


# Each with what it needs of the others' columns; the last has all.
TERMS: list[dict[str, Any]] = [
    {"logit_scale": 0.3},
    {"softcap": 2.0},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"entropy_weights": True},
    {
        "logit_scale": 1.5,
        "softcap": 4.0,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "entropy_weights": True,
    },
]


def terms_of(options: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """The options, with weights [T] for entropies in place of True."""
    if "entropy_weights" in options:
        options = options | {"entropy_weights": torch.linspace(1, -1, len(like)).to(like)}
    return options


@pytest.mark.parametrize("options", TERMS, ids="+".join)
def test_terms_are_those_of_one_process_to_1e_12(
    pools: Pools, bounds: list[int], options: dict[str, Any]
) -> None:
    case = make_case(torch.float64)
    weights = torch.linspace(-1, 1, len(case.targets), dtype=torch.float64)
    options = terms_of(options, weights) | {"log_sum_exp": True}
    results = pool_for(pools, bounds).run(
        on_ranks.cross_entropy, case, bounds, weights, chunk_tokens=10, **options
    )
    found, *_ = zip(*results, strict=True)
    loss, logps, lses = (same_everywhere(values) for values in zip(*found, strict=True))
    exact_case = leaves(case)
    operands = exact_case.hidden, exact_case.weight
    exact = reference.signed_cross_entropy(*operands, case.targets, weights, **options)
    exact_gradients = gradients(exact[0], *operands)
    torch.testing.assert_close(loss, exact[0].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(logps, exact[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(lses, exact[2], rtol=1e-12, atol=0)
    got = whole([result[:-1] for result in results])
    assert relative_error(got.dhidden, exact_gradients.dhidden) < 1e-12
    assert relative_error(got.dweight, exact_gradients.dweight) < 1e-12


@pytest.mark.parametrize("target", TRITON, ids="-".join)
@pytest.mark.parametrize("name", ["2 ranks, one empty", FOUR[0]])
def test_all_terms_are_exact_in_triton(pools: Pools, name: str, target: Target) -> None:
    case, bounds = make_case(torch.float32, device=target.device), BOUNDS[name]
    weights = torch.linspace(-1, 1, len(case.targets), device=target.device)
    options = terms_of(TERMS[-1], weights) | {"entropy": True}
    results = pool_for(pools, bounds).run(
        on_ranks.cross_entropy, case, bounds, weights, backend=target.backend, **options
    )
    found, *_ = zip(*results, strict=True)
    loss, logps, entropies = (same_everywhere(values) for values in zip(*found, strict=True))
    exact_case = leaves(case.to(torch.float64))
    operands = exact_case.hidden, exact_case.weight
    exact = reference.signed_cross_entropy(*operands, case.targets, weights, **options)
    exact_gradients = gradients(exact[0], *operands)
    for value, true in zip((loss, logps, entropies), exact, strict=True):
        torch.testing.assert_close(value, true.detach().float(), rtol=2e-5, atol=1e-5)
    got = whole([result[:-1] for result in results])
    assert relative_error(got.dhidden, exact_gradients.dhidden) < 2e-5
    assert relative_error(got.dweight, exact_gradients.dweight) < 2e-5


def test_an_entropy_s_gradient_is_exact_where_another_token_is_nearly_certain(
    pools: Pools,
) -> None:
    """As over a whole vocabulary: see `test_terms.py`."""
    logits = torch.tensor([[0.0, -18, -19, -20, -19, -18.5, -18, -19]])
    lm_head, targets, zero = torch.eye(8), torch.tensor([1]), torch.zeros(1)
    case = replace(
        make_case(lengths=(1,)).to(torch.bfloat16),
        hidden=logits.bfloat16(),
        weight=lm_head.bfloat16(),
        targets=targets,
    )
    results = pools[2].run(on_ranks.cross_entropy, case, [0, 3, 8], zero, entropy_weights=zero - 1)
    exact_hidden = logits.double().requires_grad_()
    _, exact = reference.linear_logprobs(exact_hidden, lm_head.double(), targets, entropy=True)
    (true,) = torch.autograd.grad(exact, exact_hidden)
    for _, dhidden, *_ in results:
        assert relative_error(dhidden, true) < 4e-3


def test_logprobs_and_redi_take_scale_and_softcap(pools: Pools) -> None:
    case, bounds = make_case(torch.float64), BOUNDS["2 ranks"]
    options: dict[str, Any] = {"logit_scale": 1.5, "softcap": 4.0}
    dlogps = torch.linspace(-1, 1, len(case.targets), dtype=torch.float64)
    exact_case = leaves(case)
    operands = exact_case.hidden, exact_case.weight

    results = pools[2].run(on_ranks.logprobs, case, bounds, dlogps, **options)
    exact = reference.linear_logprobs(*operands, case.targets, **options)
    expected = Gradients(*torch.autograd.grad(exact, operands, dlogps))
    torch.testing.assert_close(results[0][0], exact.detach(), rtol=1e-12, atol=0)
    assert relative_error(whole(results).dhidden, expected.dhidden) < 1e-12
    assert relative_error(whole(results).dweight, expected.dweight) < 1e-12

    results = pools[2].run(on_ranks.redi, case, bounds, **options)
    out = reference.redi_loss(*exact_case.arguments, **case.options, **options)
    expected = gradients(out.loss, *operands)
    torch.testing.assert_close(results[0][0].loss, out.loss.detach(), rtol=1e-12, atol=0)
    assert relative_error(whole(results).dhidden, expected.dhidden) < 1e-12
    assert relative_error(whole(results).dweight, expected.dweight) < 1e-12


def test_tokens_may_have_several_dimensions_and_another_ignored_index(
    pools: Pools,
) -> None:
    case = make_case(lengths=(12,), signs=(1,))
    weights = torch.linspace(-1, 1, 12)
    flat = pools[2].run(on_ranks.cross_entropy, case, BOUNDS["2 ranks"], weights)
    batch = replace(
        case,
        hidden=case.hidden.view(3, 4, -1),
        targets=case.targets.masked_fill(case.targets == -100, 5_000).view(3, 4),
    )
    shaped = pools[2].run(
        on_ranks.cross_entropy,
        batch, BOUNDS["2 ranks"], weights.view(3, 4), ignore_index=5_000,
    )  # fmt: skip
    for one, other in zip(flat, shaped, strict=True):
        (loss, logps), dhidden, dweight, _ = one
        (other_loss, other_logps), other_dhidden, other_dweight, _ = other
        assert torch.equal(loss, other_loss)
        assert torch.equal(logps.view(3, 4), other_logps)
        assert torch.equal(dhidden.view(3, 4, -1), other_dhidden)
        assert torch.equal(dweight, other_dweight)


@pytest.mark.parametrize("target", SWEPT, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logits", ["random", "confident", "logp -500"])
def test_logprobs_are_exact_for_any_upstream_gradient(
    pools: Pools, logits: str, dtype: torch.dtype, target: Target
) -> None:
    """With REDI's own weights from above, so that the rule and the mutants apply."""
    case = make_case(dtype, logits=logits, device=target.device)
    bounds = BOUNDS["2 ranks"]
    dlogps = -case.token_weights.float()
    results = pools[2].run(on_ranks.logprobs, case, bounds, dlogps, backend=target.backend)
    logps = same_everywhere([result[0] for result in results])
    exact = reference.linear_logprobs(case.hidden.double(), case.weight.double(), case.targets)
    size = float((case.hidden.double() @ case.weight.double().T).abs().max())
    assert (logps - exact).abs().max() <= 2e-4 * max(1.0, size / 50)
    assert (logps <= 0).all()
    assert not logps[case.targets == -100].any()
    assert_exact(whole(results), case, oracle(case)[1])


def test_a_group_of_one_rank_gives_the_bits_of_the_plain_functions(
    pools: Pools,
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = make_case(dtype)
        weights = case.token_weights.float()
        for parallel, plain in pools[2].run(on_ranks.subgroups, case, weights):
            assert len(parallel) == 7
            assert all(torch.equal(a, b) for a, b in zip(parallel, plain, strict=True))


@pytest.mark.slow
def test_groups_within_a_larger_world_each_compute_their_own_row(
    pools: Pools,
) -> None:
    """Two groups of two ranks: tensor parallelism times data parallelism."""
    cases = [make_case(torch.float64, seed=seed) for seed in (1, 2)]
    weights = torch.ones(len(cases[0].targets), dtype=torch.float64)
    results = pools[4].run(on_ranks.pairs_of_ranks, cases, weights)
    for case, pair in zip(cases, (results[:2], results[2:]), strict=True):
        exact = leaves(case)
        loss, _ = reference.signed_cross_entropy(exact.hidden, exact.weight, case.targets, weights)
        expected = gradients(loss, exact.hidden, exact.weight)
        got = whole(pair)
        torch.testing.assert_close(pair[0][0], loss.detach(), rtol=1e-12, atol=0)
        assert relative_error(got.dhidden, expected.dhidden) < 1e-12
        assert relative_error(got.dweight, expected.dweight) < 1e-12


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_dtensor_is_named_and_its_local_rows_are_taken(pools: Pools, ranks: int) -> None:
    """331 rows, 83 a rank at most: torch's own division, whose last shard is shorter."""
    case = make_case(torch.float64)
    weights = torch.linspace(-1, 1, len(case.targets), dtype=torch.float64)
    results = pools[ranks].run(on_ranks.of_a_dtensor, case, weights)
    exact = leaves(case)
    loss, _ = reference.signed_cross_entropy(exact.hidden, exact.weight, case.targets, weights)
    expected = gradients(loss, exact.hidden, exact.weight)
    for error, got, dhidden, dweight in results:
        assert "got a DTensor: pass weight.to_local()" in error
        torch.testing.assert_close(got, loss.detach(), rtol=1e-12, atol=0)
        assert relative_error(dhidden, expected.dhidden) < 1e-12
        assert relative_error(dweight, expected.dweight) < 1e-12


def test_a_tied_shard_gets_the_gradients_of_both_uses(pools: Pools, bounds: list[int]) -> None:
    """The shard is the embedding's too; the sum is that of one process with the whole matrix."""
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, 16, dtype=torch.float64, requires_grad=True)
    ids, mix = torch.randint(VOCAB, (40,)), torch.randn(16, 16, dtype=torch.float64)
    results = pool_for(pools, bounds).run(on_ranks.tied, weight.detach(), bounds, ids, mix)
    ones = torch.ones(39, dtype=torch.float64)
    loss, _ = reference.signed_cross_entropy((weight[ids] @ mix)[:-1], weight, ids[1:], ones)
    (expected,) = torch.autograd.grad(loss, weight)
    losses, shards = zip(*results, strict=True)
    torch.testing.assert_close(same_everywhere(losses), loss.detach(), rtol=1e-12, atol=0)
    assert relative_error(torch.cat(shards), expected) < 1e-12


@pytest.mark.parametrize("target", TARGETS, ids="-".join)
@pytest.mark.parametrize(("lengths", "masked"), [((), 0.0), ((0, 0), 0.0), ((3, 4), 1.0)], ids=str)
def test_rows_without_unmasked_tokens_contribute_nothing(
    pools: Pools, lengths: tuple[int, ...], masked: float, target: Target
) -> None:
    case = make_case(lengths=lengths, signs=(1, -1)[: len(lengths)], device=target.device)
    if masked:
        case = replace(case, targets=torch.full_like(case.targets, -100))
    results = pools[2].run(on_ranks.redi, case, BOUNDS["2 ranks"], backend=target.backend)
    assert [out.loss.item() for out, _, _ in results] == [0.0, 0.0]
    got = whole(results)
    assert got.dhidden.shape == case.hidden.shape
    assert got.dweight.shape == case.weight.shape
    assert not got.dhidden.any()
    assert not got.dweight.any()


@pytest.mark.slow
def test_a_chunk_takes_one_gather_of_its_sums_and_one_sum_of_its_states(
    pools: Pools,
) -> None:
    """Counted, and their sizes: nothing as large as a chunk's logits is ever sent."""
    case = make_case(lengths=(40,), signs=(1,), masked=0.0)
    weights = torch.ones(40)
    weights[30:] = 0.0  # chunks of 15, 15; 10 without gradient
    for entropy, rows in ((False, 3), (True, 4)):
        results = pools[4].run(
            on_ranks.cross_entropy,
            case, BOUNDS["4 ranks"], weights, chunk_tokens=16, entropy=entropy,
        )  # fmt: skip
        chunk = [("all_gather", rows * 15, torch.float32), ("all_reduce", 15 * 77, torch.float32)]
        for *_, ran in results:
            sizes, *chunks = ran
            assert sizes == ("all_gather", 18, torch.int64)
            assert chunks == [*chunk, *chunk, ("all_gather", rows * 10, torch.float32)]


def test_without_a_gradient_only_sums_are_exchanged(pools: Pools) -> None:
    case = make_case(lengths=(30,), signs=(1,), masked=0.0)
    weights = torch.ones(30)
    results = pools[2].run(on_ranks.without_gradient, case, BOUNDS["2 ranks"], weights)
    exact = reference.linear_logprobs(case.hidden.double(), case.weight.double(), case.targets)
    for (_, logps), ran in results:
        torch.testing.assert_close(logps, exact.float())
        assert [name for name, *_ in ran] == ["all_gather"] * 3


def test_memory_for_a_step_does_not_grow_with_tokens_times_vocabulary(
    pools: Pools,
) -> None:
    """Peak of live allocations of each rank, far below a whole [N, V / 2] tensor."""
    vocab, tokens = 8192, 4096
    case = make_case(vocab=vocab, hidden=32, lengths=(2048, 2048), signs=(1, -1), masked=0.0)
    peaks = pools[2].run(on_ranks.peak_bytes, case, [0, vocab // 2, vocab])
    shard_of_logits = tokens * vocab // 2 * 4
    assert all(shard_of_logits / 20 < peak < shard_of_logits / 4 for peak in peaks)


def test_the_ops_are_opaque_to_compile_and_autocast_and_differentiable_once(
    pools: Pools,
) -> None:
    case = make_case(vocab=23, hidden=6, lengths=(5, 7), signs=(1, -1))
    weights = torch.linspace(-1, 1, 12)
    for found in pools[2].run(on_ranks.as_an_op, case, [0, 10, 23], weights):
        assert found["compiled"] == found["autocast"] == found["again"] == [True] * 4
        assert all("no autograd formula" in error for error in found["second derivatives"])


SMALL = make_case(vocab=23, hidden=6, lengths=(5, 7), signs=(1, -1), masked=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "hidden": SMALL.hidden[1:],
                "targets": SMALL.targets[1:],
                "token_weights": torch.ones(11),
            },
            "ValueError: the number of tokens T must be the same on all ranks of the group, but "
            "ranks 0 and 1 of it differ, got 12 and 11",
        ),
        (
            {"hidden": SMALL.hidden[:, :5], "weight": torch.ones(13, 5)},
            "ValueError: the hidden size D must be the same on all ranks of the group, but ranks 0 "
            "and 1 of it differ, got 6 and 5",
        ),
        (
            {"hidden": SMALL.hidden.double(), "weight": torch.ones(13, 6, dtype=torch.float64)},
            "ValueError: the operands' dtype must be the same on all ranks of the group, but ranks "
            "0 and 1 of it differ",
        ),
        (
            {"targets": SMALL.targets.flip(0)},
            "ValueError: targets must be the same on all ranks of the group, but ranks 0 and 1 of "
            "it differ",
        ),
        (
            {"token_weights": torch.full((12,), 2.0)},
            "ValueError: token_weights must be the same on all ranks of the group, but ranks 0 and "
            "1 of it differ",
        ),
        (
            {"valid_index": torch.arange(12).flip(0), "num_with_grad": 12},
            "ValueError: the order of tokens by valid_index must be the same on all ranks of the "
            "group, but ranks 0 and 1 of it differ",
        ),
        (
            {"coefficient": "dft"},
            "ValueError: coefficient must be the same on all ranks of the group, but ranks 0 and 1 "
            "of it differ",
        ),
        (
            {"hidden": SMALL.hidden},
            "ValueError: whether hidden needs a gradient must be the same on all ranks of the "
            "group, but ranks 0 and 1 of it differ",
        ),
    ],
    ids=["T", "D", "dtype", "targets", "weights", "order", "coefficient", "gradient"],
)
def test_ranks_that_differ_all_raise_one_line_and_none_hangs(
    pools: Pools, changes: dict[str, Any], message: str
) -> None:
    errors = pools[2].run(on_ranks.error_of, [{}, changes], SMALL, [0, 10, 23])
    assert errors == [message, message]
    assert pools[2].run(on_ranks.error_of, [{}, {}], SMALL, [0, 10, 23]) == ["", ""]


def test_chunks_have_the_least_size_that_a_rank_asks_for(pools: Pools) -> None:
    changes = [{"chunk_tokens": 5}, {"chunk_tokens": 3}]
    assert pools[2].run(on_ranks.error_of, changes, SMALL, [0, 10, 23]) == ["", ""]


def test_a_target_beyond_the_vocabulary_of_all_ranks_is_an_error_on_each(
    pools: Pools,
) -> None:
    changes = [{"targets": SMALL.targets.clamp(min=0).index_fill(0, torch.tensor([4]), 23)}] * 2
    errors = pools[2].run(on_ranks.error_of, changes, SMALL, [0, 10, 23])
    assert errors == ["ValueError: targets must be in [0, 23) or -100, got 23 at position 4"] * 2


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("wrong", [-1, 23])
def test_a_target_out_of_range_that_nobody_checked_is_nan(
    pools: Pools, wrong: int, coefficient: str
) -> None:
    """As in one process. (A weight below 0: "unlikelihood" has nothing against no token.)"""
    targets = SMALL.targets.index_fill(0, torch.tensor([4]), wrong)
    case = replace(SMALL, targets=targets)
    results = pools[2].run(
        on_ranks.of_an_unchecked_target, case, [0, 10, 23], coefficient=coefficient
    )
    for loss, logps, dhidden in results:
        assert loss.isnan()
        assert logps.isnan().tolist() == [position == 4 for position in range(12)]
        assert dhidden.isnan().all(1).tolist() == [position == 4 for position in range(12)]


def test_a_vocabulary_without_rows_is_an_error(pools: Pools) -> None:
    changes = [{"weight": torch.ones(0, 6)}] * 2
    for error in pools[2].run(on_ranks.error_of, changes, SMALL, [0, 10, 23]):
        assert error == (
            "ValueError: weight must have V >= 1 rows over all ranks of the group, got none"
        )


def test_upstream_gradients_that_differ_are_an_error_on_each_rank(
    pools: Pools,
) -> None:
    for error in pools[2].run(on_ranks.error_in_backward, SMALL, [0, 10, 23]):
        assert error.startswith("token_weights must be the same on all ranks of the group")


@pytest.mark.parametrize("group", [None, "tp", dist.GroupMember.NON_GROUP_MEMBER])
def test_what_is_no_group_is_named(group: Any) -> None:
    arguments: tuple[Tensor, ...] = SMALL.hidden, SMALL.weight, SMALL.targets, torch.ones(12)
    with pytest.raises(TypeError, match="group must be a process group that this rank belongs to"):
        vocab_parallel_cross_entropy(*arguments, group=group)
