"""The training loop: the one place where everything meets."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from redi.engine.config import Recipe, check_replicas
from redi.engine.console import Console
from redi.engine.data.digests import model_digest
from redi.engine.data.loader import StepBatches, StepLoader
from redi.engine.data.mixing import mix
from redi.engine.data.overview import Overview, look_over, show, warnings
from redi.engine.data.packing import Cost
from redi.engine.data.schedule import Examples, Needs, Schedule, select
from redi.engine.data.text import load_tokenizer
from redi.engine.data.tokens import TokenizedTraces, TokenSettings, tokenize
from redi.engine.distributed import World
from redi.engine.errors import InputError, RunError
from redi.engine.estimate import training_cost
from redi.engine.model.architecture import (
    check_architecture,
    check_dropout,
    model_problem,
    per_document_rope,
    router_loss,
)
from redi.engine.model.attention import NOT_IN_GRAPHS, choose_attention, register_attention
from redi.engine.model.export import check_exportable, export
from redi.engine.model.liger import apply_liger
from redi.engine.model.load import empty_model, generation_config, read_config
from redi.engine.model.sharding import compute_dtype, shard
from redi.engine.model.student import Student
from redi.engine.model.weights import read_weights
from redi.engine.train.checkpoint import Checkpointer
from redi.engine.train.greedy import held_out_problems
from redi.engine.train.guards import (
    Guards,
    Row,
    Verdict,
    check_not_collapsed,
    last_good,
    name_rows,
    skip_message,
)
from redi.engine.train.metrics import MetricsLog, peak_memory_gib
from redi.engine.train.objectives import formula
from redi.engine.train.optimizer import learning_rate, make_optimizer, squared_update, step_if
from redi.engine.train.row_loss import Objective, StepTotals
from redi.engine.train.run_folder import (
    add_to_manifest,
    check_same_data,
    check_same_model,
    check_same_recipe,
    check_writable,
    write_run_dir,
)
from redi.engine.train.sequence_scores import set_reference
from redi.engine.train.signals import StopRequest
from redi.engine.train.trackers import check_trackers, open_trackers
from redi.engine.train.validation import HeldOut, validate
from redi.kernels import FilteredRediLoss
from redi.kernels.backends import choose_backend, filtering_backend

GO_ON = "the same command goes on from here"


def run_recipe(recipe: Recipe, world: World, console: Console, stop: StopRequest) -> bool:
    """Train one recipe to its end, going on from where an earlier attempt stopped.

    The run folder is touched only when all input has been found good.

    Args:
        recipe: resolved; `run.dir` and `model.path` are set.
        world: this process's place.
        console: where it speaks.
        stop: whether a signal asked for one.

    Returns:
        True when the run is finished, False when a signal stopped it.

    Raises:
        InputError: the recipe, data or model is wrong, or the folder holds another run.
        RunError: the run failed.
        KeyboardInterrupt: a signal stopped it before it had begun.
    """
    run_dir = Path(recipe.run.dir or "")
    check_same_recipe(recipe, run_dir)
    if (run_dir / "export").is_dir():
        console.say(f"{run_dir}: finished already; the model is in {run_dir / 'export'}")
        return True
    check_not_collapsed(recipe.guard, run_dir)
    if world.is_main:
        check_writable(run_dir)
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory that it has not written; filling gigabytes of logits costs.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    transformers_logging.disable_progress_bar()
    config = model_config(recipe)
    check_trackers(recipe.run.trackers)
    check_replicas(recipe.shard, world.size)
    dtype = compute_dtype(recipe.train.dtype, world.device)
    if recipe.objective.filter_epsilon and dtype != torch.bfloat16:
        raise InputError(
            'objective.filter_epsilon needs bfloat16: set train.dtype = "bfloat16", or leave it out'
        )
    kind, _ = choose_attention(recipe.model.attention, world.device, dtype)
    check_dropout(recipe.model.path or "", config, kind)
    recomputed = recipe.shard.checkpointing != "none"
    if recipe.shard.compile and recomputed and kind in NOT_IN_GRAPHS:
        raise InputError(
            "shard.compile: beside shard.checkpointing a block is compiled whole or not at all, "
            f'and attention "{kind}" cannot be; leave one of the two out, or set model.attention '
            'to "varlen" on CUDA'
        )
    try:
        choose = filtering_backend if recipe.objective.filter_epsilon else choose_backend
        choose(recipe.objective.backend, world.device)
    except ValueError as error:
        raise InputError(f"objective.backend: {error}") from None

    def prepare() -> PreparedData:
        with stop.breaking_off(world.is_main):
            return prepare_data(recipe, world, console)

    data = world.main_first(prepare)
    check_same_data(data.keys, run_dir)
    check_positions(
        data.tokens,
        data.examples.lengths,
        data.examples.units,
        config,
        'set data.max_tokens = {} with data.overlong = "drop" or "truncate", or raise '
        "model.max_position_embeddings",
    )
    if recipe.objective.filter_epsilon:
        console.say(
            f"objective.filter_epsilon = {recipe.objective.filter_epsilon:g}: the gradient is "
            "approximate; positive_dropped and negative_dropped in the metrics tell by how much"
        )
    cost = training_cost(config)
    overview = data.look_over(recipe.train.row_tokens, world.size, cost)
    show(overview, str(run_dir), console)
    for warning in warnings(overview):
        console.warn(warning)
    if router := router_loss(config):
        console.warn(router)
    if recipe.objective.name == "redi" and recipe.objective.alpha > 1:
        console.warn(
            f"objective.alpha = {recipe.objective.alpha}: incorrect traces weigh more than correct "
            "ones; the paper's alpha lies in [0, 1]"
        )
    with stop.breaking_off(world.size == 1):
        weights = None
        if world.is_main:
            weights = model_digest(recipe.model.path or "", recipe.data.cache_dir)
            check_same_model(weights, run_dir)
        student, tokenizer = build_student(recipe, config, dtype, world, console)
        if formula(recipe.objective).reference:
            set_reference(
                student,
                recipe,
                data.tokens,
                data.examples.units[data.schedule.drawn()],
                data.examples.lengths,
                digest=weights,
                dtype=dtype,
                cost=cost,
                world=world,
                console=console,
            )
        optimizer = make_optimizer(student, recipe.optim)
    try:
        if world.is_main:
            keys = data.keys | {"model": weights}
            write_run_dir(recipe, keys, overview, dtype, run_dir, world)
        finished = _train(recipe, run_dir, data, cost, student, optimizer, world, console, stop)
        if finished:
            export(student, tokenizer, run_dir / "export", dtype, world)
            console.say(f"{run_dir}: done; the model is in {run_dir / 'export'}")
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{run_dir}: {error}; the same command goes on from the newest complete checkpoint"
        ) from error
    return finished


def check_positions(
    tokens: TokenizedTraces, lengths: np.ndarray, used: np.ndarray, config: Any, advice: str
) -> None:
    """No trace may be longer than what the model has positions for.

    Args:
        lengths: int64 [traces], how much of each is kept.
        used: indices of traces, in any shape and order.
        config: the model's configuration.
        advice: what to do, with {} where the number of positions belongs.

    Raises:
        InputError: one is, naming its row.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and lengths[used].max() > positions:
        traces = np.unique(used)  # slow where traces are millions: only now
        over = traces[lengths[traces] > positions]
        raise InputError(
            f"{tokens.where(int(over[0]))}: {lengths[over[0]]} tokens are more than the model's "
            f"{positions} positions ({len(over)} of {len(traces)} traces are): "
            f"{advice.format(positions)}"
        )


