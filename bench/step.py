"""Time and memory of one REDI training step: packed, pair by pair, and one padded batch.

`python -m redi.bench.step` times forward, backward, clipping and AdamW over the same pairs on the
same model, at a size for a CPU or one GPU. Each way runs in a separate process, so that its peak
memory is measured separately:

- packed: this engine: the step's traces in packs, fused loss, FSDP2;
- pairs: one pair a micro-step, unpadded, whole logits (as the paper's authors ran it);
- padded: all pairs in one padded batch, whole logits (as preference trainers run it).

All three must compute the same loss. Each also counts its model flops (MFU where the card's peak is
known), and one more step is profiled: forward, backward and update, and where the device's time
goes. The record is written anew after each way. The engine's dependencies are needed.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redi.bench.measure import peak_resident_bytes, seconds_of
from redi.bench.parts import Parts, device_time
from redi.bench.report import LiveRecord
from redi.bench.traces import InMemoryTraces

ALPHA = 0.8
PROMPT_TOKENS = 64


def main() -> None:
    """Measure each way in a separate process, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--median_tokens", type=int, default=192, help="of a positive trace")
    parser.add_argument("--row_tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, help="of the MLP; default 4 hidden")
    parser.add_argument("--heads", type=int, help="default hidden / 64")
    parser.add_argument("--key_heads", type=int, help="default half of the heads")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument(
        "--checkpointing",
        choices=["none", "selective", "attention", "full"],
        default="none",
        help="of the packed way",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default=_device())
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one untimed")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is not available: torch finds no GPU")
    if args.way:
        print(json.dumps(measure(args)))
        return
    record = None
    if args.out:
        sizes = {k: v for k, v in vars(args).items() if k not in ("out", "way")}
        record = LiveRecord("step", args.device, args.out.parent, args.out.stem, sizes=sizes)
    results = {}
    for way in args.ways:
        line = [sys.executable, "-m", "redi.bench.step", *sys.argv[1:], "--way", way]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
        if done.returncode:  # its stderr has the reason
            raise SystemExit(done.returncode)
        results[way] = json.loads(done.stdout.splitlines()[-1])
        if record:
            record.set(results=results)
    ours = results[args.ways[0]]
    first = f"x {args.ways[0]}"
    print(
        f"{'way':8} {'s/step':>8} {first:>8} {'tokens/s':>9} {'TFLOP/s':>8} {'MFU':>6} "
        f"{'peak GiB':>9}  loss"
    )
    for way, result in results.items():
        mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
        print(
            f"{way:8} {result['seconds']:8.3f} {result['seconds'] / ours['seconds']:8.2f} "
            f"{result['tokens'] / result['seconds']:9.0f} {result['model_tflops']:8.1f} {mfu:>6} "
            f"{result['peak_gib']:9.2f}  {result['loss']:.6f}"
        )
        if abs(result["loss"] - ours["loss"]) > 1e-4:
            sys.exit(f"{way} computes another loss: the times cannot be compared")
    for way, result in results.items():
        for kind in ("parts", "device_time"):
            shown = ", ".join(f"{name} {share:.1%}" for name, share in result[kind].items())
            print(f"{way}, {kind.replace('_', ' ')}: {shown}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """A way's steps: median and spread, flops, peak memory, parts, the loss before any update."""
    from redi.engine.distributed import join_world
    from redi.engine.model.flops import model_size
    from redi.engine.model.sharding import compute_dtype
    from redi.engine.train.mfu import peak_flops

    device, lengths = torch.device(args.device), np.array([len(one) for one in _traces(args)])
    parts = Parts(args.device)
    with join_world():
        step = WAYS[args.way](args, parts)
        loss = step()
        seconds = [seconds_of(step, args.device) for _ in range(args.steps)]
        if args.device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            peak = peak_resident_bytes() / 2**30
        shares, kinds = parts.of(step), device_time(step, args.device)
    targets = int(lengths.sum()) - len(lengths) * PROMPT_TOKENS
    flops = model_size(_config(args)).step_flops(lengths, targets) / statistics.median(seconds)
    most = peak_flops(device, compute_dtype("auto", device))
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "tokens": int(lengths.sum()),
        "model_tflops": flops / 1e12,
        "mfu": flops / most if most else None,
        "peak_gib": peak,
        "loss": loss,
        "parts": shares,
        "device_time": kinds,
    }


