"""Fixtures of all tests."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

# pytest's importlib mode puts no folder on the path; test files share helpers that lie here.
sys.path.append(str(Path(__file__).parent))

# Without a card Triton's kernels run by its interpreter, which Triton asks for when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernel_cases import EXP_TARGETS, TARGETS, Target

from redi.kernels.backends import TRITON_INSTALLED, TRITON_INTERPRETS

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("any time", deadline=None)
hypothesis.settings.load_profile("any time")


def pytest_configure() -> None:
    """What holds in all tests."""
    speed_up_interpreter()


def speed_up_interpreter() -> None:
    """Triton's interpreter patches its language at each call of a function from a kernel, which
    takes about as long as the kernel itself; once for each module that defines one is enough."""
    if not (TRITON_INSTALLED and TRITON_INTERPRETS):
        return
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call, patched = InterpretedFunction.__call__, set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__ in patched:
            return function.rewrite()(*args, **kwargs)
        patched.add(function.fn.__module__)
        return patch_and_call(function, *args, **kwargs)

    InterpretedFunction.__call__ = call


SLOW_TARGETS = [pytest.param(target, marks=pytest.mark.slow) for target in EXP_TARGETS]


@pytest.fixture(params=TARGETS + SLOW_TARGETS, ids="-".join)
def target(request: pytest.FixtureRequest) -> Target:
    """Each backend of the loss ops on each device that it runs on here."""
    return request.param


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN (integers: the lowest): who reads it before writing is found out."""
    poison_memory(monkeypatch)


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch's allocators fill what they return."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
                return tensor
            with torch.no_grad():
                if tensor.is_floating_point():
                    return tensor.fill_(torch.nan)
                if tensor.dtype in (torch.int32, torch.int64):
                    return tensor.fill_(torch.iinfo(tensor.dtype).min)
            return tensor

        return allocate_and_fill

    # torch remembers its allocators at the first use of a device context: not the patched ones.
    with torch.device("meta"):
        torch.empty(0)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
