"""The plan against its definition: a worked example, a slow second derivation, and ``check`` on changed fields."""

import re
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from backends import WORLD_SIZES, both_backends
from on_ranks import on_ranks
from promises import promise
from torch import Tensor
from workspaces import workspace_of

from sonic_ep import EPConfig, ExpertParallel, PlanError, RoutingPlan, RowOverflowError
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.plan import malformed_field, row_ceiling
from sonic_ep.reference.plan import build_plan, pair_exchange, slot_exchange
from sonic_ep.testing import CASES, Case, Rank, assert_bitwise, draw
from sonic_ep.testing.cases import repeating

TENSOR_FIELDS = [field.name for field in fields(RoutingPlan) if field.type == "Tensor"]
WORKED_IDS = torch.tensor([[[0, 2], [1, 0], [3, 2]], [[2, 1], [-1, 3], [0, 0]]])


def plan_of(ids_WCK: Tensor, rank: int, num_experts: int, row_capacity: int | None = None) -> RoutingPlan:
    ceiling, tokens = ids_WCK.numel() if row_capacity is None else row_capacity, ids_WCK.shape[1]
    return build_plan(ids_WCK.int(), rank=rank, num_tokens=tokens, num_experts=num_experts, row_capacity=ceiling)


def test_worked_example() -> None:
    """The numbers in the docstring of sonic_ep.plan."""
    plans = [plan_of(WORKED_IDS, rank, 4, row_capacity=6 - rank) for rank in range(2)]
    for plan in plans:
        plan.check()
        assert plan.counts.tolist() == [4, 2, 3, 2]
        assert plan.row_of_slot.tolist() == [[[0, 0], [4, 1], [3, 1]], [[2, 5], [-1, 4], [2, 3]]]
        assert plan.pair_tokens.tolist() == [[2, 2], [2, 2]]
    assert plans[0].group_ends.tolist() == [4, 6]
    assert plans[0].slot_of_row.tolist() == [0, 3, 10, 11, 2, 7]
    assert plans[0].packed_of_token.tolist() == [[0, 1, -1], [2, -1, 3]]
    assert plans[1].group_ends.tolist() == [3, 5]
    assert plans[1].slot_of_row.tolist() == [1, 5, 6, 4, 9]
    assert plans[1].packed_of_token.tolist() == [[0, -1, 1], [2, 3, -1]]
    assert [plan.rows() for plan in plans] == [6, 5]
    assert [plan.packed_rows() for plan in plans] == [4, 4]
    slots = slot_exchange(plans[0])
    # Rank 0 keeps slots 0, 3, 2 (rows 0, 1, 4 of its own) and sends 1, 5, 4 (rows 0, 1, 3 of rank 1).
    assert slots.slots.tolist() == [0, 3, 2, 1, 5, 4]
    assert (slots.send_splits, slots.receive_splits) == ([3, 3], [3, 3])
    assert slots.rows.tolist() == [0, 1, 4, 2, 3, 5]
    pairs = pair_exchange(plans[0])
    assert pairs.tokens.tolist() == [0, 1, 0, 2]
    assert (pairs.send_splits, pairs.receive_splits) == ([2, 2], [2, 2])


