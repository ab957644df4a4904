"""`redi logprobs`: score each trace under a model and write a table, for selecting traces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging as transformers_logging

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.content_hash import trace_hash
from redi.engine.data.fingerprints import model_fingerprint
from redi.engine.data.rows import read_rows
from redi.engine.data.schedule import closed_by
from redi.engine.data.summary import unread_warnings
from redi.engine.data.text import load_tokenizer
from redi.engine.data.traces import Trace, normalise
from redi.engine.distributed import World
from redi.engine.errors import InputError, RunError
from redi.engine.model.build import build_student, model_config
from redi.engine.model.flops import training_cost
from redi.engine.model.sharding import compute_dtype
from redi.engine.train.prepare_data import check_positions, tokenized
from redi.engine.train.run_folder import model_path, report_what_ran
from redi.engine.train.score_traces import model_key, score_traces


def write_logprobs(recipe: Recipe, out: Path, world: World, console: Console) -> None:
    """Score every trace of `[data]` under `[model]` and write one Parquet row for each.

    Columns: row ("file.jsonl:12"), trace (index in the data), hash (`trace_hash`), correct,
    teacher, prompt_tokens, completion_tokens (with its end), tokens (scored tokens: those of the
    completion, without its end if data.eos leaves it out, and without what spans mask), logp_sum,
    logp_mean and entropy_mean (nats per token, unweighted; float64).

    Args:
        recipe: `[model]`, `[data]`, `train.row_tokens` and `train.dtype` are used. If `model.path`
            is a run directory, its export is scored.
        out: Parquet file; it is replaced atomically.
        world: this process.
        console: output of warnings and progress.

    Raises:
        InputError: the model or data are invalid, a trace is longer than a pack or than the
            model's context, or `out` cannot be written.
        RunError: the disk is full.
    """
    model = replace(recipe.model, path=model_path(recipe.model.path or "", "MODEL"))
    recipe = replace(recipe, model=model)
    if not out.parent.is_dir():
        raise InputError(f"--out: {out.parent} is not a directory")
    if out.is_dir():
        raise InputError(f"--out: {out} is a directory; name a file in it")
    if out.suffix != ".parquet":
        raise InputError(f"--out: {out} is not a .parquet file; name it {out.stem}.parquet")
    partial = out.with_name(f"{out.name}.partial")
    if world.is_main:
        try:
            partial.touch()  # fails now, not after hours
            partial.unlink()
        except OSError as error:
            raise InputError(f"--out: {out} cannot be written: {error.strerror}") from None
    transformers_logging.disable_progress_bar()
    config = model_config(recipe)
    tokens = tokenized(recipe, recipe.data.paths, world, console)
    for line in unread_warnings(tokens.unread):
        console.warn(line)
    lengths = tokens.lengths
    if recipe.data.eos == "left_out":  # the run did not train the end, so it is not scored
        end = load_tokenizer(recipe.model.tokenizer or recipe.model.path or "").eos_token_id
        lengths = lengths - closed_by(tokens, end)
    longest = int(np.argmax(lengths))
    if lengths[longest] > recipe.train.resolved_row_tokens:
        raise InputError(
            f"{tokens.where(longest)}: {lengths[longest]} tokens are more than --row_tokens = "
            f"{recipe.train.resolved_row_tokens}; raise it"
        )
    check_positions(
        tokens,
        lengths,
        np.arange(len(tokens)),
        config,
        "remove them, or raise max_position_embeddings in the model's config.json",
    )
    fingerprint = None
    if world.is_main:
        fingerprint = model_fingerprint(recipe.model.path or "", recipe.data.cache_dir)
    world.after_rank0()  # which may have hashed 100 GB
    dtype = compute_dtype(recipe.train.dtype, world.device)
    student, _ = build_student(recipe, config, dtype, world, console)
    scores = score_traces(
        student,
        tokens,
        np.arange(len(tokens)),
        lengths,
        model=model_key(student, recipe.model.path or "", fingerprint, dtype),
        row_tokens=recipe.train.resolved_row_tokens,
        cost=training_cost(config),
        world=world,
        console=console,
    )
    if student.ran is not None:  # None if every score was cached
        report_what_ran(student.ran, None, world, console)
    if not world.is_main:
        return
    scored = tokens.num_targets(np.arange(len(tokens)), lengths)
    with np.errstate(invalid="ignore"):  # NaN where every token is masked
        means, entropies = scores.logps / scored, scores.entropies / scored
    table = pa.table(
        {
            "row": [tokens.where(index) for index in range(len(tokens))],
            "trace": np.arange(len(tokens)),
            "hash": [trace_hash(trace) for trace in _traces(recipe, tokens)],
            "correct": tokens.signs > 0,
            "teacher": pa.array(map(tokens.teacher, range(len(tokens))), pa.string()),
            "prompt_tokens": tokens.prompt_lengths,
            "completion_tokens": tokens.lengths - tokens.prompt_lengths,
            "tokens": scored,
            "logp_sum": scores.logps,
            "logp_mean": means,
            "entropy_mean": entropies,
        }
    )
    try:
        pq.write_table(table, partial)
        partial.replace(out)
    except OSError as error:
        raise RunError(f"--out: {out} cannot be written: {error}; the scores are cached") from None


def _traces(recipe: Recipe, tokens: TokenizedTraces) -> Iterator[Trace]:
    """The trace of each index of the tokens, read again; that of a text for each of its pieces.

    Raises:
        RunError: the data have changed since they were tokenized.
    """
    index = 0
    for row in read_rows(recipe.data.paths, recipe.data.format):
        for trace in normalise(row, row.format, train_on=recipe.data.train_on):
            start = index
            while index < len(tokens) and tokens.where(index) == trace.where:
                index += 1
                yield trace
                if not trace.document:
                    break
            if index == start:
                raise RunError(
                    f"{trace.where}: the data have changed during the command; repeat it"
                )
