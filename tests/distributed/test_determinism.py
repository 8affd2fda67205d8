"""A repeated call gives the same bits, whichever rank is late, whatever memory held before, whatever ran in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, product
from random import Random

import pytest
import torch
from on_ranks import on_ranks
from promises import promise
from torch import Tensor

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import Case, Inputs, Rank, assert_bitwise, draw
from sonic_ep.testing.cases import dropping, repeating
from sonic_ep.testing.oracle import Outcome, run_moe, run_routed

# Of two inputs that take turns, half of them each.
REPETITIONS, FEW = 200, 8
# Repetitions between two calls of something else.
OTHERS_EVERY = 25
MOST_SECONDS_LATE, MOST_CYCLES_LATE = 2e-3, 2_000_000
# Elements, from one cache line to more than any tensor of the case has.
FILLED_SIZES = (8, 32, 128, 512, 2048, 16384)
TINY = Case(name="tiny", tokens=(3, 2), hidden=8, intermediate=4, num_experts=6, top_k=3, choose=repeating, seed=40)
LARGE = replace(TINY, tokens=(1500, 1301), hidden=512, intermediate=256, num_experts=24, dtype=torch.bfloat16)


def case_on(rank: Rank) -> Case:
    return LARGE if rank.device.type == "cuda" else TINY


def disturb(rank: Rank, random: Random) -> None:
    """Fill the allocator's free memory with NaN, and delay one rank or none. random: equal on all ranks."""
    late, share = random.randrange(rank.world_size + 1), random.random()
    filled = [torch.full((size,), float("nan"), device=rank.device) for size in FILLED_SIZES]
    del filled
    if late == rank.rank and rank.device.type == "cuda":
        torch.cuda._sleep(int(share * MOST_CYCLES_LATE))
    elif late == rank.rank:
        time.sleep(share * MOST_SECONDS_LATE)


def assert_repeatable(
    calls: Sequence[Callable[[], Outcome]], between: Callable[[], None], times: int = REPETITIONS
) -> None:
    """Each of ``calls``, which alternate, gives finite numbers, and the same ones all ``times``."""
    first = [call() for call in calls]
    for outcome in first:
        for name, tensor in outcome.items():
            assert tensor.isfinite().all(), name
    for repetition, (call, expected) in product(range(1, times), zip(calls, first, strict=True)):
        between()
        for name, tensor in call().items():
            assert_bitwise(tensor, expected[name], f"{name} of repetition {repetition}")


def drawn_twice(rank: Rank, case: Case) -> list[Inputs]:
    """Two inputs of the same shapes: what one call leaves behind is wrong for the next."""
    return [draw(replace(case, seed=case.seed + more), rank.world_size, rank.device) for more in range(2)]


BOTH_FLAGS = EPConfig(
    dispatch="rank_dedup", combine="rank_dedup", redispatch_x_in_backward=True, cpu_sync_on_runtime=True
)
NO_FLAGS = EPConfig(dispatch="all_to_all", combine="reduce_scatter")
# Interpreted, two ranks take half a second for a call there and back.
SETTINGS = [
    pytest.param("reference", 2, NO_FLAGS, REPETITIONS, id="reference-2"),
    pytest.param("reference", 3, BOTH_FLAGS, REPETITIONS, id="reference-3-flags"),
    pytest.param("fast", 1, NO_FLAGS, FEW, id="fast-1-few"),
    pytest.param("fast", 1, NO_FLAGS, REPETITIONS, marks=pytest.mark.thorough, id="fast-1"),
    pytest.param("fast", 2, NO_FLAGS, FEW, id="fast-2-few"),
    pytest.param("fast", 2, NO_FLAGS, REPETITIONS, marks=pytest.mark.thorough, id="fast-2"),
    pytest.param("fast", 2, BOTH_FLAGS, REPETITIONS, marks=pytest.mark.thorough, id="fast-2-flags"),
]


@promise("same-bits")
@on_ranks()
@pytest.mark.parametrize(("backend", "world_size", "config", "times"), SETTINGS)
def test_repetitions_have_the_same_bits(rank: Rank, backend: str, config: EPConfig, times: int) -> None:
    """The layer with a routing of the caller's; now and then another layer, and another shape, in between."""
    inputs = drawn_twice(rank, case_on(rank))
    others = draw(replace(case_on(rank), tokens=(1, 2), choose=dropping, seed=45), rank.world_size, rank.device)
    random, number = Random(7), count()
    with ExpertParallel(backend=backend, config=config) as ep, ExpertParallel(backend=backend) as another:

        def between() -> None:
            disturb(rank, random)
            if next(number) % OTHERS_EVERY == 1:
                run_moe(others, another)
                run_routed(others, ep)
                disturb(rank, random)

        assert_repeatable([lambda: run_routed(inputs[0], ep), lambda: run_routed(inputs[1], ep)], between, times // 2)


# A sum of two is the same in either order; of three it is not.
@promise("same-bits")
@on_ranks()
@pytest.mark.parametrize(
    ("backend", "world_size", "times"),
    [
        pytest.param("reference", 3, REPETITIONS, id="reference"),
        pytest.param("fast", 2, FEW, id="fast-few"),
        pytest.param("fast", 3, REPETITIONS, marks=pytest.mark.thorough, id="fast"),
    ],
)
def test_repetitions_with_the_router_have_the_same_bits(rank: Rank, backend: str, times: int) -> None:
    inputs, random = drawn_twice(rank, case_on(rank)), Random(7)
    with ExpertParallel(backend=backend, config=NO_FLAGS) as ep:
        calls = [lambda: run_moe(inputs[0], ep), lambda: run_moe(inputs[1], ep)]
        assert_repeatable(calls, lambda: disturb(rank, random), times // 2)


def summed_in_any_order(random: Random) -> Tensor:
    """A sum of floats in an order that changes, as atomic additions would give it."""
    terms = torch.tensor(random.sample([1e8, 1.0, -1e8, 0.25, 3e7, -3e7], 6))
    return sum(terms, torch.zeros(()))


def test_an_order_that_changes_is_seen() -> None:
    random = Random(0)
    with pytest.raises(AssertionError, match="y of repetition"):
        assert_repeatable([lambda: {"y": summed_in_any_order(random)}], lambda: None)


def test_memory_that_nobody_wrote_is_seen() -> None:
    with pytest.raises(AssertionError, match="dw1"):
        assert_repeatable([lambda: {"dw1": torch.tensor([1.0, float("nan")])}], lambda: None)
