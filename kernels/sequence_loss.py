"""A loss of each sequence's mean log-prob m_s, linear and exponential, in three matrix products.

The weight of a token under exp(m_s) is known only when the whole sequence has its log-probs. So
chunks of such sequences end where a sequence ends: when a chunk's log-probs are known, so are the
factors of all its tokens, and they multiply the small operands of the other two products. Only a
sequence longer than a chunk waits: its share of dW is added up apart, without its factor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from redi.kernels import reference
from redi.kernels.backends import Kernels, choose_backend, kernels_of
from redi.kernels.chunk_sizes import chunk_buffer, default_chunk_tokens, split
from redi.kernels.chunked import (
    HALF_EXPONENT,
    Chunk,
    Outputs,
    Products,
    TokenOrder,
    gradient_rows,
    kept_scale,
    power_of_two,
    product_operand,
    run_chunks,
)
from redi.kernels.loss_ops import (
    needs_grad,
    new_gradient,
    optional_float,
    save_gradients,
    scale_gradients,
)
from redi.kernels.reference import IGNORE_INDEX, Backend, RediLoss, accumulation_dtype
from redi.kernels.segments import sequence_lengths
from redi.kernels.softmax import GradientRows, Terms
from redi.kernels.validate import (
    check_cu_seqlens,
    check_exponential_lengths,
    check_logits,
    check_number,
    check_operands,
    check_per_sequence,
    check_schedule,
    check_sequence_values,
    check_target_values,
    may_read,
)


def sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    linear_weights: Tensor,
    exponential_weights: Tensor,
    *,
    temperature: float = 1.0,
    denominators: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    valid_index: Tensor | None = None,
    exponential_lengths: Sequence[int] | None = None,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> RediLoss:
    """A loss of sequences' mean log-probs m_s = (sum_{t in s} logp_t) / |y_s|:

        loss = - sum_s (a_s m_s + b_s tau exp(m_s / tau))

    with a and b the two weights of each sequence and tau the temperature. exp(m_s) is the inverse
    perplexity of s. A weight says how much a likelier sequence is wanted, so an incorrect trace has
    a negative one: its term is then bounded below, and pushes the less the less likely the trace
    is. SimPER (arXiv 2502.00883) has a = 0, b = +-1, tau = 1; as tau grows, the gradient of
    b tau exp(m / tau) approaches that of b m, which is REDI's.

    Args:
        linear_weights: a, [S] floating, without gradient.
        exponential_weights: b, likewise.
        temperature: tau > 0.
        denominators: [S] floating, > 0: |y_s|; None: the number of unmasked targets, at least 1.
        valid_index: as for `redi_loss`; the tokens of sequences with b_s != 0 come last, one
            sequence after another. Give it along with exponential_lengths.
        exponential_lengths: numbers of unmasked tokens of these sequences, in that order, on the
            host. (A sequence may be among them although its b_s is 0.) Without the two a GPU
            synchronises once.
        The other arguments are those of `redi_loss`.

    Returns:
        RediLoss, as `redi_loss`.

    Raises:
        TypeError, ValueError: as `redi_loss`.
    """
    hidden, weight, targets = check_operands(hidden, weight, targets, ignore_index)
    check_cu_seqlens(cu_seqlens, hidden)
    per_sequence = {"linear_weights": linear_weights, "exponential_weights": exponential_weights}
    if denominators is not None:
        per_sequence["denominators"] = denominators
    for name, values in per_sequence.items():
        check_per_sequence(name, values, cu_seqlens)
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    check_logits(logit_scale, softcap)
    check_schedule(valid_index, chunk_tokens, hidden)
    check_exponential_lengths(exponential_lengths, valid_index)
    backend = choose_backend(backend, hidden.device, hidden.dtype, hidden.shape[1])
    if backend == "reference":
        check_target_values(targets, weight.shape[0], valid_index)
        check_sequence_values(cu_seqlens, targets.shape[0])
        return reference.sequence_loss(
            hidden,
            weight,
            targets,
            cu_seqlens,
            linear_weights,
            exponential_weights,
            temperature=temperature,
            denominators=denominators,
            logit_scale=logit_scale,
            softcap=softcap,
        )
    loss, logps, lengths, *_ = sequence_loss_op(
        hidden, weight, targets, cu_seqlens, linear_weights.detach(), exponential_weights.detach(),
        denominators, float(temperature), valid_index,
        None if exponential_lengths is None else list(exponential_lengths), chunk_tokens, backend,
        needs_grad(hidden, weight), float(logit_scale), optional_float(softcap),
    )  # fmt: skip
    return RediLoss(loss, logps, lengths)


@torch.library.custom_op("redi::sequence_loss", mutates_args=())
def sequence_loss_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    linear_weights: Tensor,
    exponential_weights: Tensor,
    denominators: Tensor | None,
    temperature: float,
    valid_index: Tensor | None,
    exponential_lengths: Sequence[int] | None,
    chunk_tokens: int | None,
    backend: str,
    needs: Sequence[bool],
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, sequence_logps, sequence_lengths, dhidden, dweight); `needs` is of the last two."""
    check_target_values(targets, weight.shape[0], valid_index)
    check_sequence_values(cu_seqlens, len(targets))
    dtype = accumulation_dtype(hidden.dtype)
    kernels = kernels_of(backend)
    out = Outputs(
        logps=hidden.new_zeros(len(targets), dtype=dtype),
        dhidden=new_gradient(hidden, True) if needs[0] else None,
        dweight=new_gradient(weight, True) if needs[1] else None,
    )
    valid = targets != IGNORE_INDEX
    lengths = sequence_lengths(valid, cu_seqlens)
    if denominators is None:
        denominators = lengths.clamp(min=1)
    per_sequence = Sequences(
        cu_seqlens,
        linear_weights.to(dtype),
        exponential_weights.to(dtype),
        denominators.to(dtype),
        temperature,
    )
    if may_read(targets):
        per_sequence.check()
    if valid_index is None or exponential_lengths is None:
        valid_index, exponential_lengths = order_sequences(
            valid, cu_seqlens, lengths, exponential_weights
        )
    elif may_read(targets):
        per_sequence.check_order(valid_index, exponential_lengths)
    with torch.autocast(hidden.device.type, enabled=False):
        loop = _Loop(
            hidden,
            weight,
            targets,
            per_sequence,
            TokenOrder(valid_index.long(), len(valid_index) if any(needs) else 0),
            list(exponential_lengths),
            out,
            chunk_tokens,
            kernels,
            Terms(logit_scale, softcap),
        )
        loop.run()
    assert out.logps is not None
    logps = kernels.sum_segments(out.logps, cu_seqlens)
    dhidden, dweight = (
        hidden.new_empty(0, dtype=dtype) if gradient is None else gradient
        for gradient in (out.dhidden, out.dweight)
    )
    return per_sequence.loss(logps), logps, lengths, dhidden, dweight


