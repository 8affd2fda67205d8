"""What a profile tells: the pick, the table, and the document that leads back to it."""

import json
from dataclasses import replace
from functools import reduce
from itertools import product
from operator import getitem
from typing import Any

import pytest
from profiles import Asked, profile

from sonic_ep import EPConfig, ProfileReport
from sonic_ep.cost import LinkBandwidth
from sonic_ep.profiler.choice import LinkLoad, mode_times, pick
from sonic_ep.profiler.machine import TWO_GPUS_NOTE
from sonic_ep.profiler.report import EVERY_MODE, EVERY_PAIR, ModeTime, PairTime, ProfileShape, Spread
from sonic_ep.profiler.timing import MOST_ABOVE_CEILING, AboveCeilingError, Timing

# Predicted at this shape: all_to_all and rank_dedup.
SHAPE = ProfileShape(tokens=(1, 1), hidden=1, top_k=8, num_experts=64, dtype="bfloat16", routing="uniform")
GATHER_A2A, A2A_DEDUP, RS = ("all_gather", "all_to_all"), ("all_to_all", "rank_dedup"), "reduce_scatter"


def test_the_pick() -> None:
    for medians, config, expected in (
        ({GATHER_A2A: 90.0}, {}, GATHER_A2A),
        # Within a percent of each other: the predicted one, or else the first.
        ({GATHER_A2A: 90.0, A2A_DEDUP: 90.8}, {}, A2A_DEDUP),
        ({GATHER_A2A: 90.0, A2A_DEDUP: 91.0}, {}, GATHER_A2A),
        ({("rank_dedup", "all_to_all"): 90.5, ("rank_dedup",) * 2: 90.0}, {}, ("rank_dedup", "all_to_all")),
        # A mode that is fixed stays, whatever is faster.
        ({GATHER_A2A: 90.0}, {"dispatch": "rank_dedup"}, ("rank_dedup",) * 2),
        ({GATHER_A2A: 50.0, ("rank_dedup", RS): 99.5}, {"combine": RS}, ("all_to_all", RS)),
        ({GATHER_A2A: 1.0}, {"dispatch": "all_to_all", "combine": "all_to_all"}, ("all_to_all",) * 2),
    ):
        # The others take 100.
        spreads = [Spread.of(Timing(rounds=(medians.get(pair, 100.0) / 1e6,))) for pair in EVERY_PAIR]
        pairs = [PairTime(dispatch=d, combine=c, spread=s) for (d, c), s in zip(EVERY_PAIR, spreads, strict=True)]
        picked = pick(pairs, EPConfig(**config), SHAPE)
        assert (picked.dispatch, picked.combine) == expected, (medians, config)


CEILINGS = LinkBandwidth(copy_engine_in=100e9, copy_engine_out=100e9, read=100e9, write=100e9)


def dispatch_of(into: tuple[int, ...], out_of: tuple[int, ...], seconds: float) -> ModeTime:
    """The first dispatch mode, if it moves these bytes in ``seconds``."""
    timings = [Timing(rounds=(1.0,))] * len(EVERY_MODE)
    loads = [LinkLoad(into=(1, 1), out_of=(1, 1))] * len(EVERY_MODE)
    timings[1], loads[1] = Timing(rounds=(seconds,)), LinkLoad(into=into, out_of=out_of)
    return mode_times(timings, loads, CEILINGS)[1]


def test_what_a_ceiling_allows() -> None:
    for of_into, of_out, allowed in (
        # Both directions of all ranks are busy: the busiest may not be faster than the ceiling.
        ((100, 110), (110, 100), 110),
        ((100, 100), (100, 110), 100),
        # One direction alone, or one rank: the mean over the ranks may not.
        ((0, 100), (100, 0), 50),
        ((100, 111), (105, 106), 105.5),
        ((100, 100), (80, 120), 100),
    ):
        into, out_of = (tuple(10**6 * megabytes for megabytes in each) for each in (of_into, of_out))
        # So many seconds bring the allowed bytes just below what is too much.
        seconds = allowed * 1e6 / (CEILINGS.copy_engine_in * MOST_ABOVE_CEILING)
        found = dispatch_of(into, out_of, seconds * 1.001)
        expected = 100 * MOST_ABOVE_CEILING * max(of_into) / allowed / 1.001
        assert found.percent == pytest.approx(expected, abs=0.01), (of_into, of_out)
        with pytest.raises(AboveCeilingError, match="dispatch all_gather: got "):
            dispatch_of(into, out_of, seconds * 0.999)


