"""A training run, from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.fingerprints import model_fingerprint
from redi.engine.data.loader import StepBatches, StepLoader
from redi.engine.data.packing import Cost
from redi.engine.data.summary import show, warnings
from redi.engine.distributed import World
from redi.engine.errors import RunError
from redi.engine.model.architecture import router_loss
from redi.engine.model.build import build_student
from redi.engine.model.export import export
from redi.engine.model.flops import training_cost
from redi.engine.model.student import Student
from redi.engine.train.checkpoint import Checkpointer
from redi.engine.train.guards import GuardEvent, Guards, last_good, name_rows, skip_message
from redi.engine.train.metrics import MetricsLog, peak_memory_gib
from redi.engine.train.optimizer import learning_rate, make_optimizer
from redi.engine.train.preflight import Preflight, check_before_data
from redi.engine.train.prepare_data import (
    PreparedData,
    check_positions,
    prepare_data,
)
from redi.engine.train.run_folder import (
    Before,
    check_same_data,
    check_same_model,
    check_same_recipe,
    finish,
    read_before,
    report_what_ran,
    write_run_dir,
)
from redi.engine.train.score_traces import set_reference
from redi.engine.train.signals import StopRequest
from redi.engine.train.step import StepResult, train_step
from redi.engine.train.trackers import open_trackers
from redi.engine.train.validation import validate

RESUMES = "the same command resumes from here"


def run_recipe(recipe: Recipe, world: World, console: Console, stop: StopRequest) -> bool:
    """Train one recipe to its end, resuming where an earlier attempt stopped.

    The run folder is touched only when all input has been found good.

    Args:
        recipe: resolved; `run.dir` and `model.path` are set.
        world: this process's rank and device.
        console: where progress is shown.
        stop: whether a signal asked for a stop.

    Returns:
        True when the run is finished, False when a signal stopped it.

    Raises:
        InputError: the recipe, data or model is wrong, or the folder holds another run.
        RunError: the run failed.
        KeyboardInterrupt: a signal stopped it before training began.
    """
    run_dir = Path(recipe.run.dir or "")
    check_same_recipe(recipe, run_dir)
    before = read_before(run_dir)
    finished_already = f"{run_dir}: finished already; the model is in {run_dir / 'export'}"
    if before.finished and before.limits == (recipe.train.epochs, recipe.train.max_steps):
        console.say(finished_already)
        return True
    found = check_before_data(recipe, run_dir, world)

    def prepare() -> PreparedData:
        with stop.interruptible(world.is_main):
            return prepare_data(recipe, world, console)

    data = world.rank0_first(prepare)
    check_same_data(data.keys, data.parts, run_dir)
    total = data.schedule.total_steps
    first_total, old_total = before.totals(data.schedule)
    if before.finished and total == old_total:
        console.say(finished_already)
        return True
    before.check_not_shortened(total, old_total, run_dir)
    check_positions(
        data.tokens,
        data.examples.lengths,
        data.examples.units,
        found.config,
        'set data.max_tokens = {} with data.overlong = "drop" or "truncate", or raise '
        "model.max_position_embeddings",
    )
    cost = training_cost(found.config)
    overview = data.summarize(recipe.train.row_tokens, world.size, cost)
    show(overview, str(run_dir), console)
    for warning in [*warnings(overview), *_recipe_warnings(recipe, found.config)]:
        console.warn(warning)

    with stop.interruptible(world.size == 1):
        weights = None
        if world.is_main:
            weights = model_fingerprint(recipe.model.path or "", recipe.data.cache_dir)
            check_same_model(weights, run_dir)
        student, tokenizer, optimizer = _build(recipe, found, data, weights, cost, world, console)
    try:
        if world.is_main:
            keys = data.keys | {"model": weights, "parts": data.parts}
            write_run_dir(recipe, keys, overview, found.dtype, run_dir, world, old_total)
        rate = learning_rate(recipe.optim, total, first_total)
        if total > old_total:
            _report_lengthened(recipe, before, old_total, total, rate, console)
        finished = _train(
            recipe, run_dir, data, rate, cost, student, optimizer, world, console, stop
        )
        if finished:
            export(student, tokenizer, run_dir / "export", found.dtype, world)
            if world.is_main:
                finish(run_dir)
            console.say(f"{run_dir}: done; the model is in {run_dir / 'export'}")
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{run_dir}: {error}; the same command resumes from the newest complete checkpoint"
        ) from error
    return finished


def _recipe_warnings(recipe: Recipe, config: Any) -> list[str]:
    """What the user should know of the recipe before hours of training."""
    found = []
    if epsilon := recipe.objective.filter_epsilon:
        found.append(
            f"objective.filter_epsilon = {epsilon:g}: the gradient is approximate; see "
            "positive_dropped and negative_dropped in the metrics"
        )
    if router := router_loss(config):
        found.append(router)
    if recipe.objective.name == "redi" and recipe.objective.alpha > 1:
        found.append(
            f"objective.alpha = {recipe.objective.alpha}: incorrect traces weigh more than correct "
            "ones; the paper's alpha lies in [0, 1]"
        )
    return found


def _build(
    recipe: Recipe,
    found: Preflight,
    data: PreparedData,
    weights: str | None,
    cost: Cost,
    world: World,
    console: Console,
) -> tuple[Student, PreTrainedTokenizerBase, torch.optim.AdamW]:
    """The sharded student with its objective's reference, tokenizer and optimizer."""
    student, tokenizer = build_student(recipe, found.config, found.dtype, world, console)
    if recipe.objective.kind.reference:
        set_reference(
            student,
            recipe,
            data.tokens,
            data.examples.units[data.schedule.drawn()],
            data.examples.lengths,
            digest=weights,
            dtype=found.dtype,
            cost=cost,
            world=world,
            console=console,
        )
    return student, tokenizer, make_optimizer(student, recipe.optim)


