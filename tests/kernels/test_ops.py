"""The loss ops as citizens of PyTorch: custom ops, torch.compile, autocast, errors."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import Case, Target, gradients, leaves, make_case, relative_error, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from redi.kernels import (
    backends,
    linear_logprobs,
    redi_loss,
    redi_value_and_grad,
    reference,
    segment_sum,
    signed_cross_entropy,
)


def small(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Case:
    return make_case(dtype, vocab=23, hidden=6, lengths=(5, 0, 7), signs=(1, 1, -1), device=device)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("with_index", [pytest.param(False, marks=pytest.mark.slow), True])
def test_custom_ops_keep_their_contract(
    target: Target, dtype: torch.dtype, with_index: bool
) -> None:
    # As few tokens as make two chunks: each op runs some ten times.
    case = leaves(
        make_case(
            dtype, vocab=23, hidden=6, lengths=(2, 0, 2), signs=(1, 1, -1), device=target.device
        )
    )
    index, counted = (case.valid_index, len(case.valid_index)) if with_index else (None, None)
    ops = torch.ops.redi
    schedule = index, counted, 2
    weights = case.token_weights
    for need in ((True, True), (True, False), (False, True)):
        hidden, weight = (
            operand.detach().requires_grad_(needed)
            for operand, needed in zip((case.hidden, case.weight), need, strict=True)
        )
        options = target.backend, "dft", None, (need[0], need[1], *need), 0.5, 8.0, 0.0, 0.1
        bonus = weights if need[0] else None
        opcheck(
            ops.signed_cross_entropy.default,
            (hidden, weight, case.targets, weights, bonus, *schedule, *options),
        )
    # With a softcap the public function passes "triton" for "triton-exp".
    softcap = None if target.backend == "triton-exp" else 8.0
    for keep, needs in ((True, (False, False)), (False, (True, False)), (False, (True, True))):
        opcheck(
            ops.linear_logprobs.default,
            (*case.arguments[:3], index, target.backend, 2, keep, needs, 0.5, softcap),
        )
    opcheck(
        ops.accumulate_gradient.default,
        (
            case.hidden.detach(),
            case.weight.detach(),
            case.targets,
            weights,
            *schedule,
            target.backend,
            2.0,
            torch.zeros(case.weight.shape, device=target.device),
            True,
            0.5,
            8.0,
        ),
    )


def test_the_small_ops_keep_their_contract(target: Target) -> None:
    case = small(device=target.device)
    values = torch.randn(case.targets.shape, device=target.device, requires_grad=True)
    opcheck(
        torch.ops.redi.token_weights.default,
        (*case.arguments[2:], 0.8, 3.0, torch.float32, target.backend),
    )
    opcheck(torch.ops.redi.segment_sum.default, (values, case.cu_seqlens, target.backend))
    sums = torch.randn(3, device=target.device, requires_grad=True)
    opcheck(
        torch.ops.redi.segment_sum_backward.default, (sums, case.cu_seqlens, 12, target.backend)
    )
    opcheck(
        torch.ops.redi.scale_gradient.default,
        (case.hidden, torch.tensor(2.0, device=target.device), torch.bfloat16),
    )


def _compiled_step(backend: str) -> Any:
    def step(case_arguments: tuple[Tensor, ...], num_pairs: int, token_weights: Tensor) -> Tensor:
        hidden, weight, targets, cu_seqlens, signs = case_arguments
        trunk = torch.tanh(hidden)  # something to fuse with, before and after
        out = redi_loss(
            trunk, weight, targets, cu_seqlens, signs, alpha=0.8, num_pairs=num_pairs,
            backend=backend,
        )  # fmt: skip
        loss, _ = signed_cross_entropy(trunk, weight, targets, token_weights, backend=backend)
        logps = segment_sum(
            linear_logprobs(trunk, weight, targets, backend=backend), cu_seqlens, backend=backend
        )
        return 3 * out.loss + loss + torch.sigmoid(logps).sum() + out.sequence_logps.mean()

    return step


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiles_without_graph_breaks_at_any_length(target: Target, compiler: str) -> None:
    torch.compiler.reset()
    step = _compiled_step(target.backend)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for lengths, num_pairs in (((5, 7), 3), ((9, 2), 4), ((4, 4), 5)):
        case = leaves(make_case(lengths=lengths, signs=(1, -1), device=target.device))
        weights = torch.ones(sum(lengths), device=target.device)
        got = compiled(case.arguments, num_pairs, weights)
        expected = step(case.arguments, num_pairs, weights)
        torch.testing.assert_close(got, expected)
        got_gradients = gradients(got, case.hidden, case.weight)
        expected_gradients = gradients(expected, case.hidden, case.weight)
        for value, true in zip(got_gradients, expected_gradients, strict=True):
            assert relative_error(value, true) < 1e-6


def test_auto_compiles_once_for_all_lengths_and_all_options() -> None:
    torch.compiler.reset()

    def step(hidden: Tensor, weight: Tensor, targets: Tensor, bonus: Tensor) -> Tensor:
        bounds = torch.tensor([0, hidden.shape[0]])
        out = redi_loss(
            hidden, weight, targets, bounds, torch.tensor([1]), alpha=0.8, num_pairs=2, softcap=9.0
        )
        loss, *_ = signed_cross_entropy(
            hidden, weight, targets, bonus, entropy_weights=bonus, z_loss=0.1, label_smoothing=0.1,
            log_sum_exp=True,
        )  # fmt: skip
        results = linear_logprobs(hidden, weight, targets, entropy=True, logit_scale=0.5)
        return out.loss + loss + sum(values.sum() for values in results)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for tokens in (12, 7, 9):
        case = leaves(make_case(lengths=(tokens,), signs=(1,)))
        arguments = *case.arguments[:3], torch.linspace(-1, 1, tokens)
        got, expected = compiled(*arguments), step(*arguments)
        torch.testing.assert_close(got, expected)
        compiled_gradients = gradients(got, case.hidden, case.weight)
        for value, true in zip(
            compiled_gradients, gradients(expected, case.hidden, case.weight), strict=True
        ):
            assert relative_error(value, true) < 1e-6
        compilations.append(counter.frame_count)
    # The first may count twice: torch begins again where it took an option for a symbol.
    assert len(set(compilations)) == 1


def test_value_and_grad_compiles_and_adds_in_place(target: Target) -> None:
    torch.compiler.reset()
    case = small(device=target.device)

    def step(dweight: Tensor) -> Tensor:
        return redi_value_and_grad(
            *case.arguments, **case.options, dweight=dweight, backend=target.backend
        )[1]

    expected, got = torch.ones_like(case.weight), torch.ones_like(case.weight)
    dhidden = step(expected)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(got), dhidden)
    torch.testing.assert_close(got, expected)


def test_only_the_loss_carries_a_graph(target: Target) -> None:
    case = leaves(small(device=target.device))
    out = redi_loss(*case.arguments, **case.options, backend=target.backend)
    assert out.loss.requires_grad
    assert not out.sequence_logps.requires_grad
    loss, logps = signed_cross_entropy(
        *case.arguments[:3], case.token_weights, backend=target.backend
    )
    assert loss.requires_grad
    assert not logps.requires_grad
    value, dhidden, dweight = redi_value_and_grad(
        *case.arguments, **case.options, backend=target.backend
    )
    assert not any(t.requires_grad for t in (*value, dhidden, dweight))


def test_a_second_derivative_raises_instead_of_being_wrong(target: Target) -> None:
    case = leaves(small(device=target.device))
    losses = [
        redi_loss(*case.arguments, **case.options, backend=target.backend).loss,
        linear_logprobs(*case.arguments[:3], backend=target.backend).sum(),
    ]
    for loss in losses:
        (dhidden,) = torch.autograd.grad(loss * loss, case.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            dhidden.sum().backward()


def test_the_result_is_a_tree_of_tensors() -> None:
    case = small()
    out = redi_loss(*case.arguments, **case.options)
    flat, _ = torch.utils._pytree.tree_flatten(out)
    assert [type(leaf) for leaf in flat] == [Tensor] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_does_not_change_a_bit(target: Target, dtype: torch.dtype) -> None:
    case = make_case(dtype, device=target.device)
    out, expected = run(redi_loss, case, backend=target.backend)
    moved = leaves(case)
    weights = case.token_weights
    with torch.autocast(target.device, torch.bfloat16):
        inside = redi_loss(*moved.arguments, **moved.options, backend=target.backend)
        got = gradients(inside.loss, moved.hidden, moved.weight)
        signed, _ = signed_cross_entropy(*case.arguments[:3], weights, backend=target.backend)
        logps = linear_logprobs(*case.arguments[:3], backend=target.backend)
        ref = reference.redi_loss(*case.arguments, **case.options)
    assert torch.equal(inside.loss, out.loss)
    for value, true in zip(got, expected, strict=True):
        assert torch.equal(value, true)
    outside, _ = signed_cross_entropy(*case.arguments[:3], weights, backend=target.backend)
    assert torch.equal(signed, outside)
    assert torch.equal(logps, linear_logprobs(*case.arguments[:3], backend=target.backend))
    assert torch.equal(ref.loss, reference.redi_loss(*case.arguments, **case.options).loss)


def test_autocast_casts_operands_of_two_dtypes_as_linear_would(target: Target) -> None:
    case = leaves(make_case(torch.float32, device=target.device))
    rounded = case.to(torch.bfloat16)
    mixed = replace(case, hidden=rounded.hidden)
    with torch.autocast(target.device, torch.bfloat16):
        loss = redi_loss(*mixed.arguments, **mixed.options, backend=target.backend).loss
    (dweight,) = torch.autograd.grad(loss, case.weight)
    assert dweight.dtype == torch.float32
    expected = redi_loss(*rounded.arguments, **rounded.options, backend=target.backend).loss
    assert torch.equal(loss, expected)


def test_the_reference_is_a_backend() -> None:
    case = make_case(torch.float32)
    weights = case.token_weights.float()
    for module_op, arguments, options in (
        (redi_loss, case.arguments, case.options),
        (redi_value_and_grad, case.arguments, case.options),
        (signed_cross_entropy, (*case.arguments[:3], weights), {}),
        (linear_logprobs, case.arguments[:3], {}),
    ):
        reference_op = getattr(reference, module_op.__name__)
        got = module_op(*arguments, **options, backend="reference")
        expected = reference_op(*arguments, **options)
        flat_got, _ = torch.utils._pytree.tree_flatten(got)
        flat_expected, _ = torch.utils._pytree.tree_flatten(expected)
        for value, true in zip(flat_got, flat_expected, strict=True):
            assert torch.equal(value, true)


def test_an_exact_loss_on_a_cpu_imports_no_triton_kernels_and_nothing_experimental() -> None:
    code = """
