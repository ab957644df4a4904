"""The recipe: one frozen dataclass a section, read from TOML and dotted overrides.

`load_recipe` is the only way in. Every mistake a user can make in a recipe ends as one
`InputError` that names the file and the key.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from argparse import SUPPRESS, ArgumentError, HelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from redi.engine.checkers import ExactChecker
from redi.engine.errors import InputError
from redi.engine.train.objectives import OBJECTIVES

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Model:
    """Which model is trained."""

    path: str | None = None
    """Folder (or hub name) of a transformers causal LM in safetensors; left out: the export of
    the recipe before this one."""
    tokenizer: str | None = None
    """Folder (or hub name) of the tokenizer; left out: `path`."""
    rope_theta: float | None = None
    """Base of the rotary position embedding, in place of the model's own."""
    max_position_embeddings: int | None = None
    """Longest context, in place of the model's own; the export keeps both."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """flash-attn (3, 4 or 2, what suits the card), torch's varlen attention, or SDPA document by
    document; auto: the first of them that the machine has."""
    liger: Literal["auto", "off"] = "auto"
    """liger-kernel's RMSNorm, RoPE and SwiGLU; auto: on CUDA when installed."""

    def __post_init__(self) -> None:
        for key in ("rope_theta", "max_position_embeddings"):
            value = getattr(self, key)
            _require(value is None or value > 0, f"model.{key} must be > 0, got {value}")


