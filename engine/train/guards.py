"""What stops a run that has gone wrong: steps that are not finite, and collapse.

A step whose loss or gradient is not finite is left out on the device (`optimizer.step_if`); here
it is counted and its rows are named. Collapse is what arXiv 2505.24850 describes of alpha = 1 at
high learning rates: the log-prob of correct traces plunges while the updates surge. The surge is
read off the gradient before clipping: AdamW divides its updates by the gradient's own size, and
relative to the learning rate they shrank in collapsing runs as in sound ones (measured on the
quickstart task). A guard sees nothing but the step lines of metrics.jsonl, so a resumed run judges
as one never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
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
from redi.engine.train.checkpoint import complete_checkpoints
from redi.engine.train.metrics import read_metrics

WINDOW = 8
"""Steps whose median stands for now: single steps scatter."""
FALL = 1.0
"""A fall of the positives' mean log-prob by this share of its best value, and ... (Good runs of the
quickstart and of bench/learning lost up to 0.85 of it, those at too high a rate 1.5 and more.)"""
FALL_NATS = 0.2
"""... by so many nats a token at least, is no slow decline any more."""
SURGE = 1.5
"""So many times the smallest gradient norm of the run is a surge."""
PATIENCE = 8
"""Steps between the warning and the stop, if collapse goes on."""
NAMED_ROWS = 8
"""Rows that a message names at most."""


@dataclass(frozen=True)
class Row:
    """What one packed row of this rank came to in a step; tensors on the device."""

    sequence_ids: torch.Tensor
    """int64 [S] on the host: indices of traces, -1 for a dummy."""
    loss: torch.Tensor
    means: torch.Tensor
    """float64 [S]: mean log-probs per token."""
    signs: torch.Tensor
    """int64 [S]."""
    dropped: torch.Tensor | None
    """float64 [S]: mean share of a token's probability that a filter left out of the gradient."""


@dataclass(frozen=True)
class GuardEvent:
    """What a guard has to say after a step."""

    kind: Literal["not_finite", "collapse"]
    text: str
    goes_on: bool
    """Whether this is only a warning."""


