"""The files of a run directory may be anything: what does not fit is one line that names it."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redi.engine.cli import main
from redi.engine.errors import InputError
from redi.engine.run_files import check_run_files, read_manifest, read_recipe

FILES = ["recipe.toml", "manifest.json", "metrics.jsonl"]
PARTIAL = ["metrics.partial", "recipe.toml.partial", "manifest.json.partial"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def stopped(
    write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run that has a checkpoint and no export, and its recipe."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(folder, "run", {"train.max_steps": 1, "run.save_every": 1})
    assert main(["train", str(recipe), "--quiet"]) == 0
    shutil.rmtree(folder / "run" / "export")
    return recipe, folder / "run"


@pytest.fixture
def run(stopped: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(stopped[1], tmp_path / "run"))


def make_link(path: Path) -> None:
    """A link to a file outside of the run."""
    path.unlink(missing_ok=True)
    outside = path.parent.with_name("outside")
    outside.write_text("precious")
    path.symlink_to(outside)


def make_directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_link, make_directory, make_pipe])
@pytest.mark.parametrize("name", [*FILES[1:], *PARTIAL, "samples.jsonl", "report.html"])
def test_what_is_no_file_is_named_before_anything_is_written(
    name: str,
    make: Callable[[Path], None],
    stopped: tuple[Path, Path],
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(run / name)
    before = sorted(run.rglob("*"))
    with pytest.raises(InputError, match=f"{name}: a .*, not a regular file; remove it$"):
        check_run_files(run)
    commands = [["train", str(stopped[0]), "--run.dir", str(run)], ["export", str(run)]]
    for command in commands if make is make_link else ():
        assert main(command) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("redi: ")
        assert "run" in err
    assert sorted(run.rglob("*")) == before
    if make is make_link:
        assert run.with_name("outside").read_text() == "precious"


@pytest.mark.parametrize("name", ["checkpoints", "export"])
def test_a_directory_that_is_something_else_is_named(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).write_text("")
    with pytest.raises(InputError, match=f"{name}: a regular file, not a directory"):
        check_run_files(run)
    (run / name).unlink()
    (run / name).symlink_to(run.parent)
    with pytest.raises(InputError, match=f"{name}: a symbolic link, not a directory"):
        check_run_files(run)
    assert main(["report", str(run)]) == 2
    assert "a symbolic link, not a directory" in capsys.readouterr().err


def test_a_run_of_this_version_fits_and_so_does_a_link_to_it(run: Path, tmp_path: Path) -> None:
    (run / "wandb").mkdir()
    (run / "wandb" / "latest-run").symlink_to(run)  # as its client does
    (tmp_path / "link").symlink_to(run)
    for name in ("export.partial", "samples.partial"):  # of a command that was killed
        (run / name).mkdir()
    check_run_files(run)
    check_run_files(tmp_path / "link")
    assert read_manifest(run)["dtype"] == "float32"
    assert read_recipe(run)["train"]["max_steps"] == 1


def test_a_run_directory_that_is_a_link_to_nothing_is_named(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "nothing")
    assert main(["train", str(stopped[0]), "--run.dir", str(tmp_path / "run")]) == 2
    assert "run: a symbolic link to nothing; remove it" in capsys.readouterr().err


def damaged_manifest(whole: dict[str, Any], change: Any) -> Any:
    return whole | change if isinstance(change, dict) else change


KEYS = ["lengthened", "parts", "overview", "versions", "dtype", "attention_cost", "data", "model"]
CHANGES = JSON | st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=2)


def check_any_content(
    name: str, content: bytes, recipe: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a file of a run holds, a command succeeds or ends with one line."""
    (run / name).write_bytes(content)
    for command in (
        ["train", str(recipe), "--run.dir", str(run), "--quiet"],
        ["export", str(run)],
        ["report", str(run)],
    ):
        code = main(command)
        err = capsys.readouterr().err
        assert code in (0, 2), err
        assert "Traceback" not in err
        if code:
            assert err.splitlines()[-1].startswith("redi: ")
        with suppress(FileNotFoundError):
            shutil.rmtree(run / "export")


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(change=CHANGES, toml=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_content_of_a_manifest_and_a_recipe_is_one_line_or_works(
    change: Any,
    toml: bytes,
    stopped: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, run = stopped
    whole = json.loads((run / "manifest.json").read_text())
    manifest = json.dumps(damaged_manifest(whole, change)).encode()
    for name, content in (("manifest.json", manifest), ("recipe.toml", toml)):
        folder = tmp_path_factory.mktemp("any") / "run"
        check_any_content(name, content, recipe, Path(shutil.copytree(run, folder)), capsys)
        shutil.rmtree(folder)


@settings(max_examples=20, deadline=None)
@given(change=CHANGES, toml=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_what_is_read_of_any_manifest_and_recipe_has_its_form(
    change: Any, toml: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "manifest.json").write_text(json.dumps(change))
    (folder / "recipe.toml").write_bytes(toml)
    with suppress(InputError):
        manifest = read_manifest(folder)
        assert manifest == change
        assert all(one["to"] + one["from"] is not None for one in manifest.get("lengthened", ()))
    with suppress(InputError):
        assert all(isinstance(section, dict) for section in read_recipe(folder).values())