@dataclass(frozen=True)
class Data:
    """Which traces it is trained on, and how they become tokens."""

    path: str | list[str] = ""
    """JSONL, JSON, Parquet or CSV files (gzip too), folders of them (sub-folders too), or hub
    names."""
    mixing_weights: list[float] = field(default_factory=list)
    """One number a path: how often an epoch draws each of its pairs (SFT: sequences). 2: twice;
    0.5: another half each epoch; none given: once."""
    format: Literal["auto", "preference", "prompt-completion", "messages", "traces", "openr1"] = (
        "auto"
    )
    """The shape of a row; auto: told from the columns of each row."""
    teachers: list[str] = field(default_factory=list)
    """Only these teachers' traces are trained on (column teacher); none named: all."""
    teacher_weights: dict[str, float] = field(default_factory=dict)
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
    max_tokens: int = 19800
    """Longest sequence (prompt and completion), in tokens."""
    max_prompt_tokens: int | None = None
    """Longest prompt; left out: as long as the sequence allows."""
    max_completion_tokens: int | None = None
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
    processes: int = 0
    """Processes that tokenize; 0: one per core, 8 at most."""
    workers: int = 0
    """Processes that load ahead during training; 0: none."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 2, f"data.max_tokens must be >= 2, got {self.max_tokens}")
        for key in ("max_prompt_tokens", "max_completion_tokens"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"data.{key} must be >= 1, got {value}")
        _require(self.processes >= 0, f"data.processes must be >= 0, got {self.processes}")
        _require(self.workers >= 0, f"data.workers must be >= 0, got {self.workers}")
        _require(
            len(self.mixing_weights) in (0, len(self.paths)),
            f"data.mixing_weights must have one number a path, got {len(self.mixing_weights)} for "
            f"{len(self.paths)}",
        )
        for weight in self.mixing_weights:
            _require(
                math.isfinite(weight) and weight > 0,
                f"data.mixing_weights must be finite and > 0, got {weight}",
            )
        for teacher, weight in self.teacher_weights.items():
            _require(
                math.isfinite(weight) and weight > 0,
                f"data.teacher_weights: {teacher} must be finite and > 0, got {weight}",
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
class Objective:
    """What is minimised; docs/objectives.md has the formulas."""

    name: str = "sft"
    """sft: -log p of correct traces. redi: the same plus alpha * log p of incorrect ones. signed:
    every trace by itself with its row's weight. dft, unlikelihood, simper, simpo, dpo: as their
    papers have them."""
    alpha: float = 0.8
    """Weight of the incorrect traces (arXiv 2505.24850); 0: positives alone."""
    positive_weight: float = 1.0
    """Weight of the correct traces (signed)."""
    negative_gamma: float = 0.0
    """Multiplies a negative's term by exp(negative_gamma * mean log-prob) (redi); 0: not."""
    beta: float | None = None
    """Scale of the margin of log-probs (dpo, simpo: they need it)."""
    margin: float = 1.0
    """How far the positive's scaled log-prob is to be ahead: the SimPO paper's gamma (simpo)."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round (dpo)."""
    normalisation: Literal["sequence", "token", "none"] = "sequence"
    """Mean over each sequence first; one mean over all tokens of the step (sft, dft, signed); or
    a mean over sequences of sums (signed)."""
    length: Literal["trained", "original"] = "trained"
    """What |y| counts: the tokens that are trained, or those before truncation (the authors' code:
    a truncated trace weighs less)."""
    filter_epsilon: float = 0.0
    """Makes the gradient approximate (sft, redi; bfloat16): tiles of the vocabulary that hold at
    most this share of each of their tokens' probability are left out; 0: exact."""
    backend: Literal["auto", "reference", "torch", "triton", "triton-exp"] = "auto"
    """Implementation of the loss op; docs/kernels.md has them all."""

    def __post_init__(self) -> None:
        known = ", ".join(OBJECTIVES)
        _require(
            self.name in OBJECTIVES, f"objective.name: {self.name} is unknown; there are {known}"
        )
        declared = OBJECTIVES[self.name]
        for key in ("alpha", "positive_weight", "negative_gamma"):
            value = getattr(self, key)
            _require(
                math.isfinite(value) and value >= 0,
                f"objective.{key} must be finite and >= 0, got {value}",
            )
        _require(math.isfinite(self.margin), f"objective.margin must be finite, got {self.margin}")
        _require(
            0 <= self.label_smoothing < 0.5,
            f"objective.label_smoothing must lie in [0, 0.5), got {self.label_smoothing}",
        )
        _require(
            self.beta is None or (math.isfinite(self.beta) and self.beta > 0),
            f"objective.beta must be finite and > 0, got {self.beta}",
        )
        _require(
            self.beta is not None or "beta" not in declared.keys,
            f"objective.beta is missing: {self.name} needs it (DPO: 0.1 or less; SimPO: 2 to 10)",
        )
        _require(
            0 <= self.filter_epsilon <= 1,
            f"objective.filter_epsilon must lie in [0, 1], got {self.filter_epsilon}",
        )
        if self.filter_epsilon:
            for key, values in FILTERED.items():
                value = getattr(self, key)
                _require(
                    value in values,
                    f"objective.filter_epsilon needs objective.{key} = "
                    f"{' or '.join(map(repr, values))}, got {value!r}",
                )
        allowed = declared.normalisations
        _require(
            self.normalisation in allowed,
            f"objective.normalisation must be {' or '.join(allowed)} for {self.name}, "
            f"got {self.normalisation}",
        )
        _require(
            self.length == "trained" or self.normalisation == "sequence",
            f'objective.length = "{self.length}" has no meaning with objective.normalisation = '
            f'"{self.normalisation}", which divides by no |y|: leave one of them out',
        )


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule."""

    lr: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 1e-4
    """Decoupled weight decay; norms and biases are left out."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up; linear and cosine end at 0."""
    warmup: float = 0.1
    """Share of the steps over which the rate rises from 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this l2 norm; 0: not clipped."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.lr) and self.lr >= 0, f"optim.lr must be >= 0, got {self.lr}")
        _require(
            self.weight_decay >= 0, f"optim.weight_decay must be >= 0, got {self.weight_decay}"
        )
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas must lie in [0, 1), got {list(self.betas)}",
        )
        _require(self.eps > 0, f"optim.eps must be > 0, got {self.eps}")
        _require(0 <= self.warmup <= 1, f"optim.warmup must lie in [0, 1], got {self.warmup}")
        _require(
            math.isfinite(self.max_grad_norm) and self.max_grad_norm >= 0,
            f"optim.max_grad_norm must be >= 0, got {self.max_grad_norm}",
        )


@dataclass(frozen=True)
class Train:
    """Steps and their size."""

    batch: int = 32
    """Pairs of an optimizer step over all ranks; sequences in SFT."""
    epochs: int | None = None
    """Passes over the data; training ends at the earlier of epochs and max_steps (neither: 1)."""
    max_steps: int | None = None
    """Optimizer steps at most."""
    row_tokens: int = 32768
    """Tokens of a packed row: what one rank runs in one micro-step."""
    seed: int = 42
    """Draws the batches."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype over fp32 masters, and dtype of the export; auto: bfloat16 on CUDA."""
    deterministic: bool = False
    """Bitwise repeatable on CUDA, at some cost in speed (a CPU is always so)."""

    def __post_init__(self) -> None:
        _require(self.batch >= 1, f"train.batch must be >= 1, got {self.batch}")
        for name in ("epochs", "max_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name} must be >= 1, got {value}")
        _require(self.row_tokens >= 2, f"train.row_tokens must be >= 2, got {self.row_tokens}")
        _require(self.seed >= 0, f"train.seed must be >= 0, got {self.seed}")


