"""Process group and devices. A single process is a world of size 1, so one loop serves all."""

from __future__ import annotations

import os
import pickle
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from redi.engine.errors import InputError, RunError
from redi.engine.failure import FailureWatch

# Rank 0 may tokenize for hours while the others wait.
PREPARE_TIMEOUT = timedelta(hours=24)
# Of a collective. Outside of training's steps ranks differ by minutes: one loads weights, compiles,
# writes or generates while others wait.
START_TIMEOUT = timedelta(minutes=30)

VISIBLE_SECONDS = 120.0
"""How long a rank waits for a file that rank 0 has written. A client of a network file system may
remember for up to a minute (NFS: acdirmax) that a file does not exist."""

# How rank 0's work ended, as published to the other ranks, and the error that they then raise.
OUTCOMES = {"input": InputError, "stop": KeyboardInterrupt, "run": RunError}

# In the messages of gloo and NCCL if a rank has ended or its machine does not answer.
LOST = re.compile(
    "closed by peer|reset by peer|broken pipe|timed out|connection refused|ncclRemoteError",
    re.IGNORECASE,
)

T = TypeVar("T")


@dataclass
class World:
    """This process among all processes of a run.

    Attributes:
        rank, size: rank of this process and number of processes.
        device: device of this process.
        store: key-value store shared by all ranks, for waits longer than a collective's timeout.
        checkpoint_group: separate gloo group for background saves; on the default group their
            collectives would interleave with training's and hang.
        calls: number of calls of the methods that wait for rank 0, equal on every rank.
        limit: timeout of the collectives of all groups but `checkpoint_group`.
    """

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    checkpoint_group: dist.ProcessGroup
    calls: Counter[str] = field(default_factory=Counter)
    limit: timedelta = START_TIMEOUT

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def any_rank(self, here: bool) -> bool:
        """Return whether `here` is true on any rank. Collective; synchronizes with the device."""
        flag = torch.tensor(float(here), device=self.device)
        dist.all_reduce(flag)
        return bool(flag)

    @contextmanager
    def timeout(self, limit: timedelta) -> Iterator[None]:
        """Within the context, collectives of training fail after `limit`.

        Background saves keep START_TIMEOUT: a rank may write for longer than a step takes.
        """
        before = self.limit
        self._set_timeout(limit)
        yield
        self._set_timeout(before)  # not after an error, which ends the job

    def _set_timeout(self, limit: timedelta) -> None:
        # torch has no public function for this, and none that lists the groups that meshes made.
        for group in list(c10d._world.pg_map):
            if group is not self.checkpoint_group:
                c10d._set_pg_timeout(limit, group)
        self.limit = limit

    def after_rank0(self) -> None:
        """Wait until rank 0 has come here too. Collective.

        For work of rank 0 alone that may take longer than a collective's timeout.
        """
        key = self._key("after_rank0")
        if self.is_main:
            self.store.set(key, "")
        else:
            self.store.wait([key], PREPARE_TIMEOUT)

    def _key(self, method: str) -> str:
        # Counted by method: rank 0 may call one within the other.
        self.calls[method] += 1
        return f"{method}/{self.calls[method]}"

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, then on the other ranks.

        Raises:
            InputError, KeyboardInterrupt: on every rank, if `work` raised it on rank 0.
            RunError: likewise. Any other error on rank 0 is a RunError on the other ranks.
        """
        if self.is_main:
            return self._announce(work, lambda result: b"")
        self._await_rank0()
        return work()

    def from_rank0(
        self, work: Callable[[], T], written: Callable[[T], Iterable[Path]] = lambda result: ()
    ) -> T:
        """Run `work` on rank 0 alone and return a pickled copy of its result on the other ranks.

        Args:
            work: reads or writes files that the other ranks may see later than rank 0.
            written: given the result, the files that the other ranks need. They wait until they
                see them, and then unpickle the result.

        Raises:
            InputError, KeyboardInterrupt, RunError: as `rank0_first`; RunError also on a rank that
                does not see the files.
        """
        if self.is_main:
            return self._announce(
                work,
                lambda result: pickle.dumps(
                    ({file: file.stat().st_size for file in written(result)}, pickle.dumps(result))
                ),
            )
        sizes, pickled = pickle.loads(self._await_rank0())
        await_files(sizes, self.rank)
        result: T = pickle.loads(pickled)
        return result

    def once_per_node(self, work: Callable[[], object]) -> None:
        """Run `work` on rank 0, then on the first rank of each other machine. All ranks wait.

        Raises:
            InputError, KeyboardInterrupt, RunError: as `rank0_first`.
        """
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        self.rank0_first(lambda: work() if first else None)
        if self.size > 1:
            key = self._key("once_per_node")
            done = [f"{key}/{rank}" for rank in range(self.size)]
            self.store.set(done[self.rank], "")
            self.store.wait(done, PREPARE_TIMEOUT)

    def _announce(self, work: Callable[[], T], describe: Callable[[T], bytes]) -> T:
        """Run `work` and publish `describe` of its result, or its error, to the other ranks."""
        if self.size == 1:
            return work()
        key = self._key("rank0")
        try:
            result = work()
            message = describe(result)
        except BaseException as error:
            kind = next((n for n, known in OUTCOMES.items() if isinstance(error, known)), "run")
            self.store.set(key, f"{kind} {error}")
            raise
        self.store.set(key, b"done " + message)  # type: ignore[arg-type]  # bytes are kept
        return result

    def _await_rank0(self) -> bytes:
        """What rank 0 published in the same call."""
        key = self._key("rank0")
        self.store.wait([key], PREPARE_TIMEOUT)
        kind, _, message = self.store.get(key).partition(b" ")
        if kind != b"done":
            raise OUTCOMES[kind.decode()](message.decode())
        return message


def await_files(sizes: Mapping[Path, int], rank: int) -> None:
    """Wait until files that another machine has written are visible here.

    Args:
        sizes: bytes of each file.
        rank: of this process, for the message.

    Raises:
        RunError: a file is missing or has another size after `VISIBLE_SECONDS`.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    missing = list(sizes)
    while missing := [file for file in missing if _size(file) != sizes[file]]:
        if time.monotonic() > deadline:
            file = missing[0]
            raise RunError(
                f"rank {rank}: {file}: not visible after {VISIBLE_SECONDS:.0f} s ({sizes[file]} "
                f"bytes on rank 0, {_size(file) or 0} here); its folder must be on a file system "
                "that all machines share"
            )
        time.sleep(0.2)


