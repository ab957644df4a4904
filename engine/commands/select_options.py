"""Options of `redi select`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from redi.engine.config.options import command_parser, parse_options
from redi.engine.config.ranges import AT_LEAST_1, check_ranges, ranged
from redi.engine.data.where import Where
from redi.engine.data.write_rows import check_target
from redi.engine.errors import InputError

EXAMPLES = """\
examples:
  redi select traces.jsonl --out chosen.jsonl --where "source == 'math' and teacher != 'qwq'"
  redi select traces.jsonl --out chosen.jsonl --scores scores.parquet --by logp_mean --top 2
  redi select samples.jsonl --out chosen.jsonl --pass_rate 0.1:0.9 --diverse --max_per_problem 4
  redi select teacher.jsonl --out hard.parquet --samples student.jsonl --pass_rate 0:0.5

Rules are applied in the order of the options above. The table shows what each one dropped.
"""


@dataclass(frozen=True)
class SelectOptions:
    """Settings of a selection; the rules are in the order in which they are applied."""

    data: list[str]
    """Traces of any row shape but text: files, directories or hub names."""
    out: str
    """File to write, .jsonl or .parquet: rows of the shape traces, one per problem."""
    scores: str | None = None
    """Scores of the traces, as `redi logprobs` writes them; joined by the column hash."""
    samples: list[str] = field(default_factory=list)
    """Traces from which pass rates are counted, such as `redi evaluate --traces` writes; joined by
    prompt. If omitted: DATA."""
    where: str | None = None
    """Keep traces for which an expression is true. Names are columns of the row and of the scores,
    teacher, correct, pass_rate, tokens, prompt_tokens and completion_tokens."""
    pass_rate: str | None = None
    """Keep problems whose share of correct samples is in this range, LOW:HIGH, with both ends."""
    top: int | None = ranged(None, AT_LEAST_1)
    """Keep so many traces of each problem and verdict, the first by --by."""
    by: str | None = None
    """The name, as in --where, of the number that orders the traces of a problem. Largest first."""
    smallest: bool = False
    """Order by --by smallest first."""
    max_per_problem: int | None = ranged(None, AT_LEAST_1)
    """Keep so many traces of each problem and verdict, after --top; with --diverse other ones."""
    diverse: bool = False
    """Choose those of --max_per_problem that differ most."""
    quiet: bool = False
    """Print no table."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_target(self.out, "out")
        if self.where is not None:
            try:
                needs_tokens = Where(self.where).needs_tokens
            except ValueError as error:
                raise InputError(f"where: {error}") from None
            if needs_tokens and self.scores is None:
                raise InputError("where: tokens are counted by `redi logprobs`; add --scores")
        if self.diverse and self.max_per_problem is None:
            raise InputError("diverse needs --max_per_problem, the number of traces to keep")
        if self.top is not None and self.by is None:
            raise InputError("top needs --by, such as --by logp_mean")
        if self.by is None and self.smallest:
            raise InputError("smallest needs --by, such as --by logp_mean")
        if self.by is not None and self.top is None and self.max_per_problem is None:
            raise InputError("by needs --top or --max_per_problem, the number of traces to keep")
        if self.samples and self.pass_rate is None and not self.reads("pass_rate"):
            raise InputError("samples is used by --pass_rate, and by pass_rate in --where; add one")
        _ = self.pass_rates

    @property
    def pass_rates(self) -> tuple[float, float] | None:
        """The range of --pass_rate."""
        if self.pass_rate is None:
            return None
        try:
            low, high = map(float, self.pass_rate.split(":"))
        except ValueError:
            low = high = -1.0
        if not 0 <= low <= high <= 1:
            raise InputError(
                f"pass_rate must be LOW:HIGH with 0 <= LOW <= HIGH <= 1, such as 0.1:0.9; got "
                f"{self.pass_rate}"
            )
        return low, high

    def reads(self, name: str) -> bool:
        """Whether --where or --by reads this name."""
        return name == self.by or (self.where is not None and name in Where(self.where).columns)


def parse_select(argv: Sequence[str]) -> SelectOptions:
    """Parse the arguments that follow `redi select`.

    Raises:
        InputError, ArgumentError: an option is unknown, missing or has an invalid value.
    """
    parser = command_parser(
        "redi select",
        "Select traces to train on by scores, pass rates, columns and diversity.",
        EXAMPLES,
        "redi select DATA [DATA ...] --out FILE [options]",
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help="files, directories or hub names")
    parser.add_argument("--out", metavar="FILE", required=True, help="file to write")
    parser.add_argument(
        "--samples",
        nargs="+",
        default=[],
        metavar="FILE",
        help="traces from which pass rates are counted; if omitted: DATA",
    )
    parser.add_argument("--smallest", action="store_true", help="order by --by smallest first")
    parser.add_argument(
        "--diverse",
        action="store_true",
        help="choose those of --max_per_problem that differ most: each next trace is the one least "
        "similar to those already chosen, by edit distance",
    )
    parser.add_argument("--quiet", action="store_true", help="print no table")
    own = {"data", "out", "samples", "smallest", "diverse", "quiet"}
    parser.add_class_arguments(SelectOptions, skip=own)
    return parse_options(parser, argv, SelectOptions)
