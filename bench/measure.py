"""Time and peak memory of a step, on a GPU and on a CPU.

Memory is the peak of one step minus the memory in use before it. On CUDA the allocator measures it.
On a CPU it is the high-water mark of the resident set of a process that does nothing else, minus
its resident set before. So pages count when they are touched, not when they are reserved, and
buffers of the matrix library count too.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

Step = Callable[[], object]


def seconds_of(step: Step, device: str) -> float:
    """Seconds of one step: CUDA events on the current stream, the clock on a CPU."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def time_in_turns(
    steps: Mapping[str, Step], device: str, repeats: int, limit_s: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each repeat of each step, turn by turn, so that load affects all steps alike.

    Args:
        steps: what to time, by name.
        device: "cpu" or "cuda".
        repeats: turns at most.
        limit_s: no further turn begins after this time; one always runs.

    Returns:
        (seconds by name, problem by name): a step that raises is removed from the first, and the
        others continue.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    problems: dict[str, str] = {}
    began = time.perf_counter()
    for turn in range(1 + repeats):
        if turn == 1:  # the turn before compiled, and removed the steps that cannot run
            began = time.perf_counter()
        elif turn > 1 and time.perf_counter() - began > limit_s:
            break
        for name in list(seconds):
            try:
                if device == "cuda":
                    # Untimed first: warm up, and allocate the blocks just freed.
                    torch.cuda.empty_cache()
                    steps[name]()
                taken = seconds_of(steps[name], device)
            except Exception as error:  # a peer may raise anything
                problems[name] = problem_line(error)
                del seconds[name]
            else:
                if turn > 0:
                    seconds[name].append(taken)
    return seconds, problems


def problem_line(error: Exception) -> str:
    """An exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def peak_cuda(step: Step) -> float:
    """Peak MiB that one step allocates on the GPU in addition to what is allocated before it."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_resident(step: Step) -> float:
    """Peak MiB by which one step raises this process's resident set."""
    # On Linux this resets the high-water mark, which making the operands may have raised.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes()
    step()
    return max(0.0, peak_resident_bytes() - before) / 2**20


def peak_resident_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """The high-water mark of this process's resident set, or of its largest ended child's."""
    peak = resource.getrusage(who).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():  # macOS: the peak so far, which loading may have raised
        return peak_resident_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
