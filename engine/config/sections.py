"""The recipe: one frozen dataclass per section; each field declares the range of its number."""

from __future__ import annotations

import math
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
from redi.engine.data.row import MAX_ROW_MB
from redi.engine.data.where import Where
from redi.engine.errors import InputError


class Section:
    """A section of the recipe. Construction checks the ranges of its numbers."""

    section: ClassVar[str]

    def __init_subclass__(cls, name: str) -> None:
        cls.section = name

    def __post_init__(self) -> None:
        check_ranges(self, f"{self.section}.")


@dataclass(frozen=True)
class ModelConfig(Section, name="model"):
    """The model to train."""

    path: str | None = None
    """Folder, hub name or URL (s3://, gs://) of a transformers causal LM in safetensors; default:
    the export of the previous recipe of the command."""
    tokenizer: str | None = None
    """Folder (or hub name) of the tokenizer; default: `path`."""
    rope_theta: float | None = ranged(None, POSITIVE)
    """Base of the rotary position embedding; default: the model's. The export keeps it."""
    max_position_embeddings: int | None = ranged(None, POSITIVE)
    """Longest context, in tokens; default: the model's. The export keeps it."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """flash: flash-attn (version 3, 4 or 2, depending on the GPU); varlen: torch's varlen
    attention; sdpa: SDPA, one document at a time; auto: the first of these that is available."""
    liger: Literal["auto", "off"] = "auto"
    """liger-kernel's RMSNorm, RoPE and SwiGLU; auto: used on CUDA if installed."""


