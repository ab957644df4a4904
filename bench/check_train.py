"""Does `redi train` run on this device, with which kernels? `python -m redi.bench.check_train`.

A small random Qwen2 and traces of ragged lengths are made on the spot and trained by the real
command, with `[run] profile` on two steps. The trace is counted: packed attention ran once per
layer and micro-step and no other attention did; the loss ran once per micro-step. A second run with
SDPA and the reference loss must have the same losses. The record is written anew after each run.

Without a package that training needs (`datasets`, `jsonargparse`) the check is skipped, with one
line and a record that names it, and the exit status is 0. It is 1 if something is wrong.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from redi.bench.report import LiveRecord
from redi.engine.model.checkpointing import ATTENTION_OPS
from redi.engine.quickstart.task import write_model

NEEDED = ("datasets", "dill", "docstring_parser", "jsonargparse", "multiprocess")
STEPS, PROFILED, PAIRS = 6, (2, 4), 8
# Of losses and log-probs between the two runs, by device: bfloat16 and float32.
RELATIVE_DIFFERENCE = {"cuda": 2e-2, "cpu": 1e-4}


def write_world(folder: Path, sizes: argparse.Namespace) -> None:
    """Write traces.jsonl and model/."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    write_model(folder / "model", seed=0)  # for its tokenizer and chat template
    config = Qwen2Config.from_pretrained(folder / "model")
    config.update(
        {
            "vocab_size": sizes.vocab,
            "hidden_size": sizes.hidden,
            "intermediate_size": 3 * sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.hidden // sizes.head_dim,
            "num_key_value_heads": max(1, sizes.hidden // sizes.head_dim // 2),
            "layer_types": ["full_attention"] * sizes.layers,
            "max_position_embeddings": 2 * sizes.longest,
        }
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    rng = random.Random(0)

    def text(most: int) -> str:
        return "".join(rng.choice("0123456789*") for _ in range(rng.randint(most // 10, most)))

    with (folder / "traces.jsonl").open("w", encoding="utf-8") as file:
        for number in range(4 * PAIRS):
            traces = [
                {"teacher": "random", "text": text(sizes.longest), "correct": correct}
                for correct in (True, False)
            ]
            row = {"id": str(number), "prompt": text(20) + "=", "answer": "", "traces": traces}
            file.write(json.dumps(row) + "\n")


def train(folder: Path, name: str, sizes: argparse.Namespace, **changes: str) -> Path:
    """Run `redi train`; returns its directory.

    Args:
        folder: see `write_world`.
        name: of the run.
        changes: to the recipe, with __ for the dot.

    Raises:
        RuntimeError: it failed; with the end of its stderr.
    """
    values = {
        "model.path": str(folder / "model"),
        "data.path": str(folder / "traces.jsonl"),
        "data.cache": str(folder / "cache"),
        "data.pairing": "first",
        "data.max_tokens": 2 * sizes.longest,
        "objective.name": "redi",
        "optim.lr": 1e-3,
        "train.batch": PAIRS,
        "train.max_steps": STEPS,
        "train.epochs": STEPS,
        "train.row_tokens": sizes.row_tokens,
        "run.dir": str(folder / name),
        "run.profile": ":".join(map(str, PROFILED)),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    # Keys with dots and JSON's strings and numbers are TOML.
    recipe = folder / f"{name}.toml"
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in values.items()]
    recipe.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "redi.engine.cli", "train", str(recipe)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sizes.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"redi train exits with {done.returncode}: {done.stderr[-1500:]}")
    return folder / name


def step_lines(run_dir: Path) -> list[dict[str, Any]]:
    """A run's metrics, a line for each step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "loss" in line]


def what_was_profiled(run_dir: Path) -> dict[str, dict[str, int]]:
    """How often each op and each GPU kernel is in the trace of the profiled steps."""
    (trace,) = (run_dir / "profile").glob("*.trace.json.gz")
    with gzip.open(trace, "rt") as file:
        events = [one for one in json.load(file)["traceEvents"] if one.get("ph") == "X"]
    counts = {
        "ops": Counter(one["name"] for one in events if one.get("cat") == "cpu_op"),
        "kernels": Counter(one["name"] for one in events if one.get("cat") == "kernel"),
    }
    return {kind: dict(found.most_common()) for kind, found in counts.items()}


def problems_of(run_dir: Path, sizes: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What a run ran, and what is wrong with it."""
    (ran,) = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["ran"]
    profiled = what_was_profiled(run_dir)
    first, end = PROFILED
    micro_steps = sum(line["micro_steps"] for line in step_lines(run_dir)[first - 1 : end - 1])
    attention = {op: n for op, n in profiled["ops"].items() if op in ATTENTION_OPS}
    dense = profiled["ops"].get("aten::scaled_dot_product_attention", 0)
    losses = profiled["ops"].get("redi::signed_cross_entropy", 0)
    layers = sizes.layers
    documents = 2 * PAIRS * (end - first)
    expected = layers * (documents if ran["attention"] == "sdpa" else micro_steps)
    problems = []

    def check(what: str, found: object, wanted: object) -> None:
        if found != wanted:
            problems.append(f"{what}: {found}, expected {wanted}")

    check("layers with packed attention", ran["attention_calls"], layers)
    check("calls of attention in the trace", sum(attention.values()), expected)
    check("of these one document each", dense, expected if ran["attention"] == "sdpa" else 0)
    check("calls of the loss in the trace", losses, micro_steps)
    if "triton" in ran["loss"]["signed_cross_entropy"]:
        rows = sum(n for name, n in profiled["kernels"].items() if "softmax_kernel" in name)
        check("row kernels of the loss, at least one each", rows >= micro_steps, True)
    kernels = dict(list(profiled["kernels"].items())[:60])
    found = {"ran": ran, "micro_steps": micro_steps, "attention": attention, "kernels": kernels}
    return found, problems


def compare(one: list[dict[str, Any]], other: list[dict[str, Any]], bound: float) -> list[str]:
    """Figures of the steps that differ by more than `bound`, relative."""
    if len(one) != STEPS or len(other) != STEPS:
        return [f"{len(one)} and {len(other)} steps, expected {STEPS}"]
    return [
        f"step {number} {key}: {a[key]} and {b[key]}"
        for number, (a, b) in enumerate(zip(one, other, strict=True), 1)
        for key in ("loss", "positive_logp", "negative_logp")
        if not abs(a[key] - b[key]) <= bound * abs(b[key])
    ]


def main(arguments: list[str] | None = None) -> int:
    """Train twice, print what ran and what is wrong, write."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.check_train", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--longest", type=int, default=1000, help="characters of a trace")
    parser.add_argument("--row_tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    sizes = parser.parse_args(arguments)
    record = LiveRecord("check-train", sizes.device, sizes.out)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        record.set(skipped=f"not installed: {', '.join(missing)}")
        print(f"skipped: not installed: {', '.join(missing)}; see WHEELS in bench/gpu.sh")
        return 0
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, sizes)
        try:
            run = train(folder, "auto", sizes)
            found, problems = problems_of(run, sizes)
            steps = step_lines(run)
            record.set(**found, steps=steps, problems=problems)
            plain = step_lines(
                train(
                    folder, "plain", sizes, model__attention="sdpa", objective__backend="reference"
                )
            )
            problems += compare(steps, plain, RELATIVE_DIFFERENCE[sizes.device])
            record.set(plain_steps=plain, problems=problems)
            print(f"ran: {found['ran']}; profiled: {found['attention']}")
            print(f"losses {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}")
        except RuntimeError as error:
            problems = [*problems, str(error)]
            record.set(problems=problems)
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    print(f"written to {record.path}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
