"""Where a step's time goes: its parts by the clock, and its device time by kind of operation."""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from redi.bench.measure import Step

# The first that an operation's or kernel's name matches. Matrix products of the loss are among the
# products.
KINDS = {
    "attention": r"flash|fmha|attention|attn|varlen",
    "loss, but products": r"softmax_kernel|exp_gemm|finalise|target_logits|token_weights|segment"
    r"|log_softmax|nll_loss|redi::",
    "products": r"gemm|nvjet|cutlass|cublas|xmma|::(add|b)?mm$|::linear",
    "optimizer and clipping": r"multi_tensor|adam|foreach|_norm",
    "communication": r"nccl|c10d|gloo|fsdp::",
    "copies": r"memcpy|memset|copy_|::cat$",
}
OTHER = "other elementwise operations and norms"


class Parts:
    """Seconds of a step's parts. Off, `part` does nothing, so that timed steps are not slowed.

    On, the host waits for the device before and after each part, so parts do not overlap.
    """

    def __init__(self, device: str) -> None:
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._seconds: dict[str, float] | None = None
        self._began: dict[str, float] = {}

    def of(self, step: Step) -> dict[str, float]:
        """Run a step; each part's share of it, by name. A part inside another is in both."""
        self._seconds = defaultdict(float)
        self._wait()
        began = time.perf_counter()
        step()
        self._wait()
        whole = time.perf_counter() - began
        shares = {name: seconds / whole for name, seconds in self._seconds.items()}
        self._seconds = None
        return shares

    def begin(self, name: str) -> None:
        """A part begins."""
        if self._seconds is not None:
            self._wait()
            self._began[name] = time.perf_counter()

    def end(self, name: str) -> None:
        """The part ends."""
        if self._seconds is not None:
            self._wait()
            self._seconds[name] += time.perf_counter() - self._began.pop(name)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block is a part."""
        self.begin(name)
        yield
        self.end(name)


def kind_of(name: str) -> str:
    """The kind of an operation or a GPU kernel, a key of `KINDS`, or `OTHER`."""
    found = (kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE))
    return next(found, OTHER)


def device_time(step: Step, device: str) -> dict[str, float]:
    """Run a step under the profiler; share of each kind in the device's busy time, largest first.

    On a CPU the device's time is that of operations without inner ones.
    """
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if event.is_user_annotation or on_device != (device == "cuda"):
            continue  # a range, or the operation that launched a kernel, would count it again
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        spent[kind_of(event.key)] += own
    whole = spent.total()
    return {kind: own / whole for kind, own in spent.most_common()} if whole else {}