@sequence_loss_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = arguments[8]
    dtype = accumulation_dtype(hidden.dtype)
    sequences = cu_seqlens.shape[0] - 1
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(sequences, dtype=dtype),
        targets.new_empty(sequences),
        new_gradient(hidden, needs[0]),
        new_gradient(weight, needs[1]),
    )


sequence_loss_op.register_autograd(scale_gradients, setup_context=save_gradients)


@dataclass(frozen=True)
class Sequences:
    """What a loss knows of the sequences of a row, [S] in the accumulation dtype."""

    cu_seqlens: Tensor
    linear: Tensor
    exponential: Tensor
    denominators: Tensor
    temperature: float

    def loss(self, logps: Tensor) -> Tensor:
        """Of the sums of log-probs [S]. A weight of 0 counts as no term, whatever the log-prob."""
        means = logps / self.denominators
        terms = self.linear * means
        terms = terms.masked_fill(self.linear == 0, 0.0)
        tau = self.temperature
        return -(terms + self.exponential * tau * (means / tau).exp()).sum()

    def weights(self, logps: Tensor) -> Tensor:
        """[S]: the weight of the log-prob of each token, (a + b exp(m / tau)) / |y|."""
        means = logps / self.denominators
        factors = self.linear + self.exponential * (means / self.temperature).exp()
        return factors / self.denominators

    @property
    def bounds(self) -> Tensor:
        """[S]: no token's weight is larger, as m is at most 0."""
        return (self.linear.abs() + self.exponential.abs()) / self.denominators

    def check(self) -> None:
        """Finite weights, positive denominators; reads the tensors."""
        for name, values in (
            ("linear_weights", self.linear),
            ("exponential_weights", self.exponential),
        ):
            if (wrong := ~values.isfinite()).any():
                s = int(wrong.nonzero()[0])
                raise ValueError(f"{name} must be finite, got {float(values[s])} at sequence {s}")
        if (wrong := ~(self.denominators > 0)).any():
            s = int(wrong.nonzero()[0])
            raise ValueError(
                f"denominators must be > 0, got {float(self.denominators[s])} at sequence {s}"
            )

    def check_order(self, valid_index: Tensor, lengths: Sequence[int]) -> None:
        """The last tokens of `valid_index` are whole sequences of `lengths`, and those before them
        have no exponential weight; reads the tensors."""
        owner = torch.searchsorted(self.cu_seqlens[1:].long().contiguous(), valid_index, right=True)
        first = len(valid_index) - sum(lengths)
        sequences, counts = owner[first:].unique_consecutive(return_counts=True)
        given = [length for length in lengths if length]
        whole = counts.tolist() == given and len(sequences.unique()) == len(sequences)
        if not whole or self.exponential[owner[:first]].any():
            raise ValueError(
                "valid_index must end in the tokens of the sequences that have an exponential "
                "weight, one sequence after another, with exponential_lengths the numbers of their "
                f"tokens, got {list(lengths)}"
            )


