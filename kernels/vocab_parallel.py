"""The losses where the lm_head's rows are divided among the ranks of a process group.

For tensor parallelism: rank i holds rows of the lm_head (uneven shards and empty ones too), and
`hidden`, `targets` and the tokens' weights are the same on all ranks. Each function is the one
without `vocab_parallel_` in its name, over the rows of all ranks one after the other:

    vocab_parallel_redi_loss(x, shard, ..., group=g)  =  redi_loss(x, torch.cat(shards), ...)

This file has the public functions and their `torch.library` ops, which are opaque to autograd and
torch.compile as those of `loss_ops.py` are, and take the group by its name as torch's functional
collectives do. `vocab_shards.py` has the loop and its collectives.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from redi.kernels.backends import choose_backend
from redi.kernels.chunked import Outputs, TokenSchedule
from redi.kernels.loss_ops import (
    LossResults,
    asked,
    needs_grad,
    new_gradient,
    new_results,
    optional_float,
    save_gradients,
    scale_gradients,
    terms_and_outputs,
    token_weights_op,
    total_loss,
)
from redi.kernels.reference import (
    IGNORE_INDEX,
    Backend,
    Coefficient,
    RediLoss,
    accumulation_dtype,
)
from redi.kernels.segment_sum import segment_sum_op
from redi.kernels.softmax import Terms
from redi.kernels.validate import (
    check_choice,
    check_logits,
    check_objective,
    check_operands,
    check_schedule,
    check_sequences,
    check_statistics,
    check_terms,
    check_token_weights,
    check_weight_values,
)
from redi.kernels.vocab_shards import vocab_parallel_chunks


def vocab_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    group: "dist.ProcessGroup",
    coefficient: Coefficient = "weight",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy_weights: Tensor | None = None,
    entropy: bool = False,
    log_sum_exp: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    valid_index: Tensor | None = None,
    num_with_grad: int | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """`signed_cross_entropy` over the rows of the lm_head that the ranks of a group hold.

    All ranks of the group must call it. It exchanges the sizes of shards once, gathers 3 to 5
    numbers per token of a chunk, and all-reduces the chunk's rows of the gradient by `hidden` where
    that is needed.

    Args:
        hidden: [T, D], the same on all ranks.
        weight: [V_i, D] this rank's rows of the lm_head; V_i may differ between ranks and be 0. The
            vocabulary is that of rank 0 of the group, then that of rank 1, and so on. Leave padding
            out: `weight[:rows]`. Of a DTensor sharded by rows: `weight.to_local()`.
        targets: [T] int64 in [0, sum of all V_i), or -100; the same on all ranks.
        token_weights: [T], the same on all ranks.
        group: of torch.distributed. Of a DeviceMesh: `mesh.get_group("tp")`.
        backend: "auto", "torch" or "triton"; the others do not divide the vocabulary.
        chunk_tokens: number of logits rows held in memory at a time; the least of all ranks counts.
        The other arguments are those of `signed_cross_entropy`, the same on all ranks.

    Returns:
        As `signed_cross_entropy`: (loss, token_logps) and with `entropy` the entropies, bit-equal
        on all ranks. The gradient by `hidden` is that of the whole vocabulary, already summed over
        the ranks: nothing else must sum it. The gradient by `weight` is that of this rank's rows.
        Both have the dtype of hidden and weight. Backward makes no collective; second derivatives
        raise.

    Raises:
        TypeError, ValueError: as `signed_cross_entropy`; and on all ranks if they differ in T, D,
            dtype, or the number of tokens. Where values are checked (on the CPU, elsewhere with
            REDI_DEBUG=1), also if they differ in targets, token_weights or valid_index.
    """
    schedule = valid_index, num_with_grad, chunk_tokens
    operands, chosen = _check(
        hidden, weight, targets, ignore_index, group, backend, schedule, logit_scale, softcap
    )
    check_terms(coefficient, label_smoothing, z_loss)
    check_statistics(entropy, log_sum_exp)
    token_weights = check_token_weights("token_weights", token_weights, targets)
    if entropy_weights is not None:
        entropy_weights = check_token_weights("entropy_weights", entropy_weights, targets)
    needs = entropy, log_sum_exp, *needs_grad(hidden, weight)
    loss, logps, entropies, lses, *_ = vocab_parallel_cross_entropy_op(
        *operands, token_weights, entropy_weights, *schedule, chosen, coefficient,
        group.group_name, needs, float(logit_scale), optional_float(softcap),
        float(label_smoothing), float(z_loss),
    )  # fmt: skip
    results = asked(entropy, log_sum_exp, logps, entropies, lses)
    return loss, *(values.view(targets.shape) for values in results)


def vocab_parallel_redi_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    signs: Tensor,
    *,
    group: "dist.ProcessGroup",
    alpha: float,
    num_pairs: float,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    valid_index: Tensor | None = None,
    num_with_grad: int | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> RediLoss:
    """`redi_loss` over the rows of the lm_head that the ranks of a group hold.

    Args:
        cu_seqlens, signs, alpha, num_pairs: as for `redi_loss`, the same on all ranks. Each rank
            of the group returns the whole loss: do not add it up over the group.
        The other arguments are those of `vocab_parallel_cross_entropy`.

    Returns:
        RediLoss, bit-equal on all ranks; gradients as for `vocab_parallel_cross_entropy`.

    Raises:
        TypeError, ValueError: as `redi_loss` and `vocab_parallel_cross_entropy`.
    """
    schedule = valid_index, num_with_grad, chunk_tokens
    operands, chosen = _check(
        hidden, weight, targets, ignore_index, group, backend, schedule, logit_scale, softcap
    )
    hidden, _, targets = operands
    check_sequences(cu_seqlens, signs, hidden)
    check_objective(alpha, num_pairs)
    dtype = accumulation_dtype(hidden.dtype)
    token_weights, lengths = token_weights_op(
        targets, cu_seqlens, signs, float(alpha), float(num_pairs), dtype, chosen
    )
    needs = False, False, *needs_grad(hidden, weight)
    loss, logps, *_ = vocab_parallel_cross_entropy_op(
        *operands, token_weights, None, *schedule, chosen, "weight", group.group_name, needs,
        float(logit_scale), optional_float(softcap),
    )  # fmt: skip
    return RediLoss(loss, segment_sum_op(logps, cu_seqlens, chosen), lengths)


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: "dist.ProcessGroup",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    valid_index: Tensor | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> Tensor:
    """`linear_logprobs` over the rows of the lm_head that the ranks of a group hold.

    Nothing is kept for backward, which computes the logits again with the collectives of
    `vocab_parallel_cross_entropy`: all ranks must call it, with the same upstream gradient.

    Args:
        As for `vocab_parallel_cross_entropy`.

    Returns:
        token_logps [T] as of `linear_logprobs`, bit-equal on all ranks, differentiable once;
        gradients as for `vocab_parallel_cross_entropy`.

    Raises:
        TypeError, ValueError: as `vocab_parallel_cross_entropy`; in backward too, on all ranks, if
            the upstream gradient differs between them.
    """
    schedule = valid_index, None, chunk_tokens
    operands, chosen = _check(
        hidden, weight, targets, ignore_index, group, backend, schedule, logit_scale, softcap
    )
    return vocab_parallel_logprobs_op(
        *operands, valid_index, chunk_tokens, chosen, group.group_name, float(logit_scale),
        optional_float(softcap),
    ).view(targets.shape)  # fmt: skip


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    group: "dist.ProcessGroup",
    backend: Backend,
    schedule: tuple[Tensor | None, int | None, int | None],
    logit_scale: float,
    softcap: float | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Backend]:
    """((hidden [T, D], weight, targets [T]), the backend to use)."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a process group that this rank belongs to, got {type(group).__name__}: "
            'pass torch.distributed.group.WORLD, a new_group(...) or mesh.get_group("tp")'
        )
    if hasattr(weight, "full_tensor"):  # a DTensor, recognised without importing its module
        raise TypeError(
            "weight must be this rank's rows of the lm_head as a plain tensor, got a DTensor: pass "
            "weight.to_local() of one that is sharded by rows, Shard(0), over the group"
        )
    operands = check_operands(hidden, weight, targets, ignore_index, least_vocab=0)
    valid_index, num_with_grad, chunk_tokens = schedule
    check_schedule(valid_index, chunk_tokens, operands[0], num_with_grad)
    check_logits(logit_scale, softcap)
    check_choice("backend", backend, ("auto", "torch", "triton"))
    return operands, choose_backend(backend, hidden.device, operands[0].dtype)