def _traces(args: argparse.Namespace) -> list[np.ndarray]:
    """Token ids; positives (lognormal lengths) and negatives (1.7 times as long) in turn."""
    rng = np.random.default_rng(0)
    traces = []
    for index in range(2 * args.pairs):
        median = args.median_tokens * (1.7 if index % 2 else 1.0)
        drawn = rng.lognormal(np.log(median), 0.7)
        length = int(np.clip(drawn, PROMPT_TOKENS + 1, args.row_tokens))
        traces.append(rng.integers(0, args.vocabulary, length, dtype=np.int64))
    return traces


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _config(args: argparse.Namespace) -> Any:
    from transformers import Qwen2Config

    heads = args.heads or args.hidden // 64
    return Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate or 4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=args.key_heads or max(1, heads // 2),
        max_position_embeddings=args.row_tokens,
    )


def _model(args: argparse.Namespace, attention: str) -> Any:
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device(args.device):
        return Qwen2ForCausalLM._from_config(_config(args), attn_implementation=attention)


def _update(model: torch.nn.Module) -> Callable[[], None]:
    """Clip and AdamW, the same for every way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def _packed(args: argparse.Namespace, parts: Parts) -> Callable[[], float]:
    from torch.distributed.fsdp import FSDPModule

    from redi.engine.config.sections import ObjectiveConfig, ShardConfig
    from redi.engine.data.packing import build_batch, pack
    from redi.engine.loss.packed_loss import PackedLoss, StepTotals
    from redi.engine.model.attention import choose_attention, register_attention
    from redi.engine.model.flops import training_cost
    from redi.engine.model.sharding import compute_dtype, reduce_in_place, shard
    from redi.engine.model.student import Student

    device = torch.device(args.device)
    dtype = compute_dtype("auto", device)
    attention = register_attention(choose_attention("auto", device, dtype)[0])
    objective = PackedLoss(ObjectiveConfig(name="redi", alpha=ALPHA))
    student = Student(_model(args, attention), objective)
    section = ShardConfig(checkpointing=args.checkpointing)
    shard(student, section, dtype, device, args.row_tokens)
    if device.type == "cpu":
        reduce_in_place(student)
    student.head.register_forward_pre_hook(lambda *_: parts.begin("loss, in forward"))
    student.head.register_forward_hook(lambda *_: parts.end("loss, in forward"))
    update = _update(student)
    traces = _traces(args)
    lengths = np.array([len(trace) for trace in traces])
    cost = training_cost(student.model.config)
    packing = pack(lengths, row_tokens=args.row_tokens, world_size=1, cost=cost)
    signs = np.where(np.arange(len(traces)) % 2, -1, 1)
    tokens: Any = InMemoryTraces(traces, np.full(len(traces), PROMPT_TOKENS), signs)
    rows = [build_batch(tokens, own, lengths[own]).to(device) for (own,) in packing.packs]
    totals = StepTotals(units=args.pairs, targets=int(lengths.sum()))

    def step() -> float:
        assert isinstance(student, FSDPModule)
        total = 0.0
        for index, row in enumerate(rows):
            student.set_requires_gradient_sync(index == len(rows) - 1)
            with parts.part("forward"):
                loss = student(row, totals).loss
            with parts.part("backward"):
                loss.backward()
            total += loss.item()
        with parts.part("update"):
            update()
        return total

    return step


def _whole_logits(args: argparse.Namespace, parts: Parts, group_size: int) -> Callable[[], float]:
    """Plain transformers with whole logits over groups of traces, padded to the longest."""
    device = args.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = _model(args, "sdpa").to(device)
    update = _update(model)
    traces = [torch.from_numpy(trace).to(device) for trace in _traces(args)]

    def mean_logp(logits: Tensor, ids: Tensor) -> Tensor:
        logp = logits[PROMPT_TOKENS - 1 : len(ids) - 1].float().log_softmax(-1)
        return logp.gather(1, ids[PROMPT_TOKENS:, None]).mean()

    def step() -> float:
        total = 0.0
        for start in range(0, len(traces), group_size):
            group = traces[start : start + group_size]
            ids = torch.nn.utils.rnn.pad_sequence(group, batch_first=True)
            # Padding is on the right: with causal attention no trained token attends to it.
            with parts.part("forward"):
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    logits = model(input_ids=ids, use_cache=False).logits
                loss = torch.zeros((), device=device)
                for index, trace in enumerate(group):
                    coefficient = ALPHA if (start + index) % 2 else -1.0
                    loss = loss + coefficient / args.pairs * mean_logp(logits[index], trace)
            with parts.part("backward"):
                loss.backward()
            total += loss.item()
        with parts.part("update"):
            update()
        return total

    return step


def _pairs(args: argparse.Namespace, parts: Parts) -> Callable[[], float]:
    # Each trace of the pair separately: unpadded.
    return _whole_logits(args, parts, group_size=1)


def _padded(args: argparse.Namespace, parts: Parts) -> Callable[[], float]:
    return _whole_logits(args, parts, group_size=2 * args.pairs)


WAYS = {"packed": _packed, "pairs": _pairs, "padded": _padded}


if __name__ == "__main__":
    main()
