"""The options of `redi prepare openr1`."""

from __future__ import annotations

from collections.abc import Sequence

from redi.engine.config.options import command_parser, parse_options
from redi.engine.data.openr1 import PrepareOptions

EXAMPLES = """\
examples:
  redi prepare openr1 open-r1/OpenR1-Math-Raw --out data --tokenizer Qwen/Qwen2.5-Math-1.5B
  redi prepare openr1 raw/ --out data --tokenizer runs/sft/export --finished true --take all
  redi prepare openr1 raw.parquet --out data --max_prompt_tokens 0 --max_trace_tokens 0

writes OUT/sft.jsonl, OUT/pref.jsonl and OUT/report.json. With the defaults they are the paper's
D_SFT and D_Pref (arXiv 2505.24850, appendix on data), in its order.
"""


def parse_prepare(argv: Sequence[str]) -> PrepareOptions:
    """The options of a command line, after `redi prepare openr1`.

    Raises InputError or ArgumentError: an unknown or missing option, or a wrong value.
    """
    parser = command_parser(
        "redi prepare openr1",
        "Select D_SFT and D_Pref from OpenR1-Math-Raw by the paper's rules.",
        EXAMPLES,
        "redi prepare openr1 DATA [DATA ...] --out FOLDER [options]",
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help="files, folders or hub names")
    parser.add_argument("--exclude_sources", nargs="*", default=["cn_k12"], help="left out")
    parser.add_class_arguments(PrepareOptions, skip={"data", "exclude_sources"})
    return parse_options(parser, argv, PrepareOptions)
