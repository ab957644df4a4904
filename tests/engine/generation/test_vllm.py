"""The engine vLLM: the arguments that it gets, and requests that finish out of order.

vLLM needs a GPU (tests/gpu/test_vllm.py). Here a package of its name takes its place that runs the
model with transformers and refuses arguments that version 0.30.0 does not have.
"""

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from redi.engine.cli import main

# What engines.py uses, by class. Checked against the source of vLLM if it is installed.
USED = {
    "EngineArgs": [
        *("model", "dtype", "tensor_parallel_size", "max_model_len", "generation_config"),
    ],
    "SamplingParams": [
        *("max_tokens", "temperature", "top_p", "seed", "stop_token_ids", "output_kind"),
    ],
    "RequestOutput": ["request_id", "outputs", "finished"],
    "CompletionOutput": ["text", "token_ids", "finish_reason"],
    "RequestOutputKind": ["FINAL_ONLY"],
    "LLMEngine": ["from_engine_args", "add_request", "step", "has_unfinished_requests"],
}

STAND_IN = f"""
import json, os
from pathlib import Path
from types import SimpleNamespace

USED = {USED!r}


class Strict(SimpleNamespace):
    def __init__(self, **values):
        assert set(values) == set(USED[type(self).__name__]), values
        super().__init__(**values)


class EngineArgs(Strict): pass
class SamplingParams(Strict): pass


class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert args.generation_config == "vllm"
        engine = cls()
        engine.model = AutoModelForCausalLM.from_pretrained(args.model)
        engine.tokenizer = AutoTokenizer.from_pretrained(args.model)
        engine.open, engine.most_open, engine.args = [], 0, args
        return engine

    def add_request(self, request_id, prompt, params):
        self.open.append((request_id, prompt["prompt_token_ids"], params))
        self.most_open = max(self.most_open, len(self.open))

    def has_unfinished_requests(self):
        return bool(self.open)

    def step(self):
        from redi.engine.generation.generate import Request, Sampling, generate_batches

        name, prompt, params = self.open.pop()  # the last one first
        sampling = Sampling(params.max_tokens, params.temperature, params.top_p, params.seed)
        [[made]] = generate_batches(
            self.model, self.tokenizer, [Request(tuple(prompt), 0)], sampling, 1
        )
        if not self.open:
            seen = dict(
                gpus=os.environ["CUDA_VISIBLE_DEVICES"],
                most_open=self.most_open,
                tensor_parallel=self.args.tensor_parallel_size,
                dtype=self.args.dtype,
                context=self.args.max_model_len,
            )
            with Path(__file__).with_name("seen").open("a") as file:
                file.write(json.dumps(seen) + "\\n")
        one = SimpleNamespace(
            text=made.text,
            token_ids=[0] * made.tokens,
            finish_reason="stop" if made.ended else "length",
        )
        return [SimpleNamespace(request_id=name, outputs=[one], finished=True)]
"""


def names_of(path: Path, name: str) -> set[str]:
    """Names that a class has: fields, methods, and arguments of its __init__."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for part in node.body:
                targets = [part.target] if isinstance(part, ast.AnnAssign) else []
                targets += part.targets if isinstance(part, ast.Assign) else []
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
                if isinstance(part, ast.FunctionDef):
                    found.add(part.name)
                    if part.name == "__init__":
                        found |= {argument.arg for argument in part.args.args}
    return found


def test_vllm_has_what_is_used() -> None:
    spec = find_spec("vllm")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("vllm is not installed")
    [root] = map(Path, spec.submodule_search_locations)
    files = {
        "EngineArgs": "engine/arg_utils.py",
        "SamplingParams": "sampling_params.py",
        "RequestOutputKind": "sampling_params.py",
        "RequestOutput": "outputs.py",
        "CompletionOutput": "outputs.py",
        "LLMEngine": "v1/engine/llm_engine.py",
    }
    for name, used in USED.items():
        assert set(used) <= names_of(root / files[name], name), name


@pytest.mark.slow
def test_vllm_gets_all_requests_of_a_worker_at_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "path" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    kinds = "class RequestOutputKind:\n    FINAL_ONLY = 2\n"
    (package / "sampling_params.py").write_text(kinds)
    data = tmp_path / "test.jsonl"
    rows = [{"prompt": f"{number}=", "answer": "1"} for number in range(100, 111)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def argv(out: str, *more: str) -> list[str]:
        options = ["--samples", "1", "--temperature", "0", "--max_new_tokens", "5"]
        where = ["--data", str(data), "--out", str(tmp_path / out)]
        return ["evaluate", str(world / "model"), *where, *options, *more]

    def samples(out: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / out / "samples.jsonl").open()]

    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert main(argv("vllm", "--engine", "vllm", "--gpus", "4", "--tensor_parallel", "2")) == 0
    engines = [json.loads(line) for line in (package / "seen").open()]
    assert sorted(one["gpus"] for one in engines) == ["3,5", "6,7"]
    assert sorted(one["most_open"] for one in engines) == [5, 6]
    # A prompt of four characters, and five new tokens.
    others = {(one["tensor_parallel"], one["dtype"], one["context"]) for one in engines}
    assert others == {(2, "float32", 9)}
    assert main(argv("here", "--engine", "transformers")) == 0
    assert samples("vllm") == samples("here")
