"""The schema of the results: what it reads, and that it names file, place, expected and got of what is wrong."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from profiles import Asked
from profiles import profile as profile_report
from report_documents import Json, changed, document, entry, layer, loaded, point, profile, settings, suite, sweep
from report_page.load import load
from schema import KINDS, MOST, Profile, ProfileDocument, Settings, Untimed

from sonic_ep import CombineMode, DispatchMode, EPConfig

SUITE = suite(
    entry("x", 10.0, gb_per_s=1.0, percent=50.0, floor_us=1.0, tflop_per_s=1.0, bar="b", bar_us=9.0, met=False)
)
PROFILE = document("profile", profile())
SWEEP = sweep(point(8))
Way = tuple[str | int, ...]
UNTIMED = [kind for kind, form in KINDS.items() if form is Untimed]
PERCENT, MODE_PERCENT = ("entries", 0, "percent"), ("profile", "modes", 1, "percent")


@pytest.mark.parametrize(
    ("content", "path", "value", "message"),
    [
        (SUITE, ("kind",), "sweet", "kind: expected one of suite, profile, layer, sweep, .*, got 'sweet'"),
        (layer(), ("kind",), ..., "kind: expected one of .*, got None"),
        (layer(), ("environment",), ..., "missing required field `environment`"),
        (layer(), ("environment", "gpus"), -1, r"Expected `int` >= 0 - at `\$.environment.gpus`, got -1"),
        (layer(), ("environment", "torch"), None, r"Expected `str`, got `null` - at `\$.environment.torch`"),
        (SUITE, ("entries", 0, "median_us"), 0, r"Expected `float` >= 1e-09 - at `\$.entries\[0\].median_us`, got 0"),
        (SUITE, ("entries", 0), 3, r"Expected `object`, got `int` - at `\$.entries\[0\]`, got 3"),
        (layer(), ("setup", "thiek"), [1, 2], r"Expected `array` of length 5, got 2 - at `\$.setup.thiek`"),
        (layer(), ("setup", "add_bias"), 1, r"Expected `bool`, got `int` - at `\$.setup.add_bias`, got 1"),
        (layer(), ("config", "combine"), "all", r"combine: got 'all', expected .*all_to_all.* - at `\$.config`"),
        (layer(), ("profile", "modes", 1, "mode"), "x", r"a mode of dispatch, got 'x' - at `\$.profile.modes\[1\]`"),
        (SWEEP, ("points", 0, "picked"), {}, r"missing required field `dispatch` - at `\$.points\[0\].picked`"),
        (SWEEP, ("points", 0, "routing"), "odd", r"Invalid enum value 'odd' - at `\$.points\[0\].routing`"),
        (layer(), ("breakdown", 0, "parts", "plan"), "1", r"Expected `float`, got `str` - at `\$.breakdown\[0\].parts"),
        (layer(), ("setup", "thiek"), [8, 8, 8, 2**40, 2**39], r"Expected `int` <= 65536 - at `\$.setup.thiek\[3\]`"),
        # Each size alone would do; x of a rank has more bytes than any array may have, C(E, K) takes hours.
        (SUITE, ("entries", 0, "shape", "T"), 2**60, r"Expected T\*H elements of at most .*, got T=11529.* at .*shape"),
        (layer(), ("setup", "thiek"), [2**60, 2**20, 1, 8, 1], r"Expected T\*H elements of at most .*setup"),
        (SUITE, ("entries", 0, "shape", "E"), 2**40, "Expected `int` <= 65536 .*shape.E`, got 10995"),
        (SUITE, ("entries", 0, "shape", "K"), 2**40, "Expected `int` <= 65536 .*shape.K`, got 10995"),
        # Error and bound: 2e-3 and 4e-3, 3e-3 and 6e-3; of dw2 5e-3 and 4e-3.
        (layer(), ("accuracy", 0, "error"), 5e-3, r"Expected `ok` False, .*, got True - at `\$.accuracy\[0\]`"),
        (layer(), ("accuracy", 0, "worst_row"), 7e-3, r"Expected `ok` False, .*, got True - at `\$.accuracy\[0\]`"),
        (layer(), ("accuracy", 1, "ok"), False, r"Expected `ok` True, .*, got False - at `\$.accuracy\[1\]`"),
        (layer(), ("accuracy", 2, "ok"), True, r"Expected `ok` False, .*, got True - at `\$.accuracy\[2\]`"),
        (SUITE, PERCENT, 102.01, "Expected `float` <= 102.0 .*, got 102.01"),
        (layer(), MODE_PERCENT, 204.5, r"Expected `float` <= 204.0 - at `\$.profile.modes\[1\].percent`, got 204.5"),
        (layer(), ("profile", "modes"), [], r"length >= 1 - at `\$.profile.modes`, got \[\]"),
        (layer(), ("profile", "pairs"), [], r"length >= 1 - at `\$.profile.pairs`, got \[\]"),
        (layer(), ("profile", "shape", "tokens"), [], r"length >= 1 - at `\$.profile.shape.tokens`"),
        (SWEEP, ("points", 0, "pairs"), [], r"length >= 1 - at `\$.points\[0\].pairs`"),
        (SUITE, ("entries", 0, "p90_us"), 9.0, r"Expected min, .* ascend, got \[.*10.0, 9.0, .*at `\$.entries\[0\]`"),
        (SUITE, ("entries", 0, "min_us"), 9.96, r"Expected min, .* ascend, got \[9.96, 9.95"),
        (SUITE, ("entries", 0, "median_us"), 5e-324, "Expected `float` >= 1e-09"),
    ],
)
def test_errors_name_file_place_expected_and_got(
    tmp_path: Path, content: Json, path: Way, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^a\.json: .*{message}"):
        loaded(tmp_path, a=changed(content, path, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "a.json: expected a readable file: No such file or directory"),
        ("{", "a.json: expected JSON: "),
        ("[1]", r"a.json: expected a JSON object, got \[1\]"),
        ("[" * 100_000, "a.json: expected JSON: maximum recursion depth"),
        (b"\xff", "a.json: expected JSON: .*byte 0"),
        (json.dumps(SUITE).replace('"gpus": 2', '"gpus": ' + "9" * 5000), "a.json: expected JSON: .*out of range"),
        (json.dumps(SUITE).replace('"gpus": 2', '"gpus": NaN'), "a.json: expected JSON: .*invalid character"),
    ],
)
def test_files_that_are_no_documents(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
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


@pytest.mark.parametrize(
    "content", [SUITE, PROFILE, layer(config=settings(max_rows=7)), SWEEP], ids=["suite", "profile", "layer", "sweep"]
)
def test_what_is_no_number_is_refused_with_a_short_message(tmp_path: Path, content: Json) -> None:
    for way, number in numbers_in(content):
        for value in NO_COUNTS if isinstance(number, int) else NO_NUMBERS:
            with pytest.raises(ValueError, match=r"a\.json: .{1,300}$"):
                loaded(tmp_path, a=changed(content, way, value))


@pytest.mark.parametrize(
    ("content", "way", "pair"),
    [
        (PROFILE, (), "all_gather + all_to_all"),
        (layer(), ("profile",), "all_gather + all_to_all"),
        (SWEEP, ("points", 0, "profile"), "all_gather + all_to_all"),
        # In each pass once.
        (SWEEP, ("points", 0), "all_gather + all_to_all, forward, training"),
    ],
)
def test_modes_and_pairs_come_once(tmp_path: Path, content: Json, way: Way, pair: str) -> None:
    holder: Any = content
    for step in way:
        holder = holder[step]
    for name, again in {"modes": "('plan', '')", "pairs": repr(pair)}.items():
        if name in holder:
            message = re.escape(f"Expected every mode and pair once, got [{again}] again - at `")
            with pytest.raises(ValueError, match=rf"^a\.json: .*{message}"):
                loaded(tmp_path, a=changed(content, (*way, name), [*holder[name], holder[name][0]]))


def test_what_may_be_is_read(tmp_path: Path) -> None:
    """The ceiling by two percent, as two measurements differ; medians may differ by less than nothing."""
    content = changed(layer(), MODE_PERCENT, 102.0)
    (found,) = loaded(tmp_path, a=changed(content, ("derived", 0, "exposed_communication_us"), -3.5))
    assert (found.profile.modes[1].percent, found.derived[0].exposed_communication_us) == (102.0, -3.5)
    # Older files lack what was added.
    content = changed(suite(entry("x", 10.0)), ("environment", "gpus"), MOST)
    del content["kind"], content["environment"]["link"], content["environment"]["code"], content["environment"]["note"]
    (found,) = loaded(tmp_path, a=content)
    assert (found.kind, found.environment.link, found.entries[0].baselines) == ("suite", None, ())
    assert found.environment.gpus == MOST


def test_records_without_times_are_passed_over_by_name(tmp_path: Path) -> None:
    contents = {"a": SUITE, **{kind: document(kind, {"failures": []}) for kind in UNTIMED}}
    paths = [tmp_path / f"{name}.json" for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(json.dumps(content))
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
    within = changed(layer(), ("profile",), msgspec.to_builtins(Profile.of(report)))
    assert loaded(tmp_path, a=within)[0].profile == alone.profile


def test_settings_are_those_of_the_config() -> None:
    config = EPConfig(dispatch=DispatchMode.ALL_GATHER, combine=CombineMode.RANK_DEDUP, max_rows=7)
    assert Settings.of(config).named() == "all_gather + rank_dedup, max_rows=7"
    assert Settings.of(EPConfig(redispatch_x_in_backward=True)).named("again") == "auto + auto, again"
