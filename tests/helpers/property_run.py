"""Examples of the property tests on live ranks: ``python tests/helpers/property_run.py --seed 1 --examples 1``.

Example i has the seed ``--seed`` + i, and runs on one backend or on both. Exits with 1 and the seeds if any is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path

import torch
from backends import BACKENDS
from limits import HANG_SECONDS
from random_cases import Example, exact_inputs, example_of
from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.backend import ExpertWeights
from sonic_ep.distributed.group import device_of_rank
from sonic_ep.plan import row_ceiling
from sonic_ep.profiler.machine import environment
from sonic_ep.testing import Inputs, Rank, RankError, RankPool, draw, verify_moe, verify_routed
from sonic_ep.testing.oracle import BY_TOKENS, Outcome, moe_oracle, routed_oracle, run_moe, run_routed

BATCH = 50
# What every rank holds whole.
OF_ALL = ("drouter_w", "tokens_per_expert")
COMMAND = "python tests/helpers/property_run.py --examples {} --seed {} --backend {}"


def failures(pool: RankPool, backend: str, seeds: Iterable[int]) -> list[str]:
    """Runs the examples, one call for each number of ranks. Raises ``RankError``, with the seed, if one raises."""
    by_ranks: dict[int, list[int]] = defaultdict(list)
    for seed in seeds:
        by_ranks[example_of(seed).world_size].append(seed)
    found: list[str] = []
    for world_size, group in sorted(by_ranks.items()):
        timeout = HANG_SECONDS + 10 * len(group)
        found += chain(*pool.run(errors_of_seeds, backend, group, world_size=world_size, timeout=timeout))
    return found


def errors_of_seeds(rank: Rank, backend: str, seeds: Sequence[int]) -> list[str]:
    """The errors on this rank, each behind the command that runs its example alone."""
    found = []
    for seed in seeds:
        example = example_of(seed)
        again = f"{COMMAND.format(1, seed, backend)}: {example}, rank {rank.rank}"
        try:
            found += [f"{again}: {line}" for line in (_exact if example.exact else _accurate)(rank, backend, example)]
        except Exception as error:
            raise AssertionError(f"{again} raised {error!r}") from error
    return found


def _exact(rank: Rank, backend: str, example: Example) -> list[str]:
    inputs = exact_inputs(example)
    if example.routed:
        oracle, run, counts = routed_oracle(inputs), run_routed, {}
    else:
        oracle, run = moe_oracle(inputs, inputs.topk_idx), run_moe
        counts = {"tokens_per_expert": torch.bincount(inputs.topk_idx.flatten(), minlength=inputs.case.num_experts)}
    with _parallel(backend, example, inputs) as ep:
        outcome = run(_moved(inputs, rank.device), ep)
        ep.check()
    return differences(outcome, {**oracle.truth, **counts}, partial(_share, inputs, rank.rank))


def _accurate(rank: Rank, backend: str, example: Example) -> list[str]:
    verify = verify_routed if example.routed else verify_moe
    with _parallel(backend, example, draw(example.case, example.world_size)) as ep:
        findings = verify(example.case, ep, rank.device)
        ep.check()
    return [str(finding) for finding in findings if not finding.ok]


def _parallel(backend: str, example: Example, inputs: Inputs) -> ExpertParallel:
    config = replace(example.config, max_rows=_rows(inputs, example) if example.tight else None)
    return ExpertParallel(backend=backend, config=config, max_tokens_per_rank=example.max_tokens)


def _rows(inputs: Inputs, example: Example) -> int:
    """The most rows that a rank receives, or may receive where the tested router decides; at least 1."""
    case, held = inputs.case, inputs.case.num_experts // inputs.world_size
    if not example.exact and not example.routed:
        sizes = {"world_size": inputs.world_size, "max_tokens": max(case.tokens), "top_k": case.top_k}
        return max(1, row_ceiling(**sizes, experts_per_rank=held, distinct=True))
    owner_S = inputs.topk_idx[inputs.topk_idx >= 0] // held
    return max(1, int(torch.bincount(owner_S.long(), minlength=1).max()))


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    def moved(of: Inputs | ExpertWeights) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in vars(of).items() if isinstance(value, Tensor)}

    return replace(inputs, **moved(inputs), experts=replace(inputs.experts, **moved(inputs.experts)))


def _share(inputs: Inputs, rank: int, name: str) -> slice:
    if name in OF_ALL:
        return slice(None)
    return inputs.tokens_of(rank) if name in BY_TOKENS else inputs.experts_of(rank)


def differences(outcome: Outcome, truth: Outcome, share: Callable[[str], slice]) -> list[str]:
    """Where ``outcome`` differs from the truth. +0 equals -0."""
    said = []
    for name, whole in truth.items():
        got = outcome[name].cpu()
        expected = whole[share(name)].to(got.dtype)
        if got.shape != expected.shape:
            said.append(f"{name}: got shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
        elif (wrong := got != expected).any():
            first = tuple(wrong.nonzero()[0].tolist())
            values = f"got {got[first].item()!r}, expected {expected[first].item()!r}"
            said.append(f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, the first at {first}: {values}")
    return said


def main(arguments: Sequence[str] | None = None, live: RankPool | None = None) -> int:
    """Returns an exit code. live: ranks to use instead of ranks of its own."""
    parser = argparse.ArgumentParser(prog="property_run.py", description="Examples of the property tests.")
    parser.add_argument("--examples", type=int, default=10_000, metavar="N", help="on each backend (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first example (default: 0)")
    parser.add_argument("--backend", choices=[*BACKENDS, "both"], default="both")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="PATH", help="what came of it")
    parser.add_argument("--commit", metavar="NAME", help="of the code, where git cannot tell")
    options = parser.parse_args(arguments)
    backends = BACKENDS if options.backend == "both" else [options.backend]
    seeds, found = range(options.seed, options.seed + options.examples), []
    with RankPool(options.device) if live is None else nullcontext(live) as pool:
        for backend, first in product(backends, range(0, len(seeds), BATCH)):
            try:
                found += failures(pool, backend, seeds[first : first + BATCH])
            except RankError as error:
                found.append(str(error))
            print(f"{backend}: {first} to {first + BATCH} of {len(seeds)} examples, {len(found)} wrong", flush=True)
    print(*found, sep="\n", flush=True)
    if options.json is not None:
        examples, command = [*map(example_of, seeds)], COMMAND.format(len(seeds), seeds.start, options.backend)
        device = device_of_rank(0) if options.device == "cuda" else torch.device("cpu")
        most = max(example.world_size for example in examples)
        document = {
            "kind": "properties",
            "environment": environment(device, most, options.commit, command),
            "examples": dict.fromkeys(backends, len(examples)),
            "by_kind": Counter(example.case.name for example in examples),
            "by_modes": Counter(example.modes for example in examples),
            "failures": found,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