def test_rates_are_those_of_the_busiest_rank() -> None:
    # All to one of two ranks: 0.06 GB in a millisecond.
    found = dispatch_of((0, 60_000_000), (60_000_000, 0), 1e-3)
    assert (found.link_bytes, found.gb_per_s, found.percent) == (60e6, 60.0, 60.0)
    in_no_time = dispatch_of((1, 1), (1, 1), 0.0)
    assert (in_no_time.gb_per_s, in_no_time.percent) == (None, None)


@pytest.fixture(scope="module")
def report() -> ProfileReport:
    return profile(Asked())


def test_notes(report: ProfileReport) -> None:
    assert report.note == "on the CPU, in plain PyTorch: the times mean nothing for GPUs"
    on_gpus = replace(report, machine=replace(report.machine, gpu="GPU"))
    of_two = replace(on_gpus, shape=replace(report.shape, tokens=(5, 5)), ranks_per_gpu=1)
    turns = "2 ranks take turns on one GPU: the times mean nothing for a GPU each"
    for noted, note in ((replace(of_two, ranks_per_gpu=2), turns), (of_two, TWO_GPUS_NOTE)):
        assert noted.note == noted.as_json()["environment"]["note"] == note
        assert f"note: {note}" in noted.table()
    for tokens in ((5,), (5, 5, 5)):
        assert replace(of_two, shape=replace(report.shape, tokens=tokens)).note is None


def test_the_table(report: ProfileReport) -> None:
    lines = report.table()
    assert lines[1] == "T=5 on each rank, H=16, E=6, K=2, bfloat16, uniform routing"
    assert any(line.startswith("no ceiling was measured: ") for line in lines)
    (marked,) = (line for line in lines if line.endswith("<") or " <" in line)
    assert marked.startswith(report.picked.dispatch.value)
    assert lines[-1] == f"picked: dispatch {report.picked.dispatch.value}, combine {report.picked.combine.value}"
    for tokens, told in (((5, 0, 3), "T=5,0,3 by rank, "), (tuple(range(9)), "T=0 to 8, ")):
        assert replace(report, shape=replace(report.shape, tokens=tokens)).table()[1].startswith(told)


def paths_of(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every field of every object."""
    if isinstance(document, dict):
        return [p for name, value in document.items() for p in ((*path, name), *paths_of(value, (*path, name)))]
    if isinstance(document, list):
        return [p for place, value in enumerate(document) for p in paths_of(value, (*path, place))]
    return []


def test_a_document_without_a_field_or_with_a_wrong_one_is_refused(report: ProfileReport) -> None:
    document = report.as_json()
    # What the report does not hold: it follows from the rest.
    derived = {("environment", "world_size"), ("environment", "note")}
    paths = [path for path in paths_of(document) if path not in derived]
    assert len(paths) > 150
    for path, wrong in product(paths, (None, [])):
        spoilt = json.loads(json.dumps(document))
        *way, name = path
        target = reduce(getitem, way, spoilt)
        if wrong is None:
            del target[name]
        else:
            target[name] = wrong
        with pytest.raises(ValueError, match=rf"profile.*\b{name}\b"):
            ProfileReport.from_json(spoilt)
    document["modes"][1]["ceiling"] = "light"
    with pytest.raises(ValueError, match=r"modes\[1\].ceiling: got 'light', expected null or one of copy_engine_in"):
        ProfileReport.from_json(document)
    document["config"]["dispatch"] = "none"
    with pytest.raises(ValueError, match=r"config.dispatch: got 'none', expected one of all_gather, all_to_all, "):
        ProfileReport.from_json(document)
    for other in (None, [], {"kind": "suite"}, {"kind": "profile"}):
        with pytest.raises(ValueError, match="profile"):
            ProfileReport.from_json(other)
