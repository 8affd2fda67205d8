"""The recorded results: the schema reads them, they say where they are from, and every pick was a good one."""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import schema
from report_documents import COMBINE, DISPATCH
from report_page.load import read
from report_page.selection import FORWARD, FORWARD_AND_BACKWARD
from schema import Sweep, Untimed, write

from sonic_ep import EPConfig
from sonic_ep.cost import Workload, choose_modes

# What make bench writes is somebody's own.
RESULTS = Path(schema.__file__).parent / "results"
RECORDED = sorted(set(RESULTS.glob("*.json")) - {RESULTS / "latest.json"})
EVERY_PAIR = set(product(DISPATCH, COMBINE))
MOST_OVER_BEST = 1.05
PROFILE = ("kind", "profile")
SOMEBODYS_PATH = re.compile(r"/(root|tmp|work|home)\b")


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_every_document_is_read_whole_and_says_where_it_is_from(tmp_path: Path, path: Path) -> None:
    document, text = read(path), path.read_text()
    environment = document.environment
    assert all((environment.commit, environment.command))
    # What was checked on a CPU, and timed nothing, names the processor that it ran on.
    assert environment.gpu or (environment.processor and isinstance(document, Untimed))
    assert SOMEBODYS_PATH.search(text) is None
    if not isinstance(document, Untimed):
        write(document, tmp_path / "a.json")
        assert whole((tmp_path / "a.json").read_text()) == whole(text)


def whole(text: str) -> dict[str, Any]:
    """Without nulls, and without the kind of a profile, which another document may hold."""

    def kept(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if value is not None and (name, value) != PROFILE}

    return {"kind": "suite", **json.loads(text, object_hook=kept)}


def test_picks_are_within_5_percent_of_the_best_of_all_pairs() -> None:
    """The profiler's pick, and what is predicted without a profile."""
    sweeps = [document for document in map(read, RECORDED) if isinstance(document, Sweep)]
    assert all([sweeps, *(sweep.points for sweep in sweeps)])
    for world_size, point in ((sweep.environment.world_size, point) for sweep in sweeps for point in sweep.points):
        shape, words = point.shape, f"{point.shape}, {point.routing}"
        workload = Workload(world_size=world_size, top_k=shape.top_k, num_experts=shape.num_experts)
        assert {pair.pass_name for pair in point.pairs} == {FORWARD, FORWARD_AND_BACKWARD}, words
        for which in (FORWARD_AND_BACKWARD, FORWARD):
            medians = {pair.pair: pair.median_us for pair in point.fastest(which)}
            assert {(pair.dispatch.value, pair.combine.value) for pair in medians} == EVERY_PAIR, words
            for pair in (point.picked, choose_modes(EPConfig(), workload)):
                assert medians[pair] <= MOST_OVER_BEST * min(medians.values()), f"{words}, {which}, {pair}"
