"""What docs/guarantees.md promises names tests that exist, and records that are there."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROMISES = (HERE.parents[1] / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+)::(test_\w+)`", PROMISES)))


def functions_of(stem: str) -> set[str]:
    tree = ast.parse(next(HERE.parent.rglob(f"{stem}.py")).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("stem", "test"), NAMED, ids=lambda word: word)
def test_every_test_named_here_exists(stem: str, test: str) -> None:
    assert test in functions_of(stem)


def test_every_promise_is_kept_by_a_test() -> None:
    rows = [line for line in PROMISES.splitlines() if line.startswith("| ") and "kept by" not in line]
    promises = [row for row in rows if "bench/results" not in row and "recorded in" not in row]
    assert promises
    assert [row for row in promises if "`test_" not in row and "| see " not in row] == []


def test_every_file_linked_here_exists() -> None:
    links = re.findall(r"\]\(\.\./([\w/.]+)\)", PROMISES)
    assert links
    for target in links:
        assert (HERE.parents[1] / target).exists(), target