class Guards:
    """Judges a run step by step, the same on every rank.

    Args:
        section: what to do.
        metrics: the run's metrics.jsonl, read by rank 0 alone.
        done: the step that the run goes on after.
        world: the ranks.

    Attributes:
        good_before: checkpoints of earlier steps are from before anything went wrong, as far as
            can be told now; None where collapse is not watched for.
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
            self.after(line)  # what it says was said then

    def after(self, line: dict[str, Any]) -> GuardEvent | None:
        """What is to be said after a step, given its line of metrics."""
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
            self.good_before = step  # a step that is left out leaves the weights as they were
        first = step - self._skips + 1
        what = "with a loss or gradient that is not finite"
        return GuardEvent(
            "not_finite", f"{self._skips} steps in a row (from {first}) {what}", False
        )

    def _collapse(self, step: int) -> GuardEvent | None:
        if not self._trend.fallen:
            self._fallen = None
        elif self._fallen is None:
            self._fallen = step
        what = self._trend.collapse(going_on=self._warned is not None)
        if what is None:
            self._warned = None
        elif self._warned is None:
            self._warned = step
        # A window of steps goes by before a fall shows in its median. The gradient may surge much
        # later than the log-prob falls: what was saved between is as ruined.
        self.good_before = (self._fallen or step) - WINDOW
        if what is None or self._warned is None:
            return None
        advice = "lower optim.lr, or the weight of incorrect traces"
        if step == self._warned:
            text = f"step {step}: this looks like collapse: {what}; {advice}"
            return GuardEvent("collapse", text, True)
        if self._section.collapse == "warn" or step < self._warned + PATIENCE:
            return None
        return GuardEvent(
            "collapse", f"collapse since step {self._warned}: {what}; {advice}", False
        )


class Trend:
    """Log-probs of correct traces and gradient norms so far: the best of each, and now.

    Both signs of collapse are needed. That the log-prob has fallen says little alone: it may
    decline slowly in a good run. Nor that gradients have grown: they do when a phase of learning
    begins.
    """

    def __init__(self) -> None:
        self._logps: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._best = -math.inf
        self._calmest = math.inf
        self._steps = 0

    def add(self, positive_logp: float, grad_norm: float) -> None:
        """One step that was taken."""
        self._steps += 1
        self._logps.append(positive_logp)
        self._norms.append(grad_norm)
        if self._steps >= WINDOW:
            self._best = max(self._best, median(self._logps))
            self._calmest = min(self._calmest, median(self._norms))

    @property
    def fallen(self) -> bool:
        """Whether the log-prob is as far below its best as in collapse."""
        if self._steps < WINDOW:
            return False
        return self._best - median(self._logps) >= max(FALL * abs(self._best), FALL_NATS)

    def collapse(self, *, going_on: bool = False) -> str | None:
        """What shows that a run collapses now, or None.

        Once seen it goes on as long as the log-prob stays down: gradients calm in ruin too.
        """
        if self._steps < 2 * WINDOW or not self.fallen:
            return None
        logp, norm = median(self._logps), median(self._norms)
        if norm < SURGE * self._calmest and not going_on:
            return None
        fall = f"the log-prob of correct traces fell from {self._best:.3f} to {logp:.3f} a token"
        if going_on:
            return fall
        return f"{fall}, the gradient is {norm / self._calmest:.1f} times the smallest so far"


def check_not_collapsed(section: GuardConfig, run_dir: Path) -> None:
    """A run that collapsed would only train its ruined weights on.

    One that steps without a finite loss have ended may go on: they left its weights as they were.

    Args:
        section: what to do about collapse now; only "stop" refuses.
        run_dir: with the metrics of an earlier attempt, or without.

    Raises:
        InputError: the guard ended that attempt; it says where the last good checkpoint is.
    """
    collapsed = collapse_of(run_dir) if section.collapse == "stop" else None
    if collapsed:
        raise InputError(
            f"run.dir: {collapsed}; to train these weights on all the same, set guard.collapse = "
            '"warn" or "off"'
        )


def collapse_of(run_dir: Path) -> str | None:
    """That a guard ended a run which collapsed, when, and where the last good checkpoint is."""
    metrics = run_dir / "metrics.jsonl"
    for line in read_metrics(metrics) if metrics.is_file() else ():
        if line.get("event") == "collapse" and line.get("goes_on") is False:
            return (
                f"{run_dir} collapsed and was ended at step {line['step']}; "
                f"{last_good(run_dir, line['good_before'])}"
            )
    return None


def last_good(run_dir: Path, good_before: int) -> str:
    """Where a run that went wrong can be taken up, for a message.

    Args:
        good_before: as `Guards` has it.
    """
    good = [step for step in complete_checkpoints(run_dir) if step < good_before]
    if not good:
        return (
            "the last good checkpoint: there is none (see run.save_every); start again with other "
            "settings in another run.dir"
        )
    return (
        f"the last good checkpoint: that of step {max(good)}; to go on from it with other "
        f"settings: redi export {run_dir} --step {max(good)}, then a run of its own whose "
        "model.path is the folder that this prints"
    )


def is_finite(line: dict[str, Any]) -> bool:
    """Whether a step was taken, by its line (metrics.jsonl has null for what is not finite)."""
    return all(line[key] is not None and math.isfinite(line[key]) for key in ("loss", "grad_norm"))


def name_rows(rows: Sequence[Row], tokens: TokenizedTraces, step: int) -> dict[str, Any]:
    """The event of a step that was left out: which ranks and rows were not finite. Collective.

    Only called after such a step, so it may wait for the device.
    """
    mine = [tokens.where(int(index)) for row in rows for index in _not_finite(row)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    ranks = {str(rank): where[:NAMED_ROWS] for rank, where in enumerate(found) if where}
    return {"event": "skipped", "step": step, "rows": ranks}


def _not_finite(row: Row) -> list[int]:
    """The traces whose log-prob is not finite; all of the row where only its loss is not."""
    bad = ~row.means.isfinite().cpu()
    if not bad.any() and not row.loss.isfinite():
        bad[:] = True
    return [index for index in row.sequence_ids[bad].tolist() if index >= 0]


def skip_message(event: dict[str, Any], loss: float, grad_norm: float) -> str:
    """One line on a step that was left out."""
    named = [f"rank {rank}: {', '.join(rows)}" for rank, rows in event["rows"].items()]
    where = "; ".join(named) or "the gradient alone"
    return (
        f"step {event['step']} is left out: loss {loss}, gradient norm {grad_norm}; not finite "
        f"at {where}"
    )
