"""Opt-in trackers, which get a copy of metrics.jsonl and of the samples."""

from __future__ import annotations

import io
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from redi.engine.config.sections import Recipe
from redi.engine.errors import InputError


class Tracker(Protocol):
    """Receives the lines of metrics.jsonl."""

    def write(self, line: dict[str, Any]) -> None:
        """Log one line; it has the key `step`."""

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Log the lines of samples.jsonl of a step."""

    def close(self) -> None:
        """Flush and close."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError if the package of a tracker is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(
                f"run.trackers: {name} is not installed: pip install 'redi-engine[{name}]'"
            )


def open_trackers(recipe: Recipe, run_dir: Path, last_step: int) -> list[Tracker]:
    """The trackers of a recipe, whose run resumes after `last_step`."""
    makers: dict[str, Callable[[Recipe, Path, int], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WandB,
        "trackio": _Trackio,
        "mlflow": _MLflow,
    }
    trackers = []
    for name in recipe.run.trackers:
        try:
            trackers.append(makers[name](recipe, run_dir, last_step))
        except Exception as error:  # each has other types of errors, such as for its server
            problem = " ".join(str(error).split())
            raise InputError(f"run.trackers: {name} cannot start: {problem}") from error
    return trackers


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    group = line.get("event", "train")
    return {
        f"{group}/{name}": value
        for name, value in line.items()
        if isinstance(value, int | float) and name != "step"
    }


COLUMNS = ("problem", "completion", "answer", "correct", "ended", "tokens")
"""Columns of a table of samples."""


def _table(samples: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Rows of COLUMNS."""
    return [
        [
            one["rendered_prompt"],
            one["traces"][0]["text"],
            one["answer"],
            one["traces"][0]["correct"],
            one["ended"],
            one["tokens"],
        ]
        for one in samples
    ]


def _kept_id(run_dir: Path, tracker: str) -> str:
    """A name for the run that it keeps after a resume."""
    file = run_dir / f"{tracker}-id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8])
    return file.read_text()


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, recipe: Recipe, run_dir: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the last checkpoint of a killed attempt are run again: purge their values.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in _scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        for one, (problem, text, answer, correct, *_) in zip(samples, _table(samples), strict=True):
            # Indented: Markdown, which the page renders, keeps code as it is.
            parts = (problem, text, f"answer: {answer}", "right" if correct else "wrong")
            code = "\n\n---\n\n".join(
                "\n".join(f"    {line}" for line in part.splitlines()) for part in parts
            )
            self._writer.add_text(f"samples/{one['problem']}", code, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of project "redi" (or WANDB_PROJECT), the same one after a resume."""

    def __init__(self, recipe: Recipe, run_dir: Path, last_step: int) -> None:
        import wandb

        self._step = 0
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "redi"),
            name=run_dir.name,
            id=_kept_id(run_dir, "wandb"),
            resume="allow",
            dir=run_dir,
            config=asdict(recipe),
        )

    def write(self, line: dict[str, Any]) -> None:
        self._log(line["step"], _scalars(line))

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        import wandb

        self._log(step, {f"samples/step-{step}": wandb.Table(list(COLUMNS), _table(samples))})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        # It drops values of an earlier step; samples arrive steps later.
        self._step = max(self._step, step)
        self._run.log(values, step=self._step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of project "redi" (or TRACKIO_PROJECT), the same one after a resume."""

    def __init__(self, recipe: Recipe, run_dir: Path, last_step: int) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):  # stdout is for a command's result
            self._run = trackio.init(
                os.environ.get("TRACKIO_PROJECT", "redi"),
                name=f"{run_dir.name}-{_kept_id(run_dir, 'trackio')}",
                resume="allow",
                config=asdict(recipe),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, line: dict[str, Any]) -> None:
        self._run.log(_scalars(line), step=line["step"])

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        import trackio

        table = trackio.Table(columns=list(COLUMNS), data=_table(samples))
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()  # not of the run alone: it would be finished again at exit


class _MLflow:
    """A run of experiment "redi" (or MLFLOW_EXPERIMENT_NAME), the same one after a resume.

    Metrics are sent in the background: a slow server does not hold up training.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, last_step: int) -> None:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        file = run_dir / "mlflow-id"
        if file.exists():
            self._id = file.read_text()
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "redi")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
        values = {f"{s}.{k}": v for s, keys in asdict(recipe).items() for k, v in keys.items()}
        params = [Param(key, str(value)[:6000]) for key, value in values.items()]  # its limit
        self._client.log_batch(self._id, params=params)
        file.write_text(self._id)

    def write(self, line: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), line["step"]
        metrics = [Metric(name, value, now, step) for name, value in _scalars(line).items()]
        self._client.log_batch(self._id, metrics, synchronous=False)

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        # The form of its log_table, which would turn the text "048" into a number.
        table = {"columns": list(COLUMNS), "data": _table(samples)}
        self._client.log_dict(self._id, table, f"samples/step-{step}.json")

    def close(self) -> None:
        import mlflow

        mlflow.flush_async_logging()
        self._client.set_terminated(self._id)
