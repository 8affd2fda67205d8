"""Predicted costs against counting, and what "auto" makes of them."""

from dataclasses import replace
from itertools import combinations

import pytest

from sonic_ep import CombineMode, DispatchMode, EPConfig
from sonic_ep.cost import (
    H200_NVLINK,
    Workload,
    choose_modes,
    combine_seconds_per_byte,
    dispatch_seconds_per_byte,
)


@pytest.mark.parametrize(
    ("world_size", "top_k", "num_experts"), [(2, 3, 8), (4, 2, 8), (3, 4, 9), (1, 2, 4), (2, 4, 4)]
)
def test_expected_pairs_by_counting_every_choice(world_size: int, top_k: int, num_experts: int) -> None:
    held = num_experts // world_size
    choices = list(combinations(range(num_experts), top_k))
    remote = [len({expert // held for expert in chosen} - {0}) for chosen in choices]
    slots = [sum(expert >= held for expert in chosen) for chosen in choices]
    load = Workload(world_size=world_size, top_k=top_k, num_experts=num_experts)
    assert load.remote_pairs == pytest.approx(sum(remote) / len(choices))
    assert load.remote_slots == pytest.approx(sum(slots) / len(choices))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_auto_picks_modes_and_a_choice_of_the_caller_stands(world_size: int, top_k: int) -> None:
    load = Workload(world_size=world_size, top_k=top_k, num_experts=64)
    auto = choose_modes(EPConfig(), load)
    assert isinstance(auto.dispatch, DispatchMode)
    assert isinstance(auto.combine, CombineMode)
    for dispatch, combine in ((dispatch, combine) for dispatch in DispatchMode for combine in CombineMode):
        chosen = choose_modes(EPConfig(dispatch=dispatch, combine=combine), load)
        assert (chosen.dispatch, chosen.combine) == (dispatch, combine)
        half = choose_modes(EPConfig(dispatch=dispatch), load)
        assert (half.dispatch, half.combine) == (dispatch, auto.combine)


def test_auto_takes_the_cheapest() -> None:
    load = Workload(world_size=8, top_k=2, num_experts=64)
    # A token goes to fewer than two of seven other ranks: nobody gathers every token for that.
    assert choose_modes(EPConfig(), load).dispatch is DispatchMode.ALL_TO_ALL
    for costs in (dispatch_seconds_per_byte(load, H200_NVLINK), combine_seconds_per_byte(load, H200_NVLINK)):
        assert all(cost > 0 for cost in costs.values())
    slow_memory = replace(H200_NVLINK, memory=1.0)
    fast_engine = replace(H200_NVLINK, copy_engine=1e15, memory=1e15)
    assert choose_modes(EPConfig(), load, slow_memory).dispatch is DispatchMode.ALL_TO_ALL
    assert choose_modes(EPConfig(), load, fast_engine).dispatch is DispatchMode.ALL_GATHER


def test_partial_sums_win_where_a_token_has_several_slots_on_a_rank() -> None:
    chosen = choose_modes(EPConfig(), Workload(world_size=2, top_k=8, num_experts=64))
    assert chosen.combine is CombineMode.RANK_DEDUP
