"""The filter that keeps the tokens with the largest gap between student and reference."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redi.engine.cli import main
from redi.engine.config.parse import load_recipe, train_parser
from redi.engine.console import Console
from redi.engine.data.packing import build_batch
from redi.engine.distill.token_filter import largest
from redi.engine.distributed import join_world
from redi.engine.train.prepare_data import PreparedData, prepare_data

Steps = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def tables(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Scores of the small world's tokens under its two models: of a reference and a student."""
    folder = tmp_path_factory.mktemp("tables")
    for name, model in (("reference", "tied"), ("student", "model")):
        line = ["logprobs", world / model, "--data", world / "traces.jsonl", "--tokens"]
        assert main([*map(str, line), "--out", str(folder / f"{name}.parquet")]) == 0
    return folder / "reference.parquet", folder / "student.parquet"


def prepared(path: Path) -> PreparedData:
    recipe = load_recipe(train_parser(), str(path), [str(path)])
    with join_world() as alone:
        return prepare_data(recipe, alone, Console(active=False))


def settings(tables: tuple[Path, Path], keep: float) -> dict[str, Any]:
    reference, student = map(str, tables)
    return {
        "token_filter.keep": keep,
        "token_filter.reference": reference,
        "token_filter.student": student,
    }


def test_the_largest_gaps_are_kept_among_trained_tokens() -> None:
    gaps = np.array([3.0, 1.0, 2.0, 2.0, 9.0, -1.0])
    assert largest(gaps, None, 0.5).tolist() == [True, False, True, False, True, False]
    weights = np.array([1.0, 1.0, 0.5, 1.0, 0.0, -1.0])
    assert largest(gaps, weights, 0.4).tolist() == [True, False, True, False, False, False]
    assert largest(gaps, None, 0.01).sum() == 1
    assert largest(gaps, None, 1.0).all()


def test_the_tokens_kept_are_those_of_the_tables(
    tables: tuple[Path, Path], recipe: Callable[..., Path]
) -> None:
    data = prepared(recipe("kept", settings(tables, 0.3)))
    rows = [pq.read_table(table).to_pylist() for table in tables]
    targets = 0
    units = data.examples.units[data.schedule.units(1)].flatten().tolist()
    for trace in units:
        reference, student = (np.array(table[trace]["token_logps"]) for table in rows)
        gaps = reference - student
        count = max(1, round(0.3 * len(gaps)))
        weights = data.tokens.token_weights(trace)
        assert weights is not None
        assert int(weights.sum()) == count
        assert gaps[weights > 0].min() >= gaps[weights == 0].max(initial=-np.inf)
        targets += count
    batch = build_batch(data.tokens, np.array(units), data.examples.lengths[units])
    assert len(batch.valid_index) == targets
    again = pickle.loads(pickle.dumps(data.tokens))  # as a worker gets it
    assert np.array_equal(again.token_weights(units[0]), data.tokens.token_weights(units[0]))
    assert again.key == data.tokens.key
    kept = data.tokens.files[-1]
    content = kept.read_bytes()
    for damaged in (b"", content[:-1]):
        kept.write_bytes(damaged)
        assert prepared(recipe("kept", settings(tables, 0.3))).tokens.key == data.tokens.key
        assert kept.read_bytes() == content


@pytest.mark.slow
def test_a_run_trains_the_kept_tokens_and_shows_their_share(
    tables: tuple[Path, Path],
    recipe: Callable[..., Path],
    steps: Steps,
    tmp_path: Path,
    capsys: Any,
) -> None:
    path = recipe("kept", {**settings(tables, 0.3), "train.max_steps": 1})
    assert main(["train", str(path)]) == 0
    shown = capsys.readouterr().err
    assert "tokens left out by the token filter" in shown
    assert "masked by spans" not in shown
    data = prepared(path)
    traces = data.examples.units[data.schedule.units(1)].flatten()
    lengths = data.examples.lengths[traces]
    targets = int(data.tokens.num_targets(traces, lengths).sum())
    (line,) = steps(tmp_path / "kept")
    assert line["targets"] == targets
    completions = int((lengths - data.tokens.prompt_lengths[traces]).sum())
    assert line["kept"] == pytest.approx(targets / completions)
    assert 0.25 < line["kept"] < 0.4


