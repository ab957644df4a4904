"""The filter: what it leaves out is bounded, told, and never touched; nothing else changes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from kernel_cases import (
    EXP_TARGETS,
    Case,
    Target,
    assert_exact,
    gradients,
    leaves,
    make_case,
    oracle,
    relative_error,
    run,
    worst_row,
)
from torch import Tensor

from redi.kernels import filtered_redi_loss, redi_loss, reference
from redi.kernels.experimental.filter import TILE_COLUMNS, TileSums, kept_tiles, vocabulary_order

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16 = torch.bfloat16
TARGETS = [Target("torch", "cpu"), *EXP_TARGETS]
BIAS, ONES = 0, 1  # dimensions of `common_words`


# In the interpreter the experimental kernels take half a minute.
SLOW_TARGETS = [pytest.param(target, marks=pytest.mark.slow) for target in EXP_TARGETS]


@pytest.fixture(params=[TARGETS[0], *SLOW_TARGETS], ids="-".join)
def target(request: pytest.FixtureRequest) -> Target:
    """Hides the fixture of all backends."""
    return request.param


def common_words(
    tokens: int = 32, vocab: int | None = None, hidden: int = 40, device: str = "cpu"
) -> Case:
    """Sequences of one token each; some words, anywhere in the vocabulary, are likely at all.

    Without `vocab` there are some ten tiles on a CPU, some thirty of a card's larger ones.
    Dimension BIAS of a hidden state is 1 and that of the lm_head a word's log-frequency, by Zipf's
    law. Dimension ONES is 0 and 1: so its gradient in dhidden is u times the sum of dlogits over
    the vocabulary, 0 if nothing was left out.
    """
    vocab = vocab or (1100 if device == "cpu" else 8192)
    case = make_case(
        BF16,
        vocab=vocab,
        hidden=hidden,
        lengths=(1,) * tokens,
        signs=(1, -1) * (tokens // 2),
        masked=0.0,
        device=device,
    )
    generator = torch.Generator().manual_seed(1)
    rank = torch.randperm(vocab, generator=generator) + 1
    weight, x = case.weight.clone(), case.hidden.clone()
    weight[:, BIAS] = (-1.5 * rank.log()).to(device, BF16)
    weight[:, ONES] = 1
    x[:, BIAS], x[:, ONES] = 1, 0
    # Three words are the targets: so the targets' tiles, never left out, are few.
    targets = case.targets % 3
    return replace(case, hidden=x, weight=weight, targets=targets, num_pairs=tokens / 2)


@pytest.mark.parametrize("epsilon", [2.0**-5, 1.0])
def test_what_is_missing_is_what_is_told_and_within_the_bound(
    target: Target, epsilon: float
) -> None:
    case = common_words(device=target.device)
    out, got = run(partial(filtered_redi_loss, epsilon=epsilon), case, backend=target.backend)
    _, whole = run(partial(filtered_redi_loss, epsilon=0.0), case, backend=target.backend)
    u, dropped = case.token_weights, out.sequence_dropped.double()
    assert dropped.mean() > epsilon / 10

    summed = got.dhidden[:, ONES].double() / u
    torch.testing.assert_close(-summed, dropped, rtol=2.0**-7, atol=2e-3)

    missing = (got.dhidden.double() - whole.dhidden.double()).norm(dim=1)
    rounding = 2.0**-7 * whole.dhidden.double().norm(dim=1)
    bound = u.abs() * dropped * case.weight.double().norm(dim=1).max()
    assert (missing <= bound + rounding).all()
    assert missing.norm() > 0.02 * bound.norm()  # or the bound would say nothing

    missing = (got.dweight.double() - whole.dweight.double()).norm()
    rounding = 2.0**-7 * whole.dweight.double().norm()
    assert missing <= (u.abs() * dropped * case.hidden.double().norm(dim=1)).sum() + rounding


def test_a_tile_leaves_at_most_epsilon_out(target: Target) -> None:
    case = common_words(device=target.device)
    for epsilon in (2.0**-12, 2.0**-8, 2.0**-4):
        out = filtered_redi_loss(
            *leaves(case).arguments, **case.options, epsilon=epsilon, backend=target.backend
        )
        tiles = -(-len(case.weight) // TILE_COLUMNS)
        assert out.sequence_dropped.min() >= 0
        assert out.sequence_dropped.max() <= epsilon * (tiles - 1)


@pytest.mark.parametrize("logits", ["random", "confident", "logp -80"])
def test_with_epsilon_0_the_gradient_is_exact(target: Target, logits: str) -> None:
    case = make_case(BF16, logits=logits, device=target.device)
    out, got = run(partial(filtered_redi_loss, epsilon=0.0), case, backend=target.backend)
    assert_exact(got, case, oracle(case)[1])
    assert not out.sequence_dropped.any()


def test_sequences_may_have_weights(target: Target) -> None:
    case = leaves(make_case(BF16, device=target.device))
    weights = torch.linspace(0.5, 2, len(case.signs), device=target.device)
    options = case.options | {"backend": target.backend, "valid_index": case.valid_index}
    out = filtered_redi_loss(*case.arguments, epsilon=0.0, sequence_weights=weights, **options)
    got = gradients(out.loss, case.hidden, case.weight)
    token_weights = case.token_weights * weights.repeat_interleave(case.cu_seqlens.diff())
    exact = leaves(case.to(torch.float64))
    loss, _ = reference.signed_cross_entropy(*exact.arguments[:3], token_weights)
    torch.testing.assert_close(out.loss, loss.float(), rtol=1e-5, atol=1e-5)
    for value, true in zip(got, gradients(loss, exact.hidden, exact.weight), strict=True):
        assert relative_error(value, true) < 4e-3


@pytest.mark.parametrize("logits", ["random", "logp -80"])
def test_loss_and_log_probs_stay_exact(target: Target, logits: str) -> None:
    case = make_case(BF16, logits=logits, device=target.device)
    out = filtered_redi_loss(
        *leaves(case).arguments, **case.options, epsilon=1.0, backend=target.backend
    )
    exact, _ = oracle(case)
    torch.testing.assert_close(out.loss, exact.loss.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        out.sequence_logps, exact.sequence_logps.float(), rtol=1e-5, atol=1e-3
    )
    assert torch.equal(out.sequence_lengths, exact.sequence_lengths)


def test_the_target_is_never_left_out(target: Target) -> None:
    """Its logit would stay as it is, however wrong the model: here nobody expects the targets."""
    case = common_words(device=target.device)
    rare = case.weight[:, BIAS].float().argsort()[:4]
    case = replace(case, targets=rare.repeat(len(case.targets) // 4))
    _, got = run(partial(filtered_redi_loss, epsilon=1.0), case, backend=target.backend)
    exact = oracle(case)[1]
    assert worst_row(got.dweight[rare], exact.dweight[rare]) < 2.0**-6
    assert worst_row(got.dweight, exact.dweight) > 0.5  # others were left out in whole


def test_the_order_gathers_what_is_likely_in_few_tiles() -> None:
    case = common_words(tokens=128, vocab=4096)
    p = (case.hidden.float() @ case.weight.float().T).softmax(1)
    columns = torch.arange(4096)

    def kept_share(order: Tensor) -> float:
        sums = p[:, order].view(len(p), -1, 128).sum(2)
        tiles = TileSums(sums, torch.ones(len(p)), rows=16, columns=128)
        targets = order.argsort()[case.targets]
        kept, _ = kept_tiles(tiles, targets, torch.ones(len(p), dtype=torch.bool), 2.0**-6)
        return float(kept.kept.float().mean())

    order = vocabulary_order(case.hidden, torch.arange(128), case.weight)
    assert torch.equal(order.sort().values, columns)
    assert kept_share(order) < 0.7 * kept_share(columns)


def test_what_is_left_out_is_not_written_and_what_takes_part_is() -> None:
    pytest.importorskip("triton")
    from redi.kernels.experimental import exp_gemm_triton

    if not EXP_TARGETS:
        pytest.skip("Triton has neither a card nor its interpreter here")
    (target,) = EXP_TARGETS
    case = common_words(vocab=2048 if target.device == "cpu" else 16_384, device=target.device)
    x, weight, targets = case.hidden, case.weight, case.targets
    tokens = torch.arange(len(x), device=target.device)
    columns = vocabulary_order(x, tokens, weight)
    weight, targets = weight[columns].contiguous(), columns.argsort()[targets]

    def written(epsilon: float) -> tuple[Tensor, Tensor, TileSums]:
        """What was stored, poison elsewhere; which of it takes part; and what tiles hold."""
        out = torch.empty(len(x), len(weight), dtype=BF16, device=target.device)
        gradient = exp_gemm_triton.exp_gemm(
            x,
            weight,
            tokens,
            targets,
            case.token_weights.float(),
            coefficient="weight",
            logps=torch.empty(len(x), device=target.device),
            out=out,
            epsilon=epsilon,
        )
        tiles, _ = kept_tiles(gradient.tiles, targets, tokens >= 0, epsilon)
        kept = tiles.kept.repeat_interleave(tiles.rows, 0)[: len(x)]
        return out, kept.repeat_interleave(tiles.columns, 1)[:, : len(weight)], gradient.tiles

    out, kept, tiles = written(2.0**-6)
    assert out[kept].isfinite().all()
    assert out[~kept].isnan().float().mean() > 0.5  # still the poison
    shares = (tiles.sums / tiles.totals[:, None]).amax(0)
    for tile in range(exp_gemm_triton.FIRST_TILES, len(shares), 4):
        # The tile's largest share is just enough to take part.
        out, kept, _ = written(0.95 * float(shares[tile]))
        assert out[kept].isfinite().all()


@pytest.mark.skipif(not EXP_TARGETS, reason="Triton has neither a card nor its interpreter")
@pytest.mark.parametrize("repaired", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_backends_leave_the_same_out(repaired: bool) -> None:
    """On the interpreter their tiles are alike; a card's are larger, and it leaves out less."""
    got = []
    for target in TARGETS:
        case = common_words(vocab=1100, device=target.device)
        if repaired:  # two tokens whose targets lie so far down that their rows are done again
            other = case.weight[700].float() - case.weight[case.targets[3]].float()
            hidden = case.hidden.clone()
            hidden[[3, 20]] = (60 * other).to(BF16)
            case = replace(case, hidden=hidden)
        out, grads = run(partial(filtered_redi_loss, epsilon=2.0**-6), case, backend=target.backend)
        got.append((out.sequence_dropped.cpu(), grads))
    (first, a), (second, b) = got
    if TARGETS[1].device == "cuda":
        assert second.mean() <= first.mean()
        return
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    for one, other in zip(a, b, strict=True):
        assert (one - other).float().norm() < 4e-3 * one.float().norm()