@dataclass(frozen=True)
class DataConfig(Section, name="data"):
    """The traces to train on and their tokenization."""

    path: str | list[str] = ""
    """JSONL, JSON, Parquet or CSV files (optionally gzipped), folders of such files (searched
    recursively), or hub names."""
    mixing_weights: list[float] = field(default_factory=list, metadata=in_range(POSITIVE))
    """One number per path: how often an epoch draws each of its pairs (SFT: sequences). 2: twice;
    0.5: a different half each epoch; default: once."""
    format: Literal[
        "auto",
        "preference",
        "traces",
        "openr1",
        "prompt-completion",
        "messages",
        "sharegpt",
        "alpaca",
        "text",
    ] = "auto"
    """Row format; auto: detected from the columns of each row."""
    where: str | None = None
    """Train only on traces for which this is true, such as "source == 'math' and tokens < 4000": an
    expression of columns of the row, tokens, prompt_tokens, completion_tokens (docs/data.md)."""
    faulty: Literal["error", "skip"] = "error"
    """Rows that cannot be read. error: name the first 20 and stop; skip: leave them out, count them
    and name the first 20."""
    max_row_mb: int = ranged(MAX_ROW_MB, AT_LEAST_1)
    """Longest text of a row, in MB. A longer row is faulty: a small compressed file may unfold to
    gigabytes."""
    train_on: Literal["last", "all"] = "last"
    """Assistant turns of a conversation that are trained. all: each is a trace, whose prompt is the
    conversation before it; of a conversation labelled incorrect only the last."""
    teachers: list[str] = field(default_factory=list)
    """Train only on the traces of these teachers (column teacher); empty: all."""
    teacher_weights: dict[str, float] = field(default_factory=dict, metadata=in_range(POSITIVE))
    """Factor on the weight of a teacher's traces, such as { r1 = 2.0 }; other teachers: 1."""
    template: Literal["chat", "none"] = "chat"
    """chat: the tokenizer's chat template; none: prompt, completion and end token, unchanged."""
    system_prompt: str | None = None
    """System message added to conversations that have none."""
    template_variables: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables of the chat template, such as { enable_thinking = false }."""
    pairing: Literal["zip", "first", "all"] = "zip"
    """How a problem with several traces forms pairs. zip: i-th correct with i-th incorrect; first:
    the first of each, before the limits on length (the paper); all: every correct with every
    incorrect."""
    duplicates: Literal["keep", "drop"] = "keep"
    """drop: use equal traces of a problem with the same verdict once, and equal pairs (SFT: traces)
    of different problems once. Equal means token for token; the first is kept."""
    max_tokens: int = ranged(19800, Range(2))
    """Longest sequence (prompt and completion), in tokens; a text is cut into pieces of it."""
    min_tokens: int = ranged(1, AT_LEAST_1)
    """Shortest sequence, in tokens: shorter ones are left out, and counted."""
    max_prompt_tokens: int | None = ranged(None, AT_LEAST_1)
    """Longest prompt, in tokens; default: limited by max_tokens alone."""
    max_completion_tokens: int | None = ranged(None, AT_LEAST_1)
    """Longest completion with its end, in tokens; default: limited by max_tokens alone."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What happens to a sequence over one of these limits. truncate cuts completions only: a trace
    whose prompt is too long is dropped."""
    control_tokens: Literal["allow", "error"] = "allow"
    """Traces whose text contains a control token of the tokenizer, such as an end of turn. allow:
    count them and warn; error: refuse them."""
    eos: Literal["trained", "left_out"] = "trained"
    """left_out: do not train the end-of-sequence token that closes a trace (the authors' stage 1,
    where it is also the padding token)."""
    cache: str | None = None
    """Folder of the token cache; default: $REDI_CACHE, else ~/.cache/redi."""
    processes: int = ranged(0, NOT_NEGATIVE)
    """Processes for tokenizing; 0: one per core, at most 8."""
    workers: int | None = ranged(None, NOT_NEGATIVE)
    """Processes per rank that pack and load steps ahead during training; 0: each step is packed
    when it is needed. Default: 2 on CUDA, 0 on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mixing_weights) not in (0, len(self.paths)):
            raise ValueError(
                "data.mixing_weights must have one number per path, got "
                f"{len(self.mixing_weights)} for {len(self.paths)}"
            )
        if self.where is not None:
            try:
                Where(self.where)
            except ValueError as error:
                raise ValueError(f"data.where: {error}") from None
        if self.template_variables and self.template == "none":
            raise ValueError('data.template_variables needs data.template = "chat"')

    @property
    def paths(self) -> tuple[str, ...]:
        """The inputs as a tuple; `path` may be one string or a list."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    @property
    def cache_dir(self) -> Path:
        """The folder of the token cache."""
        return Path(self.cache or os.environ.get("REDI_CACHE") or Path.home() / ".cache" / "redi")


ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterConfig(Section, name="adapter"):
    """LoRA by peft: the model is frozen, a small adapter is trained (docs/adapters.md)."""

    rank: int | None = ranged(None, AT_LEAST_1)
    """Rank of a new adapter; default: all weights are trained, without an adapter."""
    alpha: float | None = ranged(None, POSITIVE)
    """The adapter's output is scaled by alpha / rank; default: twice the rank."""
    dropout: float = ranged(0.0, Range(0, 1, open_high=True))
    """Share of the adapter's inputs set to 0 in training."""
    targets: str | list[str] = ALL_LINEAR
    """Names of the linear layers of blocks that are adapted, such as ["q_proj", "v_proj"];
    all-linear: each of them."""
    dora: bool = False
    """Train the magnitudes of the adapted weights separately (DoRA, arXiv 2402.09353)."""
    base: Literal["auto", "nf4"] = "auto"
    """Dtype of the frozen model. nf4: linear layers of blocks have 4 bits a weight (QLoRA; needs
    the extra bitsandbytes); auto: the compute dtype."""
    path: str | None = None
    """Folder or URL of a peft LoRA adapter to continue, in place of a new one; rank, alpha, targets
    and dora are its own. Default: after a recipe with an adapter, and without model.path, its
    export."""
    merge: bool = False
    """Export a whole model with the adapter added to its weights; default: the adapter alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        default = {f.name: f.default for f in fields(self)}
        changed = [name for name, value in default.items() if getattr(self, name) != value]
        if changed and self.rank is None and self.path is None:
            raise ValueError(
                f"adapter.{changed[0]} needs adapter.rank, of a new adapter, or adapter.path"
            )
        if not self.targets or not all(self.targets):
            raise ValueError('adapter.targets is empty; use "all-linear" or names of layers')

    @property
    def wanted(self) -> bool:
        """True if an adapter is trained, not all weights."""
        return self.rank is not None or self.path is not None

    @property
    def names(self) -> list[str] | None:
        """`targets` as a list of names; None: all linear layers."""
        if self.targets == ALL_LINEAR:
            return None
        return [self.targets] if isinstance(self.targets, str) else self.targets


# The values for which filtered_redi_loss is implemented, by key.
FILTERED: dict[str, tuple[object, ...]] = {
    "negative_gamma": (0,),
    "normalisation": ("sequence",),
    "length": ("trained",),
    "backend": ("auto", "torch", "triton-exp"),
}


@dataclass(frozen=True)
class ObjectiveConfig(Section, name="objective"):
    """The loss; docs/objectives.md has the formulas."""

    name: str = "sft"
    """sft: -log p of correct traces. redi: the same plus alpha * log p of incorrect ones. signed:
    each trace separately, with the weight of its row. bounded_redi: redi with a bounded term of
    incorrect traces. sft_simper: sft plus alpha times simper. kd: the divergence from a teacher,
    see [distill]. The others: as in their papers."""
    alpha: float = ranged(0.8, NOT_NEGATIVE)
    """Weight of the incorrect traces (arXiv 2505.24850), or of simper's terms (sft_simper); 0: only
    positives are trained."""
    positive_weight: float = ranged(1.0, NOT_NEGATIVE)
    """Weight of the correct traces (signed)."""
    desirable_weight: float = ranged(1.0, NOT_NEGATIVE)
    """Weight of the correct traces (kto)."""
    undesirable_weight: float = ranged(1.0, NOT_NEGATIVE)
    """Weight of the incorrect traces (kto)."""
    negative_gamma: float = ranged(0.0, NOT_NEGATIVE)
    """Multiplies a negative's term by exp(negative_gamma * mean log-prob) (redi); 0: off."""
    temperature: float = ranged(1.0, POSITIVE)
    """bounded_redi: the term of an incorrect trace is temperature * exp(mean log-prob /
    temperature); the higher, the closer to redi. kd, distill.weight: divides the logits of student
    and teacher in the divergence, which is multiplied by temperature^2; unless it is 1, the
    teacher's probabilities are normalised over its K entries, and tail must be "ignore"."""
    beta: float | None = ranged(None, POSITIVE)
    """Scale of the log-probs or of their margin; required by the objectives that read it (orpo:
    weight of its log odds)."""
    margin: float = ranged(1.0, FINITE)
    """Target margin of the positive's scaled log-prob: gamma of the SimPO paper (simpo)."""
    label_smoothing: float = ranged(0.0, Range(0, 0.5, open_high=True))
    """Assumed share of pairs whose labels are swapped (dpo, robust_dpo)."""
    direction: Literal["forward", "reverse", "jsd"] = "forward"
    """The divergence from a teacher (kd, distill.weight). forward: KL(teacher, student); reverse:
    KL(student, teacher); jsd: Jensen-Shannon, at most log 2."""
    tail: Literal["bucket", "ignore"] = "bucket"
    """All tokens outside of a teacher's K entries. bucket: together one more outcome; ignore: no
    part of the divergence."""
    skew: float = ranged(0.0, Range(0, 1, open_high=True))
    """Compares with a mixture that has this share of the other distribution, which bounds forward
    and reverse by -log(skew) (arXiv 2402.03898); 0: off."""
    ce_weight: float = ranged(0.0, NOT_NEGATIVE)
    """Adds this weight times the cross-entropy of the traces' own tokens (kd)."""
    normalisation: Literal["sequence", "token", "none"] = "sequence"
    """sequence: mean over each sequence first; token: one mean over all tokens of the step (sft,
    dft, signed, kd); none: mean over sequences of sums over tokens (signed, kd)."""
    length: Literal["trained", "original"] = "trained"
    """The length |y|. trained: number of trained tokens; original: tokens before truncation (as in
    the authors' code; a truncated trace weighs less)."""
    filter_epsilon: float = ranged(0.0, SHARE)
    """Skip tiles of the vocabulary that hold at most this share of the probability of each token;
    the gradient becomes approximate (sft, redi; bfloat16). 0: exact."""
    backend: Literal["auto", "reference", "torch", "triton", "triton-exp"] = "auto"
    """Implementation of the loss op; docs/kernels.md lists all."""

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"objective.name: {self.name} is unknown; available: {known}")
        super().__post_init__()
        if self.beta is None and "beta" in self.kind.keys:
            usual = "2 to 10" if self.name == "simpo" else "0.1 or less"
            raise ValueError(
                f"objective.beta is missing: {self.name} needs it; usual are values of {usual}"
            )
        if self.filter_epsilon:
            for key, values in FILTERED.items():
                if (value := getattr(self, key)) not in values:
                    raise ValueError(
                        f"objective.filter_epsilon needs objective.{key} = "
                        f"{' or '.join(map(repr, values))}, got {value!r}"
                    )
        if self.skew and self.direction == "jsd":
            raise ValueError(
                'objective.skew is not used by objective.direction = "jsd", which mixes both '
                "equally; remove it"
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
                f'"{self.normalisation}", which does not divide by |y|; remove one of them'
            )

    @property
    def kind(self) -> ObjectiveKind:
        """The keys that the objective reads and the units that it trains on."""
        return OBJECTIVES[self.name]


