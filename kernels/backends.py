"""Which backend computes when the caller leaves it open, and what a backend consists of."""

from redi.kernels.reference import Backend
from redi.kernels.rows import RowKernel, softmax_rows
from redi.kernels.validate import check_choice


def choose_backend(backend: Backend) -> Backend:
    """The backend to use: "reference", "torch" or "triton".

    Raises:
        ValueError: unknown, or not available here.
    """
    check_choice("backend", backend, ("auto", "reference", "torch", "triton"))
    if backend == "triton":
        raise ValueError('backend="triton" is not available in this version: use "auto" or "torch"')
    return "torch" if backend == "auto" else backend


def row_kernel(backend: str) -> RowKernel:
    """What a backend makes of a chunk of logits."""
    assert backend == "torch"
    return softmax_rows
