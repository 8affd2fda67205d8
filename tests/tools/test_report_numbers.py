"""What the report computes and compares: spread, winners, extrapolation, rates and caveats."""

import re
from pathlib import Path

import pytest
from report_documents import RATES, document, entry, layer, loaded, point, profile, settings, shown, suite, sweep
from report_page.computed import extrapolations, machines, winner_grids
from report_page.load import NO_GPU, SHARED, caveats
from report_page.selection import between_words, measurements, repeated

from sonic_ep.config import CombineMode, DispatchMode
from sonic_ep.profiler.machine import TWO_GPUS_NOTE


def test_spread_by_hand(tmp_path: Path) -> None:
    """100 to 104 us is 4 %, 200 to 210 us is 5 %, and 50 to 100 us is too short to count."""
    first = suite(entry("a", 200.0), entry("b", 50.0), entry("c", 104.0), entry("only here", 7.0))
    second = suite(entry("a", 210.0), entry("b", 100.0), entry("c", 100.5), entry("a", 300.0, how="graph"))
    documents = loaded(tmp_path, first=first, second=second)
    again = repeated(documents)
    assert [found.what for found in again] == ["b, queued", "a, queued", "c, queued"]
    assert [found.difference_percent for found in again] == pytest.approx([100.0, 5.0, 3.4826], abs=1e-3)
    assert [found.differs for found in again] == [False, True, False]
    assert between_words(again) == ("3 medians are in more than one file. 5% or more apart: 1 of the 2 above 100 µs.")
    (one,) = loaded(tmp_path, one=suite(entry("a", 100.0, wide=0.04), entry("b", 9.0)))
    assert [found.times.spread_percent for found in measurements(one)] == pytest.approx([4.0, 1.0])
    # In the middle of 4 and 1, and the widest.
    assert re.search(r'"n">2</td>\s*<td class="n">2.50</td>\s*<td class="n">4.0</td>', shown([one]))


def test_the_time_of_the_host_is_called_so(tmp_path: Path) -> None:
    """Eager, 1.5 times what it is behind other work is not yet the host's, and without that nothing is."""
    rest = [entry("a", 200.0), entry("b", 200.0), entry("d", 200.0), entry("d", 900.0, how="eager")]
    first = suite(entry("a", 310.0, "eager"), entry("b", 300.0, "eager"), entry("c", 600.0, "eager"), *rest)
    second = suite(entry("a", 150.0, "eager"), entry("b", 240.0, "eager"), entry("c", 480.0, "eager"), *rest)
    again = repeated(loaded(tmp_path, first=first, second=second))
    assert [found.what for found in again if found.of_host] == ["a, eager", "d, eager"]
    said = between_words(again)
    assert "3 of the 7 above 100 µs. 1 of these are the host's time, eager and more than 1.5 times as long" in said
    assert said.endswith("all others above 100 µs differ by 25.0% at most.")


def test_only_the_same_thing_is_compared(tmp_path: Path) -> None:
    alone = document("profile", profile())
    for first, second, common in (
        (layer(), layer(scale=1.01), 4),
        (layer(), layer(config=settings(cpu_sync_on_runtime=True)), 0),
        (layer(), layer({"activation": "gelu"}), 0),
        (layer(), layer(gpu="NVIDIA H200"), 0),
        (sweep(point(1024)), sweep(point(1024)), 2 * 9),
        (sweep(point(1024)), sweep(point(1024, backend="reference")), 0),
        (alone, alone, 7 + 9),
        (alone, document("profile", profile(tokens=512)), 0),
        # A layer's profile may be the very same measurement, from the profiler's cache.
        (alone, layer(), 0),
    ):
        assert len(repeated(loaded(tmp_path, first=first, second=second))) == common, (first, second)


