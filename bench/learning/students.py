"""One student of the study: its traces, stage 1, a run of stage 2, and its evaluation.

Data sets, schedule, loader, objectives, loss ops, optimizer and generation are those of the engine.
Only the trunk's forward differs: traces of a few tokens run as one padded batch, which is much
faster than one attention call per document. There is no sharding and no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from redi.bench.learning.tapered import TaperedLoss
from redi.bench.learning.teacher import (
    BoundedPairsLoss,
    TaughtLoss,
    TaughtPairsLoss,
    UnfilteredLoss,
)
from redi.bench.learning.trial import ROW_TOKENS, Trial, select_units, whole_folder
from redi.engine.config.sections import ObjectiveConfig, OptimConfig
from redi.engine.data.loader import StepLoader
from redi.engine.data.packing import Cost, PackedBatch, build_batch
from redi.engine.data.schedule import Pairing, Schedule
from redi.engine.generation.generate import Sampling, generate
from redi.engine.generation.scoring import score
from redi.engine.loss.packed_loss import PackedLoss, StepTotals
from redi.engine.model.student import Student
from redi.engine.train.optimizer import learning_rate, make_optimizer, squared_update, step_if

TEMPERATURE = 0.7


STAGE_1 = OptimConfig(lr=3e-3, weight_decay=0.01, schedule="cosine", warmup=0.05)


@dataclass(frozen=True)
class StudyMethod:
    """An objective of stage 2 and the batches it trains on."""

    name: str
    objective: ObjectiveConfig
    batches: int = 1
    """Units of a step, as a multiple of `StudySizes.batch`."""
    loss: type[PackedLoss] = PackedLoss
    """A loss that is no objective of the engine reads alpha from `objective`."""


METHODS = (
    StudyMethod("control", ObjectiveConfig("redi", alpha=0.0)),
    # A step of pairs costs as much as one of twice as many correct traces.
    StudyMethod("control 2x", ObjectiveConfig("sft"), batches=2),
    StudyMethod("REDI 0.2", ObjectiveConfig("redi", alpha=0.2)),
    StudyMethod("REDI 0.5", ObjectiveConfig("redi", alpha=0.5)),
    StudyMethod("REDI 0.8", ObjectiveConfig("redi", alpha=0.8)),
    StudyMethod("REDI 1", ObjectiveConfig("redi", alpha=1.0)),
    StudyMethod("DPO", ObjectiveConfig("dpo", beta=0.1)),
    StudyMethod("SimPO", ObjectiveConfig("simpo", beta=2.0, margin=0.5)),
    StudyMethod("SimPER", ObjectiveConfig("simper")),
    StudyMethod("unlikelihood", ObjectiveConfig("unlikelihood", alpha=1.0)),
)
"""Of the study of alpha, docs/when-negatives-help.md."""


def _bounded(alpha: float, temperature: float = 1.0) -> StudyMethod:
    objective = ObjectiveConfig("bounded_redi", alpha=alpha, temperature=temperature)
    name = f"bounded {alpha:g}" + (f" T{temperature:g}" if temperature != 1 else "")
    return StudyMethod(name, objective)


_SHARED = ("control", "control 2x", "REDI 0.2", "REDI 0.8", "SimPER")
BOUNDED_METHODS = (
    *(method for method in METHODS if method.name in _SHARED),
    *(
        StudyMethod(f"SFT+SimPER {alpha:g}", ObjectiveConfig("sft_simper", alpha=alpha))
        for alpha in (1.0, 2.0, 4.0, 8.0)
    ),
    StudyMethod("ORPO", ObjectiveConfig("orpo", beta=1.0)),
    *(_bounded(alpha) for alpha in (0.5, 1.0, 2.0, 4.0)),
    *(_bounded(alpha, 0.5) for alpha in (2.0, 4.0, 8.0)),
    *(_bounded(alpha, 2.0) for alpha in (0.5, 1.0)),
    *(
        StudyMethod(f"tapered {a:g}", ObjectiveConfig("redi", alpha=a), loss=TaperedLoss)
        for a in (0.8, 2.0)
    ),
    *(
        StudyMethod(f"REDI 0.8 gamma {g:g}", ObjectiveConfig("redi", alpha=0.8, negative_gamma=g))
        for g in (0.5, 1.0)
    ),
    StudyMethod("TOPR 0.8", ObjectiveConfig("topr", alpha=0.8)),
)
"""Of the study of bounded terms for incorrect traces."""
TEACHER_METHODS = (
    *(method for method in METHODS if method.name in ("control", "REDI 0.5")),
    *(
        StudyMethod(f"{name} {alpha:g}", ObjectiveConfig("redi", alpha=alpha), loss=loss)
        for name, loss, alpha in (
            ("taught", TaughtLoss, 0.0),
            ("taught", TaughtLoss, 0.5),
            ("taught pairs", TaughtPairsLoss, 0.5),
            ("bounded pairs", BoundedPairsLoss, 0.5),
            ("unfiltered", UnfilteredLoss, 0.0),
        )
    ),
)
"""Of the study of a teacher's distributions in place of samples; for the habit alone."""
RATES = (2e-5, 1e-4, 5e-4, 2.5e-3)
"""Peak learning rates of stage 2, the same for every method."""


