"""How much ranks wait for each other, by packing: this engine's, the usual ones, one pair per rank.

`python -m redi.bench.packing` packs the steps of a REDI run in four ways:

- redi: `redi.engine.data.packing.pack`;
- best fit: each trace, longest first, into the fullest pack that has room (TRL's "bfd" packing);
- first fit: each trace, longest first, into the first pack that has room;
- one pair: one pair per rank and micro-step, in the order drawn, as the paper's authors ran it.

The fits fill as few packs as possible. Each uses the better of two pack lengths in each step: the
length of this engine's packs, and the set's longest trace. Packs of similar cost are run together,
which wastes least. All four run the same traces in a step. A step's rank efficiency is its cost
divided by the work that the ranks could have done in its time: 1 is no waiting. The costs are those
of Qwen2.5-1.5B.

With --gather it compares the two values of `[shard] gather` instead: 256 pairs on 64 ranks, costs
of three sizes of Qwen2.5, packs as long as the longest trace and longer. Needs the extra `engine`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redi.bench.report import OTHERS, OURS, environment
from redi.engine.data.packing import Cost, pack

COST = Cost(linear=6 * 1.54e9, quadratic=6 * 28 * 1536)
"""Flops of a 1.5B model: 6 per parameter and token; 6 x layers x width per pair of tokens."""
ROW_TOKENS = 32_768
SHAPES = ((32, 8), (512, 64), (32, 32))
"""(pairs, ranks) of a step."""
COSTS = {
    "1.5B": COST,
    "7B": Cost(linear=6 * 7.07e9, quadratic=6 * 28 * 3584),
    "32B": Cost(linear=6 * 31.98e9, quadratic=6 * 64 * 5120),
}
"""By size of the model, as `COST`; parameters without an input embedding that is not tied."""
GATHER_SHAPE = (256, 64)
GATHER_ROWS = (32_768, 65_536)
"""Row lengths in addition to that of the longest trace."""


@dataclass(frozen=True)
class Lengths:
    """The lengths that steps are drawn from."""

    name: str
    positives: np.ndarray
    """int64, tokens with the prompt."""
    negatives: np.ndarray

    def steps(self, pairs: int, count: int) -> Iterator[np.ndarray]:
        """int64 [2 * pairs] for each step: positive, negative, positive, ..."""
        rng = np.random.default_rng(0)
        for _ in range(count):
            drawn = [rng.choice(one, pairs) for one in (self.positives, self.negatives)]
            yield np.stack(drawn, axis=1).reshape(-1)


def simulated(spread: float = 0.7, longest: int = 19_000) -> Lengths:
    """R1-like: lognormal around 4,300 (correct) and 7,500 tokens (incorrect), from 300 on.

    Args:
        spread: standard deviation of a length's logarithm.
        longest: longer traces are cut to this length.
    """
    rng = np.random.default_rng(0)

    def draw(median: float) -> np.ndarray:
        drawn = rng.lognormal(np.log(median), spread, 100_000)
        return np.clip(drawn, 300, longest).astype(np.int64)

    return Lengths(f"simulated, to {longest:,}", draw(4300), draw(7500))


def recorded(folder: Path, cache: Path) -> Lengths:
    """Lengths of long_cot_gsm8k.jsonl.gz in `folder`, with the tokenizer in `folder`."""
    from redi.engine.console import Console
    from redi.engine.data.tokens import TokenSettings, tokenize

    file, tokenizer = folder / "long_cot_gsm8k.jsonl.gz", folder / "tokenizers" / "qwen2.5"
    settings = TokenSettings((str(file),), "auto", "chat", None, str(tokenizer))
    tokens = tokenize(settings, cache, processes=1, console=Console())
    kept = tokens.lengths <= ROW_TOKENS
    of_sign = [tokens.lengths[kept & (tokens.signs == sign)] for sign in (1, -1)]
    return Lengths(file.name, *of_sign)


def fit_decreasing(
    lengths: np.ndarray, row_tokens: int, choose: Callable[[np.ndarray], int]
) -> list[list[int]]:
    """Longest first; `choose` takes the room left in the packs that fit and returns an index."""
    packs: list[list[int]] = []
    room = np.zeros(0, dtype=np.int64)
    for index in np.argsort(-lengths, kind="stable").tolist():
        fits = np.flatnonzero(room >= lengths[index])
        if len(fits):
            chosen = int(fits[choose(room[fits])])
        else:
            chosen = len(packs)
            packs.append([])
            room = np.append(room, row_tokens)
        packs[chosen].append(index)
        room[chosen] -= lengths[index]
    return packs


Way = Callable[[np.ndarray, int, int], float]
"""Rank efficiency from a step's lengths, the ranks, and the set's longest trace."""


def efficiency(pack_costs: np.ndarray, ranks: int) -> float:
    """Rank efficiency of packs run in this order, `ranks` of them at a time."""
    missing = -len(pack_costs) % ranks
    steps = np.pad(pack_costs, (0, missing)).reshape(-1, ranks)
    return float(pack_costs.sum() / (ranks * steps.max(axis=1).sum()))


def _redi(lengths: np.ndarray, ranks: int, longest: int) -> float:
    packing = pack(lengths, row_tokens=ROW_TOKENS, world_size=ranks, cost=COST)
    return packing.rank_efficiency


def _fit(choose: Callable[[np.ndarray], int]) -> Way:
    def way(lengths: np.ndarray, ranks: int, longest: int) -> float:
        costs = COST.of(lengths)
        found = []
        for row_tokens in (ROW_TOKENS, longest):
            packs = fit_decreasing(lengths, row_tokens, choose)
            pack_costs = np.sort([costs[indices].sum() for indices in packs])[::-1]
            found.append(efficiency(pack_costs, ranks))
        return max(found)

    return way


def _one_pair(lengths: np.ndarray, ranks: int, longest: int) -> float:
    return efficiency(COST.of(lengths).reshape(-1, 2).sum(axis=1), ranks)


WAYS: dict[str, Way] = {
    "redi": _redi,
    "best fit": _fit(lambda room: int(np.argmin(room))),
    "first fit": _fit(lambda room: 0),
    "one pair": _one_pair,
}


def measure(lengths: Lengths, pairs: int, ranks: int, count: int) -> dict[str, Any]:
    """Rank efficiency of `count` steps by every way, and milliseconds of one core per step."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    bounds = []
    longest = int(max(lengths.positives.max(), lengths.negatives.max()))
    for step in lengths.steps(pairs, count):
        costs = COST.of(step)
        bounds.append(min(1.0, float(costs.sum() / (ranks * costs.max()))))
        for name, way in WAYS.items():
            began = time.process_time()
            found[name].append(way(step, ranks, longest))
            times[name].append(1e3 * (time.process_time() - began))
    return {
        "lengths": lengths.name,
        "pairs": pairs,
        "ranks": ranks,
        "steps": count,
        "bound_by_longest_trace": statistics.mean(bounds),
        "bound_by_longest_trace_min": min(bounds),
        "ways": {
            name: {
                "mean": statistics.mean(values),
                "min": min(values),
                "milliseconds": statistics.median(times[name]),
            }
            for name, values in found.items()
        },
    }


