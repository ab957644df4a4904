"""The recipe: one frozen dataclass a section, with the range of each number at its field."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from redi.engine.config.objectives import OBJECTIVES, ObjectiveKind
from redi.engine.config.patterns import answer_pattern
from redi.engine.config.ranges import (
    AT_LEAST_1,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Range,
    check_ranges,
    in_range,
    ranged,
)
from redi.engine.errors import InputError


class Section:
    """A section of the recipe; its numbers are checked when it is made."""

    section: ClassVar[str]

    def __init_subclass__(cls, name: str) -> None:
        cls.section = name

    def __post_init__(self) -> None:
        check_ranges(self, f"{self.section}.")


@dataclass(frozen=True)
class ModelConfig(Section, name="model"):
    """Which model is trained."""

    path: str | None = None
    """Folder (or hub name) of a transformers causal LM in safetensors; left out: the export of
    the recipe before this one."""
    tokenizer: str | None = None
    """Folder (or hub name) of the tokenizer; left out: `path`."""
    rope_theta: float | None = ranged(None, POSITIVE)
    """Base of the rotary position embedding, in place of the model's own."""
    max_position_embeddings: int | None = ranged(None, POSITIVE)
    """Longest context, in place of the model's own; the export keeps both."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """flash-attn (3, 4 or 2, what suits the card), torch's varlen attention, or SDPA document by
    document; auto: the first of them that the machine has."""
    liger: Literal["auto", "off"] = "auto"
    """liger-kernel's RMSNorm, RoPE and SwiGLU; auto: on CUDA when installed."""


@dataclass(frozen=True)
class DataConfig(Section, name="data"):
    """Which traces it is trained on, and how they become tokens."""

    path: str | list[str] = ""
    """JSONL, JSON, Parquet or CSV files (gzip too), folders of them (sub-folders too), or hub
    names."""
    mixing_weights: list[float] = field(default_factory=list, metadata=in_range(POSITIVE))
    """One number a path: how often an epoch draws each of its pairs (SFT: sequences). 2: twice;
    0.5: another half each epoch; none given: once."""
    format: Literal["auto", "preference", "prompt-completion", "messages", "traces", "openr1"] = (
        "auto"
    )
    """The shape of a row; auto: told from the columns of each row."""
    teachers: list[str] = field(default_factory=list)
    """Only these teachers' traces are trained on (column teacher); none named: all."""
    teacher_weights: dict[str, float] = field(default_factory=dict, metadata=in_range(POSITIVE))
    """Factor on the weight of a teacher's traces, { r1 = 2.0 }; 1 for the others."""
    template: Literal["chat", "none"] = "chat"
    """chat: the tokenizer's chat template; none: prompt, completion and end token as they are."""
    system_prompt: str | None = None
    """System message of conversations that have none."""
    pairing: Literal["zip", "first", "all"] = "zip"
    """Problems with several traces: i-th correct with i-th incorrect; only the first of each
    (the paper); or every correct with every incorrect."""
    duplicates: Literal["keep", "drop"] = "keep"
    """drop: equal traces of a problem with one verdict are used once, and so are equal pairs
    (SFT: traces) of several problems; equal is token for token, and the first stays."""
    max_tokens: int = ranged(19800, Range(2))
    """Longest sequence (prompt and completion), in tokens."""
    max_prompt_tokens: int | None = ranged(None, AT_LEAST_1)
    """Longest prompt; left out: as long as the sequence allows."""
    max_completion_tokens: int | None = ranged(None, AT_LEAST_1)
    """Longest completion with its end; left out: as long as the sequence allows."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What happens to a sequence over one of these limits; a prompt is never cut, its trace
    dropped."""
    control_tokens: Literal["allow", "error"] = "allow"
    """Traces that spell a control token of the tokenizer (an end of turn, say): counted and warned
    of, or refused."""
    eos: Literal["trained", "left_out"] = "trained"
    """left_out: the end-of-sequence token that closes a trace is not trained (the authors' stage 1,
    where the padding token is the same)."""
    cache: str | None = None
    """Folder of tokenized sets; left out: $REDI_CACHE, else ~/.cache/redi."""
    processes: int = ranged(0, NOT_NEGATIVE)
    """Processes that tokenize; 0: one per core, 8 at most."""
    workers: int = ranged(0, NOT_NEGATIVE)
    """Processes that load ahead during training; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mixing_weights) not in (0, len(self.paths)):
            raise ValueError(
                "data.mixing_weights must have one number a path, got "
                f"{len(self.mixing_weights)} for {len(self.paths)}"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """The inputs as a tuple, whichever way they were written."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    @property
    def cache_dir(self) -> Path:
        """The folder of tokenized sets."""
        return Path(self.cache or os.environ.get("REDI_CACHE") or Path.home() / ".cache" / "redi")


