"""What the report reads: it names file, field, got and expected of the first thing that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_documents import Json, changed, document, entry, layer, loaded, point, profile, suite, sweep

from sonic_ep.report.load import KINDS_WITHOUT_TIMES, load


@pytest.mark.parametrize(
    ("content", "path", "value", "message"),
    [
        (suite(entry("x", 10.0)), ("kind",), "sweet", "a.json: kind: got 'sweet', expected one of 'suite', 'profile'"),
        (layer(), ("kind",), ..., "a.json: kind: got nothing, expected a value"),
        (layer(), ("environment",), ..., "a.json: environment: got nothing, expected a value"),
        (layer(), ("environment", "gpus"), -1, "environment.gpus: got -1, expected a whole number from 0"),
        (layer(), ("environment", "torch"), None, "environment.torch: got None, expected a string"),
        (suite(entry("x", 10.0)), ("entries", 0, "median_us"), 0, r"entries\[0\].median_us: got 0, expected a number"),
        (suite(entry("x", 10.0)), ("entries", 0), 3, r"a.json: entries\[0\]: got 3, expected an object"),
        (suite(entry("x", 10.0)), ("entries", 0, "gb_per_s"), float("nan"), "got nan, expected a number from 0"),
        (layer(), ("setup", "thiek"), [1, 2], r"setup.thiek: got \[1, 2\], expected a list of 5 whole numbers"),
        (layer(), ("setup", "add_bias"), 1, "setup.add_bias: got 1, expected true or false"),
        (layer(), ("config", "combine"), "all", "config.combine: got 'all', expected one of 'auto', 'all_to_all'"),
        (layer(), ("profile", "modes", 1, "mode"), "x", r"profile.modes\[1\].mode: got 'x', expected one of"),
        (sweep(point(8)), ("points", 0, "picked"), {}, r"points\[0\].picked.dispatch: got nothing, expected a value"),
        (
            sweep(point(8)),
            ("points", 0, "routing"),
            "odd",
            r"points\[0\].routing: got 'odd', expected one of 'uniform'",
        ),
        (
            layer(),
            ("breakdown", 0, "parts", "plan"),
            "1",
            r"breakdown\[0\].parts.plan: got '1', expected a number from 0",
        ),
    ],
)
def test_errors_name_file_field_got_and_expected(
    tmp_path: Path, content: Json, path: tuple[str | int, ...], value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, a=changed(content, path, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "a.json: got No such file or directory, expected a file that can be read"),
        ("{", "a.json: got what is no JSON .*line 1.*expected a JSON document"),
        ("[1]", "a.json: got a list, expected a JSON object"),
        ("[" * 100_000, "a.json: got what is no JSON"),
        (b"\xff", "a.json: got what is no JSON"),
    ],
)
def test_files_that_are_no_documents(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load([path])


SUITE = suite(
    entry("x", 10.0, gb_per_s=1.0, percent=50.0, floor_us=1.0, tflop_per_s=1.0, bar="b", bar_us=9.0, met=False)
)
NUMBERS: list[tuple[Json, tuple[str | int, ...]]] = [
    *((SUITE, ("rates_gb_per_s", name)) for name in ("copy_engine_in", "copy_engine_out", "read", "write", "memory")),
    *((SUITE, ("entries", 0, name)) for name in ("gb_per_s", "percent", "floor_us", "tflop_per_s", "bar_us")),
    *((SUITE, ("entries", 0, name)) for name in ("median_us", "p10_us", "p90_us", "min_us", "max_us")),
    *((layer(), ("accuracy", 0, name)) for name in ("error", "bound", "worst_row", "worst_row_bound")),
    *((layer(), ("derived", 0, name)) for name in ("link_us", "over_gemms", "over_gemms_and_link")),
    *((layer(), ("profile", "modes", 1, name)) for name in ("median_us", "link_bytes", "gb_per_s", "percent")),
    (layer(), ("times", 0, "tflop_per_s")),
    (layer(), ("breakdown", 0, "parts", "rest")),
    (sweep(point(8)), ("points", 0, "over_best", "forward, training")),
    (sweep(point(8)), ("points", 0, "pairs", 0, "median_us")),
]
COUNTS: list[tuple[Json, tuple[str | int, ...]]] = [
    *((SUITE, ("environment", name)) for name in ("gpus", "world_size")),
    *((SUITE, ("entries", 0, "shape", name)) for name in ("T", "H", "I", "E", "K")),
    (SUITE, ("entries", 0, "rounds")),
    (layer(), ("memory", 0, "formula_bytes")),
    (layer(), ("memory", 0, "measured_bytes")),
    (layer(), ("config", "max_rows")),
    *((layer(), ("profile", "shape", name)) for name in ("hidden", "top_k", "num_experts")),
    (layer(), ("profile", "ranks_per_gpu")),
]
NO_NUMBERS = (10**400, -(10**400), 10**200, 1e300, float("nan"), float("inf"), float("-inf"), -1, True, "1", [1])


@pytest.mark.parametrize(("content", "path"), [*NUMBERS, *COUNTS], ids=lambda found: str(found)[-60:])
def test_what_is_no_number_is_refused_with_a_short_message(
    tmp_path: Path, content: Json, path: tuple[str | int, ...]
) -> None:
    expected = "expected a whole number from " if (content, path) in COUNTS else "expected a number from "
    # Half a row, half a GPU.
    for value in (*NO_NUMBERS, *([1.5] if (content, path) in COUNTS else [])):
        with pytest.raises(ValueError, match=rf"^a\.json: .*{path[-1]}: got .*, {expected}") as raised:
            loaded(tmp_path, a=changed(content, path, value))
        assert len(str(raised.value)) < 240


@pytest.mark.parametrize("value", [[10**400, 1, 1, 8, 1], [1, 1, 1, True, 1], [1, 1, 1, 8, 0], [1, 1.0, 1, 8, 1], []])
def test_lists_of_sizes_are_sizes(tmp_path: Path, value: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"a\.json: setup\.thiek: got .*, expected a list of 5 whole numbers from 1"):
        loaded(tmp_path, a=changed(layer(), ("setup", "thiek"), value))
    with pytest.raises(ValueError, match=r"profile\.shape\.tokens: got .*, expected a list of some whole numbers"):
        loaded(tmp_path, a=changed(layer(), ("profile", "shape", "tokens"), [*value, -1]))


@pytest.mark.parametrize(
    ("content", "path", "value", "message"),
    [
        # Each size alone would do; x of a rank has more bytes than any array may have, C(E, K) takes hours.
        (SUITE, ("entries", 0, "shape", "T"), 2**60, "shape.T: got 11529.*, expected T.H elements of at most"),
        (SUITE, ("entries", 0, "shape", "E"), 2**40, "shape.E: got 10995.*, expected a whole number from 1 to 65536"),
        (SUITE, ("entries", 0, "shape", "K"), 2**40, "shape.K: got 10995.*, expected a whole number from 1 to 65536"),
        (layer(), ("setup", "thiek"), [2**60, 2**20, 1, 8, 1], "setup.thiek: got .*, expected T.H elements of at most"),
        (layer(), ("setup", "thiek"), [8, 8, 8, 2**40, 2**39], "setup.thiek: got .*, expected .* K of at most 65536"),
        # Error and bound: 2e-3 and 4e-3, 3e-3 and 6e-3; of dw2 5e-3 and 4e-3.
        (layer(), ("accuracy", 0, "error"), 5e-3, r"accuracy\[0\].ok: got True, expected false"),
        (layer(), ("accuracy", 0, "worst_row"), 7e-3, r"accuracy\[0\].ok: got True, expected false"),
        (layer(), ("accuracy", 1, "ok"), False, r"accuracy\[1\].ok: got False, expected true"),
        (layer(), ("accuracy", 2, "ok"), True, r"accuracy\[2\].ok: got True, expected false"),
        (SUITE, ("entries", 0, "percent"), 102.01, r"entries\[0\].percent: got 102.01, expected at most 102: "),
        (layer(), ("profile", "modes", 1, "percent"), 205, r"modes\[1\].percent: got 205.0, expected at most 204: "),
        (layer(), ("profile", "modes"), [], r"a.json: profile.modes: got \[\], expected at least one"),
        (layer(), ("profile", "pairs"), [], r"a.json: profile.pairs: got \[\], expected at least one"),
        (sweep(point(8)), ("points", 0, "pairs"), [], r"points\[0\].pairs: got \[\], expected at least one"),
        (SUITE, ("entries", 0, "p90_us"), 9.0, r"entries\[0\].p90_us: got 9.0, expected at least median_us, 10"),
        (SUITE, ("entries", 0, "min_us"), 9.96, r"entries\[0\].p10_us: got 9.95, expected at least min_us, 9.96"),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, content: Json, path: tuple[str | int, ...], value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, a=changed(content, path, value))


@pytest.mark.parametrize(
    ("content", "way", "message"),
    [
        (document("profile", profile()), (), r"a.json: modes: got \('plan', ''\), expected each of them once"),
        (layer(), ("profile",), r"a.json: profile.modes: got \('plan', ''\), expected each of them once"),
        (sweep(point(8)), ("points", 0, "profile"), r"profile.modes: got \('plan', ''\), expected each of them once"),
    ],
)
def test_modes_and_pairs_come_once(tmp_path: Path, content: Json, way: tuple[str | int, ...], message: str) -> None:
    found: Any = content
    for step in way:
        found = found[step]
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, a=changed(content, (*way, "modes"), [*found["modes"], found["modes"][0]]))
    with pytest.raises(
        ValueError, match=r"pairs: got \('all_gather \+ all_to_all', 'ids to combined rows'\), expected"
    ):
        loaded(tmp_path, a=changed(content, (*way, "pairs"), [*found["pairs"], found["pairs"][0]]))


def test_a_pair_of_a_sweep_comes_once_in_each_pass(tmp_path: Path) -> None:
    pairs = point(8)["pairs"]
    with pytest.raises(ValueError, match=r"points\[0\].pairs: got \('all_gather \+ all_to_all', 'forward, training'\)"):
        loaded(tmp_path, a=changed(sweep(point(8)), ("points", 0, "pairs"), [*pairs, pairs[0]]))


def test_what_may_be_is_read(tmp_path: Path) -> None:
    """The ceiling by two percent, as two measurements differ, and a difference of medians below zero."""
    content = changed(layer(), ("profile", "modes", 1, "percent"), 102.0)
    (found,) = loaded(tmp_path, a=changed(content, ("derived", 0, "exposed_communication_us"), -3.5)).layers
    assert found.profile is not None
    assert found.profile.modes[1].percent == 102.0
    assert found.derived[0].exposed_communication_us == -3.5


def test_numbers_of_more_digits_than_python_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(SUITE).replace('"gpus": 2', '"gpus": ' + "9" * 5000))
    with pytest.raises(ValueError, match=r"a\.json: "):
        load([path])


def test_records_without_times_are_passed_over_by_name(tmp_path: Path) -> None:
    others = {kind: document(kind, {"failures": []}) for kind in KINDS_WITHOUT_TIMES}
    found = loaded(tmp_path, a=SUITE, **others)
    assert [one.source.file for one in found.everything] == ["a.json"]
    assert found.passed_over == tuple(f"{kind}.json" for kind in KINDS_WITHOUT_TIMES)
    with pytest.raises(ValueError, match="got no document with times, expected one of suite, profile, layer, sweep"):
        loaded(tmp_path, **others)