@dataclass(frozen=True)
class Shard:
    """How the model lies on the devices."""

    replicate: int = 1
    """Copies of the sharded model (HSDP); 1: sharded over all ranks."""
    reduce: Literal["step", "micro_step"] = "step"
    """When gradients are summed over ranks: once a step, for which each rank holds all of them in
    float32 between micro-steps; or after each micro-step, for models too large for that."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: none, all but matrix products, all."""
    compile: bool = False
    """torch.compile each transformer block; beside checkpointing only with an attention
    that a graph can hold: not SDPA document by document, not flash-attn 4."""

    def __post_init__(self) -> None:
        _require(self.replicate >= 1, f"shard.replicate must be >= 1, got {self.replicate}")


@dataclass(frozen=True)
class Eval:
    """Held-out log-probs during training, and greedy accuracy."""

    path: str | list[str] | None = None
    """Held-out traces, in the format of the training data."""
    every: int = 100
    """Steps between evaluations; the first is before step 1, the last after the last step."""
    checker: Literal["none", "math", "exact"] = "none"
    """math, exact: greedy completions of the held-out problems are checked against their column
    answer, as in `redi evaluate`."""
    answer_pattern: str | None = None
    """For exact: a regular expression whose one group holds the answer."""
    max_new_tokens: int = 1024
    """Tokens of a checked completion at most; the model's positions may end it earlier."""
    batch_size: int = 64
    """Checked completions that a rank runs side by side."""

    def __post_init__(self) -> None:
        for name in ("every", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            _require(value >= 1, f"eval.{name} must be >= 1, got {value}")
        _require(
            self.checker == "none" or bool(self.path),
            f'eval.checker = "{self.checker}" needs eval.path, the problems to check',
        )
        _require(
            self.answer_pattern is None or self.checker == "exact",
            'eval.answer_pattern needs eval.checker = "exact"',
        )
        try:
            ExactChecker(self.answer_pattern)
        except ValueError as error:
            raise ValueError(f"eval.answer_pattern: {error}") from None

    @property
    def paths(self) -> tuple[str, ...]:
        """The held-out inputs as a tuple, empty when there are none."""
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


@dataclass(frozen=True)
class Guard:
    """What stops a run that has gone wrong; docs/training.md says how it is told."""

    max_skips: int = 3
    """Steps in a row whose loss or gradient is not finite: each is left out, the last ends the
    run."""
    collapse: Literal["stop", "warn", "off"] = "stop"
    """What happens when the log-prob of correct traces plunges while updates surge; stop: a
    warning first, the end when it goes on."""

    def __post_init__(self) -> None:
        _require(self.max_skips >= 1, f"guard.max_skips must be >= 1, got {self.max_skips}")


@dataclass(frozen=True)
class Run:
    """Where the run lives."""

    dir: str | None = None
    """Run folder; left out: runs/<name of the recipe>."""
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept; 0: all. Up to two older ones stay while the collapse guard may yet
    have to name one."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Where metrics go beside metrics.jsonl."""
    resume: bool = True
    """Go on from the newest complete checkpoint of the run folder."""

    def __post_init__(self) -> None:
        _require(self.save_every >= 1, f"run.save_every must be >= 1, got {self.save_every}")
        _require(self.keep >= 0, f"run.keep must be >= 0, got {self.keep}")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    shard: Shard = field(default_factory=Shard)
    eval: Eval = field(default_factory=Eval)
    guard: Guard = field(default_factory=Guard)
    run: Run = field(default_factory=Run)


SECTIONS: dict[str, type] = {
    "model": Model,
    "data": Data,
    "objective": Objective,
    "optim": Optim,
    "train": Train,
    "shard": Shard,
    "eval": Eval,
    "guard": Guard,
    "run": Run,
}
KEYS = tuple(f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section))

# What the help calls the arguments that argparse names by their variables.
ARGUMENTS = {
    "recipes": "RECIPE.toml",
    "runs": "RUN",
    "model": "MODEL",
    "data": "--data FILE",
    "out": "--out",
}

# What people coming from other trainers type.
ALIASES = {
    "learning_rate": "optim.lr",
    "batch_size": "train.batch",
    "per_device_train_batch_size": "train.batch",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "dataset_mixer": "data.mixing_weights",
    "interleave_probs": "data.mixing_weights",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "data.max_completion_tokens",
    "model_name_or_path": "model.path",
    "output_dir": "run.dir",
    "warmup_ratio": "optim.warmup",
    "lr_scheduler_type": "optim.schedule",
    "gradient_checkpointing": "shard.checkpointing",
    "save_steps": "run.save_every",
    "eval_steps": "eval.every",
    "chat_template": "data.template",
    "loss_type": "objective.name",
    "adam_epsilon": "optim.eps",
}

