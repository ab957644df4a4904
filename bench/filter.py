"""How much of a real model's gradient a filter leaves out, by order, rule and epsilon.

    python -m redi.bench.models smollm2 runs/smollm2
    python -m redi.bench.filter runs/smollm2 ../shared/data/long_cot_gsm8k.jsonl.gz

Runs the model over the completions of traces. For each order of the vocabulary and each rule that
selects tiles, the table has the share of tiles kept (at best the relative cost of the gradient's
two products), the probability left out, and the errors of the gradients against the full ones in
float32. Rules: "sum", a tile's share of a token's probability, is this project's; "largest", its
largest probability, is that of other projects. `--states FILE` writes hidden states and lm_head for
`redi.bench.loss --states FILE`, which times the filter. Needs the extra `engine`.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redi.bench.hidden_statistics import hidden_states
from redi.bench.inputs import ALPHA
from redi.bench.report import OTHERS, OURS, environment
from redi.kernels.experimental.filter import TileSums, kept_tiles, vocabulary_order

ROWS, COLUMNS = 128, 256
"""A tile on Hopper."""
EPSILONS = tuple(2.0**-k for k in (12, 10, 9, 8, 7, 6))


@dataclass(frozen=True)
class States:
    """Hidden states of traces, and the lm_head that they enter; all in bfloat16's values."""

    hidden: Tensor
    """[N, D] float32."""
    weight: Tensor
    """[V, D] float32."""
    targets: Tensor
    """[N] int64."""
    lengths: list[int]
    """Of the traces, completions only; the last one may be cut."""


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    order: str
    rule: str
    epsilon: float
    live: float
    """Share of the tiles kept."""
    dropped: float
    """Mean over tokens of the probability left out."""
    largest_dropped: float
    dhidden_error: float
    """Frobenius norm of the error relative to that of the gradient."""
    dweight_error: float


def read_states(model_path: Path, files: list[Path], tokens: int) -> States:
    """The first `tokens` tokens of traces, one trace from each file in turn."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    sources = [hidden_states(model, file, model_path) for file in files]
    parts: list[tuple[Tensor, Tensor]] = []
    while sum(len(targets) for _, targets in parts) < tokens:
        parts.append(next(sources[len(parts) % len(sources)]))
        print(f"{sum(len(targets) for _, targets in parts)} of {tokens} tokens", end="\r")
    hidden, targets = (torch.cat(tensors)[:tokens] for tensors in zip(*parts, strict=True))
    lengths = [len(targets) for _, targets in parts]
    lengths[-1] -= sum(lengths) - tokens
    weight = model.lm_head.weight.detach()
    return States(hidden.bfloat16().float(), weight.bfloat16().float(), targets, lengths)


def orders(states: States) -> dict[str, Tensor]:
    """[V] int64 by name: columns, those expected to be likely first."""
    vocab = len(states.weight)
    everything = torch.zeros(vocab)
    for x in states.hidden.split(ROWS):
        everything += (x @ states.weight.T).softmax(1).sum(0)
    counts = torch.bincount(states.targets, minlength=vocab)
    return {
        "none": torch.arange(vocab),
        "counts of the targets": counts.argsort(descending=True, stable=True),
        "a sample's mean probability": vocabulary_order(
            states.hidden, torch.arange(len(states.hidden)), states.weight
        ),
        "all tokens' mean probability": everything.argsort(descending=True, stable=True),
    }


def lines(states: States) -> Iterator[Line]:
    """The lines of the table; every second trace counts as incorrect, with weight -alpha."""
    hidden, weight, targets = states.hidden, states.weight, states.targets
    signs = torch.cat(
        [torch.full((n,), (1.0, -ALPHA)[i % 2]) for i, n in enumerate(states.lengths)]
    )[:, None]
    probabilities = (hidden @ weight.T).softmax(1)
    dz = (probabilities * signs).scatter_add_(1, targets[:, None], -signs)
    norms = float((dz @ weight).norm()), float((dz.T @ hidden).norm())
    del dz
    ones = torch.ones(len(targets))
    for name, order in orders(states).items():
        ordered, place = probabilities[:, order], order.argsort()[targets]
        padded = torch.nn.functional.pad(ordered, (0, -len(weight) % COLUMNS))
        tiled = padded.view(len(hidden), -1, COLUMNS)
        held = {"sum": tiled.sum(2), "largest": tiled.amax(2)}
        for rule, values in held.items():
            for epsilon in EPSILONS:
                # One rule for both: what a tile holds is compared with epsilon.
                tiles = TileSums(values, ones, ROWS, COLUMNS)
                kept, _ = kept_tiles(tiles, place, ones > 0, epsilon)
                rows = kept.kept.repeat_interleave(ROWS, 0)[: len(hidden)]
                dropped = torch.where(rows, 0.0, held["sum"]).sum(1)
                keep = rows.repeat_interleave(COLUMNS, 1)[:, : len(weight)]
                missing = torch.where(keep, 0.0, ordered).mul_(signs)
                yield Line(
                    name,
                    rule,
                    epsilon,
                    float(kept.kept.float().mean()),
                    float(dropped.mean()),
                    float(dropped.max()),
                    float((missing @ weight[order]).norm()) / norms[0],
                    float((missing.T @ hidden).norm()) / norms[1],
                )


def draw(found: list[Line], path: Path) -> bool:
    """dX's error against the share of live tiles, a curve an order; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    names = list(dict.fromkeys(line.order for line in found))
    for name, colour in zip(names, ("#999999", OTHERS, OURS, "#009E73"), strict=True):
        for rule, style in (("sum", "o-"), ("largest", "x:")):
            points = [line for line in found if (line.order, line.rule) == (name, rule)]
            axes.plot(
                [line.live for line in points],
                [line.dhidden_error for line in points],
                style,
                color=colour,
                label=f"{name}, {rule}",
            )
    axes.set_xlabel("share of tiles that take part")
    axes.set_ylabel("error of dX, relative")
    axes.legend(fontsize="small", title="order of the vocabulary, rule")
    figure.savefig(path, dpi=150)
    return True


def main() -> None:
    """Run the model, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.filter", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("model", type=Path, help="folder written by redi.bench.models")
    parser.add_argument("traces", type=Path, nargs="+", help="files of traces")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--states", type=Path, help="write the states here, safetensors")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    options = parser.parse_args()
    states = read_states(options.model, options.traces, options.tokens)
    if options.states:
        from safetensors.torch import save_file

        save_file(
            {
                "hidden": states.hidden.bfloat16(),
                "weight": states.weight.bfloat16(),
                "targets": states.targets,
                "lengths": torch.tensor(states.lengths),
            },
            options.states,
        )
    print(f"{'order':30}{'rule':9}{'epsilon':>8}{'live':>7}{'left out':>10}{'dX':>9}{'dW':>9}")
    found = []
    for line in lines(states):
        found.append(line)
        print(
            f"{line.order:30}{line.rule:9}{f'2^{math.log2(line.epsilon):.0f}':>8}{line.live:7.3f}"
            f"{line.dropped:10.1e}{line.dhidden_error:9.1e}{line.dweight_error:9.1e}"
        )
    record: dict[str, Any] = {
        "benchmark": "filter",
        "date": date.today().isoformat(),
        **environment("cpu"),
        "traces": [file.name for file in options.traces],
        "tokens": options.tokens,
        "vocab": len(states.weight),
        "hidden": states.hidden.shape[1],
        "tile": [ROWS, COLUMNS],
        "lines": [asdict(line) for line in found],
    }
    path = options.out / f"filter-{options.model.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(found, path.with_suffix(".png"))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
