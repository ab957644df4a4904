"""Command-line parsers, and one clear line for each mistake on a command line."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentError, HelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from redi.engine.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

Options = TypeVar("Options")


def command_parser(
    command: str,
    description: str,
    examples: str,
    usage: str | None = None,
    parser_class: type[ArgumentParser] | None = None,
    **settings: Any,
) -> ArgumentParser:
    """A command's parser. It raises instead of exiting, and the examples end its help.

    Args:
        command: "redi evaluate", say.
        examples: an indented line each.
        usage: left out: made from the arguments.
        parser_class: left out: jsonargparse's own.
        settings: for jsonargparse.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return (parser_class or ArgumentParser)(
        prog=command,
        usage=usage,
        description=description,
        epilog=examples,
        formatter_class=_help_formatter(),
        exit_on_error=False,
        allow_abbrev=False,
        **settings,
    )


def _help_formatter() -> type[HelpFormatter]:
    """Help that shows defaults and leaves the examples on lines of their own."""
    from jsonargparse import DefaultHelpFormatter

    return type("Formatter", (RawDescriptionHelpFormatter, DefaultHelpFormatter), {})


def parse_arguments(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse a command line; InputError for an option that its command does not have."""
    try:
        return parser.parse_args(list(argv))
    except ArgumentError as error:
        options = re.findall(r"--([\w-]+)", parser.format_usage())
        if problem := _unknown_option(str(error), options, parser.prog):
            raise InputError(problem) from None
        raise


def parse_options(parser: ArgumentParser, argv: Sequence[str], options: type[Options]) -> Options:
    """Parse a command line into the dataclass whose fields are the parser's arguments.

    Raises:
        InputError, ArgumentError: an unknown or missing option, or a value of a wrong type or out
            of range.
    """
    try:
        return options(**vars(parser.parse_args(list(argv))))
    except ArgumentError as error:
        if problem := _explain(str(error), options, parser.prog):
            raise InputError(problem) from None
        raise
    except ValueError as error:
        raise InputError(str(error)) from None


def _explain(error: str, options: Any, command: str) -> str | None:
    """One clear line for jsonargparse's message of several; None if that is clear."""
    types = {f.name: f.type for f in fields(options)}
    if problem := _unknown_option(error, types, command):
        return problem
    if found := re.search(r'Parser key "(\w+)"', error):
        value = re.search(r"(?:Given value|Got value): (.*)", error)
        got = value[1].strip() if value else "another type"
        return f"{found[1]}: needs {plain_type(types[found[1]])}, got {got}"
    return None


def _unknown_option(error: str, options: Iterable[str], command: str) -> str | None:
    """One clear line for an option that a command does not have; None for another error.

    Args:
        error: jsonargparse's message.
        options: the command's, without their dashes.
        command: the start of the command line, "redi evaluate".
    """
    found = re.search(r"nrecognized arguments: (-*)([^\s=]+)", error)
    if not found:
        return None
    dashes, name = found.groups()
    near = difflib.get_close_matches(name, options, n=1) if dashes == "--" else []
    hint = f"did you mean --{near[0]}?" if near else f"`{command} --help` lists all"
    return f"unknown {'option' if dashes else 'argument'} {dashes}{name}; {hint}"


def plain_type(annotation: object) -> str:
    """A type annotation in a user's words."""
    text = str(annotation).replace("Literal", "one of ").replace("| None", "")
    text = re.sub(r"list\[one of (\[[^]]*\])\]", r"a list of \1", text)
    text = text.replace("tuple[float, float]", "two numbers such as [0.9,0.999]")
    text = text.replace("list[float]", "a list of numbers")
    text = text.replace("dict[str, float]", "a table of numbers such as { r1 = 2.0 }")
    for python, plain in (("str", "text"), ("int", "a whole number"), ("float", "a number")):
        text = re.sub(rf"\b{python}\b", plain, text)
    return re.sub(r"\s+", " ", text.replace("bool", "true or false")).strip()