# What a resumed run may change: nothing here alters the mathematics.
FREE_ON_RESUME = (
    "guard.max_skips",
    "guard.collapse",
    "run.dir",
    "run.save_every",
    "run.keep",
    "run.trackers",
    "run.resume",
    "shard.replicate",
    "shard.reduce",
    "shard.checkpointing",
    "shard.compile",
    "train.row_tokens",
    "data.cache",
    "data.processes",
    "data.workers",
)


TRAIN_EXAMPLES = """\
examples:
  redi train sft.toml redi.toml                      both stages; the second starts from the first
  redi train redi.toml --objective.alpha 0.5 --run.dir runs/alpha-0.5
"""


def help_formatter() -> type[HelpFormatter]:
    """Help that shows defaults and leaves the examples on lines of their own."""
    from jsonargparse import DefaultHelpFormatter

    return type("Formatter", (RawDescriptionHelpFormatter, DefaultHelpFormatter), {})


def build_parser(prog: str, description: str, examples: str = TRAIN_EXAMPLES) -> ArgumentParser:
    """The parser of one recipe: `recipes...` and every dotted key as an option."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} RECIPE.toml [MORE.toml ...] [--section.key value ...]",
        description=description,
        parser_mode="toml",
        print_config=None,
        formatter_class=help_formatter(),
        epilog=examples,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE.toml", help="run in this order")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors")
    parser.add_argument("--recipe", action="config", help=SUPPRESS)  # how load_recipe gives one
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    return parser


def load_recipe(parser: ArgumentParser, path: str, argv: Sequence[str]) -> Recipe:
    """Read one recipe file and lay the overrides of the command line over it.

    Args:
        parser: made by `build_parser`.
        path: the recipe.
        argv: the whole command line after the command's name, overrides included.

    Raises:
        InputError: the file is missing or no TOML, a key is unknown, a value has the wrong type
            or lies outside its range.
    """
    if not Path(path).is_file():
        kind = "a folder, not a recipe file" if Path(path).is_dir() else "no such recipe file"
        raise InputError(f"{path}: {kind}")
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise InputError(f"{path}: begins with a byte order mark; save it as UTF-8 without one")
        content = tomllib.loads(text)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not valid UTF-8; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    for key in _dotted(content):
        if key not in KEYS:
            raise InputError(f"{path}: {_unknown(key)}")
    overridden = {a[2:].split("=")[0] for a in argv if a.startswith("--")}
    try:
        values = parser.parse_args(["--recipe", path, *argv])
        sections = {
            name: section(**vars(getattr(values, name))) for name, section in SECTIONS.items()
        }
    except (ArgumentError, ValueError) as error:
        raise InputError(f"{_origin(str(error), path, overridden)}{explain(error)}") from None
    recipe = Recipe(**sections)
    objective = recipe.objective
    for key in unused_keys(objective):
        if key in content.get("objective", {}) and f"objective.{key}" not in overridden:
            raise InputError(f"{path}: {_not_used(key, objective.name)}")
    # An override applies to all recipes of a command; one that it means nothing to is as without.
    return replace(recipe, objective=_without(objective, unused_keys(objective)))


def check_overrides(recipes: Sequence[Recipe], argv: Sequence[str]) -> None:
    """InputError for an override of `[objective]` that none of the recipes uses."""
    overridden = {a[2:].split("=")[0] for a in argv if a.startswith("--objective.")}
    names = list(dict.fromkeys(recipe.objective.name for recipe in recipes))
    used = {key for name in names for key in OBJECTIVES[name].keys}
    for key in sorted(name.removeprefix("objective.") for name in overridden):
        if key not in used:
            raise InputError(_not_used(key, " and ".join(names)))


def unused_keys(objective: Objective) -> list[str]:
    """Parameters that have another than their default value, and that the objective never reads."""
    default = Objective()
    return [
        f.name
        for f in fields(Objective)
        if f.name not in OBJECTIVES[objective.name].keys
        and getattr(objective, f.name) != getattr(default, f.name)
    ]


def _without(objective: Objective, keys: Sequence[str]) -> Objective:
    return replace(objective, **{key: getattr(Objective(), key) for key in keys})


def _not_used(key: str, name: str) -> str:
    users = ", ".join(user for user, declared in OBJECTIVES.items() if key in declared.keys)
    return f"objective.{key} has no meaning for {name} (but for {users}): leave it out"


def explain(error: Exception) -> str:
    """One clear line for what jsonargparse says in several."""
    text = str(error)
    if found := re.search(r"unrecognized arguments: --([\w.-]+)", text):
        return _unknown(found[1])
    if found := re.search(r"arguments are required: (.+)", text):
        missing = " and ".join(ARGUMENTS.get(name, name) for name in found[1].split(", "))
        return f"missing: {missing}; --help shows the whole line"
    if (found := re.search(r'Parser key "(\w+)":', text)) and found[1] in SECTIONS:
        keys = ", ".join(f"{found[1]}.{f.name}" for f in fields(SECTIONS[found[1]]))
        return f"{found[1]} is a section, not a key; it has {keys}"
    if found := re.search(r'Parser key "([\w.]+)":', text):
        value = re.search(r"(?:Given value|Got value): (.*)", text)
        expected = _expected(found[1]) if found[1] in KEYS else "another value"
        got = value[1].strip() if value else "another type"
        return f"{found[1]}: needs {expected}, got {got}"
    return " ".join(text.split())


def unknown_option(error: str, options: Iterable[str], command: str) -> str | None:
    """One clear line for an option that a command does not have; None for another error.

    Args:
        error: jsonargparse's message.
        options: the command's, without their dashes.
        command: the command line's beginning, "redi evaluate".
    """
    found = re.search(r"nrecognized arguments: (-*)([^\s=]+)", error)
    if not found:
        return None
    dashes, name = found.groups()
    near = difflib.get_close_matches(name, options, n=1) if dashes == "--" else []
    hint = f"did you mean --{near[0]}?" if near else f"`{command} --help` lists all"
    return f"unknown {'option' if dashes else 'argument'} {dashes}{name}; {hint}"


def _expected(key: str) -> str:
    section, name = key.split(".")[:2]
    return plain_type(next(f.type for f in fields(SECTIONS[section]) if f.name == name))


def plain_type(annotation: object) -> str:
    """What a type annotation asks for, in a user's words."""
    text = str(annotation).replace("Literal", "one of ").replace("| None", "")
    text = re.sub(r"list\[one of (\[[^]]*\])\]", r"a list of \1", text)
    text = text.replace("tuple[float, float]", "two numbers such as [0.9,0.999]")
    text = text.replace("list[float]", "a list of numbers")
    for python, plain in (("str", "text"), ("int", "a whole number"), ("float", "a number")):
        text = re.sub(rf"\b{python}\b", plain, text)
    return re.sub(r"\s+", " ", text.replace("bool", "true or false")).strip()