# What filtered_redi_loss can do.
FILTERED: dict[str, tuple[object, ...]] = {
    "negative_gamma": (0,),
    "normalisation": ("sequence",),
    "length": ("trained",),
    "backend": ("auto", "torch", "triton-exp"),
}


@dataclass(frozen=True)
class ObjectiveConfig(Section, name="objective"):
    """What is minimised; docs/objectives.md has the formulas."""

    name: str = "sft"
    """sft: -log p of correct traces. redi: the same plus alpha * log p of incorrect ones. signed:
    every trace by itself with its row's weight. dft, unlikelihood, simper, simpo, dpo: as their
    papers have them."""
    alpha: float = ranged(0.8, NOT_NEGATIVE)
    """Weight of the incorrect traces (arXiv 2505.24850); 0: positives alone."""
    positive_weight: float = ranged(1.0, NOT_NEGATIVE)
    """Weight of the correct traces (signed)."""
    negative_gamma: float = ranged(0.0, NOT_NEGATIVE)
    """Multiplies a negative's term by exp(negative_gamma * mean log-prob) (redi); 0: not."""
    beta: float | None = ranged(None, POSITIVE)
    """Scale of the margin of log-probs (dpo, simpo: they need it)."""
    margin: float = ranged(1.0, FINITE)
    """How far the positive's scaled log-prob is to be ahead: the SimPO paper's gamma (simpo)."""
    label_smoothing: float = ranged(0.0, Range(0, 0.5, open_high=True))
    """Share of pairs taken to be labelled the wrong way round (dpo)."""
    normalisation: Literal["sequence", "token", "none"] = "sequence"
    """Mean over each sequence first; one mean over all tokens of the step (sft, dft, signed); or
    a mean over sequences of sums (signed)."""
    length: Literal["trained", "original"] = "trained"
    """What |y| counts: the tokens that are trained, or those before truncation (the authors' code:
    a truncated trace weighs less)."""
    filter_epsilon: float = ranged(0.0, SHARE)
    """Makes the gradient approximate (sft, redi; bfloat16): tiles of the vocabulary that hold at
    most this share of each of their tokens' probability are left out; 0: exact."""
    backend: Literal["auto", "reference", "torch", "triton", "triton-exp"] = "auto"
    """Implementation of the loss op; docs/kernels.md has them all."""

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"objective.name: {self.name} is unknown; available: {known}")
        super().__post_init__()
        if self.beta is None and "beta" in self.kind.keys:
            raise ValueError(
                f"objective.beta is missing: {self.name} needs it (DPO: 0.1 or less; SimPO: 2 to "
                "10)"
            )
        if self.filter_epsilon:
            for key, values in FILTERED.items():
                if (value := getattr(self, key)) not in values:
                    raise ValueError(
                        f"objective.filter_epsilon needs objective.{key} = "
                        f"{' or '.join(map(repr, values))}, got {value!r}"
                    )
        allowed = self.kind.normalisations
        if self.normalisation not in allowed:
            raise ValueError(
                f"objective.normalisation must be {' or '.join(allowed)} for {self.name}, got "
                f"{self.normalisation}"
            )
        if self.length != "trained" and self.normalisation != "sequence":
            raise ValueError(
                f'objective.length = "{self.length}" is not used with objective.normalisation = '
                f'"{self.normalisation}", which divides by no |y|; remove one of them'
            )

    @property
    def kind(self) -> ObjectiveKind:
        """Which keys it reads, and what it draws."""
        return OBJECTIVES[self.name]


@dataclass(frozen=True)
class OptimConfig(Section, name="optim"):
    """AdamW and its schedule."""

    lr: float = ranged(1e-5, NOT_NEGATIVE)
    """Peak learning rate."""
    weight_decay: float = ranged(1e-4, NOT_NEGATIVE)
    """Decoupled weight decay; norms and biases are left out."""
    betas: tuple[float, float] = ranged((0.9, 0.999), Range(0, 1, open_high=True))
    """Decay rates of AdamW's two moments."""
    eps: float = ranged(1e-8, POSITIVE)
    """AdamW's epsilon."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up; linear and cosine end at 0."""
    warmup: float = ranged(0.1, SHARE)
    """Share of the steps over which the rate rises from 0."""
    max_grad_norm: float = ranged(1.0, NOT_NEGATIVE)
    """Gradients are clipped to this l2 norm; 0: not clipped."""


