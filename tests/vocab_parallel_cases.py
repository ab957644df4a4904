"""What each rank of a `RankPool` runs in the tests of the vocabulary-parallel losses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from kernel_cases import Case
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from redi.kernels import (
    linear_logprobs,
    signed_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_logprobs,
    vocab_parallel_redi_loss,
    vocab_shards,
)


@dataclass
class Collectives:
    """Those that ran: (name, numbers that each rank sent, their dtype)."""

    ran: list[tuple[str, int, torch.dtype]] = field(default_factory=list)


@contextmanager
def recorded_collectives() -> Iterator[Collectives]:
    """Record each collective of torch.distributed that runs in the block."""
    found = Collectives()

    def recorded(name: str, sent: int) -> Callable[..., Any]:
        collective = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found.ran.append((name, args[sent].numel(), args[sent].dtype))
            return collective(*args, **kwargs)

        return call

    with (
        patch.object(dist, "all_gather", recorded("all_gather", 1)),
        patch.object(dist, "all_reduce", recorded("all_reduce", 0)),
    ):
        yield found


def operands(case: Case, bounds: list[int]) -> tuple[Tensor, Tensor]:
    """(hidden, this rank's rows of the lm_head), both requiring gradients."""
    rank = dist.get_rank()
    shard = case.weight[bounds[rank] : bounds[rank + 1]]
    return case.hidden.clone().requires_grad_(), shard.clone().requires_grad_()


def redi(case: Case, bounds: list[int], scale: float = 1.0, **options: Any) -> tuple[Any, ...]:
    """(RediLoss, dhidden, dweight of the shard), gradients of `scale` times the loss."""
    hidden, shard = operands(case, bounds)
    arguments = hidden, shard, case.targets, case.cu_seqlens, case.signs
    out = vocab_parallel_redi_loss(*arguments, group=dist.group.WORLD, **case.options, **options)
    gradients = torch.autograd.grad(out.loss * scale, (hidden, shard))
    return out._replace(loss=out.loss.detach()), *gradients


def cross_entropy(
    case: Case, bounds: list[int], weights: Tensor, upstream: float = 1.0, **options: Any
) -> tuple[Any, ...]:
    """(results, dhidden, dweight of the shard, collectives)."""
    hidden, shard = operands(case, bounds)
    with recorded_collectives() as collectives:
        loss, *others = vocab_parallel_cross_entropy(
            hidden, shard, case.targets, weights, group=dist.group.WORLD, **options
        )
        gradients = torch.autograd.grad(loss * upstream, (hidden, shard))
    return (loss.detach(), *others), *gradients, collectives.ran


def without_gradient(case: Case, bounds: list[int], weights: Tensor) -> tuple[Any, ...]:
    """(results, collectives)."""
    _, shard = operands(case, bounds)
    with recorded_collectives() as collectives, torch.no_grad():
        found = vocab_parallel_cross_entropy(
            case.hidden, shard, case.targets, weights, group=dist.group.WORLD, chunk_tokens=16
        )
    return found, collectives.ran


def logprobs(case: Case, bounds: list[int], dlogps: Tensor, **options: Any) -> tuple[Any, ...]:
    """(log-probs, dhidden, dweight of the shard) by an upstream gradient, backward run twice."""
    hidden, shard = operands(case, bounds)
    logps = vocab_parallel_logprobs(hidden, shard, case.targets, group=dist.group.WORLD, **options)
    first = torch.autograd.grad(logps, (hidden, shard), dlogps, retain_graph=True)
    second = torch.autograd.grad(logps, (hidden, shard), dlogps)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return logps.detach(), *first


class _SumOverRanks(torch.autograd.Function):
    """Sums a partial result over the ranks; all have the gradient of the sum already."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def tied(weight: Tensor, bounds: list[int], ids: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the shard), which is the embedding and the lm_head of a model.

    The model predicts each token of `ids` from the one before, through a matrix `mix`.
    """
    rank = dist.get_rank()
    start, end = bounds[rank], bounds[rank + 1]
    shard = weight[start:end].clone().requires_grad_()
    mine = (ids >= start) & (ids < end)
    rows = weight.new_zeros(len(ids), weight.shape[1])
    rows = rows.index_put((mine.nonzero()[:, 0],), shard[ids[mine] - start])
    hidden = _SumOverRanks.apply(rows) @ mix
    loss, _ = vocab_parallel_cross_entropy(
        hidden[:-1], shard, ids[1:], weight.new_ones(len(ids) - 1), group=dist.group.WORLD
    )
    return loss.detach(), torch.autograd.grad(loss, shard)[0]


def subgroups(case: Case, weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """In groups of one rank each: the results of `vocab_parallel_*` and of the plain functions."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group = groups[dist.get_rank()]
    found = []
    for parallel in (True, False):
        hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        arguments = hidden, weight, case.targets
        options: dict[str, Any] = {"chunk_tokens": 7}
        if parallel:
            options["group"] = group
        cross = vocab_parallel_cross_entropy if parallel else signed_cross_entropy
        loss, logps = cross(*arguments, weights, **options)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        if parallel:
            again = vocab_parallel_logprobs(*arguments, **options)
        else:
            again = linear_logprobs(*arguments, keep=False, **options)
        more = torch.autograd.grad(again, (hidden, weight), weights)
        found.append([t.detach() for t in (loss, logps, *gradients, again, *more)])
    return found[0], found[1]


def pairs_of_ranks(cases: list[Case], weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two groups of two ranks, each with its own row: (loss, dhidden, dweight of the shard)."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    case, group = cases[rank // 2], groups[rank // 2]
    middle = len(case.weight) // 2
    shard = case.weight[:middle] if rank % 2 == 0 else case.weight[middle:]
    hidden, shard = (t.clone().requires_grad_() for t in (case.hidden, shard))
    loss, _ = vocab_parallel_cross_entropy(hidden, shard, case.targets, weights, group=group)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, shard))


def of_a_dtensor(case: Case, weights: Tensor) -> tuple[str, Tensor, Tensor, Tensor]:
    """An lm_head that is a DTensor sharded by rows: (error for itself, loss, dhidden, dweight).

    dweight is whole, of a backward through `to_local`.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    lm_head = distribute_tensor(case.weight, mesh, [Shard(0)]).requires_grad_()
    hidden = case.hidden.clone().requires_grad_()
    arguments = case.targets, weights
    error = ""
    try:
        vocab_parallel_cross_entropy(hidden, lm_head, *arguments, group=mesh.get_group("tp"))
    except TypeError as raised:
        error = str(raised)
    loss, _ = vocab_parallel_cross_entropy(
        hidden, lm_head.to_local(), *arguments, group=mesh.get_group("tp")
    )
    loss.backward()
    assert hidden.grad is not None
    return error, loss.detach(), hidden.grad, lm_head.grad.full_tensor()


def error_of(changes: list[dict[str, Any]], case: Case, bounds: list[int]) -> str:
    """What a call raises whose arguments are changed on this rank."""
    hidden, shard = operands(case, bounds)
    arguments = {
        "hidden": hidden,
        "weight": shard,
        "targets": case.targets,
        "token_weights": torch.ones(len(case.targets)),
        "group": dist.group.WORLD,
        **changes[dist.get_rank()],
    }
    try:
        vocab_parallel_cross_entropy(**arguments)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def of_an_unchecked_target(case: Case, bounds: list[int], **options: Any) -> tuple[Any, ...]:
    """(loss, log-probs, dhidden), targets being unchecked as on a GPU."""
    hidden, shard = operands(case, bounds)
    arguments = hidden, shard, case.targets, -torch.ones(len(case.targets))
    with patch.object(vocab_shards, "check_target_values", lambda *_: None):
        loss, logps = vocab_parallel_cross_entropy(*arguments, group=dist.group.WORLD, **options)
    return loss.detach(), logps, *torch.autograd.grad(loss, hidden)


def error_in_backward(case: Case, bounds: list[int]) -> str:
    """What backward of log-probs raises where the upstream gradient differs."""
    hidden, shard = operands(case, bounds)
    logps = vocab_parallel_logprobs(hidden, shard, case.targets, group=dist.group.WORLD)
    try:
        (logps * (1 + dist.get_rank())).sum().backward()
    except ValueError as error:
        return str(error)
    return ""


def as_an_op(case: Case, bounds: list[int], weights: Tensor) -> dict[str, Any]:
    """How the op behaves under torch.compile, autocast and second derivatives."""

    def step(hidden: Tensor, shard: Tensor) -> tuple[Tensor, ...]:
        arguments = hidden, shard, case.targets
        loss, logps = vocab_parallel_cross_entropy(*arguments, weights, group=dist.group.WORLD)
        other = vocab_parallel_logprobs(*arguments, group=dist.group.WORLD)
        return loss + other.sum(), logps

    def results(step: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        total, logps = step(hidden, shard)
        return [total, logps, *torch.autograd.grad(total, (hidden, shard))]

    hidden, shard = operands(case, bounds)
    eager = results(step)
    compiled = results(torch.compile(step, fullgraph=True, backend="aot_eager"))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = results(step)
    second = []
    arguments = hidden, shard, case.targets
    for loss in (
        vocab_parallel_cross_entropy(*arguments, weights, group=dist.group.WORLD)[0],
        vocab_parallel_logprobs(*arguments, group=dist.group.WORLD).sum(),
    ):
        (dhidden,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
        try:
            dhidden.sum().backward()
            second.append("")
        except RuntimeError as error:
            second.append(str(error))
    return {
        "compiled": [torch.equal(a, b) for a, b in zip(eager, compiled, strict=True)],
        "autocast": [torch.equal(a, b) for a, b in zip(eager, autocast, strict=True)],
        "again": [torch.equal(a, b) for a, b in zip(eager, results(step), strict=True)],
        "second derivatives": second,
    }


def peak_bytes(case: Case, bounds: list[int]) -> int:
    """Most bytes allocated at once by a loss and its backward, beyond what was there before."""
    redi(case, bounds)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        redi(case, bounds)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
