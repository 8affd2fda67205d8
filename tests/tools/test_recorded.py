"""The results that are kept: where each is from, and that at every point of a sweep the pick was a good one."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sonic_ep import EPConfig
from sonic_ep.benchmark.layer import Pass
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.profiler.times import EVERY_PAIR
from sonic_ep.report.load import KINDS_WITHOUT_TIMES

RESULTS = Path(__file__).parents[2] / "bench" / "results"
# What make bench writes is somebody's own.
RECORDED = sorted(path for path in RESULTS.glob("*.json") if path.name != "latest.json")
PASSES = {Pass.TRAINING.value, Pass.STEP.value}
MOST_OVER_BEST = 1.05
SOMEBODYS_PATH = re.compile(r"/(root|tmp|work|home)\b")

Document = dict[str, Any]


def sweeps() -> list[Path]:
    return [path for path in RECORDED if document_of(path).get("kind") == "sweep"]


def document_of(path: Path) -> Document:
    found = json.loads(path.read_text())
    assert isinstance(found, dict), path
    return found


def faults_of_origin(path: Path) -> Iterator[str]:
    """What a document does not say of where it is from, or should not say."""
    document = document_of(path)
    environment = document.get("environment", {})
    # What was checked on a CPU, and timed nothing, says so instead: with the processor that it ran on.
    where = "processor" if document.get("kind") in KINDS_WITHOUT_TIMES and not environment.get("gpu") else "gpu"
    for name in (where, "commit", "command"):
        if not environment.get(name):
            yield f"no {name}"
    for found in SOMEBODYS_PATH.finditer(path.read_text()):
        yield f"a path of a machine: {found[0]}"


def faults_of_point(point: Document, world_size: int) -> Iterator[str]:
    """Where not every pair was timed, or the profiler's pick or what is predicted is not as fast as the best."""
    shape = point["shape"]
    words = f"T={shape['T']} K={shape['K']} {point['routing']}"
    if {pair["pass"] for pair in point["pairs"]} != PASSES:
        yield f"{words}: passes"
    load = Workload(world_size=world_size, top_k=shape["K"], num_experts=shape["E"])
    modes = choose_modes(EPConfig(), load)
    chosen = {
        "picked": (point["picked"]["dispatch"], point["picked"]["combine"]),
        "predicted": (modes.dispatch.value, modes.combine.value),
    }
    for which in sorted(PASSES):
        timed = [pair for pair in point["pairs"] if pair["pass"] == which]
        medians = {(pair["dispatch"], pair["combine"]): pair["median_us"] for pair in timed}
        if len(timed) != len(EVERY_PAIR) or set(medians) != set(EVERY_PAIR):
            yield f"{words}, {which}: not every pair once"
            continue
        for name, pair in chosen.items():
            over = medians[pair] / min(medians.values())
            if over > MOST_OVER_BEST:
                yield f"{words}, {which}: {name} {'+'.join(pair)} takes {over:.3f} times what the best pair takes"


def faults_of_sweep(path: Path) -> list[str]:
    document = document_of(path)
    world_size = document["environment"]["world_size"]
    found = [fault for point in document["points"] for fault in faults_of_point(point, world_size)]
    return found if document["points"] else ["no points"]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_every_document_says_where_it_is_from(path: Path) -> None:
    assert list(faults_of_origin(path)) == []


def test_picks_are_within_5_percent_of_the_best_pair() -> None:
    found = sweeps()
    if not found:
        pytest.skip(f"no recorded sweep: none of the {len(RECORDED)} files in bench/results is one")
    assert {path.name: faults_of_sweep(path) for path in found} == {path.name: [] for path in found}


