"""Which backend computes when the caller leaves it open, and what a backend consists of."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import get_args

import torch
from torch import Tensor

from redi.kernels import exponentials, rows, segments
from redi.kernels.exponentials import ExponentialsKernel
from redi.kernels.filter import LiveProducts, add_live_rows, multiply_live_columns
from redi.kernels.launches import architecture_of, entries_for, fastest_backend
from redi.kernels.reference import Backend
from redi.kernels.rows import RowKernel
from redi.kernels.validate import check_choice

# Looked up once, as Triton reads its variable once: and torch.compile must not see the look.
TRITON_INSTALLED = find_spec("triton") is not None
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


@dataclass(frozen=True)
class Kernels:
    """What a backend is made of; everything else is common to all."""

    softmax_rows: RowKernel
    """See `rows.softmax_rows`."""
    sum_segments: Callable[[Tensor, Tensor], Tensor]
    """See `segments.sum_segments`."""
    spread_segments: Callable[[Tensor, Tensor, int], Tensor]
    """See `segments.spread_segments`."""
    exponentials: ExponentialsKernel | None = None
    """See `exponentials.exponentials`; None where the logits are made and `softmax_rows` used."""
    live_products: LiveProducts | None = None
    """Along with exponentials: what a filter needs besides."""


def choose_backend(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    hidden_size: int | None = None,
) -> Backend:
    """The backend to use there: what was asked for, or what "auto" stands for.

    "auto" is Triton on a GPU where Triton is installed, else torch; of Triton's two what the launch
    table says was measured to be faster. Those that end in "-exp" are for bfloat16: any other dtype
    is computed as without the ending.

    Args:
        backend: what the user asked for.
        device: where the operands lie.
        dtype: of the operands.
        hidden_size: D, where it is known.

    Raises:
        ValueError: unknown, or not available here.
        TypeError: float64 for Triton.
    """
    check_choice("backend", backend, get_args(Backend))
    if backend == "auto":
        if device.type != "cuda" or not TRITON_INSTALLED:
            return "torch"
        return "triton" if hidden_size is None else _fastest(device, dtype, hidden_size)
    if backend in ("triton", "triton-exp"):
        if not TRITON_INSTALLED:
            raise ValueError(
                f'backend="{backend}" needs the package triton: install it or use "auto"'
            )
        if device.type != "cuda" and not TRITON_INTERPRETS:
            raise ValueError(
                f'backend="{backend}" needs a GPU, the tensors are on {device}: use "auto", or set '
                "TRITON_INTERPRET=1 before Python starts to run Triton's slow interpreter"
            )
        if backend == "triton-exp" and not _has_launches(device):
            raise ValueError(
                f'backend="triton-exp" has no launch for the architecture of {device}: use "triton"'
            )
        if dtype == torch.float64:
            raise TypeError('backend="triton" computes in float32: use "torch" for float64')
    if dtype != torch.bfloat16 and backend in ("torch-exp", "triton-exp"):
        return "torch" if backend == "torch-exp" else "triton"
    return backend


def filtering_backend(backend: Backend, device: torch.device) -> Backend:
    """The backend for a filter: "auto" is "triton-exp" on a GPU, "torch-exp" on a CPU.

    Args:
        backend: what the user asked for.
        device: where the operands lie.

    Raises:
        ValueError: unknown, without a filter, or not available here.
    """
    check_choice("backend", backend, ("auto", "triton-exp", "torch-exp"))
    if backend == "auto":
        backend = "torch-exp" if device.type == "cpu" else "triton-exp"
    return choose_backend(backend, device, torch.bfloat16)


# torch.compile must not look into the table.
@torch.compiler.assume_constant_result
def _fastest(device: torch.device, dtype: torch.dtype, hidden_size: int) -> Backend:
    return fastest_backend(architecture_of(device), dtype, hidden_size)


@torch.compiler.assume_constant_result
def _has_launches(device: torch.device) -> bool:
    return bool(entries_for(architecture_of(device)))


def kernels_of(backend: str) -> Kernels:
    """The parts of a backend that `choose_backend` returned, other than the reference."""
    if backend in ("triton", "triton-exp"):
        # Imported late: a machine without a GPU, or with macOS, may have no Triton.
        from redi.kernels import (
            exponentials_triton,
            filter_triton,
            segments_triton,
            softmax_triton,
        )

        kernels = Kernels(
            softmax_triton.softmax_rows,
            segments_triton.sum_segments,
            segments_triton.spread_segments,
        )
        if backend == "triton":
            return kernels
        products = LiveProducts(filter_triton.multiply_live_columns, filter_triton.add_live_rows)
        return replace(
            kernels, exponentials=exponentials_triton.exponentials, live_products=products
        )
    assert backend in ("torch", "torch-exp")
    kernels = Kernels(rows.softmax_rows, segments.sum_segments, segments.spread_segments)
    if backend == "torch":
        return kernels
    products = LiveProducts(multiply_live_columns, add_live_rows)
    return replace(kernels, exponentials=exponentials.exponentials, live_products=products)
