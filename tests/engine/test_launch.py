"""The environment of ranks: what is wrong in it is one line."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from redi.engine.cli import COMMANDS, main

JOB = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "x"}, "RANK in the environment must be a whole number, got 'x'"),
        ({"RANK": "-1"}, "RANK in the environment must be a whole number, got '-1'"),
        ({"RANK": ""}, "RANK is set in the environment, but RANK is not"),
        ({"RANK": "1"}, "RANK = 1 in the environment, but WORLD_SIZE = 1"),
        ({"WORLD_SIZE": None}, "RANK is set in the environment, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment must be a whole number of 1 to"),
        ({"MASTER_ADDR": None}, "RANK is set in the environment, but MASTER_ADDR is not"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT in the environment must be a whole number of 1 to"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT in the environment must be a whole number of"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK in the environment must be a whole number"),
    ],
)
def test_a_wrong_variable_is_named(
    changes: dict[str, str | None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (JOB | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("redi.engine.cli.RANK_0_SECONDS", 0)
    assert main(["train", "missing.toml"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert "unset RANK" in err


def test_a_port_in_use_is_one_line(
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        port = str(taken.getsockname()[1])
        for name, value in (JOB | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        assert main(["train", str(recipe("run"))]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"redi: the ranks cannot join at localhost:{port}: ")
    assert "EADDRINUSE" in line
    assert not (tmp_path / "run").exists()


def test_no_directory_for_temporary_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    monkeypatch.setitem(COMMANDS, "doctor", lambda _: tempfile.mkdtemp())
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == (
        "redi: no directory for temporary files can be written; set TMPDIR to one\n"
    )


def test_a_current_directory_that_was_removed_is_one_line(
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    assert main(["train", str(recipe("run"))]) == 2
    monkeypatch.chdir(tmp_path)
    assert capsys.readouterr().err == (
        "redi: the current directory cannot be read (No such file or directory): cd to another "
        "one\n"
    )
