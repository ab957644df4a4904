"""Step time on 8 to 1,024 H100s: counted flops and bytes, simulated packing, stated assumptions.

`python -m redi.bench.scaling` predicts, and `--check` compares the prediction for 1, 2 and 4 CPU
processes with `redi train`. Counted: flops of each pack (`engine.model.flops`), bytes that FSDP2
moves (`engine.plan.step_time`), and the packing of simulated R1-like steps, by training's code.
Assumed, each in one place: the share of the GPU's peak (`engine.plan.cards.MFU`, of all flops
executed, recomputed ones included), bandwidths, latencies and their sources
(`engine.plan.step_time`), and that compute hides transfers of the same micro-step. Not modelled:
the update (10 ms), reading data (workers), checkpoints, stragglers, and networks that other jobs
use too. Memory is not counted here: `redi plan` does that.

Two questions, for Qwen2.5's 1.5B, 7B and 32B with full recomputation: how a step's time grows if
every rank brings its 4 pairs (weak scaling), and how far 256 pairs can be spread (strong scaling).
Each for four layouts: FSDP over all ranks, with rows of 65,536 tokens; HSDP, a copy of the shards
on each machine; FSDP with rows as long as the longest trace, 32,768 tokens; and the same with
weights gathered once per step. Needs the extra `engine`.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from redi.bench.packing import simulated
from redi.bench.report import environment
from redi.engine.config.sections import ShardConfig
from redi.engine.data.packing import Cost, Packing, pack
from redi.engine.model.flops import ModelSize, model_size
from redi.engine.plan.cards import CARDS, MFU
from redi.engine.plan.packed_run import pack_sums, slowest
from redi.engine.plan.step_time import (
    ACHIEVED,
    GPUS_PER_MACHINE,
    LAUNCH_SECONDS,
    NETWORK,
    NETWORK_HOP,
    NVLINK,
    NVLINK_HOP,
    RING_START,
    step_seconds,
    step_traffic,
)

CARD = "h100"
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
PAIRS_A_RANK = 4
PAIRS = 256
LONGEST = 32_768
ROW_TOKENS = 65_536
CHECKPOINTING: Literal["full"] = "full"
STEPS = 4
"""Simulated steps of each kind; their mean is shown."""

MODELS = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "num_hidden_layers": 28, "vocab_size": 151_936}
    | {"tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "num_hidden_layers": 28, "vocab_size": 152_064}
    | {"tie_word_embeddings": False},
    "32B": {"hidden_size": 5120, "intermediate_size": 27_648, "num_attention_heads": 40}
    | {"num_key_value_heads": 8, "num_hidden_layers": 64, "vocab_size": 152_064}
    | {"tie_word_embeddings": False},
}
"""Configurations of Qwen2.5."""

COLOURS = {"1.5B": "#56B4E9", "7B": "#D55E00", "32B": "#009E73"}
STYLES = {"fsdp": "-", "short rows": "--"}
"""Of the layouts in the picture. The others' lines would cover that of FSDP."""


def sizes() -> dict[str, ModelSize]:
    """The models, counted from their modules."""
    from transformers import Qwen2Config

    return {name: model_size(Qwen2Config(**fields)) for name, fields in MODELS.items()}


@dataclass(frozen=True)
class Prediction:
    """A step of a model on a number of ranks; times in seconds, means over the simulated steps."""

    model: str
    pairs: int
    ranks: int
    layout: str
    """A key of `layouts`."""
    micro_steps: float
    rank_efficiency: float
    busy: float
    """Compute, if it were spread evenly over all ranks."""
    waiting: float
    """Of ranks for the slowest of their micro-step."""
    transfers: float
    """Of gathers and reductions, hidden or not."""
    exposed: float
    """Of these, what compute does not hide."""
    seconds: float
    """busy + waiting + exposed."""
    tokens_per_s: float
    mfu: float
    """Model flops (without recomputation) per second and rank, as a share of the peak."""


