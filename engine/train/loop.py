"""The steps of a run: training, evaluation, checkpoints, metrics and guards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.loader import StepBatches, StepLoader
from redi.engine.data.packing import Cost
from redi.engine.distributed import START_TIMEOUT, World, explained
from redi.engine.errors import RunError
from redi.engine.failure import announced
from redi.engine.model.flops import ModelSize
from redi.engine.model.student import Student
from redi.engine.storage import LocalRun, shown
from redi.engine.train.checkpoint import Checkpointer
from redi.engine.train.garbage import (
    collect_after,
    collect_after_evaluation,
    no_automatic_collection,
)
from redi.engine.train.guards import GuardEvent, Guards, last_good, name_rows, skip_message
from redi.engine.train.metrics import MetricsLog, timed
from redi.engine.train.mfu import Utilization
from redi.engine.train.optimizer import Optimizer, set_rate
from redi.engine.train.prepare_data import PreparedData
from redi.engine.train.profile import profiling
from redi.engine.train.run_folder import file_errors_named, report_what_ran
from redi.engine.train.samples import HeldOutSamples
from redi.engine.train.signals import StopRequest
from redi.engine.train.step import StepResult, train_step
from redi.engine.train.trackers import open_trackers
from redi.engine.train.validation import validate

RESUMES = "the same command resumes from here"


@dataclass(frozen=True)
class Training:
    """What the steps of a run work with."""

    recipe: Recipe
    """Resolved."""
    run: LocalRun
    data: PreparedData
    size: ModelSize
    cost: Cost
    """Of a sequence; packing balances it."""
    rate: Callable[[int], float]
    """The learning rate of a step."""
    workers: int
    """Processes that build packs ahead."""
    student: Student
    """Sharded."""
    optimizer: Optimizer


def train(
    training: Training, complete: Sequence[int], world: World, console: Console, stop: StopRequest
) -> bool:
    """Run the remaining steps after the newest of the complete checkpoints.

    Args:
        complete: steps of the run's complete checkpoints.

    Returns:
        False if a signal stopped them early.
    """
    recipe, data, cost, run_dir = training.recipe, training.data, training.cost, training.run.folder
    student, optimizer, rate = training.student, training.optimizer, training.rate
    total = data.schedule.total_steps
    checkpointer = Checkpointer(
        training.run, complete, recipe.run.keep, student, optimizer, world, console
    )
    done = checkpointer.load_newest()
    group, groups = student.context.place(world)
    loader = StepLoader(
        data.tokens,
        data.examples,
        data.schedule,
        row_tokens=recipe.train.resolved_row_tokens,
        rank=group,
        world_size=groups,
        cost=cost,
        gather=recipe.shard.gather,
        slice=student.context.slice,
        workers=training.workers,
        pin=world.device.type == "cuda",
        teacher=data.teacher,
        mismatched=data.mismatched,
        share_prompts=training.size.shares_prompts(recipe),
    )
    trackers = open_trackers(recipe, run_dir, done) if world.is_main else []
    metrics = MetricsLog(run_dir / "metrics.jsonl", done, trackers, active=world.is_main)
    problems = data.held_out.problems if data.held_out else None
    samples = HeldOutSamples(recipe, problems, student, run_dir, done, metrics, world, console)
    progress = console.progress("step", total, done)
    guards = Guards(recipe.guard, run_dir / "metrics.jsonl", done, world)
    utilization = Utilization(recipe, training.size, world)
    if done:
        console.say(f"{shown(run_dir)}: resumes after step {done}")
    if data.held_out is not None:
        console.say(
            f"held out: {len(data.held_out.sequences):,} traces, evaluated before step 1, every "
            f"{recipe.eval.every} steps and after the last"
        )

    def evaluate(step: int) -> bool:
        """False if a stop request interrupted it; a resumed run then evaluates again."""
        if data.held_out is None or (step % recipe.eval.every and step < total):
            return True
        with world.timeout(START_TIMEOUT):  # ranks may generate for minutes more than others
            scores = validate(
                student,
                data.held_out,
                row_tokens=recipe.train.resolved_row_tokens,
                cost=cost,
                world=world,
                stop=stop,
            )
        collect_after_evaluation()
        if scores is None:
            return False
        metrics.write({"event": "eval", "step": step, **scores})
        console.say(f"held out after step {step}: {_held_out_figures(scores)}")
        if step < total:  # `finish` starts the last ones, after those before have ended
            with world.timeout(START_TIMEOUT):
                samples.start(step)
        return True

    with (
        no_automatic_collection(),
        closing(checkpointer),
        closing(metrics),
        closing(samples),
        closing(progress),
        ExitStack() as after_first_step,
        profiling(recipe.run.profile_steps, total, run_dir, world, console) as profile,
        announced(),
        explained(),
        file_errors_named(run_dir),
        _save_first(checkpointer),
    ):
        if world.any_rank(stop.requested) or not evaluate(done):
            console.say(f"stopped after step {done} of {total}; {RESUMES}")
            return False
        began = time.perf_counter()
        profile.before(done + 1)
        for batches, waited in timed(loader.steps(done)):
            step = batches.step
            # Dropout, if any, depends on seed, step and rank alone: no state has to be saved.
            drawn = np.random.SeedSequence([recipe.train.seed, step, world.rank])
            torch.manual_seed(int(drawn.generate_state(1, np.uint64)[0]))
            set_rate(optimizer, rate(step))
            result, packs = train_step(
                student,
                optimizer,
                batches,
                recipe,
                world,
                stop_requested=stop.requested,
                save_failed=checkpointer.failed,
                data_seconds=waited,
            )
            if step == done + 1:
                report_what_ran(student.ran, run_dir, world, console)
                limit = timedelta(seconds=recipe.run.timeout)
                after_first_step.enter_context(world.timeout(limit))
            line = _metrics_line(batches, result, rate(step), data, time.perf_counter() - began)
            line |= utilization.of(line, data.lengths_of(batches.units))
            if student.offload is not None:
                line |= student.offload.figures()
            metrics.write(line)
            samples.collect()
            if not result.taken:
                skipped = name_rows(packs, data.tokens, step)
                metrics.write(skipped)
                console.warn(skip_message(skipped, result.loss, result.grad_norm))
            if event := guards.after(line):
                _log_guard(event, guards, step, checkpointer, metrics, run_dir)
                console.warn(event.text)
            progress.update(1, *_step_figures(line))
            if result.save_failed:
                checkpointer.wait()  # raises the error of the save
            stopping = result.stop_requested or not evaluate(step)
            if step % recipe.run.save_every == 0 or step == total or stopping:
                checkpointer.save(step, guards.good_before if step < total else None)
            if stopping:
                checkpointer.wait()
                console.say(
                    f"stopped after step {step} of {total}, saved in {shown(run_dir)}; {RESUMES}"
                )
                return False
            collect_after(step)
            profile.before(step + 1)
            began = time.perf_counter()
        checkpointer.wait()
        samples.finish(total, stop)
    return True


@contextmanager
def _save_first(checkpointer: Checkpointer) -> Iterator[None]:
    """Report a failed save instead of another failed write: the save is what filled the disk.

    Several ranks do not wait for a save: it needs all of them, and one has failed.
    """
    try:
        yield
    except OSError:
        if checkpointer.failed or checkpointer.world.size == 1:
            checkpointer.wait()
        raise


def _metrics_line(
    batches: StepBatches, result: StepResult, rate: float, data: PreparedData, seconds: float
) -> dict[str, Any]:
    """The line of metrics.jsonl for a step."""
    line = {
        "step": batches.step,
        "epoch": (batches.step - 1) // data.schedule.steps_per_epoch,
        "loss": result.loss,
        "positive_logp": result.positive_logp,
        "negative_logp": result.negative_logp,
        "grad_norm": result.grad_norm,
        "update_norm": result.update_norm,
        "lr": rate,
        "tokens": batches.num_tokens,
        "shared_tokens": batches.shared_tokens,
        "targets": batches.num_targets,
        "micro_steps": batches.micro_steps,
        "rank_efficiency": batches.rank_efficiency,
        "seconds": seconds,
        "tokens_per_s": batches.num_tokens / seconds,
        **result.largest,
        **result.further,
    }
    if data.tokens.is_filtered:
        traces = data.examples.units[batches.units].reshape(-1)
        completions = data.examples.lengths[traces] - data.tokens.prompt_lengths[traces]
        line["kept"] = batches.num_targets / int(completions.sum())
    if result.router_aux_loss is not None:
        line["router_aux_loss"] = result.router_aux_loss
    return line


def _log_guard(
    event: GuardEvent,
    guards: Guards,
    step: int,
    checkpointer: Checkpointer,
    metrics: MetricsLog,
    run_dir: Path,
) -> None:
    """Log a guard's event. Raises RunError if it ends the run."""
    good_before = guards.good_before
    assert good_before is not None, "set by each event"
    metrics.write(
        {
            "event": event.kind,
            "step": step,
            "goes_on": event.is_warning,
            "good_before": good_before,
        }
    )
    if not event.is_warning:
        _end_run(event, good_before, checkpointer, run_dir)


def _end_run(
    event: GuardEvent, good_before: int, checkpointer: Checkpointer, run_dir: Path
) -> NoReturn:
    """Raise RunError; its message names the newest checkpoint from before the problem."""
    try:
        checkpointer.wait()
    finally:
        checkpointer.world.after_rank0()  # which removes checkpoints, and then fails too
        raise RunError(f"{event.text}; {last_good(run_dir, checkpointer.complete, good_before)}")


LABELS = {"positive_logp": "logp+", "negative_logp": "logp-"}


def _step_figures(line: dict[str, Any]) -> list[str]:
    """The figures of a step on the progress line."""
    means = [f"{LABELS[key]} {line[key]:.3f}" for key in LABELS if line[key] is not None]
    speed = [f"{line['tokens_per_s']:,.0f} tok/s"]
    if line["mfu"] is not None:
        speed.append(f"mfu {line['mfu']:.1%}")
    return [f"loss {line['loss']:.4f}", *means, *speed]


def _held_out_figures(values: dict[str, float]) -> str:
    return "  ".join(f"{LABELS.get(k, k.replace('_', ' '))} {v:.3f}" for k, v in values.items())