def by_hand(ids: list[list[list[int]]], rank: int, num_experts: int) -> dict[str, list[int]]:
    """The fields of a plan from its slots as tuples (expert, rank, token, k), sorted."""
    ranks, max_tokens, top_k, held = len(ids), len(ids[0]), len(ids[0][0]), num_experts // len(ids)
    every = [(r, t, k) for r in range(ranks) for t in range(max_tokens) for k in range(top_k)]
    slots = sorted((ids[r][t][k], r, t, k) for r, t, k in every if ids[r][t][k] >= 0)
    of_owner = [[slot for slot in slots if slot[0] // held == owner] for owner in range(ranks)]
    row_of = {slot[1:]: row for owned in of_owner for row, slot in enumerate(owned)}
    pairs = [sorted({slot[1:3] for slot in owned}) for owned in of_owner]
    place_of = {pair: place for place, pair in enumerate(pairs[rank])}
    return {
        "counts": [sum(slot[0] == expert for slot in slots) for expert in range(num_experts)],
        "row_of_slot": [row_of.get(slot, -1) for slot in every],
        "group_ends": [sum(slot[0] <= rank * held + i for slot in of_owner[rank]) for i in range(held)],
        "slot_of_row": [(r * max_tokens + t) * top_k + k for _, r, t, k in of_owner[rank]],
        "pair_tokens": [sum(r == source for r, _ in owned) for source in range(ranks) for owned in pairs],
        "packed_of_token": [place_of.get((r, t), -1) for r in range(ranks) for t in range(max_tokens)],
    }


@promise("order")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_every_field_against_a_second_derivation(world_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_experts, max_tokens, top_k = 24, 7, 1 + 2 * seed
    # From -6: about a fifth of the slots are dropped; repetition is likely.
    ids = torch.randint(-6, num_experts, (world_size, max_tokens, top_k), generator=generator).clamp(min=-1)
    for rank in range(world_size):
        plan = plan_of(ids, rank, num_experts)
        plan.check()
        for name, values in by_hand(ids.tolist(), rank, num_experts).items():
            found = getattr(plan, name).flatten()
            assert found[: len(values)].tolist() == values, name
            assert bool((found[len(values) :] == -1).all()), name


def reference_plan(mine: Tensor, num_experts: int, config: EPConfig | None = None) -> RoutingPlan:
    with ExpertParallel(backend="reference", config=config) as ep:
        return ep.plan(mine, num_experts)


def assert_same_plan(plan: RoutingPlan, expected: RoutingPlan) -> None:
    assert (plan.rank, plan.num_tokens) == (expected.rank, expected.num_tokens)
    for name in TENSOR_FIELDS:
        assert_bitwise(getattr(plan, name), getattr(expected, name), name)


def ids_of(rank: Rank, case: Case) -> Tensor:
    inputs = draw(case, rank.world_size, rank.device)
    return inputs.topk_idx[inputs.tokens_of(rank.rank)]


# A plan of "fast" is compared with the reference's, so that one also for other numbers of ranks.
@promise("order")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("backend", "world_size"), [("reference", 3), *(("fast", size) for size in WORLD_SIZES)])
@on_ranks()
def test_ranks_hold_one_and_the_same_plan(rank: Rank, backend: str, world_size: int, case: Case) -> None:
    inputs, mine = draw(case, world_size), ids_of(rank, case)
    with ExpertParallel(backend=backend) as ep:
        plan = ep.plan(mine, case.num_experts)
        ep.check()
    plan.check()
    assert_same_plan(plan, reference_plan(mine, case.num_experts))
    gather = BoundedCollectives(resolve_group(None)).all_gather
    for name in ("expert_ids", "counts", "row_of_slot", "pair_tokens"):
        for theirs in gather(getattr(plan, name)):
            assert_bitwise(theirs, getattr(plan, name), name)
    for source, ids_CK in enumerate(plan.expert_ids.cpu()):
        theirs = inputs.topk_idx[inputs.tokens_of(source)]
        assert torch.equal(ids_CK[: len(theirs)].long(), theirs)
        assert bool((ids_CK[len(theirs) :] == -1).all())


@pytest.mark.parametrize("name", [*TENSOR_FIELDS, "rank", "num_tokens"])
def test_check_refuses_a_changed_field(name: str) -> None:
    plan = plan_of(WORKED_IDS, 0, 4, row_capacity=6)
    plan.check()
    wrong = {"rank": [1], "num_tokens": [2, 4]}.get(name) or changes_of(getattr(plan, name))
    for value in wrong:
        with pytest.raises(PlanError):
            replace(plan, **{name: value}).check()


def changes_of(tensor: Tensor) -> list[Tensor]:
    """Another dtype, a column less, and each number one larger."""
    larger = [tensor.flatten().index_add(0, torch.tensor([i]), tensor.new_ones(1)) for i in range(tensor.numel())]
    return [tensor.long(), tensor[..., :-1], *(changed.view(tensor.shape) for changed in larger)]


def test_row_ceiling() -> None:
    sizes = {"world_size": 4, "max_tokens": 10, "top_k": 8, "experts_per_rank": 3}
    assert row_ceiling(**sizes, distinct=True) == 4 * 10 * 3
    assert row_ceiling(**sizes, distinct=False) == 4 * 10 * 8


LARGE = [
    Case(name="several tiles", tokens=(350, 1, 201), top_k=5, num_experts=24, hidden=1),
    Case(name="more choices than slots in a tile", tokens=(3,), top_k=600, num_experts=606, hidden=1),
    Case(name="many experts", tokens=(129,), top_k=8, num_experts=1200, hidden=1),
    Case(name="repeated in a tile", tokens=(150,), top_k=6, choose=repeating, hidden=1),
    Case(name="int32 ids", tokens=(40,), hidden=1),
]


@pytest.mark.fast
@on_ranks(1, 2, 3)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_plans_of_many_tiles(rank: Rank, case: Case) -> None:
    mine = ids_of(rank, case)
    configs = [EPConfig(), EPConfig(max_rows=10**6, cpu_sync_on_runtime=True)]
    # The bound on rows does not depend on the number of tiles: the other two settings at the small size.
    if case.name == "int32 ids":
        mine = mine.int()
        configs += [EPConfig(cpu_sync_on_runtime=True), EPConfig(max_rows=10**6)]
    for config in configs:
        with ExpertParallel(backend="fast", config=config) as ep:
            plan = ep.plan(mine, case.num_experts)
            ep.check()
        assert_same_plan(plan, reference_plan(mine, case.num_experts, config))


def device_errors(
    ep: ExpertParallel, wrong: Callable[[], None], good: Callable[[], object], error: type[Exception]
) -> list[str]:
    """What two wrong calls raise: one by ``ep.check``, one by the plan ``PLANS_AHEAD`` later; then all is well."""
    from sonic_ep.fast.device_errors import PLANS_AHEAD

    messages = []
    for ask, plans_between in ((ep.check, 0), (good, PLANS_AHEAD - 1)):
        wrong()
        for _ in range(plans_between):
            good()
        with pytest.raises(error) as raised:
            ask()
        messages.append(str(raised.value))
    good()
    ep.check()
    return messages


@pytest.mark.fast
@on_ranks(2)
@pytest.mark.parametrize("bad_id", [-2, 4, 2**31 - 1, 2**40, -(2**33) + 1])
def test_ids_out_of_range_are_found_on_the_device(rank: Rank, bad_id: int) -> None:
    """They count as dropped, and every rank raises, once."""
    good = torch.tensor([[0, 3], [2, 1]], device=rank.device)
    mine = torch.tensor([[0, bad_id], [2, 1]], device=rank.device) if rank.rank == 1 else good
    with ExpertParallel(backend="fast") as ep:

        def wrong() -> None:
            plan = ep.plan(mine, num_experts=4)
            plan.check()
            assert plan.expert_ids[1].tolist() == [[0, -1], [2, 1]]

        messages = device_errors(ep, wrong, lambda: ep.plan(good, num_experts=4).check(), ValueError)
    for step, message in enumerate(messages, start=1):
        named = f"rank {rank.rank} of 2: topk_idx: got expert ids out of range on rank 1, expected 0 to 3"
        assert re.match(rf"{named}.*step {step}\)$", message, re.DOTALL), message


@pytest.mark.fast
@on_ranks(1, 2, 3)
def test_overflow_is_found_on_the_device(rank: Rank) -> None:
    """Without a host read: all rows are NaN now, and the error comes later."""
    case = CASES["one_rank"]
    inputs = draw(case, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    fitting = torch.zeros_like(inputs.topk_idx[tokens]) - 1
    with ExpertParallel(backend="fast", config=EPConfig(max_rows=20)) as ep:

        def overflow() -> None:
            plan = ep.plan(inputs.topk_idx[tokens], case.num_experts)
            rows = ep.dispatch(inputs.x[tokens], plan)
            assert rows.shape[0] == 20
            assert bool(rows.isnan().all())
            assert bool(ep.combine(torch.ones_like(rows), inputs.topk_scores[tokens], plan).isnan().all())

        messages = device_errors(ep, overflow, lambda: ep.plan(fitting, case.num_experts), RowOverflowError)
        ep.dispatch(inputs.x[tokens], ep.plan(fitting, case.num_experts))
        ep.check()
    # Plan, dispatch and combine are a step each.
    for step, message in zip((1, 4), messages, strict=True):
        assert_overflow(message, rank, rows=rank.world_size * 13 * 3)
        assert message.endswith(f"step {step})")


def assert_overflow(message: str, rank: Rank, rows: int) -> None:
    last = rank.world_size - 1
    named = f"rank {rank.rank} of {rank.world_size}: max_rows: got 20, expected at least {rows}"
    assert re.match(rf"{named}\b.*\brank {last}\b.*\b{rows} rows", message), message


@on_ranks(2)
@both_backends
def test_overflow_of_exact_sizes_names_rows_and_bound_on_every_rank(rank: Rank, backend: str) -> None:
    """Two ranks of 13 tokens and 3 slots each, all on the last rank. Afterwards the group still works."""
    case = CASES["one_rank"]
    with ExpertParallel(backend=backend, config=EPConfig(max_rows=20, cpu_sync_on_runtime=True)) as ep:
        for _ in range(2):
            with pytest.raises(RowOverflowError, match=r"\[0, 78\]") as raised:
                ep.plan(ids_of(rank, case), case.num_experts)
            assert_overflow(str(raised.value), rank, rows=78)
    for bound, rows in ((60, 60), (100, 78)):
        with ExpertParallel(backend=backend, config=EPConfig(max_rows=bound)) as ep:
            plan = ep.plan(ids_of(rank, CASES["uniform"]), case.num_experts)
        assert plan.row_capacity == rows
        plan.check()


@pytest.mark.parametrize("exact", [False, True])
def test_max_rows_holds_with_and_without_exact_sizes(exact: bool) -> None:
    idx = torch.tensor([[0], [1], [-1]])
    for bound in (2, 3):
        with ExpertParallel(config=EPConfig(max_rows=bound, cpu_sync_on_runtime=exact)) as ep:
            assert ep.plan(idx, num_experts=2).rows() == 2
    overflow = pytest.raises(RowOverflowError, match="max_rows: got 1, expected at least 2")
    with ExpertParallel(config=EPConfig(max_rows=1, cpu_sync_on_runtime=exact)) as ep, overflow:
        ep.plan(idx, num_experts=2)


def test_more_slots_than_int32_counts_are_refused_and_malformed() -> None:
    refused = pytest.raises(ValueError, match=f"got {2**31} slots, expected at most {2**31 - 2**20}")
    with ExpertParallel(max_tokens_per_rank=2**31) as ep, refused:
        ep.plan(torch.zeros(1, 1, dtype=torch.int64), num_experts=2)
    shapes = dict.fromkeys(("counts", "group_ends", "slot_of_row"), (1,))
    for slots, malformed in ((2**31 - 2**20, None), (2**31 - 2**20 + 1, "expert_ids")):
        shapes |= dict.fromkeys(("expert_ids", "row_of_slot"), (1, slots, 1))
        shapes |= {"pair_tokens": (1, 1), "packed_of_token": (1, slots)}
        held = {name: torch.empty(shape, dtype=torch.int32, device="meta") for name, shape in shapes.items()}
        assert malformed_field(RoutingPlan(rank=0, num_tokens=1, **held)) == malformed


@on_ranks(2)
@both_backends
def test_max_tokens_is_agreed_on_in_the_first_call_with_tokens(rank: Rank, backend: str) -> None:
    calls = ((0, 0), (3, 5), (5, 0), (0, 0))
    with ExpertParallel(backend=backend) as ep:
        ids = [torch.zeros(tokens[rank.rank], 1, dtype=torch.int64, device=rank.device) for tokens in calls]
        plans = [ep.plan(idx, 4) for idx in ids]
    for plan in plans:
        plan.check()
    assert [plan.max_tokens for plan in plans] == [0, 5, 5, 5]


@pytest.mark.fast
@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", ["uneven_tokens", "zero_token_ranks"])
def test_scores_and_ids_are_exchanged_together(rank: Rank, name: str) -> None:
    from sonic_ep.fast.plan import PlanShape, gathered_counts

    case = CASES[name]
    inputs = draw(case, rank.world_size, rank.device)
    tokens, barriers = inputs.tokens_of(rank.rank), []
    max_tokens = max(case.tokens_of_rank(source) for source in range(rank.world_size))
    sizes = {"max_tokens": max_tokens, "top_k": case.top_k, "num_experts": case.num_experts}
    shape = PlanShape(rank=rank.rank, world_size=rank.world_size, **sizes)
    errors = torch.zeros(3, dtype=torch.int32, device=rank.device)
    with workspace_of(rank) as workspace:
        with pytest.MonkeyPatch.context() as patch:
            for barrier in ("barrier_before_write", "barrier_after_write"):
                run = getattr(workspace, barrier)
                patch.setattr(workspace, barrier, lambda run=run, name=barrier: (barriers.append(name), run()))
            scores = inputs.topk_scores[tokens].double()
            counts = gathered_counts(inputs.topk_idx[tokens], shape, workspace, errors, scores)
        assert barriers == ["barrier_before_write", "barrier_after_write"]
        for source in range(rank.world_size):
            theirs, here = inputs.tokens_of(source), slice(case.tokens_of_rank(source))
            assert_bitwise(counts.expert_ids[source, here], inputs.topk_idx[theirs].int(), "ids")
            assert_bitwise(counts.scores[source, here], inputs.topk_scores[theirs], "scores")
        workspace.barrier_after_write()