def _origin(text: str, path: str, overridden: set[str]) -> str:
    """The file, unless the command line set the key that is wrong."""
    return "" if any(key in text for key in overridden) else f"{path}: "


def _unknown(key: str) -> str:
    section, _, name = key.rpartition(".")
    if alias := ALIASES.get(name or key):
        return f"unknown key {key}; did you mean {alias}?"
    near = [known for known in KEYS if known.rpartition(".")[2] == name]
    near += difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
    if near:
        return f"unknown key {key}; did you mean {near[0]}?"
    if section in SECTIONS:
        names = ", ".join(f.name for f in fields(SECTIONS[section]))
        return f"unknown key {key}; [{section}] has {names}"
    return f"unknown key {key}; the sections are {', '.join(SECTIONS)}"


def _dotted(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in KEYS:
            yield from _dotted(value, f"{prefix}{key}.")
            if not value and f"{prefix}{key}" not in SECTIONS:
                yield f"{prefix}{key}"
        else:
            yield f"{prefix}{key}"


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as TOML (keys without a value are left out)."""
    import tomli_w

    content = {
        name: {key: value for key, value in section.items() if value is not None}
        for name, section in asdict(recipe).items()
    }
    return tomli_w.dumps(content)


def check_replicas(section: Shard, world_size: int) -> None:
    """InputError unless the copies of the model divide the ranks evenly."""
    if world_size % section.replicate:
        raise InputError(
            f"shard.replicate = {section.replicate} does not divide the {world_size} ranks of "
            "this run"
        )


def changed_keys(old: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Keys that differ from a resolved recipe read back from a run folder and may not.

    A key that the old recipe does not have (it is younger) had its default value.
    """
    before, now = asdict(Recipe()), asdict(recipe)
    for section, values in old.items():
        before[section] |= values
    return [
        f"{section}.{name}"
        for section, values in now.items()
        for name, value in values.items()
        if f"{section}.{name}" not in FREE_ON_RESUME
        and _as_list(before[section][name]) != _as_list(value)
    ]


def _as_list(value: Any) -> Any:
    # TOML gives back a tuple as a list.
    return list(value) if isinstance(value, tuple) else value
