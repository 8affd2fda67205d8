"""The schema of the results: what it reads, and that it names file, place, expected and got of what is wrong."""

import json
import re
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import msgspec
import pytest
from profiles import Asked
from profiles import profile as profile_report
from report_documents import Json, changed, document, entry, layer, loaded, point, profile, suite, sweep, written
from report_page.load import load
from schema import KINDS, MOST, Profile, ProfileDocument, Untimed

RATED = {"gb_per_s": 1.0, "percent": 50.0, "floor_us": 1.0, "tflop_per_s": 1.0, "bar": "b", "bar_us": 9.0, "met": False}
SUITE = suite(entry("x", 10.0, **RATED))
PROFILE = document("profile", profile())
LAYER = changed(layer(), ("config", "max_rows"), 7)
SWEEP = sweep(point(8))
Way = tuple[str | int, ...]
UNTIMED = [kind for kind, form in KINDS.items() if form is Untimed]
PERCENT, MODE_PERCENT = ("entries", 0, "percent"), ("profile", "modes", 1, "percent")


@pytest.mark.parametrize(
    ("content", "path", "value", "message"),
    [
        (SUITE, ("kind",), "sweet", "kind: expected one of suite, profile, layer, sweep, .*, got 'sweet'"),
        (LAYER, ("kind",), ..., "kind: expected one of .*, got None"),
        (LAYER, ("environment",), ..., "missing required field `environment`"),
        (LAYER, ("environment", "torch"), None, r"Expected `str`, got `null` - at `\$.environment.torch`"),
        (SUITE, ("entries", 0, "median_us"), 5e-324, r"Expected `float` >= 1e-09 - at `\$.entries\[0\].median_us`"),
        (SUITE, ("entries", 0), 3, r"Expected `object`, got `int` - at `\$.entries\[0\]`, got 3"),
        (LAYER, ("setup", "thiek"), [1, 2], r"Expected `array` of length 5, got 2 - at `\$.setup.thiek`"),
        (LAYER, ("setup", "add_bias"), 1, r"Expected `bool`, got `int` - at `\$.setup.add_bias`, got 1"),
        (LAYER, ("config", "combine"), "all", r"combine: got 'all', expected .*all_to_all.* - at `\$.config`"),
        (LAYER, ("profile", "modes", 1, "mode"), "x", r"a mode of dispatch, got 'x' - at `\$.profile.modes\[1\]`"),
        (SWEEP, ("points", 0, "picked"), {}, r"missing required field `dispatch` - at `\$.points\[0\].picked`"),
        (SWEEP, ("points", 0, "routing"), "odd", r"Invalid enum value 'odd' - at `\$.points\[0\].routing`"),
        (LAYER, ("setup", "thiek"), [8, 8, 8, 2**40, 2**39], r"Expected `int` <= 65536 - at `\$.setup.thiek\[3\]`"),
        # Each size alone would do; x of a rank has more bytes than any array may have, C(E, K) takes hours.
        (SUITE, ("entries", 0, "shape", "T"), 2**60, r"Expected T\*H elements of at most .*, got T=11529.* at .*shape"),
        (LAYER, ("setup", "thiek"), [2**60, 2**20, 1, 8, 1], r"Expected T\*H elements of at most .*setup"),
        (SUITE, ("entries", 0, "shape", "E"), 2**40, "Expected `int` <= 65536 .*shape.E`, got 10995"),
        (SUITE, ("entries", 0, "shape", "K"), 2**40, "Expected `int` <= 65536 .*shape.K`, got 10995"),
        # Error and bound: 2e-3 and 4e-3, 3e-3 and 6e-3; of dw2 5e-3 and 4e-3.
        (LAYER, ("accuracy", 0, "error"), 5e-3, r"Expected `ok` False, .*, got True - at `\$.accuracy\[0\]`"),
        (LAYER, ("accuracy", 0, "worst_row"), 7e-3, r"Expected `ok` False, .*, got True - at `\$.accuracy\[0\]`"),
        (LAYER, ("accuracy", 1, "ok"), False, r"Expected `ok` True, .*, got False - at `\$.accuracy\[1\]`"),
        (LAYER, ("accuracy", 2, "ok"), True, r"Expected `ok` False, .*, got True - at `\$.accuracy\[2\]`"),
        (SUITE, PERCENT, 102.01, "Expected `float` <= 102.0 .*, got 102.01"),
        (layer(), MODE_PERCENT, 204.5, r"Expected `float` <= 204.0 - at `\$.profile.modes\[1\].percent`, got 204.5"),
        (LAYER, ("profile", "modes"), [], r"length >= 1 - at `\$.profile.modes`, got \[\]"),
        (LAYER, ("profile", "pairs"), [], r"length >= 1 - at `\$.profile.pairs`, got \[\]"),
        (LAYER, ("profile", "shape", "tokens"), [], r"length >= 1 - at `\$.profile.shape.tokens`"),
        (SWEEP, ("points", 0, "pairs"), [], r"length >= 1 - at `\$.points\[0\].pairs`"),
        (SUITE, ("entries", 0, "p90_us"), 9.0, r"Expected min, .* ascend, got \[.*10.0, 9.0, .*at `\$.entries\[0\]`"),
        (SUITE, ("entries", 0, "min_us"), 9.96, r"Expected min, .* ascend, got \[9.96, 9.95"),
    ],
)
def test_errors_name_place_expected_and_got(tmp_path: Path, content: Json, path: Way, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^a\.json: .*{message}"):
        loaded(tmp_path, a=changed(content, path, value))


def test_files_that_are_no_documents(tmp_path: Path) -> None:
    text, path = json.dumps(SUITE), tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"a\.json: expected a readable file: No such file or directory"):
        load([path])
    for content, message in {
        b"{": "expected JSON: ",
        b"[1]": r"expected a JSON object, got \[1\]",
        b"[" * 100_000: "expected JSON: maximum recursion depth",
        b"\xff": "expected JSON: .*byte 0",
        text.replace('"gpus": 2', '"gpus": ' + "9" * 5000).encode(): "expected JSON: .*out of range",
        text.replace('"gpus": 2', '"gpus": NaN').encode(): "expected JSON: .*invalid character",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.json: {message}"):
            load([path])


NO_NUMBERS = (10**400, -(10**400), 10**200, 1e300, float("nan"), float("inf"), float("-inf"), -1, True, "1", [1])
NO_COUNTS = (*NO_NUMBERS, 1.5, 1.0, MOST + 1)


def numbers_in(value: Any, way: Way = ()) -> Iterator[tuple[Way, float]]:
    """All but those that may be below zero; of a list in its last element."""
    if isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else [*enumerate(value)][-1:]:
            yield from numbers_in(each, (*way, name))
    elif isinstance(value, int | float) and not isinstance(value, bool) and "exposed_communication_us" not in way:
        yield way, value


@pytest.mark.parametrize("content", [SUITE, PROFILE, LAYER, SWEEP], ids=lambda content: content["kind"])
def test_what_is_no_number_is_refused_with_a_short_message(tmp_path: Path, content: Json) -> None:
    for way, number in numbers_in(content):
        for value in NO_COUNTS if isinstance(number, int) else NO_NUMBERS:
            with pytest.raises(ValueError, match=r"a\.json: .{1,300}$"):
                loaded(tmp_path, a=changed(content, way, value))


def test_modes_and_pairs_come_once(tmp_path: Path) -> None:
    pair, again = "all_gather + all_to_all", "Expected every mode and pair once, got [{}] again - at `"
    profiles: list[tuple[Json, Way]] = [(PROFILE, ()), (LAYER, ("profile",)), (SWEEP, ("points", 0, "profile"))]
    twice = [(content, (*way, "modes"), "('plan', '')") for content, way in profiles]
    twice += [(content, (*way, "pairs"), repr(pair)) for content, way in profiles]
    # Of a point in each pass once.
    for content, way, what in [*twice, (SWEEP, ("points", 0, "pairs"), repr(f"{pair}, forward, training"))]:
        found = reduce(getitem, way, content)
        with pytest.raises(ValueError, match=rf"^a\.json: .*{re.escape(again.format(what))}"):
            loaded(tmp_path, a=changed(content, way, [*found, found[0]]))


def test_what_may_be_is_read(tmp_path: Path) -> None:
    """The ceiling by two percent, as two measurements differ; medians may differ by less than nothing."""
    content = changed(LAYER, MODE_PERCENT, 102.0)
    (found,) = loaded(tmp_path, a=changed(content, ("derived", 0, "exposed_communication_us"), -3.5))
    assert (found.profile.modes[1].percent, found.derived[0].exposed_communication_us) == (102.0, -3.5)
    # Older files lack what was added.
    content = changed(suite(entry("x", 10.0)), ("environment", "gpus"), MOST)
    for way in (("kind",), *(("environment", name) for name in ("link", "code", "note"))):
        content = changed(content, way, ...)
    (found,) = loaded(tmp_path, a=content)
    assert (found.kind, found.environment.link, found.entries[0].baselines) == ("suite", None, ())
    assert found.environment.gpus == MOST


def test_records_without_times_are_passed_over_by_name(tmp_path: Path) -> None:
    paths = written(tmp_path, a=SUITE, **{kind: document(kind, {"failures": []}) for kind in UNTIMED})
    found, passed_over = load(paths)
    assert ([one.file for one in found], passed_over) == (["a.json"], [f"{kind}.json" for kind in UNTIMED])
    with pytest.raises(ValueError, match="expected a document with times: suite, profile, layer or sweep"):
        load(paths[1:])


def test_a_profile_of_the_product_is_read_alone_and_within_a_layer(tmp_path: Path) -> None:
    report = profile_report(Asked())
    (alone,) = loaded(tmp_path, a=report.as_json())
    assert isinstance(alone, ProfileDocument)
    assert alone.profile == Profile.of(report)
    assert [mode.median_us for mode in alone.profile.modes] == [mode.spread.median_us for mode in report.modes]
    within = changed(LAYER, ("profile",), msgspec.to_builtins(Profile.of(report)))
    assert loaded(tmp_path, a=within)[0].profile == alone.profile