@dataclass(frozen=True)
class DistillConfig(Section, name="distill"):
    """A teacher's distributions of the traces' tokens (docs/distillation.md)."""

    path: str | list[str] = ""
    """Tables of `redi logprobs --top`, folders of DistillKit, or traces with such columns: one for
    each teacher; default: columns of data.path."""
    mixing_weights: list[float] = field(default_factory=list, metadata=in_range(POSITIVE))
    """One number per path: the share of that teacher in the mixture; default: equal shares."""
    weight: float = ranged(0.0, NOT_NEGATIVE)
    """Adds weight times the divergence from the teacher to the objective (sft, redi, signed); kd
    needs none. 0: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mixing_weights) not in (0, len(self.paths)):
            raise ValueError(
                "distill.mixing_weights must have one number per path, got "
                f"{len(self.mixing_weights)} for {len(self.paths)}"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """The teachers as a tuple; empty: columns of the data."""
        if not self.path:
            return ()
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


@dataclass(frozen=True)
class TokenFilterConfig(Section, name="token_filter"):
    """Trains only the tokens that a reference predicts better than the student
    (docs/distillation.md)."""

    keep: float | None = ranged(None, Range(0, 1, open_low=True))
    """Share of each trace's tokens that is trained: those with the largest gap between the
    student's and the reference's loss; default: all tokens, without a reference."""
    reference: str | None = None
    """Table of `redi logprobs --tokens` of the reference, for the traces of data.path."""
    student: str | None = None
    """The same table of the student, as it is before training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {"keep": self.keep, "reference": self.reference, "student": self.student}
        missing = [name for name, value in given.items() if value is None]
        if missing and len(missing) < len(given):
            raise ValueError(
                f"token_filter.{missing[0]} is missing: the filter needs all three keys"
            )


