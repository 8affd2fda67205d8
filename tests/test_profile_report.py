"""What a profile tells: the pick, the table, and the document that leads back to it."""

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from profiles import Asked, profile

from sonic_ep import CombineMode, DispatchMode, EPConfig, ProfileReport
from sonic_ep.config import ModePair
from sonic_ep.cost import Workload
from sonic_ep.profiler.choice import pick
from sonic_ep.profiler.times import EVERY_MODE, PairTime, Spread


def pairs_of(medians: dict[tuple[str, str], float], other: float) -> list[PairTime]:
    def spread(median: float) -> Spread:
        return Spread(rounds=3, median_us=median, p10_us=median, p90_us=median, min_us=median, max_us=median)

    return [
        PairTime(dispatch=d, combine=c, spread=spread(medians.get((d.value, c.value), other)))
        for d, c in product(DispatchMode, CombineMode)
    ]


# Predicted at this load: all_to_all and rank_dedup.
LOAD = Workload(world_size=2, top_k=8, num_experts=64)


@pytest.mark.parametrize(
    ("medians", "config", "expected"),
    [
        ({("all_gather", "all_to_all"): 90.0}, EPConfig(), ("all_gather", "all_to_all")),
        # Within a percent of each other: the predicted one, or else the first.
        (
            {("all_gather", "all_to_all"): 90.0, ("all_to_all", "rank_dedup"): 90.8},
            EPConfig(),
            ("all_to_all", "rank_dedup"),
        ),
        (
            {("all_gather", "all_to_all"): 90.0, ("all_to_all", "rank_dedup"): 91.0},
            EPConfig(),
            ("all_gather", "all_to_all"),
        ),
        (
            {("rank_dedup", "all_to_all"): 90.5, ("rank_dedup", "rank_dedup"): 90.0},
            EPConfig(),
            ("rank_dedup", "all_to_all"),
        ),
        # A mode that is fixed stays, whatever is faster.
        ({("all_gather", "all_to_all"): 90.0}, EPConfig(dispatch="rank_dedup"), ("rank_dedup", "rank_dedup")),
        (
            {("all_gather", "all_to_all"): 50.0, ("rank_dedup", "reduce_scatter"): 99.5},
            EPConfig(combine="reduce_scatter"),
            ("all_to_all", "reduce_scatter"),
        ),
        (
            {("all_gather", "all_to_all"): 1.0},
            EPConfig(dispatch="all_to_all", combine="all_to_all"),
            ("all_to_all",) * 2,
        ),
    ],
)
def test_the_pick(medians: dict[tuple[str, str], float], config: EPConfig, expected: tuple[str, str]) -> None:
    picked = pick(pairs_of(medians, 100.0), config, LOAD)
    assert picked == ModePair(dispatch=DispatchMode(expected[0]), combine=CombineMode(expected[1]))


def test_the_table() -> None:
    report = profile(Asked())
    lines = report.table()
    assert str(report) == "\n".join(lines)
    assert lines[0] == "backend reference, 1 rank on the CPU"
    assert lines[1] == "T=5 on each rank, H=16, E=6, K=2, bfloat16, uniform routing"
    assert any("the times mean nothing for GPUs" in line for line in lines)
    assert any(line.startswith("no ceiling was measured: ") for line in lines)
    rows = [line.split()[:2] for line in lines]
    assert all([kind, mode] in rows for kind, mode in EVERY_MODE if mode)
    marked = [line for line in lines if line.endswith("<") or " <" in line]
    assert len(marked) == 1
    assert marked[0].startswith(report.picked.dispatch.value)
    assert lines[-1] == f"picked: dispatch {report.picked.dispatch.value}, combine {report.picked.combine.value}"
    uneven = replace(report, shape=replace(report.shape, tokens=(5, 0, 3)))
    assert uneven.table()[1].startswith("T=5,0,3 by rank, ")
    many = replace(report, shape=replace(report.shape, tokens=tuple(range(9))))
    assert many.table()[1].startswith("T=0 to 8, ")


def paths_of(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every field of every object."""
    if isinstance(document, dict):
        return [p for name, value in document.items() for p in ((*path, name), *paths_of(value, (*path, name)))]
    if isinstance(document, list):
        return [p for place, value in enumerate(document) for p in paths_of(value, (*path, place))]
    return []


def test_a_document_without_a_field_or_with_a_wrong_one_is_refused() -> None:
    document = profile(Asked()).as_json()
    # What the report does not hold: it follows from the rest.
    derived = {("environment", "world_size"), ("environment", "note")}
    paths = [path for path in paths_of(document) if path not in derived]
    assert len(paths) > 150
    for path, wrong in product(paths, (None, [])):
        spoilt = json.loads(json.dumps(document))
        *way, name = path
        target = spoilt
        for step in way:
            target = target[step]
        if wrong is None:
            del target[name]
        else:
            target[name] = wrong
        with pytest.raises(ValueError, match=rf"profile.*\b{name}\b"):
            ProfileReport.from_json(spoilt)


@pytest.mark.parametrize("document", [None, [], {"kind": "suite"}, {"kind": "profile"}])
def test_another_document_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match="profile"):
        ProfileReport.from_json(document)
