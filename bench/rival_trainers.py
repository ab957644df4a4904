"""The trainers that `redi.bench.rivals` compares `redi train` with, a process each.

Runs by its path in an environment that has TRL and not this project, so it imports neither `redi`
nor, at its top, TRL. Each trains on the token ids of a job, step by step, and appends a line to the
job's metrics after each step. No dropout, weight decay, checkpointing or saving; float32.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Job = dict[str, Any]
"""Keys: model, objective ("redi", "sft" or "dpo"), alpha, beta, lr, warmup, seed; batches: steps
of [prompt ids, completion ids, ...] with one completion (sft) or two, of which the second is
incorrect; metrics: the file to write; folder: for files of a trainer."""


def _write(job: Job, step: int, loss: float, grad_norm: float, rate: float) -> None:
    line = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": rate}
    with Path(job["metrics"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _settings(job: Job, at_once: int | None) -> dict[str, Any]:
    """Arguments of a TRL trainer; `at_once` units in a forward, None: the whole batch."""
    batch = len(job["batches"][0])
    return {
        "output_dir": job["folder"],
        "max_steps": len(job["batches"]),
        "per_device_train_batch_size": at_once or batch,
        "gradient_accumulation_steps": batch // at_once if at_once else 1,
        "learning_rate": job["lr"],
        "warmup_steps": job["warmup"],
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job["seed"],
    }


def _run(trainer: Any, job: Job) -> None:
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                _write(
                    job, state.global_step, logs["loss"], logs["grad_norm"], logs["learning_rate"]
                )

    trainer.add_callback(Log())
    trainer.train()


def _completion_positions_only() -> None:
    """Let TRL's chunked loss leave prompts and padding out, which it does on GPUs alone."""
    from trl.trainer import utils

    utils._use_triton = lambda device: True


def _preference(
    job: Job, *, at_once: int | None = None, compact: bool = False, whole_logits: bool = False
) -> None:
    """TRL's DPOTrainer: its own loss, or REDI by a subclass."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    class Redi(Tokenized):
        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset  # it has no reference

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Tensor:
            ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]
            labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
            both = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
            if whole_logits:
                logits = model(**both, use_cache=False).logits[:, :-1]
                logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask
            else:
                logps = model(**both, labels=labels, fused_lm_head=True).log_probs
            correct, incorrect = (logps.sum(1) / mask.sum(1)).chunk(2)
            loss: Tensor = (job["alpha"] * incorrect - correct).mean()
            return loss

    if compact:
        _completion_positions_only()
    redi = job["objective"] == "redi"
    more = {} if redi else {"beta": job["beta"]}
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, pair, strict=True)) for batch in job["batches"] for pair in batch]
    trainer = (Redi if redi else Tokenized)(
        model=job["model"],
        args=DPOConfig(**_settings(job, at_once), precompute_ref_log_probs=True, **more),
        train_dataset=Dataset.from_list(rows),
    )
    if redi and compact:  # only what the loss needs: the metrics of DPO cost time
        add_fused_lm_head(trainer.model)
    _run(trainer, job)


def _sft(job: Job, *, padding_free: bool = False, compact: bool = False) -> None:
    """TRL's SFTTrainer; mean over the batch's completion tokens."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if compact:
        _completion_positions_only()
    rows = [
        {
            "input_ids": prompt + completion,
            "completion_mask": [0] * len(prompt) + [1] * len(completion),
        }
        for batch in job["batches"]
        for prompt, completion in batch
    ]
    settings = _settings(job, None) | {"completion_only_loss": True, "padding_free": padding_free}
    _run(
        SFTTrainer(
            model=job["model"], args=SFTConfig(**settings), train_dataset=Dataset.from_list(rows)
        ),
        job,
    )


def _loop(job: Job) -> None:
    """A loop around a plain transformers model: one padded batch, whole logits."""
    from transformers import AutoModelForCausalLM, get_scheduler

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0, fused=True)
    steps = len(job["batches"])
    warmup = -int(-job["warmup"] * steps // 1)
    scheduler = get_scheduler("linear", optimizer, warmup, steps)
    for step, batch in enumerate(job["batches"], 1):
        sequences: list[Tensor] = []
        weights: list[Tensor] = []
        targets = sum(len(one) for _, *completions in batch for one in completions)
        for prompt, *completions in batch:
            for completion, sign in zip(completions, (1.0, -job["alpha"]), strict=False):
                count = targets if job["objective"] == "sft" else len(completion) * len(batch)
                sequences.append(torch.tensor(prompt + completion))
                trained = [sign / count] * len(completion)
                weights.append(torch.tensor([0.0] * len(prompt) + trained))
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        weight = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)
        lengths = torch.tensor([len(one) for one in sequences])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = (nll * weight[:, 1:].flatten()).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        _write(job, step, loss.item(), norm.item(), rate)


PREFERENCE: dict[str, tuple[str, Callable[[Job], None]]] = {
    "trl": (
        "DPOTrainer as it runs on a CPU: padded batch, chunked loss over all positions",
        _preference,
    ),
    "trl-compact": (
        "the same with the chunked loss over completions only, as on GPUs",
        lambda job: _preference(job, compact=True),
    ),
    "trl-compact-pairs": (
        "the same, one pair at a time",
        lambda job: _preference(job, at_once=1, compact=True),
    ),
}
REDI: dict[str, tuple[str, Callable[[Job], None]]] = {
    **PREFERENCE,
    "authors": (
        "as the paper's authors: DPOTrainer, one pair at a time, whole logits",
        lambda job: _preference(job, at_once=1, whole_logits=True),
    ),
    "loop": ("plain transformers, one padded batch, whole logits", _loop),
}
SFT: dict[str, tuple[str, Callable[[Job], None]]] = {
    "trl": ("SFTTrainer as it runs on a CPU: padded batch, chunked loss over all positions", _sft),
    "trl-compact": (
        "the same with the chunked loss over completions only, as on GPUs",
        lambda job: _sft(job, compact=True),
    ),
    "trl-padding-free": (
        "the same, the batch as one row without padding",
        lambda job: _sft(job, padding_free=True, compact=True),
    ),
    "loop": ("plain transformers, one padded batch, whole logits", _loop),
}
TRAINERS = {"redi": REDI, "sft": SFT, "dpo": PREFERENCE}
"""Of each objective: what it is, and how it trains a job."""


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    TRAINERS[wanted["objective"]][sys.argv[1]][1](wanted)
