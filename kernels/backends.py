"""Which backend computes when the caller leaves it open, and the kernels of each backend."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import get_args

import torch
from torch import Tensor

from redi.kernels import segments, softmax, topk_softmax
from redi.kernels.reference import Backend
from redi.kernels.softmax import GradientRows
from redi.kernels.validate import check_choice

# Read once, as Triton reads its variable once, and outside of what torch.compile traces.
TRITON_INSTALLED = find_spec("triton") is not None
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


@dataclass(frozen=True)
class Kernels:
    """The parts in which backends differ."""

    softmax: Callable[..., Tensor | None]
    """See `softmax.softmax`."""
    topk_softmax: Callable[..., Tensor | None]
    """See `topk_softmax.topk_softmax`."""
    token_weights: Callable[..., tuple[Tensor, Tensor]]
    """See `segments.token_weights`."""
    sum_segments: Callable[[Tensor, Tensor], Tensor]
    """See `segments.sum_segments`."""
    spread_segments: Callable[[Tensor, Tensor, int], Tensor]
    """See `segments.spread_segments`."""
    exp_gemm: Callable[..., GradientRows | None] | None = None
    """Logits product and softmax in one, `experimental.exp_gemm_triton.exp_gemm`; None: none."""


def choose_backend(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    hidden_size: int | None = None,
) -> Backend:
    """The backend to use: the given one, or what "auto" means there.

    "auto" is "triton" on a GPU where Triton is installed ("triton-exp" where the launch table has a
    measurement that it is faster), else "torch". "triton-exp" is for bfloat16: any other dtype is
    computed as by "triton".

    Args:
        backend: what the user gave.
        device: of the operands.
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
        if hidden_size is None:
            return "triton"
        # Compared here, as under torch.compile D may be symbolic.
        faster = any(hidden_size == size for size in _sizes_for_triton_exp(device, dtype))
        return "triton-exp" if faster else "triton"
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
    if backend == "triton-exp" and dtype != torch.bfloat16:
        return "triton"
    return backend


def filtering_backend(backend: Backend, device: torch.device) -> Backend:
    """The backend for a filter: "auto" is "triton-exp" on a GPU, "torch" on a CPU.

    Raises:
        ValueError: unknown, without a filter, or not available here.
    """
    check_choice("backend", backend, ("auto", "torch", "triton-exp"))
    if backend == "auto":
        backend = "torch" if device.type == "cpu" else "triton-exp"
    return choose_backend(backend, device, torch.bfloat16)


# torch.compile must not trace the launch table.
@torch.compiler.assume_constant_result
def _sizes_for_triton_exp(device: torch.device, dtype: torch.dtype) -> tuple[int, ...]:
    from redi.kernels.experimental import launches

    return launches.sizes_for_triton_exp(launches.architecture_of(device), dtype)


@torch.compiler.assume_constant_result
def _has_launches(device: torch.device) -> bool:
    from redi.kernels.experimental import launches

    return bool(launches.entries_for(launches.architecture_of(device)))


def kernels_of(backend: str) -> Kernels:
    """The kernels of a backend that `choose_backend` returned, other than the reference."""
    if backend == "torch":
        return Kernels(
            softmax.softmax,
            topk_softmax.topk_softmax,
            segments.token_weights,
            segments.sum_segments,
            segments.spread_segments,
        )
    # Imported late: a machine without a GPU, or with macOS, may have no Triton.
    from redi.kernels import segments_triton, softmax_triton, topk_triton

    kernels = Kernels(
        softmax_triton.softmax,
        topk_triton.topk_softmax,
        segments_triton.token_weights,
        segments_triton.sum_segments,
        segments_triton.spread_segments,
    )
    if backend == "triton":
        return kernels
    assert backend == "triton-exp"
    from redi.kernels.experimental import exp_gemm_triton

    return replace(kernels, exp_gemm=exp_gemm_triton.exp_gemm)
