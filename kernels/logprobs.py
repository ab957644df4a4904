"""Log-probs of given tokens, differentiable for any upstream gradient.

For objectives whose token weights are known only after the log-probs (DPO, SimPO, TOPR, ...).
Backward needs p - onehot again: forward keeps it where it fits a budget (3 matrix products in
all), else backward computes the logits a second time (4 products).

Entropies and log-sum-exps have other gradients, p (log p + H) and p, which what is kept does not
determine: where they are wanted backward always computes the logits again.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from redi.kernels import reference
from redi.kernels.backends import choose_backend, kernels_of
from redi.kernels.chunk_sizes import padded
from redi.kernels.chunked import Outputs, TokenSchedule, cross_entropy_chunks, kept_gradient_chunks
from redi.kernels.loss_ops import asked, needs_grad, optional_float
from redi.kernels.reference import IGNORE_INDEX, Backend, accumulation_dtype
from redi.kernels.softmax import GradientRows, Terms
from redi.kernels.validate import (
    check_choice,
    check_logits,
    check_operands,
    check_schedule,
    check_statistics,
    check_target_values,
)

# What keep="auto" may keep: on a CPU, and as a share of a GPU's memory (80 GiB: 10 GiB).
CPU_KEEP_BYTES = 1 << 30
GPU_KEEP_SHARE = 8


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    logit_scale: float = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    keep: bool | Literal["auto"] = ...,
    valid_index: Tensor | None = ...,
    backend: Backend = ...,
    chunk_tokens: int | None = ...,
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool = ...,
    log_sum_exp: bool = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    keep: bool | Literal["auto"] = ...,
    valid_index: Tensor | None = ...,
    backend: Backend = ...,
    chunk_tokens: int | None = ...,
) -> Tensor | tuple[Tensor, ...]: ...
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    log_sum_exp: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    keep: bool | Literal["auto"] = "auto",
    valid_index: Tensor | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probs of the targets: logp_t = log softmax(z_t)[targets_t], z = hidden weight^T.

    Args:
        hidden, weight, targets, logit_scale, softcap, ignore_index, valid_index, backend,
            chunk_tokens: as for `redi_loss`.
        entropy: whether to return the tokens' entropies - sum_j p_j log p_j as well.
        log_sum_exp: whether to return the log-sum-exps of the tokens' logits as well.
        keep: True keeps a tensor of N x V (T x V without `valid_index`) in hidden's dtype for
            backward, False recomputes the logits in backward, "auto" keeps what fits 1 GiB on a
            CPU and an eighth of a GPU's total memory. It does not look at what is free: kept and
            recomputed gradients are rounded differently, and a resumed run must choose as the
            first one did. Nothing is kept where no gradient is needed. With `entropy` or
            `log_sum_exp` backward recomputes, as the kept tensor does not determine their
            gradients; True is an error.

    Returns:
        token_logps in the shape of targets, float32 (float64 for float64 inputs), never above 0,
        and 0 where masked. With `entropy` or `log_sum_exp` a tuple: token_logps, then entropies,
        then log-sum-exps, those wanted, of the same shape. All are differentiable once, for any
        upstream gradient, any number of times. The gradients have the dtype of hidden and weight.

    Raises:
        TypeError, ValueError: as `redi_loss`.
    """
    given_targets = targets
    hidden, weight, targets = check_operands(hidden, weight, targets, ignore_index)
    shape = given_targets.shape
    check_schedule(valid_index, chunk_tokens, hidden)
    check_logits(logit_scale, softcap)
    check_statistics(entropy, log_sum_exp)
    check_choice("keep", keep, ("auto", True, False))
    if entropy or log_sum_exp:
        if keep is True:
            raise ValueError(
                "keep=True keeps what the gradient of log-probs alone needs: use keep=False with "
                "entropy or log_sum_exp"
            )
        keep = False
    backend = choose_backend(backend, hidden.device, hidden.dtype, hidden.shape[1])
    if backend == "reference":
        check_target_values(targets, weight.shape[0], valid_index)
        made = reference.linear_logprobs(
            hidden,
            weight,
            targets,
            entropy=entropy,
            log_sum_exp=log_sum_exp,
            logit_scale=logit_scale,
            softcap=softcap,
        )
        if isinstance(made, Tensor):
            return made.view(shape)
        return tuple(values.view(shape) for values in made)
    if keep == "auto":
        rows = hidden.shape[0] if valid_index is None else valid_index.shape[0]
        keep = rows * weight.shape[0] * hidden.element_size() <= _keep_budget(hidden.device)
    terms = Terms(float(logit_scale), optional_float(softcap))
    if backend == "triton-exp" and not terms.are_plain:
        backend = "triton"  # as which it is computed: `_new_kept` depends on it
    logps, _, _, entropies, lses = _linear_logprobs_op(
        hidden,
        weight,
        targets,
        valid_index,
        backend,
        chunk_tokens,
        keep and any(needs_grad(hidden, weight)),
        (entropy, log_sum_exp),
        terms.logit_scale,
        terms.softcap,
    )
    results = [v.view(shape) for v in asked(entropy, log_sum_exp, logps, entropies, lses)]
    return tuple(results) if entropy or log_sum_exp else results[0]


@torch.compiler.assume_constant_result
def _keep_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_KEEP_BYTES
    return torch.cuda.get_device_properties(device).total_memory // GPU_KEEP_SHARE


