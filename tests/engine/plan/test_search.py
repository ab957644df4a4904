"""The search for the fastest settings that fit, and `row_tokens = "auto"`."""

import json
import math
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import packed_row

from redi.engine.cli import main
from redi.engine.config.parse import load_recipe, train_parser
from redi.engine.config.sections import Recipe, ShardConfig
from redi.engine.console import Console
from redi.engine.distributed import join_world
from redi.engine.model.build import model_config
from redi.engine.model.flops import model_size
from redi.engine.plan import search
from redi.engine.plan.auto_rows import _counting, rows_without_card
from redi.engine.plan.cards import CARDS, Cluster
from redi.engine.plan.memory import Load, step_memory
from redi.engine.plan.packed_run import pack_run, slowest
from redi.engine.plan.search import AXES, Gpus, fastest, full_pack, longest_unit, row_lengths
from redi.engine.plan.step_time import LAUNCH_SECONDS, step_bytes, step_seconds
from redi.engine.train.prepare_data import PreparedData, prepare_data

QUIET = Console(active=False)
RANKS = 4
SPEED = 1e9
"""Flops a second: the small model computes for seconds, as a large one does on a GPU."""


@pytest.fixture
def prepared(recipe: Callable[..., Path]) -> tuple[Recipe, Any, PreparedData]:
    """A recipe, its model's configuration and data, before row_tokens is known."""
    path = recipe("run", {"train.row_tokens": "auto", "train.batch": 12})
    found = load_recipe(train_parser(), str(path), [str(path)])
    with join_world() as world:
        return found, model_config(found), prepare_data(found, world, QUIET)


