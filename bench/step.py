"""One REDI training step, ours against the two usual ways, at a size for a CPU or one card.

`python -m redi.bench.step` times forward, backward, clipping and AdamW over the same pairs on the
same model, each way in a process of its own so that its peak memory is its own:

- packed: ours: all traces of the step in packed rows, fused loss, FSDP2;
- pairs: one pair a micro-step, unpadded, whole logits (as the authors of the paper ran it);
- padded: all pairs in one padded batch, whole logits (as preference trainers run it).

The three losses are compared, so that a fast wrong step cannot pass.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ("packed", "pairs", "padded")


def main() -> None:
    """Run each way in a process of its own, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m redi.bench.step", description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--median-tokens", type=int, default=192, help="of a positive trace")
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=5, help="timed, after one that is not")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    results = {}
    for way in WAYS:
        line = [sys.executable, "-m", "redi.bench.step", *sys.argv[1:], "--way", way]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        results[way] = json.loads(done.stdout.splitlines()[-1])
    ours = results["packed"]
    print(f"{'way':8} {'s/step':>8} {'x ours':>7} {'tokens/s':>9} {'peak GiB':>9}  loss")
    for way, r in results.items():
        assert abs(r["loss"] - ours["loss"]) < 1e-4, f"{way} computes another loss"
        ratio = r["seconds"] / ours["seconds"]
        print(
            f"{way:8} {r['seconds']:8.3f} {ratio:7.2f} {r['tokens'] / r['seconds']:9.0f} "
            f"{r['peak_gib']:9.2f}  {r['loss']:.6f}"
        )
    if args.out:
        from redi.bench.report import write_json  # noqa: F401

        write_json(args.out, vars(args), results)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time one way; returns medians, spread, peak memory and the first loss."""
    import torch

    step, tokens = _ways()[args.way](args)
    first_loss = step()
    seconds = []
    for _ in range(args.steps):
        began = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "tokens": tokens,
        "peak_gib": peak,
        "loss": first_loss,
    }


def _ways() -> dict[str, Callable[[argparse.Namespace], tuple[Callable[[], float], int]]]:
    return {"packed": _packed, "pairs": _pairs, "padded": _padded}


def _model(args: argparse.Namespace, attention: str) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=65536,
    )
    return Qwen2ForCausalLM._from_config(config, attn_implementation=attention)


def _traces(args: argparse.Namespace) -> tuple[list[Any], list[int], list[int]]:
    """Ids, signs and prompt lengths: positives lognormal, negatives 1.7 times as long."""
    import numpy as np

    rng = np.random.default_rng(0)
    traces, signs, prompts = [], [], []
    for _ in range(args.pairs):
        for sign, median in ((1, args.median_tokens), (-1, 1.7 * args.median_tokens)):
            length = int(np.clip(rng.lognormal(np.log(median), 0.7), 16, 8 * args.median_tokens))
            traces.append(rng.integers(0, args.vocabulary, length).astype(np.int32))
            signs.append(sign)
            prompts.append(min(64, length // 2))
    return traces, signs, prompts


def _packed(args: argparse.Namespace) -> tuple[Callable[[], float], int]:
    ...


def _update(model: Any) -> Callable[[], None]:
    """Clip and step, the same for every way."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def _logps(logits: Any, ids: Any, prompt: int) -> Any:
    """Mean log-prob of a completion from its whole logits [L, V]."""
    logp = logits[prompt - 1 : len(ids) - 1].float().log_softmax(-1)
    return logp.gather(1, ids[prompt:, None]).mean()


def _pairs(args: argparse.Namespace) -> tuple[Callable[[], float], int]:
    import torch

    traces, signs, prompts = _traces(args)
    ids = [torch.from_numpy(t).long() for t in traces]
    model = _model(args, "sdpa")
    update = _update(model)

    def step() -> float:
        total = 0.0
        for k in range(0, len(ids), 2):
            loss = sum(
                (-signs[i] if signs[i] > 0 else 0.8)
                * _logps(model(ids[i][None], use_cache=False).logits[0], ids[i], prompts[i])
                for i in (k, k + 1)
            ) / args.pairs
            loss.backward()
            total += loss.item()
        update()
        return total

    return step, sum(map(len, ids))