@dataclass(frozen=True)
class StudyRuns:
    """The runs of stage 2 of a study: every method at every rate, for each task and seed."""

    tasks: Sequence[str]
    seeds: int
    methods: Sequence[StudyMethod]
    rates: Sequence[float] = RATES

    def cells(self, folder: Path, task: str, seed: int) -> dict[Path, tuple[StudyMethod, float]]:
        """The runs of one student by the paths of their records."""
        return {
            cell_path(folder / f"{task}-{seed}", method.name, rate): (method, rate)
            for method in self.methods
            for rate in self.rates
        }


class PaddedStudent(Student):
    """A student that runs a pack's traces as one padded batch.

    Padding comes last, so with causal attention no trace attends to it. `Student.forward` is
    replaced, since it counts calls of packed attention, and there are none.
    """

    forward = Student.score_or_loss

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Last hidden states [T, D] of a pack, each document separately."""
        lengths = batch.cu_seqlens.diff()
        documents = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        ids = batch.input_ids.new_zeros(len(lengths), batch.max_seqlen)
        ids[documents, batch.position_ids] = batch.input_ids
        output = self.model.base_model(input_ids=ids, use_cache=False)
        return output.last_hidden_state[documents, batch.position_ids]


def load_student(trial: Trial, folder: Path) -> PreTrainedModel:
    """A model folder's weights on the trial's device."""
    return AutoModelForCausalLM.from_pretrained(folder).to(trial.device)


def reference_logps(trial: Trial, model: PreTrainedModel) -> Tensor:
    """float32 [traces]: log-prob sums of the traces in pairs, for DPO; 0 for the others."""
    student = PaddedStudent(model, PackedLoss(ObjectiveConfig("sft")))
    found = torch.zeros(len(trial.train), device=trial.device)
    paired = np.unique(select_units(trial.train, ObjectiveConfig("dpo", beta=1.0)).units)
    with torch.no_grad():
        for some in np.array_split(paired, len(paired) // 512 + 1):
            row = build_batch(trial.train, some, trial.train.lengths[some]).to(trial.device)
            found[torch.from_numpy(some)] = student(row, None).sequence_logps
    return found


def train(
    trial: Trial,
    model: PreTrainedModel,
    objective: PackedLoss,
    optim: OptimConfig,
    *,
    steps: int,
    batch: int,
    log_every: int,
    pairing: Pairing = "first",
) -> Iterator[dict[str, Any]]:
    """Train in place, as `redi train` does; yields the figures of each `log_every`-th step."""
    student = PaddedStudent(model, objective)
    examples = select_units(trial.train, objective.section, pairing)
    schedule = Schedule(len(examples.units), batch, None, steps, seed=trial.seed)
    loader = StepLoader(
        trial.train,
        examples,
        schedule,
        row_tokens=ROW_TOKENS,
        rank=0,
        world_size=1,
        cost=Cost(linear=1, quadratic=0),
    )
    optimizer = make_optimizer(student, optim)
    rate = learning_rate(optim, steps)
    for batches in loader.steps(0):
        (row,) = batches.micro_batches
        row = row.to(trial.device)
        for group in optimizer.param_groups:
            group["lr"] = rate(batches.step)
        out = student(row, StepTotals(len(batches.units), batches.num_targets))
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), optim.max_grad_norm)
        finite = out.loss.isfinite() & norm.isfinite()
        step_if(optimizer, finite)
        optimizer.zero_grad()
        if batches.step % log_every:
            continue
        yield {
            "step": batches.step,
            "loss": out.loss.item(),
            **_mean_logps(out.sequence_logps / out.sequence_lengths, row.signs),
            "grad_norm": norm.item(),
            "update_norm": squared_update(optimizer, finite).sqrt().item(),
        }


def _mean_logps(means: Tensor, signs: Tensor) -> dict[str, float | None]:
    """Means over a pack's sequences of the mean log-prob per token, by sign."""
    by_sign = {"positive_logp": means[signs > 0], "negative_logp": means[signs < 0]}
    return {name: some.mean().item() if len(some) else None for name, some in by_sign.items()}


