"""trackio and MLflow, the real libraries with local stores, in an environment of this test.

They bring 40 packages that nothing else in the tests needs.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redi.engine.cli import main

PACKAGES = ("alembic", "mlflow-skinny", "sqlalchemy", "trackio")
READ = """
import json, pathlib
from mlflow.tracking import MlflowClient
from trackio.sqlite_storage import SQLiteStorage

client = MlflowClient()
experiment = client.get_experiment_by_name("redi").experiment_id
(run,) = client.search_runs([experiment])
history = client.get_metric_history(run.info.run_id, "train/loss")
tables = client.download_artifacts(run.info.run_id, "samples")
(name,) = SQLiteStorage.get_runs("redi")
print(json.dumps({
    "status": run.info.status,
    "name": run.info.run_name,
    "alpha": run.data.params["objective.alpha"],
    "mlflow": {one.step: one.value for one in history},
    "tables": {file.stem: json.loads(file.read_text()) for file in pathlib.Path(tables).iterdir()},
    "trackio": SQLiteStorage.get_logs("redi", name),
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has this one's packages, MLflow's client and trackio."""
    folder = tmp_path_factory.mktemp("trackers")
    venv.create(folder, with_pip=True)
    here = sysconfig.get_path("purelib")
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(packages) / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    executable = folder / "bin" / "python"
    line = [executable, "-m", "pip", "install", "--quiet", *PACKAGES]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return executable


@pytest.mark.slow
def test_trackio_and_mlflow_hold_the_figures_and_samples_of_a_resumed_run(
    recipe: Callable[..., Path],
    steps: Callable[[Path], list[dict[str, Any]]],
    python: Path,
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"{n}=", "chosen": "1", "rejected": "2", "answer": "1"} for n in range(4)]
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "run.trackers": ["trackio", "mlflow"],
        "eval.path": str(test),
        "eval.checker": "exact",
        "eval.every": 2,
        "eval.max_new_tokens": 4,
        "eval.samples": 2,
        "optim.schedule": "constant",
    }
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [python, *map(str, arguments)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for most in (2, 4):
        path = recipe("run", changes | {"train.max_steps": most})
        assert run("-m", "redi.engine.cli", "train", path) == ""
    found = json.loads(run("-c", READ).splitlines()[-1])
    losses = {str(line["step"]): line["loss"] for line in steps(tmp_path / "run")}
    assert list(losses) == ["1", "2", "3", "4"]
    assert (found["status"], found["name"], found["alpha"]) == ("FINISHED", "run", "0.8")
    assert found["mlflow"] == losses
    logged = {
        str(line["step"]): line["train/loss"] for line in found["trackio"] if "train/loss" in line
    }
    assert logged == losses
    written = [
        [line["step"], line["traces"][0]["text"], line["traces"][0]["correct"]]
        for line in map(json.loads, (tmp_path / "run" / "samples.jsonl").open())
    ]
    assert {line[0] for line in written} == {0, 2, 4}
    for step in (0, 2, 4):
        table = found["tables"][f"step-{step}"]
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert [[step, row["completion"], row["correct"]] for row in rows] == [
            line for line in written if line[0] == step
        ]
    tables = [line["samples"]["_value"] for line in found["trackio"] if "samples" in line]
    assert [row["completion"] for row in tables[-1]] == [line[1] for line in written[-2:]]


def test_a_tracker_that_cannot_start_is_one_line(
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A package that fails as wandb without a key, or MLflow without its server.
    package = tmp_path / "mlflow"
    package.mkdir()
    (package / "__init__.py").write_text("raise ConnectionError('no server\\nanswers')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    path = recipe("run", {"run.trackers": ["mlflow"], "train.max_steps": 1})
    assert main(["train", str(path), "--quiet"]) == 2
    assert capsys.readouterr().err == (
        "redi: run.trackers: mlflow cannot start: no server answers\n"
    )
