"""The prediction of a step's time: what is conserved, what grows, and one run of the program."""

import json
from pathlib import Path

import numpy as np
import pytest

from redi.bench import scaling
from redi.bench.packing import simulated
from redi.engine.plan.step_time import step_bytes, step_traffic

SPEED = 1e14


@pytest.fixture(scope="module")
def found() -> list[scaling.Prediction]:
    return scaling.predict_all((8, 64), steps=1)


@pytest.mark.slow
def test_flops_do_not_depend_on_ranks_or_layout(found: list[scaling.Prediction]) -> None:
    """A rank's share of the same 256 pairs, times the ranks, is the same work."""
    for model in scaling.MODELS:
        chosen = [one for one in found if one.model == model and one.pairs == scaling.PAIRS]
        assert {one.ranks for one in chosen} == {8, 64}
        assert len({one.layout for one in chosen}) == 4
        for one in chosen:
            assert one.busy * one.ranks == pytest.approx(chosen[0].busy * chosen[0].ranks)
            assert one.seconds == pytest.approx(one.busy + one.waiting + one.exposed)
            assert one.waiting >= -1e-9 * one.seconds
            assert one.exposed >= 0
            # tokens/s * seconds = tokens, equal for all.
            assert one.tokens_per_s * one.seconds == pytest.approx(
                chosen[0].tokens_per_s * chosen[0].seconds, rel=0.01
            )


def test_ranks_wait_as_much_as_the_packing_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, without recomputation, whose flops have another share of attention than those that
    the packing balances."""
    monkeypatch.setattr(scaling, "CHECKPOINTING", "none")
    size = scaling.sizes()["1.5B"]
    (lengths,) = simulated(longest=scaling.LONGEST).steps(scaling.PAIRS, 1)
    for layout in scaling.layouts(64):
        found = scaling.predict("1.5B", size, [lengths], 64, layout, SPEED)
        assert found.busy / (found.busy + found.waiting) == pytest.approx(found.rank_efficiency)


def test_bytes_of_all_ranks_are_the_shards_that_the_others_hold() -> None:
    for ranks in (8, 64, 1024):
        for shard, _ in scaling.layouts(ranks).values():
            within, between = step_bytes(1000, ranks, shard)
            group = ranks // shard.replicate
            gathers = 1 if shard.gather == "step" else 2
            total = ranks * (within.micro_step + within.step)
            assert total == pytest.approx(ranks * (group - 1) / group * 1000 * (2 * gathers + 4))
            copies = shard.replicate
            assert ranks * between.step == pytest.approx(2 * 4 * 1000 * (copies - 1))


def test_time_falls_with_ranks_and_grows_with_flops_and_parameters() -> None:
    sizes = scaling.sizes()
    steps = list(simulated(longest=scaling.LONGEST).steps(64, 2))
    times = {
        (name, ranks): scaling.predict(name, size, steps, ranks, "fsdp", SPEED).seconds
        for name, size in sizes.items()
        for ranks in (1, 2, 4, 8, 16)
    }
    for name in sizes:
        of_ranks = [times[name, ranks] for ranks in (1, 2, 4, 8, 16)]
        assert of_ranks == sorted(of_ranks, reverse=True)
        assert of_ranks[0] <= 2.2 * of_ranks[1]
    for ranks in (1, 2, 4, 8, 16):
        assert times["1.5B", ranks] < times["7B", ranks] < times["32B", ranks]
    for ranks in (8, 64, 1024):
        shard, _ = scaling.layouts(ranks)["fsdp"]
        moved = [step_traffic(size, ranks, shard).micro_step for size in sizes.values()]
        assert moved == sorted(moved)
    assert step_traffic(sizes["7B"], 1, scaling.layouts(1)["fsdp"][0]).micro_step == 0


def test_a_slow_network_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers are hidden by compute up to its length, and not beyond."""
    size = scaling.sizes()["7B"]
    (lengths,) = simulated(longest=scaling.LONGEST).steps(64, 1)
    fast = scaling.predict("7B", size, [lengths], 16, "fsdp", SPEED)
    assert fast.exposed == 0 < fast.transfers
    monkeypatch.setattr("redi.engine.plan.step_time.NETWORK", 1e8)
    slow = scaling.predict("7B", size, [lengths], 16, "fsdp", SPEED)
    assert slow.exposed > 0
    assert slow.seconds > fast.seconds
    # Nothing hides more than its own length.
    assert slow.seconds >= slow.transfers - 1e-9
    assert np.isclose(slow.busy, fast.busy)


@pytest.mark.slow
def test_the_program_writes_a_table_a_record_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "scaling.json"
    arguments = ["scaling", "--ranks", "8", "64", "--steps", "1", "--out", str(target)]
    monkeypatch.setattr("sys.argv", arguments)
    scaling.main()
    table = capsys.readouterr().out
    record = json.loads(target.read_text())
    # Weak and strong scaling on 8 ranks; on 64 ranks 4 pairs a rank are the 256 pairs.
    assert len(record["results"]) == 3 * 4 * (2 + 1)
    assert table.count(" 64 fsdp") == 2 * 3
    assert record["assumed"]["share_of_peak"] == 0.35
    assert target.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_the_check_runs_training_on_one_two_and_four_processes() -> None:
    one, two, four = scaling.check()
    assert one["measured"] == pytest.approx(one["predicted"], rel=0.5)
    assert one["micro_steps"] > two["micro_steps"] > four["micro_steps"] >= 1
    assert one["predicted"] > two["predicted"] > 0