def made_up(**times: float) -> Document:
    """A sweep of one point in which every pair takes 100 us but for those of ``times``, "dispatch__combine"."""
    names = [(dispatch.value, combine.value) for dispatch, combine in EVERY_PAIR]
    pairs = [
        {"dispatch": dispatch, "combine": combine, "pass": which, "median_us": times.get(f"{dispatch}__{combine}", 100)}
        for which in PASSES
        for dispatch, combine in names
    ]
    point = {
        "shape": {"T": 64, "H": 8, "I": 8, "E": 64, "K": 8, "dtype": "bfloat16"},
        "routing": "uniform",
        "pairs": pairs,
        "picked": {"dispatch": "all_gather", "combine": "all_to_all"},
    }
    origin = {"gpu": "a GPU", "commit": "a name", "command": "python -m sonic_ep sweep", "world_size": 2}
    return {"kind": "sweep", "environment": origin, "points": [point]}


def written(document: Document, folder: Path) -> Path:
    path = folder / "sweep.json"
    path.write_text(json.dumps(document))
    return path


def predicted() -> str:
    """The pair that is predicted for the point of ``made_up``."""
    modes = choose_modes(EPConfig(), Workload(world_size=2, top_k=8, num_experts=64))
    return f"{modes.dispatch.value}__{modes.combine.value}"


def test_a_sweep_with_good_picks(tmp_path: Path) -> None:
    path = written(made_up(rank_dedup__all_to_all=96), tmp_path)
    assert faults_of_sweep(path) == []
    assert list(faults_of_origin(path)) == []


def test_a_pick_that_is_slow_is_found(tmp_path: Path) -> None:
    faults = faults_of_sweep(written(made_up(all_gather__all_to_all=106), tmp_path))
    assert faults == [
        f"T=64 K=8 uniform, {which}: picked all_gather+all_to_all takes 1.060 times what the best pair takes"
        for which in sorted(PASSES)
    ]


def test_a_prediction_that_is_slow_is_found(tmp_path: Path) -> None:
    faults = faults_of_sweep(written(made_up(**{predicted(): 110}), tmp_path))
    assert len(faults) == 2
    assert all(f"predicted {predicted().replace('__', '+')} takes 1.100 times" in fault for fault in faults)


def test_a_sweep_with_a_pair_too_few_or_twice_is_found(tmp_path: Path) -> None:
    document = made_up()
    pairs = document["points"][0]["pairs"]
    left = pairs.pop()
    faults = faults_of_sweep(written(document, tmp_path))
    assert faults == [f"T=64 K=8 uniform, {left['pass']}: not every pair once"]
    pairs += [left, left]
    assert len(faults_of_sweep(written(document, tmp_path))) == 1
    document["points"][0]["pairs"] = [pair for pair in pairs if pair["pass"] == left["pass"]]
    assert "T=64 K=8 uniform: passes" in faults_of_sweep(written(document, tmp_path))
    assert faults_of_sweep(written({**document, "points": []}, tmp_path)) == ["no points"]


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"gpu": None}, "no gpu"),
        ({"commit": None}, "no commit"),
        ({"command": ""}, "no command"),
        ({"command": "python bench/moe_ep.py --json=/tmp/x.json"}, "a path of a machine: /tmp"),
        ({"note": "see /home/somebody"}, "a path of a machine: /home"),
    ],
)
def test_a_document_of_unknown_origin_is_found(tmp_path: Path, changed: Document, fault: str) -> None:
    document = made_up()
    document["environment"] |= changed
    assert list(faults_of_origin(written(document, tmp_path))) == [fault]


@pytest.mark.parametrize("kind", KINDS_WITHOUT_TIMES)
def test_what_was_checked_on_a_cpu_names_the_processor(tmp_path: Path, kind: str) -> None:
    document = made_up()
    document["kind"] = kind
    assert list(faults_of_origin(written(document, tmp_path))) == []
    document["environment"]["gpu"] = None
    assert list(faults_of_origin(written(document, tmp_path))) == ["no processor"]
    document["environment"]["processor"] = "a processor"
    assert list(faults_of_origin(written(document, tmp_path))) == []
    document["kind"] = "sweep"
    assert list(faults_of_origin(written(document, tmp_path))) == ["no gpu"]
