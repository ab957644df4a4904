"""Reads the compressed distributions of DistillKit: https://github.com/arcee-ai/DistillKit.

A folder has Parquet files and compression_config.yaml. Each row has `input_ids` [T]; row j of
`compressed_logprobs` and `bytepacked_indices` is about token j + 1. `bytepacked_indices` is k ids
of ceil(log2 d) bits each, `compressed_logprobs` a byte string for each token (integers from the
most significant bit on, other numbers little-endian):

    exact_k values of exact_dtype; a coefficient of term_dtype for each of polynomial_terms; for
    each of residual_bins a scale of scale_dtype and num_elements integers of element_bits, from
    -2^(bits - 1) on (of 1 bit: -1 or 1).

The k - exact_k further values are the polynomial in their number, from 0 (with normalize_t from 0
to 1), plus scale times integer. With delta_encoding all k values are differences to the one before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import yaml

from redi.engine.distill.given import Given, check
from redi.engine.errors import InputError

CONFIG = "compression_config.yaml"
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}
_TERMS = {"sqrt": np.sqrt, "exp": np.exp}


@dataclass(frozen=True)
class Bin:
    """Integers with one scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class Compression:
    """The content of compression_config.yaml."""

    d: int
    """Tokens of the vocabulary."""
    k: int
    exact_k: int
    residual_bins: Sequence[Bin]
    exact_dtype: str = "float32"
    polynomial_terms: Sequence[int | str] | None = None
    term_dtype: str = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    """How residuals were rounded; no matter here."""
    normalize_t: bool = False

    @property
    def index_bits(self) -> int:
        """Bits of an id."""
        return math.ceil(math.log2(self.d))


def read_compression(path: Path) -> Compression:
    """The settings of the folder of a file.

    Raises:
        InputError: they are missing or unknown.
    """
    file = path.parent / CONFIG
    try:
        content = yaml.safe_load(file.read_text())
        known = {field.name for field in fields(Compression)}
        if unknown := set(content) - known:
            raise ValueError(f"unknown key {min(unknown)}")
        bins = [Bin(**one) for one in content.pop("residual_bins", None) or ()]
        found = Compression(**content, residual_bins=bins)
        for name in (found.exact_dtype, found.term_dtype, *(b.scale_dtype for b in bins)):
            if name not in _DTYPES and name != "bfloat16":
                raise ValueError(f"unknown dtype {name}")
        for term in found.polynomial_terms or ():
            if not isinstance(term, int) and term not in _TERMS:
                raise ValueError(f"unknown term {term}")
        return found
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        problem = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(
            f"{file}: {problem}; compressed_logprobs cannot be read without these settings"
        ) from None


def fingerprint(path: Path) -> str:
    """Hash of the settings in the folder of a file; empty without any."""
    file = path.parent / CONFIG
    return xxhash.xxh3_128_hexdigest(file.read_bytes()) if file.is_file() else ""


def decompress(settings: Compression, logprobs: np.ndarray, indices: np.ndarray) -> Given:
    """The distributions of a row's tokens after the first.

    Args:
        logprobs: uint8 [T - 1, bytes].
        indices: uint8 [T - 1, bytes].

    Raises:
        ValueError: the numbers of bytes are those of other settings.
    """
    ids = _integers(indices, settings.index_bits, settings.k)
    rest = logprobs
    exact, rest = _floats(rest, settings.exact_k, settings.exact_dtype)
    more = settings.k - settings.exact_k
    further = np.zeros((len(logprobs), more))
    if terms := settings.polynomial_terms:
        coefficients, rest = _floats(rest, len(terms), settings.term_dtype)
        at = np.linspace(0, 1, more) if settings.normalize_t else np.arange(more, dtype=float)
        powers: list[Any] = [at**t if isinstance(t, int) else _TERMS[t](at) for t in terms]
        further += coefficients @ np.stack(powers)
    start = 0
    for one in settings.residual_bins:
        scale, rest = _floats(rest, 1, one.scale_dtype)
        size = -(-one.num_elements * one.element_bits // 8)
        numbers = _integers(rest[:, :size], one.element_bits, one.num_elements)
        rest = rest[:, size:]
        signed = 2 * numbers - 1 if one.element_bits == 1 else numbers - 2 ** (one.element_bits - 1)
        further[:, start : start + one.num_elements] += signed * scale
        start += one.num_elements
    if rest.shape[1]:
        raise ValueError(f"{rest.shape[1]} bytes of a token are left over")
    values = np.concatenate([exact, further], axis=1)
    if settings.delta_encoding:
        values = np.cumsum(values, axis=1)
    # Rounded, a value may be above 0.
    return check(Given(ids, np.minimum(values, 0).astype(np.float32)))


def _floats(content: np.ndarray, count: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [T, count], the rest of the bytes)."""
    size = count * (2 if dtype == "bfloat16" else _DTYPES[dtype].itemsize)
    if content.shape[1] < size:
        raise ValueError(f"{content.shape[1]} bytes of a token, but {size} are needed")
    part = np.ascontiguousarray(content[:, :size])
    if dtype == "bfloat16":
        wide = part.view("<u2").astype(np.uint32) << 16
        values = wide.view(np.float32)
    else:
        values = part.view(_DTYPES[dtype])
    return values.reshape(len(content), count).astype(np.float64), content[:, size:]


def _integers(content: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 or int64 [T, count]."""
    if content.shape[1] != -(-count * bits // 8):
        raise ValueError(f"{content.shape[1]} bytes of a token for {count} numbers of {bits} bits")
    single = np.unpackbits(content, axis=1)[:, : count * bits].reshape(-1, count, bits)
    numbers = np.zeros(single.shape[:2], np.int32 if bits < 32 else np.int64)
    for bit in range(bits):
        numbers = 2 * numbers + single[:, :, bit]
    return numbers