def _report_lengthened(
    recipe: Recipe,
    before: Before,
    old: int,
    total: int,
    rate: Callable[[int], float],
    console: Console,
) -> None:
    console.say(f"{recipe.run.dir}: lengthened from {old} to {total} steps")
    if before.finished and recipe.optim.schedule != "constant":
        console.warn(
            f'optim.schedule = "{recipe.optim.schedule}" had reached 0 after step {old}; step '
            f"{old + 1} takes the rate of a run of {total} steps, {rate(old + 1):g}: the result "
            f"differs from {total} steps in one run"
        )


def _train(
    recipe: Recipe,
    run_dir: Path,
    data: PreparedData,
    rate: Callable[[int], float],
    cost: Cost,
    student: Student,
    optimizer: torch.optim.AdamW,
    world: World,
    console: Console,
    stop: StopRequest,
) -> bool:
    """Run the steps that are left. Returns False when a signal ended them early."""
    total = data.schedule.total_steps
    checkpointer = Checkpointer(run_dir, recipe.run.keep, student, optimizer, world)
    done = checkpointer.load_newest()
    loader = StepLoader(
        data.tokens,
        data.examples,
        data.schedule,
        row_tokens=recipe.train.row_tokens,
        rank=world.rank,
        world_size=world.size,
        cost=cost,
        workers=recipe.data.workers,
        pin=world.device.type == "cuda",
    )
    trackers = open_trackers(recipe, run_dir, done) if world.is_main else []
    metrics = MetricsLog(run_dir / "metrics.jsonl", done, trackers, active=world.is_main)
    progress = console.progress("step", total, done)
    guards = Guards(recipe.guard, run_dir / "metrics.jsonl", done, world)
    if done:
        console.say(f"{run_dir}: resumes after step {done}")
    if data.held_out is not None:
        console.say(
            f"held out: {len(data.held_out.sequences):,} traces, evaluated before step 1, every "
            f"{recipe.eval.every} steps and after the last"
        )

    def evaluate(step: int) -> bool:
        """False when a request to stop interrupted it; a resume evaluates again."""
        if data.held_out is None or (step % recipe.eval.every and step < total):
            return True
        scores = validate(
            student,
            data.held_out,
            row_tokens=recipe.train.row_tokens,
            cost=cost,
            world=world,
            stop=stop,
        )
        if scores is None:
            return False
        metrics.write({"event": "eval", "step": step, **scores})
        console.say(f"held out after step {step}: {_held_out_figures(scores)}")
        return True

    with closing(checkpointer), closing(metrics), closing(progress):
        if world.any_rank(stop.asked) or not evaluate(done):
            console.say(f"stopped after step {done} of {total}; {RESUMES}")
            return False
        began = time.perf_counter()
        for batches in loader.steps(done):
            step = batches.step
            # Dropout, if a model has it, depends on seed, step and rank: no state to save.
            drawn = np.random.SeedSequence([recipe.train.seed, step, world.rank])
            torch.manual_seed(int(drawn.generate_state(1, np.uint64)[0]))
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            result, packs = train_step(
                student,
                optimizer,
                batches,
                recipe,
                world,
                stop_asked=stop.asked,
                save_failed=checkpointer.failed,
            )
            if step == done + 1:
                report_what_ran(student.ran, run_dir, world, console)
            line = _metrics_line(batches, result, rate(step), data, time.perf_counter() - began)
            line["peak_memory_gib"] = peak_memory_gib(world.device)
            metrics.write(line)
            if not result.taken:
                skipped = name_rows(packs, data.tokens, step)
                metrics.write(skipped)
                console.warn(skip_message(skipped, result.loss, result.grad_norm))
            if event := guards.after(line):
                _log_guard(event, guards, step, checkpointer, metrics, run_dir)
                console.warn(event.text)
            progress.update(1, *_step_figures(line))
            if result.save_failed:
                checkpointer.wait()  # raises, with the reason
            stopping = result.stop_asked or not evaluate(step)
            if step % recipe.run.save_every == 0 or step == total or stopping:
                checkpointer.save(step, guards.good_before if step < total else None)
            if stopping:
                checkpointer.wait()
                console.say(f"stopped after step {step} of {total}, saved in {run_dir}; {RESUMES}")
                return False
            began = time.perf_counter()
        checkpointer.wait()
    return True


