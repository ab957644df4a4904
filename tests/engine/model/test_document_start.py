"""The real commands with a tokenizer that begins each document with a token of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from redi.engine.cli import main
from redi.engine.data.cache import open_cache
from redi.engine.evaluate.options import parse_evaluate
from redi.engine.evaluate.task import prepare


@pytest.fixture
def begun(world: Path, tmp_path: Path) -> Path:
    """The small world's model, with a tokenizer that puts a BOS before any text."""
    folder = tmp_path / "begun"
    shutil.copytree(world / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.pad_token
    assert bos is not None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_prepare_trains_the_start_and_evaluate_prompts_with_it(
    begun: Path,
    world: Path,
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes: dict[str, Any] = {
        "model.path": str(begun),
        "data.template": "none",
        "data.cache": str(tmp_path / "cache"),
    }
    assert main(["prepare", str(recipe("run", changes))]) == 0
    tokenizer = AutoTokenizer.from_pretrained(begun)
    shown = capsys.readouterr()
    [told] = [text for text in (shown.out + shown.err).splitlines() if "each document" in text]
    assert told.split()[-1] == tokenizer.pad_token
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    tokens = open_cache(folder)
    assert tokens is not None
    with (world / "traces.jsonl").open() as file:
        row = json.loads(next(file))
    expected = tokenizer(row["prompt"])["input_ids"]
    assert expected[0] == tokenizer.pad_token_id
    assert tokens.ids(0)[: tokens.prompt_lengths[0]].tolist() == expected

    data = tmp_path / "problems.jsonl"
    data.write_text(json.dumps({"prompt": row["prompt"], "answer": "1"}) + "\n")
    line = [str(begun), "--data", str(data), "--template", "none", "--out", str(tmp_path / "out")]
    [request] = prepare(parse_evaluate(line)).requests
    assert list(request.prompt) == expected
    assert main(["evaluate", *line, "--max_new_tokens", "3", "--answer_pattern", "(.)$"]) == 0
    [sample] = map(json.loads, (tmp_path / "out" / "samples.jsonl").read_text().splitlines())
    assert sample["prompt"] == row["prompt"]