@torch.library.custom_op("redi::vocab_parallel_cross_entropy", mutates_args=())
def vocab_parallel_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    entropy_weights: Tensor | None,
    valid_index: Tensor | None,
    num_with_grad: int | None,
    chunk_tokens: int | None,
    backend: str,
    coefficient: str,
    group: str,
    needs: Sequence[bool],
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossResults:
    """As `signed_cross_entropy_op` without a filter."""
    results = new_results(hidden, weight, None, needs)
    loss = results[0]
    numbers = logit_scale, softcap, label_smoothing, z_loss
    w = token_weights.to(loss.dtype)
    terms, out = terms_and_outputs(results, needs, w, entropy_weights, *numbers)
    schedule = TokenSchedule(valid_index, num_with_grad, chunk_tokens)
    for name, values in (("token_weights", token_weights), ("entropy_weights", entropy_weights)):
        if values is not None:
            check_weight_values(name, values, targets, valid_index, num_with_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        vocab_parallel_chunks(
            hidden, weight, targets, w, out, schedule, _group(group), backend, coefficient, terms
        )
        loss.copy_(total_loss(out, w, targets, coefficient, terms))
    return results


@vocab_parallel_cross_entropy_op.register_fake
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> LossResults:
    return new_results(hidden, weight, None, arguments[9])


vocab_parallel_cross_entropy_op.register_autograd(scale_gradients, setup_context=save_gradients)


@torch.library.custom_op("redi::vocab_parallel_logprobs", mutates_args=())
def vocab_parallel_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    chunk_tokens: int | None,
    backend: str,
    group: str,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """token_logps [T]."""
    logps = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    schedule = TokenSchedule(valid_index, None, chunk_tokens)
    out, terms = Outputs(logps=logps), Terms(logit_scale, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        vocab_parallel_chunks(
            hidden, weight, targets, None, out, schedule, _group(group), backend, terms=terms
        )
    return logps


@vocab_parallel_logprobs_op.register_fake
def _(hidden: Tensor, *arguments: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))


@torch.library.custom_op("redi::vocab_parallel_logprobs_backward", mutates_args=())
def vocab_parallel_logprobs_backward_op(
    dlogps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    chunk_tokens: int | None,
    backend: str,
    group: str,
    logit_scale: float,
    softcap: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight) in the operands' dtype; one that is not needed is empty."""
    dhidden, dweight = (
        new_gradient(operand, needed)
        for operand, needed in zip((hidden, weight), needs, strict=True)
    )
    need_dhidden, need_dweight = needs
    out = Outputs(
        dhidden=dhidden if need_dhidden else None, dweight=dweight if need_dweight else None
    )
    schedule, terms = TokenSchedule(valid_index, None, chunk_tokens), Terms(logit_scale, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        vocab_parallel_chunks(
            hidden, weight, targets, -dlogps, out, schedule, _group(group), backend, terms=terms
        )
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype)


@vocab_parallel_logprobs_backward_op.register_fake
def _(dlogps: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    need_dhidden, need_dweight = arguments[-1]
    return (
        new_gradient(hidden, need_dhidden).to(hidden.dtype),
        new_gradient(weight, need_dweight).to(weight.dtype),
    )


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx: Any, dlogps: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    made = vocab_parallel_logprobs_backward_op(dlogps, *ctx.saved_tensors, *ctx.options, needs)
    grads = (g if needed else None for g, needed in zip(made, needs, strict=True))
    return *grads, *(None,) * 7


vocab_parallel_logprobs_op.register_autograd(_backward, setup_context=_save_operands)


def _group(name: str) -> "dist.ProcessGroup":
    """The group of a name, as torch's functional collectives find it."""
    return dist.distributed_c10d._resolve_process_group(cast(Any, name))
