"""When Python collects cyclic garbage: between steps and after a run, never inside a step.

A collection visits hundreds of thousands of objects and stops the host for 0.1 s or more. If each
rank collected when its own counters are full, all others would wait for it, each time for another.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 50
"""Steps between collections during training."""


@contextmanager
def collected_at_the_end() -> Iterator[None]:
    """Free what the block allocated, also what is in reference cycles.

    FSDP's modules and their hooks refer to each other, so the next recipe would otherwise build its
    model while this one is still in memory, until Python happens to collect. The block should be a
    call, so that no frame holds what it allocated. Older objects are not visited.
    """
    gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        gc.unfreeze()


@contextmanager
def no_automatic_collection() -> Iterator[None]:
    """Within the context only `collect_after` collects; the previous setting is restored."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def collect_after(step: int) -> None:
    """Collect young objects after each `EVERY`-th step, hence on all ranks at the same time."""
    if step % EVERY == 0:
        gc.collect(1)


def collect_after_evaluation() -> None:
    """Collect all objects: evaluation makes caches, and ranks wait for each other there anyway."""
    gc.collect()