def measure_gathers(lengths: Lengths, count: int) -> list[dict[str, Any]]:
    """Rank efficiency of `count` steps with both values of `[shard] gather`, by model and row."""
    pairs, ranks = GATHER_SHAPE
    longest = int(max(lengths.positives.max(), lengths.negatives.max()))
    steps = list(lengths.steps(pairs, count))
    results = []
    for model, cost in COSTS.items():
        for row_tokens in sorted({longest, *GATHER_ROWS}):
            found: dict[str, Any] = {}
            for gather in ("micro_step", "step"):
                began = time.process_time()
                packings = [
                    pack(step, row_tokens=row_tokens, world_size=ranks, cost=cost, gather=gather)
                    for step in steps
                ]
                milliseconds = 1e3 * (time.process_time() - began) / count
                efficiencies = [packing.rank_efficiency for packing in packings]
                found[gather] = {
                    "mean": statistics.mean(efficiencies),
                    "min": min(efficiencies),
                    "micro_steps": statistics.mean(len(packing.packs) for packing in packings),
                    "milliseconds": milliseconds,
                }
            shape = {"lengths": lengths.name, "pairs": pairs, "ranks": ranks, "steps": count}
            results.append({**shape, "model": model, "row_tokens": row_tokens, "gather": found})
    return results


