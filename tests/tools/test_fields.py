"""Fields of a JSON document: what is read, and how what is wrong is named."""

import json
from typing import Any

import pytest
from profiles import Asked, profile

from sonic_ep import CombineMode, ProfileReport
from sonic_ep.fields import LEAST_POSITIVE, MOST, Fields, shortened

NO_NUMBERS = (10**400, -(10**400), 10**200, MOST + 1, 1e300, float("nan"), float("inf"), float("-inf"), True, "1", None)


def fields(**values: Any) -> Fields:
    return Fields(file="a.json", path="top", values=values)


def test_what_is_read() -> None:
    found = fields(
        n=0,
        f=1.5,
        low=-2,
        most=MOST,
        word="all_to_all",
        yes=False,
        null=None,
        inner={"x": 3},
        each=[{"x": 1}],
        few=[0, 2],
    )
    assert [found.number(name) for name in ("n", "f", "most")] == [0.0, 1.5, float(MOST)]
    assert type(found.number("n")) is float
    assert found.number("low", least=-2) == -2
    assert (found.positive("f"), found.positive_or_none("null")) == (1.5, None)
    assert (found.count("most"), found.count("n", least=0), found.count_or_none("null")) == (MOST, 0, None)
    assert found.counts("few") == found.counts("few", length=2) == (0, 2)
    assert found.choice("word", CombineMode) is CombineMode.ALL_TO_ALL
    assert (found.text("word"), found.text_or_none("null")) == ("all_to_all", None)
    assert (found.flag("yes"), found.flag_or_none("null"), found.flag_or_none("yes")) == (False, None, False)
    assert (found.part("inner").where, found.part("inner").count("x")) == ("a.json: top.inner", 3)
    assert [(each.where, each.count("x")) for each in found.parts("each")] == [("a.json: top.each[0]", 1)]
    assert (found.part_or_none("null"), found.parts_or_none("null")) == (None, [])


@pytest.mark.parametrize("value", [*NO_NUMBERS, -1])
def test_what_is_no_number(value: object) -> None:
    for read in (fields(x=value).number, fields(x=value).positive):
        with pytest.raises(
            ValueError, match=r"^a\.json: top\.x: got .{1,90}, expected a number from .* to 4\.6\d*e\+18$"
        ):
            read("x")


@pytest.mark.parametrize("value", [*NO_NUMBERS, -1, 1.0, 0])
def test_what_is_no_count(value: object) -> None:
    with pytest.raises(
        ValueError, match=rf"^a\.json: top\.x: got .{{1,90}}, expected a whole number from 1 to {MOST}$"
    ):
        fields(x=value).count("x")
    with pytest.raises(ValueError, match=r"top\.x: got \[.{1,90}\], expected a list of some whole numbers from 1"):
        fields(x=[1, value]).counts("x", least=1)


@pytest.mark.parametrize("value", [0, LEAST_POSITIVE / 2, 5e-324])
def test_above_zero_is_far_enough_from_it(value: float) -> None:
    with pytest.raises(ValueError, match=r"expected a number from 1e-09"):
        fields(x=value).positive("x")


def test_bounds_are_included() -> None:
    assert fields(x=8).count("x", most=8) == 8
    with pytest.raises(ValueError, match="got 9, expected a whole number from 1 to 8"):
        fields(x=9).count("x", most=8)


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        ("text", 3, "got 3, expected a string"),
        ("flag", 1, "got 1, expected true or false"),
        ("part", [], r"got \[\], expected an object"),
        ("parts", {}, "got {}, expected a list of objects"),
        ("counts", [], r"got \[\], expected a list of some whole numbers"),
        ("counts", 3, "got 3, expected a list of some whole numbers"),
    ],
)
def test_other_kinds(read: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^a\.json: top\.x: {message}"):
        getattr(fields(x=value), read)("x")


@pytest.mark.parametrize("value", ["all", [], None, 3, "x" * 10_000])
def test_choices_name_what_may_be(value: object) -> None:
    message = r"top\.x: got .{1,90}, expected one of 'all_to_all', 'reduce_scatter', 'rank_dedup'$"
    with pytest.raises(ValueError, match=message):
        fields(x=value).choice("x", CombineMode)


def test_null_may_be_absent_in_sparse_documents_alone() -> None:
    sparse = Fields(path="", values={"inner": {}}, sparse=True)
    for found in (sparse, sparse.part("inner")):
        assert (found.number_or_none("x"), found.text_or_none("x"), found.parts_or_none("x")) == (None, None, [])
        with pytest.raises(ValueError, match="x: got nothing, expected a value"):
            found.number("x")
    with pytest.raises(ValueError, match=r"^a\.json: top\.x: got nothing, expected a value$"):
        fields().number_or_none("x")


def test_objects_at_the_top() -> None:
    assert Fields.of("key", {"x": 1}).count("x") == 1
    with pytest.raises(ValueError, match=r"^key\.x: got 0"):
        Fields.of("key", {"x": 0}).count("x")
    with pytest.raises(ValueError, match=r"^key: got \[3\], expected an object$"):
        Fields.of("key", [3])
    with pytest.raises(ValueError, match=r"^key: got .{1,90}, expected an object$"):
        Fields.of("key", "x" * 10_000)


def test_what_was_got_is_short() -> None:
    assert shortened("abc") == "'abc'"
    assert all(len(shortened(value)) <= 90 for value in (10**400, "x" * 10_000, list(range(1000))))


@pytest.mark.parametrize("value", [10**400, float("nan"), -1])
def test_a_profile_with_such_a_number_is_refused(value: object) -> None:
    """As it may stand in the cache's folder: an ``OverflowError`` there would be one rank's alone."""
    document = json.loads(json.dumps(profile(Asked()).as_json()))
    for part, name in (
        (document["shape"], "hidden"),
        (document["modes"][0], "median_us"),
        (document["pairs"][8], "rounds"),
    ):
        kept, part[name] = part[name], value
        with pytest.raises(ValueError, match=rf"profile\..*{name}: got .*, expected a"):
            ProfileReport.from_json(document)
        part[name] = kept
    assert ProfileReport.from_json(document).as_json() == document
