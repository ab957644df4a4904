"""Runs on object storage: memory:// and file:// in place of a bucket, and a local S3 server."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import Run, free_port, ranks
from run_cases import untimed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from redi.engine import storage
from redi.engine.cli import main
from redi.engine.errors import InputError
from redi.engine.storage import BucketRun, fetch_model, url_of, working_folder

WriteRecipe = Callable[..., Path]

STEPS = 8
SETTINGS = {"train.max_steps": STEPS, "run.save_every": 2, "train.row_tokens": 128}


@pytest.fixture(scope="module")
def local(write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run on this machine."""
    folder = tmp_path_factory.mktemp("local")
    assert main(["train", str(write_recipe(folder, "run", SETTINGS))]) == 0
    return folder / "run"


@pytest.fixture
def memory() -> Iterator[str]:
    """A bucket in this process."""
    yield "memory://bucket"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """A bucket of a local S3 server, which this process and its children can use."""
    pytest.importorskip("s3fs", reason="needs the extra `storage`")
    server = pytest.importorskip("moto.server", reason="needs moto[server]")
    port = free_port()
    running = server.ThreadedMotoServer(port=port, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
        yield "s3://bucket"
    running.stop()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path) -> str:
    """A folder in the bucket for one test."""
    return f"{s3_server}/{tmp_path.name}"


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest) -> str:
    """A folder in a bucket of each kind."""
    return request.getfixturevalue(request.param)


