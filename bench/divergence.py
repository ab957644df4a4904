"""Methods of `redi.bench.loss --loss divergence`: a divergence to a teacher, forward and backward.

The teacher's hidden states are the student's and noise, through the same lm_head. Tokens have
REDI's weights, of both signs. There are two kinds of methods:

- from a table of the teacher's `ENTRIES` largest log-probs, made beforehand:
  sum_t w_t (KL(teacher, student) over them and one bucket - logp_t), 3 products;
- from the teacher's hidden states ("plain" in the record, without errors): a mean of divergences
  over the whole vocabulary without a target's log-prob and without signs, which is what these ops
  offer. They know more than the table has, and compute the teacher's logits as well, 4 to 9
  products.
"""

from functools import partial

import torch
from torch import Tensor

from redi.bench.baselines import Absent, Contender, Exact, LossMethod, Result, by_token, floor
from redi.bench.inputs import Operands
from redi.kernels import TopkDivergence, reference, signed_cross_entropy, topk_divergence
from redi.kernels.backends import choose_backend
from redi.kernels.reference import Backend, Direction, accumulation_dtype

ENTRIES = 64
NOISE = 0.3
"""Of the teacher's hidden states, relative to each of the student's."""
SLICE_TOKENS = 512


def teacher_states(operands: Operands) -> Tensor:
    """[T, D] in hidden's dtype, the same for the same operands."""
    hidden = operands.hidden.detach()
    generator = torch.Generator(hidden.device).manual_seed(1)
    noise = torch.empty_like(hidden).normal_(generator=generator)
    scale = hidden.norm(dim=1, keepdim=True) / hidden.shape[1] ** 0.5
    return hidden + NOISE * scale * noise


def teacher_table(operands: Operands) -> tuple[Tensor, Tensor]:
    """(ids [T, K] int32, log-probs [T, K] float32) of the K largest."""
    weight = operands.weight.detach()
    ids, logps = [], []
    for states in teacher_states(operands).split(SLICE_TOKENS):
        logits = (states @ weight.T).to(accumulation_dtype(weight.dtype))
        found = logits.log_softmax(-1).topk(min(ENTRIES, len(weight)))
        ids.append(found.indices.int())
        logps.append(found.values.float())
    return torch.cat(ids), torch.cat(logps)


def float64_result(operands: Operands) -> Exact:
    """The oracle: `reference` in float64, summed over slices of tokens."""
    hidden = operands.hidden.detach().double()
    weight = operands.weight.detach().double().requires_grad_()
    ids, logps = teacher_table(operands)
    weights = operands.token_weights
    loss, dhidden, dweight = hidden.new_zeros(()), [], torch.zeros_like(weight)
    token_logps = []
    for start in range(0, len(hidden), SLICE_TOKENS):
        part = slice(start, start + SLICE_TOKENS)
        x = hidden[part].requires_grad_()
        term, _, of_targets = reference.topk_divergence(
            x, weight, ids[part], logps[part], weights[part], tail="bucket",
            targets=operands.targets[part], target_weights=weights[part],
        )  # fmt: skip
        assert of_targets is not None
        token_logps.append(of_targets)
        dx, dw = torch.autograd.grad(term, (x, weight))
        loss += term.detach()
        dhidden.append(dx)
        dweight += dw
    result = Result(loss, torch.cat(dhidden), dweight.detach())
    return Exact(result, torch.cat(token_logps))


def ours(
    operands: Operands, backend: Backend, direction: Direction = "forward", mixed: bool = True
) -> Contender:
    """This project's op, with or without the targets' log-probs."""
    try:
        choose_backend(backend, operands.hidden.device, operands.hidden.dtype)
    except (TypeError, ValueError) as error:
        raise Absent(str(error)) from None
    ids, logps = teacher_table(operands)
    weights = operands.token_weights.to(accumulation_dtype(operands.hidden.dtype))
    valid_index = torch.arange(len(ids), device=ids.device)

    def made() -> TopkDivergence:
        return topk_divergence(
            operands.hidden, operands.weight, ids, logps, weights, direction=direction,
            tail="bucket", valid_index=valid_index, backend=backend,
            targets=operands.targets if mixed else None,
            target_weights=weights if mixed else None,
        )  # fmt: skip

    def token_logps() -> Tensor:
        found = made().token_logps
        assert found is not None
        return found

    return Contender(
        lambda: gradients(made().loss, operands), token_logps if mixed else None, plain=not mixed
    )