def predict(
    name: str,
    size: ModelSize,
    steps: Sequence[np.ndarray],
    ranks: int,
    layout: str,
    flops_per_second: float,
) -> Prediction:
    """Predict the mean of steps.

    Args:
        name: of the model.
        size: of the model.
        steps: int64 [traces] each, lengths.
        ranks: of the run.
        layout: a key of `layouts`.
        flops_per_second: of a rank, all executed flops counted.
    """
    shard, row_tokens = layouts(ranks)[layout]
    cost, runs = size.training_cost(), size.run_cost(shard.checkpointing)
    found = []
    for lengths in steps:
        packing = pack(
            lengths, row_tokens=row_tokens, world_size=ranks, cost=cost, gather=shard.gather
        )
        waits = slowest_of(packing, runs, lengths, shard.gather) / flops_per_second
        busy = float(runs.of(lengths).sum()) / ranks / flops_per_second
        seconds = step_seconds(waits, size, ranks, shard)
        moved = step_traffic(size, ranks, shard)
        found.append(
            {
                "micro_steps": len(packing.packs),
                "rank_efficiency": packing.rank_efficiency,
                "busy": busy,
                "waiting": float(waits.sum()) - busy,
                "transfers": moved.micro_step * len(waits) + moved.step,
                "exposed": seconds - float(waits.sum()),
                "seconds": seconds,
                "tokens_per_s": int(lengths.sum()) / seconds,
                "mfu": size.step_flops(lengths, int(lengths.sum()))
                / (seconds * ranks * CARDS[CARD].peak_flops),
            }
        )
    means = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
    return Prediction(name, len(steps[0]) // 2, ranks, layout, **means)


def slowest_of(packing: Packing, cost: Cost, lengths: np.ndarray, gather: str) -> np.ndarray:
    """Cost of the packs that a step waits for, one after the other."""
    return slowest(pack_sums(packing, cost.of(lengths)), gather)


def layouts(ranks: int) -> dict[str, tuple[ShardConfig, int]]:
    """`[shard]` and the row length, by name."""
    copies = max(1, ranks // GPUS_PER_MACHINE)

    def shard(**fields: Any) -> ShardConfig:
        return ShardConfig(checkpointing=CHECKPOINTING, **fields)

    return {
        "fsdp": (shard(), ROW_TOKENS),
        "hsdp": (shard(replicate=copies), ROW_TOKENS),
        "short rows": (shard(), LONGEST),
        "gather once": (shard(gather="step"), LONGEST),
    }


def predict_all(ranks: Sequence[int] = RANKS, steps: int = STEPS) -> list[Prediction]:
    """Weak and strong scaling of all models."""
    lengths = simulated(longest=LONGEST)
    models, speed = sizes(), MFU * CARDS[CARD].peak_flops
    found = []
    for count in ranks:
        for pairs in dict.fromkeys((PAIRS_A_RANK * count, PAIRS)):
            drawn = list(lengths.steps(pairs, steps))
            for name, size in models.items():
                found += [
                    predict(name, size, drawn, count, layout, speed) for layout in layouts(count)
                ]
    return found


def print_table(found: Sequence[Prediction]) -> None:
    """A line for each prediction, weak scaling first."""
    print(
        f"{'model':5} {'pairs':>5} {'ranks':>5} {'layout':11} "
        f"{'micro-steps':>11} {'efficiency':>10} "
        f"{'busy s':>7} {'waits s':>7} {'moves s':>7} {'exposed':>7} {'step s':>7} "
        f"{'tokens/s':>11} {'MFU':>6}"
    )
    for weak in (True, False):
        for one in sorted(found, key=lambda one: (list(MODELS).index(one.model), one.layout)):
            if one.pairs == (PAIRS_A_RANK * one.ranks if weak else PAIRS):
                print(
                    f"{one.model:5} {one.pairs:5} {one.ranks:5} {one.layout:11} "
                    f"{one.micro_steps:11.2f} {one.rank_efficiency:10.3f} {one.busy:7.2f} "
                    f"{one.waiting:7.2f} {one.transfers:7.2f} {one.exposed:7.2f} "
                    f"{one.seconds:7.2f} {one.tokens_per_s:11,.0f} {one.mfu:6.1%}"
                )
        print()


def draw(found: Sequence[Prediction], path: Path) -> None:
    """Share of the time in which all ranks compute, by ranks and layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    weak, strong = figure.subplots(1, 2, sharey=True)
    for axes, title in (
        (weak, f"{PAIRS_A_RANK} pairs a rank"),
        (strong, f"{PAIRS} pairs a step"),
    ):
        for name in MODELS:
            for layout, style in STYLES.items():
                chosen = [
                    one
                    for one in found
                    if one.model == name
                    and one.layout == layout
                    and one.pairs == (PAIRS if axes is strong else PAIRS_A_RANK * one.ranks)
                ]
                axes.plot(
                    [one.ranks for one in chosen],
                    [one.busy / one.seconds for one in chosen],
                    style,
                    color=COLOURS[name],
                    marker="o",
                    ms=3,
                    label=f"{name}, {'all others' if layout == 'fsdp' else layout}",
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, [f"{count:,}" for count in RANKS])
        axes.set_xlabel("H100s")
        axes.set_ylim(0, 1.05)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    weak.set_ylabel("share of the step that all ranks compute")
    weak.legend(frameon=False, fontsize=8)
    figure.suptitle("Predicted, not measured", fontsize=10)
    figure.savefig(path, dpi=150)


CHECKED_RANKS = (1, 2, 4)
CHECKED_STEPS = 6
CHECKED_ROWS = 1024


def check() -> list[dict[str, Any]]:
    """Run `redi train` on 1, 2 and 4 CPU processes of one thread and compare its step times.

    The speed of a process is that of the run on one, so that run is equal by construction. The
    others test that the packing of training is the simulated one, and that a step takes as long as
    its slowest ranks. Processes that outnumber the cores share them: a step takes at least all
    work over the cores. It cannot test bandwidths, latencies or overlap: a loopback moves bytes by
    the cores that compute.
    """
    from redi.engine.quickstart.task import write_model

    cores = len(os.sched_getaffinity(0))
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", seed=0, hidden_size=256, layers=4)
        _write_traces(folder / "traces.jsonl")
        speed = None
        for ranks in CHECKED_RANKS:
            size, steps, lines = _run(folder, ranks)
            cost = size.training_cost()
            work = []
            for lengths in steps:
                packing = pack(lengths, row_tokens=CHECKED_ROWS, world_size=ranks, cost=cost)
                waits = slowest_of(packing, cost, lengths, "micro_step")
                work.append(max(float(waits.sum()), float(cost.of(lengths).sum()) / cores))
            # The first step warms up.
            measured = [line["seconds"] for line in lines][1:]
            speed = speed or sum(work[1:]) / sum(measured)
            results.append(
                {
                    "ranks": ranks,
                    "micro_steps": statistics.fmean(line["micro_steps"] for line in lines),
                    "measured": statistics.median(measured),
                    "predicted": statistics.median(one / speed for one in work[1:]),
                }
            )
    return results


def _run(folder: Path, ranks: int) -> tuple[ModelSize, list[np.ndarray], list[dict[str, Any]]]:
    """Train in other processes; the model's size, the steps' lengths, and their metrics."""
    from redi.engine.config.parse import load_recipe, train_parser
    from redi.engine.console import Console
    from redi.engine.distributed import join_world
    from redi.engine.model.build import model_config
    from redi.engine.train.prepare_data import prepare_data

    recipe = folder / "recipe.toml"
    options = {
        "model.path": folder / "model",
        "model.max_position_embeddings": CHECKED_ROWS,
        "data.path": folder / "traces.jsonl",
        "data.cache": folder / "cache",
        "data.max_tokens": CHECKED_ROWS,
        "data.template": "none",
        "objective.name": "redi",
        "train.batch": 8,
        "train.max_steps": CHECKED_STEPS,
        "train.row_tokens": CHECKED_ROWS,
        "run.dir": folder / f"run-{ranks}",
    }
    recipe.write_text("")
    arguments = [str(recipe)]
    for key, value in options.items():
        arguments += [f"--{key}", str(value)]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launch, "-m", "redi.engine.cli", "train", *arguments, "--quiet"]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    text = (folder / f"run-{ranks}" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]

    loaded = load_recipe(train_parser(), str(recipe), arguments)
    with join_world() as world:
        data = prepare_data(loaded, world, Console(active=False))
    steps = [data.lengths_of(data.schedule.units(line["step"])) for line in lines]
    return model_size(model_config(loaded)), steps, lines


def _write_traces(path: Path) -> None:
    """64 problems with a correct and an incorrect trace, lognormal lengths to `CHECKED_ROWS`."""
    rng = random.Random(0)

    def text(median: float) -> str:
        length = min(max(int(rng.lognormvariate(np.log(median), 0.7)), 20), CHECKED_ROWS - 20)
        return "".join(rng.choice("0123456789") for _ in range(length))

    with path.open("w") as file:
        for number in range(64):
            row = {"prompt": f"{number}=", "chosen": text(150), "rejected": text(260)}
            file.write(json.dumps(row) + "\n")


def print_check(results: Sequence[dict[str, Any]]) -> None:
    """A line for each number of processes."""
    print(
        f"{'processes':>9} {'micro-steps':>11} {'measured s':>10} {'predicted s':>11} {'ratio':>6}"
    )
    for one in results:
        ratio = one["measured"] / one["predicted"]
        print(
            f"{one['ranks']:9} {one['micro_steps']:11.2f} {one['measured']:10.3f} "
            f"{one['predicted']:11.3f} {ratio:6.2f}"
        )


def main() -> None:
    """Predict and print, or check the prediction on this machine."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--steps", type=int, default=STEPS, help="simulated steps of each kind")
    parser.add_argument("--check", action="store_true", help="run 1, 2 and 4 CPU processes instead")
    parser.add_argument("--out", type=Path, help="JSON file to write, with a picture in its folder")
    args = parser.parse_args()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.check:
        results = check()
        print_check(results)
    else:
        found = predict_all(args.ranks, args.steps)
        print_table(found)
        results = [vars(one) for one in found]
    if args.out:
        assumed = {
            "card": CARD,
            "peak_flops": CARDS[CARD].peak_flops,
            "share_of_peak": MFU,
            "nvlink": NVLINK,
            "network": NETWORK,
            "achieved": ACHIEVED,
            "latencies": [RING_START, NVLINK_HOP, NETWORK_HOP],
            "launch_seconds": LAUNCH_SECONDS,
            "row_tokens": ROW_TOKENS,
            "longest": LONGEST,
            "checkpointing": CHECKPOINTING,
        }
        record = {**environment("cpu"), "assumed": assumed, "results": results}
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if not args.check:
            draw(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