def s3_client() -> dict[str, str]:
    """The settings of the S3 client, for runs: their server started with another environment."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def names(url: str) -> set[str]:
    """The files of a folder in a bucket, relative to it."""
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {path[len(root) :].lstrip("/") for path in fs.find(root)}


def text(url: str) -> str:
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return fs.cat_file(path).decode()


def steps(lines: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in lines.splitlines()]
    return untimed(line for line in found if "loss" in line)


def assert_same(url: str, local: Path, cache: Path) -> None:
    """The run in the bucket gave what the local one gave: metrics and weights."""
    assert steps(text(f"{url}/metrics.jsonl")) == steps((local / "metrics.jsonl").read_text())
    folder = Path(fetch_model(f"{url}/export", cache, "model.path"))
    weights, expected = (load_file(d / "model.safetensors") for d in (folder, local / "export"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_an_adapter_in_a_bucket_is_continued_scored_and_evaluated(
    recipe: WriteRecipe, memory: str, tmp_path: Path, world: Path
) -> None:
    """Its model is there too."""
    for file in (world / "model").iterdir():
        fsspec.filesystem("memory").pipe_file(f"bucket/model/{file.name}", file.read_bytes())
    settings = SETTINGS | {"adapter.rank": 4, "data.cache": str(tmp_path / "cache")}
    first = settings | {"model.path": f"{memory}/model", "run.dir": f"{memory}/first"}
    second = settings | {"model.path": None, "run.dir": f"{memory}/second"}
    paths = [str(recipe("first", first)), str(recipe("second", second))]
    assert main(["train", *paths]) == 0
    assert "adapter_config.json" in names(f"{memory}/second/export")
    assert f'path = "{memory}/first/export"' in text(f"{memory}/second/recipe.toml")
    assert main(["train", *paths]) == 0  # finished already
    data = tmp_path / "problems.jsonl"
    data.write_text('{"prompt": "12=", "answer": "1"}\n')
    out = ["--data", str(data), "--out", str(tmp_path / "out"), "--answer_pattern", "(.)$"]
    assert main(["evaluate", f"{memory}/second", *out, "--max_new_tokens", "4"]) == 0


def test_a_run_in_a_bucket_equals_a_local_one_and_is_found_finished_on_another_machine(
    recipe: WriteRecipe,
    local: Path,
    bucket: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, cache = f"{bucket}/runs/redi", tmp_path / "cache"
    path = recipe("run", SETTINGS | {"run.dir": url, "data.cache": str(cache)})
    assert main(["train", str(path)]) == 0
    assert f"done; the model is in {url}/export" in " ".join(capsys.readouterr().err.split())
    assert_same(url, local, tmp_path / "elsewhere")
    found = names(url)
    assert {"recipe.toml", "manifest.json", "metrics.jsonl", "export/config.json"} <= found
    kept = {name.split("/")[1] for name in found if name.startswith("checkpoints/")}
    assert kept == {f"step-{STEPS - 2}", f"step-{STEPS}"}
    assert not [name for name in found if "partial" in name or "probe" in name or "fetched" in name]
    assert f'dir = "{url}"' in text(f"{url}/recipe.toml")
    folder = working_folder(url, cache)
    assert url_of(folder) == url
    assert not (folder / "checkpoints").exists(), "checkpoints are written to the bucket itself"
    shutil.rmtree(cache)
    assert main(["train", str(path)]) == 0
    assert "finished already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_second_recipe_starts_from_the_export_in_the_bucket_also_on_another_machine(
    recipe: WriteRecipe, local: Path, memory: str, tmp_path: Path
) -> None:
    changes = SETTINGS | {"data.cache": str(tmp_path / "cache"), "train.max_steps": 2}
    first = recipe("sft", changes | {"run.dir": f"{memory}/sft"})
    second = recipe("redi", changes | {"run.dir": f"{memory}/redi", "model.path": None})
    assert main(["train", str(first), str(second)]) == 0
    assert f'path = "{memory}/sft/export"' in text(f"{memory}/redi/recipe.toml")
    shutil.rmtree(tmp_path / "cache")
    third = recipe(
        "third", changes | {"run.dir": f"{memory}/third/", "model.path": f"{memory}/sft/export"}
    )
    assert main(["plan", str(third)]) == 0
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "a plan needs no weights"
    assert main(["train", str(third)]) == 0
    one, other = (
        text(f"{memory}/{name}/metrics.jsonl") for name in ("redi", "third")
    )  # trained from the same weights
    assert steps(one) == steps(other)


@pytest.mark.slow
def test_more_steps_replace_the_export_and_a_damaged_checkpoint_is_passed_over(
    recipe: WriteRecipe,
    local: Path,
    memory: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, changes = f"{memory}/run", SETTINGS | {"data.cache": str(tmp_path / "cache")}
    constant = {"optim.schedule": "constant", "optim.warmup": 0}
    changes |= {"run.dir": url} | constant
    straight = recipe("straight", changes | {"run.dir": str(tmp_path / "straight")})
    assert main(["train", str(straight)]) == 0
    path = recipe("run", changes)
    assert main(["train", str(path), "--train.max_steps", "6"]) == 0
    fs = fsspec.filesystem("memory")
    (shard,) = (f for f in fs.find("/bucket/run/checkpoints/step-6") if f.endswith(".distcp"))
    fs.pipe_file(shard, fs.cat_file(shard)[:1000])
    capsys.readouterr()
    reads, read = [], dcp.FileSystemReader.read_metadata
    monkeypatch.setattr(
        dcp.FileSystemReader,
        "read_metadata",
        lambda reader, **options: reads.append(str(reader.path)) or read(reader, **options),
    )
    assert main(["train", str(path)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "damaged (files are missing or truncated): step 6; resuming from step 4" in said
    assert len(reads) == 3, "two at the start, one loaded"
    assert_same(url, tmp_path / "straight", tmp_path / "elsewhere")
    manifest = json.loads(text(f"{url}/manifest.json"))
    assert manifest["lengthened"] == [{"from": 6, "to": STEPS, "pending": False}]


@pytest.mark.slow
def test_report_export_and_evaluate_read_a_run_in_a_bucket_without_touching_its_files(
    recipe: WriteRecipe,
    memory: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"{memory}/runs/redi"
    changes = {"run.dir": url, "data.cache": str(tmp_path / "cache")}
    assert main(["train", str(recipe("run", SETTINGS | changes))]) == 0
    monkeypatch.setenv("REDI_CACHE", str(tmp_path / "another"))
    before = {name: text(f"{url}/{name}") for name in ("metrics.jsonl", "recipe.toml")}
    capsys.readouterr()
    assert main(["report", url]) == 0
    out = capsys.readouterr().out
    assert "log-prob of positives" in out
    assert "unfinished" not in out
    assert Path(out.splitlines()[-1]).is_file()
    assert main(["export", url, "--step", str(STEPS - 2)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{url}/export-step-{STEPS - 2}"
    folder = fetch_model(f"{url}/export-step-{STEPS - 2}", tmp_path / "third", "model.path")
    AutoModelForCausalLM.from_pretrained(folder)
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "1*2=", "answer": "2"}\n')
    for number, model in enumerate((url, f"{url}/export", f"{url}/export-step-{STEPS - 2}")):
        argv = ["evaluate", model, "--data", str(problems), "--temperature", "0"]
        assert main([*argv, "--out", str(tmp_path / f"out-{number}")]) == 0
        assert (tmp_path / f"out-{number}" / "summary.json").exists()
    assert before == {name: text(f"{url}/{name}") for name in before}
    assert main(["export", url, "--step", "1"]) == 2
    assert f"available: {STEPS - 2}, {STEPS}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket", "run.dir: s3://bucket names no folder in a bucket"),
        (
            "s5://bucket/run",
            "run.dir: s5://bucket/run: unknown protocol; use s3://, gs:// or file://",
        ),
        (
            "file:/bucket/run",
            "run.dir: file:/bucket/run: a URL has two slashes, such as s3://bucket/folder",
        ),
        (
            "wandb://bucket/run",
            "the package for wandb:// is not installed: pip install 'redi-engine[storage]'",
        ),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line(
    url: str, message: str, recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe("run", {"run.dir": url}))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_folder_of_a_bucket_that_holds_something_else_is_refused(
    recipe: WriteRecipe, memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/data/traces.jsonl", b"{}")
    assert main(["train", str(recipe("run", {"run.dir": f"{memory}/data"}))]) == 2
    assert f"{memory}/data exists and is not a run directory" in capsys.readouterr().err
    path = recipe("run", {"model.path": f"{memory}/data"})
    assert main(["train", str(path)]) == 2
    assert f"model.path: {memory}/data has no config.json" in capsys.readouterr().err


@pytest.fixture
def started(memory: str, tmp_path: Path) -> BucketRun:
    """A run whose recipe is in the bucket."""
    run = BucketRun(tmp_path / "working", f"{memory}/run")
    run.folder.mkdir()
    (run.folder / "recipe.toml").write_text("[run]")
    run.publish()
    return run


def add(run: BucketRun, *paths: str) -> None:
    for path in paths:
        (run.folder / path).parent.mkdir(exist_ok=True)
        (run.folder / path).write_text("content")


def test_files_that_vanish_or_are_not_whole_are_not_uploaded(
    started: BucketRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(started, "profile/steps-1-2.partial.gz", "wandb/log", "metrics.jsonl", "tensorboard/1")
    list_files = storage._small_files

    def then_removed(folder: Path) -> list[str]:
        names = list_files(folder)
        (folder / "tensorboard" / "1").unlink()
        return names

    monkeypatch.setattr(storage, "_small_files", then_removed)
    started.publish()
    assert names(started.url or "") == {"recipe.toml", "metrics.jsonl"}


def test_a_start_leaves_the_flight_recorders_files_that_only_this_machine_has(
    started: BucketRun,
) -> None:
    add(started, "flight-recorder/rank_0", "left.txt")
    started.fetch()
    left = {str(p.relative_to(started.folder)) for p in started.folder.rglob("*") if p.is_file()}
    assert left == {"recipe.toml", "flight-recorder/rank_0"}


def test_a_check_that_could_not_remove_its_file_does_not_block_the_next_start(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = BucketRun(tmp_path / "working", f"{memory}/run")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("delete is not allowed")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "rm", refuse)
        with pytest.raises(InputError, match="cannot be written: delete is not allowed"):
            run.check_writable()
    assert len(names(run.url or "")) == 1
    run.fetch()
    run.check_writable()
    assert not names(run.url or "")


@pytest.mark.parametrize("moment", ["downloaded", "removed"])
def test_machines_that_share_the_cache_may_fetch_a_model_at_once(
    moment: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine finishes when this one has downloaded it or has removed an older one."""
    url = f"{memory}/model"
    for name in ("config.json", "model.safetensors"):
        fsspec.filesystem("memory").pipe_file(f"/bucket/model/{name}", b"content")
    winners: list[int] = []

    def late(function: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if winners:
                return function(*arguments, **options)
            winners.append(0)
            result = None if before else function(*arguments, **options)
            folder = Path(fetch_model(url, tmp_path, "model.path"))
            winners[0] = folder.stat().st_ino
            return function(*arguments, **options) if before else result

        return call

    if moment == "downloaded":
        whole = storage._Bucket.download_all
        monkeypatch.setattr(storage._Bucket, "download_all", late(whole, before=False))
    else:
        monkeypatch.setattr(os, "replace", late(os.replace, before=True))
    folder = Path(fetch_model(url, tmp_path, "model.path"))
    assert winners == [folder.stat().st_ino], "the other machine reads it"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def killed_and_started_elsewhere(
    path: Path, url: str, cache: Path, log: Path, moment: Callable[[], bool]
) -> None:
    """Kill a run at a moment, remove all that is left on this machine, and run it again."""
    run = Run("train", path, log=log, environment=s3_client())
    run.wait_for(moment)
    run.kill()
    assert "export/config.json" not in names(url), "it was killed too late to show anything"
    shutil.rmtree(cache, ignore_errors=True)
    again = Run("train", path, log=log, environment=s3_client())
    assert again.end() == 0, again.stderr


MOMENTS = [
    "manifest.json",
    "recipe.toml",
    "checkpoints/step-2/__0_0.distcp",
    f"checkpoints/step-{STEPS}/.metadata",
    "export/model.safetensors",
]


@pytest.mark.parametrize(
    "moment",
    [
        "checkpoints/step-4/.metadata",
        *(pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS),
    ],
)
def test_killed_at_any_moment_it_ends_the_same(
    moment: str, recipe: WriteRecipe, local: Path, tmp_path: Path
) -> None:
    url, cache = f"file://{tmp_path}/bucket/runs/redi", tmp_path / "cache"
    path = recipe("run", SETTINGS | {"run.dir": url, "data.cache": str(cache)})
    file = tmp_path / "bucket" / "runs" / "redi" / moment
    killed_and_started_elsewhere(path, url, cache, tmp_path / "log", file.exists)
    assert_same(url, local, tmp_path / "elsewhere")


@pytest.mark.slow
def test_killed_in_the_middle_it_resumes_from_s3(
    recipe: WriteRecipe, local: Path, s3: str, tmp_path: Path
) -> None:
    url, cache = f"{s3}/runs/redi", tmp_path / "cache"
    path = recipe("run", SETTINGS | {"run.dir": url, "data.cache": str(cache)})
    saved = "checkpoints/step-4/.metadata"
    log = tmp_path / "log"
    killed_and_started_elsewhere(path, url, cache, log, lambda: saved in names(url))
    assert "resumes after step" in log.read_text()
    assert_same(url, local, tmp_path / "elsewhere")


@pytest.mark.slow
def test_two_machines_that_share_no_folder_train_two_stages_on_s3(
    recipe: WriteRecipe, s3: str, tmp_path: Path
) -> None:
    """Each rank has a working directory, and with it a cache, that only `redi prepare` filled."""
    changes = SETTINGS | {"train.max_steps": 4}
    apart = changes | {"data.cache": "cache"}
    stages = [
        recipe("sft", apart | {"run.dir": f"{s3}/sft"}),
        recipe("redi", apart | {"run.dir": f"{s3}/redi", "model.path": None}),
    ]
    whole = [
        recipe("sft-local", changes | {"run.dir": str(tmp_path / "sft")}),
        recipe("redi-local", changes | {"run.dir": str(tmp_path / "redi"), "model.path": None}),
    ]
    for run in ranks(2, "train", *whole, log=tmp_path / "whole-"):
        assert run.end() == 0, run.stderr

    def start(name: str, *arguments: object) -> list[subprocess.Popen[bytes]]:
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        started = []
        for rank in range(2):
            machine = tmp_path / f"machine-{rank}"
            machine.mkdir(exist_ok=True)
            group = shared | {"RANK": str(rank), "LOCAL_RANK": "0"} if name != "prepared" else {}
            with (tmp_path / f"{name}-{rank}").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "redi.engine.cli", *map(str, arguments)],
                        cwd=machine,
                        env=os.environ | group | {"OMP_NUM_THREADS": "1"},
                        stderr=log,
                    )
                )
        return started

    for process in start("prepared", "prepare", *stages):
        assert process.wait(300) == 0, (tmp_path / "prepared-0").read_text()
    killed = start("killed", "train", *stages)
    deadline = time.monotonic() + 300
    while "checkpoints/step-2/.metadata" not in names(f"{s3}/redi"):
        assert time.monotonic() < deadline, (tmp_path / "killed-0").read_text()
        assert killed[0].poll() is None, (tmp_path / "killed-0").read_text()
    for process in killed:
        process.kill()
        process.wait()
    shards = {name for name in names(f"{s3}/redi") if name.startswith("checkpoints/step-2/__")}
    assert shards == {f"checkpoints/step-2/__{rank}_0.distcp" for rank in range(2)}
    for rank in range(2):
        shutil.rmtree(working_folder(s3, tmp_path / f"machine-{rank}" / "cache"))
    for process in start("again", "train", *stages):
        assert process.wait(300) == 0, (tmp_path / "again-0").read_text()
    assert_same(f"{s3}/redi", tmp_path / "redi", tmp_path / "elsewhere")


