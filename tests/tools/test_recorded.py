"""The recorded results: the schema reads them, they say where they are from, and every pick was a good one."""

import json
import re
from pathlib import Path

import pytest
import schema
from report_documents import COMBINE, DISPATCH
from report_page.load import read
from report_page.selection import FORWARD, FORWARD_AND_BACKWARD
from schema import Sweep, Untimed, write

from sonic_ep import EPConfig
from sonic_ep.cost import Workload, choose_modes

# What make bench writes is somebody's own.
RECORDED = sorted(
    path for path in (Path(schema.__file__).parent / "results").glob("*.json") if path.name != "latest.json"
)
EVERY_PAIR = {(dispatch, combine) for dispatch in DISPATCH for combine in COMBINE}
MOST_OVER_BEST = 1.05
SOMEBODYS_PATH = re.compile(r"/(root|tmp|work|home)\b")


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_every_document_is_read_whole_and_says_where_it_is_from(tmp_path: Path, path: Path) -> None:
    document, text = read(path), path.read_text()
    environment = document.environment
    assert environment.commit
    assert environment.command
    # What was checked on a CPU, and timed nothing, names the processor that it ran on.
    assert environment.gpu or (environment.processor and isinstance(document, Untimed))
    assert SOMEBODYS_PATH.search(text) is None
    if not isinstance(document, Untimed):
        write(document, tmp_path / "a.json")
        again = json.loads((tmp_path / "a.json").read_text())
        assert without_kinds(again) == without_kinds({"kind": "suite", **json.loads(text)})


def without_kinds(value: object) -> object:
    """Without nulls, and without the kind of a profile within another document."""
    if isinstance(value, list):
        return [without_kinds(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {name: without_kinds(each) for name, each in value.items() if each is not None}
    return {name: each for name, each in kept.items() if name != "kind" or each != "profile"}


def test_picks_are_within_5_percent_of_the_best_of_all_pairs() -> None:
    """The profiler's pick, and what is predicted without a profile."""
    sweeps = [document for document in map(read, RECORDED) if isinstance(document, Sweep)]
    assert sweeps
    assert all(sweep.points for sweep in sweeps)
    for world_size, point in ((sweep.environment.world_size, point) for sweep in sweeps for point in sweep.points):
        shape, words = point.shape, f"{point.shape}, {point.routing}"
        load = Workload(world_size=world_size, top_k=shape.top_k, num_experts=shape.num_experts)
        predicted = choose_modes(EPConfig(), load)
        assert {pair.pass_name for pair in point.pairs} == {FORWARD, FORWARD_AND_BACKWARD}, words
        for which in (FORWARD_AND_BACKWARD, FORWARD):
            medians = {pair.pair: pair.median_us for pair in point.fastest(which)}
            assert {(pair.dispatch.value, pair.combine.value) for pair in medians} == EVERY_PAIR, words
            for pair in (point.picked, predicted):
                assert medians[pair] <= MOST_OVER_BEST * min(medians.values()), f"{words}, {which}, {pair}"
