"""How a trained model's logits are distributed, measured on SmolLM2-135M over real traces.

    python -m redi.bench.models smollm2 runs/smollm2
    python -m redi.bench.hidden_statistics runs/smollm2 ../shared/data/*gsm8k*

writes `smollm2_hidden.json` beside this file, from which `redi.bench.inputs` makes operands of any
size. The completions of some traces of each file go through the model and its lm_head, a few
minutes on a CPU. Of a random sample of their tokens it records the log-probs of the target and of
its strongest competitors, what is left for all other tokens (the bulk), and the mean and standard
deviation of the bulk's logits; of all tokens quantiles, against which tests hold the operands made
from the sample. The engine's dependencies are needed.
"""

import argparse
import json
import random
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redi.bench.inputs import COMPETITORS, STATISTICS, logit_summary

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MAX_TOKENS = 1024
"""Of a trace; what comes after is left out, so that a few long ones do not outweigh the rest."""


def describe(hidden: Tensor, weight: Tensor, targets: Tensor, sample: int) -> dict[str, Any]:
    """Quantiles over all tokens, and the tokens of a random sample one by one.

    Args:
        hidden: [N, D] float32, what enters the lm_head.
        weight: [V, D] float32, the lm_head.
        targets: [N] int64.
        sample: tokens to record one by one.
    """
    summaries, rows = [], []
    for x, y in zip(hidden.split(512), targets.split(512), strict=True):
        logits = x @ weight.T
        summaries.append(logit_summary(logits, y))
        rows.append(_sample_rows(logits, y))
    norms = {"hidden_norm": hidden.norm(dim=1)}
    columns = {key: torch.cat([one[key] for one in summaries]) for key in summaries[0]} | norms
    levels = torch.tensor(QUANTILES, dtype=hidden.dtype)
    chosen = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))[:sample]
    return {
        "vocab": len(weight),
        "hidden": weight.shape[1],
        "tokens": len(hidden),
        "weight_row_norm": _rounded(weight.norm(dim=1).square().mean().sqrt().item()),
        "quantile_levels": QUANTILES,
        "quantiles": {
            key: [_rounded(value) for value in torch.quantile(values, levels).tolist()]
            for key, values in columns.items()
        },
        "sample_columns": [
            "bulk logits' mean",
            "bulk logits' standard deviation",
            "log of the bulk's probability",
            "target's log-prob",
            *(f"log-prob of competitor {n + 1}" for n in range(COMPETITORS)),
        ],
        "sample": [[_rounded(v) for v in row] for row in torch.cat(rows)[chosen].tolist()],
    }


def _sample_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """[n, 4 + COMPETITORS]: the columns that `describe` names."""
    logps = logits.log_softmax(-1)
    target_logps = logps.gather(1, targets[:, None])
    logps.scatter_(1, targets[:, None], -torch.inf)
    top, where = logps.topk(COMPETITORS)
    logps.scatter_(1, where, -torch.inf)
    bulk = logits[torch.isfinite(logps)].view(len(logits), -1)
    return torch.cat(
        [
            bulk.mean(1, keepdim=True),
            bulk.std(1, keepdim=True),
            logps.logsumexp(1, keepdim=True),
            target_logps,
            top,
        ],
        1,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def hidden_states(model: Any, file: Path, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """(hidden, targets) of one random trace's completion for each problem, in random order."""
    from redi.engine.data.rows import read_rows
    from redi.engine.data.text import Encoder, TokenSettings
    from redi.engine.data.traces import normalise

    encoder = Encoder(TokenSettings((str(file),), "auto", "chat", None, str(folder)))
    chance = random.Random(0)
    rows = list(read_rows([str(file)], "auto"))
    chance.shuffle(rows)
    for row in rows:
        trace = chance.choice(normalise(row))
        (encoded,) = encoder.encode([trace], encoder.texts([trace]))
        ids = torch.from_numpy(encoded.ids[:MAX_TOKENS]).long()
        with torch.no_grad():
            states = model.model(input_ids=ids[None]).last_hidden_state[0]
        start = encoded.prompt_length
        yield states[start - 1 : -1], ids[start:]


def main() -> None:
    """Run the model over the traces and write the statistics."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.hidden_statistics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="folder that redi.bench.models wrote")
    parser.add_argument("traces", type=Path, nargs="+", help="files of traces")
    parser.add_argument("--traces_per_file", type=int, default=20)
    parser.add_argument("--sample", type=int, default=1024, help="tokens recorded one by one")
    parser.add_argument("--out", type=Path, default=STATISTICS)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    parts = [
        part
        for file in args.traces
        for part in islice(hidden_states(model, file, args.model), args.traces_per_file)
    ]
    hidden, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    record = {
        "model": "SmolLM2-135M-Instruct",
        "traces": [file.name for file in args.traces],
        "date": date.today().isoformat(),
        **describe(hidden, model.lm_head.weight.detach(), targets, args.sample),
    }
    lines = ",\n".join(json.dumps(row) for row in record.pop("sample"))
    head = json.dumps(record, indent=1).removesuffix("\n}")
    args.out.write_text(f'{head},\n "sample": [\n{lines}\n]\n}}\n', encoding="utf-8")
    print(f"{len(hidden)} tokens, {args.out.stat().st_size // 1024} KiB written to {args.out}")


if __name__ == "__main__":
    main()