def _size(file: Path) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        # A network file system's client asks the server when a folder or file is opened; a plain
        # stat may be answered from its memory.
        with os.scandir(file.parent), file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_size
    except OSError:
        return None


@contextmanager
def join_world() -> Iterator[World]:
    """Join the process group that torchrun set up in the environment, else create one of size 1.

    The group is destroyed only after success. Destroying waits for the other ranks, and these may
    sit in collectives that the failed rank never joins; `end_job` ends them.

    Raises:
        InputError: there is no GPU for this rank.
        RunError: a collective inside the block failed, mostly because another rank was lost.
    """
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"local rank {local_rank} has no GPU: this machine has "
                f"{torch.cuda.device_count()}; lower --nproc-per-node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # gloo in addition to nccl: host-side collectives must not touch the GPU's stream.
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    if "RANK" in os.environ:
        try:
            shared, rank, size = next(rendezvous("env://"))
            store = _own_store(shared, rank, size)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=START_TIMEOUT
            )
        except RuntimeError as error:  # torch's errors of stores and groups are of this type
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RunError(f"the ranks cannot join at {place}: {_cause(error)}") from error
    else:
        rank, size, store = 0, 1, dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    watch = FailureWatch(store, rank, size) if size > 1 else None
    saves = dist.new_group(backend="gloo", timeout=START_TIMEOUT)
    world = World(rank, size, device, store, checkpoint_group=saves)
    succeeded = False
    try:
        with explained():
            yield world
            # Without torchrun rank 0 hosts the store, so it must not leave first.
            dist.barrier(world.checkpoint_group)
        succeeded = True
    finally:
        if watch is None:
            dist.destroy_process_group()
        elif succeeded:
            watch.close()
            dist.destroy_process_group()


@contextmanager
def explained() -> Iterator[None]:
    """Turn the error of a collective into a RunError of one line."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors.
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        cause = _cause(error)
        late = re.search(r"Timed out waiting (\d+)ms", cause)
        if late:
            what = f"another rank did not answer for {int(late[1]) // 1000:,} s"
        elif LOST.search(cause):
            what = "another rank was lost"
        else:
            what = "communication between ranks failed"
        raise RunError(
            f"{what} ({cause}); the same command resumes from the newest complete checkpoint"
        ) from error


def _cause(error: RuntimeError) -> str:
    """The message of an error of torch, without the native stack."""
    return " ".join(str(error).partition("Exception raised from")[0].split())


def _own_store(shared: dist.Store, rank: int, size: int) -> dist.Store:
    """Prefix of the store that only the ranks of this start have written to.

    torchrun keeps its store when it restarts the ranks (torch 2.13), so some ranks would connect
    to addresses of dead processes and wait. No number from torchrun is equal on all machines and
    different at each start. So rank 0 draws a random name and acknowledges each rank that has read
    it.
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
