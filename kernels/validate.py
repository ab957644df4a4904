"""Checks of the arguments of public ops: each error names the argument, what it got, what it needs.

Shapes, dtypes and devices are checked on every call. A tensor's values (a target out of range,
falling cu_seqlens) are checked where that needs no device synchronisation, on the CPU, and on other
devices with the environment variable REDI_DEBUG=1.
"""

import math
import os
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from redi.kernels.reference import IGNORE_INDEX, accumulation_dtype

DEBUG = os.environ.get("REDI_DEBUG", "0") not in ("", "0")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
INDICES = (torch.int32, torch.int64)

MOST_INT = 2**63  # no int64 is as large

# A teacher's probabilities may sum to this: bfloat16 log-probs of an entropy of 2.5 nats may.
MOST_MASS = 1.01


def check_operands(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    *,
    least_vocab: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """`hidden` [..., D], `weight` [V, D], `targets` [...]: shapes, dtypes, one device.

    Returns `hidden` [T, D] and `weight` in one dtype, and `targets` [T] with IGNORE_INDEX in place
    of `ignore_index`. Operands of the same dtype stay as they are (in float32 too: autocast does
    not lower these logits). Under autocast, operands of two dtypes are cast to its dtype, as
    `linear` would do; otherwise they are an error.
    """
    _check_tensor("hidden", hidden, ("...", "D"), FLOATS)
    _check_tensor("weight", weight, ("V", "D"), FLOATS)
    _check_tensor("targets", targets, ("...",), (torch.int64,))
    device = hidden.device.type
    if (
        hidden.dtype != weight.dtype
        and torch.amp.is_autocast_available(device)  # not of meta tensors
        and torch.is_autocast_enabled(device)
    ):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden and weight must have the same dtype, got {hidden.dtype} and {weight.dtype}"
        )
    if hidden.dtype == torch.float64 and hidden.device.type != "cpu":
        raise TypeError(f"hidden: float64 is for the CPU only, got a tensor on {hidden.device}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden [..., D] and weight [V, D] must agree in D, "
            f"got {_shape(hidden)} and {_shape(weight)}"
        )
    if weight.shape[0] < least_vocab or weight.shape[1] == 0:
        raise ValueError(f"weight must have V >= {least_vocab} and D >= 1, got {_shape(weight)}")
    _check_shape("targets", targets, hidden.shape[:-1])
    check_same_device("targets", targets, hidden)
    check_same_device("weight", weight, hidden)
    check_number("ignore_index", ignore_index, "an int", whole=True)
    if ignore_index != IGNORE_INDEX:
        targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
    return hidden.flatten(0, -2), weight, targets.flatten()


def check_token_weights(name: str, values: Tensor, targets: Tensor) -> Tensor:
    """`values` [...] floating like `targets` [...], not requiring a gradient; returns them [T]."""
    _check_tensor(name, values, ("...",), FLOATS)
    _check_shape(name, values, targets.shape)
    check_same_device(name, values, targets)
    if values.requires_grad:
        raise ValueError(f"{name} gets no gradient from this op: pass {name}.detach()")
    return values.flatten()


def check_teacher(hidden: Tensor, ids: Tensor, logps: Tensor, token_weights: Tensor) -> None:
    """`ids` [..., K], `logps` [..., K] and `token_weights` [...] of the tokens of `hidden`."""
    _check_tensor("hidden", hidden, ("...", "D"), FLOATS)
    _check_tensor("token_weights", token_weights, ("...",), FLOATS)
    _check_shape("token_weights", token_weights, hidden.shape[:-1])
    _check_tensor("teacher_ids", ids, ("...", "K"), INDICES)
    _check_tensor("teacher_logps", logps, ("...", "K"), FLOATS)
    if ids.shape[:-1] != token_weights.shape:
        raise ValueError(
            f"teacher_ids must have K entries for each of token_weights {_shape(token_weights)}, "
            f"got {_shape(ids)}"
        )
    if ids.shape[-1] == 0:
        raise ValueError(f"teacher_ids must have K >= 1 entries for each token, got {_shape(ids)}")
    if logps.shape != ids.shape:
        raise ValueError(
            f"teacher_logps must have the shape of teacher_ids {_shape(ids)}, got {_shape(logps)}"
        )
    if logps.requires_grad:
        raise ValueError("teacher_logps gets no gradient from this op: pass teacher_logps.detach()")
    check_same_device("teacher_ids", ids, token_weights)
    check_same_device("teacher_logps", logps, token_weights)


