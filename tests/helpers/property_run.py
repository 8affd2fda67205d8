"""Many examples of the property tests, or one again: ``python tests/helpers/property_run.py --seed 1 --examples 1``.

Example i has the seed ``--seed`` + i, and runs on one backend or on both. Exits with 1 and the seeds if any is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from backends import BACKENDS
from random_cases import example_of
from run_examples import Failure, failures

from sonic_ep.distributed.group import device_of_rank
from sonic_ep.profiler.machine import environment
from sonic_ep.testing import RankError, RankPool

BATCH = 50


def main(arguments: Sequence[str] | None = None, live: RankPool | None = None) -> int:
    """Returns an exit code. live: ranks to use instead of ranks of its own."""
    options = _options(arguments)
    seeds = range(options.seed, options.seed + options.examples)
    backends = BACKENDS if options.backend == "both" else [options.backend]
    started = time.monotonic()
    found: list[Failure] = []
    with RankPool(options.device) if live is None else nullcontext(live) as pool:
        for backend in backends:
            for first in range(0, len(seeds), BATCH):
                batch = seeds[first : first + BATCH]
                found += _failures(pool, backend, batch)
                done = f"{backend}: {batch.stop - options.seed} of {options.examples} examples"
                print(f"{done}, {len(found)} wrong, {time.monotonic() - started:.0f} s", flush=True)
    for failure in found:
        print(failure, flush=True)
    if options.json is not None:
        document = _document(options, backends, found, time.monotonic() - started)
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if found else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="property_run.py", description="Examples of the property tests.")
    parser.add_argument("--examples", type=int, default=10_000, metavar="N", help="on each backend (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first example (default: 0)")
    parser.add_argument("--backend", choices=[*BACKENDS, "both"], default="both")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="PATH", help="what came of it")
    parser.add_argument("--commit", metavar="NAME", help="of the code, where git cannot tell")
    options = parser.parse_args(arguments)
    if options.examples < 1 or options.seed < 0:
        parser.error(f"got --examples {options.examples} --seed {options.seed}, expected at least 1 and at least 0")
    return options


def _failures(pool: RankPool, backend: str, batch: range) -> list[Failure]:
    """Failures of the batch; where ranks have stopped at an error, each example runs by itself."""
    try:
        return failures(pool, backend, batch)
    except RankError as error:
        if len(batch) == 1:
            return [Failure(backend=backend, seed=batch.start, said=(str(error),))]
        return [failure for seed in batch for failure in _failures(pool, backend, range(seed, seed + 1))]


def _document(
    options: argparse.Namespace, backends: Sequence[str], found: Sequence[Failure], seconds: float
) -> dict[str, Any]:
    examples = [example_of(seed) for seed in range(options.seed, options.seed + options.examples)]
    device = device_of_rank(0) if options.device == "cuda" else torch.device("cpu")
    which = f"--examples {options.examples} --seed {options.seed} --backend {options.backend}"
    command = f"python tests/helpers/property_run.py {which}"
    most = max(example.world_size for example in examples)
    return {
        "kind": "properties",
        "environment": environment(device, most, options.commit, command),
        "examples": {backend: len(examples) for backend in backends},
        "by_kind": _counted(e.kind.value for e in examples),
        "by_world_size": _counted(str(e.world_size) for e in examples),
        "by_modes": _counted(e.modes for e in examples),
        "by_dtype": _counted(str(e.case.dtype).removeprefix("torch.") for e in examples),
        "seconds": round(seconds, 1),
        "failures": [{"again": failure.again, **asdict(failure)} for failure in found],
    }


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


if __name__ == "__main__":
    sys.exit(main())
