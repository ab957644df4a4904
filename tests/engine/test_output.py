"""What commands print, on terminals and on streams that cannot take it."""

import io
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redi.engine.cli import main
from redi.engine.console import Console, print_table
from redi.engine.output import LONGEST_LINE, printable

ENTRY = [sys.executable, "-m", "redi.engine.cli"]


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(), max_size=60), st.integers(1, 3 * LONGEST_LINE))
def test_a_printed_line_is_short_and_has_no_control_characters(text: str, times: int) -> None:
    whole = text * times
    shown = printable(whole)
    assert shown.count("\n") == whole.count("\n")
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in shown)
    plain = "\n".join(line for line in whole.split("\n") if line.isprintable())
    if max(map(len, plain.split("\n"))) <= LONGEST_LINE:
        assert printable(plain) == plain
    for line in shown.split("\n"):  # an escaped character takes up to ten
        assert len(line) <= 10 * LONGEST_LINE + 40


def test_a_long_message_keeps_its_start_and_its_end() -> None:
    shown = printable("file.jsonl:3: " + "x" * 100_000 + ": rename the column")
    assert len(shown) < 1.1 * LONGEST_LINE
    assert shown.startswith("file.jsonl:3: x")
    assert "[98,033 characters omitted]" in shown
    assert shown.endswith(": rename the column")


@pytest.mark.parametrize("argument", ["\x1b[31mred", "x" * 100_000, "a\x07b\u202e"])
def test_an_error_shows_what_the_user_gave_without_obeying_it(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"{argument}.toml"]) == 2
    err = capsys.readouterr().err
    assert err.isascii()
    assert err[:-1].isprintable()
    assert err.startswith("redi: ")
    assert err.endswith((".toml: no such recipe file\n", ".toml: File name too long\n"))
    assert len(err) < 1.1 * LONGEST_LINE


def test_a_name_that_is_not_utf8_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", os.fsdecode(b"\xff.toml")]) == 2
    assert (
        capsys.readouterr().err
        == "redi: \\udcff.toml: not valid UTF-8; rename the file or directory\n"
    )


def test_a_name_that_the_locale_cannot_hold_is_one_line() -> None:
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        [*ENTRY, "train", "ü.toml"], env={**os.environ, **settings}, capture_output=True
    )
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert ended.stderr == (
        b"redi: \\xfc.toml: not readable in the locale's ascii; set PYTHONUTF8=1\n"
    )


def test_cells_of_a_table_are_shown_as_text() -> None:
    file = io.StringIO()
    print_table("\x1b[1mtitle", ["\x07name"], [["\x1b[31mred"]], file)
    assert file.getvalue().replace("\n", "").isprintable()
    assert "\\x1b[31mred" in file.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_table_on_a_terminal_without_unicode(encoding: str) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding)
    print_table("", ["name"], [["run"]], file)
    assert raw.getvalue().decode(encoding).split() == ["name", "-" * 4, "run"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [1, 20, 60])
def test_a_table_on_a_narrow_terminal_keeps_its_figures(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    file = Terminal()
    figures = [f"{10**n:,}" for n in range(8)]
    print_table("", ["data", *map("figure {}".format, range(8))], [["a.jsonl", *figures]], file)
    *_, cells = file.getvalue().splitlines()
    assert cells.split() == ["a.jsonl", *figures]


def test_a_file_has_all_columns_of_a_table() -> None:
    file = io.StringIO()
    names = [f"run-{number}" for number in range(40)]
    print_table("", ["", *names], [["loss", *["0.25 to 0.2"] * 40]], file)
    for name in names:
        assert name in file.getvalue()
    assert file.getvalue().count("0.25") == 40


def test_figures_of_a_progress_line_follow_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Console().progress("step", 2)
    progress.update(2, "loss 0.5", "12 tok/s")
    progress.close()
    line = sys.stderr.getvalue().split("\r")[-1]  # type: ignore[attr-defined]
    assert line.split()[:2] == ["step", "2/2"]
    assert line.split()[3:] == ["loss", "0.5", "12", "tok/s"]


def full() -> IO[str]:
    return open("/dev/full", "w")


def without_reader() -> IO[str]:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed() -> IO[str]:
    file = io.StringIO()
    file.close()
    return file


def ascii_only() -> IO[str]:
    return io.TextIOWrapper(io.BytesIO(), "ascii")


def none() -> None:
    """A descriptor that was closed when Python started."""


SLOW = [pytest.param(stream, marks=pytest.mark.slow) for stream in (full, closed, ascii_only, none)]


@pytest.mark.parametrize("stream", [without_reader, *SLOW])
def test_a_run_is_not_lost_with_the_stream_of_its_progress(
    stream: Callable[[], Any],
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(recipe("run", {"train.max_steps": 1}))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream())
        assert main(["train", path]) == 0
    assert (tmp_path / "run" / "export" / "config.json").is_file()


@pytest.mark.parametrize(
    ("stream", "code", "said"),
    [
        (full, 1, "redi: stdout cannot be written: [Errno 28] No space left on device\n"),
        (closed, 1, "redi: stdout cannot be written: I/O operation on closed file\n"),
        (without_reader, 1, ""),
        (ascii_only, 0, ""),
        (none, 0, ""),
    ],
)
def test_a_result_that_cannot_be_printed_is_one_line_at_most(
    stream: Callable[[], Any],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream())
        assert main(["--help"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&1 | head -c 1", ">&- 2>&-"])
def test_a_run_in_a_shell_outlives_the_stream_of_its_progress(
    redirection: str, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    command = " ".join([*ENTRY, "train", str(recipe("run"))])
    line = ["bash", "-c", f"set -o pipefail; {command} {redirection}"]
    done = subprocess.run(line, timeout=300, stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert (tmp_path / "run" / "export" / "config.json").is_file()
    files = [file for file in (tmp_path / "run").iterdir() if file.suffix in (".toml", ".jsonl")]
    assert files
    assert not any("tok/s" in file.read_text() for file in files)  # a closed descriptor's number