def cross_entropy(operands: Operands) -> Contender:
    """This project's op without a teacher."""
    weights = operands.token_weights.to(accumulation_dtype(operands.hidden.dtype))

    def step() -> Result:
        loss, _ = signed_cross_entropy(*operands[:3], weights, backend="torch")
        return gradients(loss, operands)

    return Contender(step, plain=True)


def eager(operands: Operands) -> Contender:
    """Whole logits and autograd; the tail's log-prob from the entries', as trl computes it."""
    ids, logq = teacher_table(operands)
    columns = ids.long()
    q = logq.exp()
    q_tail = 1 - q.sum(-1)
    known = torch.xlogy(q, q).sum(-1) + torch.xlogy(q_tail, q_tail)

    def value(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logps = (hidden @ weight.T).to(logq.dtype).log_softmax(-1)
        logp = logps.gather(1, columns)
        tail = (-torch.expm1(logp.logsumexp(-1).clamp(max=-1e-7))).log()
        divergences = known - (q * logp).sum(-1) - q_tail * tail
        return logps.gather(1, targets[:, None])[:, 0] - divergences

    return Contender(by_token(operands, value).step)


def trl(operands: Operands, beta: float) -> Contender:
    """trl's chunks of tokens and of the vocabulary, from the teacher's hidden states."""
    import trl.trainer.utils  # noqa: F401  (backward imports it late: fail here instead)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    states, teacher_weight = teacher_states(operands), operands.weight.detach()

    def step() -> Result:
        divergences, _ = ChunkedDivergenceFunction.apply(
            operands.hidden, operands.weight, None, states, teacher_weight, None, beta
        )
        return gradients(divergences.mean(), operands)

    return Contender(step, plain=True)


def liger(operands: Operands) -> Contender:
    """liger's fused linear Jensen-Shannon divergence, without its cross-entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    states, teacher_weight = teacher_states(operands), operands.weight.detach()
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)

    def step() -> Result:
        made = loss(operands.hidden, operands.weight, states, teacher_weight, operands.targets)
        return gradients(made, operands)

    return Contender(step, plain=True)


def gradients(loss: Tensor, operands: Operands) -> Result:
    """By hidden and by weight."""
    return Result(loss.detach(), *torch.autograd.grad(loss, (operands.hidden, operands.weight)))


_TABLE = f"KL of {ENTRIES} entries and a bucket, and the target's log-prob"
_STATES = "from the teacher's hidden states, whole vocabulary, no target"

METHODS: dict[str, LossMethod] = {
    "floor": LossMethod("the three products alone", floor),
    "topk-torch": LossMethod(f"{_TABLE}; backend torch", partial(ours, backend="torch"), ours=True),
    "topk-triton": LossMethod(
        f"{_TABLE}; backend triton", partial(ours, backend="triton"), ours=True
    ),
    "topk-torch-alone": LossMethod(
        "the same without the target", partial(ours, backend="torch", mixed=False)
    ),
    "topk-torch-jsd": LossMethod(
        f"Jensen-Shannon divergence of {ENTRIES} entries and a bucket, no target",
        partial(ours, backend="torch", direction="jsd", mixed=False),
    ),
    "cross-entropy": LossMethod("signed_cross_entropy, backend torch: no teacher", cross_entropy),
    "topk-eager": LossMethod(f"{_TABLE}; whole logits, autograd", eager),
    "trl-forward": LossMethod(f"trl, KL {_STATES}", partial(trl, beta=0.0)),
    "trl-jsd": LossMethod(f"trl, Jensen-Shannon {_STATES}", partial(trl, beta=0.5)),
    "liger-jsd": LossMethod(f"liger, Jensen-Shannon {_STATES}, compiled", liger),
}
