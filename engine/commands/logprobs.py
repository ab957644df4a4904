"""`redi logprobs`: score each trace under a model and write a table, for selecting traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers.utils import logging as transformers_logging

from redi.engine.commands.score_table import ScoreTable
from redi.engine.config.sections import AdapterConfig, Recipe
from redi.engine.console import Console
from redi.engine.data.fingerprints import model_fingerprint
from redi.engine.data.schedule import closed_by
from redi.engine.data.summary import unread_warnings
from redi.engine.data.text import load_tokenizer
from redi.engine.distributed import World
from redi.engine.errors import InputError, RunError
from redi.engine.model.adapter import model_and_adapter, tokenizer_of
from redi.engine.model.build import build_student, model_config
from redi.engine.model.flops import training_cost
from redi.engine.model.sharding import compute_dtype
from redi.engine.train.prepare_data import check_positions, tokenized
from redi.engine.train.run_folder import model_path, report_what_ran
from redi.engine.train.score_traces import model_key, score_traces


def write_logprobs(
    recipe: Recipe,
    out: Path,
    world: World,
    console: Console,
    per_token: bool = False,
    top: int = 0,
) -> None:
    """Score every trace of `[data]` under `[model]` and write one Parquet row for each.

    Columns: row ("file.jsonl:12"), trace (index in the data), hash (`trace_hash`), correct,
    teacher, prompt_tokens, completion_tokens (with its end), tokens (scored tokens: those of the
    completion, without its end if data.eos leaves it out, and without what spans mask), logp_sum,
    logp_mean and entropy_mean (nats per token, unweighted; float64). With `per_token` also lists
    with an entry for each scored token: token_ids (int32), token_logps and token_entropies (nats,
    float32), token_starts and token_ends (int32; see `Encoder.offsets`; null for texts without a
    prompt and for tool calls). With `top` these columns too, and top_ids (int32) and top_logps
    (float16), whose entry for each scored token is the list of the K most likely tokens there and
    of their log-probs, most likely first. Memory holds a block of traces.

    Args:
        recipe: `[model]`, `[data]`, `train.row_tokens` and `train.dtype` are used. If `model.path`
            is a run directory, its export is scored.
        out: Parquet file; it is replaced atomically.
        world: this process.
        console: output of warnings and progress.
        per_token: whether the table has the scores of each token.
        top: K; 0: without the most likely tokens.

    Raises:
        InputError: the model or data are invalid, a trace is longer than a pack or than the
            model's context, or `out` cannot be written.
        RunError: the disk is full.
    """
    given = model_path(recipe.model.path or "", "MODEL")
    base, adapter = model_and_adapter(given, "MODEL", recipe.data.cache_dir)
    model = replace(recipe.model, path=base, tokenizer=tokenizer_of(base, adapter))
    recipe = replace(recipe, model=model, adapter=AdapterConfig(path=adapter))
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
    vocabulary = config.get_text_config().vocab_size
    if top > vocabulary:
        raise InputError(f"--top {top}: the model has only {vocabulary} tokens")
    per_token = per_token or top > 0
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
    with ExitStack() as stack:
        table = None
        if world.is_main:
            stack.enter_context(_output(partial, out))
            table = stack.enter_context(
                ScoreTable(partial, recipe, tokens, lengths, per_token, top > 0)
            )
        scores = score_traces(
            student,
            tokens,
            np.arange(len(tokens)),
            lengths,
            model=model_key(student, recipe, fingerprint, dtype),
            row_tokens=recipe.train.resolved_row_tokens,
            cost=training_cost(config),
            world=world,
            console=console,
            each_block=table.add if table else None,
            per_token=per_token,
            top=top,
        )
    for path in scores.token_files:  # the table has their content
        path.unlink(missing_ok=True)
    if student.ran is not None:  # None if every score was cached
        report_what_ran(student.ran, None, world, console)


@contextmanager
def _output(partial: Path, out: Path) -> Iterator[None]:
    """Replace `out` by `partial` if the block ends without an error."""
    try:
        yield
        partial.replace(out)
    except OSError as error:
        raise RunError(f"--out: {out} cannot be written: {error}; the scores are cached") from None
    finally:
        partial.unlink(missing_ok=True)