def _metrics_line(
    batches: StepBatches, result: StepResult, rate: float, data: PreparedData, seconds: float
) -> dict[str, Any]:
    """A step as metrics.jsonl has it."""
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
        "targets": batches.num_targets,
        "micro_steps": len(batches.micro_batches),
        "rank_efficiency": batches.rank_efficiency,
        "seconds": seconds,
        "tokens_per_s": batches.num_tokens / seconds,
    }
    if result.filtered:
        line["positive_dropped"] = result.positive_dropped
        line["negative_dropped"] = result.negative_dropped
    return line


def _log_guard(
    event: GuardEvent,
    guards: Guards,
    step: int,
    checkpointer: Checkpointer,
    metrics: MetricsLog,
    run_dir: Path,
) -> None:
    """Log what a guard found; RunError if it ends the run."""
    good_before = guards.good_before
    assert good_before is not None, "an event dates what was good"
    metrics.write(
        {"event": event.kind, "step": step, "goes_on": event.goes_on, "good_before": good_before}
    )
    if not event.goes_on:
        _give_up(event, good_before, checkpointer, run_dir)


def _give_up(
    event: GuardEvent, good_before: int, checkpointer: Checkpointer, run_dir: Path
) -> NoReturn:
    """End the run; the message names the newest checkpoint from before it went wrong."""
    try:
        checkpointer.wait()
    finally:
        raise RunError(f"{event.text}; {last_good(run_dir, good_before)}")


LABELS = {"positive_logp": "logp+", "negative_logp": "logp-"}


def _step_figures(line: dict[str, Any]) -> list[str]:
    """What the progress line shows of a step."""
    means = [f"{LABELS[key]} {line[key]:.3f}" for key in LABELS if line[key] is not None]
    return [f"loss {line['loss']:.4f}", *means, f"{line['tokens_per_s']:,.0f} tok/s"]


def _held_out_figures(values: dict[str, float]) -> str:
    return "  ".join(f"{LABELS.get(k, k.replace('_', ' '))} {v:.3f}" for k, v in values.items())
