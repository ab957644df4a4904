"""Guards that stop a failing run: steps that are not finite, and collapse.

A step whose loss or gradient is not finite is skipped on the device (`optimizer.step_if`). Here
such steps are counted and their rows are named.

Collapse is described in arXiv 2505.24850 for alpha = 1 at high learning rates: the log-prob of
correct traces plunges while the updates surge. The surge is measured on the gradient before
clipping, not on the updates: AdamW divides its updates by the size of the gradient, and relative
to the learning rate they shrank in collapsing runs as in good ones (measured on the quickstart
task).

A guard reads only the step lines of metrics.jsonl, so a resumed run gives the same events as an
uninterrupted one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist

from redi.engine.config.sections import GuardConfig
from redi.engine.data.cache import TokenizedTraces
from redi.engine.distributed import World
from redi.engine.errors import InputError
from redi.engine.storage import shown
from redi.engine.train.checkpoint import complete_checkpoints
from redi.engine.train.metrics import read_metrics

WINDOW = 8
"""Steps over which the current value is taken as the median, because single steps are noisy."""
FALL = 1.0
"""Collapse needs a fall of the positives' mean log-prob by this fraction of its best value. (Good
runs of the quickstart and of bench/learning lost up to 0.85 of it, those at too high a learning
rate 1.5 and more.)"""
FALL_NATS = 0.2
"""The fall must also be at least this many nats per token."""
SURGE = 1.5
"""A surge is a gradient norm of at least this multiple of the smallest one of the run."""
PATIENCE = 8
"""Steps between the warning and the stop, if the collapse continues."""
NAMED_ROWS = 8
"""Maximum number of rows that a message names."""


@dataclass(frozen=True)
class PackResult:
    """Results of one pack of this rank in a step; tensors on the device."""

    sequence_ids: torch.Tensor
    """int64 [S] on the host: trace indices, -1 for a dummy."""
    loss: torch.Tensor
    means: torch.Tensor
    """float64 [S]: mean log-prob per token."""
    signs: torch.Tensor
    """int64 [S]."""
    further: torch.Tensor | None
    """float64 [S]: mean over tokens of the objective's further figure, see `StepResult`."""
    router_loss: torch.Tensor | None = None
    """The part of `loss` that is the routers'."""


@dataclass(frozen=True)
class GuardEvent:
    """A problem that a guard found after a step."""

    kind: Literal["not_finite", "collapse"]
    text: str
    is_warning: bool
    """True if the run continues, False if it ends."""


class Guards:
    """Checks a run step by step, with the same result on every rank.

    Args:
        section: settings.
        metrics: the run's metrics.jsonl, read by rank 0 alone.
        done: the step after which the run resumes.
        world: the ranks.

    Attributes:
        good_before: checkpoints of steps before this one predate any sign of a problem seen so
            far; None if collapse is not checked.
    """

    def __init__(self, section: GuardConfig, metrics: Path, done: int, world: World) -> None:
        self.good_before: int | None = None
        self._section = section
        self._skips = 0
        self._trend = Trend()
        self._fallen: int | None = None
        self._warned: int | None = None
        history: list[Any] = [None]
        if world.is_main and done:
            keys = ("step", "positive_logp", "loss", "grad_norm")
            history[0] = [
                {key: line.get(key) for key in keys}
                for line in read_metrics(metrics)
                if "loss" in line and line["step"] <= done
            ]
        dist.broadcast_object_list(history, src=0, group=world.checkpoint_group)
        for line in history[0] or []:
            self.after(line)  # its events were reported by the earlier attempt

    def after(self, line: dict[str, Any]) -> GuardEvent | None:
        """The event to report after a step, given its line of metrics.jsonl, or None."""
        step = line["step"]
        if not is_finite(line):
            return self._skipped(step)
        self._skips = 0
        if self._section.collapse == "off" or line["positive_logp"] is None:
            return None
        self._trend.add(line["positive_logp"], line["grad_norm"])
        return self._collapse(step)

    def _skipped(self, step: int) -> GuardEvent | None:
        self._skips += 1
        if self._skips < self._section.max_skips:
            return None
        if self._warned is None:
            self.good_before = step  # a skipped step does not change the weights
        first = step - self._skips + 1
        what = "with a loss or gradient that is not finite"
        return GuardEvent(
            "not_finite", f"{self._skips} steps in a row (from {first}) {what}", is_warning=False
        )

    def _collapse(self, step: int) -> GuardEvent | None:
        if not self._trend.fallen:
            self._fallen = None
        elif self._fallen is None:
            self._fallen = step
        what = self._trend.collapse(detected=self._warned is not None)
        if what is None:
            self._warned = None
        elif self._warned is None:
            self._warned = step
        # A fall shows in the median up to a window of steps late. The gradient may surge long after
        # the log-prob has fallen; checkpoints from between are ruined too.
        self.good_before = (self._fallen or step) - WINDOW
        if what is None or self._warned is None:
            return None
        advice = "lower optim.lr, or the weight of incorrect traces"
        if step == self._warned:
            text = f"step {step}: this looks like collapse: {what}; {advice}"
            return GuardEvent("collapse", text, is_warning=True)
        if self._section.collapse == "warn" or step < self._warned + PATIENCE:
            return None
        return GuardEvent(
            "collapse", f"collapse since step {self._warned}: {what}; {advice}", is_warning=False
        )


