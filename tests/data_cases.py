"""Small data sets and tokenizers that the data tests share."""

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from redi.engine.data.cache import SCHEMA, Meta, TokenizedTraces, open_cache, write_cache
from redi.engine.data.packing import PackedBatch
from redi.engine.data.tokens import TokenSettings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shared_data() -> Path:
    """The folder of real traces, or a skip with the reason."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("REDI_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real traces in {folder}; REDI_SHARED_DATA names their folder")
    return folder


def save_tokenizer(
    folder: Path,
    *,
    template: str | None = CHATML,
    eos: str = "<|end|>",
    document: str | None = None,
) -> str:
    """Trains and saves a byte-level tokenizer that can spell any text.

    Args:
        document: what it puts around any text, "<|bos|> $A" for a BOS before it; None: nothing.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[
            "<|im_start|>",
            "<|im_end|>",
            "<|end|>",
            *(["<|bos|>"] if document else []),
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is 2 + 2? It is 4, so the answer is 4."], trainer)
    if document:
        special = [(token, tokenizer.token_to_id(token)) for token in ("<|bos|>", "<|end|>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=document, special_tokens=special
        )
    bos = {"bos_token": "<|bos|>"} if document else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **bos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Writes JSON Lines, gzipped if the name ends in .gz."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def settings(
    path: str | Sequence[str],
    tokenizer: str,
    *,
    format: str = "auto",
    template: str = "chat",
    system_prompt: str | None = None,
    **more: Any,
) -> TokenSettings:
    paths = (path,) if isinstance(path, str) else tuple(path)
    return TokenSettings(paths, format, template, system_prompt, tokenizer, **more)


def make_tokens(
    folder: Path,
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    signs: Sequence[int],
    groups: Sequence[int],
    weights: Sequence[float] | None = None,
    token_weights: Sequence[Sequence[float] | None] | None = None,
) -> TokenizedTraces:
    """A cache of made-up tokens: every token of the set is another number, from 1."""
    n = len(signs)
    lengths = np.array(prompt_lengths) + np.array(completion_lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = [np.arange(start + 1, end + 1) for start, end in pairwise(offsets)]
    columns = {
        "ids": ids,
        "prompt_length": prompt_lengths,
        "sign": signs,
        "weight": [1.0] * n if weights is None else weights,
        "teacher": [None] * n,
        "origin": [None] * n,
        "row": range(1, n + 1),
        "digest": range(n),
        "prompt_digest": range(n),
        "hash": [number.to_bytes(16) for number in range(n)],
        "unknown": [0] * n,
        "control": [0] * n,
        "token_weights": [None] * n if token_weights is None else token_weights,
        "source": [0] * n,
        "group": groups,
    }
    table = pa.table({f.name: pa.array(list(columns[f.name]), f.type) for f in SCHEMA}, SCHEMA)
    # Several batches, so that a trace is looked up across their borders.
    batches = table.to_batches(max_chunksize=7)
    write_cache(
        folder, batches, lambda size, rows: Meta(folder.name, size, rows, ("made.jsonl",), {})
    )
    tokens = open_cache(folder)
    assert tokens is not None
    return tokens


def make_pairs(
    folder: Path, count: int, *, seed: int = 0, weighted: bool = False
) -> TokenizedTraces:
    """`count` problems with a positive and a negative of 3 to 60 tokens each."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat(rng.integers(1, 9, count), 2)
    return make_tokens(
        folder,
        prompts,
        rng.integers(2, 52, 2 * count),
        [1, -1] * count,
        np.repeat(np.arange(count), 2),
        rng.uniform(0.5, 2, 2 * count) if weighted else None,
    )


def packed_row(lengths: Sequence[int], first_id: int, end_id: int) -> PackedBatch:
    """Traces of these lengths, a correct one first, then in turn; a prompt of one token each.

    Token ids are drawn from [first_id, end_id).
    """
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(
        first_id, end_id, (sum(lengths),), generator=torch.Generator().manual_seed(0)
    )
    targets = ids.roll(-1)
    targets[boundaries[1:] - 1] = -100
    num_targets = boundaries.diff() - 1
    signs = torch.tensor([1, -1]).repeat(len(lengths))[: len(lengths)]
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=boundaries.int(),
        targets=targets,
        signs=signs,
        weights=None,
        valid_index=(targets >= 0).nonzero()[:, 0],
        num_positive_targets=int(num_targets[signs > 0].sum()),
        target_counts=(*num_targets[signs > 0].tolist(), *num_targets[signs < 0].tolist()),
        num_targets=num_targets,
        full_targets=num_targets,
        sequence_ids=torch.arange(len(lengths)),
        max_seqlen=max(lengths),
        is_dummy=False,
    )
