"""The dispatch primitives, each against a copy by hand: moved bytes, so bit for bit."""

from dataclasses import replace

import pytest
import torch
from backends import WORLD_SIZES, both_backends, dispatch_primitives_of
from combine_by_hand import BY_HAND, HIDDEN, canonical, expert_rows, owners_of_slots
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.testing import CASES, Case, Inputs, Rank, RankPool, assert_bitwise, draw

MODES = list(DispatchMode)
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def rows_by_hand(inputs: Inputs, rank: int) -> Tensor:
    """Rows of ``rank`` in canonical order: for each of its experts, tokens in order of the group, k within a token."""
    experts = range(*inputs.experts_of(rank).indices(inputs.case.num_experts))
    tokens = [int(t) for expert in experts for t in (inputs.topk_idx == expert).nonzero()[:, 0]]
    return inputs.x[tokens]


def dispatched(rank: Rank, backend: str, case: Case, mode: DispatchMode) -> None:
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    with ExpertParallel(backend=backend, config=EPConfig(dispatch=mode)) as ep:
        plan = ep.plan(inputs.topk_idx[tokens], case.num_experts)
        rows = ep.dispatch(inputs.x[tokens], plan)
    assert rows.shape == (plan.row_capacity, case.hidden)
    assert_bitwise(rows[: plan.rows()], rows_by_hand(inputs, rank.rank))


@pytest.mark.parametrize("mode", MODES)
@by_case
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@both_backends
def test_rows_arrive_in_canonical_order(
    pool: RankPool, backend: str, world_size: int, case: Case, mode: DispatchMode
) -> None:
    pool.run(dispatched, backend, case, mode, world_size=world_size)


def received_by_mode(rank: Rank, backend: str, case: Case) -> None:
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    with ExpertParallel(backend=backend) as ep:
        plan = ep.plan(inputs.topk_idx[tokens], case.num_experts)
    received = {
        mode: primitive.receive(inputs.x[tokens], plan)
        for mode, primitive in dispatch_primitives_of(backend, rank.device).items()
    }
    owner = inputs.topk_idx // plan.experts_per_rank
    here = ((owner == rank.rank) & (inputs.topk_idx >= 0)).any(dim=1)
    # Behind the packed tokens a backend may leave room.
    packed = received[DispatchMode.RANK_DEDUP][: int(here.sum())]
    assert_bitwise(packed, inputs.x[here])
    gathered = received[DispatchMode.ALL_GATHER].view(rank.world_size, plan.max_tokens, case.hidden)
    for source in range(rank.world_size):
        theirs = inputs.x[inputs.tokens_of(source)]
        assert_bitwise(gathered[source, : len(theirs)], theirs)
    assert received[DispatchMode.ALL_TO_ALL].shape[0] == plan.row_capacity


@by_case
@both_backends
def test_each_mode_receives_what_it_says(pool: RankPool, backend: str, case: Case) -> None:
    pool.run(received_by_mode, backend, case, world_size=4)


def gradient_of_dispatch(rank: Rank, backend: str, case: Case, config: EPConfig) -> None:
    """Summing a token's rows with weights: its gradient is the sum of its rows' weights, whatever lies behind them."""
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    x = inputs.x[tokens].clone().requires_grad_()
    with ExpertParallel(backend=backend, config=config) as ep:
        plan = ep.plan(inputs.topk_idx[tokens], case.num_experts)
        grad = torch.full((plan.row_capacity, case.hidden), float("nan"), dtype=case.dtype, device=rank.device)
        grad[: plan.rows()] = 1
        ep.dispatch(x, plan).backward(grad)
    slots = (inputs.topk_idx[tokens] >= 0).sum(dim=1, keepdim=True)
    assert x.grad is not None
    assert_bitwise(x.grad, slots.to(case.dtype).expand_as(x).contiguous())


def gradient_roundings(rank: Rank, backend: str, case: Case, combine: CombineMode) -> None:
    """Dx is the sum of its rows' gradients with the roundings of the configured combine mode, and of no other."""
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    slots = expert_rows(inputs)
    x = torch.zeros(len(inputs.dy[tokens]), HIDDEN, dtype=case.dtype, device=rank.device, requires_grad=True)
    with ExpertParallel(backend=backend, config=EPConfig(combine=combine)) as ep:
        plan = ep.plan(inputs.topk_idx[tokens], case.num_experts)
        grad = torch.full((plan.row_capacity, HIDDEN), float("nan"), dtype=case.dtype, device=rank.device)
        grad[: plan.rows()] = canonical(inputs, slots, rank.rank)
        ep.dispatch(x, plan).backward(grad)
    assert x.grad is not None
    ones = torch.ones(case.top_k, device=rank.device)
    for token, owners in enumerate(owners_of_slots(inputs, plan.experts_per_rank)[tokens].tolist()):
        expected = BY_HAND[combine](slots[tokens][token], ones, owners)
        assert_bitwise(x.grad[token].cpu(), expected.cpu(), f"token {token}")


@both_backends
@pytest.mark.parametrize("combine", CombineMode)
@pytest.mark.parametrize("dispatch_case", ["uniform", "dropped_slots", "repeated_experts"])
def test_gradient_has_the_roundings_of_the_combine_mode(
    pool: RankPool, backend: str, dispatch_case: str, combine: CombineMode
) -> None:
    case = replace(CASES[dispatch_case], dtype=torch.bfloat16, top_k=6)
    pool.run(gradient_roundings, backend, case, combine, world_size=3)


@both_backends
@pytest.mark.parametrize("combine", ["all_to_all", "reduce_scatter", "rank_dedup"])
@pytest.mark.parametrize("case", ["uniform", "dropped_slots", "repeated_experts", "zero_token_ranks"])
def test_gradient_sums_rows_and_never_reads_behind_them(pool: RankPool, backend: str, case: str, combine: str) -> None:
    pool.run(gradient_of_dispatch, backend, CASES[case], EPConfig(combine=combine), world_size=3)
