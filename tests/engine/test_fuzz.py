"""Whatever a user gives, a command succeeds or ends with messages of one line."""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redi.engine.cli import main
from redi.engine.config.sections import Recipe
from redi.engine.data.row import Row
from redi.engine.data.rows import UNREAD_COLUMNS, scan_source
from redi.engine.data.sources import Source
from redi.engine.data.traces import COLUMNS, normalise
from redi.engine.errors import InputError
from redi.engine.output import printable

KINDS = st.sampled_from(["jsonl", "json", "csv", "parquet"])
EXAMPLES = [20, pytest.param(300, marks=pytest.mark.slow)]

CONTROL = {"Cc", "Cf", "Cs"}
TEXT = st.text(max_size=20) | st.sampled_from(["\0", "\x1b[31m", "<think>", "a" * 5000, "{", "[1"])
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "correct", "type"]) | TEXT,
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool"]) | VALUES,
            "content": TEXT | VALUES,
            "tool_calls": VALUES,
        },
    ),
    max_size=4,
)
NAMES = sorted(COLUMNS | UNREAD_COLUMNS)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(NAMES) | TEXT, TEXT | MESSAGES | VALUES, max_size=6)
    | st.fixed_dictionaries({"prompt": TEXT | MESSAGES, "chosen": TEXT, "rejected": TEXT}),
    min_size=1,
    max_size=4,
)


def written(rows: list[dict[str, Any]], kind: str, path: Path) -> None:
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps({"data": rows}, indent=1))
    elif kind == "csv":
        lines = [list(rows[0]), *(map(str, row.values()) for row in rows)]
        text = "\n".join(",".join(line) for line in lines)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    else:
        with suppress(pa.ArrowException, UnicodeError, OverflowError, ValueError, TypeError):
            pq.write_table(pa.Table.from_pylist(rows), path)


def is_shown_as_one_line(message: str) -> bool:
    shown = printable(message).replace("\t", " ")
    return len(shown.splitlines()) == 1 and not {unicodedata.category(c) for c in shown} & CONTROL


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_rows_are_read_or_named(examples: int, tmp_path: Path) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(rows=ROWS, kind=KINDS)
    def check(rows: list[dict[str, Any]], kind: str) -> None:
        path = tmp_path / f"rows.{kind}"
        written(rows, kind, path)
        if path.exists():
            read_all(path, kind)

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_bytes_are_read_or_named(examples: int, tmp_path: Path) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(content=st.binary(max_size=200), kind=KINDS)
    def check(content: bytes, kind: str) -> None:
        for zipped in ("", ".gz"):
            path = tmp_path / f"bytes.{kind}{zipped}"
            path.write_bytes(content)
            read_all(path, kind)

    check()


def read_all(path: Path, kind: str) -> None:
    """Read the traces of a file; what cannot be read is an InputError that names the file."""
    for row in scan_source(Source(str(path), kind), "auto"):
        error: InputError | None = row if isinstance(row, InputError) else None
        if isinstance(row, Row):
            try:
                for trace in normalise(row, row.format, Counter()):
                    assert isinstance(trace.completion, str)
            except InputError as faulty:
                error = faulty
        if error is not None:
            assert str(path) in str(error)
            assert is_shown_as_one_line(str(error)), error


SECTIONS = {name: list(vars(section)) for name, section in vars(Recipe()).items()}
KEYS = [(section, key) for section, keys in SECTIONS.items() for key in keys]
TOML_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
CHANGES = st.lists(st.tuples(st.sampled_from(KEYS), TOML_VALUES), min_size=1, max_size=3)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_value_of_a_recipe_is_one_line(
    examples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @settings(max_examples=examples, deadline=None)
    @example(changes=[(("adapter", "base"), [])], more=("\n", {}))
    @given(changes=CHANGES, more=st.none() | st.tuples(TEXT, TOML_VALUES))
    def check(changes: list[tuple[tuple[str, str], Any]], more: tuple[str, Any] | None) -> None:
        content: dict[str, Any] = {"model": {"path": "model"}}
        for (section, key), value in changes:
            content.setdefault(section, {})[key] = value
        content.setdefault("data", {})["path"] = str(tmp_path / "none.jsonl")
        if more is not None:
            content[more[0]] = more[1]
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(content), encoding="utf-8")
        assert main(["train", str(path)]) == 2
        lines = capsys.readouterr().err.splitlines()
        notices = "looking it up on the Hugging Face hub"
        assert [line for line in lines if notices not in line] == lines[-1:]
        assert lines[-1].startswith("redi: ")
        assert is_shown_as_one_line(lines[-1])

    check()


def leaves(config: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of the values in a JSON document."""
    items: Any = ()
    if isinstance(config, dict):
        items = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    return [path] * bool(path) + [x for key, one in items for x in leaves(one, (*path, key))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_any_file_of_a_model_is_one_line_or_works(
    name: str,
    world: Path,
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (world / "model").iterdir():
        (folder / file.name).symlink_to(file)
    whole = json.loads((folder / name).read_text())
    places = leaves(whole)
    path = recipe("run", {"model.path": str(folder), "train.max_steps": 1})

    @settings(max_examples=100, deadline=None)
    @given(place=st.sampled_from(places), value=VALUES)
    def check(place: tuple[Any, ...], value: Any) -> None:
        changed = json.loads(json.dumps(whole))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(changed))
        code = main(["prepare", str(path)])
        err = capsys.readouterr().err
        assert code in (0, 2), err
        if code:
            assert err.splitlines()[-1].startswith("redi: ")
            assert "Traceback" not in err

    check()