def check_vocabulary(recipe: Recipe, config: Any) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer; InputError where it has more tokens than the model knows."""
    tokenizer = load_tokenizer(recipe.model.tokenizer or recipe.model.path or "")
    known = config.get_text_config().vocab_size
    if len(tokenizer) > known:
        raise InputError(
            f"model.tokenizer: it has {len(tokenizer)} tokens, the model's vocabulary only {known}"
        )
    return tokenizer


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

    def look_over(self, row_tokens: int, ranks: int, cost: Cost) -> Overview:
        """What a run on so many ranks would train; see `look_over`."""
        held_out = self.held_out
        return look_over(
            self.tokens,
            self.examples,
            self.schedule,
            (held_out.tokens, held_out.examples) if held_out else None,
            row_tokens=row_tokens,
            world_size=ranks,
            cost=cost,
        )


def prepare_data(recipe: Recipe, world: World, console: Console) -> PreparedData:
    """Tokenize (or find the cache), choose what is trained, lay out the steps."""
    tokens = tokenized(recipe, recipe.data.paths, world, console)
    tokens = tokens.of_teachers(recipe.data.teachers, recipe.data.teacher_weights)
    examples = _examples(recipe, tokens, formula(recipe.objective).units)
    schedule = Schedule(
        num_units=len(examples.units),
        batch=recipe.train.batch,
        epochs=recipe.train.epochs,
        max_steps=recipe.train.max_steps,
        seed=recipe.train.seed,
        mixture=mix(tokens, examples.units, recipe.data.paths, recipe.data.mixing_weights),
    )
    return PreparedData(tokens, examples, schedule, _held_out(recipe, world, console))


def _held_out(recipe: Recipe, world: World, console: Console) -> HeldOut | None:
    """The traces of `[eval]`: pairs where there are any incorrect ones, else the correct ones."""
    if not recipe.eval.paths:
        return None
    tokens = tokenized(recipe, recipe.eval.paths, world, console)
    examples = _examples(recipe, tokens, "pairs" if (tokens.signs < 0).any() else "positives")
    return HeldOut(tokens, examples, held_out_problems(recipe))


def _examples(recipe: Recipe, tokens: TokenizedTraces, objective_needs: Needs) -> Examples:
    end = None
    if recipe.data.eos == "left_out":
        end = load_tokenizer(recipe.model.tokenizer or recipe.model.path or "").eos_token_id
    return select(
        tokens,
        objective_needs=objective_needs,
        pairing=recipe.data.pairing,
        duplicates=recipe.data.duplicates,
        max_tokens=recipe.data.max_tokens,
        max_prompt_tokens=recipe.data.max_prompt_tokens,
        max_completion_tokens=recipe.data.max_completion_tokens,
        overlong=recipe.data.overlong,
        row_tokens=recipe.train.row_tokens,
        untrained_end=end,
    )


def tokenized(
    recipe: Recipe, paths: tuple[str, ...], world: World, console: Console
) -> TokenizedTraces:
    """The traces of files as `[data]` wants them tokenized: cached, or made by rank 0 first."""
    settings = TokenSettings(
        paths=paths,
        format=recipe.data.format,
        template=recipe.data.template,
        system_prompt=recipe.data.system_prompt,
        tokenizer_path=recipe.model.tokenizer or recipe.model.path or "",
        control_tokens=recipe.data.control_tokens,
    )
    cache = recipe.data.cache_dir
    processes = recipe.data.processes or min(8, os.cpu_count() or 1)
    return world.main_first(lambda: tokenize(settings, cache, processes=processes, console=console))


def model_config(recipe: Recipe, weights: bool = True) -> Any:
    """The configuration of the recipe's model, with what the recipe replaces in it.

    Args:
        weights: whether they are needed too.

    Raises:
        InputError: no such model, or one that cannot be trained.
    """
    model = recipe.model
    path = model.path or ""
    config = read_config(path, model.rope_theta, model.max_position_embeddings, weights)
    check_architecture(path, config)
    return config


def build_model(path: str, config: Any, attention: str) -> PreTrainedModel:
    """A model to train, on the meta device, with packed attention and without its weights.

    Args:
        path: folder or hub name.
        config: the model's configuration.
        attention: as `choose_attention` names it.

    Raises:
        InputError: it is not built as packed rows and the fused loss need.
    """
    model = empty_model(config, attention=register_attention(attention))
    if problem := model_problem(model):
        raise InputError(f"model.path: {path}: {problem}")
    if (generation := generation_config(path)) is not None:
        model.generation_config = generation
    return model


def build_student(
    recipe: Recipe, config: Any, dtype: torch.dtype, world: World, console: Console
) -> tuple[Student, PreTrainedTokenizerBase]:
    """Build the model, check that it can be exported, shard it, read its weights."""
    path = recipe.model.path or ""
    kind, reason = choose_attention(recipe.model.attention, world.device, dtype)
    precision = str(dtype).removeprefix("torch.")
    console.say(f"attention: {kind} ({reason}) is to be used; compute dtype {precision}")
    model = build_model(path, config, kind)
    per_document_rope(model, config)  # not in a plan: where documents end is no shape
    tokenizer = check_vocabulary(recipe, model.config)
    if world.is_main:
        with tempfile.TemporaryDirectory() as folder:
            check_exportable(model, tokenizer, Path(folder) / "export")
    liger = apply_liger(model, recipe.model.liger, world.device)
    console.say(f"liger-kernel: {liger}")
    model.train()
    student = Student(model, Objective(recipe.objective))
    shard(student, recipe.shard, dtype, world.device)
    student.to_empty(device=world.device)  # only the shards get memory
    read_weights(model, path)
    return student, tokenizer


def _train(
    recipe: Recipe,
    run_dir: Path,
    data: PreparedData,
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
    rate = learning_rate(recipe.optim, total)
    trackers = open_trackers(recipe, run_dir, done) if world.is_main else []
    metrics = MetricsLog(run_dir / "metrics.jsonl", done, trackers, active=world.is_main)
    progress = console.steps(total, done)
    guards = Guards(recipe.guard, run_dir / "metrics.jsonl", done, world)
    if done:
        console.say(f"{run_dir}: going on after step {done}")

    def evaluate(step: int) -> bool:
        """False when a request to stop broke it off; going on does it again."""
        if data.held_out is None or (step % recipe.eval.every and step < total):
            return True
        found = validate(
            student,
            data.held_out,
            row_tokens=recipe.train.row_tokens,
            cost=cost,
            world=world,
            stop=stop,
        )
        if found is None:
            return False
        metrics.write({"event": "eval", "step": step, **found})
        console.say(f"held out after step {step}: {_figures(found)}")
        return True

    if data.held_out is not None:
        console.say(
            f"held out: {len(data.held_out.sequences):,} traces, evaluated before step 1, every "
            f"{recipe.eval.every} steps and after the last"
        )

    with closing(checkpointer), closing(metrics), closing(progress):
        if world.anywhere(stop.asked) or not evaluate(done):
            console.say(f"stopped after step {done} of {total}; {GO_ON}")
            return False
        began = time.perf_counter()
        for batches in loader.steps(done):
            step = batches.step
            # Dropout, where a model has it, depends on seed, step and rank: nothing to save.
            torch.manual_seed((recipe.train.seed * total + step) * world.size + world.rank)
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            done_rows = forward_backward(student, batches, world.device, recipe.shard.reduce)
            if step == done + 1:
                say_what_ran(student, run_dir, world, console)
            grad_norm = clip(student, recipe.optim.max_grad_norm)
            sums = _step_sums(done_rows, stop.asked, checkpointer.failed, world.device)
            # Decided and done on the device: the host asks for nothing until all is under way.
            finite = sums[0].isfinite() & grad_norm.isfinite()
            step_if(optimizer, finite)
            optimizer.zero_grad()
            squared = squared_update(optimizer, finite)
            dist.all_reduce(squared)
            update_norm = (squared / recipe.shard.replicate).sqrt()
            loss, positive, negative, *dropped, stops, failed, norm, update, taken = torch.stack(
                [*sums, grad_norm.double(), update_norm, finite.double()]
            ).tolist()
            now = time.perf_counter()
            line = {
                "step": step,
                "epoch": (step - 1) // data.schedule.steps_per_epoch,
                "loss": loss,
                "positive_logp": _mean(positive, batches.num_positives),
                "negative_logp": _mean(negative, batches.num_negatives),
                "grad_norm": norm,
                "update_norm": update,
                "lr": rate(step),
                "tokens": batches.num_tokens,
                "targets": batches.num_targets,
                "micro_steps": len(batches.micro_batches),
                "rank_efficiency": batches.rank_efficiency,
                "seconds": now - began,
                "tokens_per_s": batches.num_tokens / (now - began),
                "peak_memory_gib": peak_memory_gib(world.device),
            }
            if recipe.objective.filter_epsilon:
                line["positive_dropped"] = _mean(dropped[0], batches.num_positives)
                line["negative_dropped"] = _mean(dropped[1], batches.num_negatives)
            metrics.write(line)
            if not taken:
                event = name_rows(done_rows, data.tokens, step)
                metrics.write(event)
                console.warn(skip_message(event, loss, norm))
            if verdict := guards.after(line):
                good_before = guards.good_before
                assert good_before is not None, "a verdict dates what was good"
                metrics.write(
                    {
                        "event": verdict.kind,
                        "step": step,
                        "goes_on": verdict.goes_on,
                        "good_before": good_before,
                    }
                )
                if not verdict.goes_on:
                    _give_up(verdict, good_before, checkpointer, run_dir)
                console.warn(verdict.text)
            progress.step(line)
            if failed:
                checkpointer.wait()  # tells why
            stopping = stops > 0 or not evaluate(step)
            if step % recipe.run.save_every == 0 or step == total or stopping:
                checkpointer.save(step, guards.good_before if step < total else None)
            if stopping:
                checkpointer.wait()
                console.say(f"stopped after step {step} of {total}, saved in {run_dir}; {GO_ON}")
                return False
            began = time.perf_counter()
        checkpointer.wait()
    return True


def say_what_ran(student: Student, run_dir: Path | None, world: World, console: Console) -> None:
    """Log what each rank's first forward ran, and write it into the manifest of `run_dir`."""
    assert student.ran is not None
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, student.ran)
    for ran in dict.fromkeys(map(repr, everywhere)):
        ranks = [rank for rank, other in enumerate(everywhere) if repr(other) == ran]
        on = f" on ranks {', '.join(map(str, ranks))}" if len(ranks) < world.size else ""
        console.say(f"ran{on}: {everywhere[ranks[0]].text()}")
    if world.is_main and run_dir is not None:
        add_to_manifest(run_dir, ran=[asdict(other) for other in everywhere])