@pytest.mark.parametrize("alpha", [pytest.param(0.0, marks=pytest.mark.slow), 0.8])
def test_tokens_without_a_gradient_lose_nothing_and_any_chunks_will_do(
    target: Target, alpha: float
) -> None:
    case = replace(make_case(BF16, vocab=700, device=target.device), alpha=alpha)
    index = case.valid_index
    weighted = case.token_weights[index] != 0
    ordered = torch.cat([index[weighted], index[~weighted]])
    exact_out, exact = oracle(case)
    for options in (
        {},
        {"valid_index": index, "chunk_tokens": 7},
        {"valid_index": ordered, "num_with_grad": int(weighted.sum()), "chunk_tokens": 9},
    ):
        out, got = run(
            partial(filtered_redi_loss, epsilon=2.0**-10),
            case,
            backend=target.backend,
            **options,
        )
        assert_exact(got, case, exact)  # flat logits: next to nothing is left out
        assert not got.dhidden[case.token_weights == 0].any()
        without = (case.signs < 0) & (alpha == 0) | (out.sequence_lengths == 0)
        assert not out.sequence_dropped[without].any()
        assert (out.sequence_logps - exact_out.sequence_logps).abs().max() < 1e-3


@pytest.mark.parametrize("lengths", [(), (0, 0), (3, 0)])
def test_rows_with_nothing_to_learn_are_legal(target: Target, lengths: tuple[int, ...]) -> None:
    case = make_case(
        BF16, lengths=lengths, signs=(1, -1)[: len(lengths)], device=target.device, masked=0.0
    )
    case = replace(case, targets=torch.full_like(case.targets, -100))
    out, got = run(partial(filtered_redi_loss, epsilon=0.01), case, backend=target.backend)
    assert out.loss == 0
    for values in (out.sequence_logps, out.sequence_dropped, *got):
        assert not values.any()