def teach_stage_1(trial: Trial) -> PreTrainedModel:
    """Imitate the correct traces; the student is cached in the trial's folder."""
    folder = trial.folder / "student"
    if not folder.is_dir():
        model = load_student(trial, trial.folder / "model")
        objective = PackedLoss(ObjectiveConfig("sft"))
        steps = round(trial.task.stage_1_steps * trial.sizes.stage_1)
        for _ in train(
            trial,
            model,
            objective,
            STAGE_1,
            steps=steps,
            batch=trial.sizes.stage_1_batch,
            log_every=steps,
            pairing="zip",
        ):
            pass
        with whole_folder(folder) as unfinished:
            model.save_pretrained(unfinished)
    return load_student(trial, folder)


def teach_stage_2(
    trial: Trial, method: StudyMethod, rate: float, reference: Callable[[], Tensor]
) -> dict[str, Any]:
    """One run of stage 2 from the student of stage 1: its curves and its evaluation.

    Args:
        rate: peak learning rate.
        reference: returns `reference_logps` of the student of stage 1.
    """
    model, sizes = teach_stage_1(trial), trial.sizes
    needed = method.objective.kind.reference
    objective = method.loss(method.objective, reference() if needed else None)
    optim = OptimConfig(lr=rate, weight_decay=0.0)
    steps, looks = [], [{"step": 0, **look(trial, model)}]
    for line in train(
        trial,
        model,
        objective,
        optim,
        steps=sizes.steps,
        batch=method.batches * sizes.batch,
        log_every=sizes.log_every,
    ):
        steps.append(line)
        if line["step"] % sizes.look_every == 0:
            looks.append({"step": line["step"], **look(trial, model)})
    return {"steps": steps, "looks": looks, **examine(trial, model)}


def look(trial: Trial, model: PreTrainedModel) -> dict[str, float | None]:
    """Log-probs and margin accuracy of the validation pairs, and one trace of each problem."""
    with torch.no_grad():
        scores = PaddedStudent(model, PackedLoss(ObjectiveConfig("sft")))(trial.pairs, None)
    means = scores.sequence_logps / scores.sequence_lengths
    return {
        **_mean_logps(means, trial.pairs.signs),
        "margin_accuracy": (means[0::2] > means[1::2]).double().mean().item(),
        **_judge(trial, model, "validation", TEMPERATURE, samples=1),
    }


def examine(trial: Trial, model: PreTrainedModel) -> dict[str, Any]:
    """Results of a student on both splits: greedy, at TEMPERATURE, and at temperature 1."""
    return {
        split: {
            "greedy": _judge(trial, model, split, 0.0, samples=1),
            "sampled": _judge(trial, model, split, TEMPERATURE, samples=samples),
            "unsharpened": _judge(trial, model, split, 1.0, samples=1),
        }
        for split, samples in (("validation", 2), ("test", trial.sizes.samples))
    }


def _judge(
    trial: Trial, model: PreTrainedModel, split: str, temperature: float, *, samples: int
) -> dict[str, float]:
    """Accuracy, pass@samples, shares of well-formed traces and of the teacher's fault."""
    task, problems = trial.task, trial.problems[split]
    sampling = Sampling(task.longest_trace + 1, temperature, seed=trial.seed)
    count = len(problems) * samples
    done = generate(model, trial.tokenizer, problems, sampling, samples=samples, batch_size=count)
    pairs = [
        (problem, completion)
        for problem, completions in zip(problems, done, strict=True)
        for completion in completions
    ]
    # A trace that does not end is neither right nor well formed.
    correct = [one.ended and task.is_correct(problem, one.text) for problem, one in pairs]
    formed = [one.ended and task.is_well_formed(problem, one.text) for problem, one in pairs]
    faults = [task.fault_share(problem, one.text) for problem, one in pairs]
    scores = score(np.array(correct).reshape(-1, samples), ks=(samples,))
    return {
        "accuracy": scores.pass_at_1,
        f"pass@{samples}": scores.pass_at[samples],
        "well_formed": float(np.mean(formed)),
        "fault": float(np.mean(faults)),
    }


def cell_path(trial: Path, method: str, rate: float) -> Path:
    """The record of one run of stage 2 in a trial's folder."""
    return trial / "cells" / f"{method.replace(' ', '-')}_{rate:g}.json"