def print_gathers(results: list[dict[str, Any]]) -> None:
    """A line for each length of traces, model, length of rows and value of `gather`."""
    print(f"{'lengths':22} model {'row_tokens':>10}  gather       mean    min  micro-steps     ms")
    for result in results:
        for gather, of in result["gather"].items():
            print(
                f"{result['lengths']:22} {result['model']:5} {result['row_tokens']:10,}  "
                f"{gather:10} {of['mean']:6.3f} {of['min']:6.3f} {of['micro_steps']:12.2f} "
                f"{of['milliseconds']:6.1f}"
            )


def print_table(results: list[dict[str, Any]]) -> None:
    """A line for each way and set of steps, below the bound by each step's longest trace."""
    print(f"{'lengths':24} {'pairs x ranks':>13}  {'way':10} {'mean':>6} {'min':>6} {'ms':>8}")
    for result in results:
        shape = f"{result['pairs']} x {result['ranks']}"
        bound, lowest = (result[f"bound_by_longest_trace{end}"] for end in ("", "_min"))
        print(f"{result['lengths']:24} {shape:>13}  {'bound':10} {bound:6.3f} {lowest:6.3f}")
        for name, way in result["ways"].items():
            print(
                f"{result['lengths']:24} {shape:>13}  {name:10} {way['mean']:6.3f} "
                f"{way['min']:6.3f} {way['milliseconds']:8.2f}"
            )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Mean (bar) and lowest (line) rank efficiency; dashed: the bound by the longest trace."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = len(SHAPES)
    figure = Figure(figsize=(3.1 * across, 2.9 * len(results) / across), layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(len(results) // across, across, sharey=True, squeeze=False).flat
    for axes, result in zip(plots, results, strict=True):
        means = [way["mean"] for way in result["ways"].values()]
        lowest = [way["min"] for way in result["ways"].values()]
        colors = [OURS if name == "redi" else OTHERS for name in result["ways"]]
        places = range(len(means))
        axes.bar(places, means, color=colors)
        axes.vlines(places, lowest, means, color="black", linewidth=1)
        axes.axhline(result["bound_by_longest_trace"], color="black", linewidth=0.8, ls="--")
        for place, mean in zip(places, means, strict=True):
            axes.text(place, 1.02, f"{mean:.3f}", ha="center", fontsize=8)
        axes.set_ylim(0, 1.1)
        axes.set_xticks(places, result["ways"], rotation=30, ha="right", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        title = f"{result['pairs']} pairs x {result['ranks']} ranks\n{result['lengths']}"
        axes.set_title(title, fontsize=9)
    plots[0].set_ylabel("rank efficiency")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure every shape on simulated and, with --traces, real lengths."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.packing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=300, help="of each shape; of 512 pairs a 16th")
    parser.add_argument("--traces", type=Path, help="folder with long_cot_gsm8k.jsonl.gz")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="of its tokens")
    parser.add_argument("--out", type=Path, help="JSON file to write, with a picture in its folder")
    parser.add_argument("--gather", action="store_true", help="compare the values of shard.gather")
    args = parser.parse_args()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.gather:
        sets = [simulated(), simulated(spread=0.9, longest=32_768)]
        gathers = [one for of in sets for one in measure_gathers(of, max(1, args.steps // 10))]
        print_gathers(gathers)
        if args.out:
            record = {**environment("cpu"), "results": gathers}
            args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return
    sources = [simulated()]
    if args.traces:
        sources.append(recorded(args.traces, args.cache))
    results = [
        measure(lengths, pairs, ranks, max(1, args.steps * 32 // max(pairs, 32)))
        for lengths in sources
        for pairs, ranks in SHAPES
    ]
    print_table(results)
    if args.out:
        sizes = {"row_tokens": ROW_TOKENS, "linear": COST.linear, "quadratic": COST.quadratic}
        record = {**environment("cpu"), "sizes": sizes, "results": results}
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