def test_a_vocabulary_smaller_than_the_mask_s_number(target: Target) -> None:
    """Targets are looked up in the order, and -100 is no place in it."""
    case = make_case(BF16, vocab=13, device=target.device)
    _, got = run(partial(filtered_redi_loss, epsilon=0.01), case, backend=target.backend)
    assert_exact(got, case, oracle(case)[1])


def test_a_hidden_state_that_is_not_a_number_is_not_hidden(target: Target) -> None:
    """The training loop stops at a loss or gradient that is not finite."""
    case = common_words(device=target.device)
    hidden = case.hidden.clone()
    hidden[5, 3] = torch.nan
    case = replace(case, hidden=hidden)
    out, got = run(partial(filtered_redi_loss, epsilon=2.0**-6), case, backend=target.backend)
    assert out.loss.isnan()
    assert got.dhidden[5].isnan().all()


def test_an_operand_without_gradient_and_repeated_backward(target: Target) -> None:
    case = leaves(common_words(device=target.device))
    options = case.options | {"epsilon": 2.0**-6, "backend": target.backend}
    loss = filtered_redi_loss(*case.arguments, **options).loss
    both = gradients(loss, case.hidden, case.weight, retain_graph=True)
    for one, other in zip(both, gradients(-2 * loss, case.hidden, case.weight), strict=True):
        assert torch.equal(-2 * one, other)
    for frozen, kept in (("weight", "hidden"), ("hidden", "weight")):
        part = replace(case, **{frozen: getattr(case, frozen).detach()})
        (alone,) = torch.autograd.grad(
            filtered_redi_loss(*part.arguments, **options).loss, getattr(part, kept)
        )
        assert torch.equal(alone, getattr(both, f"d{kept}"))
    with torch.no_grad():
        assert not filtered_redi_loss(*case.arguments, **options).sequence_dropped.any()