import sys, torch, redi.kernels as k
x = torch.ones(2, 3)
targets, bounds, signs = torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([1])
k.redi_loss(x, x, targets, bounds, signs, alpha=1, num_pairs=1)
ours = [name for name in sys.modules if name.startswith("redi.kernels")]
print([name for name in ours if "triton" in name or "experimental" in name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def _changed(**changes: Any) -> dict[str, Any]:
    case = small()
    arguments: dict[str, Any] = {
        "hidden": case.hidden,
        "weight": case.weight,
        "targets": case.targets,
        "cu_seqlens": case.cu_seqlens,
        "signs": case.signs,
        "alpha": 0.8,
        "num_pairs": 3,
    }
    for name, change in changes.items():
        arguments[name] = change(arguments.get(name)) if callable(change) else change
    return arguments


def _with(position: int, value: int) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[position] = value
        return tensor

    return change


WRONG = [
    ({"hidden": lambda h: h.tolist()}, TypeError, "hidden must be a tensor, got list"),
    ({"hidden": lambda h: h.long()}, TypeError, "hidden must be float16 or .* got torch.int64"),
    ({"hidden": lambda h: h[0]}, ValueError, r"hidden must have shape \[..., D\], got \(6,\)"),
    ({"hidden": lambda h: h[None]}, ValueError, r"targets .* shape \(1, 12\), got \(12,\)"),
    ({"hidden": lambda h: h[:, :5]}, ValueError, r"must agree in D, got \(12, 5\) and \(23, 6\)"),
    ({"hidden": lambda h: h.bfloat16()}, TypeError, "same dtype, got torch.bfloat16 and"),
    ({"weight": lambda w: w[0]}, ValueError, r"weight must have shape \[V, D\], got \(6,\)"),
    ({"weight": lambda w: w[:0]}, ValueError, r"V >= 1 and D >= 1, got \(0, 6\)"),
    ({"weight": lambda w: w.to("meta")}, ValueError, "weight must be on cpu .* got meta"),
    ({"targets": lambda t: t.int()}, TypeError, "targets must be int64, got torch.int32"),
    ({"targets": lambda t: t[:-1]}, ValueError, r"targets .* shape \(12,\), got \(11,\)"),
    ({"targets": _with(3, 23)}, ValueError, r"targets must be in \[0, 23\) or -100, got 23 at p"),
    ({"targets": _with(3, -1)}, ValueError, "targets must be in .* got -1 at position 3"),
    ({"cu_seqlens": lambda c: c.float()}, TypeError, "cu_seqlens must be int32 or int64"),
    ({"cu_seqlens": lambda c: c[:0]}, ValueError, "cu_seqlens must have S . 1 >= 1 entries"),
    ({"cu_seqlens": _with(1, 8)}, ValueError, "cu_seqlens must not fall, got 8 then 5 at 2"),
    ({"cu_seqlens": _with(-1, 11)}, ValueError, "from 0 to T = 12, got 0 to 11"),
    ({"cu_seqlens": _with(0, 1)}, ValueError, "from 0 to T = 12, got 1 to 12"),
    ({"signs": lambda s: s[:2]}, ValueError, r"signs .* shape \(3,\) for .* got \(2,\)"),
    ({"signs": lambda s: s.float()}, TypeError, "signs must be int8 or .* got torch.float32"),
    ({"signs": _with(1, 2)}, ValueError, r"signs must be \+1, -1 or 0, got 2 at sequence 1"),
    ({"alpha": -0.1}, ValueError, "alpha must be finite and >= 0, got -0.1"),
    ({"alpha": float("nan")}, ValueError, "alpha must be finite and >= 0, got nan"),
    ({"alpha": "0.8"}, TypeError, "alpha must be a number, got '0.8'"),
    ({"num_pairs": 0}, ValueError, "num_pairs must be finite and > 0, got 0"),
    ({"num_pairs": None}, TypeError, "num_pairs must be a number, got None"),
    ({"logit_scale": "2"}, TypeError, "logit_scale must be a number, got '2'"),
    ({"softcap": True}, TypeError, "softcap must be a number or None, got True"),
    ({"ignore_index": "-1"}, TypeError, "ignore_index must be an int, got '-1'"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
    ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', .* got 'cuda'"),
    (
        {"num_with_grad": 3},
        ValueError,
        "num_with_grad counts tokens of valid_index: pass valid_in",
    ),
    (
        {"valid_index": lambda _: torch.tensor([0]), "num_with_grad": 2},
        ValueError,
        "num_with_grad must be from 0 to N = 1, got 2",
    ),
    (
        {"valid_index": lambda _: small().valid_index, "num_with_grad": 1},
        ValueError,
        "valid_index must name the tokens that have a gradient first: .* = 1, [0-9]+ have a weight",
    ),
    ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be a positive int or None, got 0"),
    ({"chunk_tokens": 2.5}, TypeError, "chunk_tokens must be a positive int or None, got 2.5"),
    (
        {"valid_index": lambda _: torch.zeros(3)},
        TypeError,
        "valid_index must be int32 or int64, got torch.float32",
    ),
    (
        {"valid_index": lambda _: torch.zeros(13, dtype=torch.int64)},
        ValueError,
        "valid_index must have at most T = 12 entries, got 13",
    ),
    (
        {"valid_index": lambda _: torch.tensor([12])},
        ValueError,
        r"valid_index must hold positions in \[0, 12\), got 12 to 12",
    ),
    (
        {"valid_index": lambda _: torch.tensor([0, 0])},
        ValueError,
        "valid_index must hold each position with targets != -100 once, got 2 entries",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_a_wrong_argument_is_named_with_what_it_got_and_needs(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        redi_loss(**_changed(**changes))
    with pytest.raises(error, match=message):
        redi_value_and_grad(**_changed(**changes))


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (True, "needs a GPU, .* on cpu: .* TRITON_INTERPRET=1"),
        (False, "needs the package triton: install it or use"),
    ],
)
def test_triton_where_it_cannot_run_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, installed: bool, message: str
) -> None:
    monkeypatch.setattr(backends, "TRITON_INSTALLED", installed)
    monkeypatch.setattr(backends, "TRITON_INTERPRETS", False)
    case = small()
    calls = [
        lambda: redi_loss(*case.arguments, **case.options, backend="triton"),
        lambda: linear_logprobs(*case.arguments[:3], backend="triton"),
        lambda: segment_sum(torch.zeros(12), case.cu_seqlens, backend="triton"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert backends.choose_backend("auto", torch.device("cpu")) == "torch"


def test_triton_refuses_float64() -> None:
    if not (backends.TRITON_INSTALLED and backends.TRITON_INTERPRETS):
        pytest.skip("without the interpreter the CPU itself is refused")
    case = small(torch.float64)
    with pytest.raises(TypeError, match='computes in float32: use "torch" for float64'):
        redi_loss(*case.arguments, **case.options, backend="triton")


@pytest.mark.parametrize(("installed", "chosen"), [(True, "triton"), (False, "torch")])
def test_auto_is_triton_on_a_gpu_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: bool, chosen: str
) -> None:
    monkeypatch.setattr(backends, "TRITON_INSTALLED", installed)
    assert backends.choose_backend("auto", torch.device("cuda")) == chosen


@pytest.mark.parametrize(
    ("dweight", "error", "message"),
    [
        (torch.zeros(23, 6).bfloat16(), TypeError, "dweight must be float32, got torch.bfloat16"),
        (torch.zeros(6, 23), ValueError, r"weight's shape \(23, 6\), got \(6, 23\)"),
        (torch.zeros(6, 23).T, ValueError, "dweight must be contiguous, got strides"),
        (torch.zeros(23, 6, requires_grad=True), ValueError, "must not require a gradient"),
    ],
)
def test_a_wrong_dweight_is_named(dweight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        redi_value_and_grad(**_changed(dweight=dweight))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_weights": torch.ones(11)}, ValueError, r"token_weights .* \(12,\), got \(11,\)"),
        ({"token_weights": torch.ones(12).long()}, TypeError, "token_weights must be float16 or"),
        (
            {"token_weights": torch.ones(12, requires_grad=True)},
            ValueError,
            "token_weights gets no gradient",
        ),
        (
            {"token_weights": torch.full((12,), torch.inf)},
            ValueError,
            "token_weights must be finite, got inf at position",
        ),
        ({"coefficient": "mle"}, ValueError, "coefficient must be one of 'weight', 'dft'"),
    ],
)
def test_wrong_token_weights_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    case = small()
    arguments = {"token_weights": torch.ones(12), "coefficient": "weight"} | changes
    with pytest.raises(error, match=message):
        signed_cross_entropy(*case.arguments[:3], **arguments)


def test_a_wrong_scale_of_the_gradients_is_named() -> None:
    with pytest.raises(TypeError, match="grad_scale must be a number, got '2'"):
        redi_value_and_grad(**_changed(grad_scale="2"))


def test_values_that_are_no_tensor_are_named() -> None:
    with pytest.raises(TypeError, match="values must be a tensor, got list"):
        segment_sum([1.0, 2.0], torch.tensor([0, 2]))


def test_numbers_of_numpy_and_tensors_of_one_are_numbers() -> None:
    expected = redi_loss(**_changed(alpha=0.5, softcap=30.0, chunk_tokens=4)).loss
    numbers = {"alpha": torch.tensor(0.5), "softcap": np.float32(30), "chunk_tokens": np.int64(4)}
    assert torch.equal(redi_loss(**_changed(**numbers)).loss, expected)


def test_a_wrong_keep_is_named() -> None:
    with pytest.raises(ValueError, match="keep must be one of 'auto', True, False, got 'yes'"):
        linear_logprobs(*small().arguments[:3], keep="yes")
