"""`redi evaluate` with vLLM on a card."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from redi.engine.cli import main
from redi.engine.quickstart.task import write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm"),
]


def test_greedy_samples_are_mostly_those_of_transformers_and_resume(tmp_path: Path) -> None:
    # vLLM's attention kernels need heads of 64.
    write_model(tmp_path / "model", seed=0, hidden_size=256)
    data = tmp_path / "test.jsonl"
    rows = [{"prompt": f"{number}=", "answer": "1"} for number in range(100, 200)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluate(engine: str, *more: str) -> list[dict[str, Any]]:
        out = tmp_path / engine
        argv = ["evaluate", str(tmp_path / "model"), "--data", str(data), "--out", str(out)]
        assert main([*argv, "--engine", engine, "--max_new_tokens", "8", *more]) == 0
        return [json.loads(line) for line in (out / "samples.jsonl").open()]

    greedy = ("--temperature", "0")
    found, here = evaluate("vllm", *greedy), evaluate("transformers", *greedy)
    texts = [[each["traces"][0]["text"] for each in samples] for samples in (found, here)]
    same = sum(one == other for one, other in zip(*texts, strict=True))
    assert len(found) == 100
    assert same > 80  # bfloat16 rounds differently in other kernels
    samples = tmp_path / "vllm" / "samples.jsonl"
    lines = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(b"".join(lines[10:60]))
    assert [each["id"] for each in evaluate("vllm", *greedy)] == [each["id"] for each in found]