def test_the_op_keeps_torch_s_contract_and_compiles_without_a_break(target: Target) -> None:
    case = leaves(common_words(tokens=8, vocab=300, hidden=24, device=target.device))
    arguments = *case.arguments[:3], case.token_weights, None, case.valid_index, None, None
    torch.library.opcheck(
        torch.ops.redi.signed_cross_entropy,
        (*arguments, target.backend, "weight", 0.01, (False, False, True, True)),
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden: Tensor, weight: Tensor) -> Tensor:
        return filtered_redi_loss(
            hidden,
            weight,
            *case.arguments[2:],
            **case.options,
            epsilon=0.01,
            backend=target.backend,
        ).loss

    expected = filtered_redi_loss(
        *case.arguments, **case.options, epsilon=0.01, backend=target.backend
    ).loss
    assert torch.equal(compiled(case.hidden, case.weight), expected)


def test_what_it_cannot_do_is_told() -> None:
    case = make_case(BF16)
    for epsilon in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\]"):
            filtered_redi_loss(*case.arguments, **case.options, epsilon=epsilon)
    with pytest.raises(
        TypeError, match=r"hidden must be bfloat16 for a filter, got torch\.float32"
    ):
        filtered_redi_loss(*case.to(torch.float32).arguments, **case.options, epsilon=0.1)
    with pytest.raises(ValueError, match="sequence_weights must have one entry for each sequence"):
        filtered_redi_loss(
            *case.arguments, **case.options, epsilon=0.1, sequence_weights=torch.ones(2)
        )
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'torch', 'triton-exp'"):
        filtered_redi_loss(*case.arguments, **case.options, epsilon=0.1, backend="triton")


@pytest.mark.parametrize("target", EXP_TARGETS, ids="-".join)
def test_the_exact_loss_is_untouched(target: Target) -> None:
    """Without a filter every tile is written and multiplied."""
    case = common_words(device=target.device)
    _, got = run(redi_loss, case, backend=target.backend)
    summed = got.dhidden[:, ONES].double() / case.token_weights
    assert summed.abs().max() < 2e-3
