"""The options of `redi prepare openr1`."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from redi.engine.config import help_formatter
from redi.engine.errors import InputError
from redi.engine.evaluate_options import explain_options

EXAMPLES = """\
examples:
  redi prepare openr1 open-r1/OpenR1-Math-Raw --out data --tokenizer Qwen/Qwen2.5-Math-1.5B
  redi prepare openr1 raw/ --out data --tokenizer runs/sft/export --finished true --take all
  redi prepare openr1 raw.parquet --out data --max_prompt_tokens 0 --max_trace_tokens 0

writes OUT/sft.jsonl, OUT/pref.jsonl and OUT/report.json. With the defaults they are the paper's
D_SFT and D_Pref (arXiv 2505.24850, appendix on data), in its order.
"""


@dataclass(frozen=True)
class PrepareOptions:
    """What becomes of the rows of OpenR1-Math-Raw."""

    data: list[str]
    """Files of such rows (JSONL, JSON, Parquet; gzip too), folders of them, or hub names."""
    out: str
    """Folder of the two sets and the report."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer that counts for the two limits."""
    take: Literal["first", "shortest", "longest", "all"] = "first"
    """Which correct and which incorrect generation of a problem; all: every correct one, and every
    correct one with every incorrect one. Lengths are in characters."""
    verifiers: Literal["both", "agree", "either", "llama", "math"] = "both"
    """When a generation is correct: both verifiers say so, else it is incorrect (the paper);
    agree: the same, but generations on which they differ are left out; either; or one alone."""
    max_prompt_tokens: int = 800
    """Pairs whose prompt is longer are left out; 0: no limit."""
    max_trace_tokens: int = 19000
    """Pairs with a longer trace are left out; 0: no limit."""
    exclude_sources: list[str] = field(default_factory=lambda: ["cn_k12"])
    """Values of the column source whose rows are left out."""
    finished: bool = False
    r"""Keep only generations with a </think> and an answer marked behind it (\boxed{} or ####)."""
    open_think: bool = False
    """Put <think> before generations that have its end alone, and both tags around the thought of
    those that begin with a line "think" and go on behind a line "answer" (s1.1)."""
    seed: int = 42
    """Of the shuffle, which is that of `datasets`."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_trace_tokens", "seed"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if self.tokenizer is None and (self.max_prompt_tokens or self.max_trace_tokens):
            raise ValueError(
                "tokenizer is missing: the limits count its tokens (without limits: "
                "--max_prompt_tokens 0 --max_trace_tokens 0)"
            )


def parse_options(argv: Sequence[str]) -> PrepareOptions:
    """The options of a command line, after `redi prepare openr1`.

    Raises InputError or ArgumentError: an unknown or missing option, or a wrong value.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="redi prepare openr1",
        usage="redi prepare openr1 DATA [DATA ...] --out FOLDER [options]",
        description="Select D_SFT and D_Pref from OpenR1-Math-Raw by the paper's rules.",
        epilog=EXAMPLES,
        formatter_class=help_formatter(),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help="files, folders or hub names")
    parser.add_argument("--exclude_sources", nargs="*", default=["cn_k12"], help="left out")
    parser.add_class_arguments(PrepareOptions, skip={"data", "exclude_sources"})
    try:
        return PrepareOptions(**vars(parser.parse_args(list(argv))))
    except ArgumentError as error:
        if problem := explain_options(str(error), PrepareOptions, "redi prepare openr1"):
            raise InputError(problem) from None
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
