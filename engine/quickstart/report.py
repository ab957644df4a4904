"""Report of the quickstart: a table and a picture of its models on held-out problems.

Results are printed whatever they are. The control (stage 2 on correct traces only) separates a gain
of REDI from a gain of longer training.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from redi.engine.commands.report import COLOURS, read_run
from redi.engine.console import Console, print_table
from redi.engine.errors import InputError
from redi.engine.generation.scoring import mean_and_error, paired_difference
from redi.engine.quickstart.task import BLANK, DIGITS, is_correct
from redi.engine.train.run_folder import is_finished

MODELS = {"SFT": "sft", "control": "control", "REDI": "redi", "SFT+SimPER": "sft-simper"}
"""Name in the table -> run directory. All but the first continue from SFT, the control with
alpha = 0."""
TEMPERATURE = 0.7
SAMPLES = 4
SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Sample:
    """One generated trace."""

    text: str
    correct: bool


@dataclass(frozen=True)
class ModelResults:
    """Results of one model on the held-out problems."""

    sampled: list[float]
    """Per problem: fraction of correct traces among SAMPLES drawn at TEMPERATURE."""
    greedy: list[float]
    """Per problem: 1.0 if the greedy trace is correct, else 0.0."""
    blank_share: float
    """Fraction of blank boxes among the optional boxes of the sampled traces."""
    positive_logp: float
    """Mean log-prob per token of held-out correct traces, from the run's last evaluation."""
    negative_logp: float
    """The same for incorrect traces."""
    first_samples: list[Sample]
    """First sample of each of SHOWN_PROBLEMS problems."""


def report_quickstart(folder: Path) -> dict[str, ModelResults]:
    """Measure the models in `folder`, print a table and samples, draw quickstart.png there.

    Raises:
        InputError: a model is missing.
    """
    for run in MODELS.values():
        if not is_finished(folder / run):
            raise InputError(f"{folder / run}: no trained model; run `make train` first")
    problems = [json.loads(line)["prompt"] for line in (folder / "test.jsonl").open()]
    found = {}
    for name, run in MODELS.items():
        Console().say(f"{name}: generating traces of {len(problems)} held-out problems")
        found[name] = measure_model(folder / run, problems)
    print_table(*table(found), file=sys.stdout)
    print("\n".join([*shown_samples(problems, found), "", *conclusions(found)]))
    (folder / "quickstart.json").write_text(
        json.dumps({name: asdict(one) for name, one in found.items()}, indent=1) + "\n"
    )
    draw_quickstart(folder, found, folder / "quickstart.png")
    print(f"Picture: {folder / 'quickstart.png'}; figures: {folder / 'quickstart.json'}")
    return found


def measure_model(run_dir: Path, problems: list[str]) -> ModelResults:
    """Generate and check traces of a run's exported model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    from redi.engine.generation.generate import Sampling, generate

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")

    def traces(temperature: float, samples: int) -> list[list[Sample]]:
        sampling = Sampling(max_new_tokens=DIGITS + 1, temperature=temperature)
        done = generate(model, tokenizer, problems, sampling, samples=samples, batch_size=500)
        return [
            [Sample(one.text, is_correct(problem, one.text)) for one in completions]
            for problem, completions in zip(problems, done, strict=True)
        ]

    sampled, greedy = traces(TEMPERATURE, SAMPLES), traces(0.0, 1)
    last = read_run(run_dir).held_out[-1]
    boxes = "".join(one.text[: DIGITS - 2] for group in sampled for one in group)
    return ModelResults(
        sampled=[statistics.fmean(one.correct for one in group) for group in sampled],
        greedy=[float(group[0].correct) for group in greedy],
        blank_share=boxes.count(BLANK) / max(1, len(boxes)),
        positive_logp=last["positive_logp"],
        negative_logp=last["negative_logp"],
        first_samples=[group[0] for group in sampled[:SHOWN_PROBLEMS]],
    )


def table(found: dict[str, ModelResults]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of the table; accuracies with standard errors over problems."""
    problems = len(next(iter(found.values())).greedy)
    title = f"{problems} held-out problems, {SAMPLES} samples of each"
    columns = [
        "",
        f"sampled, T = {TEMPERATURE}",
        "greedy",
        "blank boxes",
        "log-prob of correct",
        "of incorrect",
    ]
    rows = [
        [
            name,
            _percent(*mean_and_error(one.sampled)),
            _percent(*mean_and_error(one.greedy)),
            f"{one.blank_share:.0%}",
            f"{one.positive_logp:.2f}",
            f"{one.negative_logp:.2f}",
        ]
        for name, one in found.items()
    ]
    return title, columns, rows