def order_sequences(
    valid: Tensor, cu_seqlens: Tensor, lengths: Tensor, exponential: Tensor
) -> tuple[Tensor, list[int]]:
    """(valid_index, exponential_lengths) of a row; read back at once."""
    has_term = (exponential != 0).repeat_interleave(cu_seqlens.diff(), output_size=len(valid))
    rank = torch.where(valid, has_term.long(), 2)
    count, *counts = torch.cat(
        [valid.sum()[None], torch.where(exponential != 0, lengths, 0)]
    ).tolist()
    index = torch.argsort(rank, stable=True)[:count]
    return index, [length for length in counts if length]


def sequence_groups(first: int, lengths: list[int], most: int) -> list[tuple[int, int]]:
    """Cut tokens `first`, ... of an order into ranges that end where a sequence ends.

    Sequences share a range while they are at most `most` tokens together; one that is longer has a
    range of its own.
    """
    ranges: list[tuple[int, int]] = []
    for start, end in pairwise(accumulate(lengths, initial=first)):
        if start == end:
            continue  # masked in full
        if ranges and end - ranges[-1][0] <= most:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return ranges


class _Loop:
    """The chunks of a row: first of tokens whose weight is known, then of whole sequences."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        sequences: Sequences,
        order: TokenOrder,
        exponential_lengths: list[int],
        out: Outputs,
        chunk_tokens: int | None,
        kernels: Kernels,
        terms: Terms,
    ) -> None:
        self.hidden, self.weight, self.targets = hidden, weight, targets
        self.sequences, self.order, self.out, self.terms = sequences, order, out, terms
        self.kernels = kernels if terms.are_plain else replace(kernels, exp_gemm=None)
        self.dtype = accumulation_dtype(hidden.dtype)
        self.operand = product_operand(weight)
        buffer_dtype = self.dtype if self.kernels.exp_gemm is None else hidden.dtype
        tokens, size = len(order.index), weight.shape[1]
        self.most = chunk_tokens or default_chunk_tokens(tokens, weight, buffer_dtype)
        # A chunk that is longer by D rows takes as much more memory as a dW, which a sequence cut
        # into chunks needs instead.
        first = tokens - sum(exponential_lengths)
        self.known = split(0, first, self.most)
        self.groups = sequence_groups(first, exponential_lengths, self.most)
        self.longest_chunk = self.most + (0 if chunk_tokens else size)
        whole = [group for group in self.groups if self._is_chunk(group)]
        cut = [part for group in self.groups for part in self._parts(group)]
        self.buffer = chunk_buffer([*self.known, *whole, *cut], weight, buffer_dtype)

    def run(self) -> None:
        sequences, order, out = self.sequences, self.order, self.out
        tokens = len(self.targets)
        scale_of_logits = self.terms.logit_scale
        self.scale = None
        spread = self.kernels.spread_segments
        if self.hidden.dtype == torch.float16 and order.with_grad:
            bounds = spread(sequences.bounds * scale_of_logits, sequences.cu_seqlens, tokens)
            self.scale = power_of_two(bounds[order.index], HALF_EXPONENT)
        self.products = Products(self.operand, self.targets, out, self.scale)
        known = sequences.linear / sequences.denominators * scale_of_logits
        if self.scale is not None:
            known = known * self.scale
        self._run(self.known, spread(known, sequences.cu_seqlens, tokens), self.products.add)
        # Of a sequence without its factor; float16 needs its full range.
        self.plain = torch.full_like(known[:1], kept_scale(self.hidden.dtype)).expand(tokens)
        for group in self.groups:
            if self._is_chunk(group):
                self._run([group], self.plain, self._add_sequences)
            else:
                self._run_cut(group)
        self.products.finish()

    def _is_chunk(self, group: tuple[int, int]) -> bool:
        return group[1] - group[0] <= self.longest_chunk

    def _parts(self, group: tuple[int, int]) -> list[tuple[int, int]]:
        return [] if self._is_chunk(group) else split(*group, self.most)

    def _run(
        self,
        ranges: list[tuple[int, int]],
        weights: Tensor,
        use: Callable[[GradientRows, Chunk], None],
    ) -> None:
        """`run_chunks` of ranges whose tokens have these weights [T]."""
        assert self.out.logps is not None
        logps = self.out.logps

        def make(chunk: Chunk) -> GradientRows | None:
            return gradient_rows(
                chunk,
                self.operand if self.kernels.exp_gemm is None else self.weight,
                self.targets,
                weights if chunk.has_grad else None,
                self.kernels,
                terms=self.terms,
                logps=logps,
                room=self.buffer[: len(chunk.tokens)],
            )

        run_chunks(self.hidden, self.order, ranges, make, use)

    def _factors(self, tokens: Tensor) -> Tensor:
        """[C]: what the gradient by these tokens' logits still lacks, times the scale."""
        sequences = self.sequences
        assert self.out.logps is not None
        logps = self.kernels.sum_segments(self.out.logps, sequences.cu_seqlens)
        weights = sequences.weights(logps) * self.terms.logit_scale
        if self.scale is not None:
            weights = weights * (self.scale / kept_scale(self.hidden.dtype))
        return self.kernels.spread_segments(weights, sequences.cu_seqlens, len(self.targets))[
            tokens
        ]

    def _add_sequences(self, gradient: GradientRows, chunk: Chunk) -> None:
        """The products of a chunk of whole sequences."""
        factors = self._factors(chunk.tokens)
        if gradient.factors is not None:
            factors = factors * gradient.factors
        self.products.add(replace(gradient, factors=factors), chunk)

    def _run_cut(self, group: tuple[int, int]) -> None:
        """A sequence longer than a chunk: its factor multiplies its gradients at its end."""
        of_sequence = replace(self.out, dhidden=None)
        if self.out.dweight is not None:
            of_sequence = replace(of_sequence, dweight=torch.empty_like(self.out.dweight))
        apart = Products(self.operand, self.targets, of_sequence)

        def use(gradient: GradientRows, chunk: Chunk) -> None:
            self.products.set_dhidden(gradient, chunk)
            apart.add(gradient, chunk)

        self._run(self._parts(group), self.plain, use)
        if not self.order.with_grad:
            return
        tokens = self.order.index[slice(*group)]
        factor = self._factors(tokens[:1])
        if self.out.dhidden is not None:
            self.out.dhidden[tokens] *= factor
        if self.out.dweight is not None:
            assert of_sequence.dweight is not None
            self.products.add_dweight(of_sequence.dweight, factor)