@dataclass(frozen=True)
class OptimConfig(Section, name="optim"):
    """The optimizer and its learning rate schedule."""

    name: Literal["adamw", "adamw-8bit", "muon"] = "adamw"
    """adamw-8bit: moments of 8 bits a value (needs the extra torchao). muon: torch's Muon for the
    matrices of blocks, scaled to the size of AdamW's updates, and AdamW for all other weights."""
    lr: float = ranged(1e-5, NOT_NEGATIVE)
    """Peak learning rate."""
    weight_decay: float = ranged(1e-4, NOT_NEGATIVE)
    """Decoupled weight decay; norms and biases are excluded."""
    betas: tuple[float, float] = ranged((0.9, 0.999), Range(0, 1, open_high=True))
    """Decay rates of AdamW's two moments."""
    eps: float = ranged(1e-8, POSITIVE)
    """AdamW's epsilon."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after warm-up; linear and cosine end at 0."""
    warmup: float = ranged(0.1, SHARE)
    """Share of the steps during which the learning rate rises from 0."""
    max_grad_norm: float = ranged(1.0, NOT_NEGATIVE)
    """Clip gradients to this l2 norm; 0: no clipping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"optim.weight_decay * optim.lr must be < 1, got {self.lr * self.weight_decay:g}: "
                "each step would erase the weights"
            )


@dataclass(frozen=True)
class TrainConfig(Section, name="train"):
    """Number and size of the steps."""

    batch: int = ranged(32, AT_LEAST_1)
    """Pairs per optimizer step over all ranks (SFT: sequences)."""
    epochs: int | None = ranged(None, AT_LEAST_1)
    """Passes over the data. Training ends at epochs or max_steps, whichever comes first; without
    either after 1 epoch."""
    max_steps: int | None = ranged(None, AT_LEAST_1)
    """Most optimizer steps."""
    share_prompts: bool = True
    """Compute a prompt once for all traces of it that are in one pack. Not used with shard.context,
    shard.compile, a router loss, or models whose layers need whole documents."""
    row_tokens: int | Literal["auto"] = ranged(32768, Range(2))
    """Most tokens of a pack, the packed row that one rank runs in one micro-step. auto: the length
    for which ranks wait least for each other and that fits the GPU; a run keeps it."""
    seed: int = ranged(42, NOT_NEGATIVE)
    """Seed of the order of the data and of dropout."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of computation (master weights are fp32) and of the export; auto: bfloat16 on CUDA."""
    router_aux_loss: float | None = ranged(None, NOT_NEGATIVE)
    """Coefficient of the load-balancing loss of a mixture's routers, over all tokens of a step;
    default: the model's router_aux_loss_coef if it has output_router_logits = true, else 0."""
    fp8: bool = False
    """Compute the products of the blocks' linear layers in float8 (needs the extra torchao and an
    H100 or a newer GPU; on a CPU they are emulated)."""
    deterministic: bool = False
    """Make runs on CUDA bitwise reproducible, at some cost in speed (runs on a CPU always are)."""

    @property
    def resolved_row_tokens(self) -> int:
        """`row_tokens` after "auto" has been replaced by a number."""
        assert not isinstance(self.row_tokens, str), "train.row_tokens is resolved with the data"
        return self.row_tokens


