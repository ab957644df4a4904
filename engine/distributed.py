"""Processes and devices: one process is a world of one, so that one loop serves all."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from redi.engine.errors import InputError, RunError

# Rank 0 may tokenize for hours while the others wait.
PREPARE_TIMEOUT = timedelta(hours=24)

# What rank 0 tells the others of how its work ended.
OUTCOMES = {"input": InputError, "stop": KeyboardInterrupt, "run": RunError}

T = TypeVar("T")


@dataclass
class World:
    """Where this process stands.

    Attributes:
        rank, size: among all processes.
        device: what this process computes on.
        store: key-value store shared by all ranks, for waits that outlast a collective's timeout.
        checkpoint_group: gloo group of its own for background saves; on the default group their
            collectives would interleave with training's and hang.
        calls: how many times `rank0_first` ran, the same on every rank.
    """

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    checkpoint_group: dist.ProcessGroup
    calls: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def any_rank(self, here: bool) -> bool:
        """Whether `here` is true on any rank. Collective; waits for the device."""
        flag = torch.tensor(float(here), device=self.device)
        dist.all_reduce(flag)
        return bool(flag)

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, then on the others, who find its result on disk.

        Raises:
            InputError, KeyboardInterrupt: on every rank, when rank 0's `work` raised it.
            RunError: likewise; any other error of rank 0 is one on the others.
        """
        if self.size == 1:
            return work()
        self.calls += 1
        key = f"rank0_first/{self.calls}"
        if self.is_main:
            try:
                result = work()
            except BaseException as error:
                kind = next((n for n, known in OUTCOMES.items() if isinstance(error, known)), "run")
                self.store.set(key, f"{kind} {error}")
                raise
            self.store.set(key, "done")
            return result
        self.store.wait([key], PREPARE_TIMEOUT)
        outcome = self.store.get(key).decode()
        kind, _, text = outcome.partition(" ")
        if kind != "done":
            raise OUTCOMES[kind](text)
        return work()


@contextmanager
def join_world() -> Iterator[World]:
    """Join the world that torchrun describes in the environment, else make one of one process.

    Raises:
        InputError: this rank has no card.
        RunError: in the block, another rank was lost.
    """
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"local rank {local_rank} has no card: this machine has "
                f"{torch.cuda.device_count()}; lower --nproc-per-node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # gloo beside nccl: host-side collectives must not touch the card's stream.
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    if "RANK" in os.environ:
        shared, rank, size = next(rendezvous("env://"))
        store = _own_store(shared, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        world = World(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            device=device,
            store=store,
            checkpoint_group=dist.new_group(backend="gloo"),
        )
        yield world
        # Without torchrun the store is rank 0's, which must not be the first to leave.
        dist.barrier(world.checkpoint_group)
    except RuntimeError as error:
        # gloo's errors have no type of their own.
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        cause = str(error).partition(". ")[0]
        raise RunError(
            f"another rank was lost ({cause}); the same command goes on from the newest complete "
            "checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def _own_store(shared: dist.Store, rank: int, size: int) -> dist.Store:
    """The part of a store that the ranks of this start, and none before it, have written in.

    torchrun keeps its store when it starts the ranks again (torch 2.13): some would meet at the
    addresses of the dead and wait for them. No number that it gives is the same on all machines and
    another at each start, so rank 0 draws a name, and answers each rank that has read it.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        shared.set("start", name)
        for other in range(1, size):
            shared.set(f"{name}/{shared.get(f'{name}/{other}').decode()}", "")
        return dist.PrefixStore(name, shared)
    while True:
        start = shared.get("start").decode()
        shared.set(f"{start}/{rank}", name)
        if shared.check([f"{start}/{name}"]):
            return dist.PrefixStore(start, shared)
        time.sleep(0.1)
