"""`[eval] samples`: held-out completions with verdicts, made while training runs.

The weights are exported to a temporary folder, and a process of low priority generates from them on
rank 0's CPU, so that training loses the time of the export and nothing on its devices. There is one
such process at a time: an evaluation while it still runs is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from redi.engine.config.sections import Recipe
from redi.engine.console import Console
from redi.engine.data.problems import read_problems
from redi.engine.distributed import START_TIMEOUT, World
from redi.engine.model.export import export
from redi.engine.model.sharding import compute_dtype
from redi.engine.model.student import Student
from redi.engine.train.generation_accuracy import HeldOutProblems
from redi.engine.train.metrics import MetricsLog
from redi.engine.train.signals import StopRequest

SAMPLES = "samples.jsonl"
"""File of the run folder: the lines of `redi evaluate` with the step."""
FOLDER = "samples.partial"
"""Folder of the run folder for the export and the process's files; never uploaded."""
FINAL_SECONDS = 300.0
"""Most seconds that a finished run waits for its last samples."""
TEMPERATURE, TOP_P = 0.6, 0.95
"""As in the paper's evaluation."""
SHARE_OF_CORES = 4
"""The process uses one of so many cores."""
POLL_SECONDS = 0.1
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


class HeldOutSamples:
    """Samples of the student on held-out problems. Rank 0 runs the process.

    Args:
        recipe: `[eval] samples` is how many; 0: none.
        problems: `[eval] path`; None without a checker, and then there are no samples.
        student: sharded; exported at each evaluation.
        run_dir: its samples.jsonl keeps the steps before `done`, whose evaluation is repeated.
        done: the step after which the run resumes.
        metrics: gets a line per evaluation, and its trackers the samples.
    """

    def __init__(
        self,
        recipe: Recipe,
        problems: HeldOutProblems | None,
        student: Student,
        run_dir: Path,
        done: int,
        metrics: MetricsLog,
        world: World,
        console: Console,
    ) -> None:
        self._problems = problems if recipe.eval.samples else None
        self._recipe, self._student, self._metrics = recipe, student, metrics
        self._world, self._console = world, console
        self._file, self._folder = run_dir / SAMPLES, run_dir / FOLDER
        self._process: subprocess.Popen[bytes] | None = None
        self._step = -1  # of the last export
        self._dtype = compute_dtype(recipe.train.dtype, world.device)
        self._bytes = self._dtype.itemsize * sum(p.numel() for p in student.parameters())
        if self._problems is not None and world.is_main:
            self._cut(done)

    def start(self, step: int) -> None:
        """Export the weights after `step` and start to generate. Collective.

        Skipped while an earlier process runs, or without room on the disk for the export.
        """
        if self._problems is None:
            return
        if self._world.from_rank0(lambda: self._is_free(step)):
            weights = self._folder / "export"
            export(self._student, self._problems.tokenizer, weights, self._dtype, self._world)
            # A rank that sees the files later waits for them: they must not be removed before.
            self._world.any_rank(False)
            self._step = step
            if self._world.is_main:
                self._process = self._start(weights)

    def collect(self) -> None:
        """Write the samples of a process that has finished; does not wait for one that has not."""
        if self._process is None or self._process.poll() is None:
            return
        code = self._process.returncode
        self._process = None
        try:
            if code:
                log = (
                    (self._folder / "log").read_text(encoding="utf-8", errors="replace").split("\n")
                )
                why = next((line for line in reversed(log) if line.strip()), f"exit code {code}")
                self._console.warn(f"samples after step {self._step}: none: {why.strip()}")
                return
            self._write(self._folder / "evaluation" / SAMPLES)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def finish(self, total: int, stop: StopRequest) -> None:
        """Wait for the samples after the last step, at most FINAL_SECONDS. Collective."""
        if self._problems is None:
            return
        deadline = time.monotonic() + FINAL_SECONDS
        with self._world.timeout(START_TIMEOUT):
            self._wait(deadline, stop)
            if self._step != total and not self._world.any_rank(stop.requested):
                self.start(total)
                self._wait(deadline, stop)

    def close(self) -> None:
        """End the process; what it has not finished is lost."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # and those that check answers
            self._process.wait()
            self._process = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def _wait(self, deadline: float, stop: StopRequest) -> None:
        """Wait on rank 0, while the others wait for it."""

        def wait() -> None:
            process = self._process
            if process is not None:
                self._console.say(
                    f"waits for the samples after step {self._step}, at most "
                    f"{FINAL_SECONDS:.0f} s; Ctrl-C leaves them out"
                )
                while process.poll() is None:
                    if stop.requested or time.monotonic() > deadline:
                        self._console.warn(f"samples after step {self._step}: left out, too slow")
                        self.close()
                        return
                    time.sleep(POLL_SECONDS)
            self.collect()

        self._world.from_rank0(wait)

    def _cut(self, done: int) -> None:
        """Remove an earlier attempt's folder, and its samples from `done` on."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._file.exists():
            kept = []
            for text in self._file.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    if json.loads(text)["step"] < done:
                        kept.append(text)
                except ValueError:
                    break  # an incomplete line is always the last
            partial = self._file.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, self._file)

    def _is_free(self, step: int) -> bool:
        """Whether to sample after `step`; says why not."""
        self.collect()
        why = None
        if self._process is not None:
            why = f"those after step {self._step} are still being generated"
        elif (free := shutil.disk_usage(self._file.parent).free) < 1.1 * self._bytes:
            why = f"{free / 1e9:.1f} GB of disk are free, the export has {self._bytes / 1e9:.1f} GB"
        if why:
            self._console.say(f"samples after step {step}: skipped, {why}")
        return why is None

    def _start(self, weights: Path) -> subprocess.Popen[bytes]:
        """Start to generate from an export."""
        assert self._problems is not None
        recipe, problems = self._recipe, self._problems
        data = self._folder / "problems.jsonl"
        with data.open("w", encoding="utf-8") as file:
            for one in read_problems(recipe.eval.paths, recipe.eval.samples)[: recipe.eval.samples]:
                row = asdict(one)  # of messages: as dicts
                file.write(json.dumps({k: row[k] for k in ("id", "prompt", "answer")}) + "\n")
        options = {
            "model": str(weights),
            "data": [str(data)],
            "out": str(self._folder / "evaluation"),
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "max_new_tokens": problems.new_tokens(self._student.model.config),
            "checker": problems.checker,
            "answer_pattern": problems.answer_pattern,
            "template": recipe.data.template,
            "system_prompt": recipe.data.system_prompt,
            "template_variables": recipe.data.template_variables,
            "batch_size": problems.batch_size,
            "judges": 1,
            "engine": "transformers",
            "device": "cpu",
            "dtype": str(self._dtype).removeprefix("torch."),
            "quiet": True,
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith(_OF_TORCHRUN)}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        mine = {
            "OMP_NUM_THREADS": str(max(1, (cores or 1) // SHARE_OF_CORES)),
            "CUDA_VISIBLE_DEVICES": "",
            "REDI_CACHE": str(recipe.data.cache_dir),
        }
        line = [sys.executable, "-m", "redi.engine.train.sampling_process", json.dumps(options)]
        with (self._folder / "log").open("wb") as log:
            return subprocess.Popen(
                line,
                stdin=subprocess.PIPE,  # closed by the kernel when this process ends
                stdout=log,
                stderr=log,
                env=kept | mine,
                start_new_session=True,  # no Ctrl-C of the terminal
            )

    def _write(self, path: Path) -> None:
        """Append the samples to the run's file, and log them."""
        with path.open(encoding="utf-8") as file:
            lines = sorted(map(json.loads, file), key=lambda line: line["problem"])
        for line in lines:
            line["step"] = self._step
            line["traces"][0]["teacher"] = f"{self._file.parent.name} step {self._step}"
        with self._file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        correct = [line["traces"][0]["correct"] for line in lines]
        figures = {
            "accuracy": fmean(correct),
            "truncated": fmean(not line["ended"] for line in lines),
            "tokens": fmean(line["tokens"] for line in lines),
        }
        self._metrics.write({"event": "samples", "step": self._step, **figures})
        self._console.say(
            f"samples after step {self._step}: {sum(correct)} of {len(lines)} right; {self._file}"
        )
        try:
            self._metrics.write_samples(self._step, lines)
        except Exception as error:  # each tracker has other types; a server's must not end a run
            problem = " ".join(str(error).split())
            self._console.warn(f"samples after step {self._step}: not in the trackers: {problem}")
