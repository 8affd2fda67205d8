"""Guards of the fast backend one by one: each fault is provoked alone, as another guard might hide it."""

import importlib
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
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

    sizes = ("rank", "world_size", "max_tokens", "top_k", "num_experts")
    shape = PlanShape(**{name: getattr(plan, name) for name in sizes})
    errors, ids = plan.counts.new_zeros(3), plan.expert_ids[plan.rank, : plan.num_tokens]
    scores = torch.full((plan.num_tokens, plan.top_k), number, device=plan.counts.device)
    return gathered_counts(ids, shape, workspace, errors, scores).scores


# What one rank does late, and its module: it launches a kernel that reads shared memory, or it writes.
LATE = {
    "gather_scores": ("collectives", "gather_kernel"),
    "scores_with_ids": ("collectives", "gather_kernel"),
    "staged scores_with_ids": ("plan", "stage_scores"),
    "return_to_origin": ("collectives", "collect_kernel"),
    "plan": ("plan", "count_kernel"),
    "all_to_all": ("dispatch.all_to_all", "pull_to_rows_kernel"),
    "rank_dedup": ("dispatch.rank_dedup", "pull_packed_kernel"),
}


@pytest.mark.parametrize("call", LATE)
@on_ranks(2)
def test_a_late_rank_finds_what_was_written_for_it_and_is_waited_for(rank: Rank, call: str) -> None:
    name, late = LATE[call]
    module = importlib.import_module(f"sonic_ep.fast.{name}")
    slowed = "launch" if late.endswith("_kernel") else late
    function, kernel = getattr(module, slowed), getattr(module, late)

    def slow(*arguments: object, **constants: object) -> None:
        if rank.rank == 1 and (slowed == late or arguments[0] is kernel):
            time.sleep(0.2)
        function(*arguments, **constants)

    def read(number: float) -> Tensor:
        if "scores_with_ids" in call:
            return scores_with_ids(number, plan, workspace)
        if call == "plan":
            return ep.plan(torch.full((2, 1), int(number), device=rank.device), num_experts=4).expert_ids
        shapes = {"gather_scores": (2, 1), "return_to_origin": (plan.row_capacity,)}
        given = torch.full(shapes.get(call, (2, 4)), number, device=rank.device)
        return getattr(module, call)(given, plan, workspace) if call in shapes else ep.dispatch(given, plan)[:2]

    config = EPConfig(dispatch=call if "dispatch" in name else "auto")
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=2) as ep, workspace_of(rank) as workspace:
        # Of two tokens of a rank one goes to each of two ranks.
        plan = ep.plan(torch.tensor([[0], [1]], device=rank.device), num_experts=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, slowed, slow)
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
    from sonic_ep.fast.collectives import return_to_origin
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
        for primitive in combine_primitives(workspace).values():
            for given in (None, scores):
                workspace.enter()
                assert not bool((primitive.combine(rows[:room], given, plan) == CANARY).any())
        workspace.enter()
        assert not bool((return_to_origin(values[:room], plan, workspace) == CANARY).any())


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
        shared, others = combine.reserve(plan, row_bytes=4 * 8), rank.world_size - 1
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
        assert workspace.reserve(SCORES, 1).nbytes >= max_tokens * plan.top_k * torch.float32.itemsize


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
