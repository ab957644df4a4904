"""A training run, from its checks to the export."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.fingerprints import model_fingerprint
from redi.engine.data.loader import (
    StepBatches,
    StepLoader,
    default_workers,
    start_worker_server,
)
from redi.engine.data.packing import Cost
from redi.engine.data.summary import show, warnings
from redi.engine.data.tokens import file_fingerprints
from redi.engine.distributed import START_TIMEOUT, World, explained
from redi.engine.errors import RunError
from redi.engine.failure import announced
from redi.engine.model.architecture import router_loss
from redi.engine.model.build import build_student
from redi.engine.model.export import export
from redi.engine.model.flops import training_cost
from redi.engine.model.student import Student
from redi.engine.plan.auto_rows import resolve_rows
from redi.engine.storage import LocalRun, fetch_models, inside, open_run, working_folder
from redi.engine.train.attention_cost import KEY as ATTENTION_COST
from redi.engine.train.attention_cost import calibrated
from redi.engine.train.checkpoint import Checkpointer, check_not_damaged
from redi.engine.train.garbage import (
    collect_after,
    collect_after_evaluation,
    collected_at_the_end,
    no_automatic_collection,
)
from redi.engine.train.guards import GuardEvent, Guards, last_good, name_rows, skip_message
from redi.engine.train.metrics import MetricsLog, timed
from redi.engine.train.mfu import Utilization
from redi.engine.train.optimizer import learning_rate, make_optimizer
from redi.engine.train.preflight import Preflight, check_before_data
from redi.engine.train.prepare_data import (
    PreparedData,
    check_positions,
    prepare_data,
)
from redi.engine.train.profile import profiling
from redi.engine.train.run_folder import (
    PreviousRun,
    check_same_data,
    check_same_files,
    check_same_model,
    check_same_recipe,
    finish,
    read_previous_run,
    record_flight,
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
    """Train one recipe to its end, or resume an earlier attempt.

    The run directory is written only after all input has been checked.

    Args:
        recipe: resolved; `run.dir` and `model.path` are set.
        world: this process's rank and device.
        console: where progress is shown.
        stop: records whether a signal requested a stop.

    Returns:
        True if the run is finished, False if a signal stopped it.

    Raises:
        InputError: the recipe, data or model is invalid, or the directory holds another run.
        RunError: the run failed.
        KeyboardInterrupt: a signal stopped it before training started.
    """
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
        torch.cuda.reset_accumulated_memory_stats(world.device)  # allocation retries
    with collected_at_the_end():
        finished = _run(recipe, world, console, stop)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return finished


def _run(recipe: Recipe, world: World, console: Console, stop: StopRequest) -> bool:
    """`run_recipe`; what it allocates is unreachable when it returns."""
    named = recipe.model  # by URL if it is on object storage
    run_dir = working_folder(recipe.run.dir or "", recipe.data.cache_dir)
    run = open_run(run_dir)

    def look() -> PreviousRun:
        run.fetch()
        check_same_recipe(recipe, run_dir)
        return read_previous_run(run_dir)

    previous = world.from_rank0(look)
    if previous.finished and previous.limits == (recipe.train.epochs, recipe.train.max_steps):
        _report_finished(recipe, run_dir, world, console)
        return True
    workers = recipe.data.workers
    if workers is None:
        workers = default_workers(world.device)
    if workers:
        start_worker_server()  # it imports torch meanwhile
    if damaged := world.from_rank0(lambda: check_not_damaged(run_dir, previous.complete)):
        console.warn(damaged)
    recipe = fetch_models(recipe, world)
    found = check_before_data(recipe, run_dir, world)

    def prepare() -> PreparedData:
        with stop.interruptible(world.is_main):
            return prepare_data(recipe, world, console)

    data = world.rank0_first(prepare)
    world.from_rank0(lambda: check_same_data(data.keys, data.parts, run_dir))
    total = data.schedule.total_steps
    first_total, old_total = previous.totals(data.schedule)
    if previous.finished and total == old_total:
        _report_finished(recipe, run_dir, world, console)
        return True
    previous.check_not_shortened(total, old_total, run_dir)
    check_positions(
        data.tokens,
        data.examples.lengths,
        data.examples.units,
        found.config,
        'set data.max_tokens = {} with data.overlong = "drop" or "truncate", or raise '
        "model.max_position_embeddings",
    )
    cost, attention_cost = calibrated(
        training_cost(found.config), recipe, found.config, run_dir, world, console
    )
    recipe = resolve_rows(recipe, previous.row_tokens, found.config, data, world, console)
    row_tokens = recipe.train.resolved_row_tokens
    summary = data.summarize(row_tokens, world.size, cost, recipe.shard.gather)
    show(summary, str(run_dir), console)
    for warning in [*warnings(summary), *_recipe_warnings(recipe, found.config, total)]:
        console.warn(warning)

    with stop.interruptible(world.size == 1):
        weights = None
        if world.is_main:
            weights = model_fingerprint(recipe.model.path or "", recipe.data.cache_dir)
            check_same_model(weights, run_dir)
        world.after_rank0()  # which may have hashed 100 GB
        student, tokenizer, optimizer = _build(recipe, found, data, weights, cost, world, console)
    with _naming(run_dir):
        if world.is_main:
            facts: dict[str, Any] = {"model": weights, "parts": data.parts}
            keys = data.keys | facts | {ATTENTION_COST: attention_cost}
            written = replace(recipe, model=named)
            write_run_dir(written, keys, summary, found.dtype, run_dir, world, old_total)
            run.publish()
        record_flight(run_dir, world)
        rate = learning_rate(recipe.optim, total, first_total)
        if total > old_total:
            _report_lengthened(recipe, old_total, total, rate, console)
        with run.published() if world.is_main else nullcontext():
            finished = _train(
                recipe,
                run,
                previous.complete,
                data,
                workers,
                rate,
                cost,
                student,
                optimizer,
                world,
                console,
                stop,
            )
        if finished:
            export(student, tokenizer, run_dir / "export", found.dtype, world)
            world.from_rank0(lambda: _finish(run))
            console.say(
                f"{run_dir}: done; the model is in {inside(recipe.run.dir or '', 'export')}"
            )
    return finished


@contextmanager
def _naming(run_dir: Path) -> Iterator[None]:
    """Turn an error of a file into a RunError that names the run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{run_dir}: {error}; the same command resumes from the newest complete checkpoint"
        ) from error


