"""The training loop: the one place where everything meets."""

from __future__ import annotations

import math
import os
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from redi.engine.config import Recipe
from redi.engine.console import Console
from redi.engine.data.loader import StepBatches, StepLoader
from redi.engine.data.overview import (
    LENGTH_COLUMNS,
    Overview,
    count_rows,
    length_rows,
    look_over,
    warnings,
)
from redi.engine.data.packing import Cost
from redi.engine.data.schedule import Examples, Needs, Schedule, select
from redi.engine.data.text import load_tokenizer
from redi.engine.data.tokens import TokenizedTraces, TokenSettings, tokenize
from redi.engine.distributed import World
from redi.engine.errors import InputError, RunError
from redi.engine.estimate import training_cost
from redi.engine.model.attention import choose_attention, register_attention
from redi.engine.model.export import check_exportable, export
from redi.engine.model.liger import apply_liger
from redi.engine.model.load import load_model, read_config
from redi.engine.model.sharding import check_replicas, compute_dtype, shard
from redi.engine.model.student import Student
from redi.engine.train.checkpoint import Checkpointer
from redi.engine.train.greedy import held_out_problems
from redi.engine.train.metrics import MetricsLog, peak_memory_gib
from redi.engine.train.objectives import Objective, StepTotals, formula
from redi.engine.train.optimizer import learning_rate, make_optimizer
from redi.engine.train.run_folder import check_same_data, check_same_recipe, write_run_dir
from redi.engine.train.signals import StopRequest
from redi.engine.train.trackers import check_trackers, open_trackers
from redi.engine.train.validation import HeldOut, validate
from redi.kernels.backends import choose_backend


def run_recipe(recipe: Recipe, world: World, console: Console) -> bool:
    """Train one recipe to its end, going on from where an earlier attempt stopped.

    The run folder is touched only when all input has been found good.

    Args:
        recipe: resolved; `run.dir` and `model.path` are set.
        world: this process's place.
        console: where it speaks.

    Returns:
        True when the run is finished, False when a signal stopped it.

    Raises:
        InputError: the recipe, data or model is wrong, or the folder holds another run.
        RunError: the run failed.
    """
    run_dir = Path(recipe.run.dir or "")
    check_same_recipe(recipe, run_dir)
    if (run_dir / "export").is_dir():
        console.say(f"{run_dir}: finished already; the model is in {run_dir / 'export'}")
        return True
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    transformers_logging.disable_progress_bar()
    config = read_config(recipe.model.path or "")
    check_trackers(recipe.run.trackers)
    check_replicas(recipe.shard, world.size)
    try:
        choose_backend(recipe.objective.backend, world.device)
    except ValueError as error:
        raise InputError(f"objective.backend: {error}") from None
    data = prepare_data(recipe, world, console)
    check_same_data(data.keys, run_dir)
    cost = training_cost(config)
    overview = look_over(
        data.tokens,
        data.examples,
        data.schedule,
        row_tokens=recipe.train.row_tokens,
        world_size=world.size,
        cost=cost,
    )
    _show(overview, run_dir, console)
    dtype = compute_dtype(recipe.train.dtype, world.device)
    student, tokenizer = build_student(recipe, dtype, world, console)
    optimizer = make_optimizer(student, recipe.optim)
    if world.is_main:
        try:
            write_run_dir(recipe, data.keys, overview, dtype, run_dir, world)
        except OSError as error:
            raise InputError(f"run.dir: {run_dir} cannot be written: {error}") from None
    finished = _train(recipe, run_dir, data, cost, student, optimizer, world, console)
    if finished:
        export(student, tokenizer, run_dir / "export", dtype, world)
        console.say(f"{run_dir}: done; the model is in {run_dir / 'export'}")
    return finished


def _show(overview: Overview, run_dir: Path, console: Console) -> None:
    """The last look before training."""
    console.table(f"{run_dir}: what is trained", LENGTH_COLUMNS, length_rows(overview))
    console.table("", ("", ""), count_rows(overview))
    for warning in warnings(overview):
        console.warn(warning)