def check_sequences(cu_seqlens: Tensor, signs: Tensor, hidden: Tensor) -> None:
    """`cu_seqlens` [S + 1] and `signs` [S] on hidden's device."""
    check_cu_seqlens(cu_seqlens, hidden)
    check_per_sequence("signs", signs, cu_seqlens, INTEGERS)


def check_per_sequence(
    name: str, values: Tensor, cu_seqlens: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """`values` [S] on the tokens' device."""
    _check_tensor(name, values, ("S",), dtypes)
    if values.shape[0] != cu_seqlens.shape[0] - 1:
        raise ValueError(
            f"{name} must have one entry for each sequence, shape "
            f"({cu_seqlens.shape[0] - 1},) for cu_seqlens of {_shape(cu_seqlens)}, "
            f"got {_shape(values)}"
        )
    check_same_device(name, values, cu_seqlens)


def check_cu_seqlens(cu_seqlens: Tensor, tokens: Tensor) -> None:
    """`cu_seqlens` [S + 1] on the tokens' device."""
    _check_tensor("cu_seqlens", cu_seqlens, ("S + 1",), INDICES)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must have S + 1 >= 1 entries, got none")
    check_same_device("cu_seqlens", cu_seqlens, tokens)


def check_schedule(
    valid_index: Tensor | None,
    chunk_tokens: int | None,
    hidden: Tensor,
    num_with_grad: int | None = None,
) -> None:
    """`valid_index` [N] with N <= T, `num_with_grad` <= N, `chunk_tokens` > 0; None is fine."""
    if valid_index is not None:
        _check_tensor("valid_index", valid_index, ("N",), INDICES)
        check_same_device("valid_index", valid_index, hidden)
        if valid_index.shape[0] > hidden.shape[0]:
            raise ValueError(
                f"valid_index must have at most T = {hidden.shape[0]} entries, "
                f"got {valid_index.shape[0]}"
            )
    if num_with_grad is not None:
        check_number("num_with_grad", num_with_grad, "an int or None", whole=True)
        if valid_index is None:
            raise ValueError("num_with_grad counts tokens of valid_index: pass valid_index as well")
        if not 0 <= num_with_grad <= valid_index.shape[0]:
            raise ValueError(
                f"num_with_grad must be from 0 to N = {valid_index.shape[0]}, got {num_with_grad}"
            )
    if chunk_tokens is not None:
        check_number("chunk_tokens", chunk_tokens, "a positive int or None", whole=True)
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be a positive int or None, got {chunk_tokens}")


def check_exponential_lengths(lengths: Sequence[int] | None, valid_index: Tensor | None) -> None:
    """`exponential_lengths` counts of the last tokens of `valid_index`; None is fine."""
    if lengths is None:
        return
    if valid_index is None:
        raise ValueError(
            "exponential_lengths counts tokens of valid_index: pass valid_index as well"
        )
    if isinstance(lengths, Tensor) or not isinstance(lengths, Sequence):
        raise TypeError(
            f"exponential_lengths must be ints on the host or None, got {type(lengths).__name__}"
        )
    for length in lengths:
        check_number("exponential_lengths", length, "ints or None", whole=True)
        if length < 0:
            raise ValueError(f"exponential_lengths must be >= 0, got {length}")
    if sum(lengths) > valid_index.shape[0]:
        raise ValueError(
            f"exponential_lengths must add up to at most N = {valid_index.shape[0]}, "
            f"got {sum(lengths)}"
        )


def check_objective(alpha: float, num_pairs: float) -> None:
    """`alpha` finite and >= 0, `num_pairs` finite and > 0."""
    check_number("alpha", alpha)
    check_number("num_pairs", num_pairs)
    # Comparisons alone (NaN fails them too), as torch.compile may pass a symbolic number.
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and >= 0, got {alpha}")
    if not 0 < num_pairs < math.inf:
        raise ValueError(f"num_pairs must be finite and > 0, got {num_pairs}")


def check_logits(logit_scale: float, softcap: float | None) -> None:
    """`logit_scale` finite and > 0, `softcap` likewise or None."""
    check_number("logit_scale", logit_scale)
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite and > 0, got {logit_scale}")
    if softcap is not None:
        check_number("softcap", softcap, "a number or None")
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap must be finite and > 0 or None, got {softcap}")


def check_terms(coefficient: str, label_smoothing: float, z_loss: float) -> None:
    """`label_smoothing` in [0, 1], above 0 only for "weight"; `z_loss` finite and >= 0."""
    check_choice("coefficient", coefficient, ("weight", "dft", "unlikelihood"))
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if label_smoothing > 0 and coefficient != "weight":
        raise ValueError(
            f'label_smoothing has no meaning for coefficient="{coefficient}", a function of the '
            'target\'s probability alone: use coefficient="weight", or 0'
        )
    check_number("z_loss", z_loss)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and >= 0, got {z_loss}")


def check_divergence(direction: str, temperature: float, tail: str, skew: float) -> None:
    """`temperature` finite and > 0; `skew` in [0, 1), above 0 not for "jsd"."""
    check_choice("direction", direction, ("forward", "reverse", "jsd"))
    check_choice("tail", tail, ("ignore", "bucket"))
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    check_number("skew", skew)
    if not 0 <= skew < 1:
        raise ValueError(f"skew must be in [0, 1), got {skew}")
    if skew > 0 and direction == "jsd":
        raise ValueError('skew has no meaning for direction="jsd", which mixes by 1/2: use 0')


def check_number(
    name: str, value: object, expected: str = "a number", *, whole: bool = False
) -> None:
    """A number of Python or NumPy (with `whole` an integer) or a tensor of one.

    Text, as a recipe or a command line may give, would otherwise fail in a comparison that names no
    argument, and True would count as 1.
    """
    kind = Integral if whole else Real
    single = (
        isinstance(value, Tensor)
        and value.dim() == 0
        and value.dtype in (*FLOATS, *INTEGERS)
        and not whole
    )
    # Under torch.compile a number may be symbolic.
    symbolic = isinstance(value, torch.SymInt if whole else torch.SymInt | torch.SymFloat)
    if isinstance(value, bool) or not (isinstance(value, kind) or single or symbolic):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if isinstance(value, int) and abs(value) >= MOST_INT:
        raise ValueError(
            f"{name} must be {expected}, got an int of {value.bit_length()} bits, more than 63"
        )


def check_statistics(entropy: bool, log_sum_exp: bool) -> None:
    """Whether to return them: True or False."""
    check_choice("entropy", entropy, (True, False))
    check_choice("log_sum_exp", log_sum_exp, (True, False))


def check_epsilon(epsilon: float) -> None:
    """`epsilon` in [0, 1]."""
    check_number("epsilon", epsilon)
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")


def check_values(values: Tensor) -> None:
    """`values` [T] float32 or float64."""
    _check_tensor("values", values, ("T",), (torch.float32, torch.float64))


def check_dweight(dweight: Tensor, weight: Tensor) -> None:
    """`dweight` [V, D] in the accumulation dtype, contiguous, on weight's device."""
    _check_tensor("dweight", dweight, ("V", "D"), (accumulation_dtype(weight.dtype),))
    if dweight.shape != weight.shape:
        raise ValueError(
            f"dweight must have weight's shape {_shape(weight)}, got {_shape(dweight)}"
        )
    if not dweight.is_contiguous():
        raise ValueError(f"dweight must be contiguous, got strides {tuple(dweight.stride())}")
    if dweight.requires_grad:
        raise ValueError("dweight is written in place: it must not require a gradient")
    check_same_device("dweight", dweight, weight)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """`value` is one of `choices`. A tensor is none: its comparison may have no truth value."""
    if isinstance(value, Tensor) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def check_same_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    """`tensor` is on the tokens' device."""
    if tensor.device != hidden.device:
        raise ValueError(f"{name} must be on {hidden.device} like the tokens, got {tensor.device}")


def check_target_values(targets: Tensor, vocab_size: int, valid_index: Tensor | None) -> None:
    """Targets in [0, V) or -100, `valid_index` exactly the unmasked positions; reads the tensors.

    Without this check a target out of range would read and write out of bounds.
    """
    if not may_read(targets):
        return
    valid = targets != IGNORE_INDEX
    wrong = valid & ((targets < 0) | (targets >= vocab_size))
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets must be in [0, {vocab_size}) or {IGNORE_INDEX}, "
            f"got {int(targets[position])} at position {position}"
        )
    if valid_index is None:
        return
    if ((valid_index < 0) | (valid_index >= len(targets))).any():
        raise ValueError(
            f"valid_index must hold positions in [0, {len(targets)}), "
            f"got {int(valid_index.min())} to {int(valid_index.max())}"
        )
    if not torch.equal(valid_index.long().sort().values, valid.nonzero()[:, 0]):
        raise ValueError(
            f"valid_index must hold each position with targets != {IGNORE_INDEX} once, got "
            f"{len(valid_index)} entries for {int(valid.sum())} unmasked targets"
        )