def _new_kept(
    hidden: Tensor, weight: Tensor, valid_index: Tensor | None, backend: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """(matrix, parts): uninitialised memory for `_kept`, empty where nothing is kept."""
    # Not len(): torch.compile would take the number for a constant.
    rows = (hidden if valid_index is None else valid_index).shape[0] if keep else 0
    parts = rows if backend == "triton-exp" else 0
    return (
        hidden.new_empty((rows, padded(weight.shape[0]))),
        hidden.new_empty((2, parts), dtype=torch.float32),
    )


def _kept(weight: Tensor, matrix: Tensor, parts: Tensor) -> GradientRows:
    """The memory as `cross_entropy_chunks` fills it; `parts` are factors and residues, or empty."""
    matrix = matrix[:, : weight.shape[0]]
    return GradientRows(matrix, *parts) if parts.shape[1] else GradientRows(matrix)


_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("redi::linear_logprobs", mutates_args=())
def _linear_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
    keep: bool,
    needs: Sequence[bool],
    logit_scale: float,
    softcap: float | None,
) -> _Results:
    """(token_logps, matrix, parts, entropies, lses): the two parts as `_new_kept` has them.

    `needs` is (entropies, lses); what is not needed is empty.
    """
    check_target_values(targets, weight.shape[0], valid_index)
    logps, matrix, parts, entropies, lses = results = _new_results(
        hidden, weight, valid_index, backend, keep, needs
    )
    need_entropies, need_lses = needs
    out = Outputs(
        logps=logps,
        entropies=entropies if need_entropies else None,
        lses=lses if need_lses else None,
        kept=_kept(weight, matrix, parts) if keep else None,
    )
    schedule = TokenSchedule(valid_index, None, chunk_tokens)
    terms = Terms(logit_scale, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        cross_entropy_chunks(
            hidden, weight, targets, None, out, schedule, kernels_of(backend), terms=terms
        )
    if keep:  # padding, which a kernel may have written to: results must be reproducible
        matrix[:, weight.shape[0] :].zero_()
    return results


def _new_results(
    hidden: Tensor,
    weight: Tensor,
    valid_index: Tensor | None,
    backend: str,
    keep: bool,
    needs: Sequence[bool],
) -> _Results:
    """Uninitialised results of `_linear_logprobs_op`."""
    dtype = accumulation_dtype(hidden.dtype)
    logps, entropies, lses = (
        hidden.new_empty(hidden.shape[:1] if needed else (0,), dtype=dtype)
        for needed in (True, *needs)
    )
    kept = _new_kept(hidden, weight, valid_index, backend, keep)
    return logps, *kept, entropies, lses


@_linear_logprobs_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
    keep: bool,
    needs: Sequence[bool],
    *_: Any,
) -> _Results:
    return _new_results(hidden, weight, valid_index, backend, keep, needs)


@torch.library.custom_op("redi::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward_op(
    dlogps: Tensor | None,
    matrix: Tensor,
    parts: Tensor,
    dentropies: Tensor | None,
    dlses: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
    keep: bool,
    logit_scale: float,
    softcap: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight) in the operands' dtype; one that is not needed is empty."""
    dtype = accumulation_dtype(hidden.dtype)
    dhidden, dweight = (
        operand.new_empty(operand.shape, dtype=dtype) if needed else None
        for operand, needed in zip((hidden, weight), needs, strict=True)
    )
    # As weights of a loss - sum w logp - sum e H + sum l lse.
    weights = hidden.new_zeros(hidden.shape[0], dtype=dtype) if dlogps is None else -dlogps
    operands, out = (hidden, weight, targets, weights), Outputs(dhidden=dhidden, dweight=dweight)
    schedule = TokenSchedule(valid_index, None, chunk_tokens)
    terms = Terms(
        logit_scale,
        softcap,
        entropy_weights=None if dentropies is None else -dentropies,
        lse_weights=dlses,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        if keep:
            kept = _kept(weight, matrix, parts)
            kept_gradient_chunks(kept, *operands, out, schedule, logit_scale)
        else:
            cross_entropy_chunks(*operands, out, schedule, kernels_of(backend), terms=terms)
    return (
        hidden.new_empty(0) if dhidden is None else dhidden.to(hidden.dtype),
        weight.new_empty(0) if dweight is None else dweight.to(weight.dtype),
    )


@_linear_logprobs_backward_op.register_fake
def _(
    dlogps: Tensor | None,
    matrix: Tensor,
    parts: Tensor,
    dentropies: Tensor | None,
    dlses: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    need_dhidden, need_dweight = arguments[-1]
    return (
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        weight.new_empty(weight.shape if need_dweight else (0,)),
    )


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, backend, chunk_tokens, keep, (need_entropies, need_lses), scale, softcap = inputs
    ctx.options = backend, chunk_tokens, keep, scale, softcap
    _, matrix, parts, entropies, lses = output
    ctx.save_for_backward(matrix, parts, *operands)
    unused = [] if need_entropies else [entropies]
    unused += [] if need_lses else [lses]
    ctx.mark_non_differentiable(matrix, parts, *unused)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    dlogps: Tensor | None,
    _matrix: None,
    _parts: None,
    *dstatistics: Tensor | None,
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    grads: tuple[Tensor | None, ...] = (None, None)
    if any(gradient is not None for gradient in (dlogps, *dstatistics)):
        matrix, parts, *operands = ctx.saved_tensors
        made = _linear_logprobs_backward_op(
            dlogps, matrix, parts, *dstatistics, *operands, *ctx.options, needs
        )
        grads = tuple(g if needed else None for g, needed in zip(made, needs, strict=True))
    return *grads, *(None,) * 8


_linear_logprobs_op.register_autograd(_backward, setup_context=_save_operands)