@dataclass(frozen=True)
class PreparedData:
    """Everything that is known of the data before a model is loaded."""

    tokens: TokenizedTraces
    examples: Examples
    schedule: Schedule
    held_out: HeldOut | None

    @property
    def keys(self) -> dict[str, str | None]:
        """Hashes of the tokenized sets, by section of the recipe."""
        held_out = self.held_out.tokens.key if self.held_out else None
        return {"data": self.tokens.key, "eval": held_out}


def prepare_data(recipe: Recipe, world: World, console: Console) -> PreparedData:
    """Tokenize (or find the cache), choose what is trained, lay out the steps."""
    tokens = _tokenized(recipe, recipe.data.paths, world, console)
    examples = _examples(recipe, tokens, formula(recipe.objective).units)
    schedule = Schedule(
        num_units=len(examples.units),
        batch=recipe.train.batch,
        epochs=recipe.train.epochs,
        max_steps=recipe.train.max_steps,
        seed=recipe.train.seed,
    )
    return PreparedData(tokens, examples, schedule, _held_out(recipe, world, console))


def _held_out(recipe: Recipe, world: World, console: Console) -> HeldOut | None:
    """The traces of `[eval]`: pairs where there are any incorrect ones, else the correct ones."""
    if not recipe.eval.paths:
        return None
    tokens = _tokenized(recipe, recipe.eval.paths, world, console)
    examples = _examples(recipe, tokens, "pairs" if (tokens.signs < 0).any() else "positives")
    return HeldOut(tokens, examples, held_out_problems(recipe))


def _examples(recipe: Recipe, tokens: TokenizedTraces, objective_needs: Needs) -> Examples:
    return select(
        tokens,
        objective_needs=objective_needs,
        pairing=recipe.data.pairing,
        max_tokens=recipe.data.max_tokens,
        overlong=recipe.data.overlong,
        row_tokens=recipe.train.row_tokens,
    )


def _tokenized(
    recipe: Recipe, paths: tuple[str, ...], world: World, console: Console
) -> TokenizedTraces:
    settings = TokenSettings(
        paths=paths,
        format=recipe.data.format,
        template=recipe.data.template,
        system_prompt=recipe.data.system_prompt,
        tokenizer_path=recipe.model.tokenizer or recipe.model.path or "",
    )
    cache = Path(
        recipe.data.cache or os.environ.get("REDI_CACHE") or Path.home() / ".cache" / "redi"
    )
    processes = recipe.data.processes or min(8, os.cpu_count() or 1)
    return world.main_first(lambda: tokenize(settings, cache, processes=processes, console=console))


def build_student(
    recipe: Recipe, dtype: torch.dtype, world: World, console: Console
) -> tuple[Student, PreTrainedTokenizerBase]:
    """Load the model, check that it can be exported, shard it."""
    path = recipe.model.path or ""
    kind, reason = choose_attention(recipe.model.attention, world.device, dtype)
    console.say(f"attention: {kind} ({reason}); compute dtype {str(dtype).removeprefix('torch.')}")
    model = load_model(path, register_attention(kind))
    tokenizer = load_tokenizer(recipe.model.tokenizer or path)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise InputError(
            f"model.tokenizer: it has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{model.get_input_embeddings().num_embeddings}"
        )
    if world.is_main:
        with tempfile.TemporaryDirectory() as folder:
            check_exportable(model, tokenizer, Path(folder) / "export")
    liger = apply_liger(model, recipe.model.liger, world.device)
    console.say(f"liger-kernel: {liger}")
    model.train()
    student = Student(model, Objective(recipe.objective))
    return shard(student, recipe.shard, dtype, world.device), tokenizer