@pytest.mark.slow
def test_all_tokens_are_the_run_without_a_filter(
    tables: tuple[Path, Path], recipe: Callable[..., Path]
) -> None:
    whole, plain = (
        prepared(recipe(name, changes))
        for name, changes in (("whole", settings(tables, 1.0)), ("plain", {}))
    )
    traces = np.arange(len(plain.tokens))
    lengths = plain.tokens.lengths
    for name in ("targets", "valid_index", "num_targets", "token_weights"):
        ours, theirs = (
            getattr(build_batch(data.tokens, traces, lengths), name) for data in (whole, plain)
        )
        assert ours is theirs is None or bool((ours == theirs).all()), name


def with_scores(table: pa.Table, change: Callable[[list[float]], Any]) -> pa.Table:
    """A table with other log-probs in its first row."""
    first, *others = table["token_logps"].to_pylist()
    place = table.schema.get_field_index("token_logps")
    return table.set_column(place, "token_logps", [[change(first), *others]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda t: t.slice(1), "has no scores of 1 of"),
        (lambda t: t.drop(["token_logps"]), "has no column token_logps"),
        (
            lambda t: t.set_column(
                t.schema.get_field_index("token_ids"),
                "token_ids",
                [[[1 + i for i in ids] for ids in t["token_ids"].to_pylist()]],
            ),
            r":1: its token_ids are not the tokens of .*traces.jsonl:1",
        ),
        (lambda t: with_scores(t, lambda values: None), ":1: token_logps is null"),
        (lambda t: with_scores(t, lambda values: values[1:]), ":1: token_logps must have a finite"),
        (
            lambda t: with_scores(t, lambda values: [float("nan"), *values[1:]]),
            ":1: token_logps must have a finite number",
        ),
        (None, "no such file"),
    ],
)
def test_a_table_of_other_traces_is_an_error(
    tables: tuple[Path, Path],
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
    spoil: Callable[[pa.Table], pa.Table] | None,
    problem: str,
) -> None:
    path = tmp_path / "spoiled.parquet"
    if spoil:
        pq.write_table(spoil(pq.read_table(tables[1])), path)
    name = recipe("spoiled", {**settings(tables, 0.5), "token_filter.student": str(path)})
    assert main(["prepare", str(name)]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()  # after progress
    assert "spoiled.parquet" in line
    assert re.search(problem, line)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("traces.jsonl", "cannot be read"),
        pytest.param("model", "is a folder", marks=pytest.mark.slow),
    ],
)
def test_a_reference_that_is_no_table_is_an_error_with_advice(
    world: Path, recipe: Callable[..., Path], capsys: Any, name: str, problem: str
) -> None:
    files = (world / name, world / name)
    assert main(["prepare", str(recipe("none", settings(files, 0.5)))]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert name in line
    assert problem in line
    assert line.endswith(
        "write the table with `redi logprobs MODEL --data DATA --tokens --out FILE.parquet`"
    )


def test_the_filter_needs_all_its_keys(recipe: Callable[..., Path], capsys: Any) -> None:
    assert main(["train", str(recipe("some", {"token_filter.keep": 0.5}))]) == 2
    assert (
        "token_filter.reference is missing: the filter needs all three keys"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_filtered_run_is_the_same_on_two_ranks_and_with_spans(
    recipe: Callable[..., Path],
    redi: Callable[..., Any],
    steps: Steps,
    tmp_path: Path,
    world: Path,
) -> None:
    rows = [json.loads(line) for line in (world / "traces.jsonl").read_text().splitlines()]
    for row in rows:
        for trace in row["traces"]:
            if len(trace["text"]) > 3:
                trace["spans"] = [[0, 1, 0.0], [1, 2, 2.0]]
    data = tmp_path / "spans.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = tmp_path / "reference.parquet", tmp_path / "student.parquet"
    for out, model in zip(scored, ("tied", "model"), strict=True):
        line = ["logprobs", world / model, "--data", data, "--out", out, "--tokens"]
        assert main([*map(str, line)]) == 0
    changes = {**settings(scored, 0.5), "optim.eps": 1e-3, "data.path": str(data)}
    found = {}
    for ranks in (0, 2):
        done = redi("train", recipe(str(ranks), changes), ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "tokens masked by spans" in done.stderr
        assert "tokens left out by the token filter" in done.stderr
        found[ranks] = steps(tmp_path / str(ranks))
    for one, two in zip(found[0], found[2], strict=True):
        assert (one["targets"], one["kept"]) == (two["targets"], two["kept"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