def check_sequence_values(cu_seqlens: Tensor, tokens: int, signs: Tensor | None = None) -> None:
    """`cu_seqlens` rises from 0 to T, `signs` are +1, -1 or 0; reads the tensors."""
    if not may_read(cu_seqlens):
        return
    bounds = cu_seqlens.long()
    first, last = int(bounds[0]), int(bounds[-1])
    if first != 0 or last != tokens:
        raise ValueError(f"cu_seqlens must go from 0 to T = {tokens}, got {first} to {last}")
    if (falls := bounds.diff() < 0).any():
        i = int(falls.nonzero()[0])
        raise ValueError(
            f"cu_seqlens must not fall, got {int(bounds[i])} then {int(bounds[i + 1])} at {i + 1}"
        )
    if signs is not None and (wrong := (signs > 1) | (signs < -1)).any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"signs must be +1, -1 or 0, got {int(signs[i])} at sequence {i}")


def check_weight_values(
    name: str,
    token_weights: Tensor,
    targets: Tensor,
    valid_index: Tensor | None,
    num_with_grad: int | None,
) -> None:
    """Finite where the target is unmasked, 0 after the first `num_with_grad`; reads the tensors."""
    if not may_read(targets):
        return
    wrong = ~token_weights.isfinite() & (targets != IGNORE_INDEX)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"{name} must be finite, got {float(token_weights[i])} at position {i}")
    if valid_index is None or num_with_grad is None:
        return
    rest = token_weights[valid_index[num_with_grad:].long()]
    if rest.any():
        raise ValueError(
            f"valid_index must name the tokens that have a gradient first: after the first "
            f"num_with_grad = {num_with_grad}, {int(rest.count_nonzero())} have a weight "
            f"in {name}"
        )


