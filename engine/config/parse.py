"""Reads a recipe: TOML with dotted overrides from the command line.

The entry point is `load_recipe`. Every mistake in a recipe raises one `InputError` that names the
file and the key.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from argparse import SUPPRESS, ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redi.engine.config.distill import is_distilled, not_used, objective_keys, resolve_distill
from redi.engine.config.objectives import DIVERGENCE, OBJECTIVES
from redi.engine.config.options import command_parser, missing_arguments, plain_type
from redi.engine.config.sections import KEYS, SECTIONS, TABLES, ObjectiveConfig, Recipe
from redi.engine.errors import InputError, one_line

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# Keys of TRL, transformers and axolotl whose spelling is far from the key here.
ALIASES = {
    "learning_rate": "optim.lr",
    "batch_size": "train.batch",
    "per_device_train_batch_size": "train.batch",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_length": "data.max_tokens",
    "model_name_or_path": "model.path",
    "output_dir": "run.dir",
    "warmup_ratio": "optim.warmup",
    "lr_scheduler_type": "optim.schedule",
    "gradient_checkpointing": "shard.checkpointing",
    "save_steps": "run.save_every",
    "eval_steps": "eval.every",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "use_dora": "adapter.dora",
    "load_in_4bit": "adapter.base",
}

_DOT = "\x1f"
"""Replaces the dots in a name of a table during parsing: jsonargparse splits at dots."""

TRAIN_EXAMPLES = """\
examples:
  redi train sft.toml redi.toml                      both stages; the second starts from the first
  redi train redi.toml --objective.alpha 0.5 --run.dir runs/alpha-0.5
"""


def build_parser(prog: str, description: str, examples: str = TRAIN_EXAMPLES) -> ArgumentParser:
    """Make the parser of recipes: `recipes...`, and every dotted key as an option."""
    parser = command_parser(
        prog,
        description,
        examples,
        f"{prog} RECIPE.toml [MORE.toml ...] [--section.key value ...]",
        parser_class=_recipe_parser(),
        parser_mode="toml",
        print_config=None,
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE.toml", help="run in this order")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors")
    parser.add_argument("--recipe", action="config", help=SUPPRESS)  # for load_recipe
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    return parser


@cache
def train_parser() -> ArgumentParser:
    """The parser of `redi train`. Making it takes a fifth of a second, so it is made once."""
    return build_parser(
        "redi train", "Train recipes in order. The same command resumes a stopped run."
    )


def _recipe_parser() -> type[ArgumentParser]:
    """A parser that accepts `--data.teacher_weights.NAME` with dots in NAME."""
    from jsonargparse import ArgumentParser, Namespace

    class RecipeParser(ArgumentParser):
        def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Namespace:
            try:
                found = super().parse_args(_whole_names(args), *more, **options)
            except ArgumentError as error:
                if problem := missing_arguments(error, self):
                    raise InputError(problem) from None
                raise
            for key in TABLES:
                found[key] = {name.replace(_DOT, "."): v for name, v in found[key].items()}
            return found

    return RecipeParser


def _whole_names(argv: Sequence[str]) -> list[str]:
    """Protect the dots in NAME of each option `--data.teacher_weights.NAME`.

    Raises:
        InputError: the value of such an option is not a finite number.
    """
    words = list(argv)
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        for key in TABLES:
            if option.startswith(f"--{key}."):
                if not equals:
                    value = words[place + 1] if place + 1 < len(words) else "nothing"
                try:
                    finite = math.isfinite(float(value))
                except ValueError:
                    finite = False
                if not finite:
                    raise InputError(f"{option[2:]}: needs a number, got {value}")
                name = option.removeprefix(f"--{key}.").replace(".", _DOT)
                if not name:
                    raise InputError(f"{option[2:]}: a name is missing after the dot")
                words[place] = f"--{key}.{name}{equals}{value if equals else ''}"
    return words


def load_recipe(parser: ArgumentParser, path: str, argv: Sequence[str]) -> Recipe:
    """Read one recipe file and apply the overrides of the command line.

    Args:
        parser: made by `build_parser`.
        path: the recipe file.
        argv: the whole command line after the command's name, with the overrides.

    Raises:
        InputError: the file is missing or not TOML, a key is unknown, or a value has the wrong
            type or is out of range.
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
    for key in TABLES:
        section, name = key.split(".")
        table = content.get(section, {}).get(name)
        for entry in _dotted(table) if isinstance(table, Mapping) else ():
            if entry not in table:
                raise InputError(f'{path}: {key}: a name with a dot needs quotes: "{entry}"')
    overridden = {a[2:].split("=")[0] for a in argv if a.startswith("--")}
    try:
        values = parser.parse_args(["--recipe", path, *argv])
        sections = {
            name: section(**vars(getattr(values, name))) for name, section in SECTIONS.items()
        }
    except (ArgumentError, ValueError) as error:
        raise InputError(f"{_origin(str(error), path, overridden)}{explain(error)}") from None
    try:
        recipe = resolve_distill(Recipe(**sections), content.get("distill", {}), overridden)
    except InputError as error:
        raise InputError(f"{_origin(str(error), path, overridden)}{error}") from None
    objective = recipe.objective
    for key in unused_keys(recipe):
        if key in content.get("objective", {}) and f"objective.{key}" not in overridden:
            raise InputError(f"{path}: {_not_used(key, objective.name)}")
    # An override applies to all recipes of a command. A recipe that does not use it ignores it.
    return replace(recipe, objective=_without(objective, unused_keys(recipe)))


