"""The layer with any shape, routing, option and pair of modes: forward and every gradient, against the oracle.

A failure names its seed (see ``random_cases``) with the command that runs it alone, by ``property_run.py``.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import count, islice
from pathlib import Path
from random import Random

import pytest
from promises import promise
from property_run import differences, failures, main
from random_cases import exact_inputs, example_of

from sonic_ep.testing import RankPool
from sonic_ep.testing.oracle import moe_oracle, routed_oracle

# Examples in a call of live ranks, and calls. Interpreted, an example takes some ten times as long.
BATCH = 20
BATCHES = {"reference": 24, "fast": 8}
EVERYDAY = {"reference": 3, "fast": 1}
MOST_SEEDS = 2**31


def soon_interpreted(seed: int) -> bool:
    """Exact examples of few ranks: of one rank all, of two every third, of three every sixth."""
    example = example_of(seed)
    every = {1: 1, 2: 3, 3: 6}.get(example.world_size)
    return example.exact and every is not None and seed % every == 0


def seeds_of(backend: str, batch: int) -> list[int]:
    """The seeds of one batch, always the same."""
    random = Random(f"{backend} {batch}")
    drawn = (random.randrange(MOST_SEEDS) for _ in count())
    return list(islice(drawn if backend == "reference" else filter(soon_interpreted, drawn), BATCH))


@promise("exact")
@pytest.mark.parametrize(
    ("backend", "batch"),
    [
        pytest.param(backend, batch, marks=() if batch < EVERYDAY[backend] else pytest.mark.thorough)
        for backend, batches in BATCHES.items()
        for batch in range(batches)
    ],
)
def test_any_example(pool: RankPool, backend: str, batch: int) -> None:
    found = failures(pool, backend, seeds_of(backend, batch))
    assert not found, "\n".join(found)


def test_exact_examples_are_not_of_zeros() -> None:
    """Zeros alone would be right too often. Plain PyTorch is exact here."""
    zeros: Counter[str] = Counter()
    examples = [e for e in map(example_of, range(40)) if e.exact and sum(e.case.tokens)]
    for example in examples:
        inputs = exact_inputs(example)
        oracle = routed_oracle(inputs) if example.routed else moe_oracle(inputs, inputs.topk_idx)
        assert differences(oracle.plain, oracle.truth, lambda name: slice(None)) == []
        zeros.update(name for name, truth in oracle.truth.items() if not truth.any())
    # Where all is dropped, or all h are below zero.
    assert max(zeros.values(), default=0) <= len(examples) / 4


def test_the_long_run_records_what_it_ran(cpu_pool: RankPool, tmp_path: Path) -> None:
    arguments = ["--examples", "2", "--seed", "4", "--backend", "reference", "--json", str(tmp_path / "found.json")]
    assert main([*arguments, "--commit", "a commit"], cpu_pool) == 0
    document = json.loads((tmp_path / "found.json").read_text())
    assert (document["kind"], document["examples"], document["failures"]) == ("properties", {"reference": 2}, [])
    assert sum(document["by_modes"].values()) == 2
