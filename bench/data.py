"""How fast data reach training: the loader on one core, reuse of a cache, start of a large set.

`python -m redi.bench.data` makes token caches of random ids in a temporary folder and times

- the loader, without workers, on traces of R1-like lengths: tokens per second of one core;
- how long training waits for a step of 256 pairs on 64 ranks, without workers and with two;
- opening a cache of as many traces as the paper trains on;
- a set of millions of short traces, to its first step; and its summary.

Seconds are CPU time of one core, with files in the disk cache. Needs the extra `engine`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from redi.bench.report import environment
from redi.engine.data.cache import SCHEMA, Meta, TokenizedTraces, open_cache, write_cache
from redi.engine.data.loader import StepBatches, StepLoader
from redi.engine.data.packing import Cost
from redi.engine.data.schedule import Examples, Schedule, select
from redi.engine.data.summary import Summary, summarize
from redi.engine.train.metrics import timed

ROW_TOKENS = 32_768
COST = Cost(linear=6 * 1.54e9, quadratic=6 * 28 * 1536)
_BATCH = 100_000


def write(folder: Path, lengths: np.ndarray) -> None:
    """A cache of pairs of traces of random tokens; prompts of one token."""
    rng = np.random.default_rng(0)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(lengths), _BATCH):
            some = lengths[start : start + _BATCH]
            number = np.arange(start, start + len(some))
            offsets = np.concatenate([[0], np.cumsum(some)]).astype(np.int32)
            ids = rng.integers(0, 150_000, offsets[-1], dtype=np.int32)
            columns: dict[str, Any] = {name: np.zeros(len(some), np.int64) for name in SCHEMA.names}
            columns |= {
                "ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
                "prompt_length": np.ones(len(some), np.int64),
                "sign": np.where(number % 2, -1, 1),
                "weight": np.ones(len(some), np.float32),
                "teacher": pa.nulls(len(some), pa.string()),
                "origin": pa.nulls(len(some), pa.string()),
                "row": number + 1,
                "digest": number,
                "prompt_digest": number // 2,
                "hash": [one.to_bytes(16) for one in number.tolist()],
                "token_weights": pa.nulls(len(some), pa.list_(pa.float32())),
                "group": number // 2,
            }
            arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
            yield pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)

    write_cache(folder, batches(), lambda size, rows: Meta(folder.name, size, rows, ("made",), {}))


def open_pairs(folder: Path) -> tuple[TokenizedTraces, Examples]:
    """A cache, and the pairs in it."""
    tokens = open_cache(folder)
    assert tokens is not None
    examples = select(
        tokens,
        objective_needs="pairs",
        max_tokens=ROW_TOKENS,
        overlong="error",
        row_tokens=ROW_TOKENS,
    )
    return tokens, examples


def start(folder: Path) -> tuple[Iterator[StepBatches], Callable[[], Summary]]:
    """Open a cache as a run does; returns its steps, and a function that makes its summary."""
    tokens, examples = open_pairs(folder)
    schedule = Schedule(len(examples.units), batch=32, epochs=1, max_steps=None, seed=42)
    loader = StepLoader(
        tokens, examples, schedule, row_tokens=ROW_TOKENS, rank=0, world_size=1, cost=COST
    )
    summary = partial(
        summarize, tokens, examples, schedule, row_tokens=ROW_TOKENS, world_size=1, cost=COST
    )
    return loader.steps(0), summary


def waiting(folder: Path, workers: int, step_seconds: float) -> float:
    """Median seconds that rank 0 of 64 waits for a step of 256 pairs, after the first two.

    Args:
        folder: a cache of at least 256 pairs.
        step_seconds: what training a step takes; here it sleeps.
    """
    tokens, examples = open_pairs(folder)
    schedule = Schedule(len(examples.units), batch=256, epochs=2, max_steps=8, seed=42)
    loader = StepLoader(
        tokens,
        examples,
        schedule,
        row_tokens=ROW_TOKENS,
        rank=0,
        world_size=64,
        cost=COST,
        workers=workers,
    )
    waits = []
    for _, waited in timed(loader.steps(0)):
        waits.append(waited)
        time.sleep(step_seconds)
    return float(np.median(waits[2:]))


def measure(
    folder: Path, traces: int, millions: float, step_seconds: float = 1.0
) -> dict[str, float]:
    """The figures: R1-like lengths, `traces` of three tokens, `millions` of three tokens.

    Args:
        step_seconds: see `waiting`.
    """
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(5700), 0.7, 4096)
    write(folder / "long", np.clip(drawn, 300, 19_000).astype(np.int64))
    steps, _ = start(folder / "long")
    next(steps)
    began, tokens = time.process_time(), 0
    for step in steps:
        tokens += step.num_tokens
    throughput = tokens / (time.process_time() - began)
    waits = {f"waiting_s_{n}_workers": waiting(folder / "long", n, step_seconds) for n in (0, 2)}

    write(folder / "paper", np.full(traces, 3))
    found_again = _seconds(lambda: open_cache(folder / "paper"))
    write(folder / "large", np.full(int(millions * 1e6), 3))
    first_step = _seconds(lambda: next(start(folder / "large")[0]))
    return {
        "loader_tokens_per_s": throughput,
        **waits,
        "traces": traces,
        "found_again_s": found_again,
        "millions": millions,
        "large_first_step_s": first_step,
        "large_overview_s": _seconds(start(folder / "large")[1]),
    }


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Measure and print; write JSON to --out."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traces", type=int, default=131_000, help="of the cache that is opened")
    parser.add_argument("--millions", type=float, default=10, help="traces of the large set")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), args.traces, args.millions)
    print(f"loader: {results['loader_tokens_per_s']:,.0f} tokens/s on one core")
    for workers in (0, 2):
        wait = results[f"waiting_s_{workers}_workers"]
        print(f"256 pairs on 64 ranks, {workers} workers: training waits {wait:.4f} s a step")
    print(f"cache of {args.traces:,} traces opened: {results['found_again_s']:.3f} s")
    first_step, summary = results["large_first_step_s"], results["large_overview_s"]
    print(f"{args.millions:g} M traces: to the first step {first_step:.2f} s")
    print(f"{args.millions:g} M traces: summary {summary:.2f} s")
    if args.out:
        record = {**environment("cpu"), "results": results}
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
