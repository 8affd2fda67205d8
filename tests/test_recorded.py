"""The recorded results: the schema reads them, they say where they are from, and every pick was a good one."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import schema
from report_documents import COMBINE, DISPATCH, Json, changed, loaded, point, sweep, written
from report_page.load import read
from report_page.selection import FORWARD, FORWARD_AND_BACKWARD
from schema import Document, Point, Sweep, Untimed, write

from sonic_ep import EPConfig
from sonic_ep.config import ModePair
from sonic_ep.cost import Workload, choose_modes

RESULTS = Path(schema.__file__).parent / "results"
# What make bench writes is somebody's own.
RECORDED = sorted(path for path in RESULTS.glob("*.json") if path.name != "latest.json")
EVERY_PAIR = {(dispatch, combine) for dispatch in DISPATCH for combine in COMBINE}
MOST_OVER_BEST = 1.05
SOMEBODYS_PATH = re.compile(r"/(root|tmp|work|home)\b")


def faults_of_origin(document: Document, text: str) -> Iterator[str]:
    """What a document does not say of where it is from, or should not say."""
    environment = document.environment
    # What was checked on a CPU, and timed nothing, names the processor that it ran on.
    where = "processor" if isinstance(document, Untimed) and not environment.gpu else "gpu"
    yield from (f"no {name}" for name in (where, "commit", "command") if not getattr(environment, name))
    yield from (f"a path of a machine: {found[0]}" for found in SOMEBODYS_PATH.finditer(text))


def faults_of_point(found: Point, world_size: int) -> Iterator[str]:
    """Where not every pair was timed, or the profiler's pick or what is predicted is not as fast as the best."""
    words = f"T={found.shape.tokens} K={found.shape.top_k} {found.routing}"
    load = Workload(world_size=world_size, top_k=found.shape.top_k, num_experts=found.shape.num_experts)
    chosen: dict[str, ModePair] = {"picked": found.picked, "predicted": choose_modes(EPConfig(), load)}
    if {pair.pass_name for pair in found.pairs} != {FORWARD, FORWARD_AND_BACKWARD}:
        yield f"{words}: passes"
    for which in (FORWARD_AND_BACKWARD, FORWARD):
        medians = {pair.pair: pair.median_us for pair in found.fastest(which)}
        if {(pair.dispatch.value, pair.combine.value) for pair in medians} != EVERY_PAIR:
            yield f"{words}, {which}: not every pair once"
            continue
        for name, pair in chosen.items():
            over = medians[pair] / min(medians.values())
            if over > MOST_OVER_BEST:
                modes = f"{pair.dispatch.value}+{pair.combine.value}"
                yield f"{words}, {which}: {name} {modes} takes {over:.3f} times what the best pair takes"


def faults_of_sweep(document: Sweep) -> list[str]:
    world_size = document.environment.world_size
    return [fault for found in document.points for fault in faults_of_point(found, world_size)]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_every_document_is_read_whole_and_says_where_it_is_from(tmp_path: Path, path: Path) -> None:
    document, text = read(path), path.read_text()
    assert list(faults_of_origin(document, text)) == []
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


def test_picks_are_within_5_percent_of_the_best_pair() -> None:
    found = [document for document in map(read, RECORDED) if isinstance(document, Sweep)]
    assert found
    assert {document.file: faults_of_sweep(document) for document in found} == {each.file: [] for each in found}
    assert all(document.points for document in found)


def made_up(slower: dict[str, float]) -> Json:
    """A sweep of one point in which every pair takes 100 us but for those of ``slower``, "dispatch+combine"."""
    found = point(64)
    for pair in found["pairs"]:
        median = slower.get(f"{pair['dispatch']}+{pair['combine']}", 100.0)
        pair |= dict.fromkeys(["median_us", "p10_us", "p90_us", "min_us", "max_us"], median)
    found["picked"] = {"dispatch": "all_gather", "combine": "all_to_all"}
    return sweep(found)


PREDICTED = choose_modes(EPConfig(), Workload(world_size=2, top_k=8, num_experts=64))
PREDICTED_NAME = f"{PREDICTED.dispatch.value}+{PREDICTED.combine.value}"


@pytest.mark.parametrize(
    ("slower", "fault"),
    [
        ({"rank_dedup+all_to_all": 96.0}, None),
        ({"all_gather+all_to_all": 106.0}, "picked all_gather+all_to_all takes 1.060"),
        ({PREDICTED_NAME: 110.0}, f"predicted {PREDICTED_NAME} takes 1.100"),
    ],
)
def test_a_slow_pick_is_found(tmp_path: Path, slower: dict[str, float], fault: str | None) -> None:
    (found,) = loaded(tmp_path, a=made_up(slower))
    passes = (FORWARD_AND_BACKWARD, FORWARD) if fault else ()
    expected = [f"T=64 K=8 uniform, {which}: {fault} times what the best pair takes" for which in passes]
    assert faults_of_sweep(found) == expected


def test_a_sweep_with_a_pair_or_a_pass_too_few_is_found(tmp_path: Path) -> None:
    document = made_up({})
    pairs = document["points"][0]["pairs"]
    left = pairs.pop()
    (found,) = loaded(tmp_path, a=document)
    assert faults_of_sweep(found) == [f"T=64 K=8 uniform, {left['pass']}: not every pair once"]
    document["points"][0]["pairs"] = [pair for pair in pairs if pair["pass"] == left["pass"]]
    (found,) = loaded(tmp_path, a=document)
    assert "T=64 K=8 uniform: passes" in faults_of_sweep(found)


@pytest.mark.parametrize(
    ("kind", "environment", "fault"),
    [
        ("sweep", {}, None),
        ("sweep", {"gpu": None, "processor": "a processor"}, "no gpu"),
        ("sweep", {"commit": None}, "no commit"),
        ("sweep", {"command": ""}, "no command"),
        ("sweep", {"command": "python bench/moe_ep.py --json=/tmp/x.json"}, "a path of a machine: /tmp"),
        ("sweep", {"note": "see /home/somebody"}, "a path of a machine: /home"),
        ("soak", {}, None),
        ("properties", {"gpu": None}, "no processor"),
        ("properties", {"gpu": None, "processor": "a processor"}, None),
    ],
)
def test_a_document_of_unknown_origin_is_found(tmp_path: Path, kind: str, environment: Json, fault: str | None) -> None:
    document = made_up({})
    for name, value in {**environment, "kind": kind}.items():
        document = changed(document, ("kind",) if name == "kind" else ("environment", name), value)
    (path,) = written(tmp_path, a=document)
    assert list(faults_of_origin(read(path), path.read_text())) == ([fault] if fault else [])