def _train(
    recipe: Recipe,
    run_dir: Path,
    data: PreparedData,
    cost: Cost,
    student: Student,
    optimizer: torch.optim.Optimizer,
    world: World,
    console: Console,
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
    rate = learning_rate(recipe.optim, total)
    trackers = open_trackers(recipe, run_dir, done) if world.is_main else []
    metrics = MetricsLog(run_dir / "metrics.jsonl", done, trackers, active=world.is_main)
    progress = console.steps(total, done)
    if done:
        console.say(f"{run_dir}: going on after step {done}")

    def evaluate(step: int) -> None:
        if data.held_out is not None:
            found = validate(
                student, data.held_out, row_tokens=recipe.train.row_tokens, cost=cost, world=world
            )
            metrics.write({"event": "eval", "step": step, **found})
            console.say(f"held out after step {step}: {_figures(found)}")

    with StopRequest(console) as stop, closing(metrics), closing(progress):
        if not done:
            evaluate(0)
        began = time.perf_counter()
        for batches in loader.steps(done):
            step = batches.step
            # Dropout, where a model has it, depends on seed, step and rank: nothing to save.
            torch.manual_seed((recipe.train.seed * total + step) * world.size + world.rank)
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            sums = _forward_backward(student, batches, world.device)
            grad_norm = _clip(student, recipe.optim.max_grad_norm)
            sums["stop"] = float(stop.asked)
            sums = _all_reduce(sums)
            now = time.perf_counter()
            line = {
                "step": step,
                "epoch": (step - 1) // data.schedule.steps_per_epoch,
                "loss": sums["loss"],
                "positive_logp": _mean(sums["positive"], batches.num_positives),
                "negative_logp": _mean(sums["negative"], batches.num_negatives),
                "grad_norm": grad_norm,
                "lr": rate(step),
                "tokens": batches.num_tokens,
                "targets": batches.num_targets,
                "micro_steps": len(batches.micro_batches),
                "rank_efficiency": batches.rank_efficiency,
                "seconds": now - began,
                "tokens_per_s": batches.num_tokens / (now - began),
                "peak_memory_gib": peak_memory_gib(world.device),
            }
            metrics.write(line)
            if not (math.isfinite(sums["loss"]) and math.isfinite(grad_norm)):
                try:
                    checkpointer.wait()
                finally:
                    raise RunError(
                        f"step {step}: loss {sums['loss']}, gradient norm {grad_norm}: not "
                        f"finite; the last good checkpoint is in {run_dir / 'checkpoints'}"
                    )
            optimizer.step()
            optimizer.zero_grad()
            progress.step(line)
            if step % recipe.eval.every == 0 or step == total:
                evaluate(step)
            stopping = sums["stop"] > 0 and step < total
            if step % recipe.run.save_every == 0 or step == total or stopping:
                checkpointer.save(step)
            if stopping:
                checkpointer.wait()
                console.say(
                    f"stopped after step {step} of {total}, saved in {run_dir}; "
                    "the same command goes on from here"
                )
                return False
            began = time.perf_counter()
        checkpointer.wait()
    return True


def _forward_backward(
    student: Student, batches: StepBatches, device: torch.device
) -> dict[str, float]:
    """Accumulate the step's gradient; return this rank's sums."""
    assert isinstance(student, FSDPModule)
    totals = StepTotals(units=len(batches.units), targets=batches.num_targets)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    logps = torch.zeros(2, dtype=torch.float64, device=device)
    for index, batch in enumerate(batches.micro_batches):
        batch = batch.to(device, non_blocking=True)
        last = index == len(batches.micro_batches) - 1
        student.set_requires_gradient_sync(last)
        out = student(batch, totals)
        out.loss.backward()
        loss += out.loss.detach()
        means = out.sequence_logps.double() / out.sequence_lengths.clamp(min=1)
        # Not means[signs > 0]: boolean indexing would wait for the device.
        logps += torch.stack([(means * (batch.signs == sign)).sum() for sign in (1, -1)])
    positive, negative = logps.tolist()
    return {"loss": loss.item(), "positive": positive, "negative": negative}


def _clip(student: Student, max_norm: float) -> float:
    """Clip the whole gradient to `max_norm` (0: leave it). Returns its l2 norm before."""
    parameters = [p for p in student.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


def _all_reduce(sums: dict[str, float]) -> dict[str, float]:
    """Sum over ranks, in float64 on the host."""
    values = torch.tensor(list(sums.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(sums, values.tolist(), strict=True))


def _figures(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None
