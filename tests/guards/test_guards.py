"""Guards of the fast backend one by one: each fault is provoked alone, as another guard might hide it."""

import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from fast_kernels import before_each_launch
from layer_inputs import plan_of
from on_ranks import on_ranks
from promises import promise
from there_and_back import Modes, by_any_modes
from torch import Tensor
from workspaces import workspace_of

from sonic_ep import EPConfig, ExpertParallel, RoutingPlan, RowOverflowError
from sonic_ep.testing import CASES, Inputs, Rank, assert_bitwise, draw

pytestmark = pytest.mark.fast


def scores_with_ids(number: float, plan: RoutingPlan, workspace: Any) -> Tensor:
    """The group's scores, each of them ``number``, as they come with the ids of ``plan``."""
    from sonic_ep.fast.plan import PlanShape, gathered_counts
    from sonic_ep.fast.planner import Planner
    from sonic_ep.fast.staging import stage_call

    sizes = ("rank", "world_size", "max_tokens", "top_k", "num_experts")
    shape = PlanShape(**{name: getattr(plan, name) for name in sizes})
    errors, ids = plan.counts.new_zeros(3), plan.expert_ids[plan.rank, : plan.num_tokens]
    scores = torch.full((plan.num_tokens, plan.top_k), number, device=plan.counts.device)
    staged = Planner(workspace.group, EPConfig(), workspace).reserve(plan.max_tokens, plan.top_k, scored=True)
    room = {"max_tokens": plan.max_tokens, "num_experts": plan.num_experts}
    stage_call(ids.contiguous(), scores, None, staged, workspace, **room)
    workspace.barrier_after_write()
    return gathered_counts(staged, shape, workspace, errors).scores


def score_gradients(number: float, plan: RoutingPlan, ep: ExpertParallel) -> Tensor:
    """Of scores that weigh rows of ``number``, as they come back from the ranks that hold the rows: ``number`` each."""
    rows = torch.full((plan.row_capacity, 4), number / 4, device=plan.counts.device)
    scores = torch.ones(plan.num_tokens, plan.top_k, device=rows.device, requires_grad=True)
    ep.combine(rows, scores, plan).sum().backward()
    return scores.grad


# What one rank launches late, by what is called: a kernel that reads what others have staged or pushed, or the one that
# stages. Where halves take turns, the other rank overwrites the other half meanwhile.
LATE = {
    "staged scores_with_ids": "stage_kernel",
    "scores_with_ids": "count_kernel",
    "plan": "count_kernel",
    "all_to_all": "pull_to_rows_kernel",
    "rank_dedup": "pull_packed_kernel",
    "combine": "exchange_partial_sums_kernel",
    "staged combine": "stage_kernel",
    "score_gradients": "collect_kernel",
    "pushed score_gradients": "weigh_rows_kernel",
}


@pytest.mark.parametrize("call", LATE)
@on_ranks(2, pytest.param(3, marks=pytest.mark.thorough))
def test_a_late_rank_finds_what_was_written_for_it_and_is_waited_for(rank: Rank, call: str) -> None:
    size = rank.world_size

    def slow(kernel: str) -> None:
        if rank.rank == 1 and kernel == LATE[call]:
            time.sleep(0.2)

    def read(number: float) -> Tensor:
        if "scores_with_ids" in call:
            return scores_with_ids(number, plan, workspace)
        if call == "plan":
            return ep.plan(torch.full((size, 1), int(number), device=rank.device), num_experts=4 * size).expert_ids
        if "score_gradients" in call:
            return score_gradients(number, plan, ep)
        given = torch.full((size, 4), number, device=rank.device)
        if "combine" in call:
            # The scores are staged, and each token has one row of ones.
            return ep.combine(torch.ones(size, 4, device=rank.device), given[:, :1], plan)
        return ep.dispatch(given, plan)[:size]

    config = EPConfig(dispatch=call if call in ("all_to_all", "rank_dedup") else "auto", combine="rank_dedup")
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=size) as ep, workspace_of(rank) as workspace:
        # Of the tokens of a rank one goes to each rank.
        plan = ep.plan(torch.arange(size, device=rank.device)[:, None], num_experts=size)
        with before_each_launch(slow):
            for number in range(4):
                workspace.enter()
                assert bool((read(float(number)) == number).all())


# Wider than what a kernel overwrites or weighs at a time.
WIDE = 4100
FIRST, TIE = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]], [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 1]]
BOUNDS = {
    "fits": (FIRST, 10, None),
    "first rank": (FIRST, 9, "rank 0 is routed 10 rows"),
    "tie that fits": (TIE, 5, None),
    "tie": (TIE, 4, "rank 0 is routed 5 rows"),
    "middle rank": ([[2, 0, 0, 0], *TIE[1:]], 4, "rank 1 is routed 5 rows"),
}


@promise("device-flags")
@pytest.mark.parametrize(("experts", "bound", "said"), BOUNDS.values(), ids=BOUNDS)
@on_ranks(3)
def test_the_rank_whose_rows_pass_the_bound(rank: Rank, experts: list[list[int]], bound: int, said: str | None) -> None:
    idx = torch.tensor(experts[rank.rank], device=rank.device)[:, None]
    ep = ExpertParallel(backend="fast", config=EPConfig(max_rows=bound))
    plan = ep.plan(idx, num_experts=rank.world_size)
    rows = ep.dispatch(torch.ones(len(idx), WIDE, device=rank.device), plan)
    assert bool((rows[: plan.rows()] == 1).all() if said is None else rows.isnan().all())
    with nullcontext() if said is None else pytest.raises(RowOverflowError, match=said):
        ep.close()