def forward_backward(
    student: Student, batches: StepBatches, device: torch.device, reduce: str
) -> list[Row]:
    """Accumulate the step's gradient; return what each of this rank's rows came to."""
    assert isinstance(student, FSDPModule)
    totals = StepTotals(units=len(batches.units), targets=batches.num_targets)
    rows = []
    for index, batch in enumerate(batches.micro_batches):
        on_device = batch.to(device, non_blocking=True)
        last = index == len(batches.micro_batches) - 1
        student.set_requires_gradient_sync(last or reduce == "micro_step")
        student.set_requires_all_reduce(last)  # among copies once is enough: it is sharded by then
        out = student(on_device, totals)
        out.loss.backward()
        lengths = out.sequence_lengths.clamp(min=1)
        means = out.sequence_logps.double() / lengths
        dropped = None
        if isinstance(out, FilteredRediLoss):
            dropped = out.sequence_dropped.double() / lengths
        rows.append(Row(batch.sequence_ids, out.loss.detach(), means, on_device.signs, dropped))
    return rows


def _step_sums(
    rows: list[Row], asked_to_stop: bool, save_failed: bool, device: torch.device
) -> torch.Tensor:
    """Loss, sums of the positives' and the negatives' mean log-probs, and of what a filter left
    out of them, of requests to stop and of failed saves.

    float64 [7] on the device, over all ranks.
    """
    sums = torch.zeros(7, dtype=torch.float64, device=device)
    sums[5], sums[6] = asked_to_stop, save_failed
    for row in rows:
        sums[0] += row.loss
        for first, values in ((1, row.means), (3, row.dropped)):
            if values is not None:
                # Not values[signs > 0]: boolean indexing would wait for the device.
                sums[first] += torch.where(row.signs > 0, values, 0.0).sum()
                sums[first + 1] += torch.where(row.signs < 0, values, 0.0).sum()
    dist.all_reduce(sums)
    return sums


def clip(student: Student, max_norm: float) -> torch.Tensor:
    """Clip the whole gradient to `max_norm` (0: leave it). Returns its l2 norm before."""
    parameters = [p for p in student.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _give_up(
    verdict: Verdict, good_before: int, checkpointer: Checkpointer, run_dir: Path
) -> NoReturn:
    """End the run with the checkpoint named that is from before it went wrong."""
    try:
        checkpointer.wait()
    finally:
        raise RunError(f"{verdict.text}; {last_good(run_dir, good_before)}")


def _figures(values: dict[str, float]) -> str:
    short = {"positive_logp": "logp+", "negative_logp": "logp-"}  # as the progress line has them
    return "  ".join(f"{short.get(k, k.replace('_', ' '))} {v:.3f}" for k, v in values.items())


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None
