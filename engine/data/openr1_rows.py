"""Reads the rows of OpenR1-Math-Raw, with the paper's filter."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from redi.engine.data.row import Row, is_blank, read_text, row_error


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of an OpenR1-Math-Raw row, with the verdicts of the two verifiers."""

    text: str
    llama: bool
    math_verify: bool


def read_openr1(
    row: Row, dropped: Counter[str], excluded_sources: Collection[str] = ("cn_k12",)
) -> list[Generation]:
    """The generations of an OpenR1-Math-Raw row that the paper's filter keeps.

    The rules (arXiv 2505.24850, appendix on data): the problem is valid, its source is not cn_k12,
    and each verifier has a verdict on each generation. What they leave out, and empty generations,
    are counted in `dropped` by reason.

    Raises:
        InputError: a column has a wrong type. Names row and column.
    """
    valid, source = row.value["problem_is_valid"], row.value["source"]
    for column, value in (("problem_is_valid", valid), ("source", source)):
        if value is not None and not isinstance(value, str):
            raise row_error(row, column, f"must be text, not {type(value).__name__}")
    texts, correctness = row.value["generations"], row.value["correctness"]
    if not isinstance(texts, list):
        raise row_error(row, "generations", "must be a list of texts")
    if not isinstance(correctness, dict):
        raise row_error(row, "correctness", "must be an object with the two verifiers' lists")
    verdicts = [
        correctness.get(key) or [] for key in ("llama_verification", "math_verify_reparsed_answer")
    ]
    if not all(isinstance(verdict, list) for verdict in verdicts):
        raise row_error(row, "correctness", "must have a list for each verifier")
    if (valid or "").lower() != "yes":
        dropped["problem not valid"] += 1
        return []
    if source in excluded_sources:
        dropped[f"source {source}"] += 1
        return []
    if any(len(verdict) != len(texts) for verdict in verdicts):
        dropped["lists of different length"] += 1
        return []
    generations = []
    for index, (text, llama, math_verify) in enumerate(zip(texts, *verdicts, strict=True)):
        if text is None or (isinstance(text, str) and is_blank(text)):
            dropped["empty generation"] += 1
            continue
        text = read_text(row, f"generations[{index}]", text)
        generations.append(Generation(text, llama is True, math_verify is True))
    return generations
