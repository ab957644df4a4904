"""Benchmarks of data: the usual ways pack as described, and the loader is fast enough."""

import json

import numpy as np
import pytest

from redi.bench import data
from redi.bench import packing as bench


def fitted(lengths: list[int], best: bool) -> list[list[int]]:
    rows = bench.fit_decreasing(np.array(lengths), 10, np.argmin if best else lambda room: 0)
    return [[lengths[i] for i in row] for row in rows]


def test_best_fit_takes_the_fullest_row_and_first_fit_the_first():
    # After 7, 6, 5 the 3 fits into all three rows' room of 3, 4 and 5; then the 4.
    lengths = [3, 5, 6, 7, 4]
    assert fitted(lengths, best=True) == [[7, 3], [6, 4], [5]]
    assert fitted([2, 8, 7, 6, 3], best=True) == [[8, 2], [7, 3], [6]]
    # Room of 4 and 3: the 3 goes first where best fit would keep the larger room.
    assert fitted([6, 7, 5, 2, 3], best=False) == [[7, 3], [6, 2], [5]]
    assert fitted([7, 6, 6, 4, 2, 1], best=False) == [[7, 2, 1], [6, 4], [6]]
    assert fitted([7, 6, 6, 4, 2, 1], best=True) == [[7, 2, 1], [6, 4], [6]]


def test_efficiency_is_cost_over_what_the_ranks_could_have_done():
    assert bench.efficiency(np.array([4.0, 4.0, 2.0, 1.0]), 2) == pytest.approx(11 / (2 * 6))
    assert bench.efficiency(np.array([4.0, 4.0, 2.0]), 2) == pytest.approx(10 / (2 * 6))


def test_one_pair_a_rank_waits_for_the_costliest_pair_of_each_micro_step():
    lengths = np.array([100, 200, 300, 400, 100, 100, 200, 200])
    pairs = bench.COST.of(lengths).reshape(4, 2).sum(axis=1)
    found = bench.WAYS["one pair"](lengths, 2, 400)
    assert found == pytest.approx(pairs.sum() / (2 * (pairs[1] + pairs[3])))


def test_the_record_holds_every_way_and_ours_waits_least(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", ((32, 8),))
    out = tmp_path / "packing.json"
    monkeypatch.setattr("sys.argv", ["packing", "--steps", "5", "--out", str(out)])
    bench.main()
    (result,) = json.loads(out.read_text())["results"]
    ours, *others = result["ways"].values()
    assert len(others) == 3
    assert ours["mean"] > max(other["mean"] for other in others)
    assert ours["mean"] <= result["bound_by_longest_trace"]
    assert ours["min"] <= result["bound_by_longest_trace_min"]
    assert out.with_suffix(".png").stat().st_size > 1000


def test_ranks_that_gather_once_a_step_hardly_wait_whatever_the_length_of_packs(
    tmp_path, monkeypatch
):
    out = tmp_path / "gather.json"
    monkeypatch.setattr("sys.argv", ["packing", "--gather", "--steps", "10", "--out", str(out)])
    bench.main()
    results = json.loads(out.read_text())["results"]
    assert len(results) == 3 * (3 + 2)  # models; one set's longest trace is a listed row length
    for result in results:
        each, once = result["gather"]["micro_step"], result["gather"]["step"]
        assert once["min"] >= 0.985
        assert once["min"] > each["min"] - 0.005
        if result["row_tokens"] == 19_000:
            assert once["mean"] > each["mean"] + 0.01


@pytest.mark.slow
def test_one_core_feeds_far_more_tokens_than_a_card_trains_on(tmp_path):
    found = data.measure(tmp_path, traces=131_000, millions=0.01, step_seconds=0.2)
    assert found["loader_tokens_per_s"] > 600_000
    assert found["found_again_s"] < 1
