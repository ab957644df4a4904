"""How fast training is fed: packed batches on one core, a set found again, a large set opened.

`python -m redi.bench.data` makes token caches of random ids in a temporary folder and times

- the loader, without workers, on traces of R1-like lengths: tokens a second of one core;
- finding a cache again and forming pairs, for as many traces as the paper trains on;
- a set of millions of short traces, to its first step; and the overview of it.

Seconds are those of one core; files lie in the disk cache. The engine's dependencies are needed.
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
from redi.engine.data.cache import SCHEMA, Meta, open_cache, write_cache
from redi.engine.data.loader import StepBatches, StepLoader
from redi.engine.data.packing import Cost
from redi.engine.data.schedule import Schedule, select
from redi.engine.data.summary import Summary, summarize

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
                "group": number // 2,
            }
            arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
            yield pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)

    write_cache(folder, batches(), lambda size, rows: Meta(folder.name, size, rows, ("made",), {}))


def start(folder: Path) -> tuple[Iterator[StepBatches], Callable[[], Summary]]:
    """What a run does with a cache before its first step: its steps, and the overview if asked."""
    tokens = open_cache(folder)
    assert tokens is not None
    examples = select(
        tokens,
        objective_needs="pairs",
        max_tokens=ROW_TOKENS,
        overlong="error",
        row_tokens=ROW_TOKENS,
    )
    schedule = Schedule(len(examples.units), batch=32, epochs=1, max_steps=None, seed=42)
    loader = StepLoader(
        tokens, examples, schedule, row_tokens=ROW_TOKENS, rank=0, world_size=1, cost=COST
    )
    overview = partial(
        summarize, tokens, examples, schedule, row_tokens=ROW_TOKENS, world_size=1, cost=COST
    )
    return loader.steps(0), overview


def measure(folder: Path, traces: int, millions: float) -> dict[str, float]:
    """The three figures; `traces` of R1-like lengths, then `millions` of three tokens."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(5700), 0.7, 4096)
    write(folder / "long", np.clip(drawn, 300, 19_000).astype(np.int64))
    steps, _ = start(folder / "long")
    next(steps)
    began, tokens = time.process_time(), 0
    for step in steps:
        tokens += step.num_tokens
    throughput = tokens / (time.process_time() - began)

    write(folder / "paper", np.full(traces, 3))
    found_again = _seconds(lambda: open_cache(folder / "paper"))
    write(folder / "large", np.full(int(millions * 1e6), 3))
    first_step = _seconds(lambda: next(start(folder / "large")[0]))
    return {
        "loader_tokens_per_s": throughput,
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
    """Measure and print; write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traces", type=int, default=131_000, help="of the set found again")
    parser.add_argument("--millions", type=float, default=10, help="traces of the large set")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), args.traces, args.millions)
    print(f"loader: {results['loader_tokens_per_s']:,.0f} tokens/s on one core")
    print(f"cache of {args.traces:,} traces found again: {results['found_again_s']:.3f} s")
    first_step, overview = results["large_first_step_s"], results["large_overview_s"]
    print(f"{args.millions:g} M traces: to the first step {first_step:.2f} s")
    print(f"{args.millions:g} M traces: overview {overview:.2f} s")
    if args.out:
        record = {**environment("cpu"), "results": results}
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