CANARY = 7.0


@on_ranks(1, 2)
def test_nothing_behind_the_rows_is_read(rank: Rank) -> None:
    """More rows are routed here than there are."""
    from sonic_ep.fast.collectives import collect_values, reserve_values
    from sonic_ep.fast.combine import combine_primitives

    room = 3
    idx = torch.zeros(8, 1, dtype=torch.int64, device=rank.device)
    idx[::2] = rank.world_size - 1
    with ExpertParallel(backend="fast", config=EPConfig(max_rows=room)) as ep:
        plan = ep.plan(idx, num_experts=rank.world_size)
        with pytest.raises(RowOverflowError):
            ep.check()
    assert plan.row_capacity == room
    rows, values = (torch.full(shape, CANARY, device=rank.device) for shape in ((40, 8), (40,)))
    rows[:room], values[:room] = 1, 1
    scores = torch.ones(rank.world_size, 8, 1, device=rank.device)
    with workspace_of(rank) as workspace:
        # What other ranks would have pushed.
        reserve_values(workspace, 8, 1).rows(rank.rank, (8,), torch.float32).fill_(1)
        for primitive in combine_primitives(workspace).values():
            for given in (None, scores):
                workspace.enter()
                assert not bool((primitive.combine(rows[:room], given, plan) == CANARY).any())
            workspace.enter()
            workspace.barrier_before_write()
            sums, found = primitive.sums(rows[:room], None, plan, values_R=values[:room])
            assert not bool((sums == CANARY).any() | (found == CANARY).any())
            assert int(workspace.ticket) == 0
        workspace.enter()
        assert not bool((collect_values(values[:room], plan, workspace) == CANARY).any())


@on_ranks(2, 3)
def test_combine_has_room_for_all_tokens_and_sends_nothing_without_a_slot(rank: Rank) -> None:
    """Room for C tokens, few of which are there. A partial sum arrives from each rank that has a slot of the token."""
    from sonic_ep.fast.collectives import SCORES
    from sonic_ep.fast.combine.rank_dedup import RankDedupCombine
    from sonic_ep.fast.workspace import TAG_BYTES

    # K is no power of two, so that ids of the next token are within a block's reach.
    inputs = draw(replace(CASES["dropped_slots"], top_k=3), rank.world_size, rank.device)
    # More than a block of shared memory holds, whatever is kept for a token.
    max_tokens = 45
    with ExpertParallel(backend="reference", max_tokens_per_rank=max_tokens) as ep:
        plan = plan_of(ep, inputs)
    with workspace_of(rank) as workspace:
        workspace.enter()
        combine = RankDedupCombine(workspace)
        combine.combine(torch.ones(plan.row_capacity, 8, device=rank.device), None, plan)
        workspace.barrier_after_write()
        shared, others = combine.reserve(max_tokens, plan.top_k, row_bytes=4 * 8), rank.world_size - 1
        assert shared.flags.nbytes >= others * max_tokens * TAG_BYTES
        assert shared.received.nbytes >= others * max_tokens * 4 * 8
        arrived = shared.received.rows(rank.rank, (others, max_tokens, 8), torch.float32)
        owners = plan.expert_ids[rank.rank].div(plan.experts_per_rank, rounding_mode="floor")
        for step in range(1, rank.world_size):
            sender = (rank.rank + step) % rank.world_size
            has_slot = (owners == sender).any(dim=1)
            assert_bitwise(arrived[step - 1].isnan().all(dim=1), ~has_slot, f"from rank {sender}")
        workspace.barrier_after_write()
        workspace.enter()
        scores_with_ids(1.0, plan, workspace)
        held = workspace.staging(SCORES, 1)
        assert held.half_bytes >= max_tokens * plan.top_k * torch.float32.itemsize
        assert held.buffer.nbytes >= 2 * held.half_bytes


def gradients(ep: ExpertParallel, inputs: Inputs, wanted: tuple[bool, bool]) -> list[Tensor | None]:
    """Those of x and scores, where wanted."""
    tokens, given = inputs.tokens_of(ep.rank), zip((inputs.x, inputs.topk_scores), wanted, strict=True)
    x, scores = (tensor[tokens].clone().requires_grad_(want) for tensor, want in given)
    plan = plan_of(ep, inputs)
    y = ep.combine(ep.dispatch(x, plan), scores, plan)
    with pytest.MonkeyPatch.context() as patch:
        if ep.backend == "fast":
            patch.setattr(ep._backend._context(x.device).workspace, "_transport", None)
        y.backward(inputs.dy[tokens])
    return [x.grad, scores.grad]


@promise("x-gradient")
@by_any_modes
@on_ranks(2)
def test_ranks_may_need_different_gradients(rank: Rank, modes: Modes) -> None:
    """x, scores or both, on rank 0 alone; and backward shares no new memory."""
    inputs = draw(CASES["uneven_tokens"], rank.world_size, rank.device)
    config = EPConfig(dispatch=modes[0], combine=modes[1])
    with ExpertParallel(backend="reference", config=config) as ep:
        expected = gradients(ep, inputs, (True, True))
    with ExpertParallel(backend="fast", config=config) as ep:
        for wanted in product((True, False), repeat=2):
            mine = tuple(want and rank.rank == 0 for want in wanted)
            found = gradients(ep, inputs, mine)
            assert [grad is not None for grad in found] == list(mine)
            if mine[0]:
                assert_bitwise(found[0], expected[0], "dx")