@dataclass(frozen=True)
class ShardConfig(Section, name="shard"):
    """How the model is distributed over devices."""

    replicate: int = ranged(1, AT_LEAST_1)
    """Copies of the sharded model (HSDP); 1: shard over all ranks."""
    context: int = ranged(1, AT_LEAST_1)
    """Ranks that share each pack (context parallelism): each has 1 / context of its tokens, and in
    attention of the heads. It divides the query heads (docs/long-traces.md)."""
    reduce: Literal["step", "micro_step"] = "step"
    """When gradients are summed over ranks. step: once per step; each rank holds all gradients in
    float32 between micro-steps. micro_step: after each one, for models too large for that."""
    gather: Literal["micro_step", "step"] = "micro_step"
    """When weights are gathered. micro_step: block by block, in each micro-step; all ranks run
    equally many. step: once per step; each rank then holds all weights in the compute dtype, and
    runs as many micro-steps as its traces need, so that ranks wait less."""
    checkpointing: Literal["none", "selective", "attention", "full"] = "none"
    """Activations recomputed in backward: none; selective: all but matrix products and attention;
    attention: all but attention; full: all."""
    compile: bool = False
    """Apply torch.compile to each transformer block. Together with checkpointing this needs an
    attention that works inside a graph: neither SDPA per document nor flash-attn 4."""
    offload: bool = False
    """Keep the inputs of checkpointed blocks in host memory; needs checkpointing = "attention" or
    "full", and no compile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gather == "step" and self.reduce != "step":
            raise ValueError(
                f'shard.gather = "step" needs shard.reduce = "step", got "{self.reduce}": ranks '
                "with different numbers of micro-steps can reduce only once"
            )
        if self.offload and self.checkpointing not in ("attention", "full"):
            raise ValueError(
                f'shard.offload needs shard.checkpointing = "attention" or "full", got '
                f'"{self.checkpointing}"'
            )
        if self.offload and self.compile:
            raise ValueError(
                "shard.offload and shard.compile exclude each other: copies cannot be part of a "
                "block's graph; remove one of them"
            )


@dataclass(frozen=True)
class EvalConfig(Section, name="eval"):
    """Evaluation during training: held-out log-probs and greedy accuracy."""

    path: str | list[str] | None = None
    """Held-out traces, in the same formats as the training data."""
    every: int = ranged(100, AT_LEAST_1)
    """Steps between evaluations. Evaluation also runs before step 1 and after the last step."""
    checker: Literal["none", "math", "exact"] = "none"
    """math, exact: generate greedy completions of the held-out problems and check them against the
    column answer, as in `redi evaluate`."""
    answer_pattern: str | None = None
    """For exact: a regular expression with one group, which holds the answer."""
    max_new_tokens: int = ranged(1024, AT_LEAST_1)
    """Most tokens of a checked completion; the model's context may end it earlier."""
    batch_size: int = ranged(64, AT_LEAST_1)
    """Checked completions that a rank generates at a time."""
    samples: int = ranged(0, NOT_NEGATIVE)
    """Held-out problems with a sampled completion and its verdict at each evaluation, written to
    samples.jsonl and the trackers; 0: none. Needs a checker. Another process generates them on the
    CPU from an export, while training runs; an evaluation is skipped while it is not done."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples and self.checker == "none":
            raise ValueError('eval.samples needs eval.checker = "math" or "exact", for verdicts')
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
        """The held-out inputs as a tuple, empty if there are none."""
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


@dataclass(frozen=True)
class GuardConfig(Section, name="guard"):
    """Checks that stop a failing run; docs/training.md describes how they detect it."""

    max_skips: int = ranged(3, AT_LEAST_1)
    """Consecutive steps with a loss or gradient that is not finite, after which the run stops. Each
    such step is skipped."""
    collapse: Literal["stop", "warn", "off"] = "stop"
    """What happens if the log-prob of correct traces plunges while updates surge. stop: warn first,
    stop the run if it continues."""


@dataclass(frozen=True)
class RunConfig(Section, name="run"):
    """The run folder: checkpoints and metrics."""

    dir: str | None = None
    """Run folder, also on object storage (s3://, gs://); default: runs/<name of the recipe>."""
    save_every: int = ranged(100, AT_LEAST_1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = ranged(2, NOT_NEGATIVE)
    """Number of newest checkpoints to keep; 0: all. Up to two older ones are kept while the
    collapse guard may still refer to one."""
    timeout: int = ranged(300, AT_LEAST_1)
    """Seconds after which a collective fails, once the first step is done: a rank that hangs ends
    the run. Start, evaluation and saves have 30 minutes."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = field(
        default_factory=list
    )
    """Where to write metrics in addition to metrics.jsonl."""
    resume: bool = True
    """Resume from the newest complete checkpoint in the run folder."""
    profile: str | None = None
    """Steps to profile on rank 0, as a Python slice: "10:13" is steps 10, 11 and 12. Writes a trace
    and a table into the run folder, on CUDA a memory snapshot too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.profile_steps

    @property
    def profile_steps(self) -> range | None:
        """The steps of `profile`; None if nothing is profiled.

        Raises:
            ValueError: it is not of the form "first:end" with 0 < first < end.
        """
        if self.profile is None:
            return None
        first, _, end = self.profile.partition(":")
        if first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end):
            return range(int(first), int(end))
        raise ValueError(
            'run.profile must be two steps "first:end" with 0 < first < end, such as "10:13" for '
            f"steps 10 to 12, got {self.profile!r}"
        )


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: every key has its value."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    token_filter: TokenFilterConfig = field(default_factory=TokenFilterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "objective": ObjectiveConfig,
    "distill": DistillConfig,
    "token_filter": TokenFilterConfig,
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
"""Keys whose value is a table of named numbers."""


GROUPS = ("replicate", "context")
"""Keys of `[shard]` that group ranks."""


def check_replicas(section: ShardConfig, world_size: int) -> None:
    """Raise InputError unless `replicate` and `context` divide the number of ranks."""
    groups = {f"shard.{key} = {getattr(section, key)}": getattr(section, key) for key in GROUPS}
    for name, count in groups.items():
        if world_size % count:
            raise InputError(
                f"{name} does not divide the {world_size} ranks of this run; start a multiple of "
                f"{count} with torchrun (redi plan: --ranks)"
            )
    if world_size % math.prod(groups.values()):
        raise InputError(
            f"{' times '.join(groups)} does not divide the {world_size} ranks of this run: the "
            "ranks that share a pack are of one replica"
        )
