"""Command-line parsers. Each mistake on a command line becomes a message of one line."""

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
    """Make a command's parser. It raises instead of exiting; its help ends with the examples.

    Args:
        command: the start of the command line, such as "redi evaluate".
        description: the first paragraph of the help.
        examples: indented lines, one per example.
        usage: by default made from the arguments.
        parser_class: by default jsonargparse's parser.
        settings: further arguments of the parser.
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
    """Help that shows defaults and keeps the line breaks of the examples."""
    from jsonargparse import DefaultHelpFormatter

    return type("Formatter", (RawDescriptionHelpFormatter, DefaultHelpFormatter), {})


def parse_arguments(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse a command line.

    Raises:
        InputError: the command does not have an option, or an argument is missing.
        ArgumentError: any other mistake.
    """
    try:
        return parser.parse_args(list(argv))
    except ArgumentError as error:
        options = re.findall(r"--([\w-]+)", parser.format_usage())
        problem = _unknown_option(str(error), options, parser.prog)
        if problem := problem or missing_arguments(error, parser):
            raise InputError(problem) from None
        raise


def parse_options(parser: ArgumentParser, argv: Sequence[str], options: type[Options]) -> Options:
    """Parse a command line into the dataclass whose fields are the parser's arguments.

    Raises:
        InputError, ArgumentError: an option is unknown or missing, or a value has the wrong type
            or is out of range.
    """
    try:
        return options(**parse_values(parser, argv, options))
    except ValueError as error:
        raise InputError(str(error)) from None


def parse_values(parser: ArgumentParser, argv: Sequence[str], options: type[Any]) -> dict[str, Any]:
    """Parse a command line into the values of the fields of `options`; see `parse_options`."""
    try:
        return dict(vars(parser.parse_args(list(argv))))
    except ArgumentError as error:
        problem = _explain(str(error), options, parser.prog)
        if problem := problem or missing_arguments(error, parser):
            raise InputError(problem) from None
        raise


def _explain(error: str, options: Any, command: str) -> str | None:
    """One line instead of jsonargparse's message of several; None if no rule applies."""
    types = {f.name: f.type for f in fields(options)}
    if problem := _unknown_option(error, types, command):
        return problem
    if found := re.search(r'Parser key "(\w+)"', error):
        value = re.search(r"(?:Given value|Got value): (.*)", error)
        got = value[1].strip() if value else "another type"
        return f"{found[1]}: needs {plain_type(types[found[1]])}, got {got}"
    return None


def missing_arguments(error: ArgumentError, parser: ArgumentParser) -> str | None:
    """One line for missing arguments, spelled as in the usage; None for any other error."""
    found = re.search(r"arguments are required: (.+)", str(error))
    if not found:
        return None
    names = {action.dest: action for action in parser._actions}
    spelled = []
    for name in found[1].split(", "):
        shown = str(names[name].metavar or "")
        option = f"--{name}" if names[name].option_strings else ""
        spelled.append(f"{option} {shown}".strip() or name)
    return f"missing: {' and '.join(spelled)}; --help shows the whole line"


def _unknown_option(error: str, options: Iterable[str], command: str) -> str | None:
    """One line for an option that a command does not have; None for any other error.

    Args:
        error: jsonargparse's message.
        options: the command's options, without dashes.
        command: the start of the command line, such as "redi evaluate".
    """
    found = re.search(r"nrecognized arguments: (-*)([^\s=]+)", error)
    if not found:
        return None
    dashes, name = found.groups()
    near = difflib.get_close_matches(name, options, n=1) if dashes == "--" else []
    hint = f"did you mean --{near[0]}?" if near else f"`{command} --help` lists all"
    return f"unknown {'option' if dashes else 'argument'} {dashes}{name}; {hint}"


def plain_type(annotation: object) -> str:
    """A type annotation in plain English."""
    text = str(annotation).replace("Literal", "one of ").replace("| None", "")
    text = re.sub(r"list\[one of (\[[^]]*\])\]", r"a list of \1", text)
    text = text.replace("tuple[float, float]", "two numbers such as [0.9,0.999]")
    text = text.replace("list[float]", "a list of numbers such as [1,2]")
    text = text.replace("list[str]", 'a list of text such as ["a","b"]')
    text = text.replace(
        "dict[str, float]",
        'a table of numbers such as { r1 = 2.0 } (on the command line {"r1": 2.0})',
    )
    text = text.replace(
        "dict[str, bool | int | float | str]",
        'a table such as { enable_thinking = false } (on the command line {"enable_thinking": '
        "false})",
    )
    for python, plain in (("str", "text"), ("int", "a whole number"), ("float", "a number")):
        text = re.sub(rf"\b{python}\b", plain, text)
    text = text.replace("bool", "true or false").replace(" | ", " or ")
    return re.sub(r"\s+", " ", text).strip()
