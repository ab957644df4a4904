"""A training run, from its checks to the export."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from redi.engine.config.distill import is_distilled
from redi.engine.config.sections import ObjectiveConfig, Recipe
from redi.engine.config.stages import exports_adapter
from redi.engine.console import Console
from redi.engine.data.fingerprints import model_fingerprint
from redi.engine.data.loader import default_workers, start_worker_server
from redi.engine.data.packing import Cost
from redi.engine.data.summary import show, warnings
from redi.engine.data.tokens import file_fingerprints
from redi.engine.distributed import World
from redi.engine.errors import InputError
from redi.engine.model.adapter import lasting_path
from redi.engine.model.build import build_student
from redi.engine.model.export import export
from redi.engine.model.flops import model_size
from redi.engine.model.router_loss import router_coefficient
from redi.engine.model.student import Student
from redi.engine.plan.auto_rows import resolve_rows
from redi.engine.storage import (
    RECIPE,
    LocalRun,
    fetch_models,
    inside,
    open_run,
    shown,
    working_folder,
)
from redi.engine.train.attention_cost import KEY as ATTENTION_COST
from redi.engine.train.attention_cost import calibrated
from redi.engine.train.checkpoint import check_not_damaged
from redi.engine.train.garbage import collected_at_the_end
from redi.engine.train.loop import Training, train
from redi.engine.train.optimizer import Optimizer, learning_rate, make_optimizer
from redi.engine.train.preflight import Preflight, check_before_data
from redi.engine.train.prepare_data import PreparedData, check_positions, prepare_data
from redi.engine.train.run_folder import (
    PreviousRun,
    check_same_data,
    check_same_files,
    check_same_model,
    check_same_recipe,
    file_errors_named,
    finish,
    read_previous_run,
    record_flight,
    write_run_dir,
)
from redi.engine.train.run_lock import RunLock
from redi.engine.train.score_traces import set_reference
from redi.engine.train.signals import StopRequest
from redi.engine.train.teachers import check_teacher


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
    with collected_at_the_end(), RunLock() as lock:
        finished = _run(recipe, world, console, stop, lock)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return finished


def _run(recipe: Recipe, world: World, console: Console, stop: StopRequest, lock: RunLock) -> bool:
    """`run_recipe`; what it allocates is unreachable when it returns."""
    named = recipe  # by URL if it is on object storage
    run_dir = working_folder(recipe.run.dir or "", recipe.data.cache_dir)
    run = open_run(run_dir)

    def look() -> PreviousRun:
        lock.take(run_dir)
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
    check_teacher(data.teacher, found.config)
    has_router_loss = router_coefficient(recipe, found.config) > 0
    size = model_size(found.config, recipe.adapter, has_router_loss)
    cost, attention_cost = calibrated(
        size.training_cost(), recipe, found.config, run_dir, world, console
    )
    recipe = resolve_rows(recipe, previous.row_tokens, found.config, size, data, world, console)
    row_tokens = recipe.train.resolved_row_tokens
    summary = data.summarize(recipe, row_tokens, world.size, cost, size)
    show(summary, str(run_dir), console)
    counts = [summary.lengths[kind].count for kind in ("positive", "negative")]
    for warning in [*warnings(summary), *_recipe_warnings(recipe, total, *counts)]:
        console.warn(warning)

    with stop.interruptible(world.size == 1):
        weights = adapter = None
        if world.is_main:
            weights, adapter = _fingerprints(recipe)
            check_same_model(weights, adapter, run_dir)
        world.after_rank0()  # which may have hashed 100 GB
        student, tokenizer, optimizer = _build(recipe, found, data, weights, cost, world, console)
    with file_errors_named(run_dir):
        if world.is_main:
            facts: dict[str, Any] = {"model": weights, "adapter": adapter, "parts": data.parts}
            keys = data.keys | facts | {ATTENTION_COST: attention_cost}
            written = replace(recipe, model=named.model, adapter=named.adapter)
            lock.take(run_dir)  # another command may have made it since `look`
            if previous.limits is None and (run_dir / RECIPE).is_file():
                raise InputError(
                    f"run.dir: another command has trained in {shown(run_dir)} since this one "
                    "started; choose another run.dir, or repeat the command to resume that run"
                )
            write_run_dir(written, keys, summary, found.dtype, run_dir, world, old_total)
            lock.take(run_dir)
            run.publish()
        record_flight(run_dir, world)
        rate = learning_rate(recipe.optim, total, first_total)
        if total > old_total:
            _report_lengthened(recipe, old_total, total, rate, console)
        training = Training(recipe, run, data, size, cost, rate, workers, student, optimizer)
        with run.published() if world.is_main else nullcontext():
            finished = train(training, previous.complete, world, console, stop)
        if finished:
            alone = exports_adapter(recipe)
            base = lasting_path(named.model.path or "") if alone else None
            export(student, tokenizer, run_dir / "export", found.dtype, world, base)
            world.from_rank0(lambda: _finish(run))
            what = "adapter" if alone else "model"
            console.say(
                f"{shown(run_dir)}: done; the {what} is in {inside(recipe.run.dir or '', 'export')}"
            )
    return finished


def _finish(run: LocalRun) -> None:
    run.publish_model("export")
    finish(run.folder)
    run.publish()


def _recipe_warnings(recipe: Recipe, total: int, positives: int, negatives: int) -> list[str]:
    """Warnings about the recipe, printed before hours of training.

    Args:
        total: steps of the run.
        positives, negatives: correct and incorrect traces in use.
    """
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
    objective = recipe.objective
    pushed = objective.alpha > 0 and objective.kind.units != "positives" and negatives
    if is_distilled(recipe) and pushed and objective.direction == "forward" and not objective.skew:
        found.append(
            'objective.direction = "forward" has no bound where incorrect traces are pushed away '
            'from the teacher; use "jsd" or objective.skew, or objective.alpha = 0'
        )
    if recipe.objective.name == "redi" and recipe.objective.alpha > 1:
        found.append(
            f"objective.alpha = {recipe.objective.alpha}: incorrect traces weigh more than correct "
            "ones; the paper's alpha is in [0, 1]"
        )
    found += _balance_warnings(objective, positives, negatives)
    return found


def _balance_warnings(objective: ObjectiveConfig, positives: int, negatives: int) -> list[str]:
    """Warnings about the numbers of correct and incorrect traces that are trained one by one."""
    pushed, pulled = {
        "signed": (objective.alpha, objective.positive_weight),
        "apo_zero_unpaired": (1.0, 1.0),
        "kto": (objective.undesirable_weight, objective.desirable_weight),
    }.get(objective.name, (0.0, 0.0))
    if pushed and not negatives:
        return [
            f"no trace is incorrect, but {objective.name} learns from incorrect ones too: are "
            "verdicts missing? Rows without a column label are correct"
        ]
    if pulled and not positives:
        return [f"no trace is correct, but {objective.name} learns from correct ones too"]
    if objective.name != "kto" or not (positives and negatives):
        return []
    correct, incorrect = pulled * positives, pushed * negatives
    if 0.99 * incorrect <= correct <= 1.01 * 4 / 3 * incorrect:
        return []
    if correct > incorrect:
        key, low, high = "undesirable_weight", 3 / 4 * correct / negatives, correct / negatives
    else:
        key, low, high = "desirable_weight", incorrect / positives, 4 / 3 * incorrect / positives
    return [
        f"{positives:,} correct traces of weight {pulled:g} and {negatives:,} incorrect ones of "
        f"weight {pushed:g} are out of balance: in the paper of kto the correct ones weigh 1 to "
        f"4/3 times as much; set objective.{key} to a value of {low:.3g} to {high:.3g}"
    ]


def _build(
    recipe: Recipe,
    found: Preflight,
    data: PreparedData,
    weights: str | None,
    cost: Cost,
    world: World,
    console: Console,
) -> tuple[Student, PreTrainedTokenizerBase, Optimizer]:
    """The sharded student (with the reference of its objective), its tokenizer and optimizer."""
    student, tokenizer = build_student(recipe, found.config, found.dtype, world, console)
    if recipe.objective.kind.reference:
        set_reference(
            student,
            recipe,
            data.tokens,
            data.examples.units[data.schedule.drawn()],
            data.examples.lengths,
            mismatched=data.mismatched,
            fingerprint=weights,
            dtype=found.dtype,
            cost=cost,
            world=world,
            console=console,
        )
    return student, tokenizer, make_optimizer(student, recipe.optim)


def _fingerprints(recipe: Recipe) -> tuple[str | None, str | None]:
    """Hashes of the model's weights and of the adapter that is continued."""
    cache, adapter = recipe.data.cache_dir, recipe.adapter.path
    weights = model_fingerprint(recipe.model.path or "", cache)
    return weights, model_fingerprint(adapter, cache) if adapter else None


def _report_finished(recipe: Recipe, run_dir: Path, world: World, console: Console) -> None:
    """Say that nothing is left to do; InputError if the model or the data has changed since."""
    path = recipe.model.path or ""
    if world.is_main:
        if Path(path).exists():
            check_same_model(*_fingerprints(recipe), run_dir)
        check_same_files(file_fingerprints(recipe.data.paths, recipe.data.cache_dir), run_dir)
    console.say(
        f"{shown(run_dir)}: finished already; the model is in {inside(shown(run_dir), 'export')}"
    )


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