def check_overrides(recipes: Sequence[Recipe], argv: Sequence[str]) -> None:
    """Raise InputError if none of the recipes uses an override of `[objective]` or `[distill]`."""
    names = " and ".join(dict.fromkeys(recipe.objective.name for recipe in recipes))
    used = {key for recipe in recipes for key in objective_keys(recipe)}
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, given, value = argument.partition("=")
        key = name.rpartition(".")[2]
        if name.startswith("--objective.") and key not in used:
            raise InputError(_not_used(key, names))
        # An empty path, or a weight of 0, turns a teacher off.
        is_off = (value if given else following) in ("", "0", "0.0")
        if name.startswith("--distill.") and not is_off and not any(map(is_distilled, recipes)):
            raise InputError(not_used(key, names))


def unused_keys(recipe: Recipe) -> list[str]:
    """Parameters that differ from their default but that the objective does not read."""
    objective, default = recipe.objective, ObjectiveConfig()
    return [
        f.name
        for f in fields(ObjectiveConfig)
        if f.name not in objective_keys(recipe)
        and getattr(objective, f.name) != getattr(default, f.name)
    ]


def _without(objective: ObjectiveConfig, keys: Sequence[str]) -> ObjectiveConfig:
    return replace(objective, **{key: getattr(ObjectiveConfig(), key) for key in keys})


def _not_used(key: str, name: str) -> str:
    users = ", ".join(user for user, declared in OBJECTIVES.items() if key in declared.keys)
    if key in DIVERGENCE:
        users += ", and with distill.weight"
    return f"objective.{key} is not used by {name} (but by {users}); remove it"


def explain(error: Exception) -> str:
    """One line instead of jsonargparse's message of several."""
    text = str(error)
    if found := re.search(r"unrecognized arguments: --([\w.+-]+)", text):
        return _unknown(found[1])
    if (found := re.search(r'Parser key "(\w+)":', text)) and found[1] in SECTIONS:
        keys = ", ".join(f"{found[1]}.{f.name}" for f in fields(SECTIONS[found[1]]))
        return f"{found[1]} is a section, not a key; it has {keys}"
    if found := re.search(r'Parser key "([\w.]+)":', text):
        value = re.search(r"(?:Given value|Got value): (.*)", text)
        expected = _expected(found[1]) if found[1] in KEYS else "another value"
        got = value[1].strip() if value else "another type"
        return f"{found[1]}: needs {expected}, got {got}"
    return " ".join(text.split())


def _expected(key: str) -> str:
    section, name = key.split(".")[:2]
    return plain_type(next(f.type for f in fields(SECTIONS[section]) if f.name == name))


def _origin(text: str, path: str, overridden: set[str]) -> str:
    """The file as a prefix, or nothing if the command line set the wrong key."""
    return "" if any(key in text for key in overridden) else f"{path}: "


def _unknown(key: str) -> str:
    key = one_line(key)
    section, _, name = key.rpartition(".")
    if alias := ALIASES.get(name or key):
        return f"unknown key {key}; did you mean {alias}?"
    near = [known for known in KEYS if known.rpartition(".")[2] == name]
    near += difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
    if near:
        return f"unknown key {key}; did you mean {near[0]}?"
    if key in SECTIONS:
        first = fields(SECTIONS[key])[0].name
        return f"{key} is a section, not a value: [{key}] with keys such as {first}"
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
    """The resolved recipe as TOML, without the keys that have no value."""
    import tomli_w

    content = {
        name: {key: value for key, value in section.items() if value is not None}
        for name, section in asdict(recipe).items()
    }
    return tomli_w.dumps(content)