@pytest.mark.slow
def test_s3_without_a_bucket_or_credentials_is_one_line_before_data_is_read(
    recipe: WriteRecipe, s3: str, tmp_path: Path
) -> None:
    def said(url: str, **environment: str) -> str:
        path = recipe("run", {"run.dir": url, "data.cache": str(tmp_path / "cache")})
        log = tmp_path / f"log-{len(list(tmp_path.iterdir()))}"
        run = Run("train", path, log=log, environment=s3_client() | environment)
        assert run.end() == 2, run.stderr
        (line,) = run.stderr.splitlines()
        return line

    missing = said("s3://no-such-bucket/runs/redi")
    assert missing.startswith("redi: run.dir: s3://no-such-bucket/runs/redi cannot be ")
    assert "bucket does not exist" in missing
    no_credentials = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": str(tmp_path)}
    without = said(f"{s3}/runs/redi", AWS_EC2_METADATA_DISABLED="true", **no_credentials)
    assert "Unable to locate credentials" in without
    assert not (tmp_path / "cache").exists(), "nothing was tokenized"


@pytest.mark.slow
def test_two_ranks_of_a_machine_share_one_fetched_model(
    recipe: WriteRecipe, redi: Callable[..., Any], world: Path, tmp_path: Path
) -> None:
    bucket = tmp_path / "bucket"
    shutil.copytree(world / "model", bucket / "model")
    changes = {"run.dir": f"file://{bucket}/run", "data.cache": str(tmp_path / "cache")}
    path = recipe("run", changes | {"model.path": f"file://{bucket}/model"})
    done = redi("train", path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert (bucket / "run" / "export" / "config.json").exists()
    shards = {file.name for file in (bucket / "run" / "checkpoints" / "step-4").iterdir()}
    assert shards == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    fetched = working_folder(f"file://{bucket}", tmp_path / "cache") / "model"
    assert (fetched / "model.safetensors").exists()
    assert not list(fetched.parent.glob("*.partial"))