def _finish(run: LocalRun) -> None:
    run.publish_model("export")
    finish(run.folder)
    run.publish()


def _recipe_warnings(recipe: Recipe, config: Any, total: int) -> list[str]:
    """Warnings about the recipe, printed before hours of training."""
    found = []
    if (profiled := recipe.run.profile_steps) and profiled.start > total:
        found.append(
            f"run.profile = {recipe.run.profile}: the run ends after step {total}, so nothing is "
            "profiled"
        )
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
            "ones; the paper's alpha is in [0, 1]"
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
    """The sharded student (with the reference of its objective), its tokenizer and optimizer."""
    student, tokenizer = build_student(recipe, found.config, found.dtype, world, console)
    if recipe.objective.kind.reference:
        set_reference(
            student,
            recipe,
            data.tokens,
            data.examples.units[data.schedule.drawn()],
            data.examples.lengths,
            fingerprint=weights,
            dtype=found.dtype,
            cost=cost,
            world=world,
            console=console,
        )
    return student, tokenizer, make_optimizer(student, recipe.optim)


def _report_finished(recipe: Recipe, run_dir: Path, world: World, console: Console) -> None:
    """Say that nothing is left to do; InputError if the model or the data has changed since."""
    path = recipe.model.path or ""
    if world.is_main:
        if Path(path).exists():
            check_same_model(model_fingerprint(path, recipe.data.cache_dir), run_dir)
        check_same_files(file_fingerprints(recipe.data.paths, recipe.data.cache_dir), run_dir)
    console.say(f"{run_dir}: finished already; the model is in {run_dir / 'export'}")


def _report_lengthened(
    recipe: Recipe, old: int, total: int, rate: Callable[[int], float], console: Console
) -> None:
    console.say(f"{recipe.run.dir}: lengthened from {old} to {total} steps")
    if recipe.optim.schedule != "constant":
        console.warn(
            f'optim.schedule = "{recipe.optim.schedule}" was planned to reach 0 after step {old}; '
            f"the rate is now that of {total} steps ({rate(old + 1):g} in step {old + 1}), so the "
            f"result differs from that of {total} steps in one run"
        )


def _train(
    recipe: Recipe,
    run: LocalRun,
    complete: Sequence[int],
    data: PreparedData,
    workers: int,
    rate: Callable[[int], float],
    cost: Cost,
    student: Student,
    optimizer: torch.optim.AdamW,
    world: World,
    console: Console,
    stop: StopRequest,
) -> bool:
    """Run the remaining steps after the newest of the complete checkpoints.

    Returns:
        False if a signal stopped them early.
    """
    total = data.schedule.total_steps
    run_dir = run.folder
    checkpointer = Checkpointer(run, complete, recipe.run.keep, student, optimizer, world, console)
    done = checkpointer.load_newest()
    loader = StepLoader(
        data.tokens,
        data.examples,
        data.schedule,
        row_tokens=recipe.train.resolved_row_tokens,
        rank=world.rank,
        world_size=world.size,
        cost=cost,
        gather=recipe.shard.gather,
        workers=workers,
        pin=world.device.type == "cuda",
    )
    trackers = open_trackers(recipe, run_dir, done) if world.is_main else []
    metrics = MetricsLog(run_dir / "metrics.jsonl", done, trackers, active=world.is_main)
    progress = console.progress("step", total, done)
    guards = Guards(recipe.guard, run_dir / "metrics.jsonl", done, world)
    utilization = Utilization(recipe, student.model.config, world)
    if done:
        console.say(f"{run_dir}: resumes after step {done}")
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
        return True

    with (
        no_automatic_collection(),
        closing(checkpointer),
        closing(metrics),
        closing(progress),
        ExitStack() as after_first_step,
        profiling(recipe.run.profile_steps, total, run_dir, world, console) as profile,
        announced(),
        explained(),
        _naming(run_dir),
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
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
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
                console.say(f"stopped after step {step} of {total}, saved in {run_dir}; {RESUMES}")
                return False
            collect_after(step)
            profile.before(step + 1)
            began = time.perf_counter()
        checkpointer.wait()
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
        "targets": batches.num_targets,
        "micro_steps": batches.micro_steps,
        "rank_efficiency": batches.rank_efficiency,
        "seconds": seconds,
        "tokens_per_s": batches.num_tokens / seconds,
        **result.largest,
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