def shown_samples(problems: list[str], found: dict[str, ModelResults]) -> list[str]:
    """Lines with sampled traces of the same problems before and after REDI."""

    def mark(sample: Sample) -> str:
        return f"{sample.text} {'right' if sample.correct else 'wrong'}"

    lines = ["", "The same problems before and after REDI:"]
    for number, problem in enumerate(problems[:SHOWN_PROBLEMS]):
        before, after = (found[name].first_samples[number] for name in ("SFT", "REDI"))
        lines.append(f"  {problem}  {mark(before):16}->  {mark(after)}")
    return lines


def conclusions(found: dict[str, ModelResults]) -> list[str]:
    """Lines that interpret the figures and state their limits."""
    redi, control = found["REDI"], found["control"]
    sampled = _percent(*paired_difference(redi.sampled, control.sampled), sign="+")
    greedy = _percent(*paired_difference(redi.greedy, control.greedy), sign="+")
    change = redi.positive_logp - control.positive_logp
    return [
        f"REDI against the control, problem by problem: {sampled} sampled, {greedy} greedy.",
        f"The log-prob of correct traces is {change:+.2f} relative to the control: lowering the",
        "probability of incorrect traces also moves similar correct ones. The teacher is",
        "synthetic, with a habit planted for this demonstration: real traces may differ.",
    ]


def _percent(mean: float, error: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} ± {100 * error:.1f} %"


def draw_quickstart(folder: Path, found: dict[str, ModelResults], path: Path) -> None:
    """Draw accuracies and held-out log-probs, a panel each, legible at half size."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = dict(zip(MODELS, ("#7f7f7f", *COLOURS), strict=False))
    with rc_context({"font.size": 15}):
        figure = Figure(figsize=(12, 5), layout="constrained")
        accuracy, logps = figure.subplots(1, 2)
        for place, (name, one) in enumerate(found.items()):
            for shift, values, hatch in ((-0.2, one.sampled, ""), (0.2, one.greedy, "//")):
                mean, error = mean_and_error(values)
                bar = {"color": colours[name], "hatch": hatch, "alpha": 0.7}
                accuracy.bar(place + shift, mean, 0.36, yerr=error, **bar)
                accuracy.text(place + shift, mean + error + 0.015, f"{mean:.0%}", ha="center")
        accuracy.set_xticks(range(len(found)), found)
        accuracy.set_ylim(0, 1.1)
        accuracy.set_title(f"Problems solved: T = {TEMPERATURE}, greedy (hatched)")

        for name in ("control", "REDI"):
            events = read_run(folder / MODELS[name]).held_out
            steps = [event["step"] for event in events]
            for sign, kind, style in (
                ("positive", "correct", "-"),
                ("negative", "incorrect", "--"),
            ):
                values = [event[f"{sign}_logp"] for event in events]
                logps.plot(steps, values, style, color=colours[name], linewidth=2.5)
                logps.annotate(
                    f"{name},\n{kind}",
                    (steps[-1], values[-1]),
                    xytext=(8, 0),
                    textcoords="offset points",
                    va="center",
                    color=colours[name],
                )
        logps.set_title("Mean log-prob of held-out traces")
        logps.set_xlabel("step of stage 2")
        logps.margins(x=0.02, y=0.1)
        for axes in (accuracy, logps):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=100)