def check_teacher_values(
    ids: Tensor, logps: Tensor, targets: Tensor, vocab_size: int, direction: str, skew: float
) -> None:
    """Of unmasked tokens: ids -1 or in [0, V), each once; log-probs at most 0, -inf where the id is
    -1, of a sum at most MOST_MASS; finite where the direction divides by q. Reads the tensors.

    Args:
        ids, logps: [T, K].
        targets: [T], -100 masks.
    """
    if not may_read(ids):
        return
    rows = (targets != IGNORE_INDEX)[:, None]
    padding = ids == -1

    def refuse(wrong: Tensor, requirement: str, values: Tensor) -> None:
        if (wrong & rows).any():
            t, k = (wrong & rows).nonzero()[0].tolist()
            raise ValueError(f"{requirement}, got {values[t, k].item()} at token {t}, entry {k}")

    outside = ~padding & ((ids < 0) | (ids >= vocab_size))
    refuse(outside, f"teacher_ids must be in [0, {vocab_size}) or -1", ids)
    in_order, places = ids.sort(-1)
    repeated = torch.zeros_like(padding)
    repeated[:, 1:] = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != -1)
    repeated = torch.zeros_like(padding).scatter(-1, places, repeated)
    refuse(repeated, "teacher_ids must name an entry once per token", ids)
    refuse(~(logps <= 0), "teacher_logps must be log-probs, at most 0", logps)
    filled = padding & (logps != -math.inf)
    refuse(filled, "teacher_logps must be -inf where teacher_ids is -1", logps)
    if direction == "reverse" and not skew:
        zero = ~padding & (logps == -math.inf)
        refuse(zero, 'teacher_logps must be finite for direction="reverse" without skew', logps)
    masses = logps.double().exp().sum(-1, keepdim=True)
    if ((masses > MOST_MASS) & rows).any():
        t = int(((masses > MOST_MASS) & rows).nonzero()[0, 0])
        raise ValueError(
            f"teacher_logps must be of probabilities that sum to at most 1 (and rounding, "
            f"{MOST_MASS}), got {masses[t].item():.4g} at token {t}"
        )


def may_read(tensor: Tensor) -> bool:
    """Whether values are checked: that needs no device synchronisation, or is asked for."""
    return tensor.device.type == "cpu" or DEBUG


def _check_tensor(
    name: str, tensor: Tensor, dims: tuple[str, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):  # a DTensor, recognised without importing its module
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor(), or call the "
            f"loss inside the forward of an FSDP module, which unshards its parameters; "
            f"{name}.to_local() is right only where every rank holds all of it"
        )
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")
    leading = dims[0] == "..."
    if tensor.dim() < len(dims) if leading else tensor.dim() != len(dims):
        raise ValueError(f"{name} must have shape [{', '.join(dims)}], got {_shape(tensor)}")


def _check_shape(name: str, values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise ValueError(
            f"{name} must have one entry for each row of hidden, shape {tuple(shape)}, "
            f"got {_shape(values)}"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