class Trend:
    """Log-probs of correct traces and gradient norms so far: current and best value of each.

    Collapse needs both signs. A lower log-prob alone is not enough, because it may decline slowly
    in a good run. Larger gradients alone are not enough, because they also grow when a phase of
    learning begins.
    """

    def __init__(self) -> None:
        self._logps: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._best = -math.inf
        self._smallest_norm = math.inf
        self._steps = 0

    def add(self, positive_logp: float, grad_norm: float) -> None:
        """Add a step that was not skipped."""
        self._steps += 1
        self._logps.append(positive_logp)
        self._norms.append(grad_norm)
        if self._steps >= WINDOW:
            self._best = max(self._best, median(self._logps))
            self._smallest_norm = min(self._smallest_norm, median(self._norms))

    @property
    def fallen(self) -> bool:
        """True if the log-prob is as far below its best value as in collapse."""
        if self._steps < WINDOW:
            return False
        return self._best - median(self._logps) >= max(FALL * abs(self._best), FALL_NATS)

    def collapse(self, *, detected: bool = False) -> str | None:
        """A description of the collapse if the run is collapsing now, else None.

        Args:
            detected: collapse was found at an earlier step. It then lasts as long as the log-prob
                stays low, because gradients also calm down after a collapse.
        """
        if self._steps < 2 * WINDOW or not self.fallen:
            return None
        logp, norm = median(self._logps), median(self._norms)
        if norm < SURGE * self._smallest_norm and not detected:
            return None
        fall = f"the log-prob of correct traces fell from {self._best:.3f} to {logp:.3f} a token"
        if detected:
            return fall
        return f"{fall}, the gradient is {norm / self._smallest_norm:.1f} times the smallest so far"


def check_not_collapsed(section: GuardConfig, run_dir: Path) -> None:
    """Refuse to resume a run that a guard ended after a collapse: its weights are ruined.

    A run that was ended by steps that are not finite may resume: they did not change the weights.

    Args:
        section: settings of the resumed run; only collapse = "stop" refuses.
        run_dir: may have the metrics of an earlier attempt.

    Raises:
        InputError: a guard ended that attempt; the message names the last good checkpoint.
    """
    collapsed = collapse_of(run_dir) if section.collapse == "stop" else None
    if collapsed:
        raise InputError(
            f"run.dir: {collapsed}; to train these weights anyway, set guard.collapse = "
            '"warn" or "off"'
        )


def collapse_of(run_dir: Path) -> str | None:
    """If a guard ended the run after a collapse: a message with the step and the last good
    checkpoint; else None."""
    metrics = run_dir / "metrics.jsonl"
    for line in read_metrics(metrics) if metrics.is_file() else ():
        if line.get("event") == "collapse" and line.get("goes_on") is False:
            return (
                f"{shown(run_dir)} collapsed and was ended at step {line['step']}; "
                f"{last_good(run_dir, complete_checkpoints(run_dir), line['good_before'])}"
            )
    return None


def last_good(run_dir: Path, complete: Iterable[int], good_before: int) -> str:
    """The checkpoint from which to restart a run that failed, as the end of a message.

    Args:
        run_dir: the run directory.
        complete: steps of its complete checkpoints.
        good_before: see `Guards`.
    """
    good = [step for step in complete if step < good_before]
    if not good:
        return (
            "the last good checkpoint: there is none (see run.save_every); start again with other "
            "settings and another run.dir"
        )
    return (
        f"the last good checkpoint: that of step {max(good)}; to continue from it with other "
        f"settings: redi export {shown(run_dir)} --step {max(good)}, then a new run whose "
        "model.path is the directory that this command prints"
    )


def is_finite(line: dict[str, Any]) -> bool:
    """True if the step of this line was taken (metrics.jsonl has null for values not finite)."""
    return all(line[key] is not None and math.isfinite(line[key]) for key in ("loss", "grad_norm"))


def name_rows(packs: Sequence[PackResult], tokens: TokenizedTraces, step: int) -> dict[str, Any]:
    """The event of a skipped step: which ranks and rows were not finite. Collective.

    Only called after such a step, so it may wait for the device.
    """
    mine = [tokens.where(int(index)) for one in packs for index in _not_finite(one)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    ranks = {str(rank): where[:NAMED_ROWS] for rank, where in enumerate(found) if where}
    return {"event": "skipped", "step": step, "rows": ranks}


def _not_finite(result: PackResult) -> list[int]:
    """Traces whose log-prob is not finite; all of the pack if only its loss is not finite."""
    bad = ~result.means.isfinite().cpu()
    if not bad.any() and not result.loss.isfinite():
        bad[:] = True
    return [index for index in result.sequence_ids[bad].tolist() if index >= 0]


def skip_message(event: dict[str, Any], loss: float, grad_norm: float) -> str:
    """One line about a skipped step."""
    named = [f"rank {rank}: {', '.join(rows)}" for rank, rows in event["rows"].items()]
    where = "; ".join(named) or "the gradient alone"
    return (
        f"step {event['step']} is skipped: loss {loss}, gradient norm {grad_norm}; not finite "
        f"at {where}"
    )