def test_extrapolation_by_hand(tmp_path: Path) -> None:
    """K=1: a token leaves its rank with probability (W-1)/W; all_gather sends it to all W-1, and gathers 2 rows."""
    content = layer({"thiek": [2 * 1000, 500, 64, 8, 1]})
    content["rates_gb_per_s"] = {"copy_engine_in": 400, "copy_engine_out": 1, "read": 200, "write": 100, "memory": 2000}
    (found,) = extrapolations(loaded(tmp_path, a=content))
    assert [step.world_size for step in found.steps] == [2, 4, 8]
    assert found.left_out == [16]
    step = found.steps[1]
    # 1000 tokens of 500 bf16 are 10^6 bytes: 5 us at 200 GB/s, 10 at 100, 2.5 at 400; 2*10^6 bytes of memory 1 us.
    dispatches = {"all_to_all": 0.75 * 5, "rank_dedup": 0.75 * 5 + 1, "all_gather": 3 * 2.5 + 1}
    assert {mode: step.dispatch_us[mode] for mode in dispatches} == pytest.approx(dispatches)
    combines = [step.combine_us["all_to_all"], step.combine_us["reduce_scatter"], step.forward_us]
    assert combines == pytest.approx([0.75 * 10, 3 * 10, 11.25])


def test_winners_are_measured_at_the_sweeps_own_world_size_and_on_the_fast_backend_alone(tmp_path: Path) -> None:
    """The cost rule is that of the fast backend: a larger sweep of the other one stands beside none of its cells."""
    fast, reference = sweep(point(1024, fastest=0), point(4096, fastest=8)), sweep(point(8192, backend="reference"))
    (grid,) = winner_grids(loaded(tmp_path, fast=fast, reference=reference))
    (won,) = [cell for cell in grid.cells if cell.measured]
    assert (won.world_size, won.top_k, won.point and won.point.shape.tokens) == (2, 8, 4096)
    assert (won.sweep and won.sweep.file, won.measured[0].pass_name) == ("fast.json", "forward and backward")
    assert (won.shown.dispatch, won.shown.combine) == (DispatchMode.RANK_DEDUP, CombineMode.RANK_DEDUP)
    assert {cell.world_size for cell in grid.cells} == {2, 4, 8, 16}
    assert winner_grids(loaded(tmp_path, a=reference)) == []


def test_the_newest_rates_of_a_machine_win(tmp_path: Path) -> None:
    slow = {name: rate / 2 for name, rate in RATES.items()}
    # Where they are all there.
    for rates, winner, read in ((slow, "new", slow["read"]), ({"read": 1.0}, "old", RATES["read"])):
        files = {"old": layer(), "new": {**layer(date="2027-01-01T00:00:00+00:00"), "rates_gb_per_s": rates}}
        for order in (("new", "old"), ("old", "new")):
            (found,) = machines(loaded(tmp_path, **{name: files[name] for name in order}))
            assert (found.document.file, found.rates.link_read) == (f"{winner}.json", read * 1e9)


def test_rates_of_ranks_that_share_gpus_compute_nothing(tmp_path: Path) -> None:
    """With four ranks on two GPUs; with as many ranks as GPUs the same file computes."""
    shared = loaded(tmp_path, a=layer(world_size=4, gpus=2), b=sweep(point(1024), world_size=4, gpus=2))
    assert (machines(shared), extrapolations(shared), winner_grids(shared)) == ([], [], [])
    assert re.search(r"id=\"(extrapolation|winners)\"", shown(shared)) is None
    own = loaded(tmp_path, a=layer(world_size=4, gpus=4), b=sweep(point(1024), world_size=4, gpus=4))
    assert len(machines(own)) == len(extrapolations(own)) == len(winner_grids(own)) == 1


def test_caveats(tmp_path: Path) -> None:
    two_gpus = f"Beware: {TWO_GPUS_NOTE}."
    for changes, expected in (
        ({}, [two_gpus]),
        ({"world_size": 4, "gpus": 4}, []),
        ({"world_size": 4, "gpus": 2}, [SHARED]),
        ({"world_size": 2, "gpus": 1}, [two_gpus, SHARED]),
        ({"gpu": None, "gpus": 0}, [NO_GPU]),
    ):
        # Another that needs none takes nothing away.
        found, other = loaded(tmp_path, a=layer(**changes), b=layer(world_size=8, gpus=8))
        assert list(caveats([found])) == list(caveats([found, other])) == expected
        assert found.environment.shares_gpus == (SHARED in expected)
