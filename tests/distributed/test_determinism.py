"""A repeated call gives the same bits, whichever rank is late, whatever memory held before, whatever ran in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count, product
from random import Random

import pytest
import torch
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import Case, Inputs, Rank, draw
from sonic_ep.testing.cases import dropping, repeating
from sonic_ep.testing.oracle import Outcome, run_moe, run_routed

# Of two inputs that take turns, half of them each.
REPETITIONS, FEW = 100, 8
# Repetitions between two calls of something else.
OTHERS_EVERY = 25
MOST_SECONDS_LATE, MOST_CYCLES_LATE = 2e-3, 2_000_000
# Elements, from one cache line to more than any tensor of the case has.
FILLED_SIZES = (8, 32, 128, 512, 2048, 16384)
TINY = Case(name="tiny", tokens=(3, 2), hidden=8, intermediate=4, num_experts=6, top_k=3, choose=repeating, seed=40)
LARGE = replace(TINY, tokens=(1500, 1301), hidden=512, intermediate=256, num_experts=24, dtype=torch.bfloat16)


def disturb(rank: Rank, random: Random) -> None:
    """Fill the allocator's free memory with NaN, and delay one rank or none. random: equal on all ranks."""
    late, share = random.randrange(rank.world_size + 1), random.random()
    filled = [torch.full((size,), float("nan"), device=rank.device) for size in FILLED_SIZES]
    del filled
    if late == rank.rank and rank.device.type == "cuda":
        torch.cuda._sleep(int(share * MOST_CYCLES_LATE))
    elif late == rank.rank:
        time.sleep(share * MOST_SECONDS_LATE)


BOTH_FLAGS = EPConfig(
    dispatch="rank_dedup", combine="rank_dedup", redispatch_x_in_backward=True, cpu_sync_on_runtime=True
)
NO_FLAGS = EPConfig(dispatch="all_to_all", combine="reduce_scatter")
# Interpreted, two ranks take half a second for a call there and back. A sum of two is the same in either order.
SETTINGS = [("reference", 2, run_routed, NO_FLAGS, REPETITIONS), ("fast", 2, run_moe, NO_FLAGS, FEW)]
THOROUGH = [
    ("reference", 3, run_routed, BOTH_FLAGS, REPETITIONS),
    ("reference", 3, run_moe, NO_FLAGS, REPETITIONS),
    ("fast", 1, run_routed, NO_FLAGS, REPETITIONS),
    ("fast", 2, run_routed, NO_FLAGS, REPETITIONS),
    ("fast", 2, run_routed, BOTH_FLAGS, REPETITIONS),
    ("fast", 3, run_moe, NO_FLAGS, REPETITIONS),
]


@promise("same-bits")
@on_ranks()
@pytest.mark.parametrize(
    ("backend", "world_size", "run", "config", "times"),
    [*SETTINGS, *(pytest.param(*setting, marks=pytest.mark.thorough) for setting in THOROUGH)],
)
def test_repetitions_have_the_same_bits(
    rank: Rank, backend: str, run: Callable[[Inputs, ExpertParallel], Outcome], config: EPConfig, times: int
) -> None:
    """Two inputs of the same shapes in turns; now and then another layer, and another shape, in between."""
    case, random, number = LARGE if rank.device.type == "cuda" else TINY, Random(7), count()
    drawn = [draw(replace(case, seed=case.seed + more), rank.world_size, rank.device) for more in range(2)]
    others = draw(replace(case, tokens=(1, 2), choose=dropping, seed=45), rank.world_size, rank.device)
    with ExpertParallel(backend=backend, config=config) as ep, ExpertParallel(backend=backend) as another:
        first = [run(inputs, ep) for inputs in drawn]
        assert all(tensor.isfinite().all() for outcome in first for tensor in outcome.values())
        for repetition, (inputs, expected) in product(range(1, times // 2), zip(drawn, first, strict=True)):
            disturb(rank, random)
            if next(number) % OTHERS_EVERY == 1:
                run_moe(others, another)
                run_routed(others, ep)
                disturb(rank, random)
            assert_same_bits(run(inputs, ep), expected, f"of repetition {repetition}")