@dataclass(frozen=True)
class TrainConfig(Section, name="train"):
    """Steps and their size."""

    batch: int = ranged(32, AT_LEAST_1)
    """Pairs of an optimizer step over all ranks; sequences in SFT."""
    epochs: int | None = ranged(None, AT_LEAST_1)
    """Passes over the data; training ends at the earlier of epochs and max_steps (neither: 1)."""
    max_steps: int | None = ranged(None, AT_LEAST_1)
    """Optimizer steps at most."""
    row_tokens: int = ranged(32768, Range(2))
    """Tokens of a packed row: what one rank runs in one micro-step."""
    seed: int = ranged(42, NOT_NEGATIVE)
    """Draws the batches."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype over fp32 masters, and dtype of the export; auto: bfloat16 on CUDA."""
    deterministic: bool = False
    """Bitwise repeatable on CUDA, at some cost in speed (a CPU is always so)."""


@dataclass(frozen=True)
class ShardConfig(Section, name="shard"):
    """How the model lies on the devices."""

    replicate: int = ranged(1, AT_LEAST_1)
    """Copies of the sharded model (HSDP); 1: sharded over all ranks."""
    reduce: Literal["step", "micro_step"] = "step"
    """When gradients are summed over ranks: once a step, for which each rank holds all of them in
    float32 between micro-steps; or after each micro-step, for models too large for that."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: none, all but matrix products, all."""
    compile: bool = False
    """torch.compile each transformer block; beside checkpointing only with an attention
    that a graph can hold: not SDPA document by document, not flash-attn 4."""


@dataclass(frozen=True)
class EvalConfig(Section, name="eval"):
    """Held-out log-probs during training, and greedy accuracy."""

    path: str | list[str] | None = None
    """Held-out traces, in the format of the training data."""
    every: int = ranged(100, AT_LEAST_1)
    """Steps between evaluations; the first is before step 1, the last after the last step."""
    checker: Literal["none", "math", "exact"] = "none"
    """math, exact: greedy completions of the held-out problems are checked against their column
    answer, as in `redi evaluate`."""
    answer_pattern: str | None = None
    """For exact: a regular expression whose one group holds the answer."""
    max_new_tokens: int = ranged(1024, AT_LEAST_1)
    """Tokens of a checked completion at most; the model's positions may end it earlier."""
    batch_size: int = ranged(64, AT_LEAST_1)
    """Checked completions that a rank runs side by side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checker != "none" and not self.path:
            raise ValueError(
                f'eval.checker = "{self.checker}" needs eval.path, the problems to check'
            )
        if self.answer_pattern is not None and self.checker != "exact":
            raise ValueError('eval.answer_pattern needs eval.checker = "exact"')
        if self.answer_pattern is not None:
            try:
                answer_pattern(self.answer_pattern)
            except ValueError as error:
                raise ValueError(f"eval.answer_pattern: {error}") from None

    @property
    def paths(self) -> tuple[str, ...]:
        """The held-out inputs as a tuple, empty when there are none."""
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


@dataclass(frozen=True)
class GuardConfig(Section, name="guard"):
    """What stops a run that has gone wrong; docs/training.md says how it is told."""

    max_skips: int = ranged(3, AT_LEAST_1)
    """Steps in a row whose loss or gradient is not finite: each is left out, the last ends the
    run."""
    collapse: Literal["stop", "warn", "off"] = "stop"
    """What happens when the log-prob of correct traces plunges while updates surge; stop: a
    warning first, the end when it goes on."""


@dataclass(frozen=True)
class RunConfig(Section, name="run"):
    """Where the run lives."""

    dir: str | None = None
    """Run folder; left out: runs/<name of the recipe>."""
    save_every: int = ranged(100, AT_LEAST_1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = ranged(2, NOT_NEGATIVE)
    """Newest checkpoints kept; 0: all. Up to two older ones stay while the collapse guard may yet
    have to name one."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Where metrics go beside metrics.jsonl."""
    resume: bool = True
    """Go on from the newest complete checkpoint of the run folder."""


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "objective": ObjectiveConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "shard": ShardConfig,
    "eval": EvalConfig,
    "guard": GuardConfig,
    "run": RunConfig,
}
KEYS = tuple(f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section))
TABLES = tuple(
    f"{name}.{f.name}"
    for name, section in SECTIONS.items()
    for f in fields(section)
    if str(f.type).startswith("dict[str, float]")
)
"""Keys whose value is a table of numbers by name."""


def check_replicas(section: ShardConfig, world_size: int) -> None:
    """InputError unless the copies of the model divide the ranks evenly."""
    if world_size % section.replicate:
        raise InputError(
            f"shard.replicate = {section.replicate} does not divide the {world_size} ranks of "
            "this run"
        )
