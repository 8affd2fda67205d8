"""docs/guarantees.md and the tests marked with ``promise`` name the same promises; files that it links exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROMISES = (ROOT / "docs" / "guarantees.md").read_text()
# Rows of tables: the promise, and last the words that `promise` marks its tests with.
ROWS = [re.split(r" \| ", row.strip("| ")) for row in re.findall(r"^\| .*$", PROMISES, re.MULTILINE)]
PROMISED = [row for row in ROWS if row[-1] not in ("kept by", "recorded in") and "bench/results" not in row[-1]]


def words_of(text: str) -> list[str]:
    return re.findall(r"`([a-z0-9-]+)`", text)


def test_every_promise_is_kept_by_a_test_and_every_mark_is_of_a_promise() -> None:
    assert len(PROMISED) > 40
    assert all(words_of(row[-1]) or row[-1].startswith("see ") for row in PROMISED)
    listed = [word for row in PROMISED for word in words_of(row[-1])]
    assert len(listed) == len(set(listed)), "a promise is listed twice"
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    marks = re.findall(r"^(?:@|pytestmark = )promise\((.*)\)$", sources, re.MULTILINE)
    assert {word.strip('"') for found in marks for word in found.split(", ")} == set(listed)


def test_every_file_linked_here_exists() -> None:
    links = re.findall(r"\]\(\.\./([\w/.]+)\)", PROMISES)
    assert links
    assert all((ROOT / target).exists() for target in links), links