@pytest.mark.slow
def test_the_search_finds_the_best_of_all_combinations_with_fewer_counts(
    prepared: tuple[Recipe, Any, PreparedData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SHORTEST_SHARED", 0)
    recipe, config, data = prepared
    size = model_size(config)
    counted = []

    def memory(changed: Recipe, load: Load) -> int:
        """Like a model's: rows times what is kept, and gradients between micro-steps."""
        shard, tokens = changed.shard, load.pack.num_tokens / changed.shard.context
        kept = {"none": 10, "selective": 5, "attention": 2, "full": 1}[shard.checkpointing]
        whole = shard.reduce == "step" and load.micro_steps > 1
        gradients = 4 * size.parameters // (1 if whole else RANKS)
        weights = 2 * size.parameters if shard.gather == "step" else 0
        kept -= 0.5 if shard.offload else 0
        return int(1000 * tokens * kept) + weights + (gradients if load.micro_steps > 1 else 0)

    def count(changed: Recipe, load: Load) -> int:
        counted.append(changed)
        return memory(changed, load)

    every = list(search._candidates(recipe, size, data, Gpus(RANKS, SPEED), AXES, QUIET))
    peaks = {}
    for one in every:
        pack = full_pack(data, one.row_tokens)
        peaks[one.order] = memory(one.recipe, Load(pack, one.targets, one.micro_steps))
    answers = set()
    some = sorted(peaks.values())[:: len(peaks) // 8]
    for limit in [10, *some, math.inf]:
        counted.clear()
        found = fastest(recipe, size, data, Gpus(RANKS, SPEED, limit, count), QUIET)
        fitting = [one for one in every if peaks[one.order] <= limit]
        if not fitting:
            assert found is None
            assert len(counted) < len(every) / 3
            continue
        best = min(fitting, key=lambda one: one.order)
        assert found is not None
        assert found.row_tokens == best.row_tokens
        assert found.shard == {a.key: getattr(best.recipe.shard, a.key) for a in AXES}
        assert found.peak == peaks[best.order]
        assert len(counted) < len(every) / 2
        answers.add((found.row_tokens, *found.shard.values()))
    assert len(answers) > 4


def test_masked_tokens_are_not_counted_as_trained(recipe: Callable[..., Path], world: Path) -> None:
    """Neither by the plan nor by the search; half of each trace is masked."""
    rows = [json.loads(line) for line in (world / "traces.jsonl").read_text().splitlines()]
    for row in rows:
        for trace in row["traces"]:
            trace["spans"] = [[0, (len(trace["text"]) + 1) // 2, 0.0]]
    masked = world / "half-masked.jsonl"
    masked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = recipe("run", {"data.path": str(masked), "train.max_steps": 1, "train.row_tokens": 9999})
    found = load_recipe(train_parser(), str(path), [str(path)])
    with join_world() as alone:
        data = prepare_data(found, alone, QUIET)
    size = model_size(model_config(found))
    _, load = pack_run(found, size, data, Cluster(1, "h100", 0.35), QUIET)
    assert load.targets == {len(load.pack.valid_index)}
    gpus = Gpus(1, SPEED)
    candidates = list(search._candidates(found, size, data, gpus, AXES, QUIET))
    assert candidates[-1].targets == load.targets


@pytest.mark.slow
def test_values_of_an_axis_need_less_memory_one_after_the_other(
    prepared: tuple[Recipe, Any, PreparedData],
) -> None:
    """The search relies on it."""
    recipe, config, _ = prepared
    train = replace(recipe.train, dtype="float32", row_tokens=2000)

    def peak(tokens: int = 2000, **shard: Any) -> int:
        load = Load(packed_row((tokens,), 0, 10), frozenset([tokens - 1]), 2)
        changed = replace(recipe, shard=ShardConfig(**shard), train=train)
        return step_memory(changed, config, load, RANKS, CARDS["h100"]).total

    for axis in AXES:
        other: dict[str, Any] = {}
        if axis.key != "checkpointing":
            other["checkpointing"] = "full"
        values = [value for value in axis.values if axis.key != "context" or RANKS % value == 0]
        peaks = [peak(**{axis.key: value}, **other) for value in values]
        assert peaks == sorted(peaks, reverse=True), axis.key
        assert peaks[0] > peaks[-1], axis.key
    assert peak(1000) < peak(2000)


def test_rows_are_tried_from_the_longest_trace_on_and_full_packs_have_their_length(
    prepared: tuple[Recipe, Any, PreparedData],
) -> None:
    _, _, data = prepared
    rows = row_lengths(data)
    used = data.examples.lengths[data.examples.units]
    assert rows[0] == longest_unit(data) == used.max()
    assert rows == sorted(set(rows))
    for row in rows:
        pack = full_pack(data, row)
        assert pack.num_tokens == pytest.approx(row, abs=int(used.min()))
        assert len(pack.valid_index) > 0


@pytest.mark.parametrize(
    ("ranks", "shared"),
    [(1, False), (RANKS, False), pytest.param(RANKS, True, marks=pytest.mark.slow)],
)
def test_the_table_and_the_search_have_the_same_times(
    prepared: tuple[Recipe, Any, PreparedData],
    ranks: int,
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a run whose steps are all sampled, with each combination of settings."""
    if shared:
        monkeypatch.setattr(search, "SHORTEST_SHARED", 0)
    recipe, config, data = prepared
    size = model_size(config)
    cluster = Cluster(ranks, "h100", mfu=SPEED / CARDS["h100"].peak_flops)
    gpus = Gpus(ranks, cluster.flops_per_second)
    candidates = list(search._candidates(recipe, size, data, gpus, AXES, QUIET))
    assert {one.recipe.shard.context for one in candidates} == ({1, 2, 4} if shared else {1})
    times = set()
    for candidate in candidates[:: max(1, len(candidates) // 40)]:
        packing, _ = pack_run(candidate.recipe, size, data, cluster, QUIET)
        assert packing.packed_steps == packing.steps
        assert candidate.seconds == pytest.approx(packing.seconds, rel=1e-12)
        times.add(packing.seconds)
    assert len(times) > 10


def test_short_packs_take_as_long_if_weights_are_gathered_once(
    prepared: tuple[Recipe, Any, PreparedData],
) -> None:
    """The GPU waits for the host in each pack, also if ranks wait once a step."""
    size = model_size(prepared[1])
    packs = np.full((256, 8), 2.0 / 256)
    times = {}
    for gather in ("micro_step", "step"):
        waits = slowest(packs, gather)
        assert waits.sum() == pytest.approx(2.0)
        sections = ShardConfig(gather=gather, replicate=8)  # nothing is gathered
        times[gather] = step_seconds(waits / 1e6, size, 8, sections)
        assert times[gather] >= 256 * size.layers * LAUNCH_SECONDS
    assert times["step"] == pytest.approx(times["micro_step"])


def test_the_slowest_rank_is_waited_for_pack_by_pack() -> None:
    """Rank 1 has the most work, and no third pack."""
    packs = np.array([[5.0, 6.0], [1.0, 4.0], [2.0, 0.0]])
    assert slowest(packs, "micro_step").tolist() == [6.0, 4.0, 2.0]
    assert slowest(packs, "step").tolist() == [6.0, 4.0]


def test_what_moves_once_a_step_hides_in_one_micro_step_alone(
    prepared: tuple[Recipe, Any, PreparedData],
) -> None:
    size = replace(model_size(prepared[1]), parameters=10**10)
    whole, halves = (
        step_seconds(compute, size, RANKS, ShardConfig(gather="step"))
        for compute in (np.array([1.0]), np.array([0.99, 0.01]))
    )
    assert whole == pytest.approx(1.0)
    assert halves > 1.01


def test_rows_have_room_for_the_longest_held_out_trace(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """With "auto" a run evaluates traces that are longer than all that it trains."""
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps({"prompt": "1=", "chosen": "1" * 400, "rejected": "2"}) + "\n")
    changes = {
        "train.row_tokens": "auto",
        "train.batch": 2,
        "train.max_steps": 1,
        "data.max_tokens": 512,
        "eval.path": str(held_out),
    }
    assert main(["train", str(recipe("run", changes))]) == 0
    text = (tmp_path / "run" / "recipe.toml").read_text()
    assert tomllib.loads(text)["train"]["row_tokens"] > 400


def test_traffic_is_conserved() -> None:
    """All ranks together receive each shard n - 1 times; replicas halve what groups gather."""
    parameters, ranks = 10_000, 8
    for reduce in ("step", "micro_step"):
        within, between = step_bytes(parameters, ranks, ShardConfig(reduce=reduce))
        total = ranks * (within.micro_step + within.step)
        # Two gathers in bfloat16 and a reduction in float32.
        assert total == pytest.approx((ranks - 1) * parameters * (2 * 2 + 4))
        assert (within.step > 0) == (reduce == "step")
        assert between.step == between.micro_step == 0
    # Four copies: each pair of ranks gathers and reduces halves, and all-reduces them over copies.
    within, between = step_bytes(parameters, ranks, ShardConfig(replicate=4))
    assert within.micro_step == 2 * 2 * parameters / 2
    assert within.step == 4 * parameters / 2
    assert between.step == 2 * 4 * (parameters / 2) * 3 / 4
    alone = step_bytes(parameters, 1, ShardConfig())
    assert alone[0].micro_step == alone[0].step == alone[1].step == 0


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_auto_is_a_number_in_the_run_and_stays_on_resume(
    recipe: Callable[..., Path],
    redi: Callable[..., subprocess.CompletedProcess[str]],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    ranks: int,
) -> None:
    changes = {"train.row_tokens": "auto", "train.batch": 12, "train.max_steps": 2}

    def train(*options: str) -> str:
        """Run the command and return what it printed."""
        path = recipe("run", changes)
        if ranks:
            done = redi("train", path, *options, ranks=ranks)
            assert done.returncode == 0, done.stderr
            return done.stderr
        assert main(["train", str(path), *options]) == 0
        return capfd.readouterr().err

    def rows() -> Any:
        text = (tmp_path / "run" / "recipe.toml").read_text()
        return tomllib.loads(text)["train"]["row_tokens"]

    said = train()
    chosen = rows()
    assert f"train.row_tokens: {chosen:,} (auto)" in said
    found = load_recipe(train_parser(), str(recipe("run", changes)), ["run"])
    with join_world() as world:
        data = prepare_data(found, world, QUIET)
    assert chosen == rows_without_card(found, model_size(model_config(found)), data, ranks or 1)
    # A row has room for the chosen number of tokens, and no more.
    for line in steps(tmp_path / "run"):
        assert line["micro_steps"] >= line["tokens"] / (chosen * (ranks or 1))
    # Another batch would give other rows, but batch may not change: more steps keep them.
    said = train("--train.max_steps", "3")
    assert f"train.row_tokens: {chosen:,} (as in the run so far)" in said
    assert rows() == chosen
    if ranks:
        return
    train("--train.max_steps", "4", "--train.row_tokens", str(chosen + 7))
    assert rows() == chosen + 7
    train("--train.max_steps", "5")
    assert rows() == chosen + 7
    assert len(steps(tmp_path / "run")) == 5


@pytest.mark.slow
def test_prepare_and_plan_take_auto(
    recipe: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe("run", {"train.row_tokens": "auto"})
    assert main(["prepare", str(path), "--ranks", "2"]) == 0
    assert "rank efficiency, 2 ranks" in capfd.readouterr().err
    assert main(["plan", str(path), "--ranks", "2"]) == 0
    assert "tokens of the fullest pack" in capfd.readouterr().err


def test_another_word_than_auto_is_one_line(
    recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    for value in ("most", 1):
        assert main(["train", str(recipe("run", {"train.row_tokens": value}))]) == 2
    wrong, small = capfd.readouterr().err.splitlines()
    assert 'train.row_tokens: needs a whole number or one of ["auto"], got most' in wrong.replace(
        "'", '"'
    )
    assert "train.row_tokens must be >= 2, got 1" in small


@pytest.mark.slow
def test_memory_is_counted_next_to_a_run(prepared: tuple[Recipe, Any, PreparedData]) -> None:
    """A process group exists in training, so the count runs in another process."""
    recipe, config, _ = prepared
    recipe = replace(recipe, train=replace(recipe.train, row_tokens=64))
    load = Load(packed_row((40, 20), 0, 10), frozenset([58]), 2)
    expected = step_memory(recipe, config, load, 2, CARDS["h100"]).total
    with join_world(), _counting(config, 2, CARDS["h100"]) as count:
        assert count(recipe, load) == expected
